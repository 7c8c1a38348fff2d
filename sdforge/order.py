"""One action as it is handed to whoever runs it: settings, where every input byte lies, where results go.

An order is JSON. It names files and offsets, never artifacts: the runner needs no recipe, no store and no lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from sdforge.dtypes import ITEM_SIZE
from sdforge.families import Family, family
from sdforge.file_layout import FileLayout, Laid
from sdforge.ref import Ref


@dataclass(frozen=True)
class Given:
    """An input of an action.

    For a data set, `pictures` are [path, sha256, caption, repeats] and, with masks, the mask's path or `alpha`;
    `held_out` is a count. A single picture is a row of its own.

    identities: component → identity, the names of what is derived from them; use: how the recipe uses this input.
    """

    kind: str
    identity: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    components: dict[str, list[Ref]] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    use: dict[str, Any] = field(default_factory=dict)
    pictures: list[list[Any]] = field(default_factory=list)
    held_out: int = 0

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return component → name → shape."""
        return {name: {ref.name: ref.shape for ref in refs} for name, refs in self.components.items()}


class Computation(NamedTuple):
    """One tensor that a formula makes: its component, name, dtype and shape, by what method, with what, from what.

    An input that is a computation itself is rounded to its own dtype, and written nowhere.
    """

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    parameters: dict[str, Any]
    inputs: tuple[Ref | Computation, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Order:
    """An action to run.

    work: an empty folder for results; states, derived: folders of the store for train states and derived caches.
    state_key: under which this training's states are found. how: what does not decide the result (device, threads,
    how often a state is kept).

    layout: the file that a formula's pack is laid out as. written: the packs that were laid out as a file, by
    `FileLayout.key`, for whoever exports.
    """

    key: str
    target: str
    method: str
    group: str
    family: str
    settings: dict[str, Any]
    work: str
    inputs: dict[str, list[Given]] = field(default_factory=dict)
    compute: list[Computation] = field(default_factory=list)
    states: str = ""
    state_key: str = ""
    derived: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    closure: list[dict[str, Any]] = field(default_factory=list)
    layout: FileLayout | None = None
    written: dict[str, Laid] = field(default_factory=dict)

    @property
    def architecture(self) -> Family:
        return family(self.family)

    def the(self, role: str) -> Given:
        """Return the one input of a role."""
        (given,) = self.inputs[role]
        return given

    def with_less(self) -> str:
        """Say how it is done with less memory: a training in batches learns the same; "" where there is no way."""
        if "batch" in self.settings:
            less = "a smaller --vram" if self.how.get("vram") else "--vram 8GB (or what there is)"
            return f"{less} computes the same in smaller parts, from the last kept state on"
        return "a smaller resolution, or a device with more" if "resolution" in self.settings else ""

    def to_json(self) -> dict[str, Any]:
        found = dict(self.__dict__)
        found["inputs"] = {role: [dict(g.__dict__) for g in givens] for role, givens in self.inputs.items()}
        return found

    @staticmethod
    def from_json(value: dict[str, Any]) -> Order:
        inputs = {role: [_given(g) for g in givens] for role, givens in value["inputs"].items()}
        written = {key: Laid(*row) for key, row in value["written"].items()}
        layout = value["layout"] and _layout(*value["layout"])
        compute = [_computation(row) for row in value["compute"]]
        return Order(**(value | {"inputs": inputs, "compute": compute, "layout": layout, "written": written}))


def _ref(row: list[Any]) -> Ref:
    return Ref(row[0], row[1], tuple(row[2]), row[3], row[4], row[5])


def _layout(
    shapes: dict[str, list[Any]],
    metadata: dict[str, str],
    parts: dict[str, list[str]],
    odd: dict[str, bool],
    passing: dict[str, list[Any]],
) -> FileLayout:
    typed = {name: (dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()}
    return FileLayout(typed, metadata, parts, odd, {name: _ref(row) for name, row in passing.items()})


def _computation(row: list[Any]) -> Computation:
    component, name, dtype, shape, method, parameters, inputs = row
    found = tuple(_ref(each) if len(each) == len(Ref._fields) else _computation(each) for each in inputs)
    return Computation(component, name, dtype, tuple(shape), method, parameters, found)


def _given(value: dict[str, Any]) -> Given:
    components = {name: [_ref(r) for r in refs] for name, refs in value["components"].items()}
    return Given(**(value | {"components": components}))


@dataclass
class Outcome:
    """What a runner made.

    components: component → rows [name, dtype, shape, sha256, xxh3, offset in the pack]; pack: the file in the work
    folder with their bytes, and its sha256. apart: another one with the tensors whose rows end in true, and its sha256.
    laid: of a pack that is laid out as a file, the key of its layout and the sha256 of what follows its header.
    files: path in the work folder → what `Result.files` keeps of it.
    """

    components: dict[str, list[list[Any]]] = field(default_factory=dict)
    pack: str = ""
    sha256: str = ""
    apart: list[str] = field(default_factory=list)
    laid: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    grade: str = "A"
    fingerprint: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
