"""Bytes ↔ torch tensors, in safetensors' types."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from sdforge.errors import ActionFailed
from sdforge.formats.safetensors import write_file
from sdforge.order import Outcome, Ref

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


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype` by way of fp32, as the same everywhere. Raises ActionFailed for NaN, Inf and overflow.

    torch's own fp64 → fp16 goes through fp32 too; saying it keeps it so.
    """
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise ActionFailed(f"{name} holds NaN or Inf", hint="one of the inputs is broken, or the weights are too large")
    result = tensor.to(torch.float32).to(dtype) if dtype != tensor.dtype else tensor
    if not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        raise ActionFailed(
            f"{name} holds {largest:g}, which does not fit into {str(dtype).removeprefix('torch.')}",
            hint="choose bf16 or fp32 as dtype",
        )
    return result


def write_pack(work: Path, tensors: dict[str, dict[str, Tensor]]) -> Outcome:
    """Write components (component → name → tensor) into one pack; return it with the digests of every tensor."""
    flat = {f"{component}.{name}": t for component, table in tensors.items() for name, t in table.items()}
    shapes = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in flat.items()}
    written = write_file(work / "pack.safetensors", shapes, lambda name: [raw(flat[name])])
    components = {
        component: [
            [name, NAMES[t.dtype], list(t.shape), *digests(raw(t)), written.offsets[f"{component}.{name}"]]
            for name, t in sorted(table.items())
        ]
        for component, table in tensors.items()
    }
    return Outcome(components=components, pack="pack.safetensors", sha256=written.sha256)


def digests(data: bytes | memoryview) -> tuple[str, str]:
    """Return sha256 and xxh3_128 of a tensor's bytes."""
    import hashlib

    return hashlib.sha256(data).hexdigest(), xxhash.xxh3_128(data).hexdigest()
