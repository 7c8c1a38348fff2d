"""A chain of formulas is computed in one pass: what only the next one takes is never written, and no byte differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdforge.cli import main
from sdforge.errors import ActionFailed
from sdforge.plan import Step
from sdforge.planner import Planner
from sdforge.room import room
from tests.build.inline import Bench

SOFT = '[weighted_sum.soft]\ncheckpoints = ["base", "ink"]\nweights = [0.6, 0.4]\n'
BAKED = '[bake.baked]\ncheckpoint = "soft"\nloras.glow = { strength = 0.7 }\n'
WIDE = '[cast.wide]\ncheckpoint = "baked"\ndtype = "fp32"\n'
CHAIN = SOFT + BAKED + WIDE
PRESET = '[preset]\ncheckpoint = "soft"\nbake = { glow = 0.7 }\ndtype = "bf16"\n'
TRAINING = '[lora.style]\non = "soft"\ndataset = "drawings"\nrank = 2\nsteps = 2\nbatch = 1\nprecision = "fp32"\n'


def in_steps(bench: Bench, root: Path, *targets: str) -> Bench:
    """Build every target by itself, in a copy that has nothing."""
    other = bench.clone(root)
    for target in targets:
        other.build(target)
    return other


def test_a_chain_runs_as_one_action_and_its_links_are_not_needed(bench: Bench) -> None:
    bench.recipe(CHAIN)
    assert bench.states() == {"soft": "unneeded", "baked": "unneeded", "wide": "build"}
    assert bench.built() == ["wide"]
    assert len(bench.packs()) == 1
    assert bench.states() == {"soft": "unneeded", "baked": "unneeded", "wide": "reuse"}


def test_one_pass_and_single_steps_give_the_same_bytes_and_digests(bench: Bench, tmp_path: Path) -> None:
    """Values are rounded to fp16 after the sum and after the bake, as if they had been written."""
    bench.recipe(CHAIN)
    bench.build()
    stepwise = in_steps(bench, tmp_path / "steps", "soft", "baked", "wide")
    assert len(stepwise.packs()) == 3
    assert bench.bytes_of("wide") == stepwise.bytes_of("wide")
    digests = [each.session().lock.targets["r:wide"] for each in (bench, stepwise)]
    assert digests[0] == digests[1]


def test_a_presets_merge_and_bake_are_part_of_its_cast(bench: Bench, tmp_path: Path) -> None:
    bench.recipe(SOFT + PRESET)
    assert bench.built() == ["preset.cast", "preset.export"]
    stepwise = in_steps(bench, tmp_path / "steps", "soft", "preset.bake", "r")
    files = [(each.root / "out" / "r" / "r.safetensors").read_bytes() for each in (bench, stepwise)]
    assert files[0] == files[1]


def test_what_a_formula_passes_on_of_a_link_is_kept_with_its_result(bench: Bench) -> None:
    """A bake of the U-Net alone carries the text encoder that the sum before it would have made."""
    bench.recipe(SOFT + BAKED)
    assert bench.built() == ["baked"]
    assert bench.plan().steps["r:baked"].makers == dict.fromkeys(("unet", "text_encoder"), "r:baked") | {
        "vae": "base",
        "tokenizer": "base",
    }
    assert bench.states() == {"soft": "unneeded", "baked": "reuse"}


def test_a_link_that_a_training_reads_is_written(bench: Bench) -> None:
    bench.recipe(CHAIN + TRAINING)
    assert bench.states() == {"soft": "build", "baked": "unneeded", "wide": "build", "style": "build"}


def test_a_link_that_is_wanted_itself_is_written(bench: Bench) -> None:
    bench.recipe(CHAIN)
    assert bench.states("soft", "wide") == {"soft": "build", "baked": "unneeded", "wide": "build"}


def test_a_link_that_an_export_writes_is_written(bench: Bench) -> None:
    bench.recipe(CHAIN + '[preset]\ncheckpoint = "soft"\n')
    assert bench.states("wide", "r")["soft"] == "build"


def test_a_link_that_two_formulas_take_is_computed_once(bench: Bench) -> None:
    bench.recipe(SOFT + BAKED + BAKED.replace("baked", "more").replace("0.7", "0.9"))
    assert bench.states() == {"soft": "build", "baked": "build", "more": "build"}


def test_a_link_under_two_names_in_two_recipes_is_computed_once(bench: Bench) -> None:
    bench.recipe(SOFT + BAKED)
    bench.recipe((SOFT + BAKED).replace("soft", "tender").replace("0.7", "0.9"), "other")
    states = bench.states("r:baked", "other:baked")
    assert (states["soft"], states["tender"]) == ("build", "build")


def test_one_chain_in_two_recipes_runs_once(bench: Bench) -> None:
    bench.recipe(SOFT + BAKED)
    bench.recipe((SOFT + BAKED).replace("soft", "tender").replace("baked", "done"), "other")
    states = bench.states("r:baked", "other:done")
    assert states == {"soft": "unneeded", "tender": "unneeded", "baked": "build", "done": "build"}
    assert len(bench.built("r:baked", "other:done")) == 1
    assert set(bench.states("r:baked", "other:done").values()) == {"unneeded", "reuse"}


def test_a_link_that_was_made_and_is_lost_is_made_by_itself(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    (pack,) = bench.packs()
    (bench.root / "cache" / "v1" / "objects" / pack[:2] / pack).unlink()
    bench.recipe(SOFT + BAKED)
    assert bench.built() == ["soft", "baked"]


def test_two_formulas_of_one_pass_may_share_a_link_part_by_part(bench: Bench, tmp_path: Path) -> None:
    """An insert takes the sum's text encoder and a bake its U-Net: both end in the bake."""
    named = '[insert.named]\ncheckpoint = "soft"\nembeddings.word = {}\n'
    bench.recipe(SOFT + named + BAKED.replace('"soft"', '"named"'))
    assert bench.states() == {"soft": "unneeded", "named": "unneeded", "baked": "build"}
    bench.build()
    stepwise = in_steps(bench, tmp_path / "steps", "soft", "named", "baked")
    assert bench.bytes_of("baked") == stepwise.bytes_of("baked")


def test_what_an_insert_passes_on_unread_is_written_by_the_sum(bench: Bench) -> None:
    """The U-Net is no part of an insert's key, so no part of its result either."""
    bench.recipe(SOFT + '[insert.named]\ncheckpoint = "soft"\nembeddings.word = {}\n')
    assert bench.states() == {"soft": "build", "named": "build"}
    bench.build()
    assert bench.plan().to_do == []


def test_a_link_is_built_when_it_is_needed_later_and_equals_what_was_computed(bench: Bench, tmp_path: Path) -> None:
    bench.recipe(CHAIN)
    bench.build()
    assert bench.built("soft") == ["soft"]
    stepwise = in_steps(bench, tmp_path / "steps", "soft")
    assert bench.bytes_of("soft") == stepwise.bytes_of("soft")
    assert bench.states() == {"soft": "reuse", "baked": "unneeded", "wide": "reuse"}


def test_of_a_link_that_is_there_the_bytes_are_read(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(CHAIN)
    assert bench.built() == ["wide"]
    assert bench.methods() == {"bake", "cast"}


def test_a_changed_end_reads_what_the_pass_before_it_left(bench: Bench) -> None:
    """Of the sum only the tensors into which the LoRA goes are computed again: the others lie in the earlier pack."""
    bench.recipe(SOFT + BAKED)
    bench.build()
    bench.recipe(SOFT + BAKED.replace("0.7", "0.9"))
    bench.build()
    assert bench.computed("baked") == {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"}


def test_a_link_whose_sum_differs_from_the_lock_is_found_when_the_end_is(bench: Bench) -> None:
    """Behind equal pins a formula must give the pinned digest, also where its links were never written."""
    bench.recipe(CHAIN)
    bench.build()
    row = bench.session().lock.targets["r:wide"]
    lock = bench.root / "forge.lock"
    lock.write_text(lock.read_text().replace(row["digest"], "f" * 64))
    for path in (bench.root / "cache").rglob("*.json"):
        path.unlink()
    (bench.root / "cache" / "v1" / "index.db").unlink()
    assert "the lock says ffffffffffff" in bench.failure("wide").message


def test_a_number_that_no_link_can_hold_stops_with_the_tensors_name(bench: Bench) -> None:
    bench.recipe(CHAIN.replace("[0.6, 0.4]", "[60000.0, 60000.0]"))
    error = bench.failure("wide")
    assert isinstance(error, ActionFailed)
    assert "which does not fit into float16" in error.message


def test_every_link_of_a_long_chain_is_listed_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    list_ = Planner._list

    def counted(planner: Planner, step: Step) -> Any:
        listed.append(step.id)
        return list_(planner, step)

    monkeypatch.setattr(Planner, "_list", counted)
    links = '[weighted_sum.s0]\ncheckpoints = ["base", "ink"]\nweights = [0.5, 0.5]\n'
    for i in range(1, 12):
        links += f'[weighted_sum.s{i}]\ncheckpoints = ["s{i - 1}", "ink"]\nweights = [0.{i + 10}, 0.5]\n'
    bench.recipe(links)
    session = bench.session()
    room(session, session.plan(session.resolve(["r"])))
    assert listed == [f"r:s{i}" for i in range(12)]


def test_plan_and_why_say_where_a_link_is_computed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe(CHAIN)
    assert main(["-C", str(bench.root), "plan", "r"]) == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["soft"].endswith("computed within wide")
    assert " unneeded " in rows["baked"]
    assert main(["-C", str(bench.root), "why", "soft"]) == 0
    assert capsys.readouterr().out == "soft is not made by itself: wide alone takes it, and computes it within\n"


def test_deltas_and_random_masks_are_links_too(bench: Bench, tmp_path: Path) -> None:
    """A delta passes nothing on; a mask is drawn from the tensor's own name, in whichever pass it is computed."""
    links = {
        "d": '[subtract.d]\na = "ink"\nb = "base"\n',
        "f": '[add.f]\na = "base"\ndelta = "d"\nweight = 0.5\n',
        "g": '[dare.g]\nbase = "base"\ncheckpoints = ["f"]\ndensity = 0.5\nseed = 3\n',
    }
    bench.recipe("".join(links.values()))
    assert bench.states() == {"d": "unneeded", "f": "unneeded", "g": "build"}
    bench.build()
    stepwise = in_steps(bench, tmp_path / "steps", *links)
    assert bench.bytes_of("g") == stepwise.bytes_of("g")
