"""Compile the kernel: `python -m sdforge.kernel`."""

from __future__ import annotations

import sys

from sdforge.kernel.build import LIBRARY, build

if __name__ == "__main__":
    if reason := build():
        sys.exit(f"not compiled: {reason}. Without it torch computes the same bytes, slower")
    print(f"compiled: {LIBRARY.name}")
