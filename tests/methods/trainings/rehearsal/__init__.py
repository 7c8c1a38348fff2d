"""A training for tests: numpy, no networks, a fraction of a second. It is found as every training is.

It "learns" a row for the token table from the pictures' bytes and captions, one picture a step, and makes a checkpoint
whose text encoder has it added. What a step does depends on (seed, step) and on what was learned before it, so that
a wrong resume shows; with two threads the numbers differ a little, as those of real trainings do.

REHEARSAL_LOG: a file that gets a line for every start and step. REHEARSAL_GATE: a folder; at step `at` of a target the
training writes `TARGET` there and waits until the folder is gone or the file `go` lies in it. REHEARSAL_PAUSE: seconds
that a step takes longer. REHEARSAL_NOISE: what a broken machine adds to what is learned. REHEARSAL_HUNGER: bytes of
memory that the step at the gate takes. REHEARSAL_PRINTS: what each step prints.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import xxhash
from pydantic import Field

from sdforge.edits.insert import ROWS
from sdforge.errors import ActionFailed
from sdforge.families import Family
from sdforge.formats.safetensors import write_file
from sdforge.order import Order, Outcome
from sdforge.run.states import Stopped, load_state, save_state
from sdforge.trainings import Shapes, Training

VERSION = 1
MAKES = "checkpoint"
BARE = True  # it needs no torch


@final
class Rehearsal(Training):
    """Pretend to learn."""

    rank: int = Field(8, ge=1, le=64, description="decides what is learned")
    remark: str = Field("", max_length=64, description="a setting that changes no byte of the result")
    grain: int = Field(0, ge=0, le=1024, description="what is learned is rounded to multiples of this; 0: not at all")
    fails: bool = Field(False, description="fail at the third step")
    steps: int = Field(10, ge=1, le=1000, description="updates")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:  # noqa: ARG002 -- it is the same of all families
        return shapes["text_encoder"][ROWS][1], "fp64"


TABLE = Rehearsal


def note(text: str) -> None:
    if path := os.environ.get("REHEARSAL_LOG"):
        with Path(path).open("a") as file:
            file.write(text + "\n")


def wait(order: Order, step: int, stopped: Callable[[], bool]) -> bool:
    """Wait at the gate; return whether to stop."""
    gate = Path(os.environ.get("REHEARSAL_GATE", "/nowhere"))
    at = int(os.environ.get("REHEARSAL_AT", "5"))
    if step == at and gate.is_dir() and not (gate / "go").exists():
        (gate / order.target.replace(":", "-")).touch()
        while gate.is_dir() and not (gate / "go").exists():
            if stopped():
                return True
            time.sleep(0.01)
    return stopped()


def run(order: Order, report: Callable[..., None], stopped: Callable[[], bool]) -> Outcome:
    settings, threads = order.settings, int(order.how["threads"])
    refs = order.the("on").components["text_encoder"]
    tensors = {ref.name: bytes(ref.bytes()) for ref in refs}
    (table,) = (ref for ref in refs if ref.name == ROWS)
    pictures = sorted(order.the("dataset").pictures, key=lambda row: (row[1], row[2]))
    seen = [hashlib.sha256(Path(path).read_bytes() + caption.encode()).digest() for path, _, caption, _ in pictures]
    note(f"start {order.target}")
    learned, first = np.zeros(table.shape[1]), 0
    losses: list[float] = []
    resumed: list[dict[str, Any]] = []
    if state := load_state(Path(order.states), settings["steps"]):
        learned, first = np.frombuffer(state.tensors["learned"][2]).copy(), state.step
        losses = list(state.notes["losses"])
        resumed = [*state.notes["resumed"], {"step": first}]
        report(resumed=first, same=True)
    every = int(order.how.get("states", {}).get("steps", 0)) or 2
    for step in range(first, settings["steps"]):
        if wait(order, step, stopped):
            save(order, step, learned, losses, resumed)
            raise Stopped
        note(f"step {order.target} {step}")
        if words := os.environ.get("REHEARSAL_PRINTS"):
            print(words, step)
        time.sleep(float(os.environ.get("REHEARSAL_PAUSE", "0")))
        if step == int(os.environ.get("REHEARSAL_AT", "5")) and (hunger := os.environ.get("REHEARSAL_HUNGER")):
            np.ones(int(hunger), np.uint8)
        if settings["fails"] and step == 2:
            raise ActionFailed("the rehearsal was told to fail", hint="fails = false")
        draw = np.random.default_rng([settings["seed"], step])
        push = np.frombuffer(seen[step % len(seen)], np.uint8)[draw.integers(0, 32, len(learned))] / 256
        learned = 0.9 * learned + settings["rank"] * (push - 0.5) + 1e-3 * (threads - 1)
        losses.append(float(np.square(learned).mean()))
        report(step=step + 1, steps=settings["steps"], loss=losses[-1])
        if (step + 1) % every == 0 and step + 1 < settings["steps"]:
            save(order, step + 1, learned, losses, resumed)
    learned = learned + float(os.environ.get("REHEARSAL_NOISE", "0"))
    return outcome(order, table.dtype, tensors, learned, {ref.name: ref for ref in refs}, losses, resumed)


def save(
    order: Order, step: int, learned: np.ndarray[Any, Any], losses: list[float], resumed: list[dict[str, Any]]
) -> None:
    tensors: Any = {"learned": ("F64", (len(learned),), learned.tobytes())}
    save_state(Path(order.states), step, tensors, {"losses": losses, "resumed": resumed})
    note(f"state {order.target} {step}")


def outcome(
    order: Order,
    dtype: str,
    tensors: dict[str, bytes],
    learned: np.ndarray[Any, Any],
    refs: dict[str, Any],
    losses: list[float],
    resumed: list[dict[str, Any]],
) -> Outcome:
    grain = order.settings["grain"]
    added = np.round(learned / grain) * grain if grain else learned
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    rows = np.frombuffer(tensors[ROWS], kind).reshape(refs[ROWS].shape).astype(np.float64)
    tensors = tensors | {ROWS: (rows + added / 256).astype(kind).tobytes()}
    shapes = {f"text_encoder.{name}": (refs[name].dtype, refs[name].shape) for name in tensors}
    written = write_file(
        Path(order.work) / "pack.safetensors", shapes, lambda name: [tensors[name.removeprefix("text_encoder.")]]
    )
    listed = [
        [
            name,
            refs[name].dtype,
            list(refs[name].shape),
            hashlib.sha256(data).hexdigest(),
            xxhash.xxh3_128(data).hexdigest(),
            written.offsets[f"text_encoder.{name}"],
        ]
        for name, data in sorted(tensors.items())
    ]
    signs = np.random.default_rng(0).integers(0, 2, (64, len(added))) * 2 - 1
    return Outcome(
        components={"text_encoder": listed},
        pack="pack.safetensors",
        sha256=written.sha256,
        grade="B",
        fingerprint={"numpy": np.__version__, "threads": order.how["threads"]},
        record={
            "losses": losses,
            "steps": order.settings["steps"],
            "sketch": base64.b64encode(struct.pack("<64f", *(signs @ added))).decode(),
            "norm": float(np.sqrt(np.square(added).sum())),
            "resumed": resumed,
        },
    )
