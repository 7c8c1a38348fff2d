"""`forge grid`: a sweep that stands in no recipe: draw it, and say what to write for the cell that one likes.

The sweep is read as if it stood at the end of the recipe. Its results stay in the cache, so that a cell which becomes
a variant has been computed already; `forge.lock` and what else lies in `out/` are left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import string
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

from sdforge.advice import note_warnings, refuse_mistakes
from sdforge.build import Build
from sdforge.errors import Problem, RecipeError, UsageError, exit_code
from sdforge.executors.local import LocalExecutor
from sdforge.outputs import Outputs
from sdforge.places import LOCK, RECIPES
from sdforge.placing import write_grids
from sdforge.recipe import Recipe
from sdforge.report.progress import reporter
from sdforge.report.words import say
from sdforge.session import Session
from sdforge.target import PREVIEWS
from sdforge.under_way import Options
from sdforge.variants import MARK, cells, leaves, lines, split

TRIAL = "grid"  # the sweep's name
PICKED = "picked"  # the name of a variant that is made of a cell
WORDS = r"[a-z]\w*(\s*,\s*[a-z]\w*)*"  # values without the quotes that a shell takes away
EXAMPLE = '--x "soft.weights=[0.6,0.4],[0.5,0.5]"'


def grid(session: Session, wishes: argparse.Namespace) -> int:
    """Draw a grid without editing the recipe, or print the lines of one of its cells; return the exit code."""
    name, project = wishes.preset, session.project
    home, variant = split(name)
    if variant:
        project.variants(name)
        hint = f"forge grid {home} …; a sweep in the recipe may go through any two settings"
        raise UsageError(f"a grid is drawn of a recipe, and {name!r} is one of its variants", hint)
    recipe = project.recipe(name)
    if TRIAL in (*recipe.variants, *recipe.sweeps):
        raise UsageError(f"{name}{MARK}{TRIAL} is the recipe's own", f"forge build {name}{MARK}{TRIAL}")
    axes = {flag: _axis(flag, text) for flag, text in (("--x", wishes.x), ("--y", wishes.y)) if text}
    if len(axes) > 1 and _setting(wishes.x) == _setting(wishes.y):
        raise UsageError(f"--x and --y go through one setting, {_setting(wishes.x)}", "--y takes another one")
    with _placed(project.recipe_text(name), list(axes)):
        project.try_out(name, "\n".join(["", f"[sweep.{TRIAL}]", *axes.values(), ""]))
        tried = project.recipe(name)
        if wishes.cell:
            return _tell_cell(tried, wishes.cell, as_json=wishes.json)
        if PREVIEWS not in tried.targets:
            raise UsageError(f"{name} draws no previews", hint='[preset.previews] prompts = ["…"] says what is drawn')
        wanted = [f"{name}{MARK}{cell}:{PREVIEWS}" for cell in cells(TRIAL, tried.sweeps[TRIAL])]
        session.resolve(wanted)
        refuse_mistakes(session, session.plan(wanted))
    if wishes.dry_run:
        from sdforge.commands import show_plan

        show_plan(session, session.plan(wanted), as_json=wishes.json)
        return 0
    return _draw(session, tried, wanted, wishes)


def _setting(text: str) -> str:
    return text.partition("=")[0].strip()


def _axis(flag: str, text: str) -> str:
    """Return what a flag says as a line of a sweep. Raises UsageError."""
    import tomli

    key, _, listed = text.partition("=")
    line = f"{key.strip()} = [{listed.strip()}]"
    try:
        found = list(leaves(tomli.loads(line)))
    except (tomli.TOMLDecodeError, ValueError, RecursionError):
        found = []
    if "\n" in line or len(found) != 1 or not isinstance(found[0][1], list) or not found[0][1]:
        hint = f"as in {EXAMPLE}; texts stand in quotes, as in a recipe"
        if re.fullmatch(WORDS, listed.strip()):
            quoted = ",".join(f'"{word.strip()}"' for word in listed.split(","))
            hint = f"texts stand in quotes, as in a recipe: {flag} '{key.strip()}={quoted}'"
        raise UsageError(f"{flag} {text!r} is no setting and its values", hint)
    return line


@contextmanager
def _placed(source: bytes, flags: list[str]) -> Iterator[None]:
    """Let what is wrong with the sweep be wrong with the flag that says it."""
    first = source.count(b"\n") + 3  # behind the recipe's last line and the header

    def at(problem: Problem) -> Problem:
        place = problem.place
        if place is None or place.line < first - 1:
            return problem
        flag = flags[min(max(place.line - first, 0), len(flags) - 1)]
        return problem._replace(place=place._replace(file=flag, line=1))

    try:
        yield
    except RecipeError as error:
        raise RecipeError([at(problem) for problem in error.problems]) from None


def _draw(session: Session, recipe: Recipe, wanted: list[str], wishes: argparse.Namespace) -> int:
    """Draw the cells and the grid."""
    from sdforge.commands import conclude, how_to_run

    run, project = session.project.run, session.project
    shown = Outputs(replace(project), session.store)
    project.made = session.store.workplace()
    if (project.root / LOCK).is_file():
        shutil.copyfile(project.root / LOCK, project.lock)
    options = Options(
        jobs=wishes.jobs or run.get("jobs", 1),
        device=wishes.device or run.get("device", "auto"),
        threads=run.get("threads", 1),
        how=how_to_run(run, ""),
    )
    began = time.monotonic()
    view = reporter(sys.stdout, session, as_json=wishes.json, plain=wishes.plain)
    try:
        note_warnings(session, session.plan(wanted), view.note)
        summary = Build(session, LocalExecutor(options.threads), view, options).run(wanted)
        assert summary.plan is not None
        for path, moved in write_grids(session, summary.plan, shown):
            view.drawn(path.relative_to(project.root).as_posix(), moved)
    finally:
        view.close()
        shutil.rmtree(project.made, ignore_errors=True)
    conclude(session, summary, time.monotonic() - began, as_json=wishes.json)
    _tell_cells(recipe, as_json=wishes.json)
    return exit_code(list(summary.failed.values()))


def _tell_cells(recipe: Recipe, *, as_json: bool) -> None:
    """Say of each cell what a variant would say that is like it."""
    width = len(recipe.sweeps[TRIAL][0].values)
    found = [recipe.variants[cell] for cell in cells(TRIAL, recipe.sweeps[TRIAL])]
    if as_json:
        rows = [{"cell": [i % width + 1, i // width + 1], "toml": lines(changes)} for i, changes in enumerate(found)]
        print(json.dumps({"v": 1, "event": "cells", "preset": recipe.name, "cells": rows}))
        return
    say(f"  the cell that you like is kept by its lines, under [variant.NAME] of {RECIPES}/{recipe.name}.toml:")
    for i, changes in enumerate(found):
        for label, line in zip_longest([f"{i % width + 1},{i // width + 1}"], lines(changes), fillvalue=""):
            say(f"    {label:<7} {line}")


def _tell_cell(recipe: Recipe, cell: str, *, as_json: bool) -> int:
    """Print the variant that one cell is, ready to stand in the recipe. Raises UsageError for a cell that is none."""
    axes = recipe.sweeps[TRIAL]
    across, down = len(axes[0].values), len(axes[1].values) if len(axes) > 1 else 1
    found = re.fullmatch(r"(\d{1,3})(?:,(\d{1,3}))?", cell.replace(" ", ""))
    column, row = (int(found[1]), int(found[2] or 1)) if found else (0, 0)
    if not (1 <= column <= across and 1 <= row <= down):
        raise UsageError(f"there is no cell {cell!r}", hint=f"COLUMN,ROW from 1,1 to {across},{down}")
    name = next(name for name in _names() if name not in (*recipe.variants, *recipe.sweeps))
    table = [f"[variant.{name}]", *lines(recipe.variants[f"{TRIAL}-{(row - 1) * across + column}"])]
    event = {"v": 1, "event": "cell", "cell": [column, row], "toml": table}
    say(json.dumps(event) if as_json else "\n".join(["", *table]))
    return 0


def _names() -> Iterator[str]:
    yield PICKED
    yield from (f"{PICKED}-{letter}" for letter in string.ascii_lowercase[1:])
    yield from (f"{PICKED}-{first}{second}" for first in string.ascii_lowercase for second in string.ascii_lowercase)
