"""Tables as forge writes them: TOML 1.0, sorted keys, one line each."""

from __future__ import annotations

import json
import math
from typing import Any


def table(path: tuple[str, ...], values: dict[str, Any]) -> str:
    """Return a table with its header."""
    rows = "".join(f"{_key(name)} = {value(values[name])}\n" for name in sorted(values))
    return f"[{dotted(path)}]\n{rows}"


def dotted(path: tuple[str, ...]) -> str:
    """Return a dotted key: bare, and in quotes what has to be."""
    return ".".join(map(_key, path))


def _key(name: str) -> str:
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if plain and name else value(name)


def value(found: Any) -> str:
    """Return a value of JSON as TOML; what is nothing becomes an empty text."""
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, float):
        if not math.isfinite(found):
            raise ValueError(f"{found} has no place in a table")
        return repr(found)
    if isinstance(found, int):
        return str(found)
    if isinstance(found, str):
        return json.dumps(found, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(found, list):
        return "[" + ", ".join(map(value, found)) + "]"
    if isinstance(found, dict):
        return "{ " + ", ".join(f"{_key(k)} = {value(found[k])}" for k in sorted(found)) + " }" if found else "{}"
    if found is None:
        return '""'
    raise TypeError(f"{type(found).__name__} has no place in a table")
