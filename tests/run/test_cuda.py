"""What a CUDA device makes is what a CPU makes, but for how it is rounded; run with `-m gpu`."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.families.sd15.load import load
from sdforge.method import module_of
from sdforge.order import Computation, Given, Order, Outcome
from sdforge.run.__main__ import prepare
from sdforge.run.formula import run_formula
from sdforge.run.low_rank import Spectrum, of_matrix, of_product
from sdforge.run.sample import Wish, sample
from sdforge.run.tensors import DTYPES
from sdforge.sidecars import attached
from sdforge.sidecars.null_text import replay
from tests.families.toys import write_family
from tests.families.workbench import Taken, keep, reference, take
from tests.run.hypernetworks import SWISH, random_nets
from tests.run.order import order, shown, train
from tests.sidecars.test_pictures_and_aesthetics import shown as shown_picture
from tests.sidecars.test_pictures_and_aesthetics import steering
from tests.trainings.clips import write_clip
from tests.trainings.test_training_contract import OWN, TRAININGS
from tests.trainings.test_training_matrix import LEAST

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")


@pytest.fixture(scope="module", autouse=True)
def _as_a_worker_computes() -> Iterator[None]:
    before = torch.get_num_threads()
    prepare("cuda:0", threads=1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unclip(toys: Path) -> Taken:
    return take(write_family(toys / "unclip", "unclip"))


@pytest.mark.parametrize("name", sorted({*TRAININGS} - {*OWN}))
def test_every_training_has_the_losses_of_a_cpu(
    name: str, toy: Taken, unclip: Taken, pictures: Given, tmp_path: Path
) -> None:
    on = unclip if shown(name) else toy
    found = {
        device: train(order(tmp_path / device, name, on, pictures, steps=3, how={"device": device}))
        for device in DEVICES
    }
    assert found["cuda"].fingerprint["device"] == torch.cuda.get_device_name()
    assert found["cuda"].record["losses"] == pytest.approx(found["cpu"].record["losses"], rel=0.02)
    assert found["cuda"].record["norm"] == pytest.approx(found["cpu"].record["norm"], rel=0.05)


@pytest.mark.parametrize("name", OWN)
def test_what_has_a_loop_of_its_own_runs_there(
    name: str, toy: Taken, pictures: Given, toys: Path, tmp_path: Path
) -> None:
    asked = order(tmp_path, name, toy, pictures, **LEAST[name], how={"device": "cuda"})
    one = Given("picture", "picture", pictures=[[*pictures.pictures[0][:2], "", 1]])
    others = {"clip": [take(write_clip(toys / "clip")).given()], "image": [one]}
    asked = dataclasses.replace(asked, inputs=asked.inputs | others)
    outcome: Outcome = module_of("trainings", name).run(asked, lambda **_: None, lambda: False)
    assert outcome.fingerprint["device"] == torch.cuda.get_device_name()
    assert all(math.isfinite(loss) for loss in outcome.record.get("losses", []))


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_a_training_gives_the_same_bits_twice(
    changes: dict[str, Any], toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    rows = [
        train(order(tmp_path / turn, "lora", toy, pictures, steps=4, **changes, how={"device": "cuda"})).components
        for turn in ("a", "b")
    ]
    assert rows[0] == rows[1]  # their digests among them


# kind → the family it is drawn with, its tensors, its facts
ATTACHED: dict[str, tuple[str, Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "aesthetic": ("sd15", steering, {"steps": 2, "learning_rate": 1e-2, "prompts": ["a red cat"]}),
    "hypernetwork": ("sd15", lambda: random_nets(SWISH, widths=(16,)), SWISH),
    "image_embedding": ("unclip", shown_picture, {"level": 0}),
}


@pytest.mark.parametrize("kind", ATTACHED)
def test_what_no_weights_can_hold_is_drawn_with_there(kind: str, toy: Taken, unclip: Taken) -> None:
    of, tensors, facts = ATTACHED[kind]
    own = importlib.import_module(f"sdforge.families.{of}.load").load
    diffusion = own((unclip if of == "unclip" else toy).given(), torch.device("cuda"), torch.float32)
    found, wishes = attached(kind), [Wish("a red cat", "", 1, 2, 3.0, 64)]
    assert found is not None
    before = sample(diffusion, wishes)
    take_off = found.attach(diffusion, tensors(), facts)
    drawn = sample(diffusion, wishes)
    assert bool(drawn.isfinite().all())
    assert not torch.equal(drawn, before)
    take_off()
    assert torch.equal(sample(diffusion, wishes), before)


def test_a_picture_is_drawn_again_from_what_was_found_of_it(toy: Taken) -> None:
    facts = {"prompt": "a red cat", "guidance": 2.0, "steps": 3, "resolution": 64}
    draw = torch.Generator().manual_seed(0)
    tensors = {"uncond": torch.randn(3, 77, 16, generator=draw), "start": torch.randn(1, 4, 8, 8, generator=draw)}
    here, there = (load(toy.given(), torch.device(device), torch.float32) for device in DEVICES)
    assert torch.allclose(replay(there, tensors, facts).cpu(), replay(here, tensors, facts), atol=0.02)


def _whole(found: Spectrum) -> Tensor:
    return found.left_ON @ found.values_N.diag() @ found.right_NF


def test_matrices_are_decomposed_there_as_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(96, 8, generator=draw).double(), torch.randn(8, 160, generator=draw).double()
    full = torch.randn(64, 160, generator=draw).double()
    for matrix, found in [(up @ down, of_product(up.cuda(), down.cuda())), (full, of_matrix(full.cuda()))]:
        assert float((_whole(found).cpu() - matrix).norm() / matrix.norm()) < 1e-12
    here, there = of_matrix(full), of_matrix(full.cuda())
    assert torch.allclose(there.values_N.cpu(), here.values_N, rtol=1e-9)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce", "della"])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_merges_that_choose_or_rank_have_the_bytes_of_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    """Of fp16 most differences are equal to others; those of fp32 are compared in fp64."""
    draw, shape = torch.Generator().manual_seed(0), (2304, 1920)  # larger than what is left to the CPU
    base = 0.02 * torch.randn(shape, generator=draw)
    tensors = [base, *(base + 0.001 * torch.randn(shape, generator=draw) for _ in range(2))]
    taken = keep(tmp_path, {"unet": {f"{i}": tensor.to(DTYPES[dtype]) for i, tensor in enumerate(tensors)}})
    refs = tuple(reference(row, taken.files) for row in taken.tables["unet"])
    parameters: dict[str, Any] = {"sce": {"select_topk": 0.3}, "della": {"tensor": "x"}}.get(name, {})
    found, told = {}, []
    for device in ("cpu", "cuda:0"):
        (tmp_path / device).mkdir()
        merge = Computation("unet", "x", dtype, shape, name, parameters, refs)
        asked = Order(
            "", "", name, "merges", "sd15", {}, str(tmp_path / device), compute=[merge], how={"device": device}
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[device] = run_formula(asked, lambda **event: told.append(event)).components
        assert (torch.cuda.max_memory_allocated() > before) == (device != "cpu")
    assert found["cuda:0"] == found["cpu"]
    assert not [event for event in told if "remark" in event]  # that the CPU had to do it
