"""A hypernetwork that is not linear, drawn with beside a checkpoint: by our networks and by pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdforge.families.sd15.load import load
from sdforge.run.diffusion import Diffusion
from sdforge.sidecars import attached
from sdforge.sidecars.hypernetwork import attach, attach_pipeline
from tests.families.workbench import Taken
from tests.run.hypernetworks import SWISH, random_nets
from tests.trainings.test_training_contract import CAPTIONS, batch


@pytest.fixture
def diffusion(toy: Taken) -> Diffusion:
    return load(toy.given(), torch.device("cpu"), torch.float32)


@torch.no_grad()
def said(unet: Any, hidden_BLD: torch.Tensor) -> torch.Tensor:
    one = batch()
    found: torch.Tensor = unet(one.noisy_BCHW, one.timesteps_B, encoder_hidden_states=hidden_BLD).sample
    return found


def test_it_takes_part_in_every_picture() -> None:
    assert attached("hypernetwork") is not None


def test_a_pipeline_of_diffusers_says_what_our_networks_say(diffusion: Diffusion, toys: Path) -> None:
    nets = random_nets(SWISH, widths=(16,))
    hidden = diffusion.encode_text(CAPTIONS).hidden_BLD
    plain = said(diffusion.unet, hidden)
    pipeline = StableDiffusionPipeline.from_pretrained(toys / "toy", torch_dtype=torch.float32)
    attach_pipeline(pipeline, nets, SWISH, 0.7)
    take_off = attach(diffusion, nets, SWISH, 0.7)
    ours = said(diffusion.unet, hidden)
    assert torch.allclose(said(pipeline.unet, hidden), ours, atol=1e-5)
    assert float((ours - plain).abs().max()) > 1e-3
    take_off()
    assert torch.equal(said(diffusion.unet, hidden), plain)


def test_the_networks_are_no_part_of_what_a_pipeline_saves(diffusion: Diffusion) -> None:
    before = set(diffusion.unet.state_dict())
    attach(diffusion, random_nets(SWISH, widths=(16,)), SWISH)
    assert set(diffusion.unet.state_dict()) == before
