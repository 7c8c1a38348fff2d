"""The worker's formulas: one pack, verified inputs, digests of what was written."""

from __future__ import annotations

import gc
import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from sdforge.errors import GET_AGAIN, ActionFailed, UsageError
from sdforge.order import Computation, Order
from sdforge.ref import Damaged, Ref
from sdforge.run import formula
from sdforge.run.__main__ import run
from sdforge.run.formula import compute, results, run_formula
from sdforge.run.tensors import Pack, load, write_pack
from tests.families.workbench import Taken, computed, keep, reference, same_bytes


@pytest.fixture
def base(tmp_path: Path) -> Taken:
    tensors = {"a": torch.arange(6.0).half(), "b": torch.ones(6).half(), "c": torch.arange(3)}
    return keep(tmp_path / "base", {"unet": tensors})


def refs(base: Taken, *names: str) -> tuple[Ref, ...]:
    found = {t.name: reference(t, base.files) for t in base.tables["unet"]}
    return tuple(found[name] for name in names)


def half(base: Taken, name: str = "x") -> Computation:
    return Computation("unet", name, "F16", (6,), "weighted_sum", {"weights": [0.5, 0.5]}, refs(base, "a", "b"))


def test_a_pack_holds_what_was_computed_and_says_so(base: Taken, tmp_path: Path) -> None:
    order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(tmp_path), compute=[half(base, "y"), half(base)])
    told: list[int] = []
    outcome = run_formula(order, lambda **event: told.append(event["step"]))
    pack = load_file(tmp_path / outcome.pack)
    assert set(pack) == {"unet.x", "unet.y"}
    assert all(tensor.tolist() == [0.5, 1, 1.5, 2, 2.5, 3] for tensor in pack.values())
    assert told == [1, 2]
    assert outcome.sha256 == hashlib.sha256((tmp_path / outcome.pack).read_bytes()).hexdigest()
    for name, dtype, shape, sha, xxh3, offset in outcome.components["unet"]:
        ref = Ref(name, dtype, tuple(shape), str(tmp_path / outcome.pack), offset, xxh3)
        assert load(ref).tolist() == pack["unet.x"].tolist()
        assert hashlib.sha256(ref.bytes()).hexdigest() == sha


def test_what_was_left_lying_about_before_a_formula_goes_after_it(base: Taken, tmp_path: Path) -> None:
    """Networks are circles: a worker that trained before must not keep them until it ends."""
    circle = nn.ModuleList()
    circle.append(nn.ModuleList([circle]))
    left = weakref.ref(circle)
    del circle
    order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(tmp_path), compute=[half(base)])
    run(order, lambda **_: None, lambda: False)
    gc.collect()
    assert left() is None


def test_what_computes_next_has_the_threads_that_it_had(base: Taken, tmp_path: Path) -> None:
    order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(tmp_path), compute=[half(base)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_formula(order, lambda **_: None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_damaged_inputs_are_noticed_when_they_are_read(base: Taken) -> None:
    (path,) = base.files.values()
    place = refs(base, "a")[0].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    with pytest.raises(Damaged) as caught:
        compute(half(base), "unet.x")
    assert caught.value.exit_code == 3
    assert caught.value.path == str(path)


def test_an_input_that_is_gone_is_named(base: Taken) -> None:
    (path,) = base.files.values()
    computation = half(base)
    path.unlink()
    with pytest.raises(UsageError, match="does not exist"):
        compute(computation, "unet.x")


def test_a_result_of_another_shape_than_planned_is_refused(base: Taken) -> None:
    with pytest.raises(ActionFailed, match=r"unet\.x came out of weighted_sum as \[6\]"):
        compute(half(base)._replace(shape=(3, 2)), "unet.x")


def test_an_order_survives_the_way_to_the_worker(base: Taken) -> None:
    import json

    order = Order("k", "t", "lora", "trainings", "sd15", {"a": 1.5}, "w", {"on": [base.given()]}, [half(base)])
    assert Order.from_json(json.loads(json.dumps(order.to_json()))) == order


def test_an_empty_tensor_is_a_tensor(tmp_path: Path) -> None:
    empty = keep(tmp_path, {"unet": {"x": torch.empty(0, 4).half()}})
    (ref,) = refs(empty, "x")
    assert load(ref).shape == (0, 4)
    found = compute(Computation("unet", "x", "F16", (0, 4), "weighted_sum", {"weights": [2.0]}, (ref,)), "unet.x")
    assert found.shape == (0, 4)


def test_fp32_inputs_are_computed_in_fp64(tmp_path: Path) -> None:
    """1 + 2^-24 + 2^-24 is 1 + 2^-23 there, and 1 in fp32."""
    tensors = {"a": torch.ones(1), "b": torch.full((1,), 2.0**-24), "c": torch.full((1,), 2.0**-24)}
    wide = keep(tmp_path, {"unet": tensors})
    one = Computation("unet", "x", "F32", (1,), "weighted_sum", {"weights": [1.0, 1.0, 1.0]}, refs(wide, "a", "b", "c"))
    assert compute(one, "x").tolist() == [1 + 2**-23]


def test_computing_twice_gives_the_same_file(base: Taken, tmp_path: Path) -> None:
    shas = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        order = Order("", "", "weighted_sum", "merges", "sd15", {}, str(tmp_path / name), compute=[half(base)])
        shas.append(run_formula(order, lambda **_: None).sha256)
    assert shas[0] == shas[1]


@pytest.fixture
def layer(tmp_path: Path) -> Taken:
    draw = torch.Generator().manual_seed(2)
    shapes = {"w": (40, 24), "v": (40, 24), "up": (40, 3), "down": (3, 24), "bias": (40,)}
    return keep(tmp_path / "layer", {"unet": {n: torch.randn(s, generator=draw).half() for n, s in shapes.items()}})


def chain(layer: Taken) -> Computation:
    """A sum of a bake and of a sum, none of which is written."""
    shape, refs_of = (40, 24), {t.name: reference(t, layer.files) for t in layer.tables["unet"]}
    w, v, up, down = (refs_of[name] for name in ("w", "v", "up", "down"))
    baked = Computation("unet", "x", "F16", shape, "bake", {"scales": [0.7]}, (w, up, down))
    mean = Computation("unet", "x", "BF16", shape, "weighted_sum", {"weights": [0.5, 0.5]}, (w, v))
    bent = Computation("unet", "x", "F16", shape, "slerp", {"weight": 0.3, "parallel": 0.9995}, (v, w))
    return Computation("unet", "x", "F16", shape, "weighted_sum", {"weights": [0.2, 0.5, 0.4]}, (baked, mean, bent))


def test_a_chain_in_parts_is_the_chain_in_steps(layer: Taken, tmp_path: Path) -> None:
    """Parts of one row, of some and of all: what is computed on the way is cut along, or made whole."""
    whole = chain(layer)
    expected = computed(whole, "unet.x")
    for most in (1, 24, 100, 960):
        parts = [part.clone() for part in results(whole, "unet.x", most)]
        assert [len(part) for part in parts][:-1] == [max(1, most // 24)] * (len(parts) - 1)
        assert same_bytes(torch.cat(parts), expected)
    steps = {str(i): compute(each, "x") for i, each in enumerate(whole.inputs)}
    kept = keep(tmp_path / "steps", {"unet": steps})
    again = whole._replace(inputs=tuple(reference(t, kept.files) for t in sorted(kept.tables["unet"])))
    assert same_bytes(compute(again, "x"), expected)


@pytest.mark.parametrize("name", ["w", "up", "v"])
def test_damage_is_named_before_what_came_of_it(name: str, layer: Taken) -> None:
    """An exponent of ones is NaN: who reads it in parts must still say that the file is damaged."""
    place = {t.name: reference(t, layer.files) for t in layer.tables["unet"]}[name]
    with Path(place.path).open("r+b") as file:
        file.seek(place.offset + 40)
        file.write(b"\xff\xff")
    with pytest.raises(Damaged):
        list(results(chain(layer), "unet.x", 24))


def test_an_input_that_is_little_beside_the_result_is_read_before_the_first_part(
    layer: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part by part its few rows would cost more than they are worth."""
    read: list[str] = []
    real = formula._Reader.__init__

    def noted(reader: Any, ref: Any, steps: Any) -> None:
        read.append(ref.name)
        real(reader, ref, steps)

    monkeypatch.setattr("sdforge.run.formula._Reader.__init__", noted)
    baked = chain(layer).inputs[0]
    assert isinstance(baked, Computation)
    assert len(list(results(baked, "x", 24))) == 40
    assert read == ["w"]


@pytest.mark.parametrize("rows", [40, 400])
def test_nan_in_a_factor_is_named_whether_it_is_little_or_not(rows: int, tmp_path: Path) -> None:
    factors = {"w": torch.ones(rows, 24).half(), "up": torch.ones(rows, rows // 40 * 3).half()}
    factors |= {"down": torch.ones(rows // 40 * 3, 24).half()}
    factors["up"][-1, -1] = float("nan")
    broken = keep(tmp_path, {"unet": factors})
    one = Computation("unet", "x", "F16", (rows, 24), "bake", {"scales": [1.0]}, refs(broken, "w", "up", "down"))
    with pytest.raises(ActionFailed, match=r"x: an input \(.*\) holds NaN or Inf in up"):
        list(results(one, "x", 24))


def test_nan_of_an_undamaged_input_is_named_with_its_file(tmp_path: Path) -> None:
    broken = keep(tmp_path, {"unet": {"a": torch.tensor([1.0, float("nan")]).half(), "b": torch.ones(2).half()}})
    one = Computation("unet", "x", "F16", (2,), "weighted_sum", {"weights": [0.5, 0.5]}, refs(broken, "a", "b"))
    for make in (compute, lambda c, name: list(results(c, name))):
        with pytest.raises(ActionFailed, match=r"unet\.x: an input \(.*\) holds NaN or Inf in a") as caught:
            make(one, "unet.x")
        assert caught.value.hint == GET_AGAIN


def test_numbers_whose_sum_is_too_large_are_no_inf(tmp_path: Path) -> None:
    """Each of them fits, only their sum does not."""
    large = keep(tmp_path, {"unet": {"a": torch.full((9,), 3e38)}})
    one = Computation("unet", "x", "F32", (9,), "weighted_sum", {"weights": [1.0]}, refs(large, "a"))
    assert torch.equal(compute(one, "x"), torch.full((9,), 3e38))


def test_what_is_needed_whole_and_what_is_not_stand_in_one_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensors come last in time, and lie where their names put them."""
    monkeypatch.setattr("sdforge.run.formula.LARGE", 1000)
    size = 1001
    draw = torch.Generator().manual_seed(3)
    wide = keep(tmp_path / "in", {"unet": {n: torch.randn(size, generator=draw).half() for n in "ab"}})
    both = refs(wide, "a", "b")
    rows = [
        Computation("unet", "first", "F16", (size,), "slerp", {"weight": 0.4}, both),
        Computation("unet", "second", "F16", (size,), "weighted_sum", {"weights": [0.6, 0.4]}, both),
        Computation("vae", "third", "F16", (size,), "cast", {}, both[:1]),
    ]
    outcome = run_formula(Order("", "", "", "merges", "sd15", {}, str(tmp_path), compute=rows), lambda **_: None)
    pack = load_file(tmp_path / outcome.pack)
    assert list(outcome.components) == ["unet", "vae"]
    for row in rows:
        assert same_bytes(pack[f"{row.component}.{row.name}"], compute(row, "x"))


def test_a_pack_has_the_name_of_its_bytes(tmp_path: Path) -> None:
    tensors = {"unet": {name: torch.full((size,), 2.0).half() for name, size in (("a", 3), ("b", 1 << 20), ("c", 0))}}
    found = write_pack(tmp_path, tensors)
    data = (tmp_path / found.pack).read_bytes()
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    for name, _, _, strong, fast, offset in found.components["unet"]:
        own = data[offset : offset + tensors["unet"][name].nbytes]
        assert (strong, fast) == (hashlib.sha256(own).hexdigest(), xxhash.xxh3_128_hexdigest(own))


def test_a_pack_takes_no_tensor_of_another_size(tmp_path: Path) -> None:
    with Pack(tmp_path / "x", {"a": ("F16", (3,))}) as pack:
        pack.file.write(b"1234")
        with pytest.raises(ValueError, match="a was given 4 bytes"):
            pack.wrote("a")
