"""Presets of full size that hold one of everything.

`plain` is a merge with a word inserted, `bare` the same without it; `forms` has a LoRA of each form baked into it, each
on modules of its own; `whole` one plain LoRA on every module of the family. What another program makes of `plain` and
those LoRAs must be the weights of `forms` and `whole`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Iterable
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.merging.files import shapes
from sdforge.families import Family, family
from sdforge.formats.hypernetwork import pickled_form, shapes_of, stated
from sdforge.formats.kohya import kohya_tensors
from sdforge.formats.pickled import Pickled, write_pickle
from sdforge.formats.safetensors import write_file
from sdforge.formats.single_file import single_pieces
from tests.families.forms import CASES, WIDE, Case

FORGE = Path(sys.executable).with_name("forge")
PRESETS = ("plain", "forms", "whole", "bare")
HYPERNETWORKS = ("mood", "normed")
WORD, VECTORS = "<mascot>", 3
STRENGTHS = {"forms": 1.0, "whole": 0.8}  # of the LoRAs of a preset
UNSAID = ("oft of inputs", "oft of inputs, a series")  # no such file can say them
# a form's numbers are drawn so far that it changes a weight by some hundredths
SPREAD = {
    "loha": 0.2,
    "dora of a loha": 0.2,
    "loha with cores": 0.4,
    "lokr, the first whole": 0.15,
    "lokr, the second whole": 0.15,
    "lokr, none whole": 0.25,
    "lokr with a core": 0.3,
    "a difference": 0.003,
}
Shape = tuple[int, ...]


def slug(form: str) -> str:
    """Return a form's name as a target's."""
    return form.replace(",", "").replace(" ", "-")


def numbers(name: str, seed: int, shape: Shape) -> Tensor:
    """Return a tensor's numbers in fp32, of the size that they have in a network that has been initialised."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=draw)
    if len(shape) > 1:
        spread = 0.02 if "embed" in name else 0.6 / sqrt(prod(shape[1:]))
        return noise * spread
    return 0.02 * noise + (1.0 if name.endswith("weight") else 0.0)


def merged_numbers(name: str, seed: int, shape: Shape) -> Tensor:
    """Return the numbers of one of two bases, which are close to each other as kin are."""
    return (numbers(name, 0, shape) + 0.1 * seed * numbers(name, seed, shape)).half()


def write_checkpoint(path: Path, kind: Family, seed: int) -> None:
    """Write a single file in fp16."""
    pieces = single_pieces(kind, {place: ("F16", shape) for place, shape in shapes(kind.name).items()})

    def content(single: str) -> Iterable[Any]:
        drawn = merged_numbers(single, seed, pieces[single].shape)
        return [memoryview(drawn.view(torch.uint8).numpy().reshape(-1))]  # type: ignore[arg-type]

    write_file(path, {single: (piece.dtype, piece.shape) for single, piece in pieces.items()}, content)


def modules(kind: Family) -> dict[str, Shape]:
    """Return every module that a LoRA can change → its weight's shape, 1×1 kernels as matrices."""
    found = {}
    for (component, name), shape in shapes(kind.name).items():
        module = f"{component}.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and module in kind.modules():
            found[module] = shape[:2] if shape[2:] == (1, 1) else shape
    return dict(sorted(found.items()))


def drawer(name: str, spread: float) -> Any:
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return lambda *size: spread * torch.randn(*size, generator=draw)


def factors_of(form: str, module: str, shape: Shape) -> dict[str, Tensor]:
    """Return the factors of one form for one module; magnitudes of DoRA are of the size of what they rescale."""
    case: Case = (CASES | WIDE)[form]
    factors = case.factors(shape, drawer(module, SPREAD.get(form, 0.06)))
    if form == "oft":
        del factors["rescale"]  # which its trainers leave out, unlike those that limit the turn
    if "dora_scale" in factors:
        rows = factors["dora_scale"].shape[1] == 1
        length = 0.6 if rows else 0.6 * sqrt(shape[0] / shape[1])
        factors["dora_scale"] = length * factors["dora_scale"]
    return factors


def fits(form: str, shape: Shape) -> bool:
    """Say whether a form is for weights of this shape: its blocks divide it, and cores are for kernels."""
    if form in WIDE and len(shape) < 4:
        return False
    if form == "boft":
        return shape[0] % 8 == 0
    return shape[0] % 4 == 0 and shape[1] % 2 == 0


def dealt(kind: Family) -> dict[str, dict[str, tuple[str, Shape]]]:
    """Return file → module → the form of its change, and its weight's shape: every module is in one file.

    Files of forms for kernels have a kin of theirs on matrices, as such files do. Each file has a matrix that turns
    the text into keys or values, since some programs tell the family by one.
    """
    kin = {"a core": "lora", "loha with cores": "loha", "lokr with a core": "lokr, the first whole"}
    forms = [form for form in (*WIDE, *CASES) if form not in UNSAID]
    found: dict[str, dict[str, tuple[str, Shape]]] = {form: {} for form in forms}
    turns: dict[tuple[int, bool], int] = {}
    for module, shape in modules(kind).items():
        group = len(shape), module.endswith(("attn2.to_k", "attn2.to_v"))
        turn = turns[group] = turns.get(group, -1) + 1
        able = [form for form in forms if fits(kin.get(form, form) if len(shape) == 2 else form, shape)]
        form = able[turn % len(able)]
        found[form][module] = (kin.get(form, form) if len(shape) == 2 else form), shape
    return found


def write_lora(path: Path, kind: Family, tensors: dict[str, Tensor], alpha: float | None) -> None:
    """Write canonical factors as kohya and LyCORIS have them, in fp16."""
    tensors = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    sizes = {name: ("F16", tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = kohya_tensors(kind, sizes, {} if alpha is None else {"alpha": alpha})

    def content(name: str) -> list[Any]:
        if name in file.constant:
            return [file.constant[name]]
        return [memoryview(tensors[file.origin[name]].view(torch.uint8).numpy().reshape(-1))]  # type: ignore[arg-type]

    write_file(path, file.shapes, content, {"ss_network_module": "networks.lora"})


def write_norms(path: Path, kind: Family) -> None:
    """Write differences of norms' weights and biases, and of the biases of some layers."""
    tensors = {}
    for (component, name), shape in shapes(kind.name).items():
        module, _, part = name.rpartition(".")
        if f"{component}.{module}" in kind.norms():
            factor = "w_norm" if part == "weight" else "b_norm"
            tensors[f"{component}.{module}.{factor}"] = drawer(name, 0.05)(*shape)
    write_lora(path, kind, tensors, None)


def write_loras(folder: Path, kind: Family) -> list[str]:
    """Write a LoRA of each form and return their names."""
    names = []
    for form, own in dealt(kind).items():
        tensors = {
            f"{module}.{factor}": tensor
            for module, (each, shape) in own.items()
            for factor, tensor in factors_of(each, module, shape).items()
        }
        write_lora(folder / f"{slug(form)}.safetensors", kind, tensors, (CASES | WIDE)[form].alpha or None)
        names.append(slug(form))
    write_norms(folder / "norms.safetensors", kind)
    tensors = {
        f"{module}.{factor}": tensor
        for module, shape in modules(kind).items()
        for factor, tensor in factors_of("lora", module, shape).items()
    }
    write_lora(folder / "whole.safetensors", kind, tensors, 2.0)
    return [*names, "norms"]


def write_word(path: Path, kind: Family) -> None:
    """Write an embedding as everyone reads it."""
    widths = {"text_encoder": 768, "text_encoder_2": 1280}
    rows = {encoder: drawer(encoder, 0.05)(VECTORS, widths[encoder]).half() for encoder in kind.text_encoders}
    named = {"emb_params": rows["text_encoder"]}
    if len(rows) > 1:
        named = {"clip_l": rows["text_encoder"], "clip_g": rows["text_encoder_2"]}
    save_file(named, path)


def write_hypernetwork(path: Path, *, layer_norm: bool) -> None:
    """Write a hypernetwork as A1111 does, for every width of SD1's attention."""
    facts = stated([1.0, 2.0, 1.0], activation="relu", layer_norm=layer_norm)
    tensors = {
        f"{width}.{side}.{name}": drawer(f"{width} {side} {name}", 0.02)(*shape) + float("norm" in name)
        for width in (320, 640, 768, 1280)
        for side in "kv"
        for name, shape in shapes_of(width, facts).items()
    }

    def pickled(tensor: Tensor) -> Pickled:
        return Pickled("F32", tuple(tensor.shape), lambda: [tensor.numpy().tobytes()])

    write_pickle(path, pickled_form({name: pickled(tensor) for name, tensor in tensors.items()}, facts))


def sources(root: Path, kind: Family) -> list[str]:
    """Write what the recipes begin with; return the names of the LoRAs of each form."""
    folder = root / "sources"
    folder.mkdir(parents=True)
    for name, seed in (("one", 0), ("two", 1)):
        write_checkpoint(folder / f"{name}.safetensors", kind, seed)
    loras = write_loras(folder, kind)
    write_word(folder / "mascot.safetensors", kind)
    lines = [f'[source.{name}]\nfrom = "sources/{name}.safetensors"\n' for name in ("one", "two", "whole", *loras)]
    lines.append(f'[source.mascot]\nfrom = "sources/mascot.safetensors"\nembedding = "{WORD}"\n')
    if kind.name == "sd15":
        for name in HYPERNETWORKS:
            write_hypernetwork(folder / f"{name}.pt", layer_norm=name == "normed")
            lines.append(f'[source.{name}]\nfrom = "sources/{name}.pt"\npickle = "allow"\n')
    (root / "forge.toml").write_text("\n".join(lines))
    return loras


RECIPE = """\
family = "{family}"

[weighted_sum.mixed]
checkpoints = ["one", "two"]
weights = [0.6, 0.4]

[preset]
checkpoint = "mixed"
insert = ["mascot"]
description = "What other programs are to open"
trigger = ["{word}"]
"""


def recipes(root: Path, kind: Family, loras: list[str]) -> None:
    """Write the three recipes."""
    (root / "recipes").mkdir()
    start = RECIPE.format(family=kind.name, word=WORD)
    small = kind.name == "sd15"
    words = ["embeddings", "embeddings-diffusers", "embeddings-pt"]
    more = ["hypernetworks-pt"] if small else []
    sidecar = f"sidecars = {json.dumps(HYPERNETWORKS)}\n" if small else ""
    baked = ", ".join(f"{name} = {STRENGTHS['forms']}" for name in loras)
    texts = {
        "plain": f"{sidecar}export = {json.dumps(['checkpoint', 'diffusers', *words, *more])}\n",
        "forms": f'bake = {{ {baked} }}\nexport = ["checkpoint", "embeddings"]\n',
        "whole": f'bake = {{ whole = {STRENGTHS["whole"]} }}\nexport = ["checkpoint", "embeddings"]\n',
    }
    for name, text in texts.items():
        (root / "recipes" / f"{name}.toml").write_text(start + text)
    bare = "\n".join(line for line in start.splitlines() if not line.startswith("insert"))
    (root / "recipes" / "bare.toml").write_text(f'{bare}\nexport = ["diffusers"]\n')


def make(root: Path, name: str) -> None:
    """Write a project, build its presets and write its LoRAs as files for other programs, by the real commands."""
    kind = family(name)
    loras = {"forms": sources(root, kind), "whole": ["whole"]}
    recipes(root, kind, loras["forms"])
    for preset in PRESETS:
        forge(root, "build", preset)
    for preset, names in loras.items():
        (root / "loras" / preset).mkdir(parents=True)
        for lora in names:
            convert(root, lora, f"{preset}/{lora}", "loras", name)
    convert(root, "whole", "whole/whole.diffusers", "loras-diffusers", name)


def convert(root: Path, lora: str, out: str, form: str, name: str) -> None:
    """Write a LoRA in one of our forms; the family is named since not every form tells it."""
    files = f"sources/{lora}.safetensors", f"loras/{out}.safetensors"
    forge(root, "convert", *files, "--to", form, "--family", name)


def forge(root: Path, *arguments: str) -> None:
    subprocess.run([str(FORGE), *arguments], cwd=root, check=True)
