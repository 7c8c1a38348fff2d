"""kohya's scripts at the same jobs, in fp32 as they recommend it: `kohya.py JOB SHARE OUT INPUT …`

They are no package: the environment finds their folder, and the folder `networks` in it, by a `.pth` file.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    job, share, out, *paths = sys.argv[1:]
    library = find_spec("library.utils")
    assert library is not None
    assert library.origin is not None
    scripts = Path(library.origin).parents[1]
    if job == "weighted_sum":
        ratios = [str(1 - float(share)), share]
        command = ["tools/merge_models.py", "--models", *paths, "--ratios", *ratios, "--output", out]
        command += ["--precision", "float", "--saving_precision", "fp16"]
    elif job == "bake":
        checkpoint, lora = paths
        command = ["networks/sdxl_merge_lora.py", "--sd_model", checkpoint, "--models", lora, "--ratios", share]
        command += ["--save_to", out, "--precision", "float", "--save_precision", "fp16"]
    else:
        sys.exit(64)
    sys.exit(subprocess.run([sys.executable, *command], cwd=scripts).returncode)


if __name__ == "__main__":
    main()
