"""Pictures and prompts in CLIP's space: B pictures, L tokens, W width of the text, D width of the space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdforge.checks import verdict
from sdforge.errors import UsageError
from sdforge.families.load import load_image_encoder, load_text_encoder, see
from sdforge.families.stable_diffusion import vision_config
from sdforge.formats.clip_folder import fact
from sdforge.order import Given, Order, Outcome
from sdforge.run.fingerprint import fingerprint
from sdforge.run.images import plan_pictures, read_pixels
from sdforge.run.tensors import load_component
from sdforge.run.tokens import Words

ENCODER = "text_encoder"


@torch.no_grad()
def score(order: Order, report: Callable[..., None]) -> Outcome:
    """Return the verdict over the mean cosines that the settings ask for."""
    device, settings = torch.device(order.how.get("device", "cpu")), order.settings
    clip, rows = order.the("clip"), order.the("pictures").pictures
    report(note="looking at the pictures")
    seen_BD = _seen(clip, [row[0] for row in rows], device)
    measured: dict[str, float] = {}
    if "words" in order.inputs:
        said_BD = _said(order, [row[2] for row in rows], device)
        measured["text"] = float((seen_BD * said_BD).sum(1).mean())
    if "to" in order.inputs:
        reference_BD = _seen(clip, [row[0] for row in order.the("to").pictures], device)
        measured["image"] = float((seen_BD @ reference_BD.T).mean())
    faults = [
        f"{name} {value:.3f} is less than {settings[name]:g}"
        for name, value in measured.items()
        if value < settings[name]
    ]
    outcome = verdict(faults, ", ".join(f"{name} {value:.3f}" for name, value in measured.items()), measured)
    outcome.grade, outcome.fingerprint = "B", fingerprint(device)
    return outcome


def _seen(clip: Given, paths: list[str], device: torch.device) -> Tensor:
    """Return the normalised embeddings (B, D) of pictures: squares from their middle, scaled bicubically."""
    refs, facts = clip.components["image_encoder"], clip.facts
    config = vision_config(clip.shapes()["image_encoder"], fact(facts, "heads"), fact(facts, "activation"))
    encoder = load_image_encoder(config, refs, device)
    found = []
    for i, path in enumerate(paths):
        ((picture),) = plan_pictures([[path, str(i), "", 1]], config["image_size"], buckets=False)
        edge = min(picture.original)
        pixels_BCHW = read_pixels(replace(picture, size=(edge, edge)), flip=False).to(device)
        found.append(see(encoder, pixels_BCHW, antialias=True, mean=fact(facts, "mean"), std=fact(facts, "std")))
    return functional.normalize(torch.cat(found))


def _said(order: Order, prompts: list[str], device: torch.device) -> Tensor:
    """Return the normalised embeddings (B, D) of prompts: what the text model says at their ends, projected."""
    on, clip, family = order.the("words"), order.the("clip"), order.architecture
    layers = sum(ref.name.endswith(".layer_norm1.weight") for ref in on.components[ENCODER])
    if layers != fact(clip.facts, "text_layers"):
        raise UsageError(
            f"the text encoder of `words` has {layers} layers, the CLIP's text model {fact(clip.facts, 'text_layers')}",
            hint="its projection is for what the last of them says: name a checkpoint with the CLIP's own",
        )
    encoder: Any = load_text_encoder(
        family.configs(on.facts, on.shapes())[ENCODER], on.components[ENCODER], device, projected=False
    )
    words = Words(on.vocabulary, on.facts.get("tokens", []))
    (padding,) = family.tokenizers().values()
    encoded = [words.encode(prompt, str(family.fact(on.facts, padding))) for prompt in prompts]
    ids_BL = torch.tensor(encoded, device=device)
    ends_B = (ids_BL == words.end).int().argmax(1)
    hidden_BLW = encoder(input_ids=ids_BL).last_hidden_state
    (projection_DW,) = load_component(clip.components["text_projection"], torch.float32).values()
    return functional.normalize(hidden_BLW[torch.arange(len(prompts)), ends_B] @ projection_DW.to(device).T)
