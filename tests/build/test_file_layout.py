"""A formula's pack is laid out as the file that an export makes of it: written once, and the same bytes as in steps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdforge.file_layout import FileLayout, pays
from sdforge.order import Computation, Order
from sdforge.ref import Damaged, Ref
from sdforge.room import room
from sdforge.run.formula import run_formula
from tests.build.inline import Bench
from tests.families.workbench import Taken, keep, reference

SOFT = '[weighted_sum.soft]\ncheckpoints = ["base", "ink"]\nweights = [0.6, 0.4]\n'
PRESET = SOFT + '[preset]\ncheckpoint = "soft"\nexport = ["checkpoint"]\n'


def exported(bench: Bench) -> Path:
    return bench.root / "out" / "r" / "r.safetensors"


def test_one_writing_gives_the_file_that_two_give(bench: Bench, tmp_path: Path) -> None:
    bench.recipe(PRESET)
    stepwise = bench.clone(tmp_path / "steps")
    stepwise.build("soft")
    stepwise.build()
    bench.build()
    assert bench.orders["r:soft"].layout is not None
    assert stepwise.orders == {}  # nothing of the second build was computed
    assert exported(bench).read_bytes() == exported(stepwise).read_bytes()
    digests = [each.session().lock.targets for each in (bench, stepwise)]
    assert digests[0] == digests[1]
    (pack,) = bench.packs()
    assert pack == hashlib.sha256(exported(bench).read_bytes()).hexdigest()
    assert pack not in stepwise.packs()


def test_the_plan_counts_what_is_written_once_once(bench: Bench) -> None:
    bench.recipe(PRESET)
    session = bench.session()
    needed, _ = room(session, session.plan(session.resolve(["r"])))
    bench.build()
    assert needed == sum(tensor.nbytes for tensor in load_file(exported(bench)).values())


def test_a_pack_is_the_file_from_a_quarter_of_its_bytes_on() -> None:
    assert pays(703, 2132)  # a LoRA of rank 32 in Stable Diffusion 1.5, MB
    assert pays(25, 100)
    assert not pays(24, 100)


def test_a_deleted_file_comes_back_without_being_written(bench: Bench) -> None:
    bench.recipe(PRESET)
    bench.build()
    (pack,) = bench.packs()
    before = exported(bench).read_bytes()
    exported(bench).unlink()
    bench.build()
    assert exported(bench).read_bytes() == before
    kept = bench.root / "cache" / "v1" / "objects" / pack[:2] / pack
    shares_blocks = exported(bench).stat().st_mode & 0o777 == 0o644
    assert shares_blocks or exported(bench).samefile(kept)


def test_a_file_that_was_written_into_is_set_aside_and_made_again(bench: Bench) -> None:
    """Where both are one file the store's pack is damaged with it, so the sum is computed anew."""
    bench.recipe(PRESET)
    bench.build()
    before = exported(bench).read_bytes()
    exported(bench).chmod(0o644)
    with exported(bench).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    bench.build()
    assert exported(bench).read_bytes() == before
    (aside,) = (bench.root / "out" / ".replaced").rglob("*.safetensors")
    assert aside.read_bytes()[-1:] == b"\xff"


def test_another_description_takes_the_tensors_from_the_file_before(bench: Bench) -> None:
    bench.recipe(PRESET)
    bench.build()
    before = exported(bench).read_bytes()
    bench.recipe(PRESET + 'description = "Softly"\n')
    assert bench.built() == ["preset.export"]
    after = exported(bench).read_bytes()
    assert before[-1000:] == after[-1000:]
    assert b"Softly" in after


@pytest.fixture
def taken(tmp_path: Path) -> Taken:
    tensors = {name: torch.arange(6.0).reshape(3, 2).half() + i for i, name in enumerate("abc")}
    return keep(tmp_path / "base", {"unet": tensors})


def an_order(taken: Taken, work: Path) -> Order:
    """A file of a sum as it is, behind what passes; the sum once more, transposed and cut off."""
    ref = {t.name: reference(t, taken.files) for t in taken.tables["unet"]}
    rows = [
        Computation("unet", n, "F16", (3, 2), "weighted_sum", {"weights": [0.5, 0.5]}, (ref["a"], ref["c"]))
        for n in ("plain", "turned", "long")
    ]
    layout = FileLayout(
        {"one": ("F16", (6, 2)), "two": ("F16", (2, 3)), "three": ("F16", (2, 2)), "empty": ("F32", (0,))},
        {"said": "so"},
        {"one": ["unet.b", "unet.plain"], "two": ["unet.turned"], "three": ["unet.long"]},
        {"two": True, "three": False},
        {"unet.b": ref["b"]},
    )
    return Order("", "", "weighted_sum", "merges", "sd15", {}, str(work), compute=rows, layout=layout)


def test_what_a_file_holds_otherwise_than_it_is_lies_apart(taken: Taken, tmp_path: Path) -> None:
    order = an_order(taken, tmp_path)
    order = Order.from_json(order.to_json())
    outcome = run_formula(order, lambda **_: None)
    wanted = torch.arange(6.0).reshape(3, 2).half() + 1
    found = load_file(tmp_path / outcome.pack)
    assert found["one"].tolist() == [*wanted.tolist(), *wanted.tolist()]
    assert found["two"].tolist() == wanted.T.tolist()
    assert found["three"].tolist() == wanted[:2].tolist()
    data = (tmp_path / outcome.pack).read_bytes()
    assert outcome.sha256 == hashlib.sha256(data).hexdigest()
    assert order.layout is not None
    key, body = outcome.laid
    assert body == hashlib.sha256(data[len(order.layout.first()) :]).hexdigest()
    rows = {name: rest for name, *rest in outcome.components["unet"]}
    assert key == order.layout.key(
        {f"unet.{name}": row[3] for name, row in rows.items()} | {"unet.b": order.layout.passing["unet.b"].xxh3}
    )
    for name, (dtype, shape, _, fast, offset, *apart) in rows.items():
        assert bool(apart) == (name != "plain")
        path = tmp_path / (outcome.apart[0] if apart else outcome.pack)
        assert Ref(name, dtype, tuple(shape), str(path), offset, fast).bytes() == wanted.numpy().tobytes()


def test_what_passes_into_a_file_is_verified(taken: Taken, tmp_path: Path) -> None:
    order = an_order(taken, tmp_path)
    assert order.layout is not None
    ref = order.layout.passing["unet.b"]
    with Path(ref.path).open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"\xff")
    with pytest.raises(Damaged):
        run_formula(order, lambda **_: None)


def test_a_worker_is_made_ready_for_what_it_will_compute_and_for_nothing_else(bench: Bench) -> None:
    bench.recipe(PRESET)
    bench.build("soft")
    assert bench.expected
    bench.build()  # which only writes a file
    assert not bench.expected
    bench.build()  # nothing at all
    assert not bench.expected
