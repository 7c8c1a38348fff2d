"""sd-mecha at the same jobs, as its documentation has it: `mecha.py JOB SHARE OUT INPUT …`"""

from __future__ import annotations

import sys

import sd_mecha
import torch
from sd_mecha.extensions.builtin.merge_methods import linear


def main() -> None:
    job, share, out, *paths = sys.argv[1:]
    models = [sd_mecha.model(path) for path in paths]
    if job == "weighted_sum":
        recipe = sd_mecha.weighted_sum(*models, alpha=float(share))
    elif job == "add_difference":
        recipe = sd_mecha.add_difference(*models, alpha=float(share))
    else:
        base, lora = models
        # not `sd_mecha.add_difference`: it compares the merge space of what `convert` returns, which has none yet
        recipe = linear.add_difference(base, sd_mecha.convert(lora, base), alpha=float(share)) | base
    sd_mecha.merge(
        recipe, output=out, merge_device="cpu", merge_dtype=torch.float32, output_dtype=torch.float16, threads=2
    )


if __name__ == "__main__":
    main()
