"""Make both bases from nothing: `python -m demo.train_bases`.

Stages: draw, autoencoder, text warm-up, flat base, ink base. Everything unfinished is kept in the work folder, so a
run that was stopped goes on where it was. It uses a CUDA device if there is one, else one CPU thread.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demo import autoencoder, denoiser
from demo.bases import SCALING_FACTOR, Base, new_vae, write_base
from demo.denoiser import FLAT_COURSE, INK_COURSE, Course, Learner
from demo.evaluate import held_out_prompts, judge, report
from demo.palettes import LOOKS
from demo.picture_sets import (
    autoencoder_pictures,
    base_pictures,
    combinations,
    finishing_pictures,
    held_out_pictures,
)
from demo.progress import device, load_state, save_state, say
from demo.sampling import Sampler, draw_prompts
from demo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

DRAWINGS = {"flat": 4000, "ink": 2000}
FOLDING_DRAWINGS = 400  # to measure the latents' mean and covariance, of each base's style
TEXT_STEPS, TEXT_BATCH = 300, 48
WATCHED_PROMPTS = 24  # drawn now and then while a base is trained


def make_autoencoder(work: Path) -> AutoencoderKL:
    """Train encoder and decoder, fold the latents' normalisation into them, then train the decoder alone."""
    torch.manual_seed(0)
    vae = new_vae()
    finished = load_state(work / "vae.pt")
    if finished is not None:
        vae.load_state_dict(finished)
        return vae.to(device()).eval()
    held_out = held_out_pictures()
    first, finish, sharpen = autoencoder.FIRST_COURSE, autoencoder.FINISH_COURSE, autoencoder.SHARPEN_COURSE
    autoencoder.train_autoencoder(vae, autoencoder_pictures(work), held_out, first, work / "vae-first.pt")
    autoencoder.train_autoencoder(vae, finishing_pictures(work), held_out, finish, work / "vae-finish.pt")
    _fold(vae, work)
    autoencoder.train_autoencoder(vae, finishing_pictures(work), held_out, sharpen, work / "vae-sharpen.pt")
    save_state(work / "vae.pt", vae.state_dict())
    return vae


def _fold(vae: AutoencoderKL, work: Path) -> None:
    sample = base_pictures(LOOKS["flat"], DRAWINGS["flat"], work)[:FOLDING_DRAWINGS]
    before = autoencoder.psnr(vae, sample[:24])
    autoencoder.fold_normalisation(vae, sample)
    say(
        f"folded latents; flat training drawings before {before:.3f} dB, after {autoencoder.psnr(vae, sample[:24]):.3f}"
    )


def make_latents(vae: AutoencoderKL, style: str, work: Path) -> Tensor:
    """Scaled latents (N, 4, 16, 16) of a base's training drawings."""
    path = work / f"latents-{style}.pt"
    latents: Tensor | None = load_state(path)
    if latents is None:
        pictures = base_pictures(LOOKS[style], DRAWINGS[style], work)
        say(f"encoding {len(pictures)} {style} drawings")
        latents = autoencoder.encode(vae, pictures) * SCALING_FACTOR
        save_state(path, latents)
    say(f"{style} latents: mean {latents.mean():+.3f}, standard deviation {latents.std():.3f}")
    return latents


def make_learner(tokenizer: Tokenizer, work: Path) -> Learner:
    """Untrained U-Net, and a text encoder that tells the attributes apart."""
    learner = denoiser.new_learner(tokenizer, seed=0)
    warm = load_state(work / "text.pt")
    if warm is None:
        denoiser.warm_up_text(learner, tokenizer, steps=TEXT_STEPS, batch=TEXT_BATCH, seed=7)
        warm = {"text_encoder": learner.text_encoder.state_dict(), "heads": learner.heads.state_dict()}
        save_state(work / "text.pt", warm)
    learner.text_encoder.load_state_dict(warm["text_encoder"])
    learner.heads.load_state_dict(warm["heads"])
    return learner


def make_base(
    learner: Learner, course: Course, vae: AutoencoderKL, tokenizer: Tokenizer, work: Path, out: Path
) -> Learner:
    """Train one base, writing its folder again and again; the averaged weights at the end."""
    latents = make_latents(vae, course.style, work)
    data = latents, combinations(course.style, len(latents))
    average = learner
    state_file = work / f"{course.style}.pt"
    for step, average in denoiser.train_denoiser(learner, tokenizer, data, course, state_file):
        base = Base(average.unet, vae, average.text_encoder, tokenizer)
        write_base(out / course.style, base)
        right, wrong = denoiser.eye_alarm(average, tokenizer, data, course.style)
        say(f"{course.style} step {step}: error at the eyes {right:.4f}, with the wrong eye colour {wrong:.4f}")
        asked, prompts = zip(*held_out_prompts(course.style, WATCHED_PROMPTS), strict=True)
        say(report(judge(asked, draw_prompts(base, prompts, range(WATCHED_PROMPTS), Sampler()))))
    return average


def main() -> None:
    """Make both bases."""
    parser = argparse.ArgumentParser(description="Make the demo's two bases from nothing.")
    parser.add_argument("--work", type=Path, default=Path("out/bases"), help="folder for unfinished states")
    parser.add_argument("--out", type=Path, default=Path("recipes/bases"), help="where flat/ and ink/ are written")
    arguments = parser.parse_args()
    say(f"training on {device()}")
    tokenizer = Tokenizer.new()
    vae = make_autoencoder(arguments.work)
    flat = make_base(
        make_learner(tokenizer, arguments.work), FLAT_COURSE, vae, tokenizer, arguments.work, arguments.out
    )
    make_base(copy.deepcopy(flat), INK_COURSE, vae, tokenizer, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
