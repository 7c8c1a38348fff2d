"""Contact sheets: of a preset (prompts and seeds down, what it came from across), and of a training's samples."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from sdforge.artifact import WITH
from sdforge.plan import Step
from sdforge.report.lettering import font, readable, wrapped

GROUND, INK, QUIET, RULE = (250, 249, 246), (34, 34, 40), (120, 120, 128), (226, 224, 218)
GAP, LEFT, TOP, SMALLEST, LARGEST = 8, 230, 44, 128, 384
HEAD, TEXT = 16, 13  # sizes of type


def columns(step: Step) -> list[tuple[str, str]]:
    """Return (folder of the pictures, label) of the columns: bases, what is between, the preset last."""
    found = []
    sidecars = any(link.use.role == "sidecars" for link, _ in step.inputs)
    for link, artifact in step.inputs:
        assert artifact is not None
        label, folder = link.use.reference, artifact.called
        if link.use.role == "sidecars":
            continue
        if link.use.role == "checkpoint":
            preset = [(folder, "without sidecars"), (folder + WITH, step.node.recipe.name)]
            last = preset if sidecars else [(folder, step.node.recipe.name)]
            continue
        if label.startswith("preset.") or label in _unbaked(step):
            label = "before baking"
        found.append((folder, label))
    return found + last


def rows(step: Step) -> list[tuple[str, list[str]]]:
    """Return (stem of the pictures' names, lines that say what they show) of the rows; a line above begins a group."""
    settings = json.loads(step.node.target.settings)
    found = []
    for p, prompt in enumerate(settings["prompts"]):
        for seed in settings["seeds"]:
            said = _wrapped(prompt) if seed == settings["seeds"][0] else []
            found.append((f"{p + 1}-{seed}", [*said, f"seed {seed}"]))
    for link, artifact in step.inputs:
        if artifact is not None and link.use.role == "sidecars" and artifact.kind == "null_text":
            for p, prompt in enumerate([artifact.facts["prompt"], *settings["prompts"]]):
                says = f"{link.use.reference}, {'as it was inverted' if p == 0 else 'edited'}"
                found.append((f"{artifact.called}-{p}", [*_wrapped(prompt), says]))
    return found


def _wrapped(text: Any) -> list[str]:
    return wrapped(str(text), TEXT, 30, LEFT - 3 * GAP)[:5]


def _unbaked(step: Step) -> list[str]:
    """What the preset was before its LoRAs were baked."""
    bake = step.node.recipe.targets.get("preset.bake")
    return [use.reference for use in bake.uses if use.role == "checkpoint"] if bake else []


def contact_sheet(step: Step, folder: Path) -> bytes:
    """Return the sheet as PNG, from the single pictures in `folder`. What was not drawn stays empty."""
    names = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")}
    across = [column for column in columns(step) if any(name.startswith(f"{column[0]}/") for name in names)]
    down = rows(step)

    def cell(i: int, j: int) -> Path | None:
        column, stem = across[i][0], down[j][0]
        # with sidecars that leave a row as it is, it was drawn once
        wanted = (f"{column}/{stem}.png", f"{column.removesuffix(WITH)}/{stem}.png")
        return next((folder / name for name in wanted if name in names), None)

    return _grid([label for _, label in across], [lines for _, lines in down], cell)


def sample_sheet(samples: list[list[Any]], read: Callable[[str], bytes]) -> bytes:
    """Return the pictures that were drawn while a training ran as PNG: steps down, prompts across.

    samples: [step, prompt, sha256]; read: sha256 → the picture's bytes.
    """
    prompts, steps = list(dict.fromkeys(row[1] for row in samples)), sorted({row[0] for row in samples})
    found = {(row[1], row[0]): row[2] for row in samples}

    def cell(i: int, j: int) -> io.BytesIO | None:
        sha256 = found.get((prompts[i], steps[j]))
        return io.BytesIO(read(sha256)) if sha256 else None

    return _grid(prompts, [[f"step {step}"] for step in steps], cell)


def pair_sheet(labels: tuple[str, str], pairs: dict[tuple[int, int], tuple[Path, Path]]) -> bytes:
    """Return pictures of two presets side by side as PNG, and where they differ, light where that is much.

    pairs: (number of the prompt, seed) → both pictures.
    """
    cells = sorted(pairs)

    def cell(i: int, j: int) -> Path | io.BytesIO:
        return pairs[cells[j]][i] if i < len(labels) else _gap(*pairs[cells[j]])

    return _grid([*labels, "difference, 4-fold"], [[f"prompt {number}, seed {seed}"] for number, seed in cells], cell)


def _gap(one: Path, two: Path) -> io.BytesIO:
    """Return four times the absolute difference of two pictures, the second brought to the first one's size."""
    with Image.open(one) as first, Image.open(two) as second:
        gap = ImageChops.difference(first.convert("RGB"), second.convert("RGB").resize(first.size))
    buffer = io.BytesIO()
    gap.point(lambda value: min(255, 4 * value)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def _grid(across: list[str], down: list[list[str]], cell: Callable[[int, int], Any]) -> bytes:
    """Return a grid of pictures as PNG; the last column is the one that matters.

    down: the lines beside each row; with several of them it begins a group. cell: (column, row) → a file, or None.
    """
    first = next(found for i in range(len(across)) for j in range(len(down)) if (found := cell(i, j)))
    with Image.open(first) as picture:
        edge = min(LARGEST, max(SMALLEST, picture.width))
    sheet = Image.new("RGB", (LEFT + len(across) * (edge + GAP) + GAP, TOP + len(down) * (edge + GAP) + GAP), GROUND)
    draw = ImageDraw.Draw(sheet)
    head, text = font(HEAD), font(TEXT)
    for i, label in enumerate(across):
        colour = INK if i == len(across) - 1 else QUIET
        draw.text((LEFT + i * (edge + GAP), 16), fitting(draw, label, head, edge), colour, head)
    for j, lines in enumerate(down):
        y, begins = TOP + j * (edge + GAP), len(lines) > 1
        if j and begins:
            draw.line((GAP, y - GAP // 2, sheet.width - GAP, y - GAP // 2), RULE)
        draw.multiline_text((GAP * 2, y + 2), "\n".join(lines), INK if begins else QUIET, text, spacing=4)
        for i in range(len(across)):
            if found := cell(i, j):
                with Image.open(found) as picture:
                    put(sheet, picture, (LEFT + i * (edge + GAP), y), edge)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def put(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], edge: int) -> None:
    """Put a picture into a square of a sheet, whole and in its own shape."""
    share = edge / max(picture.size)
    width, height = (max(1, round(side * share)) for side in picture.size)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(small, (corner[0] + (edge - width) // 2, corner[1] + (edge - height) // 2))


def fitting(draw: ImageDraw.ImageDraw, text: str, letters: Any, width: int) -> str:
    """Return a text in letters that are drawn, at most `width` pixels wide, shortened where it has to be."""
    label = readable(text)
    while label and draw.textlength(label, letters) > width:
        label = label[:-2] + "…"
    return label
