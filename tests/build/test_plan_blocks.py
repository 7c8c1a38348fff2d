"""`forge plan --blocks`: what lists, presets and patterns come out as, block by block."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdforge.blocks import preset
from sdforge.cli import main
from sdforge.families import family
from tests.build.inline import Bench

SUM = '[weighted_sum.soft]\ncheckpoints = ["base", "ink"]\nweights = [0.6, 0.4]\n'


def tables(bench: Bench, capsys: pytest.CaptureFixture[str], text: str) -> dict[str, Any]:
    bench.recipe(text)
    capsys.readouterr()
    assert main(["-C", str(bench.root), "plan", "r", "--blocks", "--json"]) == 0
    actions = json.loads(capsys.readouterr().out)["actions"]
    return {a["target"].partition(":")[2]: a["blocks"] for a in actions if "blocks" in a}


def test_patterns_decide_in_their_blocks_and_the_setting_elsewhere(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tables(bench, capsys, SUM + 'blocks = { "unet.in0*" = [0.9, 0.1], M00 = [0.5, 0.5] }\n')["soft"]
    assert (found["setting"], found["columns"]) == ("weights", ["base", "ink"])
    rows = found["rows"]
    assert rows["unet.in04"] == [0.9, 0.1]
    assert rows["unet.in10"] == rows["unet.time"] == rows["text_encoder"] == [0.6, 0.4]
    assert rows["unet.mid"] == [0.5, 0.5]
    assert rows["vae"] is None


def test_a_preset_is_spelled_out_as_it_is_published(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables(bench, capsys, SUM + 'mbw_preset = "GRAD_V"\n')["soft"]["rows"]
    for (component, block), weight in preset("GRAD_V", family("sd15")).items():
        assert rows[".".join(filter(None, (component, block)))][1] == weight


def test_the_table_says_what_the_plan_computes(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor's own weights are those of its block's row."""
    rows = tables(bench, capsys, SUM + f"mbw = {[round(i / 26, 2) for i in range(26)]}\n")["soft"]["rows"]
    session = bench.session()
    plan = session.plan(session.resolve(["r"]))
    blocks = {(n.component, n.canonical): n.block for n in family("sd15").names()}
    made = session.planner().formula(plan.steps["r:soft"]).components
    checked = 0
    for component, table in made.items():
        for row in table:
            if row.method == "weighted_sum":
                place = ".".join(filter(None, (component, blocks[component, row.tensor.name])))
                assert row.parameters["weights"] in (rows[place], rows[place][::-1])
                checked += 1
    assert checked > 100


def test_strengths_of_what_is_baked_are_columns(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    text = '[bake.lit]\ncheckpoint = "base"\nloras.glow = { strength = 0.8, text_encoder = 0.5, mbw_preset = "MIDD" }\n'
    found = tables(bench, capsys, text)["lit"]
    assert (found["setting"], found["columns"]) == ("strength", ["glow"])
    assert found["rows"]["unet.mid"] == [0.8]
    assert found["rows"]["unet.in01"] == [0.0]
    assert found["rows"]["text_encoder"] == [0.5]


def test_some_tensors_of_a_block_have_a_row_of_their_own(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    merge = SUM + 'blocks = { "M00:attn1" = [0.9, 0.1] }\n'
    bake = '[bake.lit]\ncheckpoint = "base"\nloras.glow = { blocks = { "unet:to_q" = 0.3 } }\n'
    found = tables(bench, capsys, merge + bake)
    assert found["soft"]["rows"]["M00:attn1"] == [0.9, 0.1]
    assert found["soft"]["rows"]["unet.mid"] == [0.6, 0.4]
    assert found["lit"]["rows"]["unet:to_q"] == [0.3]
    assert main(["-C", str(bench.root), "plan", "r", "--blocks"]) == 0
    assert ["M00:attn1", "0.9", "0.1"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_person_reads_runs_of_equal_blocks_as_one_row(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(SUM + 'blocks = { "unet.in*" = [0.9, 0.1] }\n')
    capsys.readouterr()
    assert main(["-C", str(bench.root), "plan", "r", "--blocks"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "ink"] in rows
    assert ["unet.in00", "…", "in11", "0.9", "0.1"] in rows
    assert ["vae", "stays"] in rows


def test_a_training_has_no_such_table(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables(bench, capsys, '[lora.style]\non = "base"\ndataset = "drawings"\n') == {}
