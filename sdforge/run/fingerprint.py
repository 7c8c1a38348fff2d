"""On what a result was computed: what may differ when another machine's result is not the same bits."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path
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
        name = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        found |= {"device": name, "processor": processor()}
    return found


CPUS = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MAKE = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU part")
VECTORS = ("sse", "ssse", "avx", "fma", "amx", "f16c", "asimd", "sve", "sme", "bf16", "i8mm")


@cache
def processor() -> str:
    """Return maker, family and model of the processor, and 8 digits that stand for its vector units and caches.

    By these the libraries below torch choose their code, and with it the order of sums. A model alone would not do:
    virtual machines show one model with different instructions.
    """
    if not CPUS.is_file():
        return platform.processor()
    rows = (line.partition(":") for line in CPUS.read_text(errors="replace").partition("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, _, value in rows}
    able = sorted(f for f in (said.get("flags") or said.get("Features", "")).split() if f.startswith(VECTORS))
    caches = [path.read_text().strip() for path in sorted(CACHES.glob("index*/size"))[:3]]  # the fourth is shared
    digits = hashlib.sha256(" ".join([*able, *caches]).encode()).hexdigest()[:8]
    return " ".join([*(said[name] for name in MAKE if name in said), digits])
