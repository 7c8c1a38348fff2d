"""A CLIP text encoder alone: a folder of transformers (`text_encoder/`), or a file as ComfyUI and OpenCLIP keep one.

Which one it is follows from its layers (12: CLIP ViT-L, 23 or 24: OpenCLIP ViT-H, 32: ViT-bigG), and families share
them: the ViT-L of 1.x (`clip_l`) is SDXL's first one too. So it is of no family, as a VAE alone is, and takes the place
of a checkpoint's own where widths agree. Its words are CLIP's; one that has learned more needs its tokenizer, and is
taken from the whole checkpoint.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families import Family, Name, families, is_count, is_word
from sdforge.families.naming import lacking, open_clip_names
from sdforge.families.stable_diffusion import TABLE, StableDiffusion, TextEncoder, shown
from sdforge.families.strangers import FAMILIES_HINT
from sdforge.formats.diffusers_folder import canonical_name, read_json, weight_files
from sdforge.formats.layout import HeaderOf, Layout
from sdforge.formats.safetensors import Header
from sdforge.formats.single_file import taken_apart
from sdforge.formats.tokenizer import USUAL, usual_words
from sdforge.identity import Json

MODEL_TYPE = "clip_text_model"  # of a folder's configuration
OPEN_TABLE, OPEN_PROJECTION = "token_embedding.weight", "text_projection"  # as OpenCLIP names them
LAYER = re.compile(r"(?:(?:text_model\.)?encoder\.layers|transformer\.resblocks)\.(\d+)\.")
NO_PICTURES = "the vision model: what reads prompts sees no pictures"
BESIDE = {  # how tensors begin that belong to the rest of a CLIP → why they are read over
    "vision_model.": NO_PICTURES,
    "visual.": NO_PICTURES,
    "visual_projection.": NO_PICTURES,
    "logit_scale": "CLIP's logit scale, which nothing is drawn with",
}


def recognises(path: Path, header: Header | None) -> bool:
    if header is None:
        config = path / "config.json"
        return config.is_file() and read_json(config).get("model_type") == MODEL_TYPE
    return any(name == OPEN_TABLE or _canonical(name) == TABLE for name in header.tensors)


def _canonical(raw: str) -> str:
    return canonical_name("text_encoder", raw)


def read(path: Path, header: Header) -> Layout:
    return _read(path, [(path, header)])


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    config = path / "config.json"
    layout = _read(path, [(file, header_of(file)) for file in weight_files(path, "text_encoder")])
    layout.files.append(config)
    (component,) = layout.shapes()
    layout.facts = _facts(path, read_json(config), component.removeprefix("text_encoder"))
    return layout


def _facts(path: Path, config: dict[str, Any], suffix: str) -> dict[str, Json]:
    """Return what a configuration states that no tensor tells; where it is silent, transformers' defaults."""
    heads, activation = config.get("num_attention_heads", 8), config.get("hidden_act", "quick_gelu")
    if not is_count(heads):
        raise UsageError(f"{path} states num_attention_heads as {shown(heads)} where a whole number belongs")
    if not is_word(activation):
        raise UsageError(f"{path} states hidden_act as {shown(activation)} where a word belongs")
    return {f"text_heads{suffix}": heads, f"text_activation{suffix}": activation}


def _read(path: Path, files: list[tuple[Path, Header]]) -> Layout:
    """Return a layout with all tensors of an encoder's files. Raises UsageError for what is unknown, and for gaps."""
    names = [name for _, header in files for name in header.tensors]
    layers = 1 + max((int(found[1]) for name in names if (found := LAYER.match(name))), default=-1)
    family, encoder = _encoder(path, layers)
    dialect = "OpenCLIP" if OPEN_TABLE in names else "transformers"
    layout, known = Layout("checkpoint", "", [], dialect=dialect), _known(encoder, dialect)
    here, unknown = set(), []
    for file, header in files:
        layout.files.append(file)
        for raw, entry in header.tensors.items():
            name = raw if raw in known else _canonical(raw)
            if reason := _read_over(raw, encoder):
                layout.passed[reason] += 1
            elif name in known and name not in here:
                here.add(name)
                place = len(layout.files) - 1
                layout.tensors += taken_apart(path, family, raw, entry, known[name], file=place)
            else:
                unknown.append(raw)
    if unknown:
        raise UsageError(f"{path} holds tensors that no text encoder here has: {', '.join(unknown[:3])}")
    _refuse_gaps(path, layout, encoder)
    _note_words(path, layout, encoder)
    return layout


def _encoders() -> list[tuple[Family, TextEncoder]]:
    """Return the text encoders of all families, those of the fewest layers first."""
    known = [(each, own) for each in families() if isinstance(each, StableDiffusion) for own in each.encoders]
    return sorted(known, key=lambda pair: pair[1].layers)


def _encoder(path: Path, layers: int) -> tuple[Family, TextEncoder]:
    """Return the smallest encoder that has so many layers, and a family that has it: narrow copies have fewer."""
    for family, encoder in _encoders():
        if 0 < layers <= encoder.layers + encoder.unused_layers:
            return family, encoder
    raise UsageError(f"{path} is a text encoder of {layers} layers, which no family here has", hint=FAMILIES_HINT)


def _known(encoder: TextEncoder, dialect: str) -> dict[str, list[Name]]:
    """Return the name in a file → what lies there: one tensor, or several that are fused."""
    known: dict[str, list[Name]] = defaultdict(list)
    open_names = list(open_clip_names(encoder.component, "", encoder.layers, projection=encoder.projected))
    for name in open_names:
        if dialect == "OpenCLIP" or name.single == OPEN_PROJECTION:  # which ComfyUI keeps among transformers' names
            known[name.single].append(name)
    for name in encoder.names() if dialect == "transformers" else ():
        known[name.canonical].append(Name(name.component, name.canonical, name.canonical))
    return known


def _read_over(raw: str, encoder: TextEncoder) -> str:
    """Say why a tensor is read over, or nothing."""
    layer = LAYER.match(raw)
    if raw.endswith("position_ids"):
        return "position ids, which are 0 … 76"
    if raw.startswith(OPEN_PROJECTION) and not encoder.projected:
        return "the text model's projection, which is never used"
    if layer and int(layer[1]) >= encoder.layers:
        return "the text model's last layer, which is never used"
    return next((why for start, why in BESIDE.items() if raw.startswith(start)), "")


def _refuse_gaps(path: Path, layout: Layout, encoder: TextEncoder) -> None:
    here = {tensor.name for tensor in layout.tensors}
    if len(here) < len(layout.tensors):
        raise UsageError(f"{path} holds the text model's projection twice")
    if gaps := lacking(encoder.names(), here):
        raise UsageError(f"{path} has a text encoder without {gaps[0]}", hint="the file is incomplete")


def _note_words(path: Path, layout: Layout, encoder: TextEncoder) -> None:
    """Note words, width and whom the encoder serves. Raises UsageError for a table of other words than CLIP's."""
    (words, width) = next(tensor.shape for tensor in layout.tensors if tensor.name == TABLE)
    if words != USUAL:
        raise UsageError(
            f"{path} is a text encoder of {words} words, of which only CLIP's {USUAL} are known here",
            hint="name the whole checkpoint: `swap` takes its text encoder with its tokenizer",
        )
    layout.tokenizer = usual_words()
    layout.notes["widths"] = {f"text{encoder.suffix}": width}
    layout.notes["serves"] = [family.title for family, own in _encoders() if own.layers == encoder.layers]
