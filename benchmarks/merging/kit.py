"""mergekit at the same jobs, by its command for plain files: `kit.py JOB SHARE OUT INPUT …`"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    job, share, out, *paths = sys.argv[1:]
    weight = float(share)
    if job == "weighted_sum":
        weights = [1 - weight, weight]
        config = {"merge_method": "linear", "dtype": "float32", "out_dtype": "float16"}
        config["parameters"] = {"normalize": False}  # type: ignore[assignment]
        models = [{"model": p, "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    elif job == "add_difference":  # base + (a − base) + share (b − base)
        config = {"merge_method": "task_arithmetic", "base_model": paths[2], "dtype": "float32", "out_dtype": "float16"}
        models = [{"model": p, "parameters": {"weight": w}} for p, w in zip(paths[:2], (1.0, weight), strict=True)]
    else:
        sys.exit(64)
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as place:
        text = Path(place) / "config.yml"
        text.write_text(json.dumps(config | {"models": models}))
        program = str(Path(sys.executable).with_name("mergekit-pytorch"))
        command = [program, str(text), f"{place}/out", "--out-shard-size", "100B"]  # one file
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        (written,) = Path(place, "out").glob("*.safetensors")
        shutil.move(written, out)


if __name__ == "__main__":
    main()
