"""What licences ask of whoever passes a model on, and where a preset's own licence grants what an input's does not.

No legal advice: a table of what the well-known ones say in one word each, by the names that SPDX, the Hugging Face Hub
and Civitai give them. What forge does not know it says nothing of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

TERMS = {
    "private": "no commercial use",
    "alike": "passed on under the same licence",
    "uses": "its restrictions of use are passed on",
    "credit": "its authors are named",
    "whole": "nothing made from it is passed on",
}


class Licence(NamedTuple):
    """A licence by the name it is shown under; terms: those of `TERMS` that it has."""

    title: str
    terms: frozenset[str]


def _licence(title: str, *terms: str) -> Licence:
    return Licence(title, frozenset(terms))


FREE = _licence("CC0-1.0")
OPENRAIL = _licence("CreativeML Open RAIL-M", "uses")
KNOWN = {
    "cc0": FREE,
    "cc010": FREE,
    "unlicense": _licence("Unlicense"),
    "mit": _licence("MIT", "credit"),
    "bsd2clause": _licence("BSD-2-Clause", "credit"),
    "bsd3clause": _licence("BSD-3-Clause", "credit"),
    "apache20": _licence("Apache-2.0", "credit"),
    "gpl30": _licence("GPL-3.0", "credit", "alike"),
    "agpl30": _licence("AGPL-3.0", "credit", "alike"),
    "ccby40": _licence("CC-BY-4.0", "credit"),
    "ccbysa40": _licence("CC-BY-SA-4.0", "credit", "alike"),
    "ccbync40": _licence("CC-BY-NC-4.0", "credit", "private"),
    "ccbyncsa40": _licence("CC-BY-NC-SA-4.0", "credit", "private", "alike"),
    "ccbynd40": _licence("CC-BY-ND-4.0", "credit", "whole"),
    "ccbyncnd40": _licence("CC-BY-NC-ND-4.0", "credit", "private", "whole"),
    "openrail": OPENRAIL,
    "creativemlopenrailm": OPENRAIL,
    "openrail++": _licence("CreativeML Open RAIL++-M", "uses"),
    "creativemlopenrail++m": _licence("CreativeML Open RAIL++-M", "uses"),
    "fairaipubliclicense10sd": _licence("Fair AI Public License 1.0-SD", "uses", "alike"),
    "faipl10sd": _licence("Fair AI Public License 1.0-SD", "uses", "alike"),
    "noobai": _licence("NoobAI", "uses", "alike", "private"),
    "stabilityainccommunity": _licence("Stability AI Non-Commercial", "uses", "private"),
    "sainccommunity": _licence("Stability AI Non-Commercial", "uses", "private"),
}


def licence(name: str) -> Licence | None:
    """Return a licence by any spelling of its name (`cc-by-nc-4.0`, `CC BY-NC 4.0`), or None for one unknown here.

    SPDX says of the GPL whether later versions may be taken too; what is asked is the same.
    """
    return KNOWN.get(re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("only").removesuffix("orlater"))


def combined(names: list[str]) -> list[str]:
    """Return what all these licences together ask, as sentences, in the order of `TERMS`."""
    terms = {term for name in names if (known := licence(name)) for term in known.terms}
    return [sentence for term, sentence in TERMS.items() if term in terms]


def conflicts(own: str, inputs: dict[str, str]) -> Iterator[str]:
    """Yield, input by input, why a preset's own licence does not keep what that one's asks for.

    own: the preset's; inputs: name → licence. Says nothing where either is empty or not known.
    """
    preset = licence(own)
    for name, theirs in inputs.items():
        taken = licence(theirs)
        if preset is not None and taken is not None and (reason := _reason(preset, taken)):
            yield f"`{name}` is under {taken.title}: {reason}"


def _reason(preset: Licence, taken: Licence) -> str:
    if "whole" in taken.terms:
        return "nothing made from it may be passed on"
    if "private" in taken.terms and "private" not in preset.terms:
        return f"it forbids commercial use, and {preset.title} allows it"
    if "alike" in taken.terms and preset.title != taken.title:
        return f"what is made from it stays under that licence, and the preset is under {preset.title}"
    if "uses" in taken.terms and "uses" not in preset.terms:
        return f"its restrictions of use are to be passed on, and {preset.title} has none"
    if "credit" in taken.terms and "credit" not in preset.terms and "uses" not in preset.terms:
        return f"its authors are to be named, and {preset.title} asks nobody to"
    return ""
