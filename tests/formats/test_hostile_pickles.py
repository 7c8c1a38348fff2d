"""Pickles with code in them are refused, and nothing of it runs; opened without care every one of them does harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.payloads import FORMS, KINDS, converted_apart, open_without_care, write


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_pickle_does_not_run(kind: str, tmp_path: Path) -> None:
    """One form of each kind; the benchmark of what survives has all three."""
    path, harm, form = tmp_path / "x.ckpt", tmp_path / "harm", FORMS[list(KINDS).index(kind) % len(FORMS)]
    write(path, kind, form, harm)
    code, said = converted_apart(path, tmp_path / "out")
    assert (code, "is no pickle of mere numbers" in said) == (2, True), said
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]
    open_without_care(path, form)
    assert harm.exists()  # so this would have run
