"""What is made from what, as an inline SVG: sources at the left, the preset at the right, an arrow for each input.

Boxes stand in columns, each right of all its inputs; an arrow that passes a column has a lane of its own there, so that
it runs under no box, and arrows from one box share lanes. Order within columns: means of neighbours, swept over a few
times (Sugiyama, Tagawa and Toda 1981, https://doi.org/10.1109/TSMC.1981.4308636).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sdforge.report.markup import Markup, element

WIDTH, HEIGHT, LANE = 146, 62, 6  # of a box, and the height of a lane, in pixels
ACROSS, DOWN = 44, 14  # between columns, and between what stands in one
INSET, LINES, PILL = 13, (21, 38, 53), (28, 45)  # where the lines of a box begin, and those of a source
LETTERS = {"name": 7.3, "about": 6.3, "says": 6.3}  # pixels of a letter, on average
SWEEPS = 8

Lane = tuple[str, int]  # id of the box where an arrow begins, the column that it passes


@dataclass(frozen=True)
class Box:
    """A box of the drawing. state: a class of the style sheet; says: the same in a word, or ""."""

    id: str
    name: str
    about: str
    state: str
    says: str
    inputs: tuple[str, ...] = ()


def graph_drawing(boxes: list[Box], title: str) -> Markup:
    """Return the drawing; inputs come first in `boxes`."""
    found = _Layout(boxes)
    drawn = [_box(box, *found.corner(box.id)) for box in boxes]
    return element(
        "svg",
        element("title", title),
        element("desc", ". ".join(_sentence(box, boxes) for box in boxes)),
        element("g", *found.arrows(), class_="arrows"),
        *drawn,
        class_="graph",
        viewBox=f"-1 -1 {found.width + 2} {found.height + 2:g}",
        width=found.width + 2,
        role="img",
    )


def _sentence(box: Box, boxes: list[Box]) -> str:
    names = {each.id: each.name for each in boxes}
    made = ", ".join(names[each] for each in box.inputs if each in names)
    about = ", ".join(filter(None, [box.about, box.says]))
    return f"{box.name}: {about}{f', from {made}' if made else ''}"


class _Layout:
    """Where boxes and lanes stand."""

    def __init__(self, boxes: list[Box]) -> None:
        self.boxes = boxes
        self.column = _columns(boxes)
        self.edges = [(each, box.id) for box in boxes for each in box.inputs if each in self.column]
        self.standing: list[list[str | Lane]] = [[] for _ in range(1 + max(self.column.values()))]
        for box in boxes:
            self.standing[self.column[box.id]].append(box.id)
        self.ties: dict[str | Lane, list[str | Lane]] = {}
        for edge in self.edges:
            self._tie(self._way(*edge))
        self.middle: dict[str | Lane, float] = {}
        self.width = len(self.standing) * (WIDTH + ACROSS) - ACROSS
        self.height = max(map(_height, self.standing))
        self._stack()
        for i in range(SWEEPS):
            for standing in self.standing if i % 2 == 0 else reversed(self.standing):
                standing.sort(key=self._pull)
                self._stack()

    def _way(self, start: str, end: str) -> list[str | Lane]:
        """Return what an arrow passes: its box, a lane of each column between, the box where it ends."""
        between: list[str | Lane] = [(start, x) for x in range(self.column[start] + 1, self.column[end])]
        return [start, *between, end]

    def _tie(self, way: list[str | Lane]) -> None:
        for x, each in enumerate(way, self.column[str(way[0])]):
            if isinstance(each, tuple) and each not in self.standing[x]:
                self.standing[x].append(each)
        for a, b in pairwise(way):
            self.ties.setdefault(a, []).append(b)
            self.ties.setdefault(b, []).append(a)

    def _pull(self, each: str | Lane) -> float:
        ties = self.ties.get(each, [])
        return sum(self.middle[tie] for tie in ties) / len(ties) if ties else self.middle[each]

    def _stack(self) -> None:
        """Stand everything of a column below each other, the column centred on the tallest one."""
        for standing in self.standing:
            y = (self.height - _height(standing)) / 2
            for each in standing:
                own = _height([each])
                self.middle[each] = y + own / 2
                y += own + DOWN

    def corner(self, identifier: str) -> tuple[float, float]:
        """Return left and top of a box."""
        return self.column[identifier] * (WIDTH + ACROSS), self.middle[identifier] - HEIGHT / 2

    def arrows(self) -> Iterator[Markup]:
        for start, end in self.edges:
            x = self.column[start] * (WIDTH + ACROSS) + WIDTH
            way = self._way(start, end)
            path = f"M{x:g} {self.middle[start]:g}"
            for a, b in pairwise(way):
                y1, y2, bend, stop = self.middle[a], self.middle[b], x + ACROSS / 2, x + ACROSS - (b == end)
                path += f"C{bend:g} {y1:g} {bend:g} {y2:g} {stop:g} {y2:g}"
                x += ACROSS + WIDTH
                path += "" if b == end else f"H{x:g}"
            tip, y = self.column[end] * (WIDTH + ACROSS) - 1, self.middle[end]
            path += f"M{tip - 6:g} {y - 4:g}L{tip:g} {y:g}L{tip - 6:g} {y + 4:g}"
            yield element("path", d=path)


def _height(standing: list[str | Lane]) -> float:
    return sum(LANE if isinstance(each, tuple) else HEIGHT for each in standing) + DOWN * (len(standing) - 1)


def _columns(boxes: list[Box]) -> dict[str, int]:
    """Return the column of each box: right of all its inputs; a source stands just left of the first that takes it."""
    found: dict[str, int] = {}
    for box in boxes:
        found[box.id] = 1 + max((found[each] for each in box.inputs if each in found), default=-1)
    for box in boxes:
        takers = [found[other.id] for other in boxes if box.id in other.inputs]
        if not box.inputs and takers:
            found[box.id] = min(takers) - 1
    return found


def _box(box: Box, x: float, y: float) -> Markup:
    taken = box.state == "source"  # a pill, with two lines
    lines = [("name", box.name), ("about", box.about), ("says", box.says)]
    at = PILL if taken else LINES
    texts = [
        element("text", _fitting(words, LETTERS[kind]), x=INSET + 2 * taken, y=line, class_=kind)
        for (kind, words), line in zip(lines, at, strict=False)
    ]
    edge = element("rect", width=WIDTH, height=HEIGHT, rx=HEIGHT / 2 if taken else 8)
    return element("g", edge, *texts, class_=f"box {box.state}", transform=f"translate({x:g} {y:g})")


def _fitting(words: str, letter: float) -> str:
    """Return words with as many of their letters as a box has room for."""
    most = int((WIDTH - 2 * INSET + 4) / letter)
    return words if len(words) <= most else f"{words[: most - 1]}…"
