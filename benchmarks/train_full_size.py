"""LoRA trainings on U-Nets of full size with random weights, for a CUDA device: pictures per second.

Called by `python -m benchmarks.train --device cuda`. Latents and texts are random and cached, as in a long training;
what is timed are steps of the shared loop, from the 20th on.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

STEPS = 60
SHAPES: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...]]] = {
    # name: family, configuration of the U-Net, edge in pixels, batches
    "SD1.5 at 512": ("sd15", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 512, (8, 32)),
}


def write_base(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of the true size with random weights, fp16."""
    import shutil

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    root = Path(__file__).parents[1] / "recipes" / "bases" / "flat"
    shutil.copytree(root, folder)  # VAE, tokenizer and schedule of the demo serve
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "text_encoder")
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**config)
    unet.half().save_pretrained(folder / "unet")
    words = 697
    text: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=words - 2, eos_token_id=words - 1, projection_dim=768,
        )
    )  # fmt: skip
    text.half().save_pretrained(folder / "text_encoder")


def measure(device: torch.device, costs: dict[str, float], peaks: dict[str, float]) -> None:
    """Print a row for every shape and batch: pictures per second, share of the peak, memory."""
    from sdforge.run.train import run_training
    from tests.families.workbench import take
    from tests.run.order import dataset, order

    name = torch.cuda.get_device_properties(device).name
    peak = next((value for key, value in peaks.items() if key in name), None)
    print(f"\n{name}, torch {torch.__version__}\n\n| LoRA, rank 16 | batch | pictures/s | of the peak | GB |")
    print("| --- | --: | --: | --: | --: |")
    for what, (family, config, edge, batches) in SHAPES.items():
        with tempfile.TemporaryDirectory() as place:
            write_base(Path(place) / "base", config)
            (Path(place) / "data").mkdir()
            for i in range(4):
                Image.effect_noise((edge, edge), 60).convert("RGB").save(Path(place) / "data" / f"{i}.png")
                (Path(place) / "data" / f"{i}.txt").write_text(f"a drawing, number {i}")
            for batch in batches:
                settings = {"rank": 16, "batch": batch, "precision": "bf16", "steps": STEPS, "resolution": edge}
                wanted = order(
                    Path(place) / f"w{batch}", "lora", take(Path(place) / "base"), dataset(Path(place) / "data"),
                    **settings, how={"device": str(device)},
                )  # fmt: skip
                stamps: list[float] = []
                torch.cuda.reset_peak_memory_stats(device)

                def asked(stamps: list[float] = stamps) -> bool:
                    torch.cuda.synchronize(device)
                    stamps.append(time.perf_counter())
                    return False

                run_training(wanted, lambda **_: None, asked)
                spent = statistics.median(b - a for a, b in itertools.pairwise(stamps))
                rate = batch / spent
                share = f"{rate * costs[family] / peak:.0%}" if peak else "unknown"
                memory = torch.cuda.max_memory_allocated(device) / 1e9
                print(f"| {what} | {batch} | {rate:.1f} | {share} | {memory:.1f} |")
