"""What LoRA files of every dialect have in common: canonical factors of every form, and alpha as a fact.

A module `unet.down_blocks.0…to_q` has factors `MODULE.NAME`, of one of the FORMS for its weight and perhaps one for its
bias. Plain LoRA has `lora_down` (rank, in[, k, k]) and `lora_up` (out, rank), and its update is
`alpha / rank · up @ down`. What says something of 1×1 convolutions is a matrix here. Alpha is a fact, left out where
every module's is what it is without one: the rank, and 0 (no limit) for rotations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import isfinite, isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import UsageError
from sdforge.families import Family, families
from sdforge.families.strangers import FAMILIES_HINT, stranger_adapter
from sdforge.formats.layout import Found, Layout
from sdforge.formats.safetensors import Entry, Header, read_number
from sdforge.identity import Json

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

INNER = ("lora_down", "hada_w1_b")  # factors whose second dimension is the weight's
KERNELS = ("lora_mid", "hada_t1", "hada_t2", "lokr_t2", "oft_blocks")  # of four dimensions whatever their last ones are


class Change(NamedTuple):
    """What a form says of the weight it changes: rows, numbers per row (None: any), its own rank (0: none)."""

    out: int | None
    inner: int | None
    rank: int


class Form(NamedTuple):
    """A way to change a weight or a bias.

    needs: of each line, the first alternative whose names are all there; may: what can be there beside them.
    change: shapes of the factors → what they change. Raises ValueError where they do not fit together.
    """

    needs: tuple[tuple[tuple[str, ...], ...], ...]
    may: tuple[str, ...]
    change: Callable[[Shapes], Change]


def _expect(*equal: tuple[Any, Any]) -> None:
    if any(a != b for a, b in equal):
        raise ValueError


def _plain(s: Shapes) -> Change:
    up, down = s["lora_up"], s["lora_down"]
    _expect((len(up), 2), (len(down) in (2, 4), True))
    if "lora_mid" in s:
        mid = s["lora_mid"]
        _expect((mid[:2], (up[1], down[0])), (len(mid), 4), (len(down), 2))
        return Change(up[0], down[1] * prod(mid[2:]), down[0])
    _expect((up[1], down[0]))
    return Change(up[0], prod(down[1:]), down[0])


def _hadamard(s: Shapes) -> Change:
    sides = []
    for i in "12":
        a, b = s[f"hada_w{i}_a"], s[f"hada_w{i}_b"]
        _expect((len(a), 2), (len(b), 2))
        if "hada_t1" in s or "hada_t2" in s:
            t = s.get(f"hada_t{i}", ())
            _expect((len(t), 4), (t[:2], (a[0], b[0])))
            sides.append(Change(a[1], b[1] * prod(t[2:]), b[0]))
        else:
            _expect((a[1], b[0]))
            sides.append(Change(a[0], b[1], b[0]))
    _expect((sides[0], sides[1]))
    return sides[0]


def _kronecker(s: Shapes) -> Change:
    first, rank = s.get("lokr_w1", ()), 0
    if not first:
        a, b = s["lokr_w1_a"], s["lokr_w1_b"]
        _expect((len(a), 2), (a[1:], b[:1]))
        first, rank = (a[0], b[1]), b[0]
    second = s.get("lokr_w2", ())
    if not second:
        a, b = s["lokr_w2_a"], s["lokr_w2_b"]
        rank = b[0]
        if "lokr_t2" in s:
            t = s["lokr_t2"]
            _expect((len(t), 4), (t[:2], (a[0], b[0])))
            second = (a[1], b[1], *t[2:])
        else:
            _expect((len(a), 2), (a[1:], b[:1]))
            second = (a[0], b[1])
    _expect((len(first), 2), (len(second) in (2, 4), True))
    return Change(first[0] * second[0], first[1] * prod(second[1:]), rank)


def _general(s: Shapes) -> Change:
    a1, a2, b1, b2 = (s[name] for name in ("a1", "a2", "b1", "b2"))
    _expect((len(a1), 2), (a2, (a1[1], a1[0])), (len(b1), 2), (b1[1], b2[0]), (b2[1], a1[0]), (a2[0], b2[0]))
    return Change(b1[0], prod(b2[1:]), b2[0])


def _rotation(s: Shapes) -> Change:
    blocks = s["oft_blocks"]
    _expect((len(blocks) in (3, 4), True), (blocks[-1], blocks[-2]))
    out = blocks[-3] * blocks[-2]
    _expect((s.get("rescale", (out, 1)), (out, 1)))
    return Change(out, None, 0)


def _turned_input(s: Shapes) -> Change:
    blocks, numbers = s["oft_r"]
    edge = block_edge(numbers)
    return Change(None, blocks * edge if blocks > 1 else None, 0)


def _scaled(s: Shapes) -> Change:
    rows, columns = s["ia3"]
    _expect((1 in (rows, columns), True))
    return Change(rows if columns == 1 else None, None, 0)


def _whole(name: str) -> Callable[[Shapes], Change]:
    return lambda s: Change(s[name][0] if s[name] else 1, prod(s[name][1:]), 0)


def _needs(*names: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(((name,),) for name in names)


FORMS = {
    "lora": Form(_needs("lora_down", "lora_up"), ("lora_mid", "dora_scale"), _plain),
    "loha": Form(
        _needs("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", "dora_scale"), _hadamard
    ),
    "lokr": Form(
        ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
        ("lokr_t2", "dora_scale"),
        _kronecker,
    ),
    "glora": Form(_needs("a1", "a2", "b1", "b2"), (), _general),
    "oft": Form(_needs("oft_blocks"), ("rescale",), _rotation),
    "oft_input": Form(_needs("oft_r"), (), _turned_input),
    "ia3": Form(_needs("ia3"), (), _scaled),
    "diff": Form(_needs("diff"), (), _whole("diff")),
    "w_norm": Form(_needs("w_norm"), (), _whole("w_norm")),
}
BIASES = {name: Form(_needs(name), (), _whole(name)) for name in ("diff_b", "b_norm")}
FACTORS = {
    n for f in (*FORMS.values(), *BIASES.values()) for line in (*f.needs, (f.may,)) for names in line for n in names
}


class Part(NamedTuple):
    """One change of an artifact: a form's factors, and the weight (`component`, `path.weight`) they belong to."""

    form: str
    component: str
    weight: str
    factors: tuple[str, ...]


def block_edge(numbers: int) -> int:
    """Return the edge b of skew matrices of which b(b−1)/2 numbers are kept. Raises ValueError if there is none."""
    edge = (1 + isqrt(1 + 8 * numbers)) // 2
    if edge * (edge - 1) // 2 != numbers:
        raise ValueError
    return edge


def parts_of(module: str, factors: Collection[str]) -> list[Part]:
    """Return what the factors of one module are. Raises ValueError where they are of no form, or of two."""
    component, _, path = module.partition(".")
    found, left = [], set(factors)
    for forms, kind in ((FORMS, "weight"), (BIASES, "bias")):
        for name, form in forms.items():
            needed = [next((a for a in line if set(a) <= left), None) for line in form.needs]
            if None in needed:
                continue
            own = [n for alternative in needed if alternative for n in alternative]
            own += [n for n in form.may if n in left]
            found.append(Part(name, component, f"{path}.{kind}", tuple(own)))
            left -= set(own)
    places = [part.weight for part in found]
    if left or len(set(places)) < len(places) or not found:
        raise ValueError(", ".join(sorted(left or factors)))
    return found


def change_of(part: Part, shapes: Shapes) -> Change:
    """Return what a part changes; shapes: of its factors. Raises ValueError where they do not fit together."""
    try:
        return (FORMS | BIASES)[part.form].change(shapes)
    except (IndexError, KeyError, TypeError):
        raise ValueError from None


def refuse_stranger(path: Path, names: Iterable[str]) -> None:
    """Refuse a LoRA by the name of its architecture, where it is none of ours but known. Raises UsageError."""
    if other := stranger_adapter(names):
        raise UsageError(f"{path} is a LoRA for {other}, which cannot be used here", hint=FAMILIES_HINT)


def family_with(modules: Iterable[str]) -> Family | None:
    """Return the family that has all these modules (`component.path`), or None."""
    wanted = set(modules)
    return next((each for each in families() if wanted <= each.modules() | each.norms()), None)


def lora_layout(
    path: Path, found: Family, entries: dict[str, dict[str, Entry]], alphas: dict[str, float], version: str = ""
) -> Layout:
    """Return the layout of a LoRA file. Raises UsageError for factors that do not belong together.

    entries: canonical module → factor → where it lies; alphas: what is stated of some modules; version: what kohya's
    scripts state of the checkpoint.
    """
    layout = Layout("lora", "", [path])
    stated, neutral = {}, {}
    for module, factors in entries.items():
        if empty := next((name for name, entry in factors.items() if 0 in entry.shape), ""):
            raise UsageError(
                f"{path} has a factor of {module} without numbers: {empty} {list(factors[empty].shape)}",
                hint="a LoRA of rank 0 changes nothing: take it out, or write the file anew",
            )
        shapes = {name: canonical_shape(name, entry.shape) for name, entry in factors.items()}
        try:
            parts = parts_of(module, factors)
            changes = [(part, change_of(part, {n: shapes[n] for n in part.factors})) for part in parts]
        except ValueError as error:
            what = f": {error}" if str(error) else ""
            raise UsageError(f"{path} has factors for {module} that do not fit together{what}") from None
        for name, entry in factors.items():
            layout.tensors.append(Found("lora", f"{module}.{name}", entry.dtype, shapes[name], 0, entry.offset))
        for part, change in changes:
            if has_alpha(part.form, change):
                stated[module], neutral[module] = alphas.get(module, float(change.rank)), change.rank
        if module in alphas and module not in stated:
            layout.passed["alphas of what has no rank"] += 1
    layout.family = _meant(found, entries, version)
    layout.facts |= alpha_fact(stated, neutral)
    contexts = {
        entry.shape[1]
        for module, factors in entries.items()
        if module.endswith(("attn2.to_k", "attn2.to_v")) and module.startswith("unet.")
        for name, entry in factors.items()
        if name in INNER
    }
    layout.notes["widths"] = {"context": contexts.pop()} if len(contexts) == 1 else {}
    if rank := max(neutral.values(), default=0):
        layout.notes["rank"] = rank
    return layout


def _meant(found: Family, entries: dict[str, dict[str, Entry]], version: str) -> str:
    """Return the family that a LoRA is for, or nothing where several have all its modules and nothing tells which."""
    fits = [each for each in families() if entries.keys() <= each.modules() | each.norms()]
    downs = {m: factors[name] for m, factors in entries.items() for name in INNER if name in factors}
    contexts = {entry.shape[1] for m, entry in downs.items() if m.endswith(("attn2.to_k", "attn2.to_v"))}
    fits = [each for each in fits if {each.context} == contexts] or fits
    fits = [each for each in fits if version in (each.kohya_version, each.kohya_version_v)] or fits
    # factors have four dimensions around attention where the scripts that train hold those layers as convolutions,
    # as they did of families that have matrices there: this is asked last
    plain = {m: factors["lora_down"] for m, factors in entries.items() if "lora_down" in factors}
    around = {m: len(entry.shape) == 4 for m, entry in plain.items() if m.endswith((".proj_in", ".proj_out"))}
    fits = [each for each in fits if all(each.is_conv(m) == conv for m, conv in around.items())] or fits or [found]
    # a family that takes another's LoRAs leaves the name to that one
    names = [each.name for each in fits if not {other.name for other in fits} & set(each.adapters_of)]
    return names[0] if len(names) == 1 else ""


def canonical_shape(factor: str, shape: Shape) -> Shape:
    """Return the shape of a factor without what a 1×1 convolution adds to it."""
    if factor == "dora_scale" or factor == "rescale":
        return (shape[0], 1) if len(shape) == 1 else shape[:2] if set(shape[2:]) <= {1} else shape
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) and factor not in KERNELS else shape


def has_alpha(form: str, change: Change) -> bool:
    """Say whether alpha means something: a scale over the rank, or the limit of a rotation."""
    return change.rank > 0 or form == "oft"


def alpha_fact(alphas: dict[str, float], neutral: dict[str, int]) -> dict[str, Json]:
    """Return the fact `alpha`: nothing where it is neutral, a number where it is one for all, else module → number."""
    if all(alphas[module] == neutral[module] for module in alphas):
        return {}
    values = set(alphas.values())
    return {"alpha": values.pop() if len(values) == 1 else dict(alphas)}


def alpha_of(facts: dict[str, Json], module: str, neutral: int) -> float:
    """Return a module's alpha from the facts of its LoRA; neutral: its rank, or 0 for a rotation."""
    alpha: Any = facts.get("alpha", neutral)
    return float(alpha[module] if isinstance(alpha, dict) else alpha)


def read_scalar(path: Path, header: Header, entry: Entry) -> float:
    """Read a tensor of one element of a source. Raises UsageError for types that hold no plain number."""
    alpha = read_number(header, entry.dtype, entry.offset) if prod(entry.shape) == 1 else None
    if alpha is None or not isfinite(alpha):
        raise UsageError(f"{path} states an alpha that is no number")
    return alpha
