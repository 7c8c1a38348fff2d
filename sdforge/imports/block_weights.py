"""A published list of block weights: 26 numbers (BASE, IN00 … M00 … OUT11) or as many as its family has.

Each line holds one list, with its name before it or not, as preset files of merge programs have them:
`GRAD_V: 0,1,0.916, …`, `MY_LIST 0,1,…`, `MY_LIST<TAB>0,1,…`. Lines `A = FILE` and `B = FILE` name the checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdforge.errors import UsageError, counted
from sdforge.imports.draft import Draft, Wishes

LENGTHS = {26: "sd15", 25: "sd15", 20: "sdxl", 19: "sdxl"}
LONGEST = 2000  # letters of a line; a list of 26 numbers with 17 digits each has a fourth of them
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
LIST = re.compile(rf"(?P<name>[^\d\s+.,:=-][^,:=\t]*?)?[\s:=]*(?P<numbers>{NUMBER}(?:\s*,\s*{NUMBER}){{18,25}})\s*,?")
NAMED = re.compile(r"(?:model[ _]?)?(?P<place>[AaBb])\s*[:=]\s*(?P<file>\S.*)")


def recognises(path: Path, text: str) -> bool:
    """Say whether a text holds such lists and nothing else but comments and the names of checkpoints."""
    lines = _lines(text)
    return path.suffix in (".txt", ".csv", "") and any(map(_list, lines))


def read(path: Path, text: str, draft: Draft, wishes: Wishes) -> None:
    """Make a merge of each list. Raises UsageError for lines that are none, and where no checkpoints are named."""
    draft.about = "a list of block weights"
    named: dict[str, str] = {}
    lists: list[tuple[str, list[float]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (bare := _bare(line)):
            continue
        if found := _list(bare):
            lists.append((found["name"] or "", [float(each) for each in found["numbers"].split(",")]))
        elif place := NAMED.fullmatch(bare):
            named[place["place"].upper()] = place["file"].strip("\"' ")
        else:
            draft.note(f"line {number} is no list, and left out: {bare}")
    checkpoints = wishes.checkpoints or tuple(named[place] for place in sorted(named))
    if len(checkpoints) != 2:
        raise UsageError(
            f"{path} says the weights and not of which two checkpoints ({counted(len(checkpoints), 'name')})",
            hint="--checkpoints A,B: files, or sources of forge.toml; the weights are B's",
        )
    draft.family = wishes.family or LENGTHS[len(lists[0][1])]
    names = [each if each in draft.known else draft.source(each) for each in checkpoints]
    made = [
        draft.target("weighted_sum", name or path.stem, {"checkpoints": names, "weights": [1.0, 0.0], "mbw": numbers})
        for name, numbers in lists
    ]
    without = [name for name, (_, numbers) in zip(made, lists, strict=True) if len(numbers) in (25, 19)]
    if without:
        draft.note(f"without a BASE the text encoders are those of {names[0]}")
    if len(made) > 1:
        draft.note(f"the preset is the first of {len(made)} lists; another one is named in its `checkpoint`")
    draft.preset = {"checkpoint": made[0]}


def _list(line: str) -> re.Match[str] | None:
    return LIST.fullmatch(line) if len(line) <= LONGEST else None


def _lines(text: str) -> list[str]:
    return [bare for line in text.splitlines() if (bare := _bare(line))]


def _bare(line: str) -> str:
    return line.partition("#")[0].strip()
