"""How things are named by what they are: the bytes that are hashed.

`H(kind, value)` is sha256 over `"sdforge/1/" + kind + NUL + RFC 8785 JSON of value`. The kind keeps two different
sorts of things from ever having one name. Test vectors stand in `tests/test_identity.py`; changing anything here
would rename (and so retrain) everything that was ever made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache
from json.encoder import encode_basestring
from math import isfinite
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

PREFIX = b"sdforge/1/"
LARGEST_INTEGER = 2**53  # beyond it a JSON number is not exact everywhere


def H(kind: str, value: Json) -> str:  # noqa: N802 -- the name that the design gives it
    """Return the sha256 (64 hexadecimal digits) that names `value` among things of its kind."""
    return digest_of_text(kind, canonical(value))


def digest_of_text(kind: str, text: str) -> str:
    """Return `H` of a value whose canonical JSON is already at hand."""
    return hashlib.sha256(PREFIX + kind.encode() + b"\0" + text.encode()).hexdigest()


def canonical(value: Json) -> str:
    """Return `value` as RFC 8785 JSON: keys by their UTF-16 code units, shortest numbers, no blanks.

    Raises ValueError for NaN, infinities and integers beyond ±2^53, which JSON cannot carry exactly.
    """
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, int):
        if abs(value) > LARGEST_INTEGER:
            raise ValueError(f"{value} is too large to be written exactly")
        return str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, dict):
        # ASCII sorts alike in UTF-16 and by code points
        keys = sorted(value) if "".join(value).isascii() else sorted(value, key=_utf16)
        return "{" + ",".join([f"{encode_basestring(key)}:{canonical(value[key])}" for key in keys]) + "}"
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-be")


@lru_cache(1 << 12)  # the same weights are asked for with every tensor
def number(value: float) -> str:
    """Return a finite double as ECMAScript prints it (RFC 8785 §3.2.2.3): 1, 0.5, 1e-7, 1e+21; −0 is 0."""
    if not isfinite(value):
        raise ValueError(f"{value} cannot be written as JSON")
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    text, point = "".join(map(str, digits)), len(digits) + exponent  # the value is 0.text × 10^point
    if 0 < point <= 21:
        body = text.ljust(point, "0") if len(text) <= point else text[:point] + "." + text[point:]
    elif -6 < point <= 0:
        body = "0." + "0" * -point + text
    else:
        mantissa = text[0] + ("." + text[1:] if len(text) > 1 else "")
        body = f"{mantissa}e{'+' if point > 0 else '-'}{abs(point - 1)}"
    return ("-" if sign else "") + body


def decimal(value: float) -> Decimal:
    """Return the decimal that a person wrote for `value`: sums and comparisons of weights are made on these.

    0.6 + 0.3 + 0.1 is 1 here, and is not in binary fractions.
    """
    return Decimal(repr(value))


def tensor_identity(dtype: str, shape: Iterable[int], sha256: str) -> str:
    """Name a tensor by its content.

    dtype: as safetensors writes it (F16, BF16, F32, …); sha256: of its little-endian C-order bytes. The tensor's
    name is not in it.
    """
    sizes = ",".join(map(str, shape))
    return digest_of_text("tensor", f'{{"dtype":"{dtype}","sha256":"{sha256}","shape":[{sizes}]}}')


def component_identity(tensors: Iterable[tuple[str, str]]) -> str:
    """Name a component (U-Net, VAE, a LoRA's factors, …) by its tensors: (canonical name, tensor identity) pairs."""
    rows = ",".join(f'["{name}","{identity}"]' for name, identity in sorted(tensors))
    return digest_of_text("component", f"[{rows}]")
