"""meh (sd-webui's `merging`) at the same jobs: `meh.py JOB SHARE OUT INPUT …`"""

from __future__ import annotations

import sys
from pathlib import Path

from sd_meh.merge import merge_models, save_model


def main() -> None:
    job, share, out, *paths = sys.argv[1:]
    if job == "bake":
        sys.exit(64)
    names = ("model_a", "model_b", "model_c")
    weights = [float(share)] * 25
    merged = merge_models(
        {name: Path(path) for name, path in zip(names, paths, strict=False)},
        {"alpha": weights},
        {"alpha": float(share)},
        job,
        precision=16,
        device="cpu",
        work_device="cpu",
        threads=2,
    )
    save_model(merged, out.removesuffix(".safetensors"), "safetensors")


if __name__ == "__main__":
    main()
