"""What loaders share: tensors → networks. Architectures come from our own table, never from a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.families.stable_diffusion import IMAGE_MEAN, IMAGE_STD, TABLE
from sdforge.order import Given
from sdforge.ref import Ref
from sdforge.run.diffusion import Conditioning, Diffusion, Framing, TokenTable
from sdforge.run.noise import scaled_linear
from sdforge.run.tensors import load_component
from sdforge.run.tokens import Words


@final
class WordsAlone(Diffusion):
    """One CLIP text encoder, whose last hidden states are all that the U-Net sees."""

    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        return Conditioning(self.last_states(prompts, clip_skip))

    def silenced(self, condition: Conditioning, rows: list[bool]) -> Conditioning:  # noqa: ARG002
        return condition

    def sized(self, condition: Conditioning, sizes: list[Framing]) -> Conditioning:  # noqa: ARG002
        return condition

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:  # noqa: ARG002
        raise shown_nothing(self.family)

    def imagine(
        self,
        images_BD: Tensor,  # noqa: ARG002
        prompts: list[str] | None = None,  # noqa: ARG002
        *,
        level: int = 0,  # noqa: ARG002
        noise_BD: Tensor | None = None,  # noqa: ARG002
        clip_skip: int = 0,  # noqa: ARG002
    ) -> Conditioning:
        raise shown_nothing(self.family)


def shown_nothing(family: Family) -> UsageError:
    return UsageError(
        f"{family.title} draws from words, not from a picture's embedding",
        hint="take a checkpoint of Stable unCLIP or of image variations",
    )


def common(family: Family, given: Given, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Return what every `Diffusion` is made of. Raises UsageError if a part is missing."""
    missing = [name for name in family.networks if name not in given.components and name not in family.spare]
    if missing:
        part = missing[0].replace("_", " ")
        raise UsageError(f"the checkpoint has no {part}", hint="take one from another checkpoint with [swap.NAME]")
    if family.text_encoders and not given.vocabulary:
        raise UsageError(
            "the checkpoint has no tokenizer, as single files have none",
            hint="name a diffusers folder of this family, or CLIP's tokenizer folder (vocab.json and merges.txt, as in "
            "openai/clip-vit-large-patch14), as a source, and take its words: [swap.NAME] with `tokenizer = …`",
        )
    configs, facts = family.configs(given.facts, given.shapes()), given.facts
    schedule = scaled_linear(
        family.fact(facts, "beta_start"),
        family.fact(facts, "beta_end"),
        family.fact(facts, "prediction"),
        zero_terminal_snr=family.fact(facts, "zero_terminal_snr"),
    )
    encoders = {
        name: load_text_encoder(configs[name], given.components[name], device, projected=_projects(given, name))
        for name in family.text_encoders
    }
    image_encoder = None
    if "image_encoder" in configs:
        image_encoder = load_image_encoder(configs["image_encoder"], given.components["image_encoder"], device)
    return {
        "family": family,
        "facts": facts,
        "unet": _network("unet", UNet2DConditionModel, configs["unet"], given.components["unet"], device),
        "text_encoders": encoders,
        "vae": _network("vae", AutoencoderKL, configs["vae"], given.components["vae"], device),
        "schedule": schedule.to(device),
        "device": device,
        "precision": precision,
        "vocabulary": Words(given.vocabulary, facts.get("tokens", [])) if family.text_encoders else None,
        "image_encoder": image_encoder,
    }


def _projects(given: Given, component: str) -> bool:
    return any(ref.name == "text_projection.weight" for ref in given.components[component])


def _network(part: str, kind: Any, config: dict[str, Any], refs: list[Ref], device: torch.device) -> nn.Module:
    network = _built(part, lambda: kind(**config))
    return _filled(part, network, load_component(refs, torch.float32), device)


def _built(part: str, build: Callable[[], Any]) -> Any:
    """Build a network without memory. Raises UsageError for numbers and words of which none can be built."""
    try:
        with torch.device("meta"):
            return build()
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"no {part} can be built as the checkpoint states it: {type(error).__name__}: {error}",
            hint="look into its configuration, or get it again from where it came from",
        ) from None


def _filled(part: str, network: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Put a checkpoint's tensors into a network, frozen. Raises UsageError for tensors that do not fit it."""
    wanted, found = ({n: list(t.shape) for n, t in each.items()} for each in (network.state_dict(), tensors))
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            here, there = (each.get(name, "nothing") for each in (found, wanted))
            raise UsageError(
                f"the checkpoint's {part} has {here} as {name}, and {there} fits its other tensors",
                hint="get it again from where it came from",
            )
    network.load_state_dict(tensors, strict=True, assign=True)
    if device.type != "cpu":  # where they have been read
        network.to(device)
    return network.eval().requires_grad_(False)


def load_text_encoder(config: dict[str, Any], refs: list[Ref], device: torch.device, *, projected: bool) -> nn.Module:
    """Build a text encoder. transformers since 5.6 leaves `text_model.` out of the one without projection."""
    tensors = load_component(refs, torch.float32)
    kind: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
    network = _built("text encoder", lambda: kind(CLIPTextConfig(**config)))
    inner = network.text_model if projected else network
    inner.embeddings.token_embedding = TokenTable(tensors[TABLE])
    _place(inner.embeddings, config["max_position_embeddings"])
    if not projected:
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return _filled("text encoder", network, tensors, device)


def load_image_encoder(config: dict[str, Any], refs: list[Ref], device: torch.device) -> nn.Module:
    """Build a CLIP vision model with its projection, frozen."""
    tensors = load_component(refs, torch.float32)
    network = _built("image encoder", lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)))
    _place(network.vision_model.embeddings, tensors["vision_model.embeddings.position_embedding.weight"].shape[0])
    return _filled("image encoder", network, tensors, device)


def _place(embeddings: Any, count: int) -> None:
    """Number positions, which are no parameters, for a network that was built without memory."""
    embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)


def see(
    encoder: nn.Module,
    pixels_BCHW: Tensor,
    *,
    antialias: bool,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> Tensor:
    """Return the projected CLIP embedding (B, D) of pictures in −1 … 1, squeezed to the encoder's square.

    antialias: of the bicubic scaling; an encoder wants pictures scaled as they were when its U-Net was trained.
    mean, std: by which pictures in 0 … 1 are normalised, per channel.
    """
    config: Any = encoder.config
    edge, device = (config.image_size, config.image_size), pixels_BCHW.device
    scaled = functional.interpolate(pixels_BCHW.float(), edge, mode="bicubic", antialias=antialias)
    mean_C11, std_C11 = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    found: Tensor = encoder(pixel_values=((scaled + 1) / 2 - mean_C11) / std_C11).image_embeds
    return found.float()


def no_image_encoder() -> UsageError:
    return UsageError(
        "the checkpoint has no image encoder here", hint="take a checkpoint that has one, as its diffusers folder does"
    )
