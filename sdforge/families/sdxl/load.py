"""SDXL tensors → a `Diffusion`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdforge.families.load import common, shown_nothing
from sdforge.families.sdxl import FAMILY
from sdforge.order import Given
from sdforge.run.diffusion import Conditioning, Diffusion, Framing


@final
class StableDiffusionXLLoaded(Diffusion):
    """The penultimate states of two text encoders, the second one's projected end of text, and a picture's sizes."""

    def encode_text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        states, pooled = [], None
        with self.arithmetic():
            for name, encoder in self.text_encoders.items():
                found = encoder(input_ids=self.token_ids(prompts, name), output_hidden_states=True)
                states.append(found.hidden_states[-(clip_skip + 2)])
                pooled = getattr(found, "text_embeds", pooled)
        assert isinstance(pooled, Tensor)
        whole = (self.resolution, self.resolution)
        told = Conditioning(torch.cat(states, -1), {"text_embeds": pooled})
        return self.sized(told, [(whole, (0, 0), whole)] * len(prompts))

    def silenced(self, condition: Conditioning, rows: list[bool]) -> Conditioning:
        silent_B = torch.tensor(rows, device=condition.hidden_BLD.device)
        pooled_BD = condition.added["text_embeds"].masked_fill(silent_B[:, None], 0)
        return Conditioning(
            condition.hidden_BLD.masked_fill(silent_B[:, None, None], 0), condition.added | {"text_embeds": pooled_BD}
        )

    def sized(self, condition: Conditioning, sizes: list[Framing]) -> Conditioning:
        # height before width, top before left (§2.2 of the paper)
        rows = [[*original[::-1], *crop[::-1], *target[::-1]] for original, crop, target in sizes]
        times = torch.tensor(rows, dtype=torch.float32, device=condition.hidden_BLD.device)
        return Conditioning(condition.hidden_BLD, condition.added | {"time_ids": times})

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


def load(given: Given, device: torch.device, precision: torch.dtype) -> Diffusion:
    """Build the networks of a checkpoint from an order's input. Raises UsageError if a part is missing.

    precision: of the frozen networks' arithmetic; their weights are kept in fp32 all the same.
    """
    return StableDiffusionXLLoaded(**common(FAMILY, given, device, precision))
