"""What is said of a plan before it runs that no single method can know."""

from __future__ import annotations

from sdforge.advice import advice
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
    assert "`style` has `dora = true`" in problem.message
    assert "bake it" in problem.hint
    assert not said(bench, LORA + PRESET)  # baked, the checkpoint is read by all
    assert not said(
        bench, (LORA + PRESET).replace("dora = true\n", "").replace('checkpoint"]', 'checkpoint", "loras"]')
    )
