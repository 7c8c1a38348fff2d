"""Make the small CLIP and the base that is shown a picture, from the flat base: `python -m demo.train_unclip`.

Stages: draw, CLIP, latents and image embeddings, U-Net. Everything unfinished is kept in the work folder, so a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from demo import autoencoder, clip, unclip
from demo.attributes import caption, draw_combinations
from demo.bases import SCALING_FACTOR, Base, read_base
from demo.clip import STYLES, Clip, Drawings
from demo.evaluate import judge, report
from demo.picture_sets import styled_pictures
from demo.progress import device, load_state, save_state, say
from demo.sampling import Sampler, decode
from demo.unclip import Shown

DRAWINGS = 4800
WATCHED = 24  # pictures shown now and then while the base is trained


def drawings(count: int, seed: int, work: Path, *, held_out: bool) -> Drawings:
    """Half of them flat, a quarter ink, a quarter chalk."""
    shown = list(islice(draw_combinations(seed, held_out=held_out), count))
    styles = [STYLES[(0, 1, 0, 2)[index % 4]] for index in range(count)]
    return Drawings(styled_pictures(shown, styles, seed, work), shown, styles)


def make_clip(flat: Base, learned: Drawings, watched: Drawings, work: Path) -> Clip:
    """Train the CLIP and say how well it tells held-out pictures apart."""
    made = clip.train_clip(flat, learned, work / "clip.pt")
    captions = [caption(a, style) for a, style in zip(watched.shown, watched.styles, strict=True)]
    pictures, texts = clip.retrieved(flat, made, watched, captions)
    say(f"of {len(captions)} held-out: pictures find their caption {pictures:.1%}, captions their picture {texts:.1%}")
    return made


def make_latents(flat: Base, learned: Drawings, work: Path) -> Tensor:
    """Scaled latents (N, 4, 16, 16) of the drawings."""
    path = work / "latents-unclip.pt"
    latents: Tensor | None = load_state(path)
    if latents is None:
        say(f"encoding {len(learned.pictures)} drawings")
        latents = autoencoder.encode(flat.vae, learned.pictures) * SCALING_FACTOR
        save_state(path, latents)
    return latents


def main() -> None:
    """Make both."""
    parser = argparse.ArgumentParser(description="Make the demo's CLIP and the base that is shown a picture.")
    parser.add_argument("--work", type=Path, default=Path("out/bases"), help="folder for unfinished states")
    parser.add_argument("--out", type=Path, default=Path("recipes/bases"), help="where clip/ and unclip/ are written")
    arguments = parser.parse_args()
    say(f"training on {device()}")
    flat = read_base(arguments.out / "flat")
    learned = drawings(DRAWINGS, 6, arguments.work, held_out=False)
    watched = drawings(128, 8, arguments.work, held_out=True)
    made = make_clip(flat, learned, watched, arguments.work)
    clip.write_clip(arguments.out / "clip", made, flat)
    made = clip.read_clip(arguments.out / "clip")  # as it is shipped: in half precision
    images = clip.embed(made, learned.pictures)
    seen = clip.embed(made, watched.pictures)[:WATCHED]
    latents = make_latents(flat, learned, arguments.work)
    unet = unclip.grown(flat.unet)
    shown = Shown(Base(unet, flat.vae, flat.text_encoder, flat.tokenizer), images.mean(0), images.std(0))
    for step, average in unclip.train_unclip(shown, learned, latents, images, arguments.work / "unclip.pt"):
        unclip.write_unclip(arguments.out / "unclip", average, made)
        drawn = unclip.imagine(average, seen, [""] * WATCHED, range(WATCHED), Sampler(guidance=2.5))
        say(f"step {step}: {report(judge(watched.shown[:WATCHED], decode(flat.vae, drawn)))}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
