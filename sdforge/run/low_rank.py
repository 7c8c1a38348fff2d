"""Matrices as products of two thin ones: LoRAs extracted from checkpoints, and LoRAs of fewer ranks.

By Eckart and Young (1936, doi 10.1007/BF02288367) the best matrix of rank r is the first r terms of the singular value
decomposition. Everything is fp64, on one fingerprint the same bits. Nothing is clamped and nothing that is small is
left out: kohya's quantile of 0.99 makes an exact delta of rank 8 wrong by 11.7 %, its least difference skips text
encoders.

Letters in names: O rows, F columns (with the kernel, flattened), R rank, N singular values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdforge.dtypes import SAFETENSORS
from sdforge.edits.bake.forms import ADDITIVE
from sdforge.errors import ActionFailed, ResourceError
from sdforge.exact import runs
from sdforge.families import Family
from sdforge.formats.kohya import KERNELS
from sdforge.formats.lora import Part, alpha_fact, alpha_of, change_of, has_alpha, parts_of
from sdforge.order import Given, Order, Outcome
from sdforge.ref import Ref
from sdforge.run.fingerprint import fingerprint
from sdforge.run.sketch import sketch
from sdforge.run.states import Stopped, Table, load_state, save_state
from sdforge.run.tensors import DTYPES, NAMES, Aside, finite, load, raw, rounded, write_pack

Report = Callable[..., None]
HasToStop = Callable[[], bool]
Job = TypeVar("Job")
NONE = 1e-6  # a singular value below this share of the largest one counts as none: the roots of a Gram matrix's noise
NONE_OF_FACTORS = 1e-12  # the same where no Gram matrix is needed
WORST = 8  # modules that the log names
NOTES = ("alphas", "ranks", "shares", "left")  # of a LoRA in the making, what is kept beside its tensors
RELATIVE = ("glora", "ia3")  # forms that multiply the weight
AWAY = "bake it into its checkpoint, and `extract` the difference"


class Spectrum(NamedTuple):
    """U diag(σ) Vᵀ with σ from large to small, numbers of no meaning left out."""

    left_ON: Tensor
    values_N: Tensor
    right_NF: Tensor


class Kept(NamedTuple):
    """What is left of a matrix. residual, whole: squared Frobenius norms, of what was dropped and of the matrix."""

    up_OR: Tensor
    down_RF: Tensor
    residual: float
    whole: float


def of_matrix(matrix_OF: Tensor) -> Spectrum:
    """Decompose a matrix by the eigenvectors of its smaller Gram matrix.

    The other side is the matrix's own image of them, so the product is a projection of it, exact to fp64, whatever the
    eigenvalues' errors. For 1280 columns it takes a quarter of the time of the full decomposition, and less where the
    other side is longer.
    """
    matrix = matrix_OF.double()
    if matrix.shape[0] > matrix.shape[1]:
        return _turned(of_matrix(matrix.T))
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)
    values = squares.flip(0).clamp_min(0).sqrt()
    left, values = _meaningful(left, values, NONE)
    return _signed(Spectrum(left, values, (left.T @ matrix).div_(values[:, None])))


def of_product(up_OR: Tensor, down_RF: Tensor) -> Spectrum:
    """Decompose up @ down without forming it: Q₁ (R₁ R₂ᵀ) Q₂ᵀ, of which only the middle, R × R, is decomposed."""
    q1, r1 = torch.linalg.qr(up_OR.double())
    q2, r2 = torch.linalg.qr(down_RF.double().T)
    left, values, right = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    left, values = _meaningful(left, values, NONE_OF_FACTORS)
    return _signed(Spectrum(q1 @ left, values, right[: len(values)] @ q2.T))


def _meaningful(left: Tensor, values: Tensor, none: float) -> tuple[Tensor, Tensor]:
    count = int((values > none * values[:1]).sum())
    return left[:, :count], values[:count]


def _turned(found: Spectrum) -> Spectrum:
    return Spectrum(found.right_NF.T, found.values_N, found.left_ON.T)


def _signed(found: Spectrum) -> Spectrum:
    """Choose of ±u the one whose largest number is positive, so that machines that agree otherwise agree in this."""
    largest = found.left_ON.abs().argmax(0, keepdim=True)
    signs = found.left_ON.gather(0, largest).squeeze(0).sign()
    return Spectrum(found.left_ON.mul_(signs), found.values_N, found.right_NF.mul_(signs[:, None]))


def rank_of(values_N: Tensor, settings: dict[str, Any], most: int) -> int:
    """Return how many singular values are kept: the least that any of the settings asks for.

    settings: energy, relative_threshold, threshold; most: the largest rank, 0: any.
    """
    kept = len(values_N)
    if most:
        kept = min(kept, most)
    kept = min(kept, int((values_N >= settings["threshold"]).sum()))
    kept = min(kept, int((values_N >= settings["relative_threshold"] * values_N[:1]).sum()))
    if settings["energy"] < 1:
        shares = values_N.square().cumsum(0) / values_N.square().sum()
        kept = min(kept, int((shares < settings["energy"]).sum()) + 1)
    return kept


def truncated(found: Spectrum, rank: int) -> Kept:
    """Return U_R √σ and √σ V_Rᵀ: both factors of one size, so that neither leaves what 16 bits can say."""
    roots = found.values_N[:rank].sqrt()
    squares = found.values_N.square()
    return Kept(
        found.left_ON[:, :rank] * roots,
        found.right_NF[:rank] * roots[:, None],
        float(squares[rank:].sum()),
        float(squares.sum()),
    )


class _Making:
    """A LoRA in the making: its factors, and what to say of them. It is kept now and then, to go on from there.

    shares: module → squared norms of what was dropped and of all; left: tensor that no LoRA has → its squared norm.
    """

    def __init__(self, order: Order, dtype: torch.dtype) -> None:
        self.order, self.settings, self.dtype = order, order.settings, dtype
        self.device = torch.device(order.how.get("device", "cpu"))
        self.aside = Aside(Path(order.work))
        self.tensors: dict[str, Tensor] = {}
        self.alphas: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.shares: dict[str, tuple[float, float]] = {}
        self.left: dict[str, float] = {}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """On what it is computed."""
        return fingerprint(self.device)

    def each(self, jobs: Sequence[Job], report: Report, stopped: HasToStop) -> Iterator[Job]:
        """Yield what is still to be done, in order. Raises Stopped, after keeping what was made."""
        done, kept = self._resume(len(jobs), report), time.monotonic()
        minutes = float(self.order.how.get("states", {}).get("minutes", 1.0))
        for number, job in enumerate(jobs[done:], done):
            if stopped():
                if number > done:
                    self._save(number)
                raise Stopped
            if number > done and time.monotonic() - kept >= 60 * minutes:
                try:
                    self._save(number)
                except ResourceError as error:  # the result may have room where a copy of what is made has none
                    report(remark=f"{error.message}; it goes on without")
                kept = time.monotonic()
            yield job
            report(step=number + 1, steps=len(jobs))

    def _save(self, done: int) -> None:
        if not self.order.states:
            return
        rows: Table = {name: (NAMES[each.dtype], tuple(each.shape), raw(each)) for name, each in self.tensors.items()}
        notes = {name: getattr(self, name) for name in NOTES}
        notes |= {"names": list(rows), "fingerprint": self.fingerprint}
        save_state(Path(self.order.states), done, rows, notes)

    def _resume(self, most: int, report: Report) -> int:
        """Take what was kept; return how many jobs that was. Another machine or version would round otherwise."""
        state = load_state(Path(self.order.states), most) if self.order.states else None
        if state is None or state.notes["fingerprint"] != self.fingerprint:
            return 0
        for name in state.notes["names"]:
            dtype, shape, data = state.tensors[name]
            self.tensors[name] = self.aside.put(torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape))
        for name in NOTES:
            getattr(self, name).update(state.notes[name])
        report(resumed=state.step, same=True)
        return state.step

    def most(self, module: str) -> int | None:
        """Return the largest rank of a module's factors, 0 for any; None for one that is left out."""
        conv = self.settings["conv_rank"]
        if not f"{module}.weight".endswith(KERNELS) or conv is None:
            return int(self.settings["rank"])
        return int(conv) or None

    def reduce(self, module: str, found: Spectrum, most: int, columns: tuple[int, ...]) -> None:
        """Keep the factors of a module; columns: the weight's shape behind its rows."""
        kept = truncated(found, rank_of(found.values_N, self.settings, most))
        self.shares[module] = kept.residual, kept.whole
        if rank := kept.up_OR.shape[1]:
            self.keep(module, kept.up_OR, kept.down_RF.reshape(rank, *columns), float(rank))

    def keep(self, module: str, up_OR: Tensor, down: Tensor, alpha: float) -> None:
        """Keep factors as they are; down: (rank, …)."""
        self.whole(f"{module}.lora_up", up_OR)
        self.whole(f"{module}.lora_down", down)
        self.alphas[module], self.ranks[module] = alpha, down.shape[0]

    def whole(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor in the type of the result. Raises ActionFailed for NaN, Inf and overflow."""
        self.tensors[name] = self.aside.put(rounded(name, tensor.cpu().contiguous(), self.dtype))

    def outcome(self, record: dict[str, Any]) -> Outcome:
        """Write all of it. Raises ActionFailed where nothing is left."""
        if not self.tensors and self.shares and not any(whole for _, whole in self.shares.values()):
            raise ActionFailed("all its updates are zero: it changes nothing", hint="leave it out")
        if not self.tensors:
            raise ActionFailed("nothing is left of it", hint="a larger rank or energy, or a smaller threshold")
        outcome = write_pack(Path(self.order.work), {"lora": self.tensors})
        outcome.facts = alpha_fact(self.alphas, self.ranks)
        outcome.grade, outcome.fingerprint = "B", self.fingerprint
        lines, norm = sketch(self._updates())
        dropped, whole = (sum(column) for column in zip(*self.shares.values(), strict=True)) if self.shares else (0, 0)
        residual = (dropped / whole) ** 0.5 if whole else 0.0
        outcome.record = {"sketch": lines, "norm": norm, "residual": residual, **record}
        self._say(residual)
        return outcome

    def _updates(self) -> Iterator[tuple[str, Callable[[], Tensor], Tensor | None]]:
        for module, rank in self.ranks.items():
            up, down = self.tensors[f"{module}.lora_up"], self.tensors[f"{module}.lora_down"]
            yield module, partial(_widened, up, self.alphas[module] / rank), down.reshape(rank, -1)
        for name, tensor in self.tensors.items():
            if not name.endswith((".lora_up", ".lora_down")):
                yield name, partial(tensor.reshape, len(tensor), -1), None

    def _say(self, residual: float) -> None:
        """Write into the log what was kept, and of which modules least."""
        ranks = sorted(self.ranks.values())
        if ranks:
            print(f"{len(ranks)} modules of rank {ranks[0]} to {ranks[-1]}; {residual:.2%} of the norm is left out")
        far = {m: (dropped / whole) ** 0.5 for m, (dropped, whole) in self.shares.items() if dropped}
        for module in sorted(far, key=lambda each: (-far[each], each))[:WORST]:
            print(f"  {far[module]:7.2%} of {module} at rank {self.ranks.get(module, 0)}")


def _widened(tensor: Tensor, scale: float) -> Tensor:
    return tensor.double() * scale


# -- a LoRA of fewer ranks ---------------------------------------------------------------------------------------------


@torch.no_grad()
def resize(order: Order, report: Report, stopped: HasToStop) -> Outcome:
    """Resize the LoRA of an order. Raises ActionFailed for forms that say nothing without their checkpoint."""
    lora = order.the("lora")
    making = _Making(order, _stated(order, next(ref.dtype for ref in lora.components["lora"])))
    for module, refs in making.each(list(_modules(lora).items()), report, stopped):
        for part in parts_of(module, refs):
            _resize(making, module, part, {name: refs[name] for name in part.factors}, lora.facts)
    return making.outcome({})


def _modules(lora: Given) -> dict[str, dict[str, Ref]]:
    """Return module → factor → where it lies."""
    refs = sorted(lora.components["lora"], key=lambda ref: ref.name)
    split = ((*ref.name.rpartition(".")[::2], ref) for ref in refs)
    return {module: {name: ref for _, name, ref in same} for module, same in groupby(sorted(split), lambda row: row[0])}


def _resize(making: _Making, module: str, part: Part, refs: dict[str, Ref], facts: dict[str, Any]) -> None:
    if part.form not in ADDITIVE or part.form in RELATIVE or "dora_scale" in refs:
        name = "dora" if "dora_scale" in refs else part.form
        raise ActionFailed(f"{module} is a {name}, which says nothing without the weight that it changes", hint=AWAY)
    factors = {name: _taken(f"{module}.{name}", ref).to(making.device) for name, ref in refs.items()}
    if part.form not in ("lora", "loha", "lokr") and (part.form != "diff" or factors["diff"].dim() < 2):
        ((name, difference),) = factors.items()
        making.whole(f"{module}.{name}", difference)
        return
    most = making.most(module)
    if most is None:
        return
    change = change_of(part, {name: ref.shape for name, ref in refs.items()})
    alpha = alpha_of(facts, module, change.rank) if has_alpha(part.form, change) else 1.0
    scale = alpha / (change.rank or 1)
    if part.form == "lora" and "lora_mid" not in factors:
        up, down = factors["lora_up"], factors["lora_down"]
        found = of_product(up.double() * scale, down.reshape(len(down), -1))
        if rank_of(found.values_N, making.settings, most) < len(down):
            making.reduce(module, found, most, tuple(down.shape[1:]))
        else:  # nothing is dropped, so nothing is computed: it stays as exact as it is
            making.shares[module] = 0.0, float(found.values_N.square().sum())
            making.keep(module, up, down, alpha)
        return
    matrix = _change(part, factors, scale)
    making.reduce(module, of_matrix(matrix.reshape(len(matrix), -1)), most, _columns(module, matrix))


def _change(part: Part, factors: dict[str, Tensor], scale: float) -> Tensor:
    """Return the update that factors say, in fp64, of which nothing else is held afterwards."""
    doubled = {name: factor.double() for name, factor in factors.items()}
    return ADDITIVE[part.form](doubled[part.factors[0]], doubled, True).mul_(scale)


def _columns(module: str, matrix: Tensor) -> tuple[int, ...]:
    """Return the weight's shape behind its rows; of what is kept flat only convolutions of 3×3 have a kernel."""
    flat = matrix.dim() == 2 and f"{module}.weight".endswith(KERNELS)
    columns = (matrix.shape[1] // 9, 3, 3) if flat else tuple(matrix.shape[1:])
    return columns[:1] if columns[1:] == (1, 1) else columns


# -- a LoRA from two checkpoints ---------------------------------------------------------------------------------------


@torch.no_grad()
def extract(order: Order, report: Report, stopped: HasToStop) -> Outcome:
    """Extract the LoRA of an order. Raises ActionFailed for checkpoints that do not fit, or do not differ."""
    tuned, base = order.the("tuned"), order.the("base")
    making = _Making(order, _stated(order, next(ref.dtype for refs in tuned.components.values() for ref in refs)))
    pairs, left = list(_pairs(order.architecture, tuned, base, order.settings["components"])), making.left
    for name, *both in making.each(pairs, report, stopped):
        if squares := _extract(making, order.architecture, name, _difference(name, *both).to(making.device)):
            left[name] = squares
    if not (making.shares or making.tensors or left):
        raise ActionFailed("the two checkpoints are the same in what a LoRA can change", hint="is it the right base?")
    if not (making.shares or making.tensors):
        hint = "biases = true keeps differences of biases and norms; no LoRA has those of token tables"
        raise ActionFailed(f"the two checkpoints differ in {min(left)} and its like alone", hint=hint)
    if left:
        share = (sum(left.values()) / (sum(left.values()) + sum(whole for _, whole in making.shares.values()))) ** 0.5
        print(f"{len(left)} tensors beside the factors are left out, {share:.2%} of the norm: {min(left)}, …")
    return making.outcome({"left": {name: square**0.5 for name, square in sorted(left.items())}})


def _pairs(family: Family, tuned: Given, base: Given, components: list[str]) -> Iterator[tuple[str, Ref, Ref]]:
    """Yield `component.name` and both tensors, where those differ."""
    for component in family.kohya_prefix:
        if components and component not in components:
            continue
        theirs = {ref.name: ref for ref in base.components.get(component, [])}
        ours = {ref.name: ref for ref in tuned.components.get(component, [])}
        if lost := sorted(set(ours) ^ set(theirs)):
            one = "the base" if lost[0] in ours else "the tuned checkpoint"
            raise ActionFailed(f"{one} has no {component}.{lost[0]}", hint="swap the part that one of them lacks")
        for name, ref in sorted(ours.items()):
            if (ref.xxh3, ref.dtype) != (theirs[name].xxh3, theirs[name].dtype):
                if ref.shape != theirs[name].shape:
                    shapes = f"{list(ref.shape)} and {list(theirs[name].shape)}"
                    hint = 'they are of other widths, or have other words: components = ["unet"] leaves words alone'
                    raise ActionFailed(f"{component}.{name} is {shapes}", hint=hint)
                yield f"{component}.{name}", ref, theirs[name]


def _difference(name: str, ours: Ref, theirs: Ref) -> Tensor:
    """Return ours − theirs in fp64: no other tensor of its size is made. Raises ActionFailed for NaN and Inf."""
    difference = _taken(name, ours).double()
    for mine, other in runs(difference, _taken(name, theirs)):
        mine.sub_(other)
    return difference


def _extract(making: _Making, family: Family, name: str, difference: Tensor) -> float:
    """Keep what a LoRA can say of a difference; return the sum of its squares where it can say nothing, 0 otherwise."""
    if not bool(difference.any()):
        return 0.0
    module, _, kind = name.rpartition(".")
    matrix, norm = module in family.modules(), module in family.norms()
    if kind == "weight" and matrix:
        most = making.most(module)
        if most is not None:
            found = of_matrix(difference.reshape(len(difference), -1))
            making.reduce(module, found, most, _columns(module, difference))
            return 0.0
    elif making.settings["biases"] and (matrix or norm):
        making.whole(f"{module}.{'diff_b' if matrix else 'w_norm' if kind == 'weight' else 'b_norm'}", difference)
        return 0.0
    return float(difference.square_().sum())


def _taken(name: str, ref: Ref) -> Tensor:
    """Return a tensor from its file. Raises ActionFailed for NaN and Inf."""
    tensor = load(ref)
    if not finite(tensor):
        raise ActionFailed(f"{name} holds NaN or Inf", hint="the file is broken: take another copy of it")
    return tensor


def _stated(order: Order, first: str) -> torch.dtype:
    """Return the type of the result: as stated, or that of the first input, but no fewer than 16 bits."""
    stated = order.settings["dtype"]
    dtype = DTYPES[SAFETENSORS[stated] if stated else first]
    return torch.float16 if dtype.itemsize < 2 else dtype
