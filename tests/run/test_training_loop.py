"""The loop that all trainings share: deterministic, resumable to the bit, and silent about the global generator."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdforge.errors import ActionFailed
from sdforge.order import Given
from sdforge.run.states import Stopped, load_state
from sdforge.run.train import ASK_EVERY, pace, run_training
from sdforge.trainings.lora import Lora
from tests.families.toys import write_family
from tests.families.workbench import Taken, take
from tests.run.order import dataset, order, train

BOTH = pytest.mark.parametrize("name", ["lora", "textual_inversion"])
STEPS = 20


def stop_before(step: int) -> Callable[[], bool]:
    counted = itertools.count()
    return lambda: next(counted) == step


@BOTH
def test_a_training_that_stops_and_goes_on_ends_with_the_same_bits(
    name: str, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": STEPS, "schedule": "cosine", "warmup": 3, "flip": True, "caption_dropout": 0.2}
    state = torch.random.get_rng_state()
    straight = train(order(tmp_path / "straight", name, toy, pictures, **changes))
    assert torch.equal(state, torch.random.get_rng_state())
    broken = order(tmp_path / "broken", name, toy, pictures, **changes)
    with pytest.raises(Stopped):
        train(broken, stop_before(9))
    torch.manual_seed(99)
    resumed = train(broken)
    assert resumed.sha256 == straight.sha256
    assert resumed.record["losses"] == straight.record["losses"]
    assert resumed.record["sketch"] == straight.record["sketch"]
    assert resumed.record["resumed"] == [{"step": 9}]
    assert straight.record["resumed"] == []
    assert resumed.record["derived"]["made"] == {}
    torch.random.set_rng_state(state)


def test_a_training_stops_while_it_encodes_its_pictures_and_keeps_them(toy: Taken, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(ASK_EVERY + 2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red cat")
    many = order(tmp_path / "work", "lora", toy, dataset(folder), steps=1)
    with pytest.raises(Stopped):
        train(many, lambda: True)
    assert train(many).record["derived"] == {"reused": {"latents": ASK_EVERY}, "made": {"latents": 2, "texts": 2}}


def test_a_training_that_loses_its_last_state_goes_on_from_the_one_before(
    toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    how = {"states": {"steps": 2}}
    straight = train(order(tmp_path / "straight", "textual_inversion", toy, pictures, steps=8))
    broken = order(tmp_path / "broken", "textual_inversion", toy, pictures, steps=8, how=how)
    with pytest.raises(Stopped):
        train(broken, stop_before(5))
    states = Path(broken.states)
    assert sorted(path.name for path in states.glob("*.json")) == ["4.json", "5.json"]
    (states / "5.safetensors").chmod(0o644)
    (states / "5.safetensors").write_bytes(b"damaged")
    resumed = train(broken)
    assert resumed.record["resumed"] == [{"step": 4}]
    assert resumed.sha256 == straight.sha256


def test_states_are_kept_as_often_as_asked_and_the_last_two_stay(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    how = {"states": {"steps": 2}}
    wanted = order(tmp_path, "textual_inversion", toy, pictures, steps=7, how=how)
    train(wanted)
    assert sorted(path.name for path in Path(wanted.states).glob("*.json")) == ["4.json", "6.json"]


def test_a_longer_training_goes_on_from_a_shorter_ones_state(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """Where nothing that is computed depends on the number of steps."""
    how = {"states": {"steps": 4}}
    train(order(tmp_path / "x", "textual_inversion", toy, pictures, steps=5, how=how))
    longer = train(order(tmp_path / "x", "textual_inversion", toy, pictures, steps=8))
    straight = train(order(tmp_path / "y", "textual_inversion", toy, pictures, steps=8))
    assert longer.record["resumed"] == [{"step": 4}]
    assert longer.sha256 == straight.sha256


def test_pictures_and_their_order_on_the_disk_are_no_matter(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    moved = []
    for i, (path, sha, caption, repeats) in enumerate(pictures.pictures):
        place = tmp_path / f"{9 - i}.png"
        place.write_bytes(Path(path).read_bytes())
        moved.append([str(place), sha, caption, repeats])
    renamed = dataclasses.replace(pictures, pictures=moved[::-1])
    a, b = (
        train(order(tmp_path / str(i), "textual_inversion", toy, given, steps=3))
        for i, given in enumerate((pictures, renamed))
    )
    assert a.sha256 == b.sha256


def test_what_was_encoded_before_is_not_encoded_again(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    first = train(order(tmp_path / "a", "lora", toy, pictures, steps=1))
    second = dataclasses.replace(
        order(tmp_path / "b", "lora", toy, pictures, steps=1), derived=str(tmp_path / "a" / "derived")
    )
    assert first.record["derived"] == {"reused": {}, "made": {"latents": 3, "texts": 4}}
    again = train(second)
    assert again.record["derived"] == {"reused": {"latents": 3, "texts": 4}, "made": {}}
    assert again.sha256 == first.sha256


def test_what_steps_read_again_is_not_counted_as_reused(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdforge.run.derived.MOST", 1)
    wanted = order(tmp_path, "lora", toy, pictures, steps=4)
    train(wanted)
    again = train(dataclasses.replace(wanted, states=""))
    assert again.record["derived"] == {"reused": {"latents": 3, "texts": 4}, "made": {}}


@pytest.mark.parametrize(("of", "reused"), [("sd15", True), ("unclip", False)])
def test_what_captions_say_is_encoded_anew_for_a_u_net_that_is_told_of_pictures(
    of: str, reused: bool, toys: Path, pictures: Given, tmp_path: Path
) -> None:
    """Two of Stable unCLIP share a text encoder, and are told that no picture is shown in 1536 and in 2048 zeros."""
    on = take(write_family(toys / of, of))
    first = order(tmp_path, "lora", on, pictures, steps=1)
    train(first)
    given = first.the("on")
    other = dataclasses.replace(given, identities=given.identities | {"unet": "another"})
    found = train(dataclasses.replace(first, states=str(tmp_path / "b"), inputs=first.inputs | {"on": [other]}))
    assert ("texts" in found.record["derived"]["reused"]) == reused
    assert ("texts" in found.record["derived"]["made"]) != reused


def test_a_training_without_a_cache_gives_the_same(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    kept = train(order(tmp_path / "a", "lora", toy, pictures, steps=2))
    bare = dataclasses.replace(order(tmp_path / "b", "lora", toy, pictures, steps=2), derived="", states="")
    assert train(bare).sha256 == kept.sha256


def test_noise_from_is_the_first_timestep_that_is_trained(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """At the last timestep alone, ε is what a network without training misses by one unit of variance."""
    wanted = order(tmp_path, "textual_inversion", toy, pictures, steps=4, noise_from=999, min_snr=0.0)
    losses = train(wanted).record["losses"]
    assert all(0.5 < loss < 3 for loss in losses)
    weighted = order(tmp_path / "w", "textual_inversion", toy, pictures, steps=4, noise_from=0, min_snr=1e-6)
    assert all(loss < 1e-2 for loss in train(weighted).record["losses"])


def test_bf16_arithmetic_changes_the_result_and_not_the_type_of_what_is_kept(
    toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    exact, fast = (
        train(order(tmp_path / p, "textual_inversion", toy, pictures, steps=2, precision=p)) for p in ("fp32", "bf16")
    )
    assert exact.sha256 != fast.sha256
    assert [row[1] for row in fast.components["embedding"]] == ["F32"]


def test_a_picture_that_cannot_be_read_stops_before_the_first_step(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    given = dataclasses.replace(pictures, pictures=[*pictures.pictures, [str(bad), "x", "", 1]])
    with pytest.raises(ActionFailed, match=r"bad\.png is no picture"):
        train(order(tmp_path / "w", "lora", toy, given))


def test_progress_is_told_with_the_loss(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    wanted = order(tmp_path, "textual_inversion", toy, pictures, steps=3)
    run_training(wanted, lambda **event: told.append(event), lambda: False)
    last = [event for event in told if "step" in event][-1]
    assert (last["step"], last["steps"]) == (3, 3)
    assert last["loss"] > 0
    assert any("buckets" in event for event in told)


def paced(**settings: Any) -> list[float]:
    wanted = Lora.model_construct(**{"steps": 100, "warmup": 0, "schedule": "constant", **settings})
    return [pace(wanted, step) for step in range(wanted.steps)]


def test_captions_of_which_the_end_is_not_read_are_talked_about(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    said: list[str] = []

    def report(**event: Any) -> None:
        said.extend([event["remark"]] if "remark" in event else [])

    first, *rows = pictures.pictures
    long = [*first[:2], "red " * 75 + "<toy>", 1]
    for row in (first, long):
        given = dataclasses.replace(pictures, pictures=[row, *rows])
        run_training(order(tmp_path / row[2][:5], "textual_inversion", toy, given, steps=1), report, lambda: False)
    (remark,) = said
    assert remark.startswith("a caption is longer than the 75 tokens that are read: 'red red ")


def test_the_learning_rate_rises_over_the_warm_up() -> None:
    rates = paced(warmup=4)
    assert rates[:6] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert set(rates[4:]) == {1.0}


def test_a_cosine_falls_to_two_percent_over_the_second_half() -> None:
    rates = paced(schedule="cosine", warmup=10)
    assert set(rates[10:50]) == {1.0}
    assert rates[50] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert rates[75] == pytest.approx(0.51, abs=0.01)
    assert rates[-1] == pytest.approx(0.02, abs=0.001)


def test_a_warm_up_longer_than_half_is_followed_by_the_fall() -> None:
    rates = paced(schedule="cosine", warmup=80)
    assert max(rates) == rates[79] == 1
    assert rates[-1] < 0.05


def test_a_kept_state_holds_values_and_the_optimisers_memory(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wanted = order(tmp_path, "textual_inversion", toy, pictures, steps=3, how={"states": {"steps": 1}})
    train(wanted)
    state = load_state(Path(wanted.states), 10)
    assert state is not None
    parts = {name.rpartition(".")[2] for name in state.tensors}
    assert parts == {"value", "step", "exp_avg", "exp_avg_sq"}
    assert len(state.notes["losses"]) == state.step == 2
