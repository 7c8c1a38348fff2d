"""LoRA files as diffusers and PEFT name them (`unet.….lora_A.weight`), alpha in metadata or configuration.

Three habits: diffusers' own file, with `lora_adapter_metadata` since 0.35; the older one of attention processors
(`….attn1.processor.to_q_lora.down.weight`), whose alpha is the rank; and PEFT's folder of `adapter_model.safetensors`
and `adapter_config.json`, which holds one network. PEFT's magnitudes (DoRA) are per output row. All are read, the
first is written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError, counted, nearest
from sdforge.families import Family, family, family_names
from sdforge.formats.layout import HeaderOf, Layout
from sdforge.formats.lora import FACTORS as CANONICAL
from sdforge.formats.lora import Shape, alpha_of, family_with, lora_layout, read_scalar, refuse_stranger
from sdforge.formats.safetensors import Entry, Header, stated_json
from sdforge.identity import Json, canonical

MAGNITUDE = "lora_magnitude_vector"
FACTORS = {
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    f".{MAGNITUDE}": "dora_scale",
    f".{MAGNITUDE}.weight": "dora_scale",
    ".oft_R.weight": "oft_r",
    **{f".{name}": name for name in sorted(CANONICAL) if name.startswith(("hada_", "lokr_"))},
}
PROCESSOR = re.compile(r"^(.*?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")
NAME = re.compile(r"[\w.-]+")
METADATA = "lora_adapter_metadata"  # since diffusers 0.35: {"unet.r": 8, "unet.lora_alpha": 16, …}
CONFIG, PEFT = "adapter_config.json", "base_model.model."
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
MOST_CONFIG = 4 << 20  # bytes
MOST_ALPHA = 2.0**64
KINDS = ("LORA", "LOHA", "LOKR", "OFT")  # of PEFT's adapters
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin a LoRA that move W too


def recognises(path: Path, header: Header | None) -> bool:
    if header is None:
        return (path / CONFIG).is_file()
    ours = any(name.endswith(tuple(FACTORS)) or PROCESSOR.match(name) for name in header.tensors)
    return ours or any("_lora" in name for name in header.tensors)  # of other programs, for other architectures


def read(path: Path, header: Header) -> Layout:
    if any(name.startswith(PEFT) for name in header.tensors) and METADATA not in header.metadata:
        raise UsageError(
            f"{path} does not state its alpha, which lies in {CONFIG} beside it", hint="name the folder as the source"
        )
    layout = _read(path, header, _stated(path, header.metadata))
    layout.dialect = "diffusers, before PEFT" if any(map(PROCESSOR.match, header.tensors)) else "diffusers"
    return layout


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    """Read PEFT's folder: one network's adapter, with what its configuration states."""
    folder, config = path, path / CONFIG
    path = next((file for name in WEIGHTS if (file := folder / name).is_file()), folder / WEIGHTS[0])
    if not path.is_file():
        raise UsageError(f"{folder} has an {CONFIG} and no {path.name}")
    try:
        value = json.loads(config.read_bytes()) if config.stat().st_size <= MOST_CONFIG else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{config} is no JSON table")
    kind, begun = value.get("peft_type"), value.get("init_lora_weights")
    if kind not in KINDS:
        raise UsageError(f"{folder} is an adapter of kind {kind}, which cannot be read here", hint=", ".join(KINDS))
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise UsageError(f"{folder} began as {begun}, which changed the checkpoint too: it fits no other")
    if value.get("alora_invocation_tokens"):
        raise UsageError(
            f"{folder} is an activated LoRA of PEFT, which words of a prompt switch on: it cannot be baked"
        )
    if value.get("coft"):
        raise UsageError(f"{folder} is a constrained OFT of PEFT, which cannot be read here")
    layout = _read(path, header_of(path), {f"*.{key}": setting for key, setting in value.items()})
    layout.files.append(config)
    layout.dialect = "PEFT"
    if kind == "OFT" and value.get("use_cayley_neumann", True):
        layout.facts["neumann"] = terms = value.get("num_cayley_neumann_terms", 5)
        if type(terms) is not int or terms < 1:
            raise UsageError(f"{config} states num_cayley_neumann_terms as {terms!r} where a whole number belongs")
    return layout


def _read(path: Path, header: Header, stated: dict[str, Any]) -> Layout:
    parts: dict[str, dict[str, Entry]] = {}
    alphas, odd = {}, []
    for raw, entry in header.tensors.items():
        module, factor = _split(raw)
        if raw.endswith(".alpha"):
            alphas[_spelled(raw.removesuffix(".alpha"))] = read_scalar(path, header, entry)
        elif not factor:
            odd.append(raw)
        elif factor in parts.setdefault(module, {}):
            raise UsageError(f"{path} has a factor of {module} twice, in two spellings")
        else:
            size = prod(entry.shape)
            parts[module][factor] = replace(entry, shape=(size, 1)) if factor == "dora_scale" else entry
    refuse_stranger(path, header.tensors)
    if odd:
        some = ", ".join(sorted(odd)[:2])
        raise UsageError(
            f"{path} holds {counted(len(odd), 'tensor')} of a kind of LoRA that cannot be read here: {some}",
            hint="LoRA, DoRA, LoHa, LoKr and OFT of diffusers and PEFT are read",
        )
    found, names = _family(path, list(parts))
    if lost := sorted(set(alphas) - set(parts)):
        raise UsageError(f"{path} has an alpha and no factor for {lost[0]}")
    entries = {names[module]: factors for module, factors in parts.items()}
    for module, factors in parts.items():
        rank = _rank(path, module, factors)
        alpha = _alpha(path, stated, module, rank)
        if alpha is not None:
            alphas.setdefault(module, alpha)
        if not rank and "oft_r" not in factors and "dora_scale" not in factors and _scales(path, stated, module, alpha):
            raise UsageError(
                f"{path} scales whole factors of {module} by an alpha, which only PEFT does",
                hint="merge it into its checkpoint with PEFT, and `extract` what that changed",
            )
    rotated = {module for module, factors in parts.items() if "oft_r" in factors}
    return lora_layout(path, found, entries, {names[m]: alpha for m, alpha in alphas.items() if m not in rotated})


def _split(raw: str) -> tuple[str, str]:
    """Return a tensor's module, as our families name it, and which factor it is ("" for none)."""
    if match := PROCESSOR.match(raw):
        place, part, side = match.groups()
        text = f"{part}_proj"
        part = text if place.endswith("self_attn") else "to_out.0" if part == "out" else f"to_{part}"
        return _spelled(f"{place}.{part}"), f"lora_{side}"
    suffix = next((s for s in FACTORS if raw.endswith(s)), "")
    return _spelled(raw.removesuffix(suffix)), FACTORS.get(suffix, "")


def _spelled(module: str) -> str:
    """Return a module's name with the `text_model.` that some versions leave out."""
    module = module.removeprefix(PEFT)
    for encoder in ("text_encoder.", "text_encoder_2."):
        if module.startswith(encoder):
            return f"{encoder}text_model.{module.removeprefix(encoder).removeprefix('text_model.')}"
    return module


def _family(path: Path, modules: list[str]) -> tuple[Family, dict[str, str]]:
    """Return the family, and module as the file has it → `component.path`; the component may be left out."""
    known: set[str] = set()
    for name in family_names():
        all_of_it = family(name).modules()
        known |= all_of_it
        for prefix in ("", "unet.", *(f"{c}.{text}" for c in family(name).networks for text in ("", "text_model."))):
            names = {module: prefix + module for module in modules}
            if family_with(names.values()) is family(name):
                return family(name), names
    strange = sorted(set(modules) - known)
    guess = nearest(strange[0], known) if strange else ""
    raise UsageError(
        f"{path} is a LoRA for modules that no family known here has: {', '.join(strange[:2])}",
        hint=f"nearest: {guess}" if guess else "",
    )


def _stated(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    value = stated_json(metadata, METADATA) if METADATA in metadata else {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} has metadata {METADATA} that is no table in JSON")
    return value


def _rank(path: Path, module: str, factors: dict[str, Entry]) -> int:
    """Return the rank of a module's factors, 0 where they have none."""
    inner = next((n for n in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if n in factors), None)
    if inner is None:
        return 0
    if not factors[inner].shape:
        raise UsageError(f"{path} has factors for {module} that do not fit together")
    return factors[inner].shape[0]


def _alpha(path: Path, stated: dict[str, Any], module: str, rank: int) -> float | None:
    """Return the alpha that is stated for a module; PEFT's rsLoRA divides by √rank instead of rank."""
    component, _ = _place(stated, module)
    alpha = stated.get(f"{component}.lora_alpha", stated.get(f"{component}.alpha"))
    alpha = _of_module(path, stated, module, "alpha", alpha)
    if alpha is None:
        return None
    if type(alpha) not in (int, float) or not abs(alpha) < MOST_ALPHA:
        raise UsageError(f"{path} states {str(alpha)[:60]!r} as the alpha of {module}, which is no number")
    return float(alpha) * (sqrt(rank) if stated.get(f"{component}.use_rslora") else 1.0)


def _place(stated: dict[str, Any], module: str) -> tuple[str, str]:
    """Return how what is stated of a module's network begins, and the module's name in it."""
    component, _, name = module.partition(".")
    return ("*", module) if "*.peft_type" in stated else (component, name)  # a folder is of one network


def _of_module(path: Path, stated: dict[str, Any], module: str, what: str, usual: Any) -> Any:
    """Return what `alpha_pattern` or `rank_pattern` states of a module, or else the usual."""
    component, name = _place(stated, module)
    patterns = stated.get(f"{component}.{what}_pattern") or {}
    if not isinstance(patterns, dict):
        raise UsageError(f"{path} states {str(patterns)[:60]!r} as the {what} of modules, which is no table")
    return next((value for pattern, value in patterns.items() if _means(path, pattern, name, what)), usual)


def _means(path: Path, pattern: str, module: str, what: str) -> bool:
    """Say whether a key of `alpha_pattern` or `rank_pattern` means a module: the first that does counts.

    To PEFT it is a regular expression for the end of a name. The end itself is read, behind `^` the whole name;
    anything else is refused, since it could be meant for any module, and take any time to find out.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not NAME.fullmatch(plain):
        raise UsageError(
            f"{path} states the {what} of modules by the pattern {pattern[:60]!r}, and only names are read here",
            hint="write a line for each module that it means",
        )
    plain, module = (each.removeprefix("text_model.") for each in (plain, module))
    return module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}"))


def _scales(path: Path, stated: dict[str, Any], module: str, alpha: float | None) -> bool:
    """Say whether PEFT divides by a rank that the factors do not have."""
    return alpha is not None and alpha != _of_module(path, stated, module, "rank", stated.get("*.r", alpha))


LENGTHS = {"dora_scale": f"{MAGNITUDE}.weight"}
WRITTEN = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", **LENGTHS}
# of text encoders diffusers takes PEFT's names of attention alone, and these of all layers
WRITTEN_TEXT = {"lora_down": "lora_linear_layer.down.weight", "lora_up": "lora_linear_layer.up.weight", **LENGTHS}


def diffusers_tensors(found: Family, factors: dict[str, tuple[str, Shape]]) -> dict[str, tuple[str, str, Shape]]:
    """Lay out diffusers' file: its name → (our name, dtype, shape). factors: canonical name → (dtype, shape).

    Raises UsageError for what is no plain LoRA, which such a file cannot say or diffusers does not read.
    """
    written = {}
    for name, (dtype, shape) in factors.items():
        module, _, factor = name.rpartition(".")
        if factor not in WRITTEN:
            raise UsageError(
                f"{module} is no plain LoRA (it has {factor}), and diffusers' LoRA files hold nothing else",
                hint='export = ["loras"] writes it as kohya and LyCORIS do; `resize` makes plain LoRA of most',
            )
        if factor in LENGTHS and shape[1] != 1:
            raise UsageError(
                f"{module} has lengths per input (DoRA), and diffusers' LoRA files hold such per output alone",
                hint='export = ["loras"] writes it as LyCORIS does',
            )
        conv = found.is_conv(module)
        if factor in LENGTHS:
            shape = (1, shape[0], 1, 1) if conv else shape[:1]
        spelled = WRITTEN_TEXT if module.startswith("text_encoder") else WRITTEN
        written[f"{module}.{spelled[factor]}"] = name, dtype, (*shape, 1, 1) if conv and len(shape) == 2 else shape
    _refuse_mixed(factors)
    return written


def _refuse_mixed(factors: Iterable[str]) -> None:
    """Refuse what PEFT takes for DoRA although it has no lengths: it is told that of a whole network at once."""
    modules = {name.removesuffix(".lora_up") for name in factors if name.endswith(".lora_up")}
    long = {name.removesuffix(".dora_scale") for name in factors if name.endswith(".dora_scale")}
    for component in {module.partition(".")[0] for module in long}:
        if short := min((m for m in modules - long if m.startswith(f"{component}.")), default=""):
            raise UsageError(
                f"{short} has no lengths (DoRA) and others of its network have, which diffusers' LoRA files cannot say",
                hint='export = ["loras"] writes it as LyCORIS does',
            )


def adapter_metadata(factors: dict[str, tuple[str, Shape]], facts: dict[str, Json]) -> str:
    """Return `lora_adapter_metadata`: for each network what PEFT has to be told, ranks and alphas above all.

    Names within a text encoder have no `text_model.`: PEFT looks at how a module's name ends.
    """
    told: dict[str, Json] = {}
    ranks = {name.removesuffix(".lora_down"): shape[0] for name, (_, shape) in factors.items() if "lora_down" in name}
    for component in sorted({module.partition(".")[0] for module in ranks}):
        own = {m: rank for m, rank in ranks.items() if m.partition(".")[0] == component}
        alphas = {module: alpha_of(facts, module, rank) for module, rank in own.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (own, alphas))
        settings: dict[str, Json] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_ending(m): r for m, r in own.items() if r != rank},
            "alpha_pattern": {_ending(m): a for m, a in alphas.items() if a != alpha},
            "target_modules": list[Json](sorted(map(_ending, own))),
        }
        if any(f"{module}.dora_scale" in factors for module in own):
            settings["use_dora"] = True
        told |= {f"{component}.{name}": value for name, value in settings.items()}
    return canonical(told)


def _ending(module: str) -> str:
    return module.partition(".")[2].removeprefix("text_model.")
