"""The grid of a sweep: the values of one setting across, of the other (or the seeds) down, a band for each prompt."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from sdforge.grids import Grid
from sdforge.report.lettering import font, readable, wrapped
from sdforge.report.sheet import GAP, GROUND, HEAD, INK, LARGEST, QUIET, RULE, SMALLEST, TEXT, fitting, put
from sdforge.toml import dotted, value

MARGIN, WIDEST = 24, 2400  # pixels around the sheet, and of its width where the pictures can be made smaller
LEAST = 96  # edge of a picture that has been made smaller
TITLE = 20  # size of type
MOST_LETTERS = 24  # of a value
FRAME = 2  # around what the recipe itself has


def draw_grid(grid: Grid, read: Callable[[str], bytes]) -> bytes:
    """Return the grid as PNG; read: sha256 → the bytes of a picture."""
    return _Drawing(grid, read).draw()


@dataclass(frozen=True)
class _Panel:
    """One table of pictures. head: what all of them share; rows: labels; cells: [row][column] → (cell, seed)."""

    head: str
    rows: list[str]
    cells: list[list[tuple[int, int]]]


class _Drawing:
    """x, y: the axes; y is the seeds where the sweep has one axis only, else each seed is a panel of its own."""

    def __init__(self, grid: Grid, read: Callable[[str], bytes]) -> None:
        self.grid, self.read = grid, read
        self.title, self.head, self.text = map(font, (TITLE, HEAD, TEXT))
        self.prompts, self.seeds = grid.settings["prompts"], grid.settings["seeds"]
        self.across = [_shown(one) for one in grid.axes[0].values]
        self.panels = self._panels()
        self.edge = self._edge()
        self.left = 12 + max(self._length(label, self.head) for panel in self.panels for label in panel.rows)
        self.panel_width = self.left + len(self.across) * (self.edge + GAP) - GAP

    def _panels(self) -> list[_Panel]:
        columns = range(self.grid.columns)
        if len(self.grid.axes) == 1:
            labels = [f"seed {seed}" for seed in self.seeds]
            return [_Panel("", labels, [[(cell, seed) for cell in columns] for seed in self.seeds])]
        down = [_shown(one) for one in self.grid.axes[1].values]
        rows = [[j * self.grid.columns + i for i in columns] for j in range(len(down))]
        return [_Panel(f"seed {s}", down, [[(cell, s) for cell in row] for row in rows]) for s in self.seeds]

    def _edge(self) -> int:
        """Return the edge of a picture: its own within bounds, unless the sheet became too wide."""
        picture = Image.open(io.BytesIO(self.read(self.grid.picture(0, 0, self.seeds[0]))))
        room = WIDEST // (len(self.panels) * len(self.across)) - GAP
        return min(max(picture.width, SMALLEST), LARGEST, max(room, LEAST))

    def _length(self, label: str, font: Any) -> int:
        return int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(label, font)) + 1

    def draw(self) -> bytes:
        """Lay the bands out from top to bottom, then draw them."""
        axes = self._axes()
        width = 2 * MARGIN + len(self.panels) * (self.panel_width + 2 * MARGIN) - 2 * MARGIN
        width = max(width, 2 * MARGIN + max(self._length(line, self.text) for line in axes))
        width = max(width, 2 * MARGIN + self._length(self.grid.name, self.title))
        top = MARGIN + TITLE + 10 + len(axes) * (TEXT + 6) + 8
        letters = (width - 2 * MARGIN) // self._length("n", self.head)
        said = [wrapped(prompt, HEAD, letters, width - 2 * MARGIN) or ["no prompt"] for prompt in self.prompts]
        panel = HEAD + 10 + len(self.panels[0].rows) * (self.edge + GAP)
        panel += HEAD + 4 if self.panels[0].head else 0
        heights = [len(lines) * (HEAD + 4) + 14 + panel + 14 for lines in said]
        sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN // 2), GROUND)
        pen = ImageDraw.Draw(sheet)
        pen.text((MARGIN, MARGIN), self.grid.name, INK, self.title)
        pen.multiline_text((MARGIN, MARGIN + TITLE + 10), "\n".join(axes), QUIET, self.text, spacing=6)
        y = top
        for p, (lines, height) in enumerate(zip(said, heights, strict=True)):
            pen.line((MARGIN, y, width - MARGIN, y), RULE)
            pen.multiline_text((MARGIN, y + 10), "\n".join(lines), INK, self.head, spacing=4)
            for i, each in enumerate(self.panels):
                x = MARGIN + i * (self.panel_width + 2 * MARGIN)
                self._draw_panel(sheet, (x, y + 14 + len(lines) * (HEAD + 4)), each, p)
            y += height
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def _axes(self) -> list[str]:
        """Return the lines that say what goes across and down, and what the frame means."""
        names = [readable(dotted(axis.path)) for axis in self.grid.axes]
        lines = [f"across: {names[0]}", f"down: {names[1] if len(names) > 1 else 'seeds'}"]
        return lines + (["framed: as the recipe has it"] if self.grid.plain is not None else [])

    def _draw_panel(self, sheet: Image.Image, at: tuple[int, int], panel: _Panel, prompt: int) -> None:
        pen, (x, y), step = ImageDraw.Draw(sheet), at, self.edge + GAP
        if panel.head:
            pen.text((x + self.left, y), panel.head, QUIET, self.text)
            y += HEAD + 4
        plain = self.grid.plain
        for i, label in enumerate(self.across):
            colour = INK if plain is None or i == plain % self.grid.columns else QUIET
            place = (x + self.left + i * step + self.edge // 2, y)
            pen.text(place, fitting(pen, label, self.head, self.edge), colour, self.head, anchor="ma")
        y += HEAD + 10
        for j, row in enumerate(panel.rows):
            listed = any(cell == plain for cell, _ in panel.cells[j]) and len(self.grid.axes) > 1
            place = (x + self.left - 12, y + j * step + self.edge // 2)
            pen.text(place, row, INK if plain is None or listed else QUIET, self.head, anchor="rm")
            for i, (cell, seed) in enumerate(panel.cells[j]):
                corner = (x + self.left + i * step, y + j * step)
                with Image.open(io.BytesIO(self.read(self.grid.picture(cell, prompt, seed)))) as picture:
                    if cell == plain:
                        ends = (corner[0] + self.edge + FRAME, corner[1] + self.edge + FRAME)
                        pen.rectangle((corner[0] - FRAME - 1, corner[1] - FRAME - 1, *ends), INK)
                    put(sheet, picture, corner, self.edge)


def _shown(one: Any) -> str:
    """Return a value as it stands in a recipe; texts without quotes, long ones shortened."""
    text = readable(one if isinstance(one, str) else value(one))
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
