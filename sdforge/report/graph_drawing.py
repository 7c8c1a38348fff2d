"""What is made from what, as an inline SVG: sources at the left, the preset at the right, an arrow for each input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sdforge.report.markup import Markup, element, joined

WIDTH, HEIGHT = 156, 50  # of a box, in pixels
ACROSS, DOWN = 46, 16  # between boxes
LETTER = 7.1  # pixels of a letter of a box's name, on average
SWEEPS = 6  # over the columns, in which boxes move towards what they are tied to


@dataclass(frozen=True)
class Box:
    """A box of the drawing. state: a class of the style sheet, written on the box in `says`."""

    id: str
    name: str
    about: str
    state: str
    says: str
    inputs: tuple[str, ...] = ()


def graph_drawing(boxes: list[Box], title: str) -> Markup:
    """Return the drawing; inputs come first in `boxes`."""
    columns = _columns(boxes)
    places = _places(columns)
    width = len(columns) * (WIDTH + ACROSS) - ACROSS
    height = max(len(column) for column in columns) * (HEIGHT + DOWN) - DOWN
    arrows = [_arrow(places[each], places[box.id]) for box in boxes for each in box.inputs if each in places]
    drawn = [_box(box, *places[box.id]) for box in boxes]
    return element(
        "svg",
        element("title", title),
        element("desc", ". ".join(_sentence(box, boxes) for box in boxes)),
        element("g", *arrows, class_="arrows"),
        *drawn,
        class_="graph",
        viewBox=f"-1 -1 {width + 2} {height + 2}",
        width=width + 2,
        height=height + 2,
        role="img",
    )


def _sentence(box: Box, boxes: list[Box]) -> str:
    names = {each.id: each.name for each in boxes}
    made = ", ".join(names[each] for each in box.inputs if each in names)
    return f"{box.name}: {box.about}, {box.says}{f', from {made}' if made else ''}"


def _columns(boxes: list[Box]) -> list[list[str]]:
    """Return the ids column by column: a box stands right of all its inputs, a source just left of its first user."""
    depth: dict[str, int] = {}
    for box in boxes:
        depth[box.id] = 1 + max((depth[each] for each in box.inputs if each in depth), default=-1)
    for box in reversed(boxes):
        users = [depth[other.id] for other in boxes if box.id in other.inputs]
        if not box.inputs and users:
            depth[box.id] = min(users) - 1
    columns: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
    for box in boxes:
        columns[depth[box.id]].append(box.id)
    ties = {box.id: [*box.inputs, *(other.id for other in boxes if box.id in other.inputs)] for box in boxes}
    for _ in range(SWEEPS):
        heights = {name: i - (len(column) - 1) / 2 for column in columns for i, name in enumerate(column)}
        for column in columns:
            column.sort(key=lambda name: _mean([heights[each] for each in ties[name] if each in heights]))
            heights |= {name: i - (len(column) - 1) / 2 for i, name in enumerate(column)}
    return columns


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _places(columns: list[list[str]]) -> dict[str, tuple[float, float]]:
    """Return id → (left, top), each column centred on the tallest one."""
    tallest = max(map(len, columns))
    return {
        name: (x * (WIDTH + ACROSS), (y + (tallest - len(column)) / 2) * (HEIGHT + DOWN))
        for x, column in enumerate(columns)
        for y, name in enumerate(column)
    }


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    x1, y1, x2, y2 = start[0] + WIDTH, start[1] + HEIGHT / 2, end[0], end[1] + HEIGHT / 2
    bend = max(ACROSS * 0.6, (x2 - x1) * 0.4)
    curve = f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2 - 5:g} {y2:g}"
    head = f"M{x2 - 6:g} {y2 - 4:g}L{x2 - 0.5:g} {y2:g}L{x2 - 6:g} {y2 + 4:g}"
    return joined(element("path", d=curve), element("path", d=head))


def _box(box: Box, x: float, y: float) -> Markup:
    inside = list(_texts(box))
    return element("g", *inside, class_=f"box {box.state}", transform=f"translate({x:g} {y:g})")


def _texts(box: Box) -> Iterator[Markup]:
    yield element("rect", width=WIDTH, height=HEIGHT, rx=25 if box.state == "source" else 7)
    yield element("text", _fitting(box.name, WIDTH - 24), x=14, y=21, class_="name")
    said = element("tspan", box.says, class_="says")
    about = _fitting(box.about, WIDTH - 32 - LETTER * len(box.says))
    yield element("text", said, f"  {about}" if about else "", x=14, y=38, class_="about")


def _fitting(words: str, width: float) -> str:
    most = int(width / LETTER)
    return words if len(words) <= most else words[: most - 1] + "…" if most > 3 else ""
