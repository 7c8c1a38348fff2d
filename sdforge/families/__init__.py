"""Model families: what an architecture's tensors are called and how one is recognised. A folder is a family.

A folder `families/NAME/` has two files: `__init__.py` with `FAMILY` (facts, no torch) and `load.py` (tensors → a
`Diffusion` that every training can use). Widths are facts: a narrow copy of a topology is of the same family.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from sdforge.identity import Json


@dataclass(frozen=True, slots=True)
class Name:
    """One tensor of a topology.

    canonical: its name within its component, as diffusers writes it; single: in a single file (LDM/SGM layout).
    block: what block patterns of recipes match (`in00`, `mid`, `out11`, `time`, …); "" where a component has none.
    optional: widths decide whether it is there (the shortcut of a residual block that changes no width).
    conv: a single file keeps this matrix as a 1×1 convolution.
    """

    component: str
    canonical: str
    single: str
    block: str = ""
    optional: bool = False
    conv: bool = False


class Family(ABC):
    """A topology. Everything a planner, a merge, a training or an exporter asks about an architecture is asked here."""

    name: ClassVar[str]
    version: ClassVar[int]  # raised when canonical names, block names or the reading of facts change meaning
    networks: ClassVar[tuple[str, ...]]  # components that hold tensors, in the order people list them
    neutral: ClassVar[dict[str, Json]]  # facts and the value at which each is left out
    owners: ClassVar[dict[str, str]]  # fact → the part (unet, text_encoder, vae) with which it moves
    title: ClassVar[str]  # as people write it
    pipeline: ClassVar[str]  # the class of diffusers that runs it
    kohya_prefix: ClassVar[dict[str, str]]  # component → how kohya's LoRA files begin its modules' names
    convolutions: ClassVar[tuple[str, ...]]  # last parts of the names of the U-Net's convolutions
    kohya_version: ClassVar[str]  # `ss_base_model_version`
    architecture: ClassVar[str]  # `modelspec.architecture` of its checkpoints

    @abstractmethod
    def names(self) -> tuple[Name, ...]:
        """Every tensor of the topology."""

    @abstractmethod
    def owns(self, names: Iterable[str], shapes: dict[str, tuple[int, ...]]) -> bool:
        """Say whether a single file with these tensors is a checkpoint of this family."""

    @abstractmethod
    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        """Say whether a diffusers folder with these configurations is a checkpoint of this family."""

    @abstractmethod
    def alias(self, name: str) -> str:
        """Return today's single-file name for a name that other programs gave it."""

    @abstractmethod
    def ignored(self, name: str) -> str:
        """Say why a tensor of a single file is read over (EMA copies, tables every loader computes), or nothing."""

    @abstractmethod
    def facts_of_folder(self, configs: dict[str, dict[str, Any]]) -> dict[str, Json]:
        """Return the facts that a diffusers folder's configurations state. Raises UsageError for what cannot be."""

    @abstractmethod
    def configs(self, facts: dict[str, Json], shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        """Return diffusers' configuration of each component, for building modules and for writing folders."""

    @abstractmethod
    def widths(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        """Return the numbers by which two artifacts of the family fit or do not (component → name → shape)."""

    def is_conv(self, module: str) -> bool:
        """Say whether a module (`component.path`) is a convolution."""
        return module.startswith("unet.") and module.rpartition(".")[2] in self.convolutions

    @cached_property
    def _weighted(self) -> tuple[frozenset[str], frozenset[str]]:
        weights = (f"{n.component}.{n.canonical}" for n in self.names() if n.component != "vae")
        norms = ("norm", "norm1", "norm2", "norm3", "layer_norm1", "layer_norm2", "final_layer_norm", "conv_norm_out")
        modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
        scaled = frozenset(m for m in modules if m.rpartition(".")[2] in norms)
        return frozenset(m for m in modules - scaled if ".embeddings." not in m), scaled

    def modules(self) -> frozenset[str]:
        """Every linear and convolution (`component.path`) of U-Net and text encoders: what a LoRA can change."""
        return self._weighted[0]

    def norms(self) -> frozenset[str]:
        """Every normalisation with a weight of U-Net and text encoders: some LoRA files change them too."""
        return self._weighted[1]

    def stated(self, facts: dict[str, Json]) -> dict[str, Json]:
        """Return `facts` without those at their neutral value."""
        return {name: value for name, value in facts.items() if value != self.neutral.get(name)}

    def fact(self, facts: dict[str, Json], name: str) -> Any:
        """Return a fact, stated or neutral."""
        return facts.get(name, self.neutral[name])


@cache
def family_names() -> tuple[str, ...]:
    """The families that there are: the folders beside this file."""
    here = Path(__file__).parent
    return tuple(sorted(p.name for p in here.iterdir() if (p / "load.py").is_file()))


@cache
def family(name: str) -> Family:
    """Return the family of that name."""
    found = importlib.import_module(f"sdforge.families.{name}").FAMILY
    assert isinstance(found, Family)
    return found


def family_of(shapes: dict[str, tuple[int, ...]]) -> Family | None:
    """Return the family to which a single file with these tensors belongs, or None."""
    return next((f for n in family_names() if (f := family(n)).owns(shapes, shapes)), None)
