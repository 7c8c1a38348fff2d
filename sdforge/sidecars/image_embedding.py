"""Draw from an image embedding whatever is asked for: prompts are heard beside it, where a family hears any.

tensors: `image_embeds` (1, D). facts: `level` of noise, which is 0, and none is added. Nothing shown is zeros, on the
other side of guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.run.diffusion import Diffusion

SHOWN = "StableUnCLIPImg2ImgPipeline"
VARIED = "StableDiffusionImageVariationPipeline"


def attach(diffusion: Diffusion, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Callable[[], None]:  # noqa: ARG001
    """Show it to a loaded checkpoint; return what takes it away again."""
    image_1D = tensors["image_embeds"].to(diffusion.device).float()
    if not diffusion.family.image_embeddings:
        raise UsageError(
            f"{diffusion.family.title} draws from words, not from a picture's embedding",
            hint="take the preset's checkpoint from the one that the embedding was found on",
        )
    before, diffusion.shown_1D = diffusion.shown_1D, image_1D

    def take_off() -> None:
        diffusion.shown_1D = before

    return take_off


def attach_pipeline(pipeline: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Show it to a pipeline of diffusers, which is then called without a picture. Raises UsageError for another one."""
    name = type(pipeline).__name__
    makers = {SHOWN: _shown, VARIED: _varied}
    if name not in makers:
        raise UsageError(f"{name} draws from words, not from a picture's embedding", hint=f"load it as {SHOWN}")
    plain = getattr(type(pipeline), "plain_class", type(pipeline))  # one that was attached before is let go
    kind = makers[name](plain, tensors["image_embeds"], int(facts.get("level", 0)))
    kind.__name__ = kind.__qualname__ = name  # by which diffusers saves it
    kind.plain_class = plain
    pipeline.__class__ = kind


def _shown(kind: Any, image_1D: Tensor, level: int) -> Any:
    class Shown(kind):  # type: ignore[misc]
        """Takes `image_embeds` by default; its noise is nothing where none is given, so that pictures are the same."""

        def __call__(self, *args: Any, **more: Any) -> Any:
            if not args and more.get("image") is None and more.get("image_embeds") is None:
                prompts = more.get("prompt", more.get("prompt_embeds"))
                count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
                more["image_embeds"] = image_1D.to(self.device, self.unet.dtype).repeat(count, 1)
                more["noise_level"] = level
            return super().__call__(*args, **more)

        def noise_image_embeddings(self, image_embeds: Tensor, noise_level: int, *args: Any, **more: Any) -> Any:
            if not args and more.get("noise") is None:
                more["noise"] = torch.zeros_like(image_embeds)
            return super().noise_image_embeddings(image_embeds, noise_level, *args, **more)

    return Shown


def _varied(kind: Any, image_1D: Tensor, level: int) -> Any:  # noqa: ARG001 -- this family knows no levels
    class Varied(kind):  # type: ignore[misc]
        """Its own call wants a picture to count; what the picture shows is not looked at where none was given."""

        def __call__(self, image: Any = None, *args: Any, **more: Any) -> Any:
            self._given = image is not None
            return super().__call__(torch.zeros(1, 3, 8, 8) if image is None else image, *args, **more)

        def _encode_image(self, image: Any, device: Any, num_images_per_prompt: int, guided: bool) -> Tensor:
            if self._given:
                found: Tensor = super()._encode_image(image, device, num_images_per_prompt, guided)
                return found
            told_BLD = image_1D[:, None].to(device, self.unet.dtype).repeat(num_images_per_prompt, 1, 1)
            return torch.cat([torch.zeros_like(told_BLD), told_BLD]) if guided else told_BLD

    return Varied
