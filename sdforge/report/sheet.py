"""The contact sheet: prompts and seeds down, the preset and what it came from across."""

from __future__ import annotations

import io
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdforge.plan import Step

GROUND, INK, QUIET, RULE = (250, 249, 246), (34, 34, 40), (120, 120, 128), (226, 224, 218)
GAP, LEFT, TOP, SMALLEST, LARGEST = 8, 230, 44, 128, 384


def columns(step: Step) -> list[tuple[str, str]]:
    """Return (beginning of the file names, label) of the columns: bases, what is between, the preset last."""
    found = []
    for link, artifact in step.inputs:
        assert artifact is not None
        label = link.use.reference
        if link.use.role == "checkpoint":
            label = step.node.recipe.name
        elif label.startswith("preset.") or label in _unbaked(step):
            label = "before baking"
        found.append((link.use.role, (artifact.digest or artifact.identity)[:16], label))
    ordered = [row for row in found if row[0] != "checkpoint"] + [row for row in found if row[0] == "checkpoint"]
    return [(digest, label) for _, digest, label in ordered]


def _unbaked(step: Step) -> list[str]:
    """What the preset was before its LoRAs were baked."""
    bake = step.node.recipe.targets.get("preset.bake")
    return [use.reference for use in bake.uses if use.role == "checkpoint"] if bake else []


def contact_sheet(step: Step, folder: Path) -> bytes:
    """Return the sheet as PNG, from the single pictures in `folder`."""
    settings = json.loads(step.node.target.settings)
    across = columns(step)
    rows = [(p, seed) for p in range(len(settings["prompts"])) for seed in settings["seeds"]]
    with Image.open(folder / f"{across[0][0]}/{rows[0][0] + 1}-{rows[0][1]}.png") as first:
        edge = min(LARGEST, max(SMALLEST, first.width))
    sheet = Image.new("RGB", (LEFT + len(across) * (edge + GAP) + GAP, TOP + len(rows) * (edge + GAP) + GAP), GROUND)
    draw = ImageDraw.Draw(sheet)
    head, text = ImageFont.load_default(16), ImageFont.load_default(13)
    for i, (_, label) in enumerate(across):
        x = LEFT + i * (edge + GAP)
        bold = i == len(across) - 1
        draw.text((x, 16), _fitting(draw, label, head, edge), INK if bold else QUIET, head)
    for j, (p, seed) in enumerate(rows):
        y = TOP + j * (edge + GAP)
        if j and rows[j - 1][0] != p:
            draw.line((GAP, y - GAP // 2, sheet.width - GAP, y - GAP // 2), RULE)
        lines = textwrap.wrap(settings["prompts"][p], 30)[:5] if seed == settings["seeds"][0] else []
        draw.multiline_text(
            (GAP * 2, y + 2), "\n".join([*lines, f"seed {seed}"]), INK if lines else QUIET, text, spacing=4
        )
        for i, (digest, _) in enumerate(across):
            with Image.open(folder / f"{digest}/{p + 1}-{seed}.png") as picture:
                small = picture.convert("RGB").resize((edge, edge), Image.Resampling.LANCZOS)
            sheet.paste(small, (LEFT + i * (edge + GAP), y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fitting(
    draw: ImageDraw.ImageDraw, label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    while label and draw.textlength(label, font) > width:
        label = label[:-2] + "…"
    return label
