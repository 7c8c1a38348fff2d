"""sdforge: `make` for Stable Diffusion models.

`forge` builds presets; `plan` and `build` do from Python what the commands do; `load_preset` gives a preset to a
program, as a pipeline of diffusers. Importing this is light.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from sdforge.notebook import Built, Planned, Progress

__version__ = "0.1.0"
__all__ = ["__version__", "build", "load_preset", "plan"]


def plan(
    recipe: str | Sequence[str] = (), *, project: str | Path = ".", locked: bool = False, checks: bool = True
) -> Planned:
    """Return what a build would do, and why: `plan("anime-preset")`. Nothing is run or written; no torch is loaded.

    recipe: what `forge plan` takes: a recipe, RECIPE:NAME, or several; empty: the project's `default`. project: a
    folder within it. locked: refuse whatever the lock does not hold. checks: whether checks decide what is written.

    A notebook shows it as a table; `targets` are its rows, `to_do` those that would be made.

    Raises UsageError for names that mean nothing, RecipeError with all mistakes of recipes (each with its place, in
    `problems`), BrokenPromise where the lock is contradicted: all are `sdforge.errors.ForgeError`.
    """
    from sdforge.notebook import plan as planned

    return planned(recipe, project, locked=locked, checks=checks)


def build(
    recipe: str | Sequence[str] = (),
    *,
    project: str | Path = ".",
    device: str = "",
    jobs: int = 0,
    locked: bool = False,
    retrain: Sequence[str] = (),
    checks: bool = True,
    allow_commands: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Built:
    """Bring targets up to date, as `forge build` does: `build("anime-preset").folders`. Nothing is printed.

    recipe, project, locked: as for `plan`. device: auto, cpu, cuda or cuda:N; jobs: actions side by side; both as
    `[run]` has them where not said. retrain: targets that are made again. checks: False writes a preset unchecked;
    allow_commands: let commands of checks run. progress: is told what happens, in this thread; its `target`, `state`,
    `step` of `steps` and `loss` are enough for a bar.

    A notebook shows what was done, and each preset with its previews; `folders` and `pictures` are paths.

    Raises what `plan` raises; ActionFailed and CheckFailed for what did not end well, ResourceError for disk, memory
    and devices; Interrupted, with the state of trainings kept. What was made is kept, and the same call goes on.
    """
    from sdforge.notebook import build as built

    wishes: dict[str, Any] = {"device": device, "jobs": jobs, "locked": locked, "retrain": retrain}
    return built(recipe, project, progress, wishes | {"checks": checks, "allow_commands": allow_commands})


def load_preset(
    path: str | Path,
    *,
    form: Literal["", "diffusers", "checkpoint"] = "",
    device: str = "cpu",
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> DiffusionPipeline:
    """Return a ready pipeline of diffusers for a preset that `forge build` wrote: `load_preset("out/anime-preset")`.

    path: the preset's folder, or its diffusers folder or single file. form: which of the two is loaded; empty: the
    folder where there is one. dtype: of the networks; previews are drawn in fp32, and only that gives the same noise.

    Words of embeddings are in the tokenizer, and one of several rows is written once. The sampler is that of the
    previews (DPM++ 2M); guidance, steps, size, negative prompt and clip skip are the preset's where a call says none.
    Sidecars take part. What one draws by itself is in `pictures`: `pipeline.pictures["cat"](prompt="a dog")`.
    `pipeline.preset` is what `preset.json` says, and what a notebook shows, with the previews.

    Raises UsageError for a folder that is no preset or lacks a file, BrokenPromise for a file that is another one than
    `preset.json` says: whatever is loaded is hashed first.
    """
    from sdforge.run.preset import load_preset as load

    found: DiffusionPipeline = load(Path(path), form=form, device=device, dtype=dtype)
    return found


class _Package(ModuleType):
    """Keeps `sdforge.plan` and `sdforge.build` functions, once the modules of these names have been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("plan", "build") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
