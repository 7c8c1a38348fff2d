"""Steer the text encoder by every prompt that is drawn, for that prompt alone; the other side of guidance is not.

tensors: `vector` (D), `text_projection` (D, width of the text). facts: `steps`, `learning_rate`.
Source: Gallego 2022, https://arxiv.org/abs/2209.12330
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.steering import Aesthetic, steered


def attach(diffusion: Diffusion, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Callable[[], None]:
    """Let a loaded checkpoint steer its text encoder; return what takes it off. Raises UsageError for several."""
    if len(diffusion.text_encoders) != 1:
        raise UsageError(f"{diffusion.family.title} does not have one text encoder, which an aesthetic steers")
    device = diffusion.device
    steering = _Steering(diffusion, Aesthetic.of({n: t.to(device) for n, t in tensors.items() if n in READ}, facts))
    diffusion.encode_text = steering.text  # type: ignore[method-assign]
    diffusion.encode_negative = steering.negative  # type: ignore[method-assign]

    def take_off() -> None:
        del diffusion.encode_text, diffusion.encode_negative

    return take_off


READ = ("vector", "text_projection")


class _Steering:
    def __init__(self, diffusion: Diffusion, aesthetic: Aesthetic) -> None:
        self.diffusion, self.aesthetic = diffusion, aesthetic
        self.plain_text, self.plain_negative = diffusion.encode_text, diffusion.encode_negative
        self.active = True

    def text(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        if not self.active:
            return self.plain_text(prompts, clip_skip=clip_skip)
        said = {prompt: self._said(prompt, clip_skip) for prompt in dict.fromkeys(prompts)}
        return Conditioning.stack([said[prompt] for prompt in prompts])

    def negative(self, prompts: list[str], *, clip_skip: int = 0) -> Conditioning:
        self.active = False
        try:
            return self.plain_negative(prompts, clip_skip=clip_skip)
        finally:
            self.active = True

    def _said(self, prompt: str, clip_skip: int) -> Conditioning:
        if not prompt:
            return self.plain_text([prompt], clip_skip=clip_skip)
        ((name, encoder),) = self.diffusion.text_encoders.items()
        ids_BL = self.diffusion.token_ids([prompt], name)
        with steered(encoder, ids_BL, self.diffusion.words.end, self.aesthetic):
            return self.plain_text([prompt], clip_skip=clip_skip)


def attach_pipeline(pipeline: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Let a pipeline of diffusers steer its text encoder by every prompt that it encodes. Raises UsageError."""
    if getattr(pipeline, "text_encoder", None) is None or getattr(pipeline, "text_encoder_2", None) is not None:
        raise UsageError(f"{type(pipeline).__name__} does not have one text encoder, which an aesthetic steers")
    plain, encoder, tokenizer = pipeline.encode_prompt, pipeline.text_encoder, pipeline.tokenizer
    aesthetic = Aesthetic.of({n: t.to(pipeline.device) for n, t in tensors.items() if n in READ}, facts)

    def encode_prompt(prompt: Any = None, device: Any = None, count: int = 1, *args: Any, **more: Any) -> Any:
        count = more.pop("num_images_per_prompt", count)
        positive_BLD, *rest = plain(prompt, device, count, *args, **more)
        alike = {name: more[name] for name in ("lora_scale", "clip_skip") if name in more}
        if prompt is None:
            return (positive_BLD, *rest)
        said = []
        for text in [prompt] if isinstance(prompt, str) else prompt:
            if hasattr(pipeline, "maybe_convert_prompt"):
                text = pipeline.maybe_convert_prompt(text, tokenizer)
            length = tokenizer.model_max_length
            ids_BL = tokenizer(
                text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids.to(pipeline.device)
            if not text:
                said.append(plain(text, device, count, False, **alike)[0])
                continue
            with steered(encoder, ids_BL, tokenizer.eos_token_id, aesthetic), torch.no_grad():
                said.append(plain(text, device, count, False, **alike)[0].to(positive_BLD.dtype))
        return (torch.cat(said), *rest)

    pipeline.encode_prompt = encode_prompt
