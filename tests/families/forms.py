"""Random factors of every form of LoRA, and, written once more and apart from the code, what they make of a weight.

The formulas are those of LyCORIS' and PEFT's forward passes; their constants (which side is transposed, what is
scaled) were checked against both libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Factors = dict[str, Tensor]


class Case(NamedTuple):
    """A form: factors for a weight of this shape, alpha (None: there is none), and W → W′ in fp64."""

    factors: Callable[[tuple[int, ...], Callable[..., Tensor]], Factors]
    after: Callable[[Tensor, Factors, float], Tensor]
    alpha: float | None = 1.5
    facts: dict[str, int] = {}  # noqa: RUF012 -- never written to


def _lora(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"lora_up": n(shape[0], 3), "lora_down": n(3, *shape[1:])}


def _low_rank(w: Tensor, f: Factors, alpha: float) -> Tensor:
    return w + alpha / 3 * torch.einsum("or,ri...->oi...", f["lora_up"], f["lora_down"])


def _tucker(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"lora_up": n(shape[0], 3), "lora_down": n(3, shape[1]), "lora_mid": n(3, 3, *shape[2:])}


def _with_core(w: Tensor, f: Factors, alpha: float) -> Tensor:
    return w + alpha / 3 * torch.einsum("mnkl,im,nj->ijkl", f["lora_mid"], f["lora_up"], f["lora_down"])


def _loha(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    sides = {f"hada_w{i}_a": n(shape[0], 3) for i in "12"}
    return sides | {f"hada_w{i}_b": n(3, prod(shape[1:])) for i in "12"}


def _hadamard(w: Tensor, f: Factors, alpha: float) -> Tensor:
    update = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    return w + alpha / 3 * update.reshape(w.shape)


def _loha_tucker(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {
        name.format(i): n(*size)
        for i in "12"
        for name, size in {
            "hada_w{}_a": (3, shape[0]),
            "hada_w{}_b": (3, shape[1]),
            "hada_t{}": (3, 3, *shape[2:]),
        }.items()
    }


def _hadamard_with_cores(w: Tensor, f: Factors, alpha: float) -> Tensor:
    sides = [torch.einsum("ijkl,jr,ip->prkl", f[f"hada_t{i}"], f[f"hada_w{i}_b"], f[f"hada_w{i}_a"]) for i in "12"]
    return w + alpha / 3 * sides[0] * sides[1]


def _lokr(first: bool, second: bool) -> Callable[[tuple[int, ...], Callable[..., Tensor]], Factors]:
    def make(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
        out, into, *kernel = shape[0] // 4, shape[1] // 2, *shape[2:]
        one = {"lokr_w1": n(4, 2)} if first else {"lokr_w1_a": n(4, 3), "lokr_w1_b": n(3, 2)}
        two = (
            {"lokr_w2": n(out, into, *kernel)}
            if second
            else {"lokr_w2_a": n(out, 3), "lokr_w2_b": n(3, prod((into, *kernel)))}
        )
        return one | two

    return make


def _kronecker(w: Tensor, f: Factors, alpha: float) -> Tensor:
    one = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    two = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
    two = two.reshape(w.shape[0] // 4, w.shape[1] // 2, *w.shape[2:])
    scale = 1.0 if {"lokr_w1", "lokr_w2"} <= set(f) else alpha / 3
    return w + scale * torch.kron(one.reshape(*one.shape, *[1] * (w.dim() - 2)), two)


def _lokr_tucker(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    core = {"lokr_t2": n(3, 3, *shape[2:]), "lokr_w2_a": n(3, shape[0] // 4), "lokr_w2_b": n(3, shape[1] // 2)}
    return {"lokr_w1": n(4, 2)} | core


def _kronecker_with_core(w: Tensor, f: Factors, alpha: float) -> Tensor:
    two = torch.einsum("ijkl,ip,jr->prkl", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    return w + alpha / 3 * torch.kron(f["lokr_w1"][..., None, None], two.contiguous())


def _glora(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"a1": n(shape[1], 3), "a2": n(3, shape[1]), "b1": n(shape[0], 3), "b2": n(3, *shape[1:])}


def _general(w: Tensor, f: Factors, alpha: float) -> Tensor:
    mixed = torch.einsum("oi...,ir,rj->oj...", w, f["a1"], f["a2"])
    return w + alpha / 3 * (mixed + torch.einsum("or,ri...->oi...", f["b1"], f["b2"]))


def _blocks(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"oft_blocks": n(shape[0] // 4, 4, 4), "rescale": 1 + n(shape[0], 1)}


def _cayley(x: Tensor, limit: float = 0.0) -> Tensor:
    q = x - x.transpose(-1, -2)
    if limit and q.norm() > limit:
        q = q * limit / q.norm()
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def _rotated(w: Tensor, f: Factors, alpha: float) -> Tensor:
    r = _cayley(f["oft_blocks"], alpha * w.shape[0])
    turned = torch.einsum("knm,kn...->km...", r, w.reshape(r.shape[0], 4, *w.shape[1:])).reshape(w.shape)
    return turned * f["rescale"].reshape(-1, *[1] * (w.dim() - 1))


def _butterflies(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"oft_blocks": n(2, shape[0] // 4, 4, 4)}


def _butterfly(w: Tensor, f: Factors, alpha: float) -> Tensor:  # noqa: ARG001
    value = w
    for i, r in enumerate(_cayley(f["oft_blocks"])):
        q = 2**i * 2
        order = torch.arange(w.shape[0]).reshape(-1, 2, q).transpose(1, 2).reshape(-1)
        rows = value[order].reshape(-1, 4, *w.shape[1:])
        turned = torch.einsum("kij,kj...->ki...", r, rows).reshape(w.shape)
        value = torch.empty_like(turned)
        value[order] = turned
    return value


def _inputs(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"oft_r": n(prod(shape[1:]) // 4, 6)}


def _above(f: Factors) -> Tensor:
    rows, columns = torch.triu_indices(4, 4, 1)
    x = f["oft_r"].new_zeros(f["oft_r"].shape[0], 4, 4)
    x[:, rows, columns] = f["oft_r"]
    return x


def _input_rotated(w: Tensor, f: Factors, alpha: float) -> Tensor:  # noqa: ARG001
    return (w.flatten(1) @ torch.block_diag(*_cayley(_above(f)))).reshape(w.shape)


def _input_series(w: Tensor, f: Factors, alpha: float) -> Tensor:  # noqa: ARG001
    x = _above(f)
    q = x - x.transpose(1, 2)
    eye = torch.eye(4, dtype=q.dtype).expand_as(q)
    r = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return (w.flatten(1) @ torch.block_diag(*r).T).reshape(w.shape)


def _per_row(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"ia3": n(shape[0], 1)}


def _per_column(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"ia3": n(1, shape[1])}


def _multiplied(w: Tensor, f: Factors, alpha: float) -> Tensor:  # noqa: ARG001
    return w * (1 + f["ia3"].reshape(*f["ia3"].shape, *[1] * (w.dim() - 2)))


def _difference(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return {"diff": n(*shape)}


def _added(w: Tensor, f: Factors, alpha: float) -> Tensor:  # noqa: ARG001
    return w + f["diff"]


def _rows_long(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return _lora(shape, n) | {"dora_scale": 1 + n(shape[0], 1).abs()}


def _columns_long(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return _lora(shape, n) | {"dora_scale": 1 + n(1, shape[1]).abs()}


def _row_lengths(w: Tensor, f: Factors, alpha: float) -> Tensor:
    v = _low_rank(w, f, alpha)
    length = v.flatten(1).norm(dim=1)
    return torch.einsum("o...,o->o...", v, f["dora_scale"][:, 0] / length)


def _column_lengths(w: Tensor, f: Factors, alpha: float) -> Tensor:
    v = _low_rank(w, f, alpha)
    length = v.transpose(0, 1).flatten(1).norm(dim=1)
    return torch.einsum("oi...,i->oi...", v, f["dora_scale"][0] / length)


def _loha_long(shape: tuple[int, ...], n: Callable[..., Tensor]) -> Factors:
    return _loha(shape, n) | {"dora_scale": 1 + n(shape[0], 1).abs()}


def _loha_lengths(w: Tensor, f: Factors, alpha: float) -> Tensor:
    v = _hadamard(w, f, alpha)
    return torch.einsum("o...,o->o...", v, f["dora_scale"][:, 0] / v.flatten(1).norm(dim=1))


CASES = {
    "lora": Case(_lora, _low_rank),
    "loha": Case(_loha, _hadamard),
    "lokr, both factors whole": Case(_lokr(True, True), _kronecker, None),
    "lokr, the first whole": Case(_lokr(True, False), _kronecker),
    "lokr, the second whole": Case(_lokr(False, True), _kronecker),
    "lokr, none whole": Case(_lokr(False, False), _kronecker),
    "glora": Case(_glora, _general),
    "oft": Case(_blocks, _rotated, 0.0),
    "oft with a limit": Case(_blocks, _rotated, 2**-6),
    "boft": Case(_butterflies, _butterfly, 0.0),
    "oft of inputs": Case(_inputs, _input_rotated, None),
    "oft of inputs, a series": Case(_inputs, _input_series, None, {"neumann": 5}),
    "ia3 of rows": Case(_per_row, _multiplied, None),
    "ia3 of columns": Case(_per_column, _multiplied, None),
    "a difference": Case(_difference, _added, None),
    "dora of rows": Case(_rows_long, _row_lengths),
    "dora of columns": Case(_columns_long, _column_lengths),
    "dora of a loha": Case(_loha_long, _loha_lengths),
}
WIDE = {  # of 3×3 convolutions alone
    "a core": Case(_tucker, _with_core),
    "loha with cores": Case(_loha_tucker, _hadamard_with_cores),
    "lokr with a core": Case(_lokr_tucker, _kronecker_with_core),
}
MERELY_ADDED = {name for name in (*CASES, *WIDE) if not name.startswith(("oft", "boft", "dora"))}


def random_factors(case: Case, shape: tuple[int, ...], *, seed: int = 0) -> Factors:
    """Return factors in fp32."""
    draw = torch.Generator().manual_seed(seed)
    return case.factors(tuple(shape), lambda *size: 0.3 * torch.randn(*size, generator=draw))


def changed(case: Case, weight: Tensor, factors: Factors) -> Tensor:
    """Return W′ in fp64, at strength 1."""
    return case.after(weight.double(), {n: f.double() for n, f in factors.items()}, case.alpha or 0.0)
