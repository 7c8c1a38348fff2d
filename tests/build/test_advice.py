"""What is said of a plan before it runs that no single method can know."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sdforge.advice import advice
from sdforge.cli import main
from sdforge.errors import Problem
from tests.build.inline import Bench

LORA = '[lora.style]\non = "base"\ndataset = "drawings"\nsteps = 2\nrank = 2\ndora = true\n'
PRESET = '[preset]\ncheckpoint = "base"\nbake = { style = 0.8 }\nexport = ["checkpoint"]\n'


def said(bench: Bench, text: str) -> list[Problem]:
    bench.recipe(text)
    session = bench.session()
    return [problem for problem in advice(session, session.plan(session.resolve(["r"]))) if problem.code == "dora"]


def test_a_dora_that_is_exported_is_warned_of_since_other_programs_read_it_otherwise(bench: Bench) -> None:
    """Measured with ComfyUI and InvokeAI: docs/programs.md."""
    (problem,) = said(bench, LORA + PRESET.replace('["checkpoint"]', '["checkpoint", "loras"]'))
    assert problem.warning
    assert "`style` has `dora = true`: ComfyUI, A1111 and InvokeAI draw otherwise" in problem.message
    assert "bake it" in problem.hint
    assert not said(bench, LORA + PRESET)  # baked, the checkpoint is read by all
    assert not said(
        bench, (LORA + PRESET).replace("dora = true\n", "").replace('checkpoint"]', 'checkpoint", "loras"]')
    )


@pytest.mark.parametrize(
    "table",
    [
        '[slerp.x]\na = "base"\nb = "ink"\nblocks = {}\n',
        '[bake.x]\ncheckpoint = "base"\n\nloras.glow = {{ blocks = {} }}\n',
    ],
)
@pytest.mark.parametrize(
    ("patterns", "idle"),
    [
        ('{ "unet.in0?" = 0.5, "unet.?n04" = 0.2 }', ["unet.?n04"]),
        ('{ "unet.m*:attn1" = 0.5, "M00:attn1.to_q" = 0.2, "unet:attn1" = 0.1 }', []),
        ('{ "unet.mid:attn1" = 0.5, "unet.m*:attn1" = 0.2, "unet.*" = 0.1 }', ["unet.m*:attn1"]),
    ],
)
def test_a_pattern_that_decides_nothing_is_named(
    bench: Bench, table: str, patterns: str, idle: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """That with the longest text before a wildcard wins, also over one that names fewer blocks."""
    bench.recipe(table.format(patterns))
    assert main(["-C", str(bench.root), "check", "r"]) == 0
    said = capsys.readouterr()
    told = [f"the block pattern '{each}' decides nothing: others go before it" for each in idle]
    shown = [line for line in (said.out + said.err).splitlines() if "warning[" in line]
    assert shown == [f"recipes/r.toml:5:1: warning[pattern]: {sentence}" for sentence in told]
    assert main(["-C", str(bench.root), "plan", "r:x"]) == 0
    assert capsys.readouterr().out.count("decides nothing: others go before it; that one wins") == len(idle)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ('[bake.both]\ncheckpoint = "base"\nloras.glow = {}\nloras.odd = {}\n', "loras.odd = {}"),
        ('[preset]\ncheckpoint = "base"\nbake = { glow = 1.0, odd = 1.0 }\n', "bake = { glow = 1.0, odd = 1.0 }"),
    ],
)
def test_of_several_things_that_are_baked_the_one_that_does_not_fit_is_named(
    bench: Bench, table: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recipe calls it, and at its place."""
    factors = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(8, 2)}
    names = {f"lora_unet_mid_block_resnets_0_conv1.{name}.weight": tensor for name, tensor in factors.items()}
    save_file(names, bench.root / "odd.safetensors")
    bench.recipe(f'[source.odd]\nfrom = "odd.safetensors"\n{table}')
    assert main(["-C", str(bench.root), "check", "r"]) == 2
    said = capsys.readouterr().err
    assert "error[formula]: `odd`: its factors lora_down [2, 8], lora_up [8, 2] do not fit unet.mid_block" in said
    assert line in said
