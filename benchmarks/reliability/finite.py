"""P15: NaN, infinities and overflow planted into what is computed with."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path

import torch

from benchmarks.reliability.place import Bench, Found, at
from sdforge.errors import ActionFailed
from sdforge.order import Computation
from tests.families.workbench import computed, keep, reference
from tests.merges.test_merge_vectors import CASES, DTYPES, numbers

BAD = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": float("-inf")}
ROWS = 8  # of a matrix of numbers
COMMANDS = 60
RECIPE = """\
family = "sd15"

[source.other]
from = "other"

[weighted_sum.a]
checkpoints = ["base", "other"]
weights = [{weights}]

[preset]
checkpoint = "a"
"""


def planted(bench: Bench, i: int) -> Found | None:
    """Plant in every merge method, type and input; then in files, under the real command."""
    cases = list(CASES)
    if i < len(cases):
        return _in_a_method(cases[i])
    return _in_a_file(bench, i - len(cases)) if i < len(cases) + COMMANDS else None


def _in_a_method(case: str) -> Found:
    count, parameters = CASES[case]
    problems, tried = [], 0
    for dtype, (kind, stored) in DTYPES.items():
        inputs = [numbers(dtype, seed)[:ROWS].contiguous() for seed in range(1, count + 1)]
        for sick in range(count):
            for name, bad in BAD.items():
                tensors = [each.clone() for each in inputs]
                tensors[sick].view(-1)[random.Random(tried).randrange(tensors[sick].numel())] = bad
                tried += 1
                if said := _computed(case, stored, parameters, tensors):
                    problems.append(f"{case} {kind} {name} in input {sick}: {said}")
    return Found("in merges", problems, tried)


def _computed(case: str, stored: str, parameters: dict[str, object], tensors: list[torch.Tensor]) -> str:
    """Say what is wrong if a merge of these does not end with the tensor's name."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        taken = keep(Path(folder), {"unet": {str(n): tensor for n, tensor in enumerate(tensors)}})
        refs = tuple(reference(t, taken.files) for t in sorted(taken.tables["unet"]))
        shape = tuple(tensors[0].shape)
        try:
            computed(Computation("unet", "x", stored, shape, case.split()[0], parameters, refs), "unet.x")
        except ActionFailed as error:
            return "" if "unet.x" in error.message else error.message
    return "nothing was said"


@cache
def _files(base: Path) -> list[tuple[Path, str, int, int]]:
    """The fp16 tensors of a checkpoint that merges compute with: file within it, name, first byte, bytes."""
    found = []
    for path in sorted([*(base / "unet").glob("*.safetensors"), *(base / "text_encoder").glob("*.safetensors")]):
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        header = json.loads(path.read_bytes()[8 : 8 + length])
        for name, entry in sorted(header.items()):
            if entry.get("dtype") == "F16":
                first, last = entry["data_offsets"]
                found.append((path.relative_to(base), name, 8 + length + first, last - first))
    return found


def _in_a_file(bench: Bench, i: int) -> Found:
    """Let one number of a base be NaN, infinite, or so large that a sum overflows fp16: code 1, and its name."""
    dice = random.Random(i)
    path, name, offset, size = dice.choice(_files(bench.base))
    bad, weights = (("NaN", "0.6, 0.4"), ("Inf", "0.6, 0.4"), ("overflow", "1.0, 1.5"))[i % 3]
    value = struct.pack("<e", 60000.0 if bad == "overflow" else BAD[bad])
    with bench.clone() as root:
        (root / "recipes" / "toy.toml").write_text(RECIPE.format(weights=weights))
        (root / "base").rename(root / "other")
        (root / "base").mkdir()
        for file in (root / "other").rglob("*"):
            (root / "base" / file.relative_to(root / "other")).parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                (root / "base" / file.relative_to(root / "other")).write_bytes(file.read_bytes())
        for folder in ("base", "other"):
            data = bytearray((root / folder / path).read_bytes())
            at_byte = offset + 2 * dice.randrange(size // 2)
            data[at_byte : at_byte + 2] = (
                value if folder == "other" or bad == "overflow" else data[at_byte : at_byte + 2]
            )
            (root / folder / path).write_bytes(bytes(data))
        ran = bench.torch.forge(root, "build", "--json")
        last = name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2]
        problems = [] if ran.code == 1 else [f"code {ran.code}: {(ran.out + ran.err)[-300:]}"]
        problems += [] if last in ran.out + ran.err else ["the tensor is not named"]
        problems += ["a file came out"] if list((root / "out").rglob("*.safetensors")) else []
        return Found("by the command", at(f"{bad} in {path} {name}", problems))
