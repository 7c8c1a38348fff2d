"""The types of numbers: as safetensors writes them, and as recipes do."""

from __future__ import annotations

ITEM_SIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
SAFETENSORS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp64": "F64"}  # what recipes write → what files say
NOT_FLOAT = ("I", "U", "BOOL")  # how the names of types begin that no arithmetic touches
