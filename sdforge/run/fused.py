"""Formulas of `+ − ×` in one pass: what a method does to its tensors is noted down, and run by the compiled kernel.

A method is given `Noted` tensors, which stand for parts of real ones. It adds, subtracts and multiplies as if they were
torch's; whatever else it does with them says that it cannot be noted, and then torch computes it. What was noted of one
part is run again on the next ones, of which the method hears nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sdforge.kernel import (
    ADD,
    ADD_C,
    BF16,
    F16,
    F32,
    F64,
    MUL,
    MUL_C,
    PRODUCT,
    PRODUCTS,
    RANKS,
    SUB,
    SUB_C,
    Operation,
    Product,
    kernel,
    missing,
)
from sdforge.run.tensors import TOO_LARGE

TYPES = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32, torch.float64: F64}
PAIRS = (ADD, SUB, MUL)
INFINITE = 0x7F800000  # bits of Inf; of what is finite they are less, of NaN more
BITS = {dtype: int(torch.tensor(bound).view(torch.int32)) for dtype, bound in TOO_LARGE.items()}


class CannotBeNoted(Exception):
    """A method does something with its tensors that the kernel has no operation for."""


class _Step(NamedTuple):
    """An operation: its number, which values it is of (input i is i, step k is −1 − k), and the constant in hex.

    As numbers 0 and −0 would be equal.
    """

    op: int
    x: int
    y: int
    constant: str


class Factors(NamedTuple):
    """A product of which nothing is made before it is needed: (rows, rank) and (rank, columns) in fp64."""

    left: Tensor
    right: Tensor


class Notes:
    """What is done to tensors of one shape, computed in fp32 or fp64."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, torch.Size(shape)
        self.inputs: list[Tensor | Factors] = []
        self.steps: list[_Step] = []

    def given(self, tensor: Tensor) -> Noted:
        """Return what stands for a tensor. Raises CannotBeNoted for types and layouts of no use to the kernel."""
        narrower = tensor.dtype in TYPES and tensor.dtype.itemsize <= self.dtype.itemsize
        if not narrower or not tensor.is_contiguous() or tensor.shape != self.shape:
            raise CannotBeNoted
        return self._input(tensor)

    def products(self, factors: Sequence[tuple[Tensor, Tensor]]) -> list[Noted]:
        """Return what stands for left @ right of each pair, in the shape of the notes; nothing where there is no room.

        Raises CannotBeNoted for factors that are noted themselves, and for a product of another shape.
        """
        new = [Factors(left, right.reshape(len(right), -1)) for left, right in factors]
        all_there = [*(each for each in self.inputs if isinstance(each, Factors)), *new]
        plain = all(part.dtype is torch.float64 and part.is_contiguous() for each in new for part in each)
        fits = len(all_there) <= PRODUCTS and sum(len(each.right) for each in all_there) <= RANKS
        if self.dtype is not torch.float64 or not plain or not fits:
            return []
        if any(len(each.left) * each.right.shape[1] != self.shape.numel() for each in new):
            raise CannotBeNoted
        if len({each.right.shape[1] for each in all_there}) > 1:
            return []
        return [self._input(each) for each in new]

    def _input(self, given: Tensor | Factors) -> Noted:
        self.inputs.append(given)
        return Noted(self, len(self.inputs) - 1)

    def step(self, op: int, x: int, y: int = 0, constant: float = 0.0) -> int:
        """Note an operation; return its value."""
        self.steps.append(_Step(op, x, y, constant.hex()))
        return -len(self.steps)

    def fused(self, result: Noted, dtype: torch.dtype) -> Fused | None:
        """Return what makes the result, rounded to `dtype` by way of fp32; None for what the kernel does not do.

        That is a result that is not the last step's, or of fp64, or more values than it has room for; and where an
        input is not used, in which nothing would be noticed.
        """
        if kernel() is None or TYPES.get(dtype, F64) == F64 or not self.steps or result.value != -len(self.steps):
            return None
        program = _program(tuple(self.steps), len(self.inputs))
        return None if program is None else Fused(self, program, dtype)


class Fused:
    """What was noted, as the kernel runs it: again and again, on other numbers of the same kinds.

    What it makes lies in one tensor, until it makes something else.
    """

    def __init__(self, notes: Notes, program: Any, dtype: torch.dtype) -> None:
        self.shape, self.dtype = notes.shape, dtype
        count = len(notes.inputs)
        self.types = (ctypes.c_int32 * count)()
        self.places = (ctypes.c_void_p * count)()
        self.products: dict[int, Product] = {}
        self.made, self.most = torch.empty(self.shape, dtype=dtype), ctypes.c_uint32()
        self.arguments = (
            count,
            self.places,
            self.types,
            len(program),
            program,
            ctypes.c_int64(self.made.numel()),
            int(notes.dtype is torch.float64),
            ctypes.c_void_p(self.made.data_ptr()),
            TYPES[dtype],
            ctypes.byref(self.most),
        )
        self.too_large = BITS.get(dtype, INFINITE)
        for i, given in enumerate(notes.inputs):
            if isinstance(given, Factors):
                self.types[i] = PRODUCT
                self.products[i] = Product(rank=given.right.shape[0], columns=given.right.shape[1])
                self.places[i] = ctypes.addressof(self.products[i])
            else:
                self.types[i] = TYPES[given.dtype]

    def run(self, inputs: Sequence[Tensor | Factors]) -> Tensor | None:
        """Return the result; None where something is not finite or does not fit, or the kernel has no room.

        inputs: of the kinds and shapes that were noted.
        """
        self.take(inputs)
        return self.again()

    def take(self, inputs: Sequence[Tensor | Factors]) -> None:
        """Let the kernel know where its inputs lie."""
        for i, given in enumerate(inputs):
            if isinstance(given, Factors):
                product = self.products[i]
                product.left, product.right = given.left.data_ptr(), given.right.data_ptr()
            else:
                self.places[i] = given.data_ptr()

    def again(self) -> Tensor | None:
        """Return the result of what lies now where the inputs lay before; None as `run` does."""
        made = self.result()
        return None if self.most.value >= self.too_large else made

    def result(self) -> Tensor | None:
        """Return the result whatever it is: `most` has the bits of its largest magnitude in fp32."""
        return None if kernel().run(*self.arguments) else self.made  # type: ignore[union-attr]  # see `Notes.fused`


@cache
def _program(steps: tuple[_Step, ...], inputs: int) -> Any:
    """Return steps as the kernel takes them: there they are numbered behind the inputs. None: an input is not used."""
    if not set(range(inputs)) <= {place for s in steps for place in ((s.x, s.y) if s.op in PAIRS else (s.x,))}:
        return None

    def value(number: int) -> int:
        return number if number >= 0 else inputs - 1 - number

    rows = [Operation(s.op, value(s.x), value(s.y), 0, float.fromhex(s.constant)) for s in steps]
    return (Operation * len(rows))(*rows)


def _cannot(*_: Any, **__: Any) -> NoReturn:
    raise CannotBeNoted


class Noted:
    """Stands for a tensor whose numbers are a value of some notes."""

    def __init__(self, notes: Notes, value: int) -> None:
        self._notes, self.value = notes, value

    @property
    def shape(self) -> torch.Size:
        return self._notes.shape

    def reshape(self, shape: tuple[int, ...]) -> Noted:
        """Return itself, where that is its shape already."""
        return self if tuple(shape) == self.shape else _cannot()

    def products(self, factors: Sequence[tuple[Tensor, Tensor]]) -> list[Noted]:
        """Return what stands for left @ right of each pair, beside this one (see `Notes.products`)."""
        return self._notes.products(factors)

    def double(self) -> Noted:
        """Return itself, where it is computed in fp64."""
        return self if self._notes.dtype is torch.float64 else _cannot()

    def type_as(self, other: Any) -> Noted:
        """Return itself, which is noted where the other one is."""
        return self if isinstance(other, Noted) and other._notes is self._notes else _cannot()

    def _with(self, other: Any, pair: int, single: int) -> int:
        if isinstance(other, Noted) and other._notes is self._notes:
            return self._notes.step(pair, self.value, other.value)
        if isinstance(other, float | int):
            return self._notes.step(single, self.value, constant=float(other))
        _cannot()

    def __add__(self, other: Any) -> Noted:
        return Noted(self._notes, self._with(other, ADD, ADD_C))

    def __sub__(self, other: Any) -> Noted:
        return Noted(self._notes, self._with(other, SUB, SUB_C))

    def __mul__(self, other: Any) -> Noted:
        return Noted(self._notes, self._with(other, MUL, MUL_C))

    __radd__, __rmul__ = __add__, __mul__  # a + b and b + a are the same bits

    def add_(self, other: Any) -> Noted:
        self.value = self._with(other, ADD, ADD_C)
        return self

    def sub_(self, other: Any) -> Noted:
        self.value = self._with(other, SUB, SUB_C)
        return self

    def mul_(self, other: Any) -> Noted:
        self.value = self._with(other, MUL, MUL_C)
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Noted:
        """Note `torch.add`, `sub` and `mul`. What becomes `type_as` a noted tensor takes part as it lies there then."""
        more = dict(kwargs or {})
        out = more.pop("out", None)
        name = {torch.add: "__add__", torch.sub: "__sub__", torch.mul: "__mul__"}.get(function)
        if more or len(args) != 2 or not isinstance(args[1] if name is None else args[0], Noted):
            raise CannotBeNoted
        if function is torch.Tensor.type_as:
            given: Noted = args[1]._notes.given(args[0])
            return given
        if name is None or not (out is None or isinstance(out, Noted)):
            raise CannotBeNoted
        found: Noted = getattr(args[0], name)(args[1])
        if out is not None:
            out.value = found.value
        return found

    def __getattr__(self, name: str) -> NoReturn:
        raise CannotBeNoted(name)

    __rsub__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = __abs__ = _cannot
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __len__ = __iter__ = _cannot
    __getitem__ = __setitem__ = __and__ = __or__ = __invert__ = _cannot
    __hash__ = object.__hash__


@cache
def without() -> str:
    """Return why the kernel does not compute here, or nothing where it does: its bytes must be torch's.

    Tried on all numbers of 16 bits, in both precisions, and on a product, once in a process.
    """
    return missing() or ("" if _agrees() else "it computes other bytes than torch here")


def _agrees() -> bool:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for narrow, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.float64)):
        a = bits.view(narrow)
        a = a[a.isfinite()]
        b = a.flip(0)
        notes = Notes(wide, tuple(a.shape))
        x, y = notes.given(a), notes.given(b)
        fused = notes.fused((x - y).mul_(0.3).add_(x), narrow)
        plain = (a.to(wide) - b.to(wide)).mul_(0.3).add_(a.to(wide)).to(torch.float32).to(narrow)
        if fused is None:
            return False
        fused.take(notes.inputs)
        found = fused.result()
        if found is None or not torch.equal(found.view(torch.int16), plain.view(torch.int16)):
            return False
    return _agrees_on_products()


def _agrees_on_products() -> bool:
    """Try whole numbers, whose sums are exact in any order, and tiles that are cut off on both sides."""
    left, right = (torch.arange(n, dtype=torch.float64).remainder(p) - p // 2 for n, p in ((3 * 18, 7), (3 * 200, 11)))
    left, right = left.reshape(18, 3), right.reshape(3, 200)
    notes = Notes(torch.float64, (18, 200))
    (product,) = notes.products([(left, right)]) or (None,)
    fused = notes.fused(product * 1.0, torch.float32) if product is not None else None
    found = fused.run(notes.inputs) if fused else None
    return found is not None and torch.equal(found, (left @ right).float())
