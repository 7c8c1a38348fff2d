"""Pictures → a direction; the text encoder, steered towards it.

Shapes in names: B prompts, L tokens, W width of the text, D width of the space that CLIP's pictures and texts share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdforge.dtypes import SAFETENSORS
from sdforge.edits.insert import ROWS
from sdforge.errors import UsageError
from sdforge.families.load import load_image_encoder, load_text_encoder, see
from sdforge.families.stable_diffusion import vision_config
from sdforge.formats.clip_folder import fact
from sdforge.order import Given, Order, Outcome
from sdforge.run.fingerprint import fingerprint
from sdforge.run.images import plan_pictures, read_pixels, split
from sdforge.run.sketch import sketch
from sdforge.run.states import Stopped
from sdforge.run.steering import Aesthetic, cosines, steer
from sdforge.run.tensors import DTYPES, load_component, rounded, write_pack
from sdforge.run.tokens import Words
from sdforge.trainings.aesthetic_gradient import TABLE

Report = Callable[..., None]
ENCODER = "text_encoder"
MODEL = "text_model."  # which canonical names have, and transformers leaves out


def steer_encoder(order: Order, report: Report, stopped: Callable[[], bool]) -> Outcome:
    """Return the direction and the steered text encoder. Raises Stopped, UsageError for a CLIP that does not fit."""
    began = time.monotonic()
    device = torch.device(order.how.get("device", "cpu"))
    settings = TABLE.model_construct(**order.settings)
    on, clip, family = order.the("on"), order.the("clip"), order.architecture
    _refuse_misfit(on, clip)
    report(note="looking at the pictures")
    vector_D = mean_embedding(clip, order.the("dataset"), device)
    (projection_DW,) = load_component(clip.components["text_projection"], torch.float32).values()
    aesthetic = Aesthetic(vector_D, projection_DW.to(device), settings.steps, settings.learning_rate)
    encoder: Any = load_text_encoder(
        family.configs(on.facts, on.shapes())[ENCODER], on.components[ENCODER], device, projected=False
    )
    words = Words(on.vocabulary, on.facts.get("tokens", []))
    empty_1L, prompts_BL = (_token_ids(order, words, prompts).to(device) for prompts in ([""], settings.prompts))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        empty_1LW = encoder(input_ids=empty_1L).last_hidden_state
    found: list[float] = []
    for cosine in steer(encoder, prompts_BL, words.end, aesthetic):
        if stopped():
            raise Stopped
        found.append(cosine)
        report(step=len(found) - 1, steps=settings.steps, loss=-cosine)
    with torch.no_grad():
        moved_1LW = encoder(input_ids=empty_1L).last_hidden_state - empty_1LW
        each_B = cosines(encoder, prompts_BL, words.end, aesthetic)
    outcome = _outcome(order, aesthetic, before, encoder.state_dict())
    outcome.facts["shift"] = round(float(moved_1LW.norm() / empty_1LW.norm()), 4)  # of the empty prompt, relative
    outcome.fingerprint = fingerprint(device)
    outcome.record |= {
        "losses": [-cosine for cosine in found],
        "cosines": [round(float(cosine), 4) for cosine in each_B],
        "seconds": round(time.monotonic() - began, 3),
    }
    return outcome


def _token_ids(order: Order, words: Words, prompts: list[str]) -> Tensor:
    """Return the numbers (B, L) of prompts, filled up as the checkpoint's text encoder was told to be."""
    family = order.architecture
    (padding,) = family.tokenizers().values()
    word = str(family.fact(order.the("on").facts, padding))
    return torch.tensor([words.encode(prompt, word) for prompt in prompts])


def _outcome(order: Order, aesthetic: Aesthetic, before: dict[str, Tensor], after: dict[str, Tensor]) -> Outcome:
    """Write direction, projection and the steered text encoder; before, after: its tensors."""
    settings = order.settings
    exact = {"vector": aesthetic.vector_D, "text_projection": aesthetic.projection_DW}
    exact |= {f"{ENCODER}.{MODEL}{name}": tensor for name, tensor in after.items()}
    dtype = DTYPES[SAFETENSORS[settings["dtype"]]]
    tensors = {name: rounded(name, tensor.detach().cpu(), dtype) for name, tensor in exact.items()}
    outcome = write_pack(Path(order.work), {"aesthetic": tensors})
    lines, norm = sketch(
        [(name, (after[name] - tensor).reshape(tensor.shape[0], -1), None) for name, tensor in before.items()]
    )
    outcome.facts = {name: settings[name] for name in ("steps", "learning_rate", "prompts")}
    outcome.grade = "B"
    outcome.record = {"steps": settings["steps"], "sketch": lines, "norm": norm}
    return outcome


def _refuse_misfit(on: Given, clip: Given) -> None:
    """Refuse a text encoder that is not the whole text model, as wide, that the projection stands behind."""
    layers = sum(ref.name.endswith(".layer_norm1.weight") for ref in on.components[ENCODER])
    whole = fact(clip.facts, "text_layers")
    if layers != whole:
        raise UsageError(
            f"the checkpoint's text encoder has {layers} layers, the CLIP's text model {whole}",
            hint="its projection is for what the last of them says",
        )
    width = on.shapes()[ENCODER][ROWS][1]
    (projection,) = clip.components["text_projection"]
    if projection.shape[1] != width:
        raise UsageError(
            f"the checkpoint's text encoder is {width} wide, the CLIP's text model {projection.shape[1]}",
            hint="take the CLIP whose text model the text encoder came from",
        )


@torch.no_grad()
def mean_embedding(clip: Given, pictures: Given, device: torch.device) -> Tensor:
    """Return the mean (D) of the pictures' normalised embeddings: squares from their middle, scaled bicubically.

    Normalised first, so that every picture counts alike.
    """
    refs, facts = clip.components["image_encoder"], clip.facts
    config = vision_config(clip.shapes()["image_encoder"], fact(facts, "heads"), fact(facts, "activation"))
    encoder = load_image_encoder(config, refs, device)
    learned, _ = split(pictures)
    shown = plan_pictures(learned, config["image_size"], buckets=False)
    seen: dict[str, Tensor] = {}  # by content: those that are repeated are looked at once
    for picture in shown:
        if picture.sha256 not in seen:
            edge = min(picture.original)
            pixels_BCHW = read_pixels(replace(picture, size=(edge, edge)), flip=False).to(device)
            seen[picture.sha256] = see(
                encoder, pixels_BCHW, antialias=True, mean=fact(facts, "mean"), std=fact(facts, "std")
            )
    return functional.normalize(torch.cat([seen[picture.sha256] for picture in shown])).mean(0)
