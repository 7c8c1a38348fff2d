"""What a reader of a foreign file finds, and which reader is asked.

A reader is a module with `recognises(path, header)` and `read(path, header)` for files, `read_folder(path, header_of)`
for folders; it brings what it finds to our canonical names, splits and shapes, and says what it read over. READERS
lists them in the order in which they are asked.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sdforge.dtypes import ITEM_SIZE, NOT_FLOAT
from sdforge.errors import UsageError
from sdforge.families import Family, Name
from sdforge.formats.pickled import is_pickle
from sdforge.formats.safetensors import Header, read_header
from sdforge.identity import Json

READERS = (
    "diffusers_folder",
    "clip_folder",
    "custom_diffusion",
    "tokenizer",
    "single_file",
    "network",
    "text_encoder",
    "kohya",
    "diffusers_lora",
    "cloneofsimo",
    "null_text",
    "hypernetwork",
    "own",
    "embedding",
)


class Found(NamedTuple):
    """A tensor in a file, under its canonical name: `file` is an index into `Layout.files`, `offset` in bytes.

    turned: the file holds the transpose of the matrix that `shape` describes.
    """

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    turned: bool = False

    @property
    def size(self) -> int:
        total = ITEM_SIZE[self.dtype]
        for n in self.shape:
            total *= n
        return total


# codes of `memoryview`, by the bytes of an item
ITEM_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def transposed(data: bytes | bytearray, columns: int, item_size: int) -> bytes:
    """Return the transpose of a matrix's bytes in C order; columns: of the matrix that is given."""
    flat = memoryview(data).cast("B").cast(ITEM_CODES[item_size])
    return b"".join(flat[column::columns].tobytes() for column in range(columns))


@dataclass
class Layout:
    """What a reader found: where every tensor lies, and what the file states beside them.

    files: all files whose bytes count, the path of a folder source included as its files.
    tokenizer: {"vocab": word → id, "merges": […]} where the source carries one.
    passed: reason → number of tensors that were read over for it.
    dialect: whose way of writing files it is.
    """

    kind: str
    family: str
    files: list[Path]
    tensors: list[Found] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    passed: Counter[str] = field(default_factory=Counter)
    dialect: str = ""

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return component → name → shape."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.component, {})[tensor.name] = tensor.shape
        return found


def shape_here(path: Path, of: Family, name: Name, raw: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a file's tensor `raw` has here. Raises UsageError for one that it cannot have."""
    found = of.canonical_shape(name, shape)
    if len(found) != of.axes(name) or 0 in found:
        raise UsageError(
            f"{path} holds {raw} of shape {list(shape)}, which no {name.component.replace('_', ' ')} has",
            hint="get the file again from where it came from",
        )
    return found


def of_numbers(layout: Layout) -> Layout:
    """Return a layout all of whose tensors can be computed with. Raises UsageError for one of integers or booleans.

    What has whole numbers of its own accord, as position ids, no reader lays out.
    """
    for tensor in layout.tensors:
        if tensor.dtype.startswith(NOT_FLOAT):
            raise UsageError(
                f"{layout.files[tensor.file]} holds {tensor.component}.{tensor.name} as {tensor.dtype}: whole numbers, "
                "which are no weights before the program that made them has scaled them",
                hint="get the same in fp16, bf16, fp32 or fp8 from where it came from",
            )
    return layout


HeaderOf = Callable[[Path], Header]  # a file's header; of a pickle that of the file into which it was converted


class Reader(Protocol):
    """What a module of READERS offers."""

    def recognises(self, path: Path, header: Header | None) -> bool:
        """Say whether this is the reader for a file (with its header) or a folder (without)."""
        ...

    def read(self, path: Path, header: Header) -> Layout:
        """Return where everything in a file lies. Raises UsageError for what can never be used."""
        ...

    def read_folder(self, path: Path, header_of: HeaderOf) -> Layout:
        """Return where everything in a folder lies. Raises UsageError for what can never be used."""
        ...


@cache
def _readers() -> tuple[Reader, ...]:
    return tuple(importlib.import_module(f"sdforge.formats.{name}") for name in READERS)


def header_of_safe(path: Path) -> Header:
    """Return a file's header. Raises UsageError for pickles, which nobody allowed to be opened."""
    if is_pickle(path):
        raise refused_pickle(path)
    return read_header(path)


def refused_pickle(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a pickle, which could run code when it is opened",
        hint='convert it to safetensors, or state `pickle = "allow"` beside `from`: then it is converted once, in a '
        "limited process that takes numbers and runs nothing",
    )


def read_layout(path: Path, header_of: HeaderOf = header_of_safe) -> Layout:
    """Read a source: recognise its format from header or folder, and say where everything lies.

    header_of: how a single file is looked at. Raises UsageError with one sentence that names the path.
    """
    header = None if path.is_dir() else header_of(path)
    for reader in _readers():
        if reader.recognises(path, header):
            return of_numbers(reader.read(path, header) if header else reader.read_folder(path, header_of))
    what = "folder" if header is None else "safetensors file"
    names = ", ".join(sorted(header.tensors)[:3]) if header else ""
    raise UsageError(
        f"{path} is a {what} of no kind that is known here" + (f" (it holds {names}, …)" if names else ""),
        hint="a checkpoint, a LoRA or an embedding of a family that `forge list --families` names",
    )
