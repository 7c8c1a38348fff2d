"""Grids: what the cells of a sweep draw, as one picture in `out/RECIPE@SWEEP/`, with labelled axes.

A grid is no action: it is put together from the previews of all cells whenever those are there and it is not, as the
contact sheet of a preset is. `preset.json` beside it says which cell is which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdforge.drawn import own_column, preset_pictures
from sdforge.outputs import COMPOSED, MANIFEST, Outputs
from sdforge.plan import Plan, Step
from sdforge.recipe import Recipe
from sdforge.session import Session
from sdforge.target import PREVIEWS
from sdforge.toml import dotted, value
from sdforge.variants import MARK, Axis, cells

PICTURE, ABOUT = "grid.png", "preset.json"


@dataclass(frozen=True)
class Grid:
    """A sweep of which every cell is drawn. cells: their previews, row by row; recipe: the plain one."""

    recipe: Recipe
    sweep: str
    axes: tuple[Axis, ...]
    cells: tuple[Step, ...]

    @property
    def name(self) -> str:
        return f"{self.recipe.name}{MARK}{self.sweep}"

    @property
    def columns(self) -> int:
        return len(self.axes[0].values)

    @property
    def settings(self) -> dict[str, Any]:
        """How the cells are drawn: prompts and seeds are those of the first one."""
        found: dict[str, Any] = json.loads(self.cells[0].node.target.settings)
        return found

    @property
    def plain(self) -> int | None:
        """The cell that is as the recipe itself has it, if one is."""
        return next((i for i, cell in enumerate(self.cells) if cell.node.recipe.equal), None)

    def picture(self, cell: int, prompt: int, seed: int) -> str:
        """Return the sha256 of a picture that a cell drew with the preset; prompt: from 0. Raises KeyError."""
        step = self.cells[cell]
        assert step.result is not None
        return preset_pictures(step.result, own_column(step))[prompt + 1, seed]

    def source(self) -> str:
        """Name what the files are made from: the pictures, and all that is written beside them."""
        assert all(step.result for step in self.cells)
        files = [sorted(step.result.files.items()) for step in self.cells if step.result]
        axes = [[axis.path, axis.values] for axis in self.axes]
        return COMPOSED + json.dumps([MANIFEST, self.name, axes, self.settings, self.plain, files], sort_keys=True)


def grids_of(session: Session, plan: Plan) -> Iterator[Grid]:
    """Yield the grids whose cells are all wanted."""
    previews = (plan.steps[name] for name in plan.wanted if name.endswith(f":{PREVIEWS}"))
    wanted = {step.node.recipe.name: step for step in previews}
    homes = dict.fromkeys(step.node.recipe.home for step in wanted.values())
    for home in homes:
        recipe = session.project.recipe(home)
        for sweep, axes in recipe.sweeps.items():
            drawn = [wanted.get(f"{home}{MARK}{cell}") for cell in cells(sweep, axes)]
            if all(drawn):
                yield Grid(recipe, sweep, axes, tuple(step for step in drawn if step))


def lacking(session: Session, plan: Plan) -> list[Grid]:
    """Return the grids that are not in `out/` as they should be; those whose cells are still to be drawn are."""
    return [grid for grid in grids_of(session, plan) if not lies(session.outputs, grid)]


def lies(outputs: Outputs, grid: Grid) -> bool:
    """Say whether a grid's files lie in `out/`, made from what its cells draw now."""
    folder = outputs.project.out / grid.name
    if not all(step.result for step in grid.cells):
        return False
    found = [outputs.lies(folder / name, grid.source()) for name in (PICTURE, ABOUT)]  # a verdict rests on both
    return all(found)


def describe(grid: Grid) -> bytes:
    """Return the description of a grid: its file, its axes, and what each cell is called."""
    settings = grid.settings
    described = {
        "v": MANIFEST,
        "preset": grid.name,
        "family": grid.recipe.family,
        "grid": {
            "file": PICTURE,
            "axes": [{"key": dotted(axis.path), "values": list(axis.values)} for axis in grid.axes],
            "cells": [
                {"preset": step.node.recipe.name, "settings": _told(grid, i), "recipe": i == grid.plain}
                for i, step in enumerate(grid.cells)
            ],
            "prompts": settings["prompts"],
            "seeds": settings["seeds"],
        },
    }
    return (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()


def _told(grid: Grid, cell: int) -> dict[str, str]:
    """Return what a cell sets: key → value, as a recipe has them."""
    at = (cell % grid.columns, cell // grid.columns)
    return {dotted(axis.path): value(axis.values[i]) for axis, i in zip(grid.axes, at, strict=False)}
