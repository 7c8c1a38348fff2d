"""LoRA files as kohya's scripts and LyCORIS name them, which A1111, Forge, ComfyUI and SD.Next read: read and write.

What ComfyUI writes itself is read too: the same, with dots in its names.

A file holds tensors `lora_unet_….lora_up.weight`, dots of a module's name as underscores. Of Stable Diffusion XL's
U-Net the names are those of a single file (`lora_unet_input_blocks_4_1_…`), of the others diffusers'; both are read of
every family, since other programs write the other ones. Besides LoRA there are
LyCORIS' forms (https://arxiv.org/abs/2309.14859): what a module's tensors are called tells which.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import UsageError, counted, nearest
from sdforge.families import Family, families
from sdforge.families.stable_diffusion import UNET
from sdforge.formats.embedding import BUNDLE, carried
from sdforge.formats.layout import Layout
from sdforge.formats.lora import (
    BIASES,
    FACTORS,
    Change,
    Part,
    Shape,
    alpha_of,
    change_of,
    family_with,
    has_alpha,
    lora_layout,
    parts_of,
    read_scalar,
    refuse_stranger,
)
from sdforge.formats.safetensors import Entry, Header, header_bytes
from sdforge.identity import Json

# our settings → what kohya's metadata calls them
SETTINGS = {
    "learning_rate": "learning_rate",
    "steps": "steps",
    "batch": "total_batch_size",
    "warmup": "lr_warmup_steps",
    "schedule": "lr_scheduler",
    "min_snr": "min_snr_gamma",
    "clip": "max_grad_norm",
    "caption_dropout": "caption_dropout_rate",
    "seed": "seed",
}
# our factors → how kohya and LyCORIS write those that they call otherwise
SPELLED = {name: f"{name}.weight" for name in ("lora_down", "lora_up", "lora_mid", "a1", "a2", "b1", "b2")}
SPELLED["ia3"] = "weight"
UNWRITTEN = "oft_r"  # of PEFT: no program reads it from such a file
SUFFIXES = {f".{SPELLED.get(name, name)}": name for name in sorted(FACTORS - {UNWRITTEN})}
ALPHA, ON_INPUT = ".alpha", ".on_input"
NORM = {"w_norm": "b_norm", "b_norm": "w_norm"}  # the halves of a norm's difference
# how others begin a module's name: LyCORIS where it wraps a single network, kohya's OFT
STARTS = {
    "lycoris_text_model_": "lora_te_text_model_",
    "lycoris_encoder_layers_": "lora_te_encoder_layers_",
    "lycoris_": "lora_unet_",
    "oft_": "lora_",
}
# how ComfyUI begins the names in what its node LoraSave writes, which have dots; of each family as its programs call it
COMFY = {
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
    "text_encoders.clip_h.transformer.": "lora_te1_",
}
FIRST_OF_SEVERAL = "lora_te1_"  # how names begin of the first text encoder where there are two
BUNDLED = "embeddings that came with the LoRA: a source of this file that states `embedding` takes one"
KERNELS = tuple(f".{name}.weight" for name in ("conv", "conv1", "conv2", "conv_in", "conv_out"))  # of 3×3
DYNAMIC = "Dynamic"  # what kohya's scripts state where every module has its own
LEGACY = slice(0x100000, 0x110000)  # the bytes of a file by which A1111 knew it first
WHOLE_DIM = "10000"  # as LyCORIS is told that the second factor of a LoKr is whole


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    return header is not None and any(
        name.startswith(("lora_", *STARTS)) or (name.startswith(tuple(COMFY)) and _split(name)[1])
        for name in header.tensors
    )


def read(path: Path, header: Header) -> Layout:
    parts: dict[str, dict[str, Entry]] = {}
    alphas, on_input, odd = {}, {}, []
    for raw, entry in header.tensors.items():
        module, name = _split(raw)
        if raw.startswith(BUNDLE):
            continue
        if name == ALPHA:
            alphas[module] = read_scalar(path, header, entry)
        elif name == ON_INPUT:
            on_input[module] = read_scalar(path, header, entry)
        elif name and name in parts.setdefault(module, {}):
            raise UsageError(f"{path} has a factor of {module} twice, in two spellings")
        elif name:
            parts[module][name] = entry
        else:
            odd.append(raw)
    odd += [module + ON_INPUT for module in on_input if "ia3" not in parts.get(module, {})]
    if odd:
        some = ", ".join(sorted(odd)[:2])
        raise UsageError(
            f"{path} holds {counted(len(odd), 'tensor')} of a kind of LoRA that cannot be read here: {some}",
            hint="LoRA, LoCon, DoRA, LoHa, LoKr, GLoRA, OFT, BOFT, IA3 and full differences are read",
        )
    if lost := sorted(set(alphas) - set(parts)):
        raise UsageError(f"{path} has an alpha and no factor for {lost[0]}")
    for module, entries in parts.items():
        if "ia3" in entries:
            size, row = prod(entries["ia3"].shape), bool(on_input.get(module, 0))
            entries["ia3"] = replace(entries["ia3"], shape=(1, size) if row else (size, 1))
    found, names = _family(path, list(parts))
    _refuse_twice(path, names, parts)
    layout = lora_layout(
        path,
        found,
        {names[module]: entries for module, entries in parts.items()},
        {names[module]: alpha for module, alpha in alphas.items()},
        header.metadata.get("ss_base_model_version", ""),
    )
    known = {"lora_down", "lora_up"}
    plain = all(set(entries) <= known for entries in parts.values())
    layout.dialect = "kohya" if plain and not any(raw.startswith("lycoris_") for raw in header.tensors) else "LyCORIS"
    if any(raw.startswith(tuple(COMFY)) for raw in header.tensors):
        layout.dialect = "ComfyUI"
    if embeddings := carried(header):
        layout.passed[BUNDLED] = sum(map(len, embeddings.values()))
        layout.notes["embeddings"] = sorted(embeddings)
    for key, note in (("modelspec.title", "title"), ("modelspec.trigger_phrase", "trigger")):
        if key in header.metadata:
            layout.notes[note] = header.metadata[key]
    return layout


def _split(raw: str) -> tuple[str, str]:
    """Return a tensor's module, as kohya's scripts begin it, and which of our factors it is ("" for none)."""
    if start := next((start for start in COMFY if raw.startswith(start)), ""):
        suffix = next((each for each in (*SUFFIXES, ALPHA) if raw.endswith(each) and each != ".weight"), "")
        raw = COMFY[start] + raw[len(start) : len(raw) - len(suffix)].replace(".", "_") + suffix
    start = next((start for start in STARTS if raw.startswith(start)), "")
    raw = STARTS.get(start, "") + raw.removeprefix(start)
    for suffix in (ALPHA, ON_INPUT):
        if raw.endswith(suffix):
            return raw.removesuffix(suffix), suffix
    module, dot, rest = raw.partition(".")
    return module, SUFFIXES.get(dot + rest, "")


def _family(path: Path, names: list[str]) -> tuple[Family, dict[str, str]]:
    best, known, whose = names, set(), ""
    for each in families():
        table = _spellings(each)
        missing = [n for n in names if n not in table]
        if not missing and family_with(table[n] for n in names):
            return each, table
        if len(missing) < len(best):
            best, known, whose = missing, set(table), each.title
    refuse_stranger(path, names)
    first = sorted(best)[:2]
    if whose:
        raise UsageError(
            f"{path} is a LoRA for modules of {whose} and for others, which it does not have: {', '.join(first)}",
            hint=f"nearest: {nearest(first[0], known)}",
        )
    raise UsageError(
        f"{path} is a LoRA for modules that no family known here has: {', '.join(first)}",
        hint="is it for another architecture?",
    )


def _refuse_twice(path: Path, names: dict[str, str], spelled: Iterable[str]) -> None:
    known: set[str] = set()
    for module in (names[each] for each in spelled):
        if module in known:
            raise UsageError(f"{path} has factors of {module} twice, in two spellings")
        known.add(module)


def kohya_names(found: Family) -> dict[str, str]:
    """Return module (`component.path`) → kohya's name, for every module a LoRA of the family can change."""
    return _flattened(found, _single_paths(found) if found.sgm_names else {})


def _spellings(found: Family) -> dict[str, str]:
    """Return every name that LoRA files give a module of the family → the module."""
    both = (_flattened(found, {}), _flattened(found, _single_paths(found)))
    spelled = {kohya: module for names in both for module, kohya in names.items()}
    for kohya, module in list(spelled.items()):
        component, _, path = module.partition(".")
        if not component.startswith("text_encoder"):
            continue
        # diffusers numbers the text encoder of every family; transformers leaves `text_model.` out since its version 5
        prefixes = (found.kohya_prefix[component], *([FIRST_OF_SEVERAL] if component == "text_encoder" else []))
        endings = kohya.removeprefix(found.kohya_prefix[component]), path.removeprefix("text_model.").replace(".", "_")
        spelled |= {prefix + ending: module for prefix in prefixes for ending in endings}
    return spelled


def _flattened(found: Family, paths: dict[str, str]) -> dict[str, str]:
    """Return module → its name with a prefix and underscores; paths: of those that are called otherwise than here."""
    names = {}
    for module in found.modules() | found.norms():
        component, _, path = module.partition(".")
        names[module] = found.kohya_prefix[component] + paths.get(module, path).replace(".", "_")
    return names


def _single_paths(found: Family) -> dict[str, str]:
    """Return module of the U-Net → its path in a single file."""
    return {
        f"unet.{name.canonical.removesuffix('.weight')}": name.single.removeprefix(UNET).removesuffix(".weight")
        for name in found.names()
        if name.component == "unet"
    }


class KohyaFile(NamedTuple):
    """A kohya file: dtypes and shapes by its names, from which of our tensors, and what stands in it besides."""

    shapes: dict[str, tuple[str, Shape]]
    origin: dict[str, str]
    constant: dict[str, bytes]


def kohya_tensors(
    found: Family,
    factors: dict[str, tuple[str, Shape]],
    facts: dict[str, Json],
    weights: Mapping[str, Shape] | None = None,
) -> KohyaFile:
    """Lay out a kohya file. factors: canonical name (`MODULE.lora_down`, …) → (dtype, shape).

    weights: `MODULE.weight` → shape, of the checkpoint that the file is for, as far as it is known. Raises UsageError
    for what no such file can say.
    """
    names = kohya_names(found)
    written = KohyaFile({}, {}, {})
    for canonical, (dtype, shape) in factors.items():
        module, _, factor = canonical.rpartition(".")
        if factor == UNWRITTEN:
            raise UsageError(
                f"{module} is turned on the side of its inputs (OFT as PEFT keeps it), which no LoRA file of the "
                "kind that other programs read can say",
                hint="bake it, and export the checkpoint",
            )
        kohya = f"{names[module]}.{SPELLED.get(factor, factor)}"
        # kohya's scripts refuse plain factors of another shape; in all that is not theirs shapes are the weight's own
        conv = found.is_kohya_conv(module) if factor in ("lora_down", "lora_up") else found.is_conv(module)
        written.shapes[kohya] = dtype, _shape(factor, shape, conv=conv)
        written.origin[kohya] = canonical
        if factor == "ia3":
            written.shapes[names[module] + ON_INPUT] = "F32", ()
            written.constant[names[module] + ON_INPUT] = struct.pack("<f", float(shape[0] == 1))
    for module, (part, change) in _changes(factors).items():
        # LyCORIS wants an alpha of every LoKr, and does without it where both factors are whole
        if has_alpha(part.form, change) or part.form == "lokr":
            alpha = alpha_of(facts, module, change.rank) if has_alpha(part.form, change) else 1.0
            written.shapes[names[module] + ALPHA] = "F32", ()
            written.constant[names[module] + ALPHA] = struct.pack("<f", alpha)
    for canonical, (dtype, shape) in _zeros(factors, weights or {}).items():
        module, _, factor = canonical.rpartition(".")
        kohya = f"{names[module]}.{SPELLED.get(factor, factor)}"
        written.shapes[kohya] = dtype, _shape(factor, shape, conv=found.is_kohya_conv(module))
        written.constant[kohya] = bytes(prod(shape) * ITEM_SIZE[dtype])
    return written


def _zeros(factors: dict[str, tuple[str, Shape]], weights: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
    """Return factors of zeros to be written beside a difference of a bias, or of one half of a norm, that has no other.

    A1111 and InvokeAI read no file in which a module has nothing but that, and ComfyUI no norm's bias without a weight.
    """
    found: dict[str, tuple[str, Shape]] = {}
    for canonical, (dtype, shape) in factors.items():
        module, _, factor = canonical.rpartition(".")
        other = f"{module}.{NORM.get(factor, '')}"
        if factor in NORM and other not in factors:
            found[other] = dtype, shape
        alone = factor == "diff_b" and not any(f"{module}.{each}" in factors for each in FACTORS - {"diff_b"})
        if alone and (weight := weights.get(f"{module}.weight")):
            columns = weight[1:2] if weight[2:] == (1, 1) else weight[1:]
            found |= {f"{module}.lora_down": (dtype, (1, *columns)), f"{module}.lora_up": (dtype, (weight[0], 1))}
    return found


def _shape(factor: str, shape: Shape, *, conv: bool) -> Shape:
    """Return a factor's shape as it is written: matrices of convolutions have two dimensions more."""
    if factor == "ia3" and not conv:
        return (prod(shape),)
    if conv and len(shape) == 2 and not factor.startswith(("hada_", "lokr_w1", "lokr_w2_")):
        return (*shape, 1, 1)
    return shape


def _changes(factors: dict[str, tuple[str, Shape]]) -> dict[str, tuple[Part, Change]]:
    """Return module → what changes its weight."""
    modules: dict[str, dict[str, Shape]] = {}
    for canonical, (_, shape) in factors.items():
        module, _, factor = canonical.rpartition(".")
        modules.setdefault(module, {})[factor] = shape
    return {
        module: (part, change_of(part, {name: shapes[name] for name in part.factors}))
        for module, shapes in modules.items()
        for part in parts_of(module, shapes)
        if part.form not in BIASES
    }


def kohya_metadata(
    version: str, settings: dict[str, Any], facts: dict[str, Json], factors: dict[str, tuple[str, Shape]]
) -> dict[str, str]:
    """Return the least that other programs want to know of a LoRA (`ss_*`), from what decided its result.

    Rank and alpha of convolutions larger than 1×1 are arguments of their own, `conv_dim` and `conv_alpha`.
    version: `ss_base_model_version`; facts: the LoRA's.
    """
    changes = _changes(factors)
    kernels = {module: each for module, each in changes.items() if each[0].weight.endswith(KERNELS)}
    matrices = {module: each for module, each in changes.items() if module not in kernels} or kernels
    ranks = _ranks(matrices)
    rank, alphas = max(ranks, default=0), _alphas(matrices, facts)
    module, arguments, whole = _network(changes)
    if conv_dim := max(_ranks(kernels), default=0):
        arguments["conv_dim"] = str(conv_dim)
        if len(conv_alpha := _alphas(kernels, facts)) == 1:
            arguments["conv_alpha"] = str(conv_alpha.pop())
    varied = "alpha" not in facts and len(ranks) > 1  # as resizing and extracting leave them
    alpha = str(alphas.pop() if alphas else float(rank)) if len(alphas) < 2 else DYNAMIC
    return {
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": module,
        "ss_network_dim": WHOLE_DIM if whole else DYNAMIC if varied else str(rank),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments) if arguments else "null",
        **{f"ss_{key}": json.dumps(value) for key, value in sorted(settings.items())},
    }


def _ranks(changes: dict[str, tuple[Part, Change]]) -> set[int]:
    return {change.rank for _, change in changes.values()} - {0}


def _alphas(changes: dict[str, tuple[Part, Change]], facts: dict[str, Json]) -> set[float]:
    """Return every alpha that one of these has."""
    ranked = {module: change for module, (part, change) in changes.items() if has_alpha(part.form, change)}
    return {alpha_of(facts, module, change.rank) for module, change in ranked.items()}


def _network(changes: dict[str, tuple[Part, Change]]) -> tuple[str, dict[str, str], bool]:
    """Return the module of kohya's scripts that makes such a network, its arguments, and whether factors are whole.

    What it is told of convolutions larger than 1×1 is not among the arguments.
    """
    forms = {part.form for part, _ in changes.values()}
    dora = [part for part, _ in changes.values() if "dora_scale" in part.factors]
    if forms == {"lora"} and not dora and not any("lora_mid" in part.factors for part, _ in changes.values()):
        return "networks.lora", {}, False
    algo = forms.pop() if len(forms) == 1 else "full"
    arguments = {"algo": {"lora": "locon", "oft": "diag-oft", "w_norm": "full", "diff": "full"}.get(algo, algo)}
    if dora:
        arguments["dora_wd"] = "True"
    return "lycoris.kohya", arguments, algo == "lokr" and not _ranks(changes)


class Body:
    """What a file's hashes need of its tensors' bytes, taken chunk by chunk: their sha256, and how they begin."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.start = b""

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(chunk)
        self.start += chunk[: LEGACY.stop - len(self.start)]

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def hashes(shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], body: Body) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash`, by which A1111 and kohya recognise a LoRA.

    The first is the sha256 of the tensors' bytes; the second the first 8 digits of the sha256 of 64 KiB at 1 MiB of
    a file that carries only the `ss_*` metadata (empty for files smaller than that, as theirs is).
    """
    first, _ = header_bytes(shapes, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    legacy = hashlib.sha256((first + body.start)[LEGACY]).hexdigest()[:8]
    return {"sshs_model_hash": body.sha256, "sshs_legacy_hash": legacy}
