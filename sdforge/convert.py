"""`forge convert FILE OUT`: one file or folder in another form, by the readers of sources and the writers of presets.

The same input gives the same bytes. Nothing is overwritten, and what no other form can hold is said or refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdforge.artifact import DIFFUSERS
from sdforge.describe import made_by
from sdforge.dtypes import ITEM_SIZE, NOT_FLOAT, SAFETENSORS
from sdforge.edits.export import FORMS, run
from sdforge.errors import UsageError, counted
from sdforge.families import Family, family, family_names
from sdforge.formats.embedding import read_named
from sdforge.formats.layout import Found, HeaderOf, Layout, read_layout, refused_pickle, transposed
from sdforge.formats.safetensors import Header, read_header, read_range
from sdforge.import_step import import_file, needs_import
from sdforge.order import Given, Order, Outcome
from sdforge.report.preset import file_row
from sdforge.report.words import safe, size
from sdforge.store.files import open_regular, resources

# kind → the forms in which it can be written, in the order in which they are thought of; the words of [preset] export
KINDS = {
    "checkpoint": ("checkpoint", "diffusers"),
    "lora": tuple(form for form in FORMS if form.startswith("loras")),
    "embedding": ("embeddings", "embeddings-pt", "embeddings-diffusers"),
    "hypernetwork": ("hypernetworks", "hypernetworks-pt"),
    "custom": ("custom", "custom-embeddings"),
    "image_embedding": ("image-embeddings",),
    "aesthetic": ("aesthetics",),
}
ROLES = {"custom": "custom"}  # kind → its role in an export, where that is no plural
NAMED = "0" * 16  # what stands for an artifact's digest in the names of the files that the writers make


@dataclass(frozen=True)
class Piece:
    """A tensor that is read from a foreign file as it is written: turned and rounded where that is needed."""

    found: Found
    path: Path
    target: str  # safetensors' name of the type to which it is rounded

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def dtype(self) -> str:
        return self.target

    @property
    def shape(self) -> tuple[int, ...]:
        return self.found.shape

    def chunks(self) -> Iterator[bytes]:
        if not self.found.turned and self.target == self.found.dtype:
            yield from self._read()
            return
        data = b"".join(self._read())
        if self.found.turned:
            data = transposed(data, self.shape[0], ITEM_SIZE[self.found.dtype])
        yield data if self.target == self.found.dtype else self._rounded(data)

    def _read(self) -> Iterator[bytes]:
        fd = open_regular(self.path)
        try:
            yield from read_range(fd, self.found.offset, self.found.size)
        finally:
            os.close(fd)

    def _rounded(self, data: bytes) -> bytes:
        import torch

        from sdforge.run.tensors import DTYPES, raw, rounded

        tensor = torch.frombuffer(bytearray(data), dtype=DTYPES[self.found.dtype]).reshape(self.shape)
        return bytes(raw(rounded(self.name, tensor, DTYPES[self.target])))


def convert(wishes: argparse.Namespace) -> int:
    """Convert, and say what was written. Raises UsageError for what cannot be had in that form."""
    path, out = Path(wishes.at) / wishes.file, Path(wishes.at) / wishes.out
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} is there already", hint="nothing is overwritten: name another place, or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", hint="make it first")
    with resources(f"{out} cannot be written"), tempfile.TemporaryDirectory(prefix=".forge-", dir=out.parent) as work:
        imported: dict[Path, Path] = {}
        header_of = _headers(wishes.pickle, Path(work), imported)
        named = wishes.embedding
        layout = read_named(path, header_of(path), named) if named else read_layout(path, header_of)
        form = _form(layout, wishes.to, out)
        of = _family(layout, wishes.family)
        pieces = [Piece(t, _home(layout, t, imported), _target(t, wishes.dtype)) for t in layout.tensors]
        notes = list(_left_behind(layout, of, form))
        written = Path(work) / "written"
        written.mkdir()
        outcome = run(_order(path, layout, of, form, pieces, written), lambda **_: None)
        places = _places(outcome, out)
        for place in places.values():
            if os.path.lexists(place):
                raise UsageError(f"{place} is there already", hint="nothing is overwritten")
        for file, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            (written / file).replace(place)
    _say(form, of, {str(places[file]): row for file, row in outcome.files.items()}, notes, as_json=wishes.json)
    return 0


def _headers(pickle: str, work: Path, imported: dict[Path, Path]) -> HeaderOf:
    """Return how headers are read; note which files were imported, and as what."""

    def header_of(file: Path) -> Header:
        what = needs_import(file)
        if what is None:
            return read_header(file)
        if what == "pickle" and pickle != "allow":
            error = refused_pickle(file)
            raise UsageError(error.message, "`--pickle allow` converts it in a limited process that runs nothing of it")
        imported[file] = work / f"imported-{len(imported)}"
        import_file(file, imported[file], what)
        return read_header(imported[file])

    return header_of


def _home(layout: Layout, tensor: Found, imported: dict[Path, Path]) -> Path:
    file = layout.files[tensor.file]
    return imported.get(file, file)


def _form(layout: Layout, wished: str, out: Path) -> str:
    """Return the form that is wanted, or that the name of the result tells. Raises UsageError where they do not fit."""
    possible, kind = KINDS.get(layout.kind, ()), layout.kind.replace("_", " ")
    if not possible:
        raise UsageError(f"{layout.files[0]} is a {kind}, which has one form only")
    if wished and wished not in possible:
        raise UsageError(f"there is no form {wished!r} of a {kind}", hint=f"there are {', '.join(possible)}")
    fitting = [form for form in possible if _ending_of(form) == out.suffix and form == (wished or form)]
    if not fitting:
        endings = ", ".join(f"{form}: OUT{_ending_of(form) or ', a folder'}" for form in possible)
        raise UsageError(f"{out.name} is no name for {wished or f'any form of a {kind}'}", hint=endings)
    return fitting[0]


def _ending_of(form: str) -> str:
    """Return how the file of a form ends; nothing where it is a folder."""
    return "" if form in ("diffusers", "custom") else ".pt" if form.endswith("-pt") else ".safetensors"


def _family(layout: Layout, wished: str) -> Family:
    """Return the family that the file is of, or that is said to be. Raises UsageError where neither tells."""
    if wished and wished not in family_names():
        raise UsageError(f"there is no family {wished!r}", hint=f"there are {', '.join(family_names())}")
    if wished and layout.family and not family(wished).takes(layout.kind, layout.family):
        raise UsageError(f"{layout.files[0]} is for {family(layout.family).title}, not for {family(wished).title}")
    if not wished and not layout.family:
        raise UsageError(
            f"{layout.files[0]} does not tell for which family it is", hint=f"--family {' | '.join(family_names())}"
        )
    return family(wished or layout.family)


def _target(tensor: Found, dtype: str) -> str:
    """Return the type in which a tensor is written; integers stay what they are."""
    return tensor.dtype if not dtype or tensor.dtype.startswith(NOT_FLOAT) else SAFETENSORS[dtype]


def _left_behind(layout: Layout, of: Family, form: str) -> Iterator[str]:
    """Say what of the file the new one does not have. Raises UsageError where nothing could open it."""
    for reason, count in layout.passed.items():
        yield f"{counted(count, 'tensor')} read over: {reason}"
    if "unsaid" in layout.notes:
        yield str(layout.notes["unsaid"])
    tokens: Any = layout.facts.get("tokens", [])
    if form == "checkpoint" and tokens:
        words = ", ".join(word for word, _ in tokens)
        yield f"without {words}: a single file has no room for more words than CLIP's"
    if form == "custom-embeddings" and "token" not in layout.facts:
        raise UsageError(f"{layout.files[0]} holds matrices and no word", hint="a folder has its words beside them")
    if form == "diffusers":
        lost = [name for name in of.networks if name not in layout.shapes() and name not in of.spare]
        if lost:
            raise UsageError(f"{layout.files[0]} has no {' and no '.join(lost)}, without which no folder can be loaded")
        if of.tokenizers() and not layout.tokenizer:
            raise UsageError(f"{layout.files[0]} has other words than CLIP's and does not say which")


def _order(path: Path, layout: Layout, of: Family, form: str, pieces: list[Piece], written: Path) -> Order:
    """Return the order to write one artifact in one form, as that of a preset does."""
    notes = layout.notes
    settings = {
        "title": str(notes.get("title", "")),
        "description": "",
        "licence": str(notes.get("licence", "")),
        "trigger": [notes["trigger"]] if notes.get("trigger") else [],
        "negative_prompt": "",
        "clip_skip": 0,
        "forms": [form],
    }
    components: dict[str, Any] = {}
    for piece in pieces:
        components.setdefault(piece.found.component, []).append(piece)
    use = {"carried": _carried(path)} if layout.kind == "lora" else {}
    given = Given(layout.kind, NAMED, layout.facts, components, vocabulary=layout.tokenizer or {}, use=use)
    inputs = {"checkpoint": [given if layout.kind == "checkpoint" else Given("checkpoint")]}
    if layout.kind != "checkpoint":
        inputs[ROLES.get(layout.kind, f"{layout.kind}s")] = [given]
    return Order("", "", "export", "edits", of.name, settings, str(written), inputs, closure=_made(path, pieces))


def _carried(path: Path) -> dict[str, str]:
    """Return what a LoRA's file says of its training, as kohya's scripts write it (`ss_*`)."""
    if path.is_dir() or needs_import(path):
        return {}
    return {key: value for key, value in read_header(path).metadata.items() if key.startswith("ss_")}


def _made(path: Path, pieces: list[Piece]) -> list[Any]:
    """Return how the file was made, where it says so and its numbers stay what they are."""
    if path.is_dir() or needs_import(path) or any(piece.target != piece.found.dtype for piece in pieces):
        return []
    return made_by(read_header(path).metadata)


def _places(outcome: Outcome, out: Path) -> dict[str, Path]:
    """Return where each written file goes: a single one is OUT, further ones are called after it."""
    folders = {file.split("/")[0] for file in outcome.files if file.count("/") > 1 or file.startswith("diffusers/")}
    if folders:
        depth = 1 if folders == {"diffusers"} else 2
        return {file: out.joinpath(*file.split("/")[depth:]) for file in outcome.files}
    if len(outcome.files) == 1:
        return {next(iter(outcome.files)): out}
    return {file: out.with_name(out.stem + _ending(file)) for file in outcome.files}


def _ending(file: str) -> str:
    """Return what stands behind an artifact's name in a file's, as in `-neg.safetensors`."""
    return file.rpartition("/")[2][len(NAMED) :].removeprefix(DIFFUSERS)


def _say(form: str, of: Family, files: dict[str, list[Any]], notes: list[str], *, as_json: bool) -> None:
    if as_json:
        rows = [file_row(name, row) for name, row in files.items()]
        print(json.dumps({"v": 1, "event": "convert", "form": form, "family": of.name, "files": rows, "notes": notes}))
        return
    for name, row in files.items():
        print(safe(f"  {name}  {size(row[1])}  sha256 {row[0]}", sys.stdout))
    for note in notes:
        print(safe(f"  note: {note}", sys.stdout))
