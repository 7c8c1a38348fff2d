"""Small random checkpoints in the true topology, written by diffusers, and what is read from files and computed.

Nothing here needs a project: a file is read by the readers, a formula is planned by its method and computed by the
worker's code, tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from sdforge.artifact import Artifact, Component, Spot
from sdforge.artifact import Tensor as Planned
from sdforge.dtypes import ITEM_SIZE
from sdforge.families import family
from sdforge.formats.layout import read_layout, transposed
from sdforge.formats.tokenizer import END, START, tokenizer_files, tokenizer_identity
from sdforge.formula import Input, Plan, common_dtype
from sdforge.identity import component_identity, tensor_identity
from sdforge.order import Computation, Given
from sdforge.ref import Ref
from sdforge.run.formula import compute, cut, results
from sdforge.run.tensors import load, write_pack

SD15 = family("sd15")
WORDS = ("red", "cat", "house", "drawing")
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.2,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "max_position_embeddings": 77,
}


def vocabulary() -> dict[str, Any]:
    """Return CLIP's byte alphabet, twice, and a few words of one token each."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := " ".join(parts[:2])) not in merges:
                merges.append(pair)
            parts[:2] = ["".join(parts[:2])]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    return {"vocab": {word: i for i, word in enumerate([*words, START, END])}, "merges": merges}


def write_toy(folder: Path, seed: int, dtype: torch.dtype = torch.float16) -> Path:
    """Write a checkpoint of random numbers as diffusers and transformers write one, if it is not there yet."""
    if folder.exists():
        return folder
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = vocabulary()
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    tokenizer.mkdir(parents=True)
    for name, text in tokenizer_files(words, []).items():
        (tokenizer / name).write_text(text, encoding="utf-8")
    size = len(words["vocab"])
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=shaken(AutoencoderKL(**VAE), dtype),
            text_encoder=shaken(CLIPTextModel(CLIPTextConfig(**TEXT, **ids)), dtype),
            tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
            unet=shaken(UNet2DConditionModel(**UNET), dtype),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def shaken(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """No parameter stays at the zeros and ones it begins with, so that none can be mistaken for another."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.to(dtype).eval()


@dataclass(frozen=True)
class Taken:
    """An artifact with its tensors and where their bytes lie (sha256 of the file → path)."""

    artifact: Artifact
    tables: dict[str, list[Planned]]
    files: dict[str, Path]
    vocabulary: dict[str, Any]

    def input(self, **use: Any) -> Input:
        return Input(self.artifact, lambda c: self.tables[c.table], lambda _: self.vocabulary, use)

    def given(self, **use: Any) -> Given:
        refs = {name: [reference(t, self.files) for t in table] for name, table in self.tables.items()}
        identities = {name: c.identity for name, c in self.artifact.components.items()}
        art = self.artifact
        return Given(art.kind, art.digest, art.facts, refs, identities, self.vocabulary, use)

    def tensors(self, component: str) -> dict[str, Tensor]:
        return {t.name: load(reference(t, self.files)) for t in self.tables[component]}

    def identity(self, component: str) -> str:
        return self.artifact.components[component].identity


def reference(tensor: Planned, files: Mapping[str, Path]) -> Ref:
    assert tensor.spot is not None
    place = str(files[tensor.spot.file])
    return Ref(tensor.name, tensor.dtype, tensor.shape, place, tensor.spot.offset, tensor.xxh3)


def take(path: Path) -> Taken:
    """Read a file or folder, whatever its format."""
    layout = read_layout(path)
    data = [file.read_bytes() for file in layout.files]
    shas = [hashlib.sha256(text).hexdigest() for text in data]
    tables: dict[str, list[Planned]] = {}
    kept: dict[str, Path] = {}
    for found in layout.tensors:
        text = data[found.file][found.offset : found.offset + found.size]
        spot = Spot(shas[found.file], found.offset)
        if found.turned:
            text = transposed(text, found.shape[0], ITEM_SIZE[found.dtype])
            spot = Spot(hashlib.sha256(text).hexdigest(), 0)
            kept[spot.file] = path.with_name(f"{path.name}-{spot.file[:8]}")
            kept[spot.file].write_bytes(text)
        row = _planned(found.name, found.dtype, found.shape, hashlib.sha256(text).hexdigest(), _fast(text), spot)
        tables.setdefault(found.component, []).append(row)
    files = dict(zip(shas, layout.files, strict=True)) | kept
    return _taken(layout.kind, layout.family, tables, files, layout.facts, layout.tokenizer or {})


def keep(
    work: Path,
    tensors: dict[str, dict[str, Tensor]],
    *,
    kind: str = "checkpoint",
    facts: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    name: str = "sd15",
) -> Taken:
    """Write tensors (component → name → tensor) into a pack, as the worker does, and return it as an artifact."""
    work.mkdir(parents=True, exist_ok=True)
    outcome = write_pack(work, tensors)
    tables = {
        component: [
            _planned(name, dtype, tuple(shape), sha, fast, Spot(outcome.sha256, offset))
            for name, dtype, shape, sha, fast, offset in rows
        ]
        for component, rows in outcome.components.items()
    }
    return _taken(kind, name, tables, {outcome.sha256: work / outcome.pack}, facts or {}, words or {})


def _planned(name: str, dtype: str, shape: tuple[int, ...], sha256: str, xxh3: str, spot: Spot) -> Planned:
    return Planned(name, dtype, shape, tensor_identity(dtype, shape, sha256), sha256, xxh3, spot)


def _fast(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def _taken(
    kind: str, name: str, tables: dict[str, list[Planned]], files: dict[str, Path], facts: Any, words: dict[str, Any]
) -> Taken:
    components = {}
    for part, table in tables.items():
        identity = component_identity((t.name, t.identity) for t in table)
        components[part] = Component(identity, identity, part, common_dtype(t.dtype for t in table))
    if words:
        identity = tokenizer_identity(words)
        components["tokenizer"] = Component(identity, identity, "tokenizer", "")
    return Taken(Artifact(kind, name, components, facts), tables, files, words)


def computations(plan: Plan, *taken: Taken) -> list[Computation]:
    """Return what is to be computed of a plan, as an order has it."""
    files = {sha: path for each in taken for sha, path in each.files.items()}
    return [
        Computation(
            component,
            row.tensor.name,
            row.tensor.dtype,
            row.tensor.shape,
            row.method,
            row.parameters,
            tuple(reference(t, files) for t in row.inputs),
        )
        for component, rows in plan.components.items()
        for row in rows
        if row.method
    ]


def made(plan: Plan, *taken: Taken, only: Collection[str] = ()) -> dict[str, dict[str, Tensor]]:
    """Return the components that a plan makes, computed or passed through: component → name → tensor.

    only: the tensors (component.name) of those to be computed that are; none: all.
    """
    files = {sha: path for each in taken for sha, path in each.files.items()}
    result: dict[str, dict[str, Tensor]] = {}
    for component, rows in plan.components.items():
        result[component] = {r.tensor.name: load(reference(r.inputs[0], files)) for r in rows if not r.method}
    for computation in computations(plan, *taken):
        name = f"{computation.component}.{computation.name}"
        if not only or name in only:
            result[computation.component][computation.name] = computed(computation, name)
    return result


def computed(computation: Computation, name: str) -> Tensor:
    """Compute one tensor as a whole, and see that the parts in which it can be made are the same to the bit."""
    whole = compute(computation, name)
    parts = [part.clone() for part in results(computation, name, most=max(1, whole.numel() // 3))]
    assert len(parts) > 1 or whole.numel() < 3 or cut(computation) is None
    assert same_bytes(torch.cat([part.reshape(-1) for part in parts]), whole.reshape(-1)), name
    return whole


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are the same to the bit (−0 is not 0 here)."""
    return a.dtype == b.dtype and a.shape == b.shape and digest(a) == digest(b)


def change_json(path: Path, change: dict[str, Any]) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
