"""DELLA: task vectors are dropped at random, small differences more often than large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.errors import SettingErrors
from sdforge.exact import drawn, fraction, in_runs
from sdforge.merges._task_vectors import Density, Strengths, Vote, coefficients, simplified, voted, weighed
from sdforge.selection import ranks
from sdforge.settings import Share, Weight

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True
SELECTS = True


def della(
    base: Tensor,
    *checkpoints: Tensor,
    weights: Strengths = [],  # noqa: B006 -- never written to
    density: Density = 0.5,
    epsilon: Share = 0.15,
    rescale: bool = True,
    vote: Vote = "sum",
    scale: Weight = 1.0,
    normalize: bool = True,
    seed: int = 0,
    tensor: str = "",
) -> Tensor:
    """Return base + scale · (mean of wᵢ · mᵢ (Mᵢ − base) / pᵢ that have the elected sign), mᵢ 1 with probability pᵢ.

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape, in an
    order that decides their masks.
    weights: one for each checkpoint; empty: 1 each. density, epsilon: pᵢ grows from density − epsilon for the smallest
    of a row (over the first dimension) to density + epsilon for the largest, by rank, equal ones in their order.
    rescale: divide by pᵢ. vote: `none` adds all instead, `sum` and `count` elect a sign as `ties` does. scale: of the
    result. normalize: divide by the sum of the weights (that agree).
    A mask is drawn from the seed, the tensor's name and the checkpoint's place in the list, as in `dare`.
    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617, §3.1; `della` and `della_linear` of mergekit.
    """
    import torch

    strengths = weights or [1.0] * len(checkpoints)
    factors = coefficients(strengths, scale, normalize=normalize)

    def join(own: Tensor, *parts: Tensor) -> Tensor:
        *others, places = parts
        vectors = []
        for i, other in enumerate(others):
            vector = other - own
            chances = _chances(vector, density, epsilon)
            names = ("sdforge.della", str(seed), tensor, str(i + 1))
            mask = drawn(own, chances, *names, start=int(places[0]) * own.shape[1])
            if rescale:
                vector = vector / chances.where(chances > 0, 1.0).to(own.dtype)  # what is never kept is not divided
            vectors.append(vector * mask)
        if vote == "none":
            return own + weighed(vectors, factors)
        return own + voted(vectors, strengths, strengths, vote, normalize=normalize) * scale

    rows = base.shape[0] if base.dim() > 1 else 1
    matrices = [one.reshape(rows, base.numel() // max(1, rows)) for one in (base, *checkpoints)]
    return in_runs(join, *matrices, torch.arange(rows)).reshape(base.shape)


def _chances(vectors: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability of each element of a matrix in fp64: by its rank within its row."""
    count, least = vectors.shape[1], float(fraction(density) - fraction(epsilon))
    if count == 1:
        return vectors.new_full(vectors.shape, density).double()
    step = float(2 * fraction(epsilon) / (count - 1))
    return ranks(vectors.abs()).double() * step + least


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """What has weight 0 or equals the base is left out; without any the base passes through."""
    density, epsilon = parameters["density"], parameters["epsilon"]
    if not 0 <= fraction(density) - fraction(epsilon) <= fraction(density) + fraction(epsilon) <= 1:
        message = f"probabilities from {density} − {epsilon} to {density} + {epsilon} are not within 0 … 1"
        raise SettingErrors([("density", message, "a smaller epsilon, or a density nearer to 0.5")])
    return simplified(inputs, parameters, linear=False, in_places=True)
