"""Lists of block weights as merge programs write them: what their places mean, and the lists that have a name.

A list names the blocks of a U-Net from input to output, IN00 …, M00, OUT00 …, usually with BASE before them, which is
the text encoders. It is spelled out in the plan, so that a tensor's name never depends on how its weight was written.
Lengths and places: SuperMerger (26, 25; SDXL 20, 19) and sd-webui-lora-block-weight (17; SDXL 12: the blocks with
attention). Presets: those of sdweb-merge-block-weighted-gui and meh, from their formulas, and of lora-block-weight.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal, TypeAlias

from sdforge.errors import SettingErrors
from sdforge.exact import CONTEXT, half_turn, sine
from sdforge.families import Family

Place: TypeAlias = tuple[str, str]  # component, block ("" where a component has none)
Preset = Literal[
    "",
    "GRAD_V",
    "GRAD_A",
    "FLAT_25",
    "FLAT_75",
    "WRAP08",
    "WRAP12",
    "WRAP14",
    "WRAP16",
    "MID12_50",
    "OUT07",
    "OUT12",
    "OUT12_5",
    "RING08_SOFT",
    "RING08_5",
    "RING10_5",
    "RING10_3",
    "SMOOTHSTEP",
    "REVERSE_SMOOTHSTEP",
    "SMOOTHSTEP*2",
    "R_SMOOTHSTEP*2",
    "SMOOTHSTEP*3",
    "R_SMOOTHSTEP*3",
    "SMOOTHSTEP*4",
    "R_SMOOTHSTEP*4",
    "SMOOTHSTEP/2",
    "R_SMOOTHSTEP/2",
    "SMOOTHSTEP/3",
    "R_SMOOTHSTEP/3",
    "SMOOTHSTEP/4",
    "R_SMOOTHSTEP/4",
    "2SMOOTHSTEP",
    "2R_SMOOTHSTEP",
    "3SMOOTHSTEP",
    "3R_SMOOTHSTEP",
    "4SMOOTHSTEP",
    "4R_SMOOTHSTEP",
    "HALF_SMOOTHSTEP",
    "HALF_R_SMOOTHSTEP",
    "ONE_THIRD_SMOOTHSTEP",
    "ONE_THIRD_R_SMOOTHSTEP",
    "ONE_FOURTH_SMOOTHSTEP",
    "ONE_FOURTH_R_SMOOTHSTEP",
    "COSINE",
    "REVERSE_COSINE",
    "TRUE_CUBIC_HERMITE",
    "TRUE_REVERSE_CUBIC_HERMITE",
    "FAKE_CUBIC_HERMITE",
    "FAKE_REVERSE_CUBIC_HERMITE",
    "ALL_A",
    "ALL_B",
]
LoraPreset = Literal[
    "",
    "NONE",
    "ALL",
    "ALL0.5",
    "INS",
    "IND",
    "INALL",
    "MIDALL",
    "MIDD",
    "MIDD0.2",
    "MIDD0.8",
    "OUTD",
    "OUTS",
    "OUTALL",
    "MOUT",
]
DIGITS = 10  # to which presets are published


def spelled_out(values: list[float], family: Family) -> dict[Place, float]:
    """Return what a list says of text encoders and of the U-Net's blocks.

    A list of the blocks with attention gives 0 to the others. Raises SettingErrors for a length that the family has no
    list of.
    """
    blocks, attended = _blocks(family), _attended(family)
    lists = {len(blocks) + 1: ["BASE", *blocks], len(blocks): blocks, len(attended) + 1: ["BASE", *attended]}
    if len(values) not in lists:
        first, last = _caption(blocks[0]), _caption(blocks[-1])
        message = f"a list of {len(values)} block weights means nothing in {family.title}"
        hint = (
            f"{len(blocks) + 1}: BASE, {first} … M00 … {last}; {len(blocks)}: without BASE; "
            f"{len(attended) + 1}: BASE and the blocks with attention, {' '.join(map(_caption, attended))}"
        )
        raise SettingErrors([("mbw", message, hint)])
    given = dict(zip(lists[len(values)], values, strict=True))
    found = {("unet", block): given.get(block, 0.0) for block in blocks}
    return found | ({(name, ""): given["BASE"] for name in _encoders(family)} if "BASE" in given else {})


def of_whole_unet(weights: dict[Place, float], family: Family) -> dict[Place, float]:
    """Add what lists do not name: time and label embedding go with IN00, the output with the last OUT (SuperMerger)."""
    blocks = _blocks(family)
    beside = {"time": blocks[0], "label": blocks[0], "out": blocks[-1]}
    there = {name.block for name in family.names() if name.component == "unet"}
    return weights | {("unet", block): weights["unet", as_] for block, as_ in beside.items() if block in there}


def preset(name: str, family: Family) -> dict[Place, float]:
    """Return a merge's preset, block by block; a family with fewer blocks leaves out those it does not have."""
    t = dict(zip(_names(12), [Fraction(i, 24) for i in range(25)], strict=True))
    found: dict[Place, float] = {
        ("unet", block): round(float(CURVES[name](t[block])), DIGITS) for block in _blocks(family)
    }
    return found | {(encoder, ""): float(name == "ALL_B") for encoder in _encoders(family)}


def lora_preset(name: str, family: Family) -> dict[Place, float]:
    """Return a LoRA's preset, block by block: where it names blocks, text encoders have 1 and other blocks 0."""
    base = LORA_WHOLE.get(name, 1.0)
    chosen = dict.fromkeys(_blocks(family), base) if name in LORA_WHOLE else LORA_BLOCKS[name]
    found: dict[Place, float] = {("unet", block): chosen.get(block, 0.0) for block in _blocks(family)}
    return found | {(encoder, ""): base for encoder in _encoders(family)}


def _names(levels: int) -> list[str]:
    return [*(f"in{i:02}" for i in range(levels)), "mid", *(f"out{i:02}" for i in range(levels))]


def _blocks(family: Family) -> list[str]:
    """Return the blocks that lists name, in their order."""
    there = {name.block for name in family.names() if name.component == "unet"}
    return [block for block in _names(12) if block in there]


def _attended(family: Family) -> list[str]:
    there = {name.block for name in family.names() if name.component == "unet" and ".attentions." in name.canonical}
    return [block for block in _names(12) if block in there]


def _encoders(family: Family) -> list[str]:
    return [component for component in family.networks if component not in ("unet", "vae")]


def _caption(block: str) -> str:
    return "M00" if block == "mid" else block.upper()


# -- curves over t = 0 (IN00) … 1/2 (M00) … 1 (OUT11) ------------------------------------------------------------------

Curve: TypeAlias = Callable[[Fraction], "Fraction | float"]


def _smooth(x: Fraction) -> Fraction:
    return 3 * x**2 - 2 * x**3


def _wave(x: Fraction) -> Fraction:
    """Rise from 0 to 1 and fall back, again and again."""
    return abs((x + 1) % 2 - 1)


def _cosine(t: Fraction) -> float:
    from decimal import Decimal, localcontext

    with localcontext(CONTEXT):
        turned = half_turn() * (Decimal(1) / 2 - Decimal(t.numerator) / t.denominator)
        return float((1 + sine(turned)) / 2)


def _true_hermite(t: Fraction) -> Fraction:
    return Fraction(77, 12) * t**3 - Fraction(77, 8) * t**2 + Fraction(25, 6) * t + Fraction(1, 24) if t else t


def _fake_hermite(t: Fraction) -> Fraction:
    return Fraction(19, 3) * t**3 - Fraction(19, 2) * t**2 + Fraction(25, 6) * t


def _reverse(curve: Curve) -> Curve:
    return lambda t: 1 - curve(t)


def _times(k: int) -> Curve:
    return lambda t: _wave(k * _smooth(t))


def _over(k: int) -> Curve:
    return lambda t: _smooth(_wave(k * t))


def _flat(value: float) -> Curve:
    return lambda _: value


def _where(**levels: str) -> Curve:
    """Return a curve that is 1, or half, in some blocks, and 0 elsewhere."""
    heights = {block: {"one": 1.0, "half": 0.5}[height] for height, text in levels.items() for block in text.split()}
    at = dict(zip([Fraction(i, 24) for i in range(25)], _names(12), strict=True))
    return lambda t: heights.get(at[t], 0.0)


def _run(start: str, end: str) -> str:
    names = _names(12)
    return " ".join(names[names.index(start) : names.index(end) + 1])


PARTS = {"HALF": 2, "ONE_THIRD": 3, "ONE_FOURTH": 4}
CURVES: dict[str, Curve] = {
    "GRAD_V": lambda t: abs(1 - 2 * t),
    "GRAD_A": lambda t: 1 - abs(1 - 2 * t),
    "FLAT_25": _flat(0.25),
    "FLAT_75": _flat(0.75),
    "WRAP08": _where(one=f"{_run('in00', 'in03')} {_run('out08', 'out11')}"),
    "WRAP12": _where(one=f"{_run('in00', 'in05')} {_run('out06', 'out11')}"),
    "WRAP14": _where(one=f"{_run('in00', 'in06')} {_run('out05', 'out11')}"),
    "WRAP16": _where(one=f"{_run('in00', 'in07')} {_run('out04', 'out11')}"),
    "MID12_50": _where(half=_run("in05", "out05")),
    "OUT07": _where(one=_run("out05", "out11")),
    "OUT12": _where(one=_run("out00", "out11")),
    "OUT12_5": _where(one=_run("out00", "out11"), half="mid"),
    "RING08_SOFT": _where(one=f"{_run('in06', 'in08')} {_run('out03', 'out05')}", half="in05 in09 out02 out06"),
    "RING08_5": _where(one=f"{_run('in06', 'in09')} {_run('out02', 'out05')}"),
    "RING10_5": _where(one=f"{_run('in05', 'in09')} {_run('out02', 'out06')}"),
    "RING10_3": _where(one=f"{_run('in06', 'in10')} {_run('out01', 'out05')}"),
    "SMOOTHSTEP": _smooth,
    "REVERSE_SMOOTHSTEP": _reverse(_smooth),
    **{f"SMOOTHSTEP*{k}": _times(k) for k in (2, 3, 4)},
    **{f"R_SMOOTHSTEP*{k}": _reverse(_times(k)) for k in (2, 3, 4)},
    **{f"SMOOTHSTEP/{k}": _over(k) for k in (2, 3, 4)},
    **{f"R_SMOOTHSTEP/{k}": _reverse(_over(k)) for k in (2, 3, 4)},
    **{f"{k}SMOOTHSTEP": _times(k) for k in (2, 3, 4)},  # and as meh calls them
    **{f"{k}R_SMOOTHSTEP": _reverse(_times(k)) for k in (2, 3, 4)},
    **{f"{part}_SMOOTHSTEP": _over(k) for part, k in PARTS.items()},
    **{f"{part}_R_SMOOTHSTEP": _reverse(_over(k)) for part, k in PARTS.items()},
    "COSINE": _cosine,
    "REVERSE_COSINE": _reverse(_cosine),
    "TRUE_CUBIC_HERMITE": _true_hermite,
    "TRUE_REVERSE_CUBIC_HERMITE": _reverse(_true_hermite),
    "FAKE_CUBIC_HERMITE": _fake_hermite,
    "FAKE_REVERSE_CUBIC_HERMITE": _reverse(_fake_hermite),
    "ALL_A": _flat(0.0),
    "ALL_B": _flat(1.0),
}


def _ones(blocks: str) -> dict[str, float]:
    return dict.fromkeys(blocks.split(), 1.0)


LORA_WHOLE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
LORA_BLOCKS = {  # of sd-webui-lora-block-weight; what is partly on, and MOUT, are of ComfyUI's Inspire-Pack
    "INS": _ones("in01 in02 in04"),
    "IND": _ones("in05 in07 in08"),
    "INALL": _ones(_run("in00", "in11")),
    "MIDALL": _ones("mid"),
    "MIDD": _ones(f"in05 in07 in08 mid {_run('out03', 'out06')}"),
    "MIDD0.2": {"in08": 0.2, "mid": 0.4, "out03": 0.4, "out04": 0.2},
    "MIDD0.8": {"in07": 0.5, "in08": 0.8, "mid": 0.8, "out03": 0.4},
    "OUTD": _ones(_run("out03", "out06")),
    "OUTS": _ones(_run("out07", "out11")),
    "OUTALL": _ones(_run("out00", "out11")),
    "MOUT": _ones(f"in08 mid {_run('out03', 'out08')}") | {"out09": 0.5},
}
