"""Kinds of artifacts, and what the planner knows of one: components, facts, and by what name they go.

An artifact's components carry two names each. `identity` is what keys are made of: for a source and for what was
trained it is the content, for what a formula makes it is how it is made (so merges can be planned without bytes).
`content` is the name by bytes, known as soon as the bytes have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

from sdforge.dtypes import ITEM_SIZE
from sdforge.identity import H, Json, canonical, tensor_identity

KINDS = (
    "checkpoint",
    "delta",
    "lora",
    "embedding",
    "hypernetwork",
    "custom",
    "image_embedding",
    "null_text",
    "aesthetic",
    "dataset",
    "picture",
    "clip",
    "pictures",
    "files",
    "verdict",
)
UNPINNED = ("files", "pictures", "verdict")  # kinds that can always be made again
SIDECARS = ("hypernetwork", "null_text", "image_embedding", "aesthetic")  # kinds that act while pictures are drawn
DIGITS = 16  # of a digest, by which files are called until they get a person's name
DIFFUSERS = ".diffusers"  # behind the name of the file of a LoRA or embedding as diffusers writes them
WORDS = "words"  # the note of how many words text encoders read, or a tokenizer has, without appended ones
WITH = "-with"  # behind the name of a folder of pictures: those that were drawn with a preset's sidecars


def before_diffusers(stem: str) -> str:
    """Return what stands before the mark of diffusers' form in a file's name without its ending; nothing without one.

    An embedding for two text encoders is two such files, and the name of the second ends in `_2`.
    """
    before, _, encoder = stem.rpartition(DIFFUSERS)
    return before if encoder in ("", "_2") else ""


class Spot(NamedTuple):
    """Where a tensor's bytes lie: in the file with this sha256 (a pack of the store or a source), from `offset`."""

    file: str
    offset: int


class Tensor(NamedTuple):
    """One tensor of a component.

    name: canonical (diffusers' layout); dtype: as safetensors writes it; identity: what keys are made of.
    sha256, xxh3: of its little-endian C-order bytes, and where those lie; all empty while it is only planned.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    identity: str
    sha256: str = ""
    xxh3: str = ""
    spot: Spot | None = None

    @property
    def content(self) -> str:
        """Its name by content, once its bytes have been seen; of what no formula made it is the identity."""
        return tensor_identity(self.dtype, self.shape, self.sha256)

    @property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]


def differing(one: list[Tensor], other: list[Tensor]) -> list[str]:
    """Return the names of the tensors that differ in their bytes, or that one of the two lacks."""
    bytes_of = [{tensor.name: tensor.sha256 for tensor in table} for table in (one, other)]
    return sorted(name for name in {*bytes_of[0], *bytes_of[1]} if bytes_of[0].get(name) != bytes_of[1].get(name))


class Component(NamedTuple):
    """A part of an artifact: its identity, its name by content ("" while unknown), and where its tensors are listed.

    table: `reading:ID`, `result:KEY:DIGEST` or `plan:KEY`, for `Tables` to look up.
    dtype: the float type all its tensors have, or `mixed`.
    """

    identity: str
    content: str
    table: str
    dtype: str


@dataclass(frozen=True)
class Artifact:
    """What the planner knows of something that is made or taken.

    facts: what decides numbers beside the tensors (prediction type, a LoRA's alpha, tokens, …), left out at neutral.
    notes: licence, trigger (a list of words), title, … : they reach export and card, and enter no other key.
    whole: the identity of an artifact that has no components (a data set).
    """

    kind: str
    family: str = ""
    components: dict[str, Component] = field(default_factory=dict)
    facts: dict[str, Json] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    whole: str = ""

    @property
    def identity(self) -> str:
        """The name that keys are made of."""
        return self.whole or self._name({name: c.identity for name, c in self.components.items()})

    @property
    def digest(self) -> str:
        """The name by content, or "" while some bytes have not been seen."""
        if self.whole or not all(c.content for c in self.components.values()):
            return self.whole
        return self._name({name: c.content for name, c in self.components.items()})

    @property
    def called(self) -> str:
        """How files are called that hold it or are drawn with it."""
        return (self.digest or self.identity)[:DIGITS]

    def _name(self, components: dict[str, str]) -> str:
        return artifact_identity(self.kind, components, self.facts)

    def by_content(self) -> Artifact | None:
        """Return the same artifact with its components named by content, or None while that is unknown."""
        if not all(c.content for c in self.components.values()):
            return None
        return replace(self, components={n: c._replace(identity=c.content) for n, c in self.components.items()})

    def stated(self) -> dict[str, Any]:
        """Return what a file of its own states of it beside tensors and facts; that enters the key of an export."""
        trigger = [] if self.kind in ("embedding", "custom") else self.notes.get("trigger", [])  # theirs are facts
        return {"trigger": trigger} if trigger else {}

    def named(self, reads: tuple[str, ...], facts: tuple[str, ...]) -> str:
        """Return, as canonical JSON, what an action that reads these of an artifact puts in its manifest.

        reads: how the names of the components begin; facts: their names, `*` for all.
        """
        if self.whole:
            return f'"{self.whole}"'
        parts = ",".join(
            f'"{n}":"{self.components[n].identity}"' for n in sorted(self.components) if n.startswith(reads)
        )
        stated = self.facts if facts == ("*",) else {name: self.facts[name] for name in facts if name in self.facts}
        if not reads:
            parts = ""
        if stated:
            return f'{{"components":{{{parts}}},"facts":{canonical(stated)}}}'
        return f'{{"components":{{{parts}}}}}'


def artifact_identity(kind: str, components: dict[str, str], facts: dict[str, Json]) -> str:
    """Name an artifact by its components' names and its facts."""
    return H(kind, {"components": dict(components), "facts": facts})


def dataset_identity(rows: list[list[Any]], validation: int) -> str:
    """Name a data set: rows of [sha256 of the picture, caption as it is used, repeats], in any order.

    A row has the mask's sha256 (or `alpha`) behind it where masks are used. validation: pictures held out.
    """
    pictures: Json = sorted(rows)  # type: ignore[assignment]
    return H("dataset", {"pictures": pictures, "validation": validation})


def made_artifact(kind: str, family: str, components: dict[str, Component], facts: dict[str, Json]) -> Artifact:
    """Return what an action made as an artifact: components and facts, or pictures that are a data set."""
    if kind != "dataset":
        return Artifact(kind, family, components, facts)
    rows: Any = facts["pictures"]
    names = {row[0]: [f"{i + 1}.png"] for i, row in enumerate(rows)}
    notes = {"rows": rows, "names": names, "without": [], "trigger": [], "validation": 0}
    return Artifact(kind, whole=dataset_identity(rows, 0), notes=notes)
