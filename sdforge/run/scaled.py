"""fp8 weights whose scales stand beside them → fp16, which holds every product but for its last bits.

ComfyUI's forms of a single file: `NAME.weight` in fp8, and in fp32 one number or one for every row: `NAME.scale_weight`
with a mark `scaled_fp8`, or since 2025 `NAME.weight_scale` with `NAME.comfy_quant` or metadata. What inputs would be
divided by (`NAME.scale_input`, `NAME.input_scale`) concerns arithmetic in fp8 alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sdforge.dtypes import NOT_FLOAT
from sdforge.errors import UsageError
from sdforge.formats.safetensors import Header, read_header, read_range, write_file
from sdforge.formats.single_file import SCALES
from sdforge.run.tensors import DTYPES, raw, rounded
from sdforge.store.files import open_regular

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # how names end of what is not needed any more
STATED = "_quantization_metadata"


def write_scaled(path: Path, into: Path) -> None:
    """Write a file again with its weights multiplied. Raises UsageError for scales that belong to nothing."""
    header = read_header(path)
    scales = {name.rpartition(".")[0] + ".weight": name for name in header.tensors if name.endswith(SCALES)}
    lost = sorted(name for weight, name in scales.items() if weight not in header.tensors)
    if lost:
        raise UsageError(f"{path} holds {lost[0]}, and no weight that it scales")
    for name in scales:
        if (dtype := header.tensors[name].dtype).startswith(NOT_FLOAT):
            raise UsageError(f"{path} keeps {name} as {dtype} with a scale beside it", hint="of those fp8 is read")
    beside = {*scales.values(), *(name for name in header.tensors if name.endswith(BESIDE))}
    shapes = {
        name: ("F16" if name in scales and entry.dtype in EIGHT_BITS else entry.dtype, entry.shape)
        for name, entry in header.tensors.items()
        if name not in beside
    }

    def content(name: str) -> list[memoryview]:
        tensor = _read(header, name)
        if name not in scales:
            return [raw(tensor)]
        scale, (dtype, _) = _read(header, scales[name]).float(), shapes[name]
        if scale.numel() not in (1, *tensor.shape[:1]):
            raise UsageError(f"{path} scales {name} by {scale.numel()} numbers")
        scale = scale.reshape(-1, *([1] * (tensor.dim() - 1))) if scale.numel() > 1 else scale.reshape(())
        return [raw(rounded(name, tensor.float() * scale, DTYPES[dtype]))]

    write_file(into, shapes, content, {key: value for key, value in header.metadata.items() if key != STATED})


def _read(header: Header, name: str) -> Tensor:
    entry, fd = header.tensors[name], open_regular(header.file)
    try:
        data = bytearray(b"".join(read_range(fd, entry.offset, entry.size)))
    finally:
        os.close(fd)
    found = torch.frombuffer(data, dtype=DTYPES[entry.dtype]) if data else torch.empty(0, dtype=DTYPES[entry.dtype])
    return found.reshape(entry.shape)
