"""sdforge: `make` for Stable Diffusion models.

`forge` builds presets; `load_preset` gives one to a program, as a pipeline of diffusers. Importing this is light.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load_preset"]


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
    `pipeline.preset` is what `preset.json` says.

    Raises UsageError for a folder that is no preset or lacks a file, BrokenPromise for a file that is another one than
    `preset.json` says: whatever is loaded is hashed first.
    """
    from sdforge.run.preset import load_preset as load

    found: DiffusionPipeline = load(Path(path), form=form, device=device, dtype=dtype)
    return found
