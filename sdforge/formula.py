"""What a formula makes, tensor by tensor, before a byte of it exists.

A formula (a merge, a bake, an insert, …) is identified by how it is made: method, version, the settings that concern
the tensor, dtype, and the identities of the tensors that go in. So plans of merges need no bytes, recipes that compute
the same thing share it, and what passes through keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sdforge.artifact import Artifact, Component, Tensor
from sdforge.dtypes import NOT_FLOAT, SAFETENSORS
from sdforge.errors import InputError, UsageError
from sdforge.families import Family
from sdforge.families.stable_diffusion import TABLE
from sdforge.identity import Json, canonical, component_identity, digest_of_text


class Made(NamedTuple):
    """One tensor of a result: what it will be, what from, by what. Without a method the bytes of `inputs[0]` pass."""

    tensor: Tensor
    inputs: tuple[Tensor, ...]
    method: str = ""
    parameters: dict[str, Any] = {}  # noqa: RUF012 -- never written to


@dataclass(frozen=True)
class Input:
    """An artifact that goes into a formula, with the tensors of the components that are asked for.

    use: what the recipe says of its use (a strength, words to overwrite, …); name: what it calls it.
    """

    artifact: Artifact
    tables: Callable[[Component], list[Tensor]]
    vocabulary: Callable[[Component], dict[str, Any]] = field(default=lambda _: {})
    use: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Return a component's tensors by name; nothing if the artifact has no such component."""
        found = self.artifact.components.get(component)
        return {tensor.name: tensor for tensor in self.tables(found)} if found else {}

    def tokenizer(self) -> dict[str, Any]:
        """Return the artifact's vocabulary ({"vocab", "merges"}), or nothing."""
        found = self.artifact.components.get("tokenizer")
        return self.vocabulary(found) if found else {}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let mistakes say which of several inputs they are about. Raises InputError for them."""
        try:
            yield
        except UsageError as error:
            if type(error) is not UsageError:  # settings have a place already, and what is not listed yet is no mistake
                raise
            raise InputError(self.name, error.message, error.hint) from error


@dataclass
class Plan:
    """What a formula makes: the components it changes, tensor by tensor, and the facts it changes (None: neutral).

    family: what the result belongs to, where that is another one; without: components that it does not have any more.
    """

    components: dict[str, list[Made]] = field(default_factory=dict)
    facts: dict[str, Json] = field(default_factory=dict)
    family: str = ""
    without: tuple[str, ...] = ()

    def identities(self) -> dict[str, str]:
        """Return component → identity."""
        return {
            name: component_identity((made.tensor.name, made.tensor.identity) for made in table)
            for name, table in self.components.items()
        }

    def dtypes(self) -> dict[str, str]:
        """Return component → the dtype its floats have in common, or `mixed`."""
        return {name: common_dtype(made.tensor.dtype for made in table) for name, table in self.components.items()}

    def size(self) -> int:
        """Return how many bytes are computed (and not passed through)."""
        return sum(made.tensor.size for t in self.components.values() for made in t if made.method)


def common_dtype(dtypes: Iterable[str]) -> str:
    """Return the one float type of these, or `mixed`."""
    found = {dtype for dtype in dtypes if not dtype.startswith(NOT_FLOAT)}
    return found.pop() if len(found) == 1 else "mixed"


def passes(tensor: Tensor) -> Made:
    """Let a tensor's bytes through: it keeps its identity."""
    return Made(tensor, (tensor,))


def computed(
    method: str, version: int, name: str, dtype: str, shape: tuple[int, ...], inputs: list[Tensor], parameters: Any
) -> Made:
    """Name a tensor that is computed from others.

    dtype: as safetensors writes it; parameters: the settings that concern this tensor, as JSON.
    """
    # canonical JSON of a table with these keys: written out, as it is made for every tensor of a checkpoint
    sources = ",".join(f'"{tensor.identity}"' for tensor in inputs)
    identity = digest_of_text(
        "formula",
        f'{{"dtype":"{dtype}","inputs":[{sources}],"method":"{method}","settings":{canonical(parameters)},'
        f'"version":{version}}}',
    )
    return Made(Tensor(name, dtype, shape, identity), tuple(inputs), method, parameters)


def target_dtype(setting: str, first: Tensor) -> str:
    """Return the dtype a tensor of the result has: the target's, or the first input's. Integers stay what they are."""
    if not setting or first.dtype.startswith(NOT_FLOAT):
        return first.dtype
    return SAFETENSORS[setting]


MORE_WORDS = (
    "one has more words: `insert` them after the merge, or take the other's text encoders with [swap.NAME] first"
)


def same_shapes(method: str, name: str, inputs: list[Tensor]) -> None:
    """Refuse tensors of different shapes. Raises UsageError naming both."""
    for other in inputs[1:]:
        if other.shape != inputs[0].shape:
            raise UsageError(
                f"{method} cannot combine {name} of shapes {list(inputs[0].shape)} and {list(other.shape)}",
                hint=MORE_WORDS if name.endswith(TABLE) and inputs[0].shape[1:] == other.shape[1:] else "",
            )


NOT_THERE = ""  # stands for the identity of a tensor that a checkpoint lacks
UNUSED = ("logit_scale", "position_ids")  # CLIP's temperature, of its training alone; whole numbers 0 … 76


def merge_plan(
    method: str,
    version: int,
    simplify: Callable[[list[Any], dict[str, Any]], Any],
    inputs: list[Input],
    family: Family,
    parameters: Callable[[str, str, str], dict[str, Any] | None],
    dtype: str,
) -> Plan:
    """Plan a merge of checkpoints.

    parameters: (component, block, tensor) → the method's settings there; components for which it returns None pass
    through from the first checkpoint. Integer tensors always do, and what is never used. A checkpoint may lack a whole
    component (a network alone does) where the settings leave it out there. Raises UsageError for tensors that are
    missing, or of other shapes.
    """
    plan = Plan()
    blocks = {(name.component, name.canonical): name.block for name in family.names()}
    for component in family.networks:
        tables = [each.tensors(component) for each in inputs]
        if not tables[0] or parameters(component, "", "") is None:
            continue
        rows = []
        for name, first in tables[0].items():
            if name.rpartition(".")[2] in UNUSED:
                rows.append(passes(first))
                continue
            for i, table in enumerate(tables):
                if table and name not in table:
                    raise UsageError(f"{method} needs {component}.{name}, which checkpoint {i + 1} does not have")
            tensors = [table.get(name) for table in tables]
            same_shapes(method, f"{component}.{name}", [tensor for tensor in tensors if tensor])
            target = target_dtype(dtype, first)
            here = parameters(component, blocks[component, name], name) or {}
            rows.append(_merged(method, version, simplify, f"{component}.{name}", target, tensors, here))
        for i, table in enumerate(tables):
            if extra := sorted(n for n in set(table) - set(tables[0]) if n.rpartition(".")[2] not in UNUSED):
                raise UsageError(f"{method} has no place for {component}.{extra[0]} of checkpoint {i + 1}")
        plan.components[component] = rows
    return plan


def merged_facts(inputs: list[Input], family: Family, prediction: str) -> dict[str, Json]:
    """Return what a merge changes of its first input's facts: what it predicts, where that was stated.

    Raises UsageError for checkpoints that predict different things: between them lies a U-Net that predicts neither.
    """
    networks = [each for each in inputs if "unet" in each.artifact.components]  # a VAE or text encoder predicts nothing
    found = [str(family.fact(each.artifact.facts, "prediction")) for each in networks]
    if prediction:
        return {"prediction": None if prediction == family.neutral["prediction"] else prediction}
    if other := next((each for each in found if each != found[0]), ""):
        raise UsageError(
            f"a checkpoint that predicts {found[0]} cannot be merged with one that predicts {other}",
            hint=f'if the result is meant to predict one of them, say so: prediction = "{found[0]}"',
        )
    return {}


def _merged(
    method: str,
    version: int,
    simplify: Callable[[list[Any], dict[str, Any]], Any],
    place: str,
    dtype: str,
    tensors: list[Tensor | None],
    parameters: dict[str, Any],
) -> Made:
    """Name one tensor of a merge. place: `component.name`; tensors: None of those that lack the component."""
    component, _, name = place.partition(".")
    first = tensors[0]
    assert first is not None
    if first.dtype.startswith(NOT_FLOAT):
        return passes(first)
    by_identity = {tensor.identity: tensor for tensor in tensors if tensor}
    left = simplify([tensor.identity if tensor else NOT_THERE for tensor in tensors], parameters)
    used, remaining = ([left], {}) if isinstance(left, str) else left
    if NOT_THERE in used:
        raise UsageError(
            f"{method} needs {place}, which checkpoint {tensors.index(None) + 1} does not have",
            hint=f"it has no {component} at all: `swap` takes that from another checkpoint, and weights that leave it "
            "out there need none",
        )
    if isinstance(left, str):
        through = by_identity[left]
        return passes(through._replace(name=name)) if through.dtype == dtype else cast(name, through, dtype)
    return computed(method, version, name, dtype, first.shape, [by_identity[i] for i in used], remaining)


CAST_VERSION = 1


def cast(name: str, tensor: Tensor, dtype: str) -> Made:
    """Round a tensor to another type."""
    return computed("cast", CAST_VERSION, name, dtype, tensor.shape, [tensor], {})
