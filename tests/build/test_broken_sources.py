"""A source that holds NaN or Inf is told of by name before anything runs, whether it is computed with or passes."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

import sdforge
from sdforge.advice import advice
from sdforge.cli import main
from sdforge.notebook import Progress
from tests.build.inline import Bench
from tests.build.test_single_tensors import SOFT

VAE, UNET = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"
PASSES, COMPUTED = "decoder.conv_in.bias", "mid_block.resnets.0.conv1.bias"
EXPORTED = SOFT + '[preset]\ncheckpoint = "soft"\nexport = ["checkpoint"]\n'


def poison(bench: Bench, file: str, tensor: str, value: float = float("nan")) -> None:
    path = bench.root / "base" / file
    tensors = load_file(path)
    tensors[tensor][0] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_passes_is_named_before_anything_runs(
    bench: Bench, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE of a merge comes from its first checkpoint, and nothing is computed with it."""
    poison(bench, VAE, PASSES, value)
    bench.recipe(EXPORTED)
    assert main(["-C", str(bench.root), "plan", "r"]) == 0
    assert capsys.readouterr().out.count(f"`base` holds NaN or Inf in vae.{PASSES}") == 1


def test_what_is_computed_with_stops_and_names_the_tensor(bench: Bench) -> None:
    poison(bench, UNET, COMPUTED)
    bench.recipe(EXPORTED)
    assert COMPUTED in bench.failure("soft").message


def test_the_source_is_named_once_and_not_what_is_made_from_it(bench: Bench) -> None:
    """As `check` warns of it, once its bytes have been seen."""
    poison(bench, VAE, PASSES)
    bench.recipe('[swap.whole]\ncheckpoint = "base"\nvae = "ink"\n[cast.wide]\ncheckpoint = "whole"\ndtype = "fp32"\n')
    session = bench.session()
    problems = advice(session, session.plan(session.resolve(["r:wide"])))
    assert [(problem.code, problem.warning) for problem in problems] == [("broken", True)]
    assert "`base` holds NaN or Inf" in problems[0].message


def test_whole_numbers_as_weights_are_refused_in_the_plan(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.root / "base" / UNET
    tensors = load_file(path)
    save_file(tensors | {COMPUTED: tensors[COMPUTED].char()}, path, {"format": "pt"})
    bench.recipe(EXPORTED)
    assert main(["-C", str(bench.root), "plan", "r"]) == 2
    said = capsys.readouterr().err
    assert "base: " in said
    assert f"holds unet.{COMPUTED} as I8" in said
    assert "get the same in fp16" in said


def test_a_build_warns_whenever_it_writes_a_file_of_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the merge through which it passes is reused, as for a new title or a file that was deleted."""
    poison(bench, VAE, PASSES)

    def warned() -> int:
        assert main(["-C", str(bench.root), "build", "r"]) == 0
        said = capsys.readouterr()
        return (said.out + said.err).count(f"`base` holds NaN or Inf in vae.{PASSES}")

    bench.recipe(EXPORTED)
    assert warned() == 1
    assert warned() == 0  # nothing is written
    bench.recipe(EXPORTED + 'title = "again"\n')
    assert warned() == 1
    (bench.root / "out" / "r" / "r.safetensors").unlink()
    assert warned() == 1


DRAWN = '[preset.previews]\nprompts = ["a cat"]\nseeds = [1]\nsteps = 1\n'


def test_a_grid_warns_of_what_it_draws_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdforge.trial.LocalExecutor", lambda _: bench)
    poison(bench, VAE, PASSES)
    bench.recipe(EXPORTED + DRAWN)
    assert main(["-C", str(bench.root), "grid", "r", "--x", "soft.weights=[0.5,0.5],[0.0,1.0]", "--plain"]) == 1
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"`base` holds NaN or Inf in vae.{PASSES}") == 1


def test_a_build_from_python_tells_its_callback(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdforge.notebook.LocalExecutor", lambda _: bench)
    poison(bench, VAE, PASSES)
    bench.recipe(EXPORTED)
    told: list[Progress] = []
    sdforge.build("r", project=bench.root, device="cpu", progress=told.append)
    notes = [each.text for each in told if each.state == "note"]
    assert sum(f"`base` holds NaN or Inf in vae.{PASSES}" in note for note in notes) == 1


def test_sound_sources_have_nothing_noted(bench: Bench) -> None:
    bench.recipe(SOFT)
    plan = bench.plan()
    inputs = [artifact for step in plan.steps.values() for _, artifact in step.inputs]
    assert inputs
    assert not [json.dumps(each.notes["broken"]) for each in inputs if each is not None and "broken" in each.notes]


def test_a_picture_that_cannot_be_read_is_no_tensor(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are noted of sources."""
    (bench.root / "drawings" / "none.png").write_bytes(b"no picture")
    bench.recipe('[lora.style]\non = "base"\ndataset = "drawings"\nsteps = 2\nrank = 2\n')
    session = bench.session()
    problems = advice(session, session.plan(session.resolve(["r:style"])))
    assert [problem.code for problem in problems if not problem.warning] == ["pictures"]
    assert "broken" not in [problem.code for problem in problems]
    main(["-C", str(bench.root), "plan", "r:style"])
    said = capsys.readouterr()
    assert "NaN" not in said.out + said.err
