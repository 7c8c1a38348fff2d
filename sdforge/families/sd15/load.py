"""SD 1.x tensors → a `Diffusion`. Architectures come from our own table, never from a file that came with them."""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdforge.errors import UsageError
from sdforge.families.sd15 import FAMILY
from sdforge.order import Given, Ref
from sdforge.run.diffusion import Conditioning, Diffusion, TokenTable
from sdforge.run.noise import scaled_linear
from sdforge.run.tensors import load_component
from sdforge.run.tokens import Words


@final
class StableDiffusion1Loaded(Diffusion):
    """One CLIP text encoder, whose last hidden states are all the U-Net sees of a prompt."""

    def token_tables(self) -> dict[str, TokenTable]:
        encoder: Any = self.text_encoders["text_encoder"]
        table = encoder.embeddings.token_embedding
        assert isinstance(table, TokenTable)
        return {"text_encoder": table}

    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        ids = torch.tensor([self.words.encode(prompt) for prompt in prompts], device=self.device)
        encoder: Any = self.text_encoders["text_encoder"]
        with self.arithmetic():
            if clip_skip == 0:
                return Conditioning(encoder(input_ids=ids).last_hidden_state)
            states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
            return Conditioning(encoder.final_layer_norm(states[-(clip_skip + 1)]))


def load(given: Given, device: torch.device, precision: torch.dtype) -> Diffusion:
    """Build the networks of a checkpoint from an order's input. Raises UsageError if a part is missing.

    precision: of the frozen networks' arithmetic; their weights are kept in fp32 all the same.
    """
    missing = [name for name in FAMILY.networks if name not in given.components]
    if missing or not given.vocabulary:
        part = missing[0].replace("_", " ") if missing else "tokenizer"
        raise UsageError(f"the checkpoint has no {part}", hint="take one from another checkpoint with [swap.NAME]")
    configs = FAMILY.configs(given.facts, given.shapes())
    facts = given.facts
    tokens = FAMILY.fact(facts, "tokens")
    schedule = scaled_linear(
        FAMILY.fact(facts, "beta_start"),
        FAMILY.fact(facts, "beta_end"),
        FAMILY.fact(facts, "prediction"),
        zero_terminal_snr=FAMILY.fact(facts, "zero_terminal_snr"),
    )
    return StableDiffusion1Loaded(
        family=FAMILY,
        facts=facts,
        unet=_network(UNet2DConditionModel, configs["unet"], given.components["unet"], device),
        text_encoders={
            "text_encoder": _text_encoder(configs["text_encoder"], given.components["text_encoder"], device)
        },
        vae=_network(AutoencoderKL, configs["vae"], given.components["vae"], device),
        words=Words(given.vocabulary, tokens),
        schedule=schedule.to(device),
        device=device,
        precision=precision,
    )


def _network(kind: Any, config: dict[str, Any], refs: list[Ref], device: torch.device) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = kind(**config)
    return _filled(network, load_component(refs, torch.float32), device)


def _filled(network: nn.Module, tensors: dict[str, torch.Tensor], device: torch.device) -> nn.Module:
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _text_encoder(config: dict[str, Any], refs: list[Ref], device: torch.device) -> nn.Module:
    tensors = load_component(refs, torch.float32)
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        network = CLIPTextModel(CLIPTextConfig(**config))
    network.embeddings.token_embedding = TokenTable(tensors["embeddings.token_embedding.weight"])
    positions = torch.arange(config["max_position_embeddings"])[None]
    network.embeddings.register_buffer("position_ids", positions, persistent=False)
    return _filled(network, tensors, device)
