"""Some rows of every tensor from one checkpoint, the others from another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import fraction
from sdforge.settings import PerBlock, Share

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


def tensor_sum(a: Tensor, b: Tensor, *, width: Annotated[Share, PerBlock()] = 0.5, offset: Share = 0.0) -> Tensor:
    """Return a with the rows (over the first dimension) from n·offset to n·(offset + width) of b.

    a, b: of one shape. Rows are copied, no number is computed. Bounds are rounded down, exactly; a region that goes
    beyond the last row goes on at the first. A single number is b's if width is more than 1/2.
    Source: "tensor" of SuperMerger, `tensor_sum` of meh and sd-mecha, also as `copy_region`.
    """
    if a.dim() == 0:
        return (b if width > 0.5 else a).clone()
    count, start, end = a.shape[0], fraction(offset), fraction(offset) + fraction(width)
    first, last = int(count * start), int(count * end)
    result = a.clone()
    result[first:last] = b[first:last]
    if last > count:
        result[: last - count] = b[: last - count]
    return result


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Without width, and for equal inputs, a passes through; at width 1 b does."""
    a, b = inputs
    if parameters["width"] == 0 or a == b:
        return a
    return b if parameters["width"] == 1 else (inputs, parameters)
