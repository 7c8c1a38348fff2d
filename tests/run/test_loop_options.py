"""What the shared loop can do beside the plain way: each option alone, on a toy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdforge.errors import ActionFailed, ResourceError, UsageError
from sdforge.families.load import WordsAlone
from sdforge.order import Given, Outcome
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture, read_mask, shuffled
from sdforge.run.memory import Choice, choose
from sdforge.run.optimizers import Average
from sdforge.run.states import Stopped
from sdforge.run.tensors import DTYPES
from sdforge.run.watch import Validation
from tests.families.workbench import Taken
from tests.run.order import dataset, order, train

WORD = "textual_inversion"


def rows_of(outcome: Outcome, work: Path) -> dict[str, Tensor]:
    """The tensors that a training saved."""
    data = (work / outcome.pack).read_bytes()
    found = {}
    for rows in outcome.components.values():
        for name, dtype, shape, _, _, offset in rows:
            tensor = torch.frombuffer(bytearray(data[offset:]), dtype=DTYPES[dtype], count=torch.Size(shape).numel())
            found[name] = tensor.reshape(shape)
    return found


def same_after_a_stop(work: Path, stop: int, *arguments: Any, **changes: Any) -> None:
    """A training with these settings that stops before a step and goes on ends with the same bits."""
    straight = train(order(work / "straight", *arguments, **changes))
    broken = order(work / "broken", *arguments, **changes)
    counted = itertools.count()
    with pytest.raises(Stopped):
        train(broken, lambda: next(counted) == stop)
    assert train(broken).sha256 == straight.sha256


# -- captions ----------------------------------------------------------------------------------------------------------


def test_shuffling_keeps_every_part_and_the_first_ones_in_place() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = {shuffled("a cat, red, small, old", 1, draw) for _ in range(60)}
    assert len(seen) == 6
    assert all(caption.startswith("a cat, ") for caption in seen)
    assert {tuple(sorted(caption.split(", "))) for caption in seen} == {("a cat", "old", "red", "small")}


def test_shuffled_captions_are_not_encoded_once_for_all(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    many = dataclasses.replace(pictures, pictures=[[*row[:2], "a, b, c, d", row[3]] for row in pictures.pictures])
    plain = train(order(tmp_path / "plain", "lora", toy, many, steps=3))
    mixed = train(order(tmp_path / "mixed", "lora", toy, many, steps=3, shuffle=True))
    assert plain.record["losses"] != mixed.record["losses"]
    assert "texts" not in mixed.record["derived"]["made"]
    same_after_a_stop(tmp_path, 2, "lora", toy, many, steps=4, shuffle=True, keep_tokens=1)


# -- noise and masks ---------------------------------------------------------------------------------------------------


def test_a_noise_offset_changes_the_noise_and_zero_does_not(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    none, zero, some = (
        train(order(tmp_path / str(i), WORD, toy, pictures, steps=2, **more)).record["losses"]
        for i, more in enumerate(({}, {"noise_offset": 0.0}, {"noise_offset": 0.3}))
    )
    assert none == zero != some


def masked(folder: Path, mask: Image.Image, pictures: Given) -> Given:
    folder.mkdir(parents=True, exist_ok=True)
    mask.save(folder / "mask.png")
    return dataclasses.replace(pictures, pictures=[[*row, str(folder / "mask.png")] for row in pictures.pictures])


def test_a_mask_of_all_white_changes_nothing(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    white = masked(tmp_path / "m", Image.new("L", (64, 64), 255), pictures)
    a = train(order(tmp_path / "a", WORD, toy, pictures, steps=2)).record["losses"]
    b = train(order(tmp_path / "b", WORD, toy, white, steps=2)).record["losses"]
    assert a == pytest.approx(b, rel=1e-6)


def test_the_loss_is_the_mean_over_what_the_mask_leaves(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """Two masks that share the picture between them: their losses have the plain one as their mean."""
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    right = left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    losses = [
        train(order(tmp_path / str(i), WORD, toy, given, steps=1)).record["losses"][0]
        for i, given in enumerate(
            (pictures, masked(tmp_path / "l", left, pictures), masked(tmp_path / "r", right, pictures))
        )
    ]
    assert losses[1] != pytest.approx(losses[2], rel=1e-3)
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_a_mask_that_leaves_nothing_is_refused(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    black = masked(tmp_path / "m", Image.new("L", (64, 64), 0), pictures)
    with pytest.raises(ActionFailed, match="leaves nothing"):
        train(order(tmp_path, WORD, toy, black))


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (21, 20)])
def test_a_mask_of_the_pictures_shape_may_be_smaller(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size, 255).save(tmp_path / "mask.png")
    read_mask(Picture("x.png", "x", "", (64, 64), (64, 64), str(tmp_path / "mask.png")))


def test_a_mask_of_another_shape_is_refused(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """It would be cut where the picture is not, and lie beside what it is drawn for."""
    wide = masked(tmp_path / "m", Image.new("L", (64, 32), 255), pictures)
    with pytest.raises(ActionFailed, match="has 64 × 32 pixels and the picture 64 × 64"):
        train(order(tmp_path, WORD, toy, wide))


def test_alpha_is_a_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 64, 32))
    image.save(tmp_path / "x.png")
    mask = read_mask(Picture(str(tmp_path / "x.png"), "x", "", (64, 64), (64, 64), "alpha"))
    assert mask.shape == (1, 1, 8, 8)
    assert mask[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


# -- a prior -----------------------------------------------------------------------------------------------------------


def with_prior(work: Path, name: str, toy: Taken, pictures: Given, prior: Given, **changes: Any) -> Any:
    plain = order(work, name, toy, pictures, prior="class", **changes)
    return dataclasses.replace(plain, inputs=plain.inputs | {"prior": [prior]})


def test_what_is_learned_from_is_the_same_beside_a_prior(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    """With weight 0 the prior is there and counts for nothing: the losses are those without it."""
    alone = train(order(tmp_path / "a", WORD, toy, pictures, steps=3))
    beside = train(with_prior(tmp_path / "b", WORD, toy, pictures, pictures, steps=3, prior_weight=0.0))
    assert alone.record["losses"] == pytest.approx(beside.record["losses"], rel=1e-5)
    heavy = train(with_prior(tmp_path / "c", WORD, toy, pictures, pictures, steps=3, prior_weight=1.0))
    assert heavy.record["losses"][0] > 1.2 * alone.record["losses"][0]


def test_a_prior_of_another_shape_is_shown_in_a_pass_of_its_own(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.new("RGB", (128, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a house")
    outcome = train(with_prior(tmp_path / "w", WORD, toy, pictures, dataset(folder), steps=2, resolution=128))
    assert all(loss > 0 for loss in outcome.record["losses"])


# -- averages and optimisers -------------------------------------------------------------------------------------------


def test_an_average_is_what_its_recursion_says() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average(0.5, {"x": parameter})
    expected = 0.0
    for step in range(3):
        with torch.no_grad():
            parameter.fill_(float(step + 1))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    assert average.values["x"].tolist() == pytest.approx([expected] * 3, rel=1e-6)
    average.exchange()
    assert parameter.tolist() == pytest.approx([expected] * 3, rel=1e-6)
    average.exchange()
    assert parameter.tolist() == [3, 3, 3]


def test_the_average_is_what_is_saved_and_survives_a_stop(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    plain = train(order(tmp_path / "plain", WORD, toy, pictures, steps=4))
    mean = train(order(tmp_path / "mean", WORD, toy, pictures, steps=4, ema=0.9))
    assert mean.record["losses"] == plain.record["losses"]
    assert mean.sha256 != plain.sha256
    same_after_a_stop(tmp_path, 2, WORD, toy, pictures, steps=4, ema=0.9)


def test_schedule_free_learns_and_survives_a_stop(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    free: dict[str, Any] = {"optimizer": "schedule_free", "schedule": "constant", "steps": 5, "learning_rate": 1e-2}
    plain = train(order(tmp_path / "plain", WORD, toy, pictures, **free | {"optimizer": "adamw"}))
    assert train(order(tmp_path / "free", WORD, toy, pictures, **free)).sha256 != plain.sha256
    same_after_a_stop(tmp_path, 3, WORD, toy, pictures, **free)


def test_eight_bits_are_for_cuda(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CUDA") as caught:
        train(order(tmp_path, WORD, toy, pictures, optimizer="adamw8bit"))
    assert "adamw" in caught.value.hint


def test_an_optimiser_whose_package_is_missing_is_named(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(UsageError, match="schedulefree") as caught:
        train(order(tmp_path, WORD, toy, pictures, optimizer="schedule_free"))
    assert "sdforge[schedule-free]" in caught.value.hint


# -- memory ------------------------------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (20, Choice(8, False, False)),  # all of it fits
        (14, Choice(8, False, True)),  # what no step runs has to wait outside
        (9, Choice(4, False, True)),  # halves of the batch
        (6, Choice(8, True, True)),  # activations are computed twice
        (4.2, Choice(4, True, True)),
        (2.8, Choice(1, True, True)),
    ],
)
def test_the_fastest_way_that_fits_is_chosen(budget: float, chosen: Choice) -> None:
    """Weights 2 GB, idle networks 4 GB, a picture 1.2 GB, or 0.4 GB where activations are computed twice."""
    assert choose(int(budget * GB), 2 * GB, 4 * GB, int(1.2 * GB), int(0.4 * GB), 8) == chosen


def test_what_can_never_fit_says_what_it_needs() -> None:
    with pytest.raises(ResourceError, match=r"2 GB are too little.*about 2\.67 GB") as caught:
        choose(2 * GB, 2 * GB, 4 * GB, int(1.2 * GB), int(0.4 * GB), 8)
    assert caught.value.exit_code == 4


def test_parts_of_a_batch_add_up_to_the_whole(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pictures at once, or two and two with activations computed twice: the same losses and factors, nearly."""
    given: dict[str, Any] = {"batch": 4, "steps": 3, "rank": 2, "dtype": "fp32"}
    whole = train(order(tmp_path / "a", "lora", toy, pictures, **given))
    asked: list[tuple[int, ...]] = []

    def halves(*numbers: int) -> Choice:
        asked.append(numbers)
        return Choice(2, True, True)

    monkeypatch.setattr("sdforge.run.train.choose", halves)
    parts = train(order(tmp_path / "b", "lora", toy, pictures, how={"vram": 10**9}, **given))
    ((budget, fixed, idle, picture, checkpointed, batch),) = asked
    assert (budget, batch) == (10**9, 4)
    assert picture > 1.5 * checkpointed > 0
    assert min(fixed, idle) > 0
    assert parts.record["fits"] == "micro-batch 2, gradient checkpointing, text encoders and VAE off the device"
    assert parts.fingerprint["micro_batch"] == 2
    assert "micro_batch" not in whole.fingerprint
    assert parts.record["losses"] == pytest.approx(whole.record["losses"], rel=1e-5)
    a, b = rows_of(whole, tmp_path / "a"), rows_of(parts, tmp_path / "b")
    scale = max(float(t.abs().max()) for t in a.values())
    assert all(float((a[n] - b[n]).abs().max()) < 1e-2 * scale for n in a)


def test_what_is_dropped_of_a_picture_is_the_same_in_whatever_part_it_is_computed(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a prior, which is shown in the same pass."""
    given: dict[str, Any] = {"batch": 3, "steps": 3, "dropout": 0.5, "learning_rate": 0.05, "prior": pictures}
    whole = train(order(tmp_path / "a", "hypernetwork", toy, pictures, **given))
    monkeypatch.setattr("sdforge.run.train.choose", lambda *_: Choice(2, False, False))
    parts = train(order(tmp_path / "b", "hypernetwork", toy, pictures, how={"vram": 10**9}, **given))
    assert parts.record["losses"] == pytest.approx(whole.record["losses"], rel=1e-5)


def test_activations_that_are_computed_twice_give_the_same_bits(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(order(tmp_path / "a", "lora", toy, pictures, steps=2))
    monkeypatch.setattr("sdforge.run.train.choose", lambda *_: Choice(2, True, False))
    twice = train(order(tmp_path / "b", "lora", toy, pictures, steps=2, how={"vram": 10**9}))
    assert twice.sha256 == plain.sha256
    assert twice.fingerprint == plain.fingerprint


def test_what_every_number_that_is_trained_takes_is_counted(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average takes four bytes more; of bf16 weights the moments are fp32, but neither weights nor gradients."""
    fixed: list[int] = []

    def noted(_: int, held: int, *__: int) -> Choice:
        fixed.append(held)
        return Choice(2, False, False)

    monkeypatch.setattr("sdforge.run.train.choose", noted)
    for i, changes in enumerate([{}, {"ema": 0.9}, {"weights": "bf16"}]):
        given: dict[str, Any] = {"precision": "bf16", "steps": 1, "how": {"vram": 10**9}, **changes}
        rows = train(order(tmp_path / str(i), "fine_tune", toy, pictures, **given)).components["unet"]
    numbers = sum(math.prod(row[2]) for row in rows)
    assert (fixed[1] - fixed[0], fixed[2] - fixed[0]) == (4 * numbers, -4 * numbers)


@pytest.mark.parametrize("lost", [False, True])
def test_networks_that_wait_off_the_device_are_asked_nothing(
    lost: bool, toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out pictures and what captions say are encoded before, and they come back for what is drawn meanwhile.

    They do so too for what memory does not hold and the cache has lost.
    """

    def chosen(*_: Any) -> Choice:
        if lost:
            shutil.rmtree(tmp_path / "derived")
        return Choice(2, False, True)

    monkeypatch.setattr("sdforge.run.derived.MOST", 1 if lost else 1 << 30)
    monkeypatch.setattr("sdforge.run.train.choose", chosen)
    away: set[int] = set()
    move, asked = nn.Module.to, []

    def moved(network: nn.Module, *place: Any, **more: Any) -> nn.Module:
        if place in (("cpu",), (torch.device("cpu"),)):  # the loop calls the device by name only where it puts them
            (away.add if place == ("cpu",) else away.discard)(id(network))
        return move(network, *place, **more)

    def guard(name: str, network: Callable[[Any], nn.Module]) -> None:
        kind = WordsAlone if name == "encode_text" else Diffusion
        real = getattr(kind, name)

        def ask(self: Any, *arguments: Any, **more: Any) -> Any:
            asked.append(name)
            assert id(network(self)) not in away, name
            return real(self, *arguments, **more)

        monkeypatch.setattr(kind, name, ask)

    monkeypatch.setattr(nn.Module, "to", moved)
    for name in ("encode_picture", "decode_picture"):
        guard(name, lambda diffusion: diffusion.vae)
    guard("encode_text", lambda diffusion: diffusion.text_encoders["text_encoder"])
    monkeypatch.setattr("sdforge.run.watch.SAMPLE_STEPS", 1)
    how = {"vram": 10**9, "samples": {"steps": 9, "prompts": ["a"]}}
    given = {"preserve": "cat", "trigger": "<toy>", "steps": 2, "how": how}
    outcome = train(order(tmp_path, "lora", toy, watched(pictures), **given))
    assert len(away) == 2
    if lost:
        assert outcome.record["derived"]["made"]["latents"] > len(pictures.pictures)
    assert set(asked) == {"encode_picture", "decode_picture", "encode_text"}
    assert [row[0] for row in outcome.record["samples"]] == [0, 2]


# -- watching ----------------------------------------------------------------------------------------------------------


def watched(pictures: Given) -> Given:
    return dataclasses.replace(pictures, held_out=1)


def test_held_out_pictures_are_judged_at_fixed_noises_and_change_nothing(
    toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    held = watched(pictures)
    bare = dataclasses.replace(held, held_out=0, pictures=[])
    learned = [row for row in held.pictures if row[1] != _held_sha(held)]
    a = train(order(tmp_path / "a", WORD, toy, dataclasses.replace(bare, pictures=learned), steps=10))
    b = train(order(tmp_path / "b", WORD, toy, held, steps=10))
    assert a.sha256 == b.sha256
    assert "validation" not in a.record
    steps = [step for step, _ in b.record["validation"]]
    assert steps == list(range(11))
    assert b.record["recommended"] == (min(b.record["validation"], key=lambda row: row[1])[0] or None)


@pytest.mark.parametrize(
    ("losses", "step"), [([0.3, 0.2, 0.1], 20), ([0.3, 0.1, 0.2], 10), ([0.1, 0.2, 0.3], None), ([], None)]
)
def test_the_step_of_least_loss_is_recommended_if_it_is_better_than_none(losses: list[float], step: int | None) -> None:
    validation = Validation([], None, None, 20)  # type: ignore[arg-type]  # nothing is judged here
    validation.found = [[10 * i, loss] for i, loss in enumerate(losses)]
    assert validation.recommended == step


def _held_sha(given: Given) -> str:
    from sdforge.run.images import split

    return str(split(given)[1][0][1])


def test_validation_goes_on_where_it_stopped(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    straight = train(order(tmp_path / "a", WORD, toy, watched(pictures), steps=6))
    broken = order(tmp_path / "b", WORD, toy, watched(pictures), steps=6)
    counted = itertools.count()
    with pytest.raises(Stopped):
        train(broken, lambda: next(counted) == 3)
    assert train(broken).record["validation"] == straight.record["validation"]


def test_samples_are_drawn_on_the_way_and_disturb_nothing(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wish = {"samples": {"steps": 2, "prompts": ["a house"]}}
    state = torch.random.get_rng_state()
    plain = train(order(tmp_path / "a", WORD, toy, pictures, steps=3))
    drawn = train(order(tmp_path / "b", WORD, toy, pictures, steps=3, how=wish))
    assert torch.equal(state, torch.random.get_rng_state())
    assert plain.sha256 == drawn.sha256
    assert [row[:2] for row in drawn.record["samples"]] == [[0, "a house"], [2, "a house"], [3, "a house"]]
    assert all(Image.open(row[2]).size == (64, 64) for row in drawn.record["samples"])


def test_every_step_is_a_line_of_json(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    wanted = order(tmp_path, WORD, toy, watched(pictures), steps=3)
    losses = train(wanted).record["losses"]
    lines = [json.loads(line) for line in (Path(wanted.states) / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in lines if "loss" in row] == losses
    assert [row["step"] for row in lines if "validation" in row] == [0, 1, 2, 3]
    assert all(row["learning_rate"] > 0 for row in lines if "loss" in row)


def test_tensorboard_gets_the_same_numbers(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wanted = order(tmp_path, WORD, toy, pictures, steps=3, how={"tensorboard": str(tmp_path / "board")})
    losses = train(wanted).record["losses"]
    found = events.EventAccumulator(str(tmp_path / "board" / "toy")).Reload()
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("stop", [1, 3])
def test_everything_at_once_survives_a_stop(stop: int, toy: Taken, pictures: Given, tmp_path: Path) -> None:
    everything: dict[str, Any] = {
        "steps": 5,
        "shuffle": True,
        "noise_offset": 0.1,
        "ema": 0.5,
        "flip": True,
        "caption_dropout": 0.3,
        "schedule": "cosine",
        "how": {"samples": {"steps": 2, "prompts": ["a"]}},
    }
    same_after_a_stop(tmp_path, stop, WORD, toy, watched(pictures), **everything)
