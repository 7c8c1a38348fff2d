"""Hypernetworks at work: where they stand, what they compute, and how they are taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.formats.hypernetwork import ACTIVATIONS, stated
from sdforge.run.diffusion import Diffusion
from sdforge.run.hypernetwork import attach, contexts
from tests.families.workbench import Taken
from tests.run.hypernetworks import CROSS, DEEP, LINEAR, SWISH, random_nets
from tests.trainings.test_training_contract import CAPTIONS, batch

BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


@pytest.fixture
def diffusion(toy: Taken) -> Diffusion:
    return load(toy.given(), torch.device("cpu"), torch.float32)


@torch.no_grad()
def said(diffusion: Diffusion) -> Tensor:
    one = batch()
    return diffusion.predict(one.noisy_BCHW, one.timesteps_B, diffusion.encode_text(CAPTIONS))


def mlp(tensors: dict[str, Tensor], start: str, facts: dict[str, Any], x: Tensor) -> Tensor:
    """Compute a network by hand."""
    count = len(facts["structure"]) - 1
    for i in range(count):
        x = x @ tensors[f"{start}.linear.{i}.weight"].T + tensors[f"{start}.linear.{i}.bias"]
        if i < count - 1 or facts.get("activate_output"):
            x = BY_HAND[facts.get("activation", "linear")](x)
        if facts.get("layer_norm"):
            x = functional.layer_norm(
                x, x.shape[-1:], tensors[f"{start}.norm.{i}.weight"], tensors[f"{start}.norm.{i}.bias"]
            )
    return x


def seen(diffusion: Diffusion, path: str) -> list[Tensor]:
    """Return what a layer was given while a picture was predicted."""
    found: list[Tensor] = []
    hook = diffusion.unet.get_submodule(path).register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    said(diffusion)
    hook.remove()
    return found


@pytest.mark.parametrize("more", [{}, {"layer_norm": True}, {"activate_output": True}])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_computed_as_it_is_known(
    activation: str, more: dict[str, Any], diffusion: Diffusion
) -> None:
    facts = stated(DEEP, activation=activation, **more)
    tensors, path = random_nets(facts, widths=(16,)), "mid_block.attentions.0.transformer_blocks.0.attn2"
    (plain,) = seen(diffusion, f"{path}.to_k")
    attach(diffusion.unet, tensors, facts, 0.5)
    for side in ("k", "v"):
        (through,) = seen(diffusion, f"{path}.to_{side}")
        expected = plain + 0.5 * mlp(tensors, f"16.{side}", facts, plain)
        assert torch.allclose(through, expected, atol=1e-5)


def test_cross_attention_alone_is_reached_where_the_facts_say_so(diffusion: Diffusion) -> None:
    everywhere, cross = contexts(diffusion.unet, "all"), contexts(diffusion.unet, "cross")
    assert (len(everywhere), len(cross)) == (64, 32)
    assert {path.rpartition(".")[0].rpartition(".")[2] for path, _, _ in cross} == {"attn2"}
    assert {width for _, _, width in cross} == {16}
    assert {width for _, _, width in everywhere} == {8, 16}
    attach(diffusion.unet, random_nets(CROSS, widths=(16,)), CROSS)
    hooked = [path for path, _, _ in everywhere if diffusion.unet.get_submodule(path)._forward_pre_hooks]
    assert hooked == [path for path, _, _ in cross]


def test_at_strength_0_nothing_is_changed_and_taken_off_it_is_as_before(diffusion: Diffusion) -> None:
    before = said(diffusion)
    attach(diffusion.unet, random_nets(LINEAR), LINEAR, 0.0)
    assert torch.equal(said(diffusion), before)
    take_off = attach(diffusion.unet, random_nets(LINEAR), LINEAR)
    assert float((said(diffusion) - before).abs().max()) > 1e-3
    take_off()
    assert torch.equal(said(diffusion), before)


def test_the_second_one_sees_what_the_first_one_made(diffusion: Diffusion) -> None:
    one, two = (random_nets(CROSS, widths=(16,), seed=seed) for seed in (0, 1))
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    (plain,) = seen(diffusion, path)
    attach(diffusion.unet, one, CROSS, 0.5)
    attach(diffusion.unet, two, CROSS, -0.3)
    first = plain + 0.5 * mlp(one, "16.v", CROSS, plain)
    (through,) = seen(diffusion, path)
    assert torch.allclose(through, first - 0.3 * mlp(two, "16.v", CROSS, first), atol=1e-5)


def test_a_network_in_half_precision_serves_a_unet_in_half_precision(diffusion: Diffusion) -> None:
    unet = diffusion.unet.to(torch.bfloat16)
    attach(unet, {n: t.half() for n, t in random_nets(SWISH, widths=(16,)).items()}, SWISH)
    one = batch()
    hidden = diffusion.encode_text(CAPTIONS).hidden_BLD.bfloat16()
    out = unet(one.noisy_BCHW.bfloat16(), one.timesteps_B, encoder_hidden_states=hidden).sample
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out.float()).all())


def test_what_fits_no_attention_and_what_is_no_hypernetwork_is_refused(diffusion: Diffusion) -> None:
    with pytest.raises(UsageError, match="contexts 12 wide, and the U-Net's are 8, 16"):
        attach(diffusion.unet, random_nets(LINEAR, widths=(12, 16)), LINEAR)
    whole = random_nets(LINEAR)
    lacking = {name: tensor for name, tensor in whole.items() if name != "8.v.linear.1.bias"}
    with pytest.raises(UsageError, match=r"no 8\.v\.linear\.1\.bias"):
        attach(diffusion.unet, lacking, LINEAR)
    with pytest.raises(UsageError, match="is no part of a hypernetwork"):
        attach(diffusion.unet, whole | {"8.q.linear.0.bias": torch.zeros(16)}, LINEAR)
    with pytest.raises(UsageError, match="more than its structure has"):
        attach(diffusion.unet, whole | {"8.v.linear.2.bias": torch.zeros(8)}, LINEAR)
