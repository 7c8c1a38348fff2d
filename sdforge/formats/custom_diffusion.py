"""Custom Diffusion as diffusers writes it: matrices in one file, a word's rows in others beside it; read and written.

Canonical: component `custom` holds the U-Net's tensors whole (`unet.….attn2.to_k.weight`), component `embedding` the
rows of the word that the fact `token` names (text encoder → (vectors, width)). Several concepts in one have `further`
words, whose rows are called `text_encoder.1`, `text_encoder.2`, …. A file of matrices alone has no word.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdforge.errors import UsageError
from sdforge.families import Family, families
from sdforge.formats.layout import Found, HeaderOf, Layout
from sdforge.formats.safetensors import Entry, Header
from sdforge.identity import Json

NAME = "custom"
MATRICES = "pytorch_custom_diffusion_weights.safetensors"
ROWS = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}
MARK = ".processor.to_"
RAW = re.compile(r"(.+)\.processor\.to_([qkv]|out)_custom_diffusion((?:\.0)?)\.(weight|bias)")


def canonical_name(raw: str) -> str:
    """Return the U-Net's name for a tensor of diffusers' file, or nothing."""
    found = RAW.fullmatch(raw)
    return f"{found[1]}.to_{found[2]}{found[3]}.{found[4]}" if found else ""


def raw_name(name: str) -> str:
    """Return diffusers' name for the U-Net's tensor: `….to_k.weight` → `….processor.to_k_custom_diffusion.weight`."""
    layer, _, rest = name.rpartition(".to_")
    part, _, kind = rest.partition(".")
    return f"{layer}{MARK}{part}_custom_diffusion.{kind}"


def words_of(facts: dict[str, Json]) -> list[str]:
    """Return the words of an artifact, in the order of their rows."""
    further: Any = facts.get("further", [])
    return [str(facts["token"]), *further] if "token" in facts else []


def row_name(encoder: str, word: int) -> str:
    """Return what the rows of a word are called, by its place among the words."""
    return f"{encoder}.{word}" if word else encoder


def row_file(encoder: str, word: int) -> str:
    """Return the file of a word's rows: the first one's is called as diffusers looks for it."""
    return numbered(ROWS[encoder], word)


def numbered(file: str, word: int) -> str:
    """Return the name of a file for a word by its place among the words: the first one's has no number."""
    start, _, ending = file.rpartition(".")
    return f"{start}.{word}.{ending}" if word else file


def endings(word: int) -> tuple[str, str]:
    """Return what stands behind an artifact's name in the files of a word's rows: in diffusers' folder, and alone."""
    return f"/{row_file('text_encoder', word)}", numbered(".safetensors", word)


def second_row_file(path: Path) -> Path | None:
    """Return the file of the second text encoder's rows beside that of the first one's, if it is there."""
    first, second = (ROWS[encoder].partition(".")[0] for encoder in ROWS)
    if path.name.partition(".")[0] != first:
        return None
    beside = path.with_name(path.name.replace(first, second, 1))
    return beside if beside.is_file() else None


def recognises(path: Path, header: Header | None) -> bool:
    if header is None:
        return _there(path / MATRICES).is_file()
    return any(canonical_name(name) for name in header.tensors)


def _there(path: Path) -> Path:
    """Return a file, or the pickle that stands in its place."""
    return path if path.is_file() else path.with_suffix(".bin")


def read(path: Path, header: Header) -> Layout:
    layout = Layout(NAME, "", [path], dialect="diffusers")
    _read_matrices(layout, path, header)
    return layout


def read_folder(path: Path, header_of: HeaderOf) -> Layout:
    matrices = _there(path / MATRICES)
    layout = Layout(NAME, "", [matrices], dialect="diffusers")
    _read_matrices(layout, matrices, header_of(matrices))
    words: list[str] = []
    while _there(path / row_file("text_encoder", len(words))).is_file():
        found = {
            _read_rows(layout, row_name(encoder, len(words)), file, header_of)
            for encoder in ROWS
            if (file := _there(path / row_file(encoder, len(words)))).is_file()
        }
        if len(found) > 1:
            raise UsageError(f"{path} has rows of different words for its text encoders: {' and '.join(sorted(found))}")
        words += found
    others = [file for file in sorted(path.glob(f"*{matrices.suffix}")) if file != matrices]
    if not words and len(others) == 1:  # under the word's own name, as diffusers' example script writes it
        words = [_read_rows(layout, "text_encoder", others[0], header_of)]
    if words:
        layout.facts["token"] = words[0]
    if words[1:]:
        layout.facts["further"] = [*words[1:]]
    return layout


def _read_matrices(layout: Layout, path: Path, header: Header) -> None:
    names = {raw: canonical_name(raw) for raw in header.tensors}
    if odd := sorted(raw for raw, name in names.items() if not name):
        raise UsageError(f"{path} holds {odd[0]!r}, which is no part of Custom Diffusion")
    layout.family = _family(path, set(names.values())).name
    for raw, entry in header.tensors.items():
        if len(entry.shape) != (1 if raw.endswith(".bias") else 2):
            raise UsageError(f"{path} holds {raw} of shape {list(entry.shape)}, which no layer of attention has")
        layout.tensors.append(_found(NAME, f"unet.{names[raw]}", entry, 0))
    contexts = {e.shape[1] for raw, e in header.tensors.items() if names[raw].endswith("attn2.to_k.weight")}
    if len(contexts) == 1:
        layout.notes["widths"] = {"context": contexts.pop()}


def _family(path: Path, names: set[str]) -> Family:
    for each in families():
        if names <= {name.canonical for name in each.names() if name.component == "unet"}:
            return each
    raise UsageError(f"{path} changes layers that no family known here has", hint="is it for another architecture?")


def _read_rows(layout: Layout, name: str, path: Path, header_of: HeaderOf) -> str:
    """Read the rows of one word; return the word."""
    header = header_of(path)
    words = [(word, entry) for word, entry in header.tensors.items() if len(entry.shape) in (1, 2)]
    if len(words) != 1 or len(header.tensors) != 1:
        raise UsageError(f"{path} does not hold the rows of one word")
    ((word, entry),) = words
    layout.files.append(path)
    rows = replace(entry, shape=(1, *entry.shape)) if len(entry.shape) == 1 else entry
    layout.tensors.append(_found("embedding", name, rows, len(layout.files) - 1))
    return word


def _found(component: str, name: str, entry: Entry, file: int) -> Found:
    return Found(component, name, entry.dtype, entry.shape, file, entry.offset)
