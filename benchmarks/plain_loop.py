"""A LoRA training written by hand, as one would without sdforge: what the shared loop is measured against.

Nothing of sdforge is used. The random numbers follow the same recipe (sha256 of purpose, seed and step), so that the
losses must be the same bits.
"""

from __future__ import annotations

import hashlib
import math
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def draw(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"sdforge.{purpose}\0{seed}\0{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def train(
    base: str, latents: list[Tensor], texts: list[Tensor], settings: dict[str, Any], device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Return (losses, seconds of each step). latents, texts: of every picture, (1, 4, h, w) and (1, 77, d)."""
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
    unet.to(device).eval().requires_grad_(False)
    wanted = [n for n, _ in unet.named_modules() if n.endswith(tuple(f".{layer}" for layer in LAYERS))]
    rank, seed, batch, steps = (settings[name] for name in ("rank", "seed", "batch", "steps"))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted), unet)
    trained = []
    for name, layer in sorted((n, m) for n, m in unet.named_modules() if hasattr(m, "lora_A")):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        noise = torch.rand(down.shape, generator=draw(seed, f"init unet.{name}"))
        with torch.no_grad():
            down.copy_((noise * 2 - 1) * (1 / math.sqrt(down[0].numel())))
            up.zero_()
        trained += [(f"unet.{name}.lora_down", down), (f"unet.{name}.lora_up", up)]
    parameters = [parameter for _, parameter in sorted(trained, key=lambda row: row[0])]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt().square().float().to(device)
    losses, seconds = [], []
    for step in range(steps):
        began = time.perf_counter()
        rows = []
        for n in range(step * batch, step * batch + batch):
            lap, place = divmod(n, len(latents))
            edge = 8 * latents[0].shape[-1]
            rows.append(int(torch.randperm(len(latents), generator=draw(seed, f"order {edge}x{edge}", lap))[place]))
        clean = torch.cat([latents[row] for row in rows])
        numbers = draw(seed, "noise", step)
        noise = torch.randn(clean.shape, generator=numbers).to(device)
        timesteps = torch.randint(0, 1000, (batch,), generator=numbers).to(device)
        alpha = alphas[timesteps]
        signal, dirt = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        noisy = signal * clean.to(device) + dirt * noise
        said = torch.cat([texts[row] for row in rows]).to(device)
        predicted = unet(noisy, timesteps, encoder_hidden_states=said, return_dict=False)[0].float()
        ratio = (alpha / (1 - alpha)).clamp_min(1e-8)
        loss = ((predicted - noise).square().mean((1, 2, 3)) * (ratio.clamp_max(5.0) / ratio)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    return losses, seconds
