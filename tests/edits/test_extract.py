"""Extracting: what one checkpoint has learned beyond another, found again as the LoRA it was."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.edits import extract, resize
from sdforge.errors import ActionFailed, ResourceError
from sdforge.order import Order
from sdforge.run import low_rank
from sdforge.run.states import Stopped
from tests.edits.low_ranks import extracted, order_to_extract, order_to_resize
from tests.edits.test_bake import baked
from tests.edits.test_resize import rank, update
from tests.families.loras import LINEAR, MODULES, TEXT, WIDE, Lora, kept_lora, random_lora
from tests.families.workbench import Taken, keep, same_bytes

TABLE = "text_model.embeddings.token_embedding.weight"


def checkpoint(work: Path, base: Taken, changes: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Taken:
    """Return a checkpoint with the tensors of another one, some of them (`component.name`) changed by a difference."""
    parts: dict[str, dict[str, Tensor]] = {}
    for component in ("unet", "text_encoder"):
        parts[component] = {
            name: (tensor.double() + changes.get(f"{component}.{name}", torch.zeros(()))).to(dtype)
            for name, tensor in base.tensors(component).items()
        }
    return keep(work, parts, facts=base.artifact.facts)


def with_lora(work: Path, base: Taken, lora: Lora, dtype: torch.dtype = torch.float32) -> Taken:
    own = {f"{c}.{t.name}": t.shape for c, table in base.tables.items() for t in table}
    changes = {f"{m}.weight": f.update.reshape(own[f"{m}.weight"]) for m, f in lora.items()}
    return checkpoint(work, base, changes, dtype)


@pytest.fixture(scope="module")
def wide(toy: Taken, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """The toy in fp32, in which differences of a few ranks are such."""
    return checkpoint(tmp_path_factory.mktemp("wide"), toy, {})


@pytest.fixture(scope="module")
def lora(toy: Taken) -> Lora:
    return random_lora(toy, alphas=(1.0, 3.0))


def test_a_lora_that_was_baked_in_is_found_again(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    """To 10⁻⁵ of each update, as baked weights in fp32 hold it; no module more, and none of a larger rank."""
    tuned = with_lora(tmp_path / "tuned", wide, lora)
    found, record = extracted(tmp_path / "x", tuned, wide, rank=4)
    assert {name.rpartition(".")[0] for name in found.tensors("lora")} == set(MODULES)
    for module, factors in lora.items():
        error = update(found, module) - factors.update
        assert float(error.norm() / factors.update.norm()) < 1e-5, module
    assert record["residual"] < 1e-5
    assert record["left"] == {}


def test_the_energy_of_an_update_tells_its_rank(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    found, _ = extracted(tmp_path / "x", with_lora(tmp_path / "tuned", wide, lora), wide, energy=1 - 1e-9)
    assert {module: rank(found, module) for module in MODULES} == {m: len(f.down) for m, f in lora.items()}


def test_too_small_a_rank_is_the_best_there_is_and_the_rest_is_told(
    wide: Taken, lora: Lora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, record = extracted(tmp_path / "x", with_lora(tmp_path / "tuned", wide, lora), wide, rank=1)
    dropped = sum(float(torch.linalg.svdvals(f.update)[1:].square().sum()) for f in lora.values())
    whole = sum(float(f.update.square().sum()) for f in lora.values())
    assert record["residual"] == pytest.approx((dropped / whole) ** 0.5, rel=1e-4)
    assert rank(found, WIDE) == 1
    said = capsys.readouterr().out
    assert f"{len(MODULES)} modules of rank 1 to 1; {record['residual']:.2%} of the norm is left out" in said
    assert LINEAR in said


def test_all_of_a_tuned_checkpoint_comes_back_at_the_full_rank(wide: Taken, other: Taken, tmp_path: Path) -> None:
    """Everything differs; fp32 factors give each weight back to a few units of its largest number's last place."""
    tuned = checkpoint(tmp_path / "tuned", other, {f"text_encoder.{TABLE}": torch.zeros(())})
    found, record = extracted(tmp_path / "x", tuned, wide, biases=True)
    embeddings = "text_encoder.text_model.embeddings."
    assert set(record["left"]) == {f"{embeddings}{kind}_embedding.weight" for kind in ("token", "position")}
    result = baked(wide, [(found, 1.0)])
    for component in ("unet", "text_encoder"):
        for name, tensor in tuned.tensors(component).items():
            if f"{component}.{name}" not in record["left"]:
                largest = float(tensor.abs().max())
                assert torch.allclose(result[f"{component}.{name}"], tensor, atol=4e-6 * largest), name


def test_sixteen_bits_are_enough_for_a_lora(toy: Taken, lora: Lora, tmp_path: Path) -> None:
    """Differences of fp16 checkpoints hold their roundings, of about 2⁻¹¹ of a weight."""
    tuned = with_lora(tmp_path / "tuned", toy, lora, torch.float16)
    found, _ = extracted(tmp_path / "x", tuned, toy, rank=4, dtype="")
    assert {tensor.dtype for tensor in found.tensors("lora").values()} == {torch.float16}
    for module, factors in lora.items():
        error = update(found, module) - factors.update
        assert float(error.norm() / factors.update.norm()) < 5e-3, module


def test_components_can_be_chosen(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    tuned = with_lora(tmp_path / "tuned", wide, lora)
    text, _ = extracted(tmp_path / "x", tuned, wide, components=["text_encoder"])
    assert {name.rpartition(".")[0] for name in text.tensors("lora")} == {TEXT}


def test_biases_and_norms_are_left_out_and_named_unless_they_are_asked_for(wide: Taken, tmp_path: Path) -> None:
    changes = {
        "unet.conv_norm_out.weight": torch.full((8,), 0.5),
        "unet.conv_norm_out.bias": torch.full((8,), 0.25),
        "unet.conv_in.bias": torch.full((8,), 0.125),
    }
    tuned = checkpoint(tmp_path / "tuned", wide, changes | {f"{LINEAR}.weight": torch.full((8, 8), 0.1)})
    _, record = extracted(tmp_path / "x", tuned, wide)
    assert set(record["left"]) == set(changes)
    assert record["left"]["unet.conv_in.bias"] == pytest.approx(0.125 * 8**0.5, rel=1e-4)
    found, record = extracted(tmp_path / "y", tuned, wide, biases=True)
    assert record["left"] == {}
    names = {"unet.conv_norm_out.w_norm", "unet.conv_norm_out.b_norm", "unet.conv_in.diff_b"}
    assert names <= set(found.tensors("lora"))
    assert torch.allclose(found.tensors("lora")["unet.conv_in.diff_b"], torch.tensor(0.125), atol=1e-6)


def test_convolutions_can_be_left_out(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    tuned = with_lora(tmp_path / "tuned", wide, lora)
    found, record = extracted(tmp_path / "x", tuned, wide, conv_rank=0)
    assert f"{WIDE}.weight" in record["left"]
    assert not any(name.startswith(WIDE) for name in found.tensors("lora"))


def test_checkpoints_that_do_not_differ_are_refused(wide: Taken, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed, match="are the same"):
        extracted(tmp_path / "x", wide, wide)


def test_checkpoints_that_differ_in_what_no_factors_say_are_refused_by_its_name(wide: Taken, tmp_path: Path) -> None:
    tuned = checkpoint(tmp_path / "tuned", wide, {"unet.conv_in.bias": torch.ones(8)})
    with pytest.raises(ActionFailed, match=r"differ in unet\.conv_in\.bias") as caught:
        extracted(tmp_path / "x", tuned, wide)
    assert caught.value.hint.startswith("biases = true")


def changed(base: Taken, work: Path, part: str, tensors: dict[str, Any]) -> Taken:
    """Return a checkpoint with other tensors of a part; None: without one."""
    own = base.tensors(part) | {name: t for name, t in tensors.items() if t is not None}
    return keep(work, {part: {name: t for name, t in own.items() if tensors.get(name, t) is not None}})


def test_what_does_not_fit_is_named(wide: Taken, tmp_path: Path) -> None:
    unet = keep(tmp_path / "unet", {"unet": wide.tensors("unet")})
    less = changed(wide, tmp_path / "less", "unet", {"conv_in.bias": None})
    with pytest.raises(ActionFailed, match=r"the tuned checkpoint has no unet\.conv_in\.bias"):
        extracted(tmp_path / "x", less, unet)
    with pytest.raises(ActionFailed, match=r"the base has no unet\.conv_in\.bias"):
        extracted(tmp_path / "y", unet, less)
    other = changed(wide, tmp_path / "other", "unet", {"conv_in.bias": torch.ones(9)})
    with pytest.raises(ActionFailed, match=r"unet\.conv_in\.bias is \[9\] and \[8\]"):
        extracted(tmp_path / "z", other, unet)
    broken = changed(wide, tmp_path / "broken", "unet", {"conv_in.bias": torch.full((8,), float("inf"))})
    with pytest.raises(ActionFailed, match=r"unet\.conv_in\.bias holds NaN or Inf"):
        extracted(tmp_path / "w", broken, unet)


def test_the_same_order_makes_the_same_bytes(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    tuned = with_lora(tmp_path / "tuned", wide, lora)
    one, two = (extracted(tmp_path / name, tuned, wide, rank=1)[0] for name in "xy")
    assert one.artifact.digest == two.artifact.digest
    assert same_bytes(one.tensors("lora")[f"{LINEAR}.lora_up"], two.tensors("lora")[f"{LINEAR}.lora_up"])


def test_what_was_extracted_can_be_baked_resized_and_merged(wide: Taken, lora: Lora, tmp_path: Path) -> None:
    """It is a LoRA as any other: alpha is the rank, factors have the canonical names and shapes."""
    found, _ = extracted(tmp_path / "x", with_lora(tmp_path / "tuned", wide, lora), wide, rank=4)
    assert found.artifact.facts == {}
    theirs, ours = baked(wide, [(kept_lora(tmp_path / "l", lora), 1.0)]), baked(wide, [(found, 1.0)])
    assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in theirs.items())


RUN = {"extract": extract.run, "resize": resize.run}


@pytest.fixture(params=["extract", "resize"])
def order(request: pytest.FixtureRequest, toy: Taken, other: Taken, lora: Lora, tmp_path: Path) -> Order:
    """An order of several modules, told where states are kept."""
    if request.param == "extract":
        found = order_to_extract(tmp_path / "work", other, toy, rank=2, biases=True, components=["text_encoder"])
    else:
        found = order_to_resize(tmp_path / "work", kept_lora(tmp_path / "lora", lora), rank=1)
    return replace(found, states=str(tmp_path / "states"))


def stopped_after(order: Order, jobs: int) -> None:
    calls = itertools.count()
    with pytest.raises(Stopped):
        RUN[order.method](order, lambda **_: None, lambda: next(calls) == jobs)


def steps_of(order: Order) -> tuple[list[int], Any]:
    """Run an order to its end; return the numbers of the jobs that were done, and the outcome."""
    steps: list[int] = []
    said: list[dict[str, Any]] = []
    outcome = RUN[order.method](
        order, lambda **e: steps.append(e["step"]) if "step" in e else said.append(e), lambda: False
    )
    return [event["resumed"] for event in said] + steps, outcome


def test_what_was_stopped_goes_on_and_gives_the_same_bytes(order: Order) -> None:
    steps, straight = steps_of(replace(order, states=""))
    stopped_after(order, 2)
    stopped_after(order, 1)  # which goes on, and is stopped after one more
    assert steps_of(order)[0] == [3, *steps[3:]]
    again = steps_of(order)[1]
    assert (again.sha256, again.components, again.facts) == (straight.sha256, straight.components, straight.facts)
    assert again.record == straight.record


def test_a_state_that_has_no_room_stops_nothing(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result may have some."""

    def full(*_: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(low_rank, "save_state", full)
    remarks: list[str] = []
    hurried = replace(order, how={"states": {"minutes": 0.0}})
    RUN[order.method](hurried, lambda **e: remarks.append(e["remark"]) if "remark" in e else None, lambda: False)
    assert set(remarks) == {"the disk is full; it goes on without"}
    calls = itertools.count()
    with pytest.raises(ResourceError):  # as it would not be kept
        RUN[order.method](order, lambda **_: None, lambda: next(calls) == 2)


def test_what_another_version_made_is_not_mixed_in(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = steps_of(replace(order, states=""))
    stopped_after(order, 2)
    monkeypatch.setattr(low_rank, "fingerprint", lambda device: {"torch": f"another {device}"})
    assert steps_of(order)[0] == steps
