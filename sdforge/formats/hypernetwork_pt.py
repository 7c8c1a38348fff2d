"""Hypernetworks as A1111 reads them: a dictionary of torch's in a pickle, written without torch, always the same bytes.

The dictionary maps widths (whole numbers) to the state dictionaries of the networks for keys and for values, and names
how those are built: their layers are numbered within a sequence of matrices, activations and norms. What is read is in
`sdforge.run.hypernetwork_pt`, since a pickle can only be opened by torch, and carefully.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from sdforge.errors import UsageError
from sdforge.formats.hypernetwork import SIDES, fact, layers_of, widths_of
from sdforge.identity import Json

STORAGES = {"F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage"}
Raw = tuple[str, tuple[int, ...], bytes]  # dtype as safetensors writes it, shape, bytes in C order


class Stored(NamedTuple):
    """A tensor in a pickle: its bytes lie beside it, under a number."""

    number: int
    dtype: str
    shape: tuple[int, ...]


class Ordered(NamedTuple):
    """A state dictionary."""

    items: dict[str, Stored]


def sequence(facts: dict[str, Json]) -> dict[str, int]:
    """Return `linear.0`, `norm.0`, … → its number in A1111's sequence of a network without dropout."""
    numbers, place, last = {}, 0, layers_of(facts) - 1
    for i in range(last + 1):
        numbers[f"linear.{i}"] = place
        place += 1
        if fact(facts, "activation") != "linear" and (i < last or fact(facts, "activate_output")):
            place += 1
        if fact(facts, "layer_norm"):
            numbers[f"norm.{i}"] = place
            place += 1
    return numbers


def pickled(name: str, tensors: dict[str, Raw], facts: dict[str, Json]) -> bytes:
    """Return the file for A1111. Raises UsageError for a type of numbers that torch's pickles do not have."""
    structure: Any = facts["structure"]
    numbers = sequence(facts)
    stored: list[bytes] = []
    whole: dict[Any, Any] = {}
    for width in widths_of(list(tensors)):
        sides = []
        for side in SIDES:
            items = {}
            for layer, number in numbers.items():
                for part in ("weight", "bias"):
                    dtype, shape, data = tensors[f"{width}.{side}.{layer}.{part}"]
                    if dtype not in STORAGES:
                        raise UsageError(f"A1111 reads no hypernetworks of {dtype}")
                    items[f"linear.{number}.{part}"] = Stored(len(stored), dtype, shape)
                    stored.append(data)
            sides.append(Ordered(items))
        whole[width] = tuple(sides)
    whole |= {
        "step": 0,
        "name": name,
        "layer_structure": [int(n) if n == int(n) else float(n) for n in structure],
        "activation_func": fact(facts, "activation"),
        "is_layer_norm": fact(facts, "layer_norm"),
        "weight_initialization": "Normal",
        "use_dropout": False,
        "dropout_structure": [0] * len(structure),
        "last_layer_dropout": False,
        "activate_output": fact(facts, "activate_output"),
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "optional_info": None,
    }
    return _archive(b"".join((b"\x80\x02", *_opcodes(whole), b".")), stored)


def _archive(pickle: bytes, stored: list[bytes]) -> bytes:
    """Return torch's zip: the pickle, the tensors' bytes, and nothing that changes from day to day."""
    entries = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{number}": data for number, data in enumerate(stored)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"hypernetwork/{name}", (1980, 1, 1, 0, 0, 0)), data)
    return file.getvalue()


def _opcodes(value: Any) -> Iterator[bytes]:
    """Yield a value in pickle's second protocol: what torch's loader of mere weights knows, and nothing else."""
    if value is None or isinstance(value, bool):
        yield {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        yield b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, Stored):
        yield from _tensor(value)
    elif isinstance(value, Ordered):
        yield b"ccollections\nOrderedDict\n)R"
        yield from _items(value.items)
    elif isinstance(value, dict):
        yield b"}"
        yield from _items(value)
    elif isinstance(value, list):
        yield b"]("
        for each in value:
            yield from _opcodes(each)
        yield b"e"
    else:
        yield b"("
        for each in value:
            yield from _opcodes(each)
        yield b"t"


def _items(table: dict[Any, Any]) -> Iterator[bytes]:
    yield b"("
    for key, value in table.items():
        yield from _opcodes(key)
        yield from _opcodes(value)
    yield b"u"


def _tensor(tensor: Stored) -> Iterator[bytes]:
    count = prod(tensor.shape)
    strides = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
    yield from _opcodes("storage")
    yield f"ctorch\n{STORAGES[tensor.dtype]}\n".encode()
    yield from (part for each in (str(tensor.number), "cpu", count) for part in _opcodes(each))
    yield b"tQ"  # the storage, by what lies beside the pickle
    yield from (part for each in (0, tensor.shape, strides, False) for part in _opcodes(each))
    yield b"ccollections\nOrderedDict\n)RtR"
