"""What every merge in the folder promises, whatever it computes."""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic_core import PydanticUndefined
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdforge.method import LISTS, WHOLE, method, method_groups, module_of
from sdforge.settings import takes
from tests.families.workbench import same_bytes

MERGES = sorted(name for name, group in method_groups().items() if group == "merges")
EACH = pytest.mark.parametrize("name", MERGES)
CHANGE_ONE = ("scale", "adjust", "subtract", "add")  # numbers change a checkpoint: equal inputs say nothing
UNORDERED = (  # the order of what they take any number of decides nothing
    "linear",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "model_stock",
    "sce",
    "geometric_median",
    "karcher",
    "clamp",
)
KEEPS_NAN = [name for name in MERGES if getattr(module_of("merges", name), "KEEPS_NAN", False)]
ELEMENTWISE = [name for name in MERGES if getattr(module_of("merges", name), "ELEMENTWISE", False)]
CHANGED = {"adjust": {"detail_in": 2.0}}  # settings of merges that do nothing by themselves


def function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(module_of("merges", name), name)
    return found


def kinds(name: str) -> list[Any]:
    return [p.kind for p in inspect.signature(function(name)).parameters.values()]


def fixed(name: str) -> int:
    """How many inputs have a name of their own."""
    return sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds(name))


def count(name: str) -> int:
    """How many checkpoints the merge is given: three at least where it takes any number."""
    return max(3, fixed(name) + 2) if inspect.Parameter.VAR_POSITIONAL in kinds(name) else fixed(name)


def settings(name: str) -> dict[str, Any]:
    """The defaults; where there is none, equal shares of one. With it what the engine adds for those that ask."""
    n, found = count(name) - fixed(name), {}
    for field, info in method(name).table.model_fields.items():
        if takes(info) or field in (*LISTS, *WHOLE, "seed"):
            continue
        wanted = [1 / 4] * (n - 1) + [1 - (n - 1) / 4] if "list" in str(info.annotation) else 0.25
        found[field] = wanted if info.default is PydanticUndefined or info.default == [] else info.default
    found |= CHANGED.get(name, {})
    asked = inspect.signature(function(name)).parameters
    return found | {field: value for field, value in (("seed", 5), ("tensor", "unet.conv_in.weight")) if field in asked}


def inputs(name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count(name))]


def test_the_merges_that_recipes_rely_on_are_found_in_the_folder() -> None:
    assert {"weighted_sum", "add_difference", "slerp"} <= set(MERGES)


@EACH
def test_inputs_come_by_place_and_settings_by_name(name: str) -> None:
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    seen = inspect.signature(function(name)).parameters.values()
    kinds = {p.kind for p in seen}
    assert kinds <= {*by_place, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is p.empty for p in seen if p.kind in by_place)
    assert count(name) >= 1


@EACH
def test_a_merge_states_version_source_and_what_it_makes(name: str) -> None:
    found = method(name)
    assert found.version >= 1
    assert found.makes in ("checkpoint", "delta")
    assert found.signature.kind == "formula"
    assert "Source:" in (inspect.getdoc(function(name)) or "")


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3), (2, 3, 3, 3), (0,)])
def test_shape_and_working_type_stay(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    result = function(name)(*inputs(name, dtype, shape), **settings(name))
    assert (result.shape, result.dtype) == (shape, dtype)
    assert bool(torch.isfinite(result).all())


@EACH
def test_a_merge_is_a_pure_function(name: str) -> None:
    given, wanted, state = inputs(name), settings(name), torch.random.get_rng_state()
    before = [tensor.clone() for tensor in given]
    first, second = (function(name)(*given, **wanted) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(first.data_ptr() != tensor.data_ptr() for tensor in given)


@EACH
def test_where_the_numbers_lie_in_memory_changes_no_bit(name: str) -> None:
    whole = inputs(name, shape=(300, 257))
    strided = [tensor.T.contiguous().T for tensor in whole]
    shifted = [torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(tensor.shape) for tensor in whole]
    expected = function(name)(*whole, **settings(name))
    assert torch.equal(function(name)(*strided, **settings(name)), expected)
    assert torch.equal(function(name)(*shifted, **settings(name)), expected)


@EACH
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    given, threads = inputs(name, shape=(700, 300)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = function(name)(*given, **settings(name))
        torch.set_num_threads(3)
        three = function(name)(*given, **settings(name))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_elementwise_gives_the_same_bits_in_parts_of_any_size(name: str, dtype: torch.dtype) -> None:
    """Among the numbers are zeros of both signs, equal ones, denormal and large ones."""
    given = inputs(name, dtype, (61, 37))
    for i, tensor in enumerate(given):
        tensor[i::7] = 0.0
        tensor[i + 1 :: 11] = -0.0
        tensor[3::13] = given[0][3::13]
        tensor[5::17] *= 2.0**-140
        tensor[6::19] *= 2.0**60
    whole = function(name)(*given, **settings(name))
    for size in (1, 8, 61, 1000):
        flat = zip(*(tensor.reshape(-1).split(size) for tensor in given), strict=True)
        parts = torch.cat([function(name)(*part, **settings(name)) for part in flat])
        assert same_bytes(parts.reshape(whole.shape), whole), size


@pytest.mark.parametrize("name", KEEPS_NAN)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_an_input_is_not_finite_in_the_result(name: str, value: float) -> None:
    """The engine looks for it there alone. Weights of 0 are no exception."""
    for place in range(count(name)):
        for wanted in (settings(name), _with_zeros(settings(name))):
            given = inputs(name)
            for i, tensor in enumerate(given):
                tensor.reshape(-1)[3] = value if i == place else -given[place].reshape(-1)[3]
                tensor.reshape(-1)[7] = value  # in all of them
            found = function(name)(*given, **wanted).reshape(-1)
            assert not found[3].isfinite()
            assert not found[7].isfinite()


def _with_zeros(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose numbers are 0, and whose weights end with one."""
    return {k: [*v[:-1], 0.0] if isinstance(v, list) else 0.0 if isinstance(v, float) else v for k, v in wanted.items()}


@pytest.mark.parametrize("name", [name for name in MERGES if name not in CHANGE_ONE])
def test_equal_inputs_pass_through_by_identity(name: str) -> None:
    assert module_of("merges", name).simplify(["same"] * count(name), settings(name)) == "same"


@pytest.mark.parametrize("name", [name for name in MERGES if name not in CHANGE_ONE])
def test_equal_inputs_are_nearly_that_input_to_the_formula_too(name: str) -> None:
    (one, *_), n = inputs(name, torch.float64), count(name)
    assert torch.allclose(function(name)(*[one] * n, **settings(name)), one, rtol=1e-12, atol=1e-12)


@EACH
def test_what_is_left_to_compute_gives_what_the_whole_would(name: str) -> None:
    given = inputs(name)
    used, remaining = module_of("merges", name).simplify(list(range(len(given))), settings(name))
    assert torch.equal(function(name)(*(given[i] for i in used), **remaining), function(name)(*given, **settings(name)))


@EACH
def test_every_merge_can_be_written_in_a_recipe(name: str) -> None:
    table = method(name).table
    assert {"dtype"} <= set(table.model_fields)
    roles = [field for field, info in table.model_fields.items() if takes(info)]
    assert len(roles) == fixed(name) + ("checkpoints" in roles)


@pytest.mark.parametrize("name", UNORDERED)
def test_the_order_of_checkpoints_decides_nothing(name: str) -> None:
    parts, wanted, first = inputs(name), settings(name), fixed(name)
    given = list(range(len(parts)))
    found = module_of("merges", name).simplify(given, wanted)
    turned = given[:first] + given[: first - 1 if first else None : -1]
    assert turned != given
    there = wanted | ({"weights": wanted["weights"][::-1]} if "weights" in wanted else {})
    assert module_of("merges", name).simplify(turned, there) == found


WIDENING = [name for name in MERGES if getattr(module_of("merges", name), "WIDENS", False)]
WHOLE_TENSORS = [name for name in MERGES if not getattr(module_of("merges", name), "ELEMENTWISE", False)]


class Allocations(TorchDispatchMode):
    """Counts the tensors of a size that are made, of any type but bool, and not as a view of another one."""

    def __init__(self, numel: int, known: list[Tensor]) -> None:
        super().__init__()
        self.numel, self.count = numel, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, Tensor) and found.dtype != torch.bool and found.numel() >= self.numel:
                place = found.untyped_storage().data_ptr()
                self.count += place not in self.known
                self.known.add(place)
        return result


@pytest.mark.parametrize("name", WIDENING)
@pytest.mark.parametrize("shape", [(), (7,), (600, 150)])
def test_what_widens_its_inputs_itself_computes_as_if_they_came_wide(name: str, shape: tuple[int, ...]) -> None:
    narrow = inputs(name, torch.float16, shape)
    narrow[1] = narrow[1].bfloat16()
    found = function(name)(*narrow, **settings(name))
    expected = function(name)(*(tensor.float() for tensor in narrow), **settings(name))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", WHOLE_TENSORS)
def test_what_needs_whole_tensors_makes_no_other_one_than_its_result(name: str) -> None:
    given = inputs(name, shape=(4096, 300))
    with Allocations(given[0].numel(), given):  # the first use of all imports what would be traced too
        function(name)(*inputs(name), **settings(name))
    tracemalloc.start()
    try:
        with Allocations(given[0].numel(), given) as made:
            function(name)(*given, **settings(name))
        _, peak = tracemalloc.get_traced_memory()  # numpy's arrays
    finally:
        tracemalloc.stop()
    assert made.count <= 1
    assert peak < 8 * 2**20  # some runs of 65,536 and the counts of 65,536 digits, whatever the size of the tensor
