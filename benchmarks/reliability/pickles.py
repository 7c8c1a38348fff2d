"""P9: pickles that would run something, each in the three forms in which weights come."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.reliability.place import Bench, Found, at
from tests.formats.payloads import FORMS, KINDS, converted_apart, open_without_care, write


def pickles(bench: Bench, i: int) -> Found | None:
    """Import one kind: it is refused and makes nothing. Then open it without care: it makes what it was to make."""
    if i >= len(KINDS):
        return None
    kind, problems = list(KINDS)[i], []
    for form in FORMS:
        with tempfile.TemporaryDirectory(dir=bench.place) as folder:
            path, harm = Path(folder, "x.ckpt"), Path(folder, "harm")
            write(path, kind, form, harm)
            code, said = converted_apart(path, Path(folder, "out"))
            wrong = [] if code == 2 else [f"code {code}: {said[-300:]}"]
            wrong += [f"{p.name} was made" for p in Path(folder).iterdir() if p != path]
            open_without_care(path, form)
            wrong += [] if harm.exists() else ["it does no harm to anybody"]
            problems += at(f"{kind} in {form}", wrong)
    return Found(f"in {len(FORMS)} forms each", problems)
