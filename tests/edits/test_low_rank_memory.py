"""What `extract` and `resize` hold: a few copies of one weight's update in fp64. SDXL's largest takes 236 MB.

They are looked at in a process of their own: the heap that other tests leave has once made four of them hold more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from sdforge.edits import extract, resize
from sdforge.order import Order
from tests.edits.low_ranks import order_to_extract, order_to_resize
from tests.families.workbench import Taken, keep
from tests.peak import holds_less

ALONE = pytest.mark.slow  # in a process of its own, which the last test starts

MODULE, WEIGHT, RANK = "unet.up_blocks.0.resnets.0.conv1", (512, 512, 3, 3), 32
UPDATE = 8 * prod(WEIGHT)  # bytes: 18.9 MB
WORDS = "text_model.embeddings.token_embedding.weight"
CORE = {"hada_t{}": (RANK, RANK, 3, 3), "hada_w{}_a": (RANK, 512), "hada_w{}_b": (RANK, 512)}
FLAT = {"hada_w{}_a": (512, RANK), "hada_w{}_b": (RANK, 512 * 9)}
FORMS = {
    "Tucker": {"lora_up": (512, RANK), "lora_mid": (RANK, RANK, 3, 3), "lora_down": (RANK, 512)},
    "LoHa": {name.format(i): shape for i in "12" for name, shape in FLAT.items()},
    "LoHa with cores": {name.format(i): shape for i in "12" for name, shape in CORE.items()},
    "LoKr": {"lokr_w1": (16, 16), "lokr_w2_a": (32, RANK), "lokr_w2_b": (RANK, 32 * 9)},
    "differences": {"diff": WEIGHT},
}


# form → how many copies of the update may be held: with blocks of 256 rows, of which this one has two, and with what
# it is multiplied from, measured 2.8, 2.9, 2.9, 2.4 and 2.6
MOST = {"Tucker": 3.4, "LoHa": 3.4, "LoHa with cores": 3.4, "LoKr": 2.9, "differences": 3.1}


def few(order: Order, most: float) -> bool:
    """Say whether an order holds fewer copies of the update than so many."""
    run = {"extract": extract.run, "resize": resize.run}[order.method]
    return holds_less(lambda: run(order, lambda **_: None, lambda: False), int(most * UPDATE))


@ALONE
@pytest.mark.parametrize("form", FORMS)
def test_resizing_holds_the_update_and_its_decomposition(form: str, tmp_path: Path) -> None:
    factors = {f"{MODULE}.{name}": (torch.randn(shape) * 0.01).half() for name, shape in FORMS[form].items()}
    lora = keep(tmp_path / "lora", {"lora": factors}, kind="lora")
    assert few(order_to_resize(tmp_path / "made", lora, rank=4), MOST[form])


@ALONE
@pytest.mark.parametrize(
    ("name", "shape", "most"),  # measured 2.4 and 1.4
    [(f"{MODULE}.weight", WEIGHT, 2.9), (f"text_encoder.{WORDS}", (4608, 512), 2.0)],
    ids=["a convolution", "words, of which a LoRA can say nothing"],
)
def test_extracting_holds_the_difference_and_its_decomposition(
    name: str, shape: tuple[int, ...], most: float, tmp_path: Path
) -> None:
    component, _, tensor = name.partition(".")

    def checkpoint(seed: int) -> Taken:
        draw = torch.Generator().manual_seed(seed)
        table = {tensor: torch.randn(shape, generator=draw).half()}
        small = {"conv_in.weight": torch.randn(8, 4, 3, 3, generator=draw).half()}
        return keep(tmp_path / str(seed), {"unet": small} | {component: table | small})

    assert few(order_to_extract(tmp_path / "made", checkpoint(0), checkpoint(1), rank=4), most)


def test_all_of_these_hold_no_more_in_a_process_of_their_own() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-m", "slow", __file__]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
