"""Null-text inversion: a picture comes back under guidance, stopped or not, and nothing but the empty prompts moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from demo.attributes import caption, draw_combinations
from demo.classifier import classify
from demo.drawing import draw
from demo.palettes import FLAT
from sdforge.artifact import Artifact
from sdforge.errors import ActionFailed
from sdforge.families.sd15 import FAMILY
from sdforge.families.sd15.load import load
from sdforge.method import module_of
from sdforge.order import Given, Order, Outcome
from sdforge.ref import Ref
from sdforge.run import tensors
from sdforge.run.ddim import invert
from sdforge.run.images import Picture, read_pixels
from sdforge.run.states import Stopped
from sdforge.sidecars.null_text import replay, replay_latents
from sdforge.store.files import sha256_of
from tests.families.workbench import Taken
from tests.run.order import settings, state_size
from tests.trainings.faces import flat

NAME = "null_text_inversion"
QUICK: dict[str, Any] = {"steps": 4, "inner": 3, "learning_rate": 0.05, "early_stop": 0.0, "guidance": 5.0}


def asked(work: Path, on: Taken, picture: Path, how: dict[str, Any] | None = None, **changes: Any) -> Order:
    work.mkdir(parents=True, exist_ok=True)
    image = Given("picture", "picture", pictures=[[str(picture), sha256_of(picture), "", 1]])
    return Order(
        key="",
        target="toy",
        method=NAME,
        group="trainings",
        family="sd15",
        settings=settings(NAME, **QUICK | changes),
        work=str(work),
        inputs={"on": [on.given()], "image": [image]},
        states=str(work / "states"),
        how={"device": "cpu", "threads": 1, **(how or {})},
    )


def inverted(order: Order, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    made: Outcome = module_of("trainings", NAME).run(order, lambda **_: None, stopped)
    return made


def kept(order: Order, outcome: Outcome) -> dict[str, Tensor]:
    """What lies in the pack, by name."""
    pack = str(Path(order.work) / outcome.pack)
    rows = outcome.components["null_text"]
    return {
        name: tensors.load(Ref(name, dtype, tuple(shape), pack, at, xxh3)) for name, dtype, shape, _, xxh3, at in rows
    }


@pytest.fixture(scope="module")
def picture(drawings: Path) -> Path:
    return drawings / "0.png"


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def base(request: pytest.FixtureRequest, toy: Taken) -> Taken:
    facts = {**toy.artifact.facts, "prediction": request.param}
    facts = {name: value for name, value in facts.items() if value != "epsilon"}
    return replace(toy, artifact=replace(toy.artifact, facts=facts))


def test_it_keeps_a_start_and_an_empty_prompt_for_every_step(base: Taken, picture: Path, tmp_path: Path) -> None:
    order = asked(tmp_path, base, picture)
    outcome = inverted(order)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in kept(order, outcome).items()}
    assert shapes == {"start": (torch.float16, (1, 4, 8, 8)), "uncond": (torch.float16, (4, 77, 16))}
    wanted = {"prompt": "a red cat", "guidance": 5.0, "steps": 4, "resolution": 64, "spacing": "leading"}
    assert outcome.facts == wanted
    assert len(outcome.record["losses"]) == 4
    assert outcome.record["norm"] > 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_replaying_what_was_kept_is_where_the_search_ended(
    dtype: str, base: Taken, picture: Path, tmp_path: Path
) -> None:
    """The search goes by the rounded numbers that will be kept, so the artifact leads along the very same path."""
    order = asked(tmp_path, base, picture, dtype=dtype)
    outcome = inverted(order)
    diffusion = load(base.given(), torch.device("cpu"), torch.float32)
    found = kept(order, outcome)
    ended = replay_latents(diffusion, found, outcome.facts)
    with torch.no_grad():
        pixels = read_pixels(Picture(str(picture), "", "", (64, 64)), flip=False)
        path = invert(diffusion, diffusion.encode_picture(pixels), diffusion.encode_text(["a red cat"]), 4)
    assert float((ended - path[0]).square().mean()) == pytest.approx(outcome.record["losses"][-1], rel=1e-5)
    assert torch.equal(found["start"], path[-1].to(found["start"].dtype))


def test_more_search_comes_nearer_and_none_stands_for_the_prompt_itself(
    toy: Taken, picture: Path, tmp_path: Path
) -> None:
    last = {}
    for inner in (1, 6):
        order = asked(tmp_path / str(inner), toy, picture, inner=inner)
        last[inner] = sum(inverted(order).record["losses"])
    assert last[6] < last[1]
    order = asked(tmp_path / "none", toy, picture, inner=0, dtype="fp32")
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        said = diffusion.encode_text(["a red cat"]).hidden_BLD
    assert torch.equal(kept(order, inverted(order))["uncond"], said.expand(4, -1, -1))


def test_a_step_that_is_good_enough_is_searched_no_further(toy: Taken, picture: Path, tmp_path: Path) -> None:
    order = asked(tmp_path, toy, picture, early_stop=1e6, dtype="fp32")
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        empty = diffusion.encode_text([""]).hidden_BLD
    said: list[str] = []
    outcome = module_of("trainings", NAME).run(
        order, lambda **event: said.append(event.get("remark", "")), lambda: False
    )
    assert torch.equal(kept(order, outcome)["uncond"], empty.expand(4, -1, -1))
    first, last = outcome.record["levels"]
    assert last == pytest.approx(first, abs=0.01)  # nothing was found: it is DDIM inversion
    assert outcome.record["remark"] == said[-1]
    assert "0.0 above DDIM inversion" in said[-1]
    assert "less than 10" in said[-1]


@pytest.mark.parametrize("at", [0, 2])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(at: int, toy: Taken, picture: Path, tmp_path: Path) -> None:
    whole = inverted(asked(tmp_path / "whole", toy, picture))
    order = asked(tmp_path / "parts", toy, picture)
    asks = iter(range(100))
    with pytest.raises(Stopped):
        inverted(order, lambda: next(asks) == at)
    again = inverted(order)
    assert again.sha256 == whole.sha256
    assert again.record["losses"] == whole.record["losses"]
    assert again.record["resumed"] == [{"step": at}]


def test_states_are_kept_as_often_as_is_asked_and_as_large_as_foretold(
    toy: Taken, picture: Path, tmp_path: Path
) -> None:
    order = asked(tmp_path, toy, picture, how={"states": {"steps": 3}}, resolution=64)
    said: list[dict[str, Any]] = []
    module_of("trainings", NAME).run(order, lambda **event: said.append(event), lambda: False)
    assert [event["state"] for event in said if "state" in event] == [3]
    assert [event["step"] for event in said if "step" in event] == [1, 2, 3, 4]
    shapes = {"unet": {name: tuple(t.shape) for name, t in toy.tensors("unet").items()}}
    table: Any = module_of("trainings", NAME).TABLE.model_construct(**order.settings)
    assert state_size(Path(order.states)) == table.state_bytes(FAMILY, shapes)


def test_a_search_that_runs_away_stops(toy: Taken, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed):
        inverted(asked(tmp_path, toy, picture, learning_rate=1e30, inner=5))


def test_the_states_of_another_number_of_steps_are_not_its_own() -> None:
    """Every timestep depends on how many there are, other than a training's steps at a constant learning rate."""
    from sdforge.orders import state_key

    manifests = [{"method": NAME, "settings": settings(NAME, steps=steps)} for steps in (4, 8)]
    assert state_key(manifests[0]) != state_key(manifests[1])


@pytest.mark.parametrize("wrong", [{"guidance": 1.0}, {"prompt": ""}, {"steps": 501}, {"inner": -1}])
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(NAME, **wrong)


@pytest.mark.parametrize("name", [NAME, "dreamartist"])
def test_a_base_that_knows_no_guidance_is_refused_in_the_plan(name: str) -> None:
    module = module_of("trainings", name)
    given = {"on": "turbo", "dataset": "d", "image": "i", "prompt": "a cat", "token": "<x>"}
    table = module.TABLE.model_validate({k: v for k, v in given.items() if k in module.TABLE.model_fields})
    pictures = Artifact("dataset", whole="x", notes={"rows": [["1", "a <x>", 1]]})
    advice = {}
    for free in (True, False):
        checkpoint = Artifact("checkpoint", "sd15", facts={"guidance_free": free})
        advice[free] = module.advise(table, {"on": [checkpoint], "dataset": [pictures], "image": [None]})
    ((role, code, sentence, _, warning),) = advice[True]
    assert (role, code, warning) == ("on", "guidance", False)
    assert "does nothing on `turbo`" in sentence
    assert advice[False] == []


# -- on a base that can draw -------------------------------------------------------------------------------------------


def test_a_drawing_comes_back_and_its_hair_can_be_dyed(tmp_path: Path) -> None:
    """At least 10 dB above DDIM inversion under the same guidance (methods-embeddings §3.5)."""
    on = flat()
    attributes = next(a for a in islice(draw_combinations(4, held_out=True), 40) if a.hair_colour != "blue")
    draw(attributes, FLAT, 2_000_000).save(tmp_path / "face.png")
    prompt = caption(attributes)
    order = asked(tmp_path, on, tmp_path / "face.png", prompt=prompt, steps=8, inner=5, learning_rate=0.2, guidance=7.5)
    outcome = inverted(order)
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    pixels = read_pixels(Picture(str(tmp_path / "face.png"), "", "", (128, 128)), flip=False)
    clean = diffusion.encode_picture(pixels)
    found = kept(order, outcome)
    empty = diffusion.encode_text([""]).hidden_BLD.detach()
    plain = found | {"uncond": empty.expand_as(found["uncond"])}
    levels = [decibels(replay_latents(diffusion, each, outcome.facts), clean) for each in (plain, found)]
    assert levels[1] - levels[0] >= 10
    assert outcome.record["levels"] == pytest.approx(levels, abs=0.01)
    assert "less than" not in outcome.record["remark"]
    words = prompt.replace(attributes.hair_colour, "blue", 1)
    assert classify(shown(replay(diffusion, found, outcome.facts))).hair_colour == attributes.hair_colour
    assert classify(shown(replay(diffusion, found, outcome.facts, words))).hair_colour == "blue"


def decibels(found: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio; the peak is the width of the latents' range."""
    return float(10 * torch.log10((clean.max() - clean.min()).square() / (found - clean).square().mean()))


def shown(pixels_BCHW: Tensor) -> Image.Image:
    values = ((pixels_BCHW[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(values.numpy())
