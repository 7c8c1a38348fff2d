"""Building blocks of the tables that recipes may hold: the types of settings, and the base that all tables share.

A table is a closed, typed pydantic model: an unknown key is an error, `true` is no number, 1 may stand for 1.0.
Fields marked `Takes` name artifacts; all others are settings and enter the manifest, defaults included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.names import REFERENCE

ALL = ("*",)  # of facts: every one


@dataclass(frozen=True)
class Takes:
    """Marks a field whose value names an artifact (or several) of this kind.

    reads: the components that the action's result depends on, by how their names begin; ("",) is every one.
    facts: the facts that it depends on.
    moves: the components (with the facts that belong to them) that go over into the result as they are.
    also: further kinds that serve.
    widens: of other roles, the components and facts that matter too where something is given here.
    """

    kind: str
    reads: tuple[str, ...] = ("",)
    facts: tuple[str, ...] = ALL
    moves: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    widens: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class PerBlock:
    """Marks a setting of a merge that `blocks` may override for components and blocks.

    shares: it is a list of shares, so that of two the second one says both.
    """

    shares: bool = False


@dataclass(frozen=True)
class Since:
    """Marks a setting that came later: at `neutral` it leaves every key as it was before."""

    version: int
    neutral: Any


Reference = Annotated[str, Field(pattern=REFERENCE)]
Dtype = Literal["", "fp16", "bf16", "fp32"]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Similarity = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Block = Annotated[str, Field(min_length=1, max_length=128)]


class Table(BaseModel):
    """What every table of a recipe is: closed, strict, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    FREE: ClassVar[tuple[str, ...]] = ()  # fields that enter no key

    def settings(self) -> dict[str, Any]:
        """Return what enters the manifest: every setting with its value, but not the names of artifacts.

        A setting that came later is left out at its neutral value.
        """
        found = {}
        for name, info in type(self).model_fields.items():
            if takes(info) or name in self.FREE:
                continue
            value = getattr(self, name)
            later = next((m for m in info.metadata if isinstance(m, Since)), None)
            if later is None or value != later.neutral:
                found[name] = plain(value)
        return found


class Target(Table):
    """A merge or edit of checkpoints: what all of them may state besides their own settings."""

    dtype: Dtype = Field("", description="type of the result's numbers; empty: as the first input has them")


class Seeded(Table):
    """A target whose result depends on random numbers."""

    FREE: ClassVar[tuple[str, ...]] = ("seed",)  # it stands beside the settings in the manifest

    seed: Seed | SkipJsonSchema[None] = Field(None, description="default: the recipe's `seed`")


class Merge(Target):
    """A merge: what all of them may state besides."""

    prediction: Annotated[Literal["", "epsilon", "v_prediction"], Since(2, "")] = Field(
        "", description="what the result's U-Net predicts; only where the checkpoints do not agree"
    )


class SeededMerge(Seeded, Merge):
    """A merge that depends on random numbers."""


def takes(field: Any) -> Takes | None:
    """Return how a pydantic field takes artifacts, or None for a setting."""
    return next((m for m in field.metadata if isinstance(m, Takes)), None)


def plain(value: Any) -> Any:
    """Return a setting's value as JSON has it."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
