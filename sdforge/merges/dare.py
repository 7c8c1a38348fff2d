"""DARE: most of each task vector is dropped at random, the rest makes up for it."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sdforge.exact import drawn, fraction
from sdforge.merges._task_vectors import Density, Strengths, Vote, coefficients, joined, simplified, voted, weighed
from sdforge.settings import Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True


def dare(
    base: Tensor,
    *checkpoints: Tensor,
    weights: Strengths = [],  # noqa: B006 -- never written to
    density: Density = 0.1,
    rescale: bool = True,
    vote: Vote = "none",
    scale: Weight = 1.0,
    normalize: bool = False,
    seed: int = 0,
    tensor: str = "",
) -> Tensor:
    """Return base + scale · Σ wᵢ · mᵢ (Mᵢ − base) / density, mᵢ 1 with probability density, else 0.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape, in an
    order that decides their masks.
    weights: one for each checkpoint; empty: 1 each. density: the share that is left. rescale: divide by it.
    vote: `sum` and `count` let the differences that are left elect a sign, as `ties` does. scale: of the result.
    normalize: divide by the sum of the weights (that agree).
    A mask is drawn from the seed, the tensor's name and the checkpoint's place in the list: no other tensor, block or
    thread changes it.
    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099, §3.2; `dare_linear` and `dare_ties` of mergekit, but
    divided by the density as in the paper; `dropout` and `add_ties_with_dare` of sd-mecha.
    """
    strengths = weights or [1.0] * len(checkpoints)
    by = 1 / fraction(density) if rescale else Fraction(1)
    places = range(1, len(checkpoints) + 1) if density < 1 else ()
    masks = [drawn(base, density, "sdforge.dare", str(seed), tensor, str(place)) for place in places]

    def join(vectors: list[Tensor]) -> Tensor:
        if vote == "none":
            return weighed(vectors, coefficients(strengths, scale, normalize=normalize, by=by))
        factors = coefficients(strengths, 1.0, normalize=False, by=by)
        return voted(vectors, factors, strengths, vote, normalize=normalize) * scale

    return joined(join, base, checkpoints, masks)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """What has weight 0 or equals the base is left out; without any the base passes. Nothing is random at density 1."""
    whole = parameters["density"] == 1
    if whole:
        parameters = {name: value for name, value in parameters.items() if name not in ("seed", "tensor", "rescale")}
    return simplified(inputs, parameters, linear=whole and parameters["vote"] == "none", in_places=not whole)
