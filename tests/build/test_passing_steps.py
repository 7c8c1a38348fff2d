"""What computes nothing: a cast that changes nothing is nowhere shown, a swap is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdforge.cli import main
from tests.build.inline import Bench

RECIPE = """\
[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.5, 0.5]
[cast.same]
checkpoint = "soft"
dtype = "fp16"
[swap.mixed]
checkpoint = "same"
vae = "ink"
[preset]
checkpoint = "mixed"
dtype = "fp16"
"""


@pytest.fixture
def built(bench: Bench) -> Bench:
    bench.recipe(RECIPE)
    bench.build()
    return bench


def said(bench: Bench, capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    assert main(["-C", str(bench.root), *command]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_graph_leads_past_casts_that_change_nothing(built: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert [s.id for s in built.plan().steps.values() if s.idle] == ["r:same", "r:mixed", "r:preset.cast"]
    graph = said(built, capsys, "graph", "r", "--format", "json")
    assert {node["id"] for node in graph["nodes"]} == {"base", "ink", "r:soft", "r:mixed", "r:preset.export"}
    edges = [["base", "r:soft"], ["ink", "r:soft"], ["r:soft", "r:mixed"], ["ink", "r:mixed"]]
    assert graph["edges"] == [*edges, ["r:mixed", "r:preset.export"]]


def test_du_keeps_what_is_known_of_them_with_who_made_it(built: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    owners = said(built, capsys, "du", "--json")["owners"]
    assert {row["target"] for row in owners if "target" in row} == {"soft", "mixed", "preset.export"}
    recipe = next(row for row in owners if "recipe" in row and "target" not in row)
    assert recipe["bytes"] == sum(row["bytes"] for row in owners if "target" in row)


def test_what_a_swap_took_is_among_what_the_card_names(built: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    text = (built.root / "forge.toml").read_text()
    (built.root / "forge.toml").write_text(text.replace('from = "ink"', 'from = "ink"\nlicence = "cc-by-4.0"'))
    built.recipe('[swap.mixed]\ncheckpoint = "base"\nvae = "ink"\n[preset]\ncheckpoint = "mixed"\n')
    built.build()
    assert said(built, capsys, "report", "r", "--json")["path"]
    card = (built.root / "out" / "r" / "card.md").read_text()
    assert "| ink | checkpoint | `ink` | cc-by-4.0 |" in card
    assert "mixed<br/><i>swap</i>" in card
