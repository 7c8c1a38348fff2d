"""Checkpoints in one safetensors file, in the layout of the CompVis/Stability code (LDM): read and write."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import UsageError, counted
from sdforge.families import Family, Name, family, family_of
from sdforge.families.naming import lacking
from sdforge.families.stable_diffusion import EMA, TABLE, UNET
from sdforge.families.strangers import FAMILIES_HINT, stranger
from sdforge.formats.layout import Found, Layout, shape_here
from sdforge.formats.safetensors import Entry, Header, read_number, stated_json
from sdforge.formats.tokenizer import USUAL, count_words, is_vocabulary, usual_words
from sdforge.identity import Json, canonical

# ComfyUI and its kin tell v-prediction by the presence of these empty tensors
MARKERS: dict[str, tuple[str, Json]] = {"v_pred": ("prediction", "v_prediction"), "ztsnr": ("zero_terminal_snr", True)}
# the table of the noise schedule: where it ends in (nearly) nothing but noise, the last step is without any signal
TABLE_OF_NOISE, NOTHING = "alphas_cumprod", 1e-6
FACTS = "sdforge.facts"  # metadata: facts that the tensors do not show
SCALES = (".scale_weight", ".weight_scale")  # how ComfyUI calls the scale of fp8 weights, before and now
FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"  # of a U-Net (a ControlNet has no last layer)
TOKENIZER = "sdforge.tokenizer"  # metadata: the vocabulary, where it is not the family's usual one


def is_scaled(header: Header) -> bool:
    """Say whether a file's weights are fp8 with scales beside them: `import_step` multiplies them."""
    return any(name.endswith(SCALES) for name in header.tensors)


def recognises(path: Path, header: Header | None) -> bool:  # noqa: ARG001 -- one signature for all readers
    if header is None:
        return False
    shapes = {name: entry.shape for name, entry in _whole_names(header).tensors.items()}
    return bool(family_of(shapes) or stranger(shapes))


def _whole_names(header: Header) -> Header:
    """Return a header with the names of a U-Net alone, as ComfyUI keeps them, begun as those of a checkpoint are."""
    if FIRST not in header.tensors or LAST not in header.tensors:
        return header
    return replace(header, tensors={UNET + name: entry for name, entry in header.tensors.items()})


def read(path: Path, header: Header) -> Layout:
    header = _whole_names(header)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    if other := stranger(shapes):
        raise UsageError(f"{path} is {other}, which cannot be used here", hint=FAMILIES_HINT)
    if is_scaled(header):
        raise UsageError(
            f"{path} keeps the scales of its fp8 weights apart", hint="a source or `forge convert` joins them"
        )
    found = family_of(shapes)
    assert found is not None
    dialect = "SGM" if any(name.startswith("conditioner.") for name in header.tensors) else "LDM"
    layout = Layout("checkpoint", found.name, [path], dialect=dialect)
    known = _by_single(found)
    here, unknown = set(), []
    for raw, entry in header.tensors.items():
        name = found.alias(raw)
        reason = "" if name in known else found.ignored(raw) or found.ignored(name)
        if reason:
            layout.passed[reason] += 1
        elif raw in MARKERS:
            fact, value = MARKERS[raw]
            layout.facts[fact] = value
        elif name in known and name not in here:
            here.add(name)
            layout.tensors += taken_apart(path, found, raw, entry, known[name])
        else:
            unknown.append(raw)
    if unknown:
        some = ", ".join(unknown[:3])
        raise UsageError(
            f"{path} holds {counted(len(unknown), 'tensor')} that {found.title} does not have: {some}",
            hint="is it another family, or a checkpoint with something baked in beside it?",
        )
    _refuse_gaps(path, found, layout)
    if _ends_in_noise(header):
        layout.facts["zero_terminal_snr"] = True
    layout.facts = found.facts_of_shapes(layout.shapes()) | layout.facts
    _state(path, header.metadata, layout)
    note_unsaid(layout, found, header.metadata)
    layout.facts = found.stated(layout.facts)
    shapes_of = layout.shapes()
    layout.notes["widths"] = found.widths(shapes_of)
    tables = {encoder: shapes_of[encoder][TABLE][0] for encoder in found.text_encoders if encoder in shapes_of}
    if layout.tokenizer is None and tables and set(tables.values()) == {USUAL}:
        layout.tokenizer = usual_words()
    count_words(path, layout, tables)
    return layout


def _ends_in_noise(header: Header) -> bool:
    """Say whether a file's own noise schedule has zero terminal SNR (Lin et al. 2023, arXiv 2305.08891, §3.1)."""
    entry = header.tensors.get(TABLE_OF_NOISE)
    if entry is None or not entry.size:
        return False
    last = read_number(header, entry.dtype, entry.offset + entry.size - ITEM_SIZE[entry.dtype])
    return last is not None and abs(last) < NOTHING


def _by_single(family: Family) -> dict[str, list[Name]]:
    """Return single-file name → the tensors it holds: one, or several that are fused."""
    found: dict[str, list[Name]] = defaultdict(list)
    for name in family.names():
        found[name.single].append(name)
    return found


def taken_apart(
    path: Path, family: Family, raw: str, entry: Entry, names: list[Name], *, file: int = 0
) -> Iterator[Found]:
    """Yield what lies in a file's tensor `raw`: one tensor, or several that are fused along the first axis.

    file: the number of the file among those of the layout. Raises UsageError for a shape that it cannot have.
    """
    for name in names:
        (part, count), shape = name.share, shape_here(path, family, name, raw, entry.shape)
        if shape[0] % count:
            raise UsageError(f"{path} holds {raw} of shape {list(entry.shape)}, which cannot be taken apart")
        if name.turned:
            shape = shape[::-1]
        if count > 1:
            shape = (shape[0] // count, *shape[1:])
        offset = entry.offset + part * prod(shape) * ITEM_SIZE[entry.dtype]
        yield Found(name.component, name.canonical, entry.dtype, shape, file, offset, name.turned)


def _refuse_gaps(path: Path, family: Family, layout: Layout) -> None:
    """A component is there whole or not at all."""
    for component, here in layout.shapes().items():
        own = (name for name in family.names() if name.component == component)
        if gaps := lacking(own, here):
            raise UsageError(f"{path} has a {component} without {gaps[0]}", hint="the file is incomplete")


def _state(path: Path, metadata: dict[str, str], layout: Layout) -> None:
    v_base = metadata.get("modelspec.architecture", "").endswith("-v")
    if v_base or metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        layout.facts["prediction"] = "v_prediction"
    layout.facts |= stated_facts(path, metadata, family(layout.family))
    if TOKENIZER in metadata:
        layout.tokenizer = stated_json(metadata, TOKENIZER)
        if not is_vocabulary(layout.tokenizer):
            raise UsageError(f"{path} has metadata {TOKENIZER} that is no vocabulary")
    for key, note in (("modelspec.title", "title"), ("modelspec.license", "licence")):
        if key in metadata:
            layout.notes[note] = metadata[key]


def stated_facts(path: Path, metadata: dict[str, str], of: Family) -> dict[str, Json]:
    """Return the facts that a file of ours states. Raises UsageError for what is none that is known here."""
    facts = stated_json(metadata, FACTS) if FACTS in metadata else {}
    if not isinstance(facts, dict):
        raise UsageError(f"{path} has metadata {FACTS} that is no table in JSON")
    if odd := of.odd_fact(facts):
        raise UsageError(f"{path} states {odd} = {json.dumps(facts[odd])[:60]}, which is not known here")
    return facts


def note_unsaid(layout: Layout, family: Family, metadata: dict[str, str]) -> None:
    """Note what is assumed of a file that does not say it."""
    said = {"prediction"} if metadata.get("modelspec.prediction_type") else set()
    if unsaid := [f for f in family.unsaid if f not in layout.facts and f not in said and FACTS not in metadata]:
        stated = ", ".join(f"{fact} is taken to be {family.neutral[fact]}" for fact in unsaid)
        layout.notes["unsaid"] = f"{stated}, since nothing in the file says otherwise"


def with_ema(path: Path, header: Header) -> Header:
    """Return a file's header with the U-Net and its averaged copy (EMA) in each other's place.

    LDM names the copies without dots: `model_ema.diffusion_modelinput_blocks00weight`. Raises UsageError for a file
    that has none, or not of all tensors.
    """
    copies = {
        name: EMA + name.removeprefix("model.").replace(".", "") for name in header.tensors if name.startswith(UNET)
    }
    there = {name: copy for name, copy in copies.items() if copy in header.tensors}
    if not there:
        raise UsageError(f"{path} holds no averaged copy (EMA) of a U-Net", hint="leave `use_ema` out")
    for name, copy in copies.items():
        if name not in there or header.tensors[copy].shape != header.tensors[name].shape:
            raise UsageError(
                f"{path} holds an averaged copy (EMA) of its U-Net without {name}", hint="it is incomplete"
            )
    exchanged = {a: header.tensors[b] for name, copy in there.items() for a, b in ((name, copy), (copy, name))}
    return replace(header, tensors=header.tensors | exchanged)


class Piece(NamedTuple):
    """One tensor of a single file: what it is made of, as (component, canonical name), in order.

    turned: whether it is written as the transpose.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, str], ...]
    turned: bool


def single_pieces(family: Family, tensors: dict[tuple[str, str], tuple[str, tuple[int, ...]]]) -> dict[str, Piece]:
    """Return single-file name → what it is made of, for the tensors in `tensors` ((component, name) → dtype, shape).

    Raises UsageError for parts of one tensor that are of several types.
    """
    pieces = {}
    for single, names in _by_single(family).items():
        here = [(n.component, n.canonical) for n in names if (n.component, n.canonical) in tensors]
        if not here:
            continue
        dtype, shape = tensors[here[0]]
        if any(tensors[key] != (dtype, shape) for key in here) or len(here) < len(names):
            raise UsageError(
                f"a single file has one tensor for {', '.join(name for _, name in here)}, which "
                "differ in type or shape",
                hint="give the checkpoint one type with `dtype`",
            )
        whole = (shape[0] * len(names), *shape[1:]) if len(names) > 1 else shape
        whole = (*whole, 1, 1) if names[0].conv and len(whole) == 2 else whole
        turned = names[0].turned
        pieces[single] = Piece(dtype, whole[::-1] if turned else whole, tuple(here), turned)
    return pieces


def stated_metadata(facts: dict[str, Json], tokenizer: dict[str, Any] | None) -> dict[str, str]:
    """Return the metadata by which `read` finds facts and vocabulary again."""
    found = {}
    if facts:
        found[FACTS] = canonical(facts)
    if tokenizer:
        found[TOKENIZER] = canonical(tokenizer)
    return found
