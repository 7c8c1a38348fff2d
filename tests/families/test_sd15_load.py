"""Loading: networks are built from our own table, and are bit for bit what diffusers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.run.diffusion import Diffusion, TokenTable
from tests.families.workbench import Taken

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "", "a drawing of a house, über " + "red " * 90]


@pytest.fixture(scope="module")
def ours(toy: Taken) -> Diffusion:
    return load(toy.given(), CPU, torch.float32)


@pytest.fixture(scope="module")
def stock(toy: Taken, toys: Path) -> Any:
    assert toy.artifact.kind == "checkpoint"
    return StableDiffusionPipeline.from_pretrained(toys / "toy", dtype=torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_has_the_weights_that_diffusers_loads(part: str, ours: Diffusion, stock: Any) -> None:
    mine, theirs = getattr(ours, part).state_dict(), getattr(stock, part).state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_networks_say_what_diffusers_networks_say(ours: Diffusion, stock: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 16, generator=draw)
    pixels, steps = torch.rand(1, 3, 64, 64, generator=draw) * 2 - 1, torch.tensor([3, 900])
    with torch.no_grad():
        from sdforge.run.diffusion import Conditioning

        assert torch.equal(
            ours.predict(latents, steps, Conditioning(text)),
            stock.unet(latents, steps, encoder_hidden_states=text).sample,
        )
        mean = stock.vae.encode(pixels).latent_dist.mode()
        assert torch.equal(ours.encode_picture(pixels), mean * stock.vae.config.scaling_factor)
        assert torch.equal(ours.decode_picture(latents), stock.vae.decode(latents / 0.2).sample)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_says_what_it_says_in_diffusers(prompt: str, ours: Diffusion, stock: Any) -> None:
    theirs, _ = stock.encode_prompt(prompt, CPU, 1, False)
    with torch.no_grad():
        assert torch.equal(ours.encode_text([prompt]).hidden_BLD, theirs)


def test_several_prompts_are_a_batch(ours: Diffusion) -> None:
    with torch.no_grad():
        both = ours.encode_text(PROMPTS[:2]).hidden_BLD
        assert both.shape == (2, 77, 16)
        assert torch.allclose(both[1], ours.encode_text(PROMPTS[1:2]).hidden_BLD[0], atol=1e-5)


def test_clip_skip_leaves_layers_out_and_keeps_the_last_norm(ours: Diffusion, stock: Any) -> None:
    """diffusers' own `clip_skip` fails with transformers from 5.6 on; this is what it did before."""
    ids = stock.tokenizer("a red cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = stock.text_encoder(ids, output_hidden_states=True).hidden_states
        expected = stock.text_encoder.final_layer_norm(states[-2])
        assert torch.equal(ours.encode_text(["a red cat"], clip_skip=1).hidden_BLD, expected)
        assert not torch.equal(ours.encode_text(["a red cat"]).hidden_BLD, expected)


def test_networks_are_frozen_and_evaluate(ours: Diffusion) -> None:
    for network in (ours.unet, ours.vae, *ours.text_encoders.values()):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_learned_rows_follow_the_words_of_the_table(ours: Diffusion) -> None:
    table = TokenTable(ours.token_tables()["text_encoder"].weight.detach().clone())
    table.rows = torch.nn.Parameter(torch.full((2, 16), 5.0))
    found = table(torch.tensor([[0, 527, 528, 529]]))
    assert torch.equal(found[0, :2], table.weight[[0, 527]])
    assert torch.equal(found[0, 2:], table.rows)
    found.sum().backward()
    assert table.rows.grad is not None
    assert table.weight.grad is None


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_checkpoint_without_a_part_says_where_to_take_one(part: str, toy: Taken) -> None:
    given = toy.given()
    components = {name: refs for name, refs in given.components.items() if name != part}
    with pytest.raises(UsageError, match=f"has no {part.replace('_', ' ')}") as caught:
        load(dataclasses.replace(given, components=components), CPU, torch.float32)
    assert "swap" in caught.value.hint


def test_a_checkpoint_without_words_says_where_to_take_them(toy: Taken) -> None:
    with pytest.raises(UsageError, match="has no tokenizer"):
        load(dataclasses.replace(toy.given(), vocabulary={}), CPU, torch.float32)


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        ({"text_activation": "wordy"}, "no text encoder can be built as the checkpoint states it: KeyError: 'wordy'"),
        ({"unet_groups": 3}, "no unet can be built as the checkpoint states it: ValueError"),
    ],
)
def test_what_no_network_can_be_built_of_is_said(fact: dict[str, Any], sentence: str, toy: Taken) -> None:
    given = toy.given()
    with pytest.raises(UsageError, match=sentence):
        load(dataclasses.replace(given, facts=given.facts | fact), CPU, torch.float32)


def test_a_tensor_that_does_not_fit_the_others_is_named(toy: Taken) -> None:
    given, name = toy.given(), "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    unet = [ref._replace(shape=ref.shape[::-1]) if ref.name == name else ref for ref in given.components["unet"]]
    with pytest.raises(UsageError, match=rf"the checkpoint's unet has \[.*\] as {name}, and \[.*\] fits"):
        load(dataclasses.replace(given, components=given.components | {"unet": unet}), CPU, torch.float32)


def test_loading_draws_no_random_number(toy: Taken) -> None:
    before = torch.random.get_rng_state()
    load(toy.given(), CPU, torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("facts", "prediction", "last"),
    [({}, "epsilon", 0.00466), ({"prediction": "v_prediction", "zero_terminal_snr": True}, "v_prediction", 0.0)],
)
def test_the_schedule_is_what_the_facts_say(facts: dict[str, Any], prediction: str, last: float, toy: Taken) -> None:
    given = toy.given()
    schedule = load(dataclasses.replace(given, facts=given.facts | facts), CPU, torch.float32).schedule
    assert schedule.prediction == prediction
    assert float(schedule.alphas_T[-1]) == pytest.approx(last, abs=1e-5)
