"""The files that people load: written from what the store has, the same bytes on every machine. It runs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, final

from pydantic import Field

from sdforge.artifact import DIFFUSERS, SIDECARS, Artifact
from sdforge.dtypes import ITEM_SIZE
from sdforge.edits.insert import ROWS
from sdforge.errors import UsageError
from sdforge.file_layout import ALIGN, FileLayout, Laid
from sdforge.formats.custom_diffusion import MATRICES, numbered, raw_name, row_file, row_name
from sdforge.formats.custom_diffusion import words_of as custom_words
from sdforge.formats.diffusers_folder import folder_files, weight_file, whose
from sdforge.formats.diffusers_lora import METADATA, adapter_metadata, diffusers_tensors
from sdforge.formats.embedding import (
    ENCODERS,
    GUIDANCE,
    KEY,
    OPPOSITE,
    POLARITY,
    TOKEN,
    negative_word,
    words_of,
)
from sdforge.formats.hypernetwork import pickled_form
from sdforge.formats.kohya import Body, KohyaFile, hashes, kohya_metadata, kohya_tensors
from sdforge.formats.layout import transposed
from sdforge.formats.own import MANIFEST, own_metadata, own_names
from sdforge.formats.pickled import Pickled, write_pickle
from sdforge.formats.safetensors import Written, header_bytes, write_file
from sdforge.formats.single_file import MARKERS, single_pieces, stated_metadata
from sdforge.formats.tokenizer import USUAL, stands_in, tokenizer_files, usual_words
from sdforge.identity import canonical
from sdforge.order import Given, Order, Outcome
from sdforge.ref import Ref
from sdforge.settings import Reference, Table, Takes
from sdforge.store.files import sha256_of, share

VERSION = 7
MAKES = "files"
PINNED = False
INLINE = True  # it only moves bytes, so it runs in the builder's process

STABILITY = "https://github.com/Stability-AI/generative-models"  # whose names a file has; else diffusers'
THEIRS = tuple(f"modelspec.{name}" for name in ("title", "description", "license", "encoder_layer"))
PLACEHOLDER = 265  # the token `*`, which A1111 names and never uses

Form = Literal[
    "checkpoint",
    "diffusers",
    "loras",
    "loras-diffusers",
    "embeddings",
    "embeddings-diffusers",
    "embeddings-pt",
    "custom",
    "custom-embeddings",
    "hypernetworks",
    "hypernetworks-pt",
    "image-embeddings",
    "aesthetics",
]


@final
class Whole(Table):
    """An artifact that becomes a file as it is."""


@final
class Export(Table):
    """Write a preset: `checkpoint` (one file), `diffusers` (a folder), and artifacts behind it as files of their own.

    `loras` are kohya's files, `loras-diffusers` diffusers' own; `embeddings` those that every program reads,
    `embeddings-diffusers` name the word by the tensor; `custom` are diffusers' Custom Diffusion weights,
    `custom-embeddings` their words alone, as `embeddings` are; what ends in `-pt` is a pickle, as A1111 writes it.
    Sidecars are always written. Title, description, licence and triggers reach the files' metadata and nothing else.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint")]
    loras: Annotated[dict[Reference, Whole], Takes("lora")] = Field({})
    embeddings: Annotated[dict[Reference, Whole], Takes("embedding")] = Field({})
    custom: Annotated[dict[Reference, Whole], Takes("custom")] = Field({})
    hypernetworks: Annotated[dict[Reference, Whole], Takes("hypernetwork")] = Field({})
    image_embeddings: Annotated[dict[Reference, Whole], Takes("image_embedding")] = Field({})
    aesthetics: Annotated[dict[Reference, Whole], Takes("aesthetic")] = Field({})
    sidecars: Annotated[dict[Reference, Whole], Takes(SIDECARS[0], also=SIDECARS[1:])] = Field({})
    forms: list[Form] = Field([])
    title: str = ""
    description: str = ""
    licence: str = ""
    trigger: list[str] = Field([])
    negative_prompt: str = ""
    clip_skip: int = 0


TABLE = Export


def advise(table: Export, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """A word for the negative prompt does nothing until it stands there."""
    found = []
    for name, embedding in zip(table.embeddings, inputs.get("embeddings", []), strict=True):
        word = negative_word(embedding.facts) if embedding else ""
        if word and not stands_in(word, table.negative_prompt):
            sentence = f"`{name}` makes the word {word!r} for negative prompts, and `negative_prompt` does not name it"
            hint = f'[preset] negative_prompt = "{", ".join(filter(None, [table.negative_prompt, word]))}"'
            found.append((f"embeddings.{name}", "negative", sentence, hint, True))
    return found


def run(order: Order, report: Callable[..., None]) -> Outcome:
    """Write the files into the work folder; they are named apart from people's names, which are no part of them."""
    writing = _Writing(order)
    forms = {form: FORMS[form] for form in order.settings["forms"]} | {"sidecars": _Writing.sidecars}
    for done, (form, write) in enumerate(forms.items()):
        report(step=done, steps=len(forms), note=form)
        write(writing)
    return Outcome(files=writing.files)


def single_layout(order: Order) -> FileLayout:
    """Return what an export's single file will hold. The checkpoint's tensors need not lie anywhere yet."""
    return _Writing(order).layout()


class _Writing:
    """One export: the same bytes for the same order."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.family = order.architecture
        self.checkpoint = order.the("checkpoint")
        self.settings = order.settings
        self.files: dict[str, list[Any]] = {}
        self.manifest = canonical({"v": 1, "actions": order.closure})  # type: ignore[dict-item]

    def _write(
        self, name: str, shapes: Any, content: Callable[[str], Iterable[bytes]], metadata: dict[str, str]
    ) -> Written:
        path = Path(self.order.work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = write_file(path, shapes, content, metadata, ALIGN)
        self.files[name] = [written.sha256, written.size, written.data_sha256]
        return written

    def _share(self, name: str, found: Laid) -> None:
        """Take a file that was written while its tensors were computed."""
        share(Path(found.path), Path(self.order.work) / name)
        self.files[name] = [found.sha256, Path(found.path).stat().st_size, found.data_sha256]

    def _text(self, name: str, text: str) -> None:
        path = Path(self.order.work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        self.files[name] = [hashlib.sha256(text.encode()).hexdigest(), len(text.encode())]

    def _pickle(self, name: str, value: Any) -> None:
        path = Path(self.order.work) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pickle(path, value)
        self.files[name] = [sha256_of(path), path.stat().st_size]

    def _spec(self, architecture: str, of: Given | None = None) -> dict[str, str]:
        """The ModelSpec 1.0.1 that other programs show; no date, so that equal models are equal files.

        of: an artifact behind the preset. Title and licence of what somebody else made are not the preset's.
        """
        prediction = self.family.fact(self.checkpoint.facts, "prediction")
        resolution = self.family.fact(self.checkpoint.facts, "resolution")
        stated = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture,
            "modelspec.implementation": STABILITY,
            "modelspec.title": self.settings["title"],
            "modelspec.resolution": f"{resolution}x{resolution}",
            "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
            "modelspec.description": self.settings["description"],
            "modelspec.license": self.settings["licence"],
            "modelspec.trigger_phrase": ", ".join(self._words_for(of)),
            "modelspec.encoder_layer": str(self.settings["clip_skip"] + 1) if self.settings["clip_skip"] else "",
        }
        of_preset = THEIRS if of is not None and of.use.get("elsewhere") else ()
        return {key: value for key, value in stated.items() if value and key not in of_preset}

    def _words_for(self, of: Given | None) -> list[str]:
        """Return the words that call an artifact: its own, or else those of the preset that no other artifact has."""
        preset: list[str] = self.settings["trigger"]
        if of is None:
            return preset
        own = _own_words(of)
        if own or of.use.get("elsewhere"):
            return own
        others = {word for given in chain.from_iterable(self.order.inputs.values()) for word in _own_words(given)}
        return [word for word in preset if word not in others]

    def single_file(self) -> None:
        refs = {
            f"{component}.{ref.name}": ref for component, table in self.checkpoint.components.items() for ref in table
        }
        layout = self.layout()
        if self.order.written:
            found = self.order.written.get(layout.key({part: ref.xxh3 for part, ref in refs.items()}))
            if found:
                self._share("checkpoint.safetensors", found)
                return

        def content(single: str) -> Iterable[bytes]:
            dtype, shape = layout.shapes[single]
            chunks = chain.from_iterable(refs[part].chunks() for part in layout.parts.get(single, []))
            if layout.odd.get(single):
                return [transposed(b"".join(chunks), shape[0], ITEM_SIZE[dtype])]
            return _first(chunks, layout.size(single))

        self._write("checkpoint.safetensors", layout.shapes, content, layout.metadata)

    def layout(self) -> FileLayout:
        """Return what the single file holds; of the checkpoint's tensors it needs types and shapes alone."""
        facts = {name: value for name, value in self.checkpoint.facts.items() if name != "tokens"}
        refs = {(component, ref.name): ref for component, table in self.checkpoint.components.items() for ref in table}
        pieces = single_pieces(self.family, {key: (ref.dtype, ref.shape) for key, ref in refs.items()})
        words = len(self.checkpoint.vocabulary.get("vocab", {}))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        odd = {single: True for single, piece in pieces.items() if piece.turned}
        for single, piece in pieces.items():
            shape = piece.shape
            if piece.parts[0][1] == ROWS and words < shape[0] and words:
                shape = (words, *shape[1:])  # a single file has no room for appended words
                odd[single] = False
            shapes[single] = (piece.dtype, shape)
        for marker, (fact, value) in MARKERS.items():
            if facts.get(fact) == value:
                shapes[marker] = ("F32", (0,))
        known = words == USUAL and self.checkpoint.vocabulary == usual_words()
        vocabulary = None if known else self.checkpoint.vocabulary
        metadata = {
            **self._spec(self.family.spec(facts)),
            **stated_metadata(facts, vocabulary),
            MANIFEST: self.manifest,
        }
        parts = {single: [f"{component}.{name}" for component, name in piece.parts] for single, piece in pieces.items()}
        return FileLayout(shapes, metadata, parts, odd, {})

    def diffusers(self) -> None:
        facts, tokens = self.checkpoint.facts, self.checkpoint.facts.get("tokens", [])
        shapes = self.checkpoint.shapes()
        configs = self.family.configs(facts, shapes)
        for name, value in folder_files(self.family, configs).items():
            self._text(f"diffusers/{name}", json.dumps(value, indent=2, sort_keys=True) + "\n")
        for folder, padding in self.family.tokenizers().items():
            if whose(folder) not in configs:
                continue
            if not self.checkpoint.vocabulary:
                hint = "take the words of a tokenizer's folder, as a source: [swap.NAME] with `tokenizer = …`"
                raise UsageError("a diffusers folder needs a tokenizer, and the checkpoint has none", hint=hint)
            own = tokenizer_files(self.checkpoint.vocabulary, tokens, self.family.fact(facts, padding))
            for name, text in own.items():
                self._text(f"diffusers/{folder}/{name}", text)
        for component, refs in self.checkpoint.components.items():
            if refs:
                named = {ref.name: ref for ref in refs}
                self._write(
                    f"diffusers/{weight_file(component)}",
                    {name: (ref.dtype, ref.shape) for name, ref in named.items()},
                    _from(named),
                    {"format": "pt"},
                )

    def _kind_spec(self, kind: str, of: Given | None = None) -> dict[str, str]:
        """Return the ModelSpec of an artifact of a kind behind the preset."""
        return self._spec(f"{self.family.spec(self.checkpoint.facts)}/{kind}", of)

    def loras(self) -> None:
        facts = self.checkpoint.facts
        weights = {
            f"{part}.{name}": shape for part, own in self.checkpoint.shapes().items() for name, shape in own.items()
        }
        for lora in self.order.inputs.get("loras", []):
            refs = {ref.name: ref for ref in lora.components["lora"]}
            factors = {name: (ref.dtype, ref.shape) for name, ref in refs.items()}
            file = kohya_tensors(self.family, factors, lora.facts, weights)
            shapes = file.shapes

            def content(name: str, file: KohyaFile = file, refs: dict[str, Ref] = refs) -> Iterable[bytes]:
                return [file.constant[name]] if name in file.constant else refs[file.origin[name]].chunks()

            _, order = header_bytes(shapes, {})
            body = Body()
            for chunk in chain.from_iterable(map(content, order)):
                body.update(chunk)
            metadata = {
                **self._kind_spec("lora", lora),
                "modelspec.implementation": STABILITY if self.family.sgm_names else "diffusers",
                **kohya_metadata(self.family.base_version(facts), lora.use.get("settings", {}), lora.facts, factors),
                **lora.use.get("carried", {}),
            }
            metadata |= hashes(shapes, metadata, body)
            metadata["modelspec.hash_sha256"] = f"0x{metadata['sshs_model_hash']}"
            self._write(f"loras/{lora.identity[:16]}.safetensors", shapes, content, metadata)

    def loras_diffusers(self) -> None:
        for lora in self.order.inputs.get("loras", []):
            refs = {ref.name: ref for ref in lora.components["lora"]}
            factors = {name: (ref.dtype, ref.shape) for name, ref in refs.items()}
            written = diffusers_tensors(self.family, factors)
            metadata = {
                **self._kind_spec("lora", lora),
                "modelspec.implementation": "diffusers",
                "format": "pt",
                METADATA: adapter_metadata(factors, lora.facts),
                **lora.use.get("carried", {}),
            }
            self._write(
                f"loras/{lora.identity[:16]}{DIFFUSERS}.safetensors",
                {name: (dtype, shape) for name, (_, dtype, shape) in written.items()},
                _from({name: refs[origin] for name, (origin, _, _) in written.items()}),
                metadata,
            )

    def _words(self) -> Iterator[_Word]:
        """Yield every word of every embedding."""
        for embedding in self.order.inputs.get("embeddings", []):
            facts = embedding.facts
            for component, word in words_of(facts).items():
                metadata = {TOKEN: word}
                if word == negative_word(facts):
                    metadata[POLARITY] = "negative"
                if "guidance" in facts:
                    metadata[GUIDANCE] = f"{facts['guidance']:g}"
                name = f"embeddings/{embedding.identity[:16]}{OPPOSITE if component == 'negative' else ''}"
                yield _Word(word, name, {ref.name: ref for ref in embedding.components[component]}, metadata)

    def embeddings(self) -> None:
        for word in self._words():
            self._write(f"{word.file}.safetensors", *_laid_out(_named(word.rows)), word.metadata)

    def embeddings_diffusers(self) -> None:
        """One file for each text encoder, the word as the tensor's name, as diffusers' own training writes them."""
        spec = self._kind_spec("textual-inversion")
        for word in self._words():
            for encoder, ref in sorted(word.rows.items()):
                ending = encoder.removeprefix("text_encoder")
                metadata = {**spec, **word.metadata, "modelspec.trigger_phrase": word.word}
                self._write(f"{word.file}{DIFFUSERS}{ending}.safetensors", *_laid_out({word.word: ref}), metadata)

    def embeddings_pt(self) -> None:
        """A1111's form, of one text encoder; of two it takes what others write into safetensors."""
        for word in self._words():
            tensors = {name: Pickled(ref.dtype, ref.shape, ref.chunks) for name, ref in _named(word.rows).items()}
            stated: dict[str, Any] = dict(tensors)
            if KEY in tensors:
                stated = {
                    "string_to_token": {"*": PLACEHOLDER},
                    "string_to_param": {"*": tensors[KEY]},
                    "name": word.word,
                    "step": None,
                    "sd_checkpoint": None,
                    "sd_checkpoint_name": None,
                }
            self._pickle(f"{word.file}.pt", stated)

    def _own(self, role: str) -> None:
        """Files of kinds for which no other program has a form."""
        for given in self.order.inputs.get(role, []):
            named = own_names({c: {ref.name: ref for ref in refs} for c, refs in given.components.items()})
            metadata = self._kind_spec(given.kind, given) | own_metadata(given.kind, self.family.name, given.facts)
            self._write(f"{role}/{given.identity[:16]}.safetensors", *_laid_out(named), metadata)

    def custom(self) -> None:
        """Folders as diffusers' example script writes them: all matrices, and a file of rows for each word."""
        for custom in self.order.inputs.get("custom", []):
            folder, metadata = f"custom/{custom.identity[:16]}", {"format": "pt"}
            matrices = {raw_name(ref.name.removeprefix("unet.")): ref for ref in custom.components["custom"]}
            self._write(f"{folder}/{MATRICES}", *_laid_out(matrices), metadata)
            for i, word in enumerate(custom_words(custom.facts)):
                for encoder, ref in self._rows(custom, i).items():
                    self._write(f"{folder}/{row_file(encoder, i)}", *_laid_out({word: ref}), metadata)

    def custom_embeddings(self) -> None:
        """The words alone, for programs that load the checkpoint with the matrices and read no folders."""
        for custom in self.order.inputs.get("custom", []):
            for i, word in enumerate(custom_words(custom.facts)):
                name = numbered(f"custom/{custom.identity[:16]}.safetensors", i)
                self._write(name, *_laid_out(_named(self._rows(custom, i))), {TOKEN: word})

    def _rows(self, custom: Given, word: int) -> dict[str, Ref]:
        """Return text encoder → the rows of a word, by its place; a folder from elsewhere may lack some."""
        rows = {ref.name: ref for ref in custom.components.get("embedding", [])}
        names = {encoder: row_name(encoder, word) for encoder in self.family.text_encoders}
        return {encoder: rows[name] for encoder, name in names.items() if name in rows}

    def hypernetworks(self) -> None:
        self._own("hypernetworks")

    def hypernetworks_pt(self) -> None:
        """As A1111 reads them, those that are sidecars too."""
        for role in ("hypernetworks", "sidecars"):
            for given in self.order.inputs.get(role, []):
                if given.kind == "hypernetwork":
                    refs = given.components["hypernetwork"]
                    tensors = {ref.name: Pickled(ref.dtype, ref.shape, ref.chunks) for ref in refs}
                    value = pickled_form(tensors, given.facts)
                    self._pickle(f"{role}/{given.identity[:16]}.pt", value)

    def image_embeddings(self) -> None:
        self._own("image_embeddings")

    def aesthetics(self) -> None:
        self._own("aesthetics")

    def sidecars(self) -> None:
        self._own("sidecars")


class _Word(NamedTuple):
    """A word of an embedding: its file's name without ending, text encoder → rows, and what the file states."""

    word: str
    file: str
    rows: dict[str, Ref]
    metadata: dict[str, str]


def _own_words(given: Given) -> list[str]:
    """Return the words that call an artifact, as far as it has any of its own."""
    if given.kind == "embedding":
        return list(words_of(given.facts).values())
    return custom_words(given.facts) if given.kind == "custom" else list(given.use.get("trigger", []))


def _named(rows: dict[str, Ref]) -> dict[str, Ref]:
    """Return a word's rows (text encoder → rows) by the names that programs know."""
    if list(rows) == ["text_encoder"]:
        return {KEY: rows["text_encoder"]}
    return {key: rows[encoder] for key, encoder in ENCODERS.items() if encoder in rows}


FORMS: dict[str, Callable[[_Writing], None]] = {
    "checkpoint": _Writing.single_file,
    "diffusers": _Writing.diffusers,
    "loras": _Writing.loras,
    "loras-diffusers": _Writing.loras_diffusers,
    "embeddings": _Writing.embeddings,
    "embeddings-diffusers": _Writing.embeddings_diffusers,
    "embeddings-pt": _Writing.embeddings_pt,
    "custom": _Writing.custom,
    "custom-embeddings": _Writing.custom_embeddings,
    "hypernetworks": _Writing.hypernetworks,
    "hypernetworks-pt": _Writing.hypernetworks_pt,
    "image-embeddings": _Writing.image_embeddings,
    "aesthetics": _Writing.aesthetics,
}


def _laid_out(refs: dict[str, Ref]) -> tuple[dict[str, tuple[str, tuple[int, ...]]], Callable[[str], Iterable[bytes]]]:
    """Return what a file needs of tensors that are written as they are: their shapes, and their bytes by name."""
    return {name: (ref.dtype, ref.shape) for name, ref in refs.items()}, _from(refs)


def _from(refs: dict[str, Ref]) -> Callable[[str], Iterable[bytes]]:
    return lambda name: refs[name].chunks()


def _first(chunks: Iterable[bytes], size: int) -> Iterable[bytes]:
    """Yield the first bytes of a tensor whose bytes are all read, so that they are verified."""
    left = size
    for chunk in chunks:
        if left:
            yield chunk[:left]
            left -= min(left, len(chunk))
