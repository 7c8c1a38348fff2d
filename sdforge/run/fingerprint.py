"""On what a result was computed: what may differ when another machine's result is not the same bits."""

from __future__ import annotations

import platform
from typing import Any

import torch

from sdforge.method import LOOP_VERSION


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Return device, versions and thread count; equal fingerprints promise equal bits (class B)."""
    import diffusers
    import peft
    import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "loop": LOOP_VERSION,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    else:
        found |= {"device": f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    return found
