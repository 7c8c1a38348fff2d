"""Swapping: components move with the facts that belong to them, and nothing is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdforge.artifact import Artifact
from sdforge.cli import main
from sdforge.errors import RecipeError, UsageError
from sdforge.session import open_session
from tests.families.workbench import Taken, change_json

RECIPE = """\
family = "sd15"

[swap.mixed]
checkpoint = "toy"
{takes}
"""


@pytest.fixture
def root(toy: Taken, other: Taken, toys: Path, tmp_path: Path) -> Path:
    """A project with both toys, the other one with facts of its own."""
    assert toy.artifact.kind == other.artifact.kind
    for name in ("toy", "other"):
        shutil.copytree(toys / name, tmp_path / name)
    change: dict[str, dict[str, Any]] = {
        "vae/config.json": {"scaling_factor": 0.25},
        "unet/config.json": {"sample_size": 16},
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"},
        "text_encoder/config.json": {"hidden_act": "gelu"},
    }
    for file, values in change.items():
        change_json(tmp_path / "other" / file, values)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n[source.other]\nfrom = "other"\n')
    return tmp_path


def swapped(root: Path, takes: str) -> Artifact:
    (root / "recipes" / "r.toml").write_text(RECIPE.format(takes=takes))
    session = open_session(root)
    session.plan(session.resolve(["r:mixed"]))
    found = session.planner().steps["r:mixed"].artifact
    assert found is not None
    return found


def parts(found: Artifact) -> dict[str, str]:
    return {name: component.identity for name, component in found.components.items()}


@pytest.mark.parametrize(
    ("takes", "moved", "facts"),
    [
        ('tokenizer = "other"', ("tokenizer",), {}),
        ('vae = "other"', ("vae",), {"latent_scaling": 0.25}),
        ('unet = "other"', ("unet",), {"prediction": "v_prediction", "resolution": 128}),
        ('text_encoder = "other"', ("text_encoder", "tokenizer"), {"text_activation": "gelu"}),
        ('vae = "other"\ntext_encoder = "other"', ("vae", "text_encoder", "tokenizer"), {"latent_scaling": 0.25}),
    ],
)
def test_a_component_moves_with_its_facts(
    takes: str, moved: tuple[str, ...], facts: dict[str, object], root: Path, toy: Taken, other: Taken
) -> None:
    found = swapped(root, takes)
    expected = {name: (other if name in moved else toy).identity(name) for name in toy.artifact.components}
    assert parts(found) == expected
    assert facts.items() <= found.facts.items()
    stay = {"resolution", "latent_scaling"} - set(facts)
    assert all(found.facts[name] == toy.artifact.facts[name] for name in stay)


def test_a_swap_with_itself_is_the_checkpoint(root: Path, toy: Taken) -> None:
    assert swapped(root, 'vae = "toy"').digest == toy.artifact.digest


def test_a_checkpoint_without_the_part_is_refused(root: Path) -> None:
    shutil.rmtree(root / "other" / "vae")
    with pytest.raises((UsageError, RecipeError), match="no vae"):
        swapped(root, 'vae = "other"')


def test_a_merge_with_a_unet_alone_is_refused_with_the_way_out(root: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(root / "other" / part)
    recipe = 'family = "sd15"\n[weighted_sum.m]\ncheckpoints = ["toy", "other"]\nweights = [0.5, 0.5]\n'
    (root / "recipes" / "r.toml").write_text(recipe)
    session = open_session(root)
    with pytest.raises(RecipeError) as caught:
        session.plan(session.resolve(["r:m"]))
    (problem,) = caught.value.problems
    assert problem.hint.startswith("it has no text_encoder at all: `swap` takes that from another checkpoint")


def test_a_source_that_is_no_checkpoint_predicts_nothing(root: Path) -> None:
    shutil.copytree(root / "toy" / "tokenizer", root / "words")
    with (root / "forge.toml").open("a") as file:
        file.write('[source.words]\nfrom = "words"\nprediction = "v_prediction"\n')
    with pytest.raises(RecipeError, match="words is no checkpoint, and states prediction"):
        swapped(root, 'tokenizer = "words"')


@pytest.mark.parametrize("base", ["toy", "mixed"])
def test_a_tokenizer_with_other_words_than_the_text_encoder_reads_is_refused(root: Path, base: str) -> None:
    """Its last word, where prompts end, would be none of the table's rows."""
    shutil.copytree(root / "toy" / "tokenizer", root / "words")
    path = root / "words" / "tokenizer.json"
    told = json.loads(path.read_text())
    count = len(told["model"]["vocab"])
    told["model"]["vocab"]["more</w>"] = count
    path.write_text(json.dumps(told))
    with (root / "forge.toml").open("a") as file:
        file.write('[source.words]\nfrom = "words"\n')
    recipe = RECIPE.format(takes='text_encoder = "other"')
    recipe += f'[swap.spoken]\ncheckpoint = "{base}"\ntokenizer = "words"\n'
    (root / "recipes" / "r.toml").write_text(recipe)
    session = open_session(root)
    refusal = f"`words` has {count + 1} words, and the text encoders have rows for {count}"
    with pytest.raises(RecipeError, match=refusal):
        session.plan(session.resolve(["r:spoken"]))


def test_a_swap_is_in_the_plan_and_says_whose_parts_it_has(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "recipes" / "r.toml").write_text(RECIPE.format(takes='vae = "other"') + '[preset]\ncheckpoint = "mixed"\n')
    monkeypatch.chdir(root)

    def said(*command: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([*command]) == code
        found = capsys.readouterr()
        return found.out + found.err

    first, *_ = said("plan", "r").splitlines()
    assert first.split()[1:4] == ["mixed", "swap", "reuse"]
    assert first.endswith("nothing is computed")
    assert [row["target"] for row in json.loads(said("plan", "r", "--json"))["actions"]] == [
        "r:mixed",
        "r:preset.export",
    ]
    assert "nothing is computed for it" in said("why", "mixed")
    assert sorted(said("show", "mixed").splitlines()[1:5]) == [
        "  text_encoder of toy",
        "  tokenizer    of toy",
        "  unet         of toy",
        "  vae          of other",
    ]
    assert json.loads(said("show", "mixed", "--json"))["components"]["vae"] == "other"
    assert "r:mixed has no run" in said("log", "mixed", code=2)
    assert "mixed              swap               reuse" in said("build", "r:mixed")
