"""A CLIP as a folder of transformers (`CLIPModel`): the vision model and both projections; its text model is read over.

Components: `image_encoder` (as the families call it) and `text_projection` (`weight`: (D, width of the text)). Facts:
how pictures are prepared and what shapes do not tell; those of OpenAI's ViT-L/14 are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError, counted
from sdforge.families import Name, families, is_count, is_word
from sdforge.families.naming import clip_vision_names, lacking
from sdforge.families.stable_diffusion import IMAGE_MEAN, IMAGE_STD, shown
from sdforge.formats.diffusers_folder import read_json, weight_files
from sdforge.formats.layout import Found, HeaderOf, Layout, shape_here
from sdforge.formats.safetensors import Header
from sdforge.identity import Json

NAME = "clip"
MOST_LAYERS = 64
NEUTRAL: dict[str, Any] = {
    "size": 224,  # pixels, the edge of the square that is looked at
    "mean": list(IMAGE_MEAN),
    "std": list(IMAGE_STD),
    "heads": 16,
    "activation": "quick_gelu",
    "text_layers": 12,
}
AGAIN = "get the folder again from where it came from"
PROJECTION = "text_projection.weight"


def fact(facts: dict[str, Json], name: str) -> Any:
    """Return a fact of a CLIP, stated or neutral."""
    return facts.get(name, NEUTRAL[name])


def recognises(path: Path, header: Header | None) -> bool:
    config = path / "config.json"
    return header is None and config.is_file() and read_json(config).get("model_type") == "clip"


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    layout = Layout(NAME, "", [path / "config.json"], dialect="transformers")
    layout.facts = _facts(path, layout)
    known = {name.canonical: name for name in clip_vision_names("image_encoder", "", MOST_LAYERS)}
    known[PROJECTION] = Name("text_projection", PROJECTION, PROJECTION)
    of, here = families()[0], set[str]()  # the axes of a CLIP's tensors are those of every family
    for file in weight_files(path, "image_encoder"):
        layout.files.append(file)
        for raw, entry in header_of(file).tensors.items():
            if raw.startswith("text_model."):
                layout.passed["the text model: a checkpoint's own is used"] += 1
            elif raw == "logit_scale" or raw.endswith("position_ids"):
                layout.passed["the logit scale and position ids, of which no angle depends"] += 1
            elif raw in known:
                name, place = known[raw], len(layout.files) - 1
                shape = shape_here(path, of, name, raw, entry.shape)
                own = raw.removeprefix("text_projection.")
                layout.tensors.append(Found(name.component, own, entry.dtype, shape, place, entry.offset))
                here.add(raw)
            else:
                raise UsageError(f"{path} holds {raw}, which a CLIP does not have")
    if gaps := lacking(known.values(), here):
        raise UsageError(f"{path} lacks {counted(len(gaps), 'tensor')} of a CLIP: {', '.join(gaps[:3])}")
    layout.notes["widths"] = {"text": layout.shapes()["text_projection"]["weight"][1]}
    return layout


def _facts(path: Path, layout: Layout) -> dict[str, Json]:
    """Return the facts that configurations state; where one is silent, transformers' defaults."""
    config, prepared = read_json(path / "config.json"), {}
    if (path / "preprocessor_config.json").is_file():
        layout.files.append(path / "preprocessor_config.json")
        prepared = read_json(layout.files[-1])
    vision, text = (config.get(part) or {} for part in ("vision_config", "text_config"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UsageError(f"{path} states no sound vision_config and text_config", hint=AGAIN)
    facts: dict[str, Any] = {
        "size": vision.get("image_size", 224),
        "mean": prepared.get("image_mean", NEUTRAL["mean"]),
        "std": prepared.get("image_std", NEUTRAL["std"]),
        "heads": vision.get("num_attention_heads", 12),
        "activation": vision.get("hidden_act", "quick_gelu"),
        "text_layers": text.get("num_hidden_layers", 12),
    }
    for name, (called, can_be, what) in RIGHT.items():
        if not can_be(facts[name]):
            raise UsageError(f"{path} states {called} as {shown(facts[name])} where {what}", hint=AGAIN)
    return {name: value for name, value in facts.items() if value != NEUTRAL[name]}


def _is_mean(values: Any) -> bool:
    three = isinstance(values, list) and len(values) == 3
    return three and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


def _is_std(values: Any) -> bool:
    return _is_mean(values) and all(values)


# fact → how a configuration calls it, whether a value can be one, and what is said where it cannot
RIGHT: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "size": ("image_size", is_count, "a whole number belongs"),
    "heads": ("num_attention_heads", is_count, "a whole number belongs"),
    "text_layers": ("num_hidden_layers", is_count, "a whole number belongs"),
    "activation": ("hidden_act", is_word, "a word belongs"),
    "mean": ("image_mean", _is_mean, "three numbers from 0 to 1 belong"),
    "std": ("image_std", _is_std, "three numbers up to 1 belong, none of them 0"),
}
