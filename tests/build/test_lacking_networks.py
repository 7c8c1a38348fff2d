"""Networks that a checkpoint lacks are said before anything runs.

A merge makes what its first checkpoint has, and nothing can be drawn or trained with a part of one.
"""

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


BARE = '[prune.bare]\ncheckpoint = "base"\nwithout = ["{}"]\n'
PREVIEWS = '[preset]\ncheckpoint = "bare"\n[preset.previews]\nprompts = ["a girl"]\n'
LORA = '[lora.style]\non = "bare"\ndataset = "drawings"\nsteps = 1\n'


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize(("taker", "way_out"), [(PREVIEWS, "or leave out [preset.previews]"), (LORA, "[swap.NAME]")])
@pytest.mark.parametrize("command", ["check", "plan"])
def test_nothing_is_drawn_or_trained_with_a_part_of_a_checkpoint(
    bench: Bench, part: str, taker: str, way_out: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.recipe(BARE.format(part) + taker)
    assert main(["-C", str(bench.root), command, "r"]) == 2
    said = capsys.readouterr().err
    assert f"error[component]: `bare` has no {part}: nothing can be drawn or trained with it" in said
    assert way_out in said


def test_what_lacks_a_network_may_be_written(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(BARE.format("vae") + PREVIEWS.partition("[preset.previews]")[0])
    assert main(["-C", str(bench.root), "plan", "r"]) == 0
    assert "nothing can be drawn" not in capsys.readouterr().err
