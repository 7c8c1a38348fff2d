"""What captions say, encoded once each and kept in the store, for trainings that leave text encoders as they are."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sdforge.identity import H
from sdforge.order import Given
from sdforge.run.derived import Derived, Recent
from sdforge.run.diffusion import Conditioning, Diffusion


class Texts:
    """Encodings of captions by one checkpoint. given: that checkpoint, whose identities name them."""

    def __init__(self, diffusion: Diffusion, given: Given, derived: Derived) -> None:
        self.diffusion, self.derived = diffusion, derived
        owners = diffusion.family.owners
        # where pictures are shown, it is said too that none is, in as many numbers as the U-Net wants
        read = ("text_encoder", "tokenizer", *(["unet"] if diffusion.family.image_embeddings else []))
        parts = {name: i for name, i in given.identities.items() if name.startswith(read)}
        facts = {name: value for name, value in given.facts.items() if owners.get(name) == "text_encoder"}
        self._from = {"components": parts, "facts": facts, "precision": str(diffusion.precision)}
        self._recent = Recent[str, Conditioning](derived, _bytes)

    def of(self, captions: list[str]) -> Conditioning:
        """Return what captions say, as one batch."""
        return Conditioning.stack([self._recent.get(caption, partial(self._had, caption)) for caption in captions])

    def _had(self, caption: str) -> Conditioning:
        name = H("text", {**self._from, "caption": caption})  # type: ignore[dict-item]
        tensors = self.derived.get("texts", name, lambda: self._encode(caption))
        return Conditioning(tensors["hidden"], {key: value for key, value in tensors.items() if key != "hidden"})

    @torch.no_grad()
    def _encode(self, caption: str) -> dict[str, Tensor]:
        condition = self.diffusion.encode_text([caption])
        return {"hidden": condition.hidden_BLD.float(), **condition.added}


def _bytes(said: Conditioning) -> int:
    return said.hidden_BLD.nbytes + sum(tensor.nbytes for tensor in said.added.values())
