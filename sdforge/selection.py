"""Which numbers of a tensor are the largest, and the rank of each: exactly, by the processor or by a device.

Of equal numbers the first counts as larger, so that there is one answer. The processor makes the numbers, wherever they
are chosen from; the bits of numbers ≥ 0 are ordered as whole numbers are, and a device does no more than to compare,
count and sort those. It is used where `selecting_on` names one, once it has given the processor's answers on trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sdforge.exact import BLOCK, runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# elements; a larger tensor that is needed whole is made by the process that takes orders, which alone may use a device:
# what is forked from it cannot, and two processors have work as long as the smaller ones are made beside it
LARGE = 1 << 22


class _Device(NamedTuple):
    """A device, and who is told why it does not select."""

    name: str
    say: Callable[[str], object]


_DEVICE: ContextVar[_Device | None] = ContextVar("device", default=None)


@contextmanager
def selecting_on(device: str, say: Callable[[str], object]) -> Iterator[None]:
    """Let a device (as torch names it) select meanwhile, in this process; `cpu`: the processor.

    It is opened when there is something to select. Where it fails, or has too little memory, `say` is told, and the
    processor selects.
    """
    import torch

    before = _DEVICE.set(None if device == "cpu" else _Device(device, say))
    try:
        yield
    finally:
        _DEVICE.reset(before)
        with suppress(RuntimeError):  # of a device that has failed, which has been said
            torch.cuda.empty_cache()  # whoever uses the device next may be another process


def largest(function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
    """Return where the `count` largest of some numbers ≥ 0 stand (bool, same shape); of equal ones the first.

    function: elementwise, what makes the numbers of the tensors, which have one shape and one type of 32 or 64 bits.
    Ties are common: the differences of fp16 weights take few values, and a threshold alone would keep too many.
    """
    import torch

    first = tensors[0]
    if count <= 0 or count >= first.numel():
        return torch.full(first.shape, count > 0, dtype=torch.bool)

    def numbers() -> Iterator[Tensor]:
        return (function(*parts) for parts in runs(*tensors))

    chosen = _by_device(lambda device: _largest_there(device, numbers(), count))
    return (_largest_here(numbers, count, first.numel()) if chosen is None else chosen).reshape(first.shape)


def ranks(magnitudes: Tensor) -> Tensor:
    """Return the rank of each number ≥ 0 of a matrix within its row, 0 for the smallest; equal ones in their order."""
    found = _by_device(lambda device: _ranks_there(device, magnitudes))
    return _ranks_here(magnitudes) if found is None else found


# -- on a device -------------------------------------------------------------------------------------------------------


def _by_device(select: Callable[[torch.device], Tensor]) -> Tensor | None:
    """Return what the device that is named selects, or None where there is none or it does not."""
    import torch

    device = _DEVICE.get()
    if device is None:
        return None
    why = why_not(device.name)
    if not why:
        try:
            return select(torch.device(device.name))
        except torch.OutOfMemoryError:
            why = "it has too little memory for some tensors"
        except RuntimeError as error:
            why = _first_line(error)
    device.say(f"{device.name} leaves choosing and ranking to the processor: {why}")
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@cache
def why_not(device: str) -> str:
    """Return why a device (as torch names it) does not select, or nothing where it does.

    Its answers must be the processor's. Tried once in a process, which opens the device.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device answers"
    try:
        return "" if _agrees(torch.device(device)) else "it selects otherwise than the processor"
    except RuntimeError as error:
        return _first_line(error)


def _agrees(device: torch.device) -> bool:
    """Say whether a device selects as the processor does: from zeros, denormal and large numbers, dozens of each."""
    import torch

    for dtype in (torch.float32, torch.float64):
        wave = (torch.arange(1 << 15) * 40_503 % 509).to(dtype)
        least = torch.finfo(dtype).tiny / 2**20  # a denormal number
        flat = torch.cat([wave * least, wave * 2.0**100, wave.flip(0)])
        numbers, size = torch.split(flat, BLOCK), flat.numel()
        for count in (1, size // 3, size - 100):
            here = _largest_here(partial(iter, numbers), count, size)
            if not torch.equal(_largest_there(device, iter(numbers), count), here):
                return False
        for width in (96, 3072, size // 2):  # libraries sort short and long rows by different programs
            matrix = flat.reshape(-1, width)
            if not torch.equal(_ranks_there(device, matrix), _ranks_here(matrix)):
                return False
    return True


def _largest_there(device: torch.device, numbers: Iterator[Tensor], count: int) -> Tensor:
    """Return where the `count` largest stand, of numbers that come in runs."""
    import torch

    bits = torch.cat([_bits(run).to(device) for run in numbers])
    threshold = 0
    for place in range(8 * bits.itemsize - 2, -1, -1):  # from the highest bit below the sign
        larger = threshold | 1 << place
        if int((bits >= larger).count_nonzero()) >= count:
            threshold = larger
    chosen = bits > threshold
    left = count - int(chosen.count_nonzero())
    chosen.index_fill_(0, (bits == threshold).nonzero().reshape(-1)[:left], True)
    return chosen.cpu()


def _ranks_there(device: torch.device, magnitudes: Tensor) -> Tensor:
    order = _bits(magnitudes).to(device).argsort(stable=True)
    return _places_of(order).cpu()


def _bits(numbers: Tensor) -> Tensor:
    """Return numbers ≥ 0 as whole ones of the same order."""
    import torch

    return numbers.contiguous().view(torch.int32 if numbers.dtype == torch.float32 else torch.int64)


# -- by the processor --------------------------------------------------------------------------------------------------


def _largest_here(numbers: Callable[[], Iterator[Tensor]], count: int, size: int) -> Tensor:
    """Return where the `count` largest of `size` numbers stand; `numbers` yields them anew each time."""
    import torch

    threshold, above = _threshold(numbers, count)
    chosen, start, left = torch.empty(size, dtype=torch.bool), 0, count - above
    for run in numbers():
        own = chosen[start : start + BLOCK]
        torch.gt(run, threshold, out=own)
        if left:
            equal = (run == threshold).nonzero().reshape(-1)[:left]
            own[equal] = True
            left -= equal.numel()
        start += BLOCK
    return chosen


def _threshold(numbers: Callable[[], Iterator[Tensor]], count: int) -> tuple[float, int]:
    """Return the `count`-th largest of some numbers ≥ 0, and how many are larger; `numbers` yields them anew each time.

    The bits of such numbers are ordered as whole numbers are. Their digits of 16 bits are counted, the highest first,
    each among the numbers that begin as the one that is sought: nothing is sorted or kept.
    """
    import numpy as np

    dtype = next(numbers()).numpy().dtype
    unsigned, found, above = np.dtype(f"u{dtype.itemsize}"), 0, 0

    def digits(shift: int) -> Iterator[Any]:
        for run in numbers():
            bits = run.contiguous().numpy().view(unsigned) >> unsigned.type(shift)
            first = shift + 16 == 8 * dtype.itemsize  # and nothing has been found yet
            yield (bits if first else bits[bits >> unsigned.type(16) == found]).astype(np.uint16)

    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        counts = _counted(digits(shift))
        larger = above + counts[::-1].cumsum()[::-1] - counts  # than each digit
        digit = int(np.flatnonzero(larger < count)[0])
        found, above = found << 16 | digit, int(larger[digit])
    return float(np.array(found, unsigned).view(dtype)), above


def _counted(parts: Iterator[Any]) -> Any:
    """Return how often each number below 2¹⁶ occurs, counted many at a time: each time all counts are added."""
    import numpy as np

    total, waiting, size = np.zeros(1 << 16, np.int64), [], 0
    for part in parts:
        waiting.append(part)
        size += part.size
        if size >= 8 * BLOCK:
            total += np.bincount(np.concatenate(waiting), minlength=1 << 16)
            waiting, size = [], 0
    return total + np.bincount(np.concatenate(waiting), minlength=1 << 16) if waiting else total


def _ranks_here(magnitudes: Tensor) -> Tensor:
    import numpy as np
    import torch

    if magnitudes.dtype == torch.float32:
        # bits and place as one number leave a sort no choice, be it stable or not; numpy has a fast one for such
        keys = magnitudes.contiguous().numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= np.arange(magnitudes.shape[1], dtype=np.uint64)
        keys.sort(axis=1)
        order = torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).astype(np.int64))
    else:
        order = magnitudes.argsort(stable=True)
    return _places_of(order)


def _places_of(order: Tensor) -> Tensor:
    """Return at which place of its row each number stands in an order: the inverse of each row."""
    import torch

    places = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, places)
