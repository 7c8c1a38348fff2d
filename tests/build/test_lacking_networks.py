"""A merge makes what its first checkpoint has: what it lacks of the others is said before anything runs."""

from __future__ import annotations

import shutil

import pytest

from sdforge.cli import main
from tests.build.inline import Bench

MERGE = '[weighted_sum.both]\ncheckpoints = ["{}", "{}"]\nweights = [0.6, 0.4]\nblocks.text_encoder = [1, 0]\n'


def alone(bench: Bench) -> None:
    """Leave nothing of the base but its U-Net."""
    base = bench.root / "base"
    (base / "unet").rename(bench.root / "unet")
    shutil.rmtree(base)
    (bench.root / "unet").rename(base)


@pytest.mark.parametrize(("first", "second", "count"), [("base", "ink", 1), ("ink", "base", 0), ("ink", "ink", 0)])
def test_what_the_first_checkpoint_lacks_is_noted_in_the_plan(
    bench: Bench, first: str, second: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    alone(bench)
    bench.recipe(MERGE.format(first, second))
    assert main(["-C", str(bench.root), "plan", "r:both"]) == 0
    told = "note: `base` has no text_encoder and no vae: of `ink` that is left out of `both`; put `ink` first, or"
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(told) == count
    assert out.count("left out") == count
