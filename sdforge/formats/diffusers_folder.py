"""Checkpoints as a diffusers folder: read (any layout of the last years) and write (one that older programs read)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError, counted
from sdforge.families import Family, families
from sdforge.families.naming import VAE_ATTENTION_OLD, lacking
from sdforge.families.stable_diffusion import TABLE
from sdforge.families.strangers import FAMILIES_HINT, stranger_folder
from sdforge.formats.layout import Found, HeaderOf, Layout, shape_here
from sdforge.formats.safetensors import Header
from sdforge.formats.tokenizer import count_words, read_padding, read_tokenizer
from sdforge.identity import Json

# elsewhere it is `diffusion_pytorch_model`
WEIGHTS = {"text_encoder": "model", "text_encoder_2": "model", "image_encoder": "model"}
PICKLED = {"model": "pytorch_model"}  # what transformers' weights are called where they are pickles
LIKE = "safety_checker", "feature_extractor", "image_encoder"  # parts of a pipeline that no recipe asks for
MOST_CONFIG = 4 << 20  # bytes


def recognises(path: Path, header: Header | None) -> bool:
    return header is None and (path / "model_index.json").is_file()


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    configs = {p.parent.name: read_json(p) for p in sorted(path.glob("*/*config.json")) if "tokenizer" not in p.name}
    found = _family(path, configs)
    layout = Layout("checkpoint", found.name, [], dialect="diffusers")
    try:
        layout.facts = found.facts_of_folder(configs)
    except UsageError as error:
        raise UsageError(f"{path} {error.message}", error.hint) from None
    for component in found.networks:
        if (path / component).is_dir():
            _read_component(path, component, found, layout, header_of)
    _read_tokenizers(path, found, layout)
    layout.files += sorted(p for p in path.glob("*/*config.json") if p not in layout.files)
    for part in LIKE:
        if (path / part).is_dir() and part not in found.classes:
            layout.passed[f"{part.replace('_', ' ')}, which presets go without"] += 1
    layout.notes["widths"] = found.widths(layout.shapes())
    return layout


def _read_tokenizers(path: Path, found: Family, layout: Layout) -> None:
    """Read the vocabulary, which all text encoders of a checkpoint share, and with what each fills prompts."""
    facts: dict[str, Json] = {}
    for folder, fact in found.tokenizers().items():
        tokenizer = read_tokenizer(path / folder, layout.files)
        if not tokenizer:
            continue
        vocabulary = {"vocab": tokenizer["vocab"], "merges": tokenizer["merges"]}
        if layout.tokenizer not in (None, vocabulary) or facts.get("tokens", tokenizer["added"]) != tokenizer["added"]:
            raise UsageError(f"{path / folder} has other words than the checkpoint's first tokenizer")
        layout.tokenizer, facts["tokens"] = vocabulary, tokenizer["added"]
        if padding := read_padding(path / folder, layout.files):
            if padding not in tokenizer["vocab"]:
                raise UsageError(f"{path / folder} fills prompts with {padding!r}, which is not in its vocabulary")
            facts[fact] = padding
    layout.facts |= found.stated(facts)
    tables = {name: shapes[TABLE][0] for name, shapes in layout.shapes().items() if name in found.text_encoders}
    count_words(path, layout, tables)


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration. Raises UsageError for what is none."""
    try:
        if path.stat().st_size > MOST_CONFIG:
            raise UsageError(f"{path} is larger than a configuration can be")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no table")
    return value


def _family(path: Path, configs: dict[str, dict[str, Any]]) -> Family:
    found = next((each for each in families() if each.owns_folder(configs)), None)
    other = stranger_folder(configs)
    if other:
        raise UsageError(f"{path} is {other}, which cannot be used here", hint=FAMILIES_HINT)
    if found:
        return found
    raise UsageError(f"{path} is a diffusers folder of no family that is known here")


def weight_files(folder: Path, component: str) -> list[Path]:
    """Return the files that hold a component: all shards, or the full one rather than a variant such as `.fp16`.

    Pickles only where there is nothing else.
    """
    stem = WEIGHTS.get(component, "diffusion_pytorch_model")
    for name, ending in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        if files := _files_called(folder, name, ending):
            return files
    raise UsageError(f"{folder} holds no {stem}.safetensors")


def _files_called(folder: Path, stem: str, ending: str) -> list[Path]:
    for index in (folder / f"{stem}.{ending}.index.json", *sorted(folder.glob(f"{stem}.{ending}.index.*.json"))):
        if index.is_file():
            return _shards(index)
    plain = folder / f"{stem}.{ending}"
    if plain.is_file():
        return [plain]
    # shards of a variant are called as it is, and stand in an index of their own
    variants = [file for file in sorted(folder.glob(f"{stem}.*.{ending}")) if "-of-" not in file.name]
    if len(variants) > 1:
        raise UsageError(
            f"{folder} holds {stem} in several types: {', '.join(file.name for file in variants)}",
            hint=f"leave one there, or call the one that is meant {plain.name}",
        )
    return variants


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map", {})
    files = {str(name) for name in names.values()} if isinstance(names, dict) else set()
    if not files or any("/" in name or name.startswith(".") for name in files):
        raise UsageError(f"{index} names no files beside it")
    return [index.parent / name for name in sorted(files)]


def _read_component(path: Path, component: str, found: Family, layout: Layout, header_of: HeaderOf) -> None:
    known = {name.canonical: name for name in found.names() if name.component == component}
    here, unknown = set(), []
    for file in weight_files(path / component, component):
        layout.files.append(file)
        for raw, entry in header_of(file).tensors.items():
            name = canonical_name(component, raw)
            if raw.endswith("position_ids"):
                layout.passed["position ids, which are 0 … 76"] += 1
            elif name in known and name not in here:
                shape = shape_here(file, found, known[name], raw, entry.shape)
                place = len(layout.files) - 1
                layout.tensors.append(Found(component, name, entry.dtype, shape, place, entry.offset))
                here.add(name)
            else:
                unknown.append(raw)
    if unknown:
        raise UsageError(f"{path / component} holds tensors that {found.title} does not have: {', '.join(unknown[:3])}")
    if gaps := lacking(known.values(), here):
        raise UsageError(f"{path / component} lacks {counted(len(gaps), 'tensor')}: {', '.join(gaps[:3])}")


def canonical_name(component: str, raw: str) -> str:
    """Return how a tensor is called here that a folder of whatever age calls `raw`."""
    if component.startswith("text_encoder") and not raw.startswith(("text_model.", "text_projection.")):
        return f"text_model.{raw}"  # transformers 5.6 and later leave it out
    if component == "vae" and ".attentions.0." in raw:
        head, _, rest = raw.rpartition(".attentions.0.")
        part, _, kind = rest.rpartition(".")
        return f"{head}.attentions.0.{VAE_ATTENTION_OLD.get(part, part)}.{kind}"
    return raw


def folder_files(found: Family, configs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a folder, without weights and tokenizers: path within the folder → its content.

    Every configuration names classes and values that programs since diffusers 0.2x know; text encoders' files are
    written with `text_model.` in their names (older transformers load random weights otherwise).
    """
    there = {part: list(names) for part, names in found.classes.items() if whose(part) in configs}
    files: dict[str, dict[str, Any]] = {"model_index.json": {"_class_name": found.pipeline, **found.index, **there}}
    for part, config in configs.items():
        library, name = found.classes[part]
        if part == "feature_extractor":
            files[f"{part}/preprocessor_config.json"] = config
        elif part.endswith("scheduler"):
            files[f"{part}/scheduler_config.json"] = {"_class_name": name, **config}
        elif library == "transformers":
            kind = "clip_vision_model" if part == "image_encoder" else "clip_text_model"
            files[f"{part}/config.json"] = {"architectures": [name], "model_type": kind, **config}
        else:
            files[f"{part}/config.json"] = {"_class_name": name, **config}
    return files


def whose(part: str) -> str:
    """Return with which component a part of a folder comes: a tokenizer with its text encoder."""
    return part.replace("tokenizer", "text_encoder")


def weight_file(component: str) -> str:
    """Return the path of a component's weights within a folder."""
    return f"{component}/{WEIGHTS.get(component, 'diffusion_pytorch_model')}.safetensors"
