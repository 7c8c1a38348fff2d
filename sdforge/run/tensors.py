"""Bytes ↔ torch tensors, in safetensors' types."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from sdforge.dtypes import ITEM_SIZE
from sdforge.errors import ActionFailed
from sdforge.file_layout import FileLayout
from sdforge.formats.safetensors import header_bytes
from sdforge.order import Outcome
from sdforge.ref import Ref
from sdforge.run.side_by_side import drained
from sdforge.store.files import CHUNK
from sdforge.store.poured import Poured

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the least fp32 number that is Inf when it is rounded: half a step beyond the largest one, which is even there
TOO_LARGE = {torch.float16: 65520.0, torch.bfloat16: float.fromhex("0x1.FFp127")}
UNBOUND = "one of the inputs is broken, or the weights are too large"
PART = 1 << 16  # elements made at a time: what an operation takes and makes of them stays in a core's cache


def load(ref: Ref) -> Tensor:
    """Return a tensor from its file, verified. Raises Damaged."""
    data = ref.bytes()
    if not data:
        return torch.empty(ref.shape, dtype=DTYPES[ref.dtype])
    return torch.frombuffer(data, dtype=DTYPES[ref.dtype]).reshape(ref.shape)


def load_component(refs: Iterable[Ref], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a component's tensors by name, its floats in `dtype` where one is given."""
    tensors = {ref.name: load(ref) for ref in refs}
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return tensors


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's little-endian C-order bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor Inf; whole numbers never do.

    A sum is finite only if all its terms are, and takes a fiftieth of the time of a look at each; those are looked at
    where it is not, since the largest numbers may add up to Inf.
    """
    if not tensor.is_floating_point():
        return True
    for part in _parts(tensor):
        wide = part.float() if part.dtype.itemsize < 4 else part
        if not (math.isfinite(wide.sum().item()) or bool(torch.isfinite(wide).all())):
            return False
    return True


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor's elements in C order, in parts that fit the caches."""
    flat = tensor.reshape(-1)
    return (flat,) if flat.numel() <= PART else torch.split(flat, PART)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype` by way of fp32, as the same everywhere; what has that type is returned itself.

    torch's own fp64 → fp16 goes through fp32 too; saying it keeps it so. Raises ActionFailed for NaN, Inf and overflow.
    """
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.detach().to("cpu")
    if tensor.numel() <= PART or dtype == tensor.dtype:
        return _rounded(name, tensor, dtype)
    result = torch.empty(tensor.shape, dtype=dtype)
    for given, made in zip(_parts(tensor), _parts(result), strict=True):
        made.copy_(_rounded(name, given, dtype))
    return result


def _rounded(name: str, given: Tensor, dtype: torch.dtype) -> Tensor:
    wide = given if dtype == given.dtype else given.to(torch.float32)
    made = wide.to(dtype)
    if not (_fits(wide, TOO_LARGE[dtype]) if wide.dtype == torch.float32 and dtype in TOO_LARGE else finite(made)):
        raise _unfit(name, given, dtype)
    return made


def _fits(wide: Tensor, too_large: float) -> bool:
    """Say whether all fp32 numbers are less than a bound, of either sign. NaN is not, and comes through min and max."""
    numbers = wide.numpy()
    return not numbers.size or (float(numbers.max()) < too_large and float(numbers.min()) > -too_large)


def _unfit(name: str, tensor: Tensor, dtype: torch.dtype) -> ActionFailed:
    if not finite(tensor):
        return ActionFailed(f"{name} holds NaN or Inf", UNBOUND)
    return ActionFailed(
        f"{name} holds {float(tensor.abs().max()):g}, which does not fit into {str(dtype).removeprefix('torch.')}",
        "choose bf16 or fp32 as dtype",
    )


class Digests(NamedTuple):
    """What names a tensor's bytes, and what tells their damage fast."""

    sha256: str
    xxh3: str


def hashed(parts: Iterable[Tensor]) -> Generator[memoryview, None, Digests]:
    """Yield the bytes of a tensor that is given from front to back; return its digests."""
    strong, fast, last, memory = hashlib.sha256(), xxhash.xxh3_128(), None, memoryview(b"")
    for part in parts:
        if part is not last:  # as the next part may lie in the very same tensor
            last, memory = part, raw(part)
        for start in range(0, memory.nbytes, CHUNK):
            piece = memory[start : start + CHUNK]
            strong.update(piece)
            fast.update(piece)
            yield piece
    return Digests(strong.hexdigest(), fast.hexdigest())


class Pack:
    """A file of tensors in the making, written and hashed from front to back, in the order of `sizes`.

    Used as a context: what is left open is closed.
    """

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[str, tuple[int, ...]]],
        layout: FileLayout | None = None,
        *,
        ahead: int = 0,
    ) -> None:
        """shapes: of the tensors that are computed. layout: of the whole file, where it holds more than those.

        ahead: buffers that other processes may fill before it is their turn.
        """
        self.path, self.shapes = path, shapes
        first, order = header_bytes(shapes, {})
        self.sizes = {name: self.size(name) for name in order}
        if layout is not None:
            first, self.sizes = layout.first(), layout.spans()
        self.offsets: dict[str, int] = {}
        self.digests: dict[str, Digests] = {}
        place = len(first)
        for name, size in self.sizes.items():
            self.offsets[name] = place
            place += size
        # what lies there was left by a job that was lost, and begun again in the same folder
        self.file = Poured(path, first, place, body=layout is not None, ahead=ahead)

    def size(self, name: str) -> int:
        """Return the bytes of a tensor that is computed."""
        dtype, shape = self.shapes[name]
        return math.prod(shape) * ITEM_SIZE[dtype]

    def wrote(self, name: str, digests: Digests | None = None) -> None:
        """Take note of what has been written to `file`, with the digests of a tensor that is computed."""
        given, size = self.file.told() - self.offsets[name], self.sizes[name]
        if given != size:
            raise ValueError(f"{name} was given {given} bytes, and has {size}")
        if digests is not None:
            self.digests[name] = digests

    def rows(self, names: Mapping[str, Iterable[str]]) -> dict[str, list[list[Any]]]:
        """Return component → what `Outcome.components` says of these of its tensors (`component.name` in the pack)."""
        components: dict[str, list[list[Any]]] = {}
        for component, found in names.items():
            for name in found:
                key = f"{component}.{name}"
                dtype, shape = self.shapes[key]
                row = [name, dtype, list(shape), *self.digests[key], self.offsets[key]]
                components.setdefault(component, []).append(row)
        return components

    def outcome(self, names: Mapping[str, Iterable[str]]) -> Outcome:
        """Return what was written; names: component → the names of its tensors (`component.name` in the pack)."""
        self.file.close()
        return Outcome(components=self.rows(names), pack=self.path.name, sha256=self.file.sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.__exit__(kind, error, at)


class Aside:
    """Tensors put aside in a file without a name, so that they take of memory only what the page cache spares."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- open as long as this is
        self.end = 0

    def put(self, tensor: Tensor) -> Tensor:
        """Write a tensor's bytes, and return a tensor that reads them there."""
        memory = raw(tensor)
        if not memory.nbytes:
            return tensor
        self.file.write(memory)
        self.file.flush()
        there = np.memmap(self.file, np.uint8, "c", self.end, (memory.nbytes,))  # what is changed stays in memory
        self.end += memory.nbytes
        return torch.from_numpy(there).view(tensor.dtype).reshape(tensor.shape)


def write_pack(work: Path, tensors: dict[str, dict[str, Tensor]]) -> Outcome:
    """Write components (component → name → tensor) into one pack; return it with the digests of every tensor."""
    flat = {f"{component}.{name}": t for component, table in tensors.items() for name, t in table.items()}
    shapes = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in flat.items()}
    with Pack(work / "pack.safetensors", shapes) as pack:
        for name in pack.sizes:
            pack.wrote(name, drained(hashed([flat[name]]), pack.file.write))
        return pack.outcome({component: sorted(table) for component, table in tensors.items()})
