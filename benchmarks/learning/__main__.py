"""Measure trainings on the demo bases and print Markdown: `python -m benchmarks.learning [METHOD …]`."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.learning.bench import HEAD, Bench

HERE = Path(__file__).parent
METHODS = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "__main__", "bench"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what trainings teach the demo bases.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--work", type=Path, help="a folder to build in and to keep; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.work or Path(folder))
        failed = False
        for name in arguments.methods or METHODS:
            began = time.monotonic()
            found = importlib.import_module(f"benchmarks.learning.{name}").measure(bench)
            print(f"\n### {name}\n\n{HEAD}")
            print("\n".join(finding.row() for finding in found))
            print(f"\n{time.monotonic() - began:.0f} s.")
            failed |= not all(finding.holds for finding in found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
