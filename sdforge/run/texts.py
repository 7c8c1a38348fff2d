"""What captions say, encoded once each and kept in the store, for trainings that leave text encoders as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from sdforge.identity import H
from sdforge.order import Given
from sdforge.run.derived import Derived
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
        self._kept: dict[str, Conditioning] = {}

    def of(self, captions: list[str]) -> Conditioning:
        """Return what captions say, as one batch."""
        for caption in captions:
            if caption not in self._kept:
                name = H("text", {**self._from, "caption": caption})  # type: ignore[dict-item]
                tensors = self.derived.get("texts", name, lambda caption=caption: self._encode(caption))  # type: ignore[misc]
                added = {key: value for key, value in tensors.items() if key != "hidden"}
                self._kept[caption] = Conditioning(tensors["hidden"], added)
        return Conditioning.stack([self._kept[caption] for caption in captions])

    @torch.no_grad()
    def _encode(self, caption: str) -> dict[str, Tensor]:
        condition = self.diffusion.encode_text([caption])
        return {"hidden": condition.hidden_BLD.float(), **condition.added}
