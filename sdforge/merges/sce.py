"""SCE: task vectors weigh by their energy, where they differ most, with the sign of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdforge.exact import runs, share_of, squares
from sdforge.merges._task_vectors import Density, joined, masked_vectors, total
from sdforge.selection import largest

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
WIDENS = True
SELECTS = True


def sce(base: Tensor, *checkpoints: Tensor, select_topk: Density = 1.0) -> Tensor:
    """Return base + Σ wᵢ·dᵢ / Σ wᵢ over those dᵢ = Mᵢ − base that have the sign of Σ dᵢ, wᵢ the mean of dᵢ².

    base: what all descend from, and what gives VAE and tokenizer; checkpoints: one tensor of each, of its shape. Their
    order decides nothing.
    select_topk: the share of the elements that are used, one at least, those whose variance over the checkpoints is
    largest, of equal ones the first, counted among those whose variance is not 0.
    Source: Wan et al. 2024, https://arxiv.org/abs/2408.07990, §3.2; `sce` of mergekit.
    """
    masks = [_most_varied(base, checkpoints, select_topk)] * len(checkpoints) if select_topk < 1 else []
    energies = squares(lambda own, *parts: masked_vectors(own, parts, len(checkpoints)), base, *checkpoints, *masks)
    energy = sum(energies)
    weights = [float(each / energy) if energy else 1 / len(energies) for each in energies]

    def join(vectors: list[Tensor]) -> Tensor:
        elected = (total(vectors) >= 0).to(vectors[0].dtype) * 2 - 1
        agree = [(each * elected > 0).to(each.dtype) for each in vectors]
        above = total([each * weight * yes for each, weight, yes in zip(vectors, weights, agree, strict=True)])
        below = total([yes * weight for weight, yes in zip(weights, agree, strict=True)])
        return above / below.where(below != 0, 1.0)

    return joined(join, base, checkpoints, masks)


def _most_varied(base: Tensor, checkpoints: Sequence[Tensor], share: float) -> Tensor:
    """Return where the variance over the checkpoints is largest (bool): in that share of where it is not 0."""

    def spread(own: Tensor, *parts: Tensor) -> Tensor:
        vectors = [part - own for part in parts]
        mean = total(vectors) * (1 / len(vectors))
        return total([(each - mean) * (each - mean) for each in vectors])

    varied = sum(int(spread(*parts).count_nonzero()) for parts in runs(base, *checkpoints))
    return largest(spread, share_of(varied, share), base, *checkpoints)


def simplify(inputs: list[Any], parameters: dict[str, Any]) -> Any | tuple[list[Any], dict[str, Any]]:
    """Where nothing has been learned the base passes through; the checkpoints are sorted."""
    base, *others = inputs
    return base if all(each == base for each in others) else ([base, *sorted(others)], parameters)
