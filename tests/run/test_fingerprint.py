"""Equal fingerprints promise equal bits, so they tell processors apart for which libraries have other code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdforge.run import fingerprint as module
from sdforge.run.fingerprint import fingerprint, processor

XEON = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nflags\t\t: fpu avx2 avx512f\n\nprocessor: 1\n"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A processor that says of itself what a file says."""
    cache = tmp_path / "caches" / "index0"
    cache.mkdir(parents=True)
    (cache / "size").write_text("2048K\n")
    monkeypatch.setattr(module, "CPUS", tmp_path / "cpuinfo")
    monkeypatch.setattr(module, "CACHES", tmp_path / "caches")
    return tmp_path / "cpuinfo"


def said(path: Path, text: str) -> str:
    path.write_text(text)
    return processor.__wrapped__()


def test_a_result_says_on_which_processor_it_was_made() -> None:
    assert fingerprint(torch.device("cpu"))["processor"] == processor() != ""


def test_the_model_is_named(told: Path) -> None:
    assert said(told, XEON).startswith("GenuineIntel 6 85 ")


@pytest.mark.parametrize(
    ("old", "new"), [("85", "143"), ("avx512f", "avx512f amx_bf16"), ("GenuineIntel", "AuthenticAMD")]
)
def test_another_model_or_other_instructions_are_another_processor(told: Path, old: str, new: str) -> None:
    assert said(told, XEON) != said(told, XEON.replace(old, new))


def test_what_decides_no_sum_is_no_other_processor(told: Path) -> None:
    assert said(told, XEON) == said(told, XEON.replace("fpu", "fpu hypervisor").replace("processor: 1", "processor: 2"))


def test_other_caches_are_another_processor(told: Path) -> None:
    before = said(told, XEON)
    (told.parent / "caches" / "index0" / "size").write_text("1024K\n")
    assert said(told, XEON) != before
