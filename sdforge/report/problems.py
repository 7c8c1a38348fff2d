"""Mistakes in recipes, each with file, line, the line itself and a caret."""

from __future__ import annotations

import json
import sys

from sdforge.errors import Problem, counted
from sdforge.report.words import safe

WIDTH = 160  # of a line that is shown


def show_problems(problems: list[Problem], *, as_json: bool = False) -> None:
    """Print problems in the order of their places, errors and warnings counted at the end."""
    problems = [problem.shown() for problem in problems]
    ordered = sorted(problems, key=lambda p: (p.place.file, p.place.line, p.place.column) if p.place else ("", 0, 0))
    if as_json:
        rows = [p._asdict() | {"place": p.place._asdict() if p.place else None} for p in ordered]
        print(json.dumps({"v": 1, "event": "problems", "problems": rows}))
        return
    for problem in ordered:
        print(safe(rendered(problem), sys.stderr), file=sys.stderr)
    warnings = sum(problem.warning for problem in ordered)
    errors = len(ordered) - warnings
    counts = [counted(errors, "error")] if errors else []
    counts += [counted(warnings, "warning")] if warnings else []
    print(", ".join(counts), file=sys.stderr)


def _window(text: str, column: int) -> tuple[str, int]:
    """Return what of a long line stands around a column, and the column in it."""
    if len(text) <= WIDTH:
        return text, column
    start = max(0, min(column - WIDTH // 2, len(text) - WIDTH))
    head, tail = "…" * (start > 0), "…" * (start + WIDTH < len(text))
    return head + text[start + len(head) : start + WIDTH - len(tail)] + tail, column - start


def rendered(problem: Problem) -> str:
    """Return a problem as text: place, kind, sentence; the line with a caret; what to do."""
    kind = "warning" if problem.warning else "error"
    place = f"{problem.place}: " if problem.place else ""
    lines = [f"{place}{kind}[{problem.code}]: {problem.message}"]
    if problem.place and problem.place.line and problem.place.text.strip():
        number = str(problem.place.line)
        text, column = _window(problem.place.text.replace("\t", " "), problem.place.column - 1)
        caret = " " * column + "^" * max(1, min(problem.place.length, len(text) - column))
        lines += [f"  {number} | {text}", f"  {' ' * len(number)} | {caret}"]
        if problem.hint:
            lines[-1] += f" {problem.hint}"
    elif problem.hint:
        lines.append(f"  hint: {problem.hint}")
    return "\n".join(lines)
