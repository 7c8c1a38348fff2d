"""What the scripts beside this one share, which run in other programs' environments: torch and safetensors, no more.

A script is told a project (`preset.py`), where the program lies and where `forge install` has put the presets. It opens
them by the program's own functions and notes for each file what was said about it, and how far the numbers are from
ours.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file


class Said(logging.Handler):
    """What a program says in its log from warnings upwards."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trial:
    """One program beside one project."""

    def __init__(self) -> None:
        self.root, self.program, self.home, self.out = (Path(each) for each in sys.argv[1:5])
        sys.path.insert(0, str(self.program))
        self.reference = load_file(self.root / "reference.safetensors")
        places = json.loads((self.root / "places.json").read_text())
        self.single: dict[str, Any] = places["single"]
        self.loras: dict[str, list[str]] = places["loras"]
        self.sdxl: bool = places["family"] == "sdxl"
        self.rows: list[dict[str, Any]] = []
        self.said = Said()
        logging.getLogger().addHandler(self.said)

    def tensor(self, preset: str, name: str) -> torch.Tensor:
        """Return a tensor of a preset's checkpoint by its canonical name, in fp32."""
        single, part, count, turned = self.single[name]
        with safe_open(self.root / "out" / preset / f"{preset}.safetensors", "pt") as file:
            whole = file.get_tensor(single).float()
        whole = whole.T if turned else whole
        rows = whole.shape[0] // count
        return whole[part * rows : (part + 1) * rows]

    @contextmanager
    def row(self, what: str) -> Iterator[dict[str, Any]]:
        """Note one thing that is opened: what is said about it, and how it ends."""
        found: dict[str, Any] = {"what": what}
        before = len(self.said.lines)
        try:
            yield found
        except Exception as error:  # another program may raise anything, and that is what is to be told
            import traceback

            traceback.print_exc()
            found["failed"] = f"{type(error).__name__}: {error}"[:300]
        found["said"] = found.get("said", []) + self.said.lines[before:]
        self.rows.append(found)
        print(json.dumps(found)[:600], flush=True)

    def change(self, preset: str, names: list[str], theirs: Callable[[str], torch.Tensor | None]) -> dict[str, Any]:
        """Compare a program's weights after a LoRA with ours: the difference as a share of the change itself.

        theirs: canonical name → the program's tensor; None where it has none.
        """
        apart = whole = 0.0
        worst, missing, still = 0.0, [], []
        for name in names:
            plain, ours, tensor = self.tensor("plain", name), self.tensor(preset, name), theirs(name)
            if tensor is None:
                missing.append(name)
                continue
            tensor = tensor.detach().float().reshape(ours.shape)
            distance, length = float((tensor - ours).norm()), float((ours - plain).norm())
            apart, whole, worst = apart + distance**2, whole + length**2, max(worst, distance / length)
            if torch.equal(tensor, plain):
                still.append(name)
        found = {"modules": len(names), "apart": (apart / whole) ** 0.5 if whole else None, "worst": worst}
        return found | ({"missing": missing} if missing else {}) | ({"unchanged": still} if still else {})

    def ratio(self, name: str, theirs: torch.Tensor) -> float:
        """Return how far a program's tensor is from diffusers', as a share of it."""
        ours = self.reference[name].float()
        return float((theirs.detach().float().reshape(ours.shape) - ours).norm() / ours.norm())

    def holds(self, file: str, key: str) -> bool:
        """Say whether an embedding's file has rows for a text encoder: diffusers writes one file for each."""
        second = file.endswith(".diffusers_2.safetensors")
        return ".diffusers" not in file or second == (key == "clip_g")

    def rows_apart(self, found: dict[str, torch.Tensor]) -> float:
        """Return the largest difference between the rows that a program reads and those that we wrote."""
        ours = load_file(self.root / "out" / "plain" / "embeddings" / "mascot.safetensors")
        ours = {("clip_l" if key == "emb_params" else key): rows for key, rows in ours.items()}
        return max(float((rows.float() - ours[key].float()).abs().max()) for key, rows in found.items())

    def layers_apart(self, name: str, networks: dict[tuple[int, str], torch.nn.Module]) -> float:
        """Return how far a hypernetwork's networks, by width and side, are from ours: on random vectors, at most."""
        ours, worst = load_file(self.root / "out" / "plain" / "sidecars" / f"{name}.safetensors"), 0.0
        for (width, side), network in networks.items():
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(width))
            value = x
            for i in range(2):
                linear, norm = f"{width}.{side}.linear.{i}", f"{width}.{side}.norm.{i}"
                value = torch.nn.functional.linear(value, ours[f"{linear}.weight"], ours[f"{linear}.bias"])
                value = value.relu() if i == 0 else value
                if f"{norm}.weight" in ours:
                    weight, bias = ours[f"{norm}.weight"], ours[f"{norm}.bias"]
                    value = torch.nn.functional.layer_norm(value, value.shape[-1:], weight, bias)
            worst = max(worst, float((network(x) - value).abs().max() / value.abs().max()))
        return worst

    def end(self) -> None:
        self.out.write_text(json.dumps(self.rows, indent=1))
