"""Curves of a training as inline SVG: the loss of every step and what it tends to, held-out pictures, the best step."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor, log10

from sdforge.report.markup import Markup, element

WIDTH, HEIGHT = 720, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 16, 30
MOST = 400  # points of a line: more than a page can show of it
SPREAD = 0.98  # of the losses lie within the drawing, and all of their mean; single ones far above are cut off
NEARBY = 90  # pixels within which a label turns to the other side of its line


def loss_drawing(losses: list[float], validation: list[tuple[int, float]], best: int | None, title: str) -> Markup:
    """Return the curves over the steps, counted from 1. best: the step at which held-out pictures did best."""
    steps = max(len(losses), *(at for at, _ in validation), 2) if validation else max(len(losses), 2)
    smooth = smoothed(losses, max(1, len(losses) // 25))
    shown = [*sorted(losses)[: max(1, int(len(losses) * SPREAD))], *smooth, *(loss for _, loss in validation)]
    low, high = min(shown), max(shown)
    frame = _Frame(steps, *_rounded(low, high))
    inside = [*frame.grid()]
    inside.append(frame.line([(i + 1, loss) for i, loss in enumerate(losses)], "noise"))
    inside.append(frame.line([(i + 1, loss) for i, loss in enumerate(smooth)], "loss"))
    if validation:
        inside.append(frame.line(validation, "held-out"))
        inside += [element("circle", cx=frame.x(at), cy=frame.y(v), r=3, class_="held-out") for at, v in validation]
    if best is not None:
        inside += frame.mark(best)
    said = f"Loss over {len(losses)} steps, from {smooth[0]:.4f} to {smooth[-1]:.4f} (running mean)"
    if validation:
        said += f"; on held-out pictures {validation[0][1]:.4f} to {validation[-1][1]:.4f}"
    said += f"; step {best} is recommended" if best is not None else ""
    return element(
        "svg",
        element("title", title),
        element("desc", said),
        *inside,
        class_="curves",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )


def smoothed(values: list[float], width: int) -> list[float]:
    """Return running means of `width` values, the first ones over fewer: what a noisy loss tends to."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, i + 1 - width) for i in range(len(values))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]


class _Frame:
    """Axes: steps across, losses up."""

    def __init__(self, steps: int, low: float, high: float, tick: float) -> None:
        self.steps, self.low, self.high, self.tick = steps, low, high, tick

    def x(self, step: float) -> float:
        return round(LEFT + (step - 1) / max(1, self.steps - 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, loss: float) -> float:
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def grid(self) -> Iterator[Markup]:
        digits = max(0, -floor(log10(self.tick)))
        for i in range(round((self.high - self.low) / self.tick) + 1):
            y = self.y(self.low + i * self.tick)
            yield element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
            label = f"{self.low + i * self.tick:.{digits}f}"
            yield element("text", label, x=LEFT - 8, y=y + 4, text_anchor="end")
        every = _nice(self.steps / 6, whole=True)
        for at in [1, *range(int(every), self.steps + 1, int(every))]:
            if at > 1 or every > 2:
                yield element("text", f"{at}", x=self.x(at), y=HEIGHT - 9, text_anchor="middle")

    def line(self, points: list[tuple[int, float]], name: str) -> Markup:
        """Return a line of at most `MOST` points, each the mean of its share."""
        count = min(MOST, len(points))
        parts = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
        means = [(sum(at for at, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
        return element("polyline", points=" ".join(f"{self.x(at)},{self.y(v)}" for at, v in means), class_=name)

    def mark(self, step: int) -> list[Markup]:
        x = self.x(step)
        left = x > WIDTH - RIGHT - NEARBY * 1.5
        at = {"x": x - 6 if left else x + 6, "text_anchor": "end" if left else "start"}
        label = element("text", f"step {step} is recommended", y=TOP + 6, class_="best", **at)
        return [element("line", x1=x, x2=x, y1=TOP - 6, y2=HEIGHT - BOTTOM, class_="best"), label]


def _nice(value: float, *, whole: bool = False) -> float:
    """Return the next of 1, 2, 5, 10, 20, … that is not below a value."""
    power = 10.0 ** floor(log10(value)) if value > 0 else 1.0
    found = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * 0.999)
    return max(1.0, found) if whole else found


def _rounded(low: float, high: float) -> tuple[float, float, float]:
    """Return a range around both with round ends, and the distance of its ticks."""
    tick = _nice(((high - low) or abs(high) or 1.0) / 4)
    return floor(low / tick) * tick, max(ceil(high / tick), floor(low / tick) + 1) * tick, tick
