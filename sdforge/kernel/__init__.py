"""The compiled kernel, where there is one: elementwise arithmetic of merges and bakes in one pass through the caches.

Without it torch computes the same bytes, each operation by itself: its results lie in memory between two. What it has
for checksums is in `sums`. It is compiled when sdforge is installed, if a C compiler is at hand, or by
`python -m sdforge.kernel`. FORGE_KERNEL=off leaves it out, FORGE_KERNEL=avx2 what it has for AVX-512.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from sdforge.kernel.build import LIBRARY, fingerprint

F16, BF16, F32, F64, PRODUCT = range(5)  # types, as kernel.c has them
ADD, SUB, MUL, ADD_C, SUB_C, MUL_C = range(6)
PRODUCTS, RANKS = 8, 256  # of one program: products at most, and the ranks of all of them together


class Operation(ctypes.Structure):
    """A step of a program: which operation, of which values, and the constant of the last three kinds."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("x", ctypes.c_int32),
        ("y", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("constant", ctypes.c_double),
    )


class Product(ctypes.Structure):
    """An input that is the product of two fp64 matrices in C order: (rows, rank) and (rank, columns)."""

    _fields_ = (
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def missing() -> str:
    """Return why the kernel is not used, or nothing where it is."""
    wanted = os.environ.get("FORGE_KERNEL")
    if wanted == "off":
        return "FORGE_KERNEL is off"
    if not LIBRARY.is_file():
        return "it is not compiled"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return "it cannot be loaded here"
    library.source.restype = ctypes.c_char_p
    if library.source() != fingerprint().encode():
        return "it was compiled from another version"
    return "" if library.usable(wanted != "avx2") else "this processor has no AVX2"


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where there is none that serves."""
    return None if missing() else ctypes.CDLL(str(LIBRARY))
