"""The base that is shown a picture: Stable unCLIP 2.1's topology, grown out of the flat base.

Its U-Net is that of Stable Diffusion 2 with a `class_embedding` that takes [image embedding ; noise level]; zeros mean
that no picture is shown. Shapes in names: B pictures, C H W of scaled latents (4, 16, 16), L tokens (77), D width of
the image embedding (64).
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor
from torch.nn import functional

from demo.attributes import training_caption
from demo.bases import (
    DIFFUSERS,
    LATENT_CHANNELS,
    SCHEDULER_CONFIG,
    TRAIN_STEPS,
    UNET_CONFIG,
    Base,
    diffusers_config,
    old_text_names,
    read_weights,
    text_config,
    write_json,
    write_weights,
)
from demo.clip import WIDTH, Clip, preprocessor_config, vision_config
from demo.denoiser import EMA_DECAY, SNR_CAP, cell_weights
from demo.geometry import CELLS
from demo.progress import Clock, cosine_tail, device, generator, load_state, save_state, say
from demo.sampling import Sampler, alphas_cumprod, encode_prompts, solve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from demo.clip import Drawings

# The deepest level is narrower than the flat base's, which makes room for the picture's part.
CHANNELS = (40, 56, 72, 40)

EMBEDDING_DROPOUT = 0.25
# Most pictures are shown without noise: with levels all alike likely the U-Net would unlearn to look.
NOISY = 0.15
MOST_NOISE = 500


@dataclass(frozen=True)
class Phase:
    """Steps of one batch size.

    most_weight: how much more than little noise the most noise may count; colours: the weight of the error's mean over
    4×4 cells, which only colours have; empty: captions left empty, beside those that every base's training leaves so;
    late: share of timesteps drawn from the last LATE alone.
    """

    batch: int
    steps: int
    most_weight: float
    colours: float
    empty: float
    late: float = 0


LATE = 200  # timesteps

# Ground, hair colour and style are decided where nearly all is noise: there little of the error of ε is to be gained,
# and a caption tells them anyway. Before the last phase the U-Net learned faces, eyes and hats from the picture alone.
PHASES = (
    Phase(8, 2550, most_weight=1, colours=0, empty=0.5),
    Phase(8, 750, most_weight=20, colours=0, empty=0.5),
    Phase(16, 530, most_weight=20, colours=8, empty=0.85),
    Phase(16, 1500, most_weight=200, colours=8, empty=0.85, late=0.5),
)
LEARNING_RATE, WARM_UP, FLAT_SHARE = 1e-3, 50, 0.85
SEED = 40

NOISING_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": DIFFUSERS,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "epsilon",
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableUnCLIPImg2ImgPipeline",
    "_diffusers_version": DIFFUSERS,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Shown:
    """A base that is shown pictures; mean_D, std_D: of image embeddings, between which noise is added."""

    base: Base
    mean_D: Tensor
    std_D: Tensor


def new_unet() -> UNet2DConditionModel:
    """Return an untrained U-Net of Stable unCLIP's topology."""
    return UNet2DConditionModel(
        **UNET_CONFIG
        | {
            "block_out_channels": CHANNELS,
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * WIDTH,
        }
    )


@torch.no_grad()
def grown(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a U-Net that draws much as one of Stable Diffusion 1's topology does, whatever picture is shown.

    1×1 convolutions become matrices. Of tensors that are narrower here a corner is taken, which training mends.
    """
    torch.manual_seed(SEED)
    result = new_unet()
    old = unet.state_dict()
    for name, tensor in result.state_dict().items():
        if name.startswith("class_embedding."):
            continue
        taken = old[name][:, :, 0, 0] if old[name].dim() == 4 and tensor.dim() == 2 else old[name]
        tensor.copy_(taken[tuple(slice(0, size) for size in tensor.shape)])
    for parameter in result.class_embedding.linear_2.parameters():
        parameter.zero_()
    return result


def sinusoid(levels_B: Tensor) -> Tensor:
    """Return the embedding (B, D) of noise levels: cosines, then sines (Vaswani et al. 2017, §3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles = levels_B[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def noise_alphas() -> Tensor:
    """Return ᾱ (1000,) of the noise on embeddings: a cosine (Nichol & Dhariwal 2021, eq. 17)."""
    curve = torch.cos((torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2)
    betas = (1 - curve[1:].square() / curve[:-1].square()).clamp(max=0.999)
    return (1 - betas).cumprod(0).float()


def class_labels(shown: Shown, images_BD: Tensor, levels_B: Tensor, noise_BD: Tensor) -> Tensor:
    """Return what the U-Net is told of pictures (B, 2 D): the embedding with noise of a level, and the level."""
    alphas_B1 = noise_alphas()[levels_B][:, None]
    normal_BD = (images_BD - shown.mean_D) / shown.std_D
    noised_BD = alphas_B1.sqrt() * normal_BD + (1 - alphas_B1).sqrt() * noise_BD
    return torch.cat([noised_BD * shown.std_D + shown.mean_D, sinusoid(levels_B)], dim=1)


@dataclass(frozen=True)
class Batch:
    """What one step sees."""

    latents: Tensor
    captions: list[str]
    labels: Tensor
    noise: Tensor
    timesteps: Tensor
    phase: Phase


def batches(shown: Shown, drawings: Drawings, latents: Tensor, images: Tensor, first: int) -> Iterator[Batch]:
    """One batch for each step from `first` to the end."""
    phases = [phase for phase in PHASES for _ in range(phase.steps)]
    for step in range(first, len(phases)):
        size, rng, words = phases[step].batch, generator(SEED, step), random.Random(SEED * 1_000_003 + step)
        rows = torch.randint(len(latents), (size,), generator=rng).tolist()
        levels = torch.randint(MOST_NOISE, (size,), generator=rng)
        levels = torch.where(torch.rand(size, generator=rng) < NOISY, levels, 0)
        noise_BD = torch.randn(size, WIDTH, generator=rng) * (levels > 0)[:, None]
        labels = class_labels(shown, images[rows], levels, noise_BD)
        captions = []
        for row in rows:
            text = training_caption(drawings.shown[row], drawings.styles[row], words)
            captions.append("" if words.random() < phases[step].empty else text)
        yield Batch(
            latents=latents[rows],
            captions=captions,
            labels=labels * (torch.rand(size, generator=rng) >= EMBEDDING_DROPOUT)[:, None],
            noise=torch.randn(size, *latents.shape[1:], generator=rng),
            timesteps=_timesteps(size, phases[step].late, rng),
            phase=phases[step],
        )


def _timesteps(size: int, late: float, rng: torch.Generator) -> Tensor:
    drawn = torch.randint(TRAIN_STEPS, (size,), generator=rng)
    if not late:
        return drawn
    last = TRAIN_STEPS - LATE + drawn % LATE
    return torch.where(torch.rand(size, generator=rng) < late, last, drawn)


def train_unclip(
    shown: Shown, drawings: Drawings, latents: Tensor, images: Tensor, state_file: Path
) -> Iterator[tuple[int, Shown]]:
    """Train the U-Net alone; yield the averaged weights now and then, and at last. It goes on from a state.

    The U-Net given is changed; what is yielded holds a copy of its moving average.
    """
    target = device()
    base = shown.base.to(target)
    average = copy.deepcopy(base.unet)
    optimizer = torch.optim.AdamW(base.unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = load_state(state_file) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        base.unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    clock, first, total = Clock(state["seconds"]), state["step"], sum(phase.steps for phase in PHASES)
    averaged = Shown(Base(average, base.vae, base.text_encoder, base.tokenizer), shown.mean_D, shown.std_D)
    losses: list[float] = []
    weights_HW, alphas_T = cell_weights().to(target), alphas_cumprod().to(target)
    for step, batch in enumerate(batches(shown, drawings, latents, images, first), start=first):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / WARM_UP)
            group["lr"] = LEARNING_RATE * warm * cosine_tail(step / total, flat=FLAT_SHARE, floor=0.02)
        loss = _loss(base, batch, weights_HW, alphas_T)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(base.unet.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), base.unet.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        last = step + 1 == total
        if (step + 1) % 100 == 0 or last:
            recent = sum(losses[-100:]) / len(losses[-100:])
            say(f"unclip step {step + 1}/{total}  {clock.seconds():.0f} s  loss {recent:.4f}")
        if clock.time_to_save() or last:
            parts = {"unet": base.unet.state_dict(), "average": average.state_dict()}
            rest = {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": clock.seconds()}
            save_state(state_file, parts | rest)
        if (step + 1) % 600 == 0 or last:
            yield step + 1, averaged
    if first == total:
        yield total, averaged


def _loss(base: Base, batch: Batch, weights_HW: Tensor, alphas_T: Tensor) -> Tensor:
    """Return the weighted error of the predicted noise, cells weighted too.

    The weight is min(SNR, 5) / SNR (Hang et al. 2023, §3.4) times (SNR + 1) / SNR, by which an error of ε is one of v
    (Salimans & Ho 2022), as far as the phase lets it.
    """
    target = weights_HW.device
    text_BLD = encode_prompts(base, batch.captions)
    latents_BCHW, noise_BCHW = batch.latents.to(target), batch.noise.to(target)
    timesteps_B = batch.timesteps.to(target)
    alphas_B = alphas_T[timesteps_B]
    alphas_B111 = alphas_B[:, None, None, None]
    noisy_BCHW = alphas_B111.sqrt() * latents_BCHW + (1 - alphas_B111).sqrt() * noise_BCHW
    predicted = base.unet(noisy_BCHW, timesteps_B, text_BLD, class_labels=batch.labels.to(target)).sample
    error_BCHW = predicted - noise_BCHW
    error_B = (error_BCHW.square() * weights_HW).mean(dim=(1, 2, 3))
    error_B = error_B + batch.phase.colours * functional.avg_pool2d(error_BCHW, 4).square().mean(dim=(1, 2, 3))
    snr_B = alphas_B / (1 - alphas_B)
    weights_B = (1 + 1 / snr_B).clamp(max=batch.phase.most_weight) * (SNR_CAP / snr_B).clamp(max=1)
    return (error_B * weights_B).mean()


@torch.no_grad()
def imagine(shown: Shown, images_BD: Tensor, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> Tensor:
    """Scaled latents of what image embeddings and prompts ask for; guided away from neither."""
    base, target = shown.base, next(shown.base.unet.parameters()).device
    labels = class_labels(shown, images_BD, torch.zeros(len(images_BD), dtype=torch.long), torch.zeros_like(images_BD))
    both = torch.cat([torch.zeros_like(labels), labels]).to(target)
    noise = [torch.randn(LATENT_CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(s)) for s in seeds]
    text_BLD = encode_prompts(base, prompts)
    told = torch.cat([encode_prompts(base, [""]).expand_as(text_BLD), text_BLD])

    def predict(noisy_BCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        time_B = torch.full((len(both),), timestep, device=target)
        twice = torch.cat([noisy_BCHW, noisy_BCHW])
        empty, prompted = base.unet(twice, time_B, told, class_labels=both).sample.chunk(2)
        return empty, prompted

    return solve(predict, torch.stack(noise).to(target), sampler)


def write_unclip(folder: Path, shown: Shown, clip: Clip) -> None:
    """Write the folder of StableUnCLIPImg2ImgPipeline, weights in fp16."""
    base = shown.base
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(folder / "image_noising_scheduler" / "scheduler_config.json", NOISING_CONFIG)
    for part, model in (("unet", base.unet), ("vae", base.vae)):
        write_json(folder / part / "config.json", diffusers_config(model))
        write_weights(folder / part / "diffusion_pytorch_model.safetensors", model.state_dict())
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=WIDTH)
    write_json(folder / "image_normalizer" / "config.json", diffusers_config(normalizer))
    statistics = {"mean": shown.mean_D[None], "std": shown.std_D[None]}
    write_weights(folder / "image_normalizer" / "diffusion_pytorch_model.safetensors", statistics)
    write_json(folder / "text_encoder" / "config.json", text_config(base.text_encoder))
    write_weights(folder / "text_encoder" / "model.safetensors", old_text_names(base.text_encoder.state_dict()))
    base.tokenizer.write(folder / "tokenizer")
    write_json(folder / "image_encoder" / "config.json", vision_config())
    write_weights(folder / "image_encoder" / "model.safetensors", clip.vision.state_dict())
    write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessor_config())


def read_unclip(folder: Path, flat: Base) -> Shown:
    """Read a folder that `write_unclip` wrote, weights in fp32; text encoder, tokenizer and VAE are the flat base's."""
    unet = new_unet()
    unet.load_state_dict(read_weights(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    statistics = read_weights(folder / "image_normalizer" / "diffusion_pytorch_model.safetensors")
    base = Base(unet.eval(), flat.vae, flat.text_encoder, flat.tokenizer)
    return Shown(base, statistics["mean"][0], statistics["std"][0])
