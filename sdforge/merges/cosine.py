"""The first checkpoint where columns point the same way, the second one elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from sdforge.exact import column_dots, gram, in_runs, line, root
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
WIDENS = True


def cosine(
    a: Tensor,
    b: Tensor,
    *,
    weight: Annotated[Weight, PerBlock()] = 0.5,
    similarity: Literal["columns", "mean"] = "columns",
) -> Tensor:
    """Return b + k (a − b), k = q − weight kept in 0 … 1, for every column (over the first dimension).

    a, b: of one shape. weight: how much likeness is not enough; from 1 on all is b.
    similarity: q is the cosine of the columns, or its mean with that of the whole tensors; 0 with a column of zeros.
    Source: `add_cosine_a` (columns) and `add_cosine_b` (mean) of sd-mecha, after "cosineA" and "cosineB" of
    SuperMerger, which stretch q by its range over the whole checkpoint.
    """
    x, y = (a.reshape(1), b.reshape(1)) if a.dim() == 0 else (a, b)
    lengths = root(column_dots(x, x)) * root(column_dots(y, y))
    q = column_dots(x, y) / lengths.where(lengths != 0, 1.0)
    if similarity == "mean":
        (aa, ab), (_, bb) = gram(lambda *vectors: list(vectors), a, b)
        whole = aa.sqrt() * bb.sqrt()
        q = (q + (float(ab / whole) if whole else 0.0)) * 0.5
    k = (q - weight).clamp(0, 1).reshape(a.shape[1:])
    return in_runs(lambda y, x: line(y, x, k.to(y.dtype)), b, a)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Equal inputs pass through; from weight 1 on b does."""
    a, b = inputs
    return b if a == b or parameters["weight"] >= 1 else (inputs, parameters)
