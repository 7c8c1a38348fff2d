"""Training the autoencoder that both bases share, and folding the latents' normalisation into its weights.

Shapes in names: B pictures, C channels, H W pixels. Pictures are in -1..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.bases import LATENT_CHANNELS, SCALING_FACTOR
from demo.geometry import FACE, SIZE
from demo.progress import Clock, cosine_tail, device, generator, load_state, save_state, say

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Pictures = npt.NDArray[np.uint8]

KL_WEIGHT = 1e-4
LOW_FREQUENCY_WEIGHT = 4.0
EDGE_WEIGHT = 0.4
# Where crops lie: normally distributed about the picture's middle, since the corners are plain ground.
CROP_SPREAD = 24.0


@dataclass(frozen=True)
class Phase:
    """Steps on crops of one size. Small crops first: they give many cheap steps while colours and edges form."""

    crop: int  # pixels
    batch: int
    steps: int


@dataclass(frozen=True)
class Course:
    """One descent of the learning rate."""

    name: str
    phases: tuple[Phase, ...]
    learning_rate: float
    flat_share: float  # of the course before the learning rate falls
    face_weight: float  # of the pixels in geometry.FACE
    seed: int
    from_nothing: bool = False  # then colours are permuted at first, and edges count only later
    encoder: bool = True  # whether it learns too, or only the decoder


FIRST_COURSE = Course(
    name="vae",
    phases=(Phase(32, 24, 1400), Phase(64, 8, 1500), Phase(128, 4, 1500)),
    learning_rate=1.5e-3,
    flat_share=0.30,
    face_weight=2.2,
    seed=0,
    from_nothing=True,
)
# The first course leaves hair and outlines soft where the face's weight does not reach.
FINISH_COURSE = Course(
    name="vae-finish",
    phases=(Phase(128, 4, 1000),),
    learning_rate=1.2e-3,
    flat_share=0.30,
    face_weight=1.0,
    seed=1,
)
# The latents stay as they are, so this course may also come after the bases, at less cost per step.
SHARPEN_COURSE = Course(
    name="vae-sharpen",
    phases=(Phase(128, 4, 2400),),
    learning_rate=1.0e-3,
    flat_share=0.20,
    face_weight=1.0,
    seed=2,
    encoder=False,
)


def to_tensor(pictures: Pictures) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(
    vae: AutoencoderKL, pictures: Pictures, held_out: dict[str, Pictures], course: Course, state_file: Path
) -> None:
    """Train on uint8 pictures (N, 128, 128, 3), in place; print PSNR on the held-out sets."""
    target = device()
    vae.to(target).train()
    parameters = _trained(vae, course)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    saved = load_state(state_file)
    if saved is not None:
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"] if saved is not None else 0
    clock = Clock(saved["seconds"] if saved is not None else 0.0)
    schedule = [phase for phase in course.phases for _ in range(phase.steps)]
    weights = _face_weights(course.face_weight)
    losses: list[float] = []
    for step in range(first, len(schedule)):
        share = step / len(schedule)
        for group in optimizer.param_groups:
            warm_up = min(1.0, (step + 1) / 50)
            group["lr"] = course.learning_rate * warm_up * cosine_tail(share, flat=course.flat_share, floor=0.02)
        permute = course.from_nothing and share < 0.4
        rng = generator(course.seed, step)
        picked, weight = _batch(pictures, weights, schedule[step], rng, permute=permute)
        edges = min(1.0, max(0.0, (share - 0.4) / 0.2)) if course.from_nothing else 1.0
        loss = _loss(vae, picked.to(target), weight.to(target), rng, edge_weight=EDGE_WEIGHT * edges)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        last = step + 1 == len(schedule)
        if (step + 1) % 200 == 0 or last:
            quality = "  ".join(f"{name} {psnr(vae, some):.2f} dB" for name, some in held_out.items())
            told = f"loss {sum(losses[-200:]) / len(losses[-200:]):.4f}  {quality}"
            say(f"{course.name} step {step + 1}/{len(schedule)}  {clock.seconds():.0f} s  {told}")
        if clock.time_to_save() or last:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(state_file, state | {"seconds": clock.seconds()})
    vae.requires_grad_().eval()


def _trained(vae: AutoencoderKL, course: Course) -> list[nn.Parameter]:
    """Return what the course trains, and make it alone ask for gradients."""
    vae.requires_grad_(requires_grad=False)
    modules = [vae] if course.encoder else [vae.post_quant_conv, vae.decoder]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    return parameters


def _face_weights(weight: float) -> Tensor:
    weights = torch.ones(1, SIZE, SIZE)
    weights[:, FACE.top : FACE.bottom, FACE.left : FACE.right] = weight
    return weights


def _batch(
    pictures: Pictures, weights: Tensor, phase: Phase, rng: torch.Generator, *, permute: bool
) -> tuple[Tensor, Tensor]:
    """Crops (B, 3, crop, crop) and their pixel weights (B, 1, crop, crop).

    With `permute`, half of the pictures have their colour channels exchanged: the same shapes in colours that no
    style has.
    """
    rows = torch.randint(len(pictures), (phase.batch,), generator=rng).tolist()
    room = SIZE - phase.crop
    offsets = (room / 2 + CROP_SPREAD * torch.randn(phase.batch, 2, generator=rng)).clamp(0, room).long().tolist()
    crops, crop_weights = [], []
    for row, (x, y) in zip(rows, offsets, strict=True):
        crop = to_tensor(pictures[row : row + 1, y : y + phase.crop, x : x + phase.crop])[0]
        if permute and torch.rand((), generator=rng) < 0.5:
            crop = crop[torch.randperm(3, generator=rng)]
        crops.append(crop)
        crop_weights.append(weights[:, y : y + phase.crop, x : x + phase.crop])
    return torch.stack(crops), torch.stack(crop_weights)


def _loss(
    vae: AutoencoderKL, pictures_BCHW: Tensor, weights_B1HW: Tensor, rng: torch.Generator, *, edge_weight: float
) -> Tensor:
    """Weighted L1 + 2 MSE, plus the error of 4×4 and 8×8 means, of neighbouring differences, and a little KL.

    The means are what keeps colours right: GroupNorm hides a picture's mean colour from the other terms for long.
    """
    posterior = vae.encode(pictures_BCHW).latent_dist
    noise_BCHW = torch.randn(posterior.mean.shape, generator=rng).to(pictures_BCHW.device)
    error_BCHW = vae.decode(posterior.mean + posterior.std * noise_BCHW).sample - pictures_BCHW
    pixel = (weights_B1HW * (error_BCHW.abs() + 2 * error_BCHW.square())).mean()
    low = sum(functional.avg_pool2d(error_BCHW, size).square().mean() for size in (4, 8))
    edges = error_BCHW.diff(dim=-1).abs().mean() + error_BCHW.diff(dim=-2).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = pixel + LOW_FREQUENCY_WEIGHT * low + edge_weight * edges + KL_WEIGHT * kl
    return loss


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Pictures) -> Pictures:
    """uint8 pictures (B, 128, 128, 3) after encoding (the mean) and decoding."""
    target = next(vae.parameters()).device
    rows = []
    for start in range(0, len(pictures), 8):
        latents = vae.encode(to_tensor(pictures[start : start + 8]).to(target)).latent_dist.mean
        drawn = vae.decode(latents).sample
        rows.append(((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(rows)


def psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Peak signal to noise ratio of the reconstructions, dB, from the mean squared error over all pictures."""
    error = reconstruct(vae, pictures).astype(np.float64) - pictures
    return float(10 * math.log10(255**2 / np.mean(error**2)))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures) -> Tensor:
    """Posterior means (B, 4, 16, 16) of uint8 pictures, unscaled."""
    target = next(vae.parameters()).device
    parts = [
        vae.encode(to_tensor(pictures[start : start + 8]).to(target)).latent_dist.mean.cpu()
        for start in range(0, len(pictures), 8)
    ]
    return torch.cat(parts)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, pictures: Pictures) -> None:
    """Change the autoencoder so that latents × 0.18215 have mean 0 and covariance 1; what it draws stays the same.

    `quant_conv` (1×1) makes latents z = A h + a of which the means are the first four rows. With mean m and
    covariance C over the pictures, the new latents are z' = C^(-1/2) (z - m) / 0.18215, and `post_quant_conv` undoes
    that. The log-variances become constant and small.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    latents = encode(vae, pictures).double().permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS)
    mean = latents.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T / SCALING_FACTOR
    colour = torch.linalg.inv(whiten)

    rows, offset = quant.weight[:LATENT_CHANNELS, :, 0, 0].double().cpu(), quant.bias[:LATENT_CHANNELS].double().cpu()
    quant.weight[:LATENT_CHANNELS, :, 0, 0] = (whiten @ rows).to(quant.weight)
    quant.bias[:LATENT_CHANNELS] = (whiten @ (offset - mean)).to(quant.weight)
    quant.weight[LATENT_CHANNELS:] = 0
    quant.bias[LATENT_CHANNELS:] = -8.0  # standard deviation 0.018, against 5.5 of the latents

    columns, post_offset = post.weight[:, :, 0, 0].double().cpu(), post.bias.double().cpu()
    post.weight[:, :, 0, 0] = (columns @ colour).to(post.weight)
    post.bias.copy_((post_offset + columns @ mean).to(post.weight))
