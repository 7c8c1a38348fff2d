"""Two weighted sums in one step: a with b, then the result with c."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sdforge.exact import line
from sdforge.settings import PerBlock, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ELEMENTWISE = True
KEEPS_NAN = True


def sum_twice(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: Annotated[Weight, PerBlock()] = 0.5, beta: Weight = 0.5
) -> Tensor:
    """Return (1 − β) ((1 − α) a + α b) + β c, rounded once where two targets would be rounded twice.

    a, b, c: of one shape. alpha: the share of b in the first sum; beta: the share of c in the second.
    Source: "sum Twice" of SuperMerger.
    """
    return line(line(a, b, alpha), c, beta)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """A sum at one of its ends, or of equal inputs, is that input; what is of no account then is replaced by a."""
    a, b, c = inputs
    alpha, beta = parameters["alpha"], parameters["beta"]
    if beta == 1:
        return c
    if alpha == 1:
        a, alpha = b, 0.0
    if alpha == 0 or a == b:
        b, alpha = a, 0.0
    if a == b and (beta == 0 or a == c):
        return a
    return [a, b, a if beta == 0 else c], {"alpha": alpha, "beta": beta}
