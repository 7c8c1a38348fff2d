"""The forms of LoRA as changes of one weight W: (out, in) or (out, in, k, k), everything in fp64.

Products are `exact.product`, small systems are solved and norms are folded in a fixed order, all the rest is
elementwise: to 16 bits the same bytes on every machine, and with `exact` to 32 as well. What a form returns is its
caller's to change, since a whole weight in fp64 is large: up to 236 MB in SDXL. Letters in
names: O out, I in (with the kernel: F, flattened), R rank, K blocks, B a block's edge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Any, TypeAlias

from sdforge import exact as arithmetic

if TYPE_CHECKING:
    from torch import Tensor

Factors: TypeAlias = "dict[str, Tensor]"
Additive: TypeAlias = "Callable[[Tensor, Factors, bool], Tensor]"
Rotation: TypeAlias = "Callable[[Tensor, Factors, dict[str, Any], bool], Tensor]"


def change(weight: Tensor, parameters: dict[str, Any], tensors: list[Tensor], *, exact: bool) -> Tensor:
    """Return what one update changes.

    parameters: form, factors (the tensors' names), scale (alpha / rank, and the strength of what is merely added),
    strength (of what replaces W: the way from W to what it would be is gone in this share), and facts of the form.
    """
    factors = {name: tensor.double() for name, tensor in zip(parameters["factors"], tensors, strict=True)}
    form = parameters["form"]
    if form in ROTATIONS:
        return ROTATIONS[form](weight, factors, parameters, exact).mul_(float(parameters["strength"]))
    added = ADDITIVE[form](weight, factors, exact).reshape(weight.shape).mul_(float(parameters["scale"]))
    if "dora_scale" in factors:
        rescaled = _rescaled(added.add_(weight), factors["dora_scale"])
        return rescaled.sub_(weight).mul_(float(parameters["strength"]))
    return added


def rows_of(form: str, shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> list[bool] | None:
    """Say which factors have a row for every row of the weight, so that a change of some rows needs no others.

    None: the form mixes rows, or (with Tucker's core, or norms per input channel) needs all of them.
    """
    if form not in ROWS or shapes.keys() & {"lora_mid", "hada_t1", "hada_t2"}:
        return None
    if "dora_scale" in shapes and shapes["dora_scale"][1] != 1:
        return None
    return [name in (*ROWS[form], "dora_scale") and shape[0] == weight[0] for name, shape in shapes.items()]


def _rescaled(value: Tensor, magnitude: Tensor) -> Tensor:
    """Turn V into m · V / ‖V‖ in its place (DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5).

    magnitude: (out, 1) for a norm per output row, (1, in) for one per input channel. What is zero stays as it is.
    """
    rows = magnitude.shape[1] == 1
    norms = arithmetic.row_norms(value if rows else value.transpose(0, 1))
    ratio = (magnitude.reshape(-1) / norms.clamp_min(sys.float_info.min)).where(norms > 0, 1.0)
    shape = [-1, *[1] * (value.dim() - 1)] if rows else [1, -1, *[1] * (value.dim() - 2)]
    return value.mul_(ratio.reshape(shape))


def _product(a: Tensor, b: Tensor, exact: bool) -> Tensor:
    """Return a @ b; b may have more dimensions behind its rows."""
    found = arithmetic.product(a, b.reshape(b.shape[0], -1), sliced=exact)
    return found.reshape(a.shape[0], *b.shape[1:])


def low_rank(weight: Tensor, f: Factors, exact: bool) -> Tensor:  # noqa: ARG001 -- one signature for all forms
    """The product up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685); LoCon: Tucker's core between."""
    if "lora_mid" in f:
        return _tucker(f["lora_mid"], f["lora_up"], f["lora_down"], exact)
    return _product(f["lora_up"], f["lora_down"], exact)


def _tucker(core_RRkk: Tensor, up_OR: Tensor, down_RI: Tensor, exact: bool) -> Tensor:
    """Return Σ core[m, n] · up[:, m] · down[n, :] (LyCORIS, https://arxiv.org/abs/2309.14859)."""
    return _product(up_OR, _inner(core_RRkk, down_RI, exact), exact)


def _inner(core_RRkk: Tensor, down_RI: Tensor, exact: bool) -> Tensor:
    """Return Σ core[m, n] · down[n, :] for every m: (rank, in, k, k), the right side of Tucker's product."""
    return _product(down_RI.T, core_RRkk.transpose(0, 1), exact).transpose(0, 1)


def hadamard(weight: Tensor, f: Factors, exact: bool) -> Tensor:
    """(w1_a w1_b) ⊙ (w2_a w2_b) (LoHa; FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098, eq. 1).

    The second product is never there as a whole: its rows are made as many at a time as `exact.product` makes, or both
    are noted for the compiled kernel.
    """
    (up, right), (other_up, other_right) = sides = [_side(f, i, exact) for i in "12"]
    if noted := arithmetic.noted_products(weight, sides, sliced=exact):
        return noted[0] * noted[1]
    result = _product(up, right, exact)
    for start in range(0, len(result), arithmetic.ROWS):
        rows = slice(start, start + arithmetic.ROWS)
        result[rows].mul_(_product(other_up[rows], other_right, exact))
    return result


def _side(f: Factors, i: str, exact: bool) -> tuple[Tensor, Tensor]:
    """Return what is multiplied for a side of LoHa: (out, rank) and (rank, …)."""
    a, b = f[f"hada_w{i}_a"], f[f"hada_w{i}_b"]
    core = f.get(f"hada_t{i}")  # with a core, the first factor is kept transposed
    return (a, b) if core is None else (a.T, _inner(core, b, exact))


def kronecker(weight: Tensor, f: Factors, exact: bool) -> Tensor:  # noqa: ARG001
    """w1 ⊗ w2 (LoKr; KronA, Edalati et al. 2022, https://arxiv.org/abs/2212.10650, eq. 3)."""
    first = f["lokr_w1"] if "lokr_w1" in f else _product(f["lokr_w1_a"], f["lokr_w1_b"], exact)
    if "lokr_w2" in f:
        second = f["lokr_w2"]
    elif "lokr_t2" in f:
        second = _tucker(f["lokr_t2"], f["lokr_w2_a"].T, f["lokr_w2_b"], exact)
    else:
        second = _product(f["lokr_w2_a"], f["lokr_w2_b"], exact)
    rows, columns, kernel = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], second.shape[2:]
    wide = first.reshape(first.shape[0], 1, first.shape[1], 1, *[1] * len(kernel)) * second[None, :, None]
    return wide.reshape(rows, columns, *kernel)


def general(weight: Tensor, f: Factors, exact: bool) -> Tensor:
    """W·a1·a2 + b1·b2, over input channels (GLoRA, Chavan et al. 2023, https://arxiv.org/abs/2306.07967)."""
    flat_FI = weight.reshape(*weight.shape[:2], -1).transpose(1, 2).reshape(-1, weight.shape[1])
    narrow_FR = _product(flat_FI, f["a1"], exact)
    del flat_FI
    mixed = _product(narrow_FR, f["a2"], exact).reshape(weight.shape[0], -1, weight.shape[1])
    mixed = mixed.transpose(1, 2).reshape(weight.shape)
    return mixed.add_(_product(f["b1"], f["b2"], exact).reshape(weight.shape))


def scaled(weight: Tensor, f: Factors, exact: bool) -> Tensor:  # noqa: ARG001
    """W ∘ w, per output row or input channel (IA3, Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""
    return weight * f["ia3"].reshape(*f["ia3"].shape, *[1] * (weight.dim() - 2))


def whole(weight: Tensor, f: Factors, exact: bool) -> Tensor:  # noqa: ARG001
    """A difference as it is: of a weight, a bias or a norm."""
    (difference,) = f.values()
    return difference.clone()  # which is changed, and numbers that were fp64 already are the file's own


def rotation(weight: Tensor, f: Factors, parameters: dict[str, Any], exact: bool) -> Tensor:
    """Return R·W − W for rotations of output rows (OFT, Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

    The convention is LyCORIS' and kohya's: oft_blocks (K, B, B) holds X, Q = X − Xᵀ, R = (I+Q)(I−Q)⁻¹, and rows are
    turned by Rᵀ. limit: of ‖Q‖, over all blocks (COFT); 0: none.
    """
    raw = f["oft_blocks"]
    skew = _limited(raw - raw.transpose(-1, -2), float(parameters["limit"]))
    if skew.dim() == 4:
        turned = _butterfly(weight, skew, exact)
    else:
        turned = _turn(_cayley(-skew), weight, exact).add_(weight)
    return (turned.mul_(_columns(f["rescale"], weight)) if "rescale" in f else turned).sub_(weight)


def _columns(values_O1: Tensor, weight: Tensor) -> Tensor:
    return values_O1.reshape(-1, *[1] * (weight.dim() - 1))


def _limited(skew: Tensor, limit: float) -> Tensor:
    if limit <= 0:
        return skew
    norm = sqrt(float(arithmetic.dot(skew, skew)))
    return skew * (limit / norm) if norm > limit else skew


def _cayley(skew_KBB: Tensor) -> Tensor:
    """Return (I+Q)(I−Q)⁻¹ − I = (I−Q)⁻¹ · 2Q."""
    eye = skew_KBB.new_zeros(skew_KBB.shape[1:]).fill_diagonal_(1)
    return arithmetic.solve(eye - skew_KBB, 2 * skew_KBB)


def _turn(minus_eye_KBB: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """Return (R − I)·W for blocks of rows."""
    edge = minus_eye_KBB.shape[-1]
    blocks = weight.reshape(-1, edge, weight[0].numel())
    return _products(minus_eye_KBB, blocks, exact).reshape(weight.shape)


def _products(a_KBB: Tensor, b_KBF: Tensor, exact: bool) -> Tensor:
    result = b_KBF.new_empty(b_KBF.shape)
    for i, (a, b) in enumerate(zip(a_KBB, b_KBF, strict=True)):
        result[i] = _product(a, b, exact)
    return result


def _butterfly(weight: Tensor, skew_MKBB: Tensor, exact: bool) -> Tensor:
    """Return B_{m−1} … B_0 · W (BOFT, Liu et al. 2023, https://arxiv.org/abs/2311.06243).

    Factor i works on rows that lie 2^i half blocks apart. Its blocks are not transposed, unlike OFT's.
    """
    half, value = skew_MKBB.shape[-1] // 2, weight.clone()
    for i, skew_KBB in enumerate(skew_MKBB):
        value = value.reshape(-1, 2, 2**i * half, *weight.shape[1:]).transpose(1, 2)
        apart, value = value.shape, value.reshape(weight.shape)
        value = _turn(_cayley(skew_KBB), value, exact).add_(value)
        value = value.reshape(apart).transpose(1, 2).reshape(weight.shape)
    return value


def input_rotation(weight: Tensor, f: Factors, parameters: dict[str, Any], exact: bool) -> Tensor:
    """Return W·R − W for rotations of inputs, as PEFT keeps OFT.

    oft_r: (K, B(B−1)/2) numbers above the diagonal of Q; one row serves all blocks. R = (I+Q)(I−Q)⁻¹, or with
    `neumann` terms, as PEFT does it by default, the beginning of a series for its inverse: I − 2Q + 2Q² − … ± Qⁿ⁻¹.
    """
    numbers, flat_OF = f["oft_r"], weight.reshape(weight.shape[0], -1)
    edge = round((1 + sqrt(1 + 8 * numbers.shape[1])) / 2)
    rows, columns = numbers.new_ones(edge, edge).triu(1).nonzero(as_tuple=True)
    skew_KBB = numbers.new_zeros(numbers.shape[0], edge, edge)
    skew_KBB[:, rows, columns] = numbers
    skew_KBB = skew_KBB - skew_KBB.transpose(1, 2)
    terms = int(parameters["neumann"])
    turned_KBB = _series(-skew_KBB, terms, exact) if terms else _cayley(skew_KBB)
    turned_KBB = turned_KBB.expand(flat_OF.shape[1] // edge, edge, edge)
    # (R − I)ᵀ on blocks of Wᵀ's rows
    return _turn(turned_KBB.transpose(1, 2), flat_OF.T.contiguous(), exact).T.reshape(weight.shape)


def _series(skew_KBB: Tensor, terms: int, exact: bool) -> Tensor:
    """Return 2Q + 2Q² + … + Qⁿ⁻¹; PEFT never stops before Q³ once it goes beyond the first term."""
    power, total = skew_KBB, (2 if terms > 1 else 0) * skew_KBB
    if terms > 2:
        last = max(terms, 4) - 1
        for n in range(2, last + 1):
            power = _products(power, skew_KBB, exact)
            total = total + (power if n == last else 2 * power)
    return total


ADDITIVE: dict[str, Additive] = {
    "lora": low_rank,
    "loha": hadamard,
    "lokr": kronecker,
    "glora": general,
    "ia3": scaled,
    "diff": whole,
    "diff_b": whole,
    "w_norm": whole,
    "b_norm": whole,
}
ROTATIONS: dict[str, Rotation] = {
    "oft": rotation,
    "oft_input": input_rotation,
}
ROWS: dict[str, tuple[str, ...]] = {  # form → factors of which a row of the change needs the same row and no other
    "lora": ("lora_up",),
    "loha": ("hada_w1_a", "hada_w2_a"),
    "ia3": ("ia3",),
    "diff": ("diff",),
    "diff_b": ("diff_b",),
    "w_norm": ("w_norm",),
    "b_norm": ("b_norm",),
}
