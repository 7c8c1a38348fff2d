"""Model families: what an architecture's tensors are called and how one is recognised. A folder is a family.

A folder `families/NAME/` has two files: `__init__.py` with `FAMILY` (facts, no torch) and `load.py` (tensors → a
`Diffusion` that every training can use). Widths are facts: a narrow copy of a topology is of the same family.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from sdforge.artifact import Artifact
from sdforge.identity import Json


@dataclass(frozen=True, slots=True)
class Name:
    """One tensor of a topology.

    canonical: its name within its component, as diffusers writes it; single: in a single file (LDM/SGM layout).
    block: what block patterns of recipes match (`in00`, `mid`, `out11`, `time`, …); "" where a component has none.
    optional: widths decide whether it is there (the shortcut of a residual block that changes no width).
    conv: a single file keeps this matrix as a 1×1 convolution; turned: it keeps it transposed.
    share: (i, n): it is the i-th of n equal parts, along the first axis, of the single file's tensor.
    """

    component: str
    canonical: str
    single: str
    block: str = ""
    optional: bool = False
    conv: bool = False
    turned: bool = False
    share: tuple[int, int] = (0, 1)


class Family(ABC):
    """A topology. Everything a planner, a merge, a training or an exporter asks about an architecture is asked here."""

    name: ClassVar[str]
    version: ClassVar[int]  # raised when canonical names, block names, the reading of facts or silence change meaning
    networks: ClassVar[tuple[str, ...]]  # components that hold tensors, in the order people list them
    kept: ClassVar[tuple[str, ...]]  # those of them that a merge takes from the first checkpoint, unless it names them
    spare: ClassVar[tuple[str, ...]]  # those of them without which a checkpoint can be loaded
    image_embeddings: ClassVar[bool]  # whether it draws from a CLIP embedding of a picture
    without_pictures: ClassVar[str] = (
        ""  # the family that is left when one picture is built in and none is shown any more
    )
    neutral: ClassVar[dict[str, Json]]  # facts and the value at which each is left out
    owners: ClassVar[dict[str, str]]  # fact → the part (unet, text_encoder, vae) with which it moves
    title: ClassVar[str]  # as people write it
    pipeline: ClassVar[str]  # the class of diffusers that runs it
    classes: ClassVar[dict[str, tuple[str, str]]]  # part of a diffusers folder → its library and class
    index: ClassVar[dict[str, Json]]  # what `model_index.json` says beside classes
    unsaid: ClassVar[tuple[str, ...]]  # facts that differ between real checkpoints, and that no tensor tells
    kohya_prefix: ClassVar[dict[str, str]]  # component → how kohya's LoRA files begin its modules' names
    sgm_names: ClassVar[bool] = False  # whether those files name the U-Net's modules as a single file does
    convolutions: ClassVar[tuple[str, ...]]  # last parts of the names of the U-Net's convolutions
    kohya_convolutions: ClassVar[tuple[str, ...]] = ()  # the same of matrices that kohya's scripts hold as 1×1 ones
    kohya_version: ClassVar[str]  # `ss_base_model_version`
    kohya_version_v: ClassVar[str]  # the same of LoRAs for checkpoints that predict v
    adapters_of: ClassVar[tuple[str, ...]]  # other families whose LoRAs and embeddings are meant for its networks too
    latents: ClassVar[str] = "sd"  # whose meaning the channels of its latents have: `sd`, or `sdxl`
    context: ClassVar[int]  # how wide the conditioning of the real checkpoints is
    architecture: ClassVar[str]  # `modelspec.architecture` of its checkpoints
    architecture_v: ClassVar[str]  # the same of those that predict v

    @abstractmethod
    def names(self) -> tuple[Name, ...]:
        """Every tensor of the topology."""

    @abstractmethod
    def owns(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Say whether a single file with these tensors (name → shape) is a checkpoint of this family."""

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
    def facts_of_shapes(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        """Return the facts that widths alone tell of a file that states none (component → name → shape)."""

    @abstractmethod
    def configs(self, facts: dict[str, Json], shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        """Return diffusers' configuration of each component, for building modules and for writing folders."""

    @abstractmethod
    def widths(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        """Return the numbers by which two artifacts of the family fit or do not (component → name → shape)."""

    @abstractmethod
    def tokenizers(self) -> dict[str, str]:
        """Return folder of a tokenizer → the fact that names the word with which it fills prompts."""

    @cached_property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that read prompts; none where a family draws from pictures alone."""
        return tuple(name for name in self.networks if name.startswith("text_encoder"))

    @cached_property
    def cross_attention(self) -> tuple[str, ...]:
        """The U-Net's tensors that make keys and values of the conditioning; none where it has no separate ones."""
        ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
        return tuple(n.canonical for n in self.names() if n.component == "unet" and n.canonical.endswith(ends))

    def takes(self, kind: str, name: str) -> bool:
        """Say whether an artifact of a kind fits that was made for the family `name` (empty: for none in particular).

        Networks are a family's own; what adapts them may be meant for another's.
        """
        return name in ("", self.name) or (kind != "checkpoint" and name in self.adapters_of)

    def guided(self, facts: dict[str, Json]) -> bool:
        """Say whether classifier-free guidance means something: it does not where a base was distilled without."""
        return not self.fact(facts, "guidance_free")

    def spec(self, facts: dict[str, Json]) -> str:
        """Return `modelspec.architecture` of a checkpoint with these facts."""
        return self.architecture_v if self.fact(facts, "prediction") == "v_prediction" else self.architecture

    def base_version(self, facts: dict[str, Json]) -> str:
        """Return `ss_base_model_version` of a LoRA for a checkpoint with these facts."""
        return self.kohya_version_v if self.fact(facts, "prediction") == "v_prediction" else self.kohya_version

    def is_conv(self, module: str) -> bool:
        """Say whether a module (`component.path`) is a convolution."""
        return module.startswith("unet.") and module.rpartition(".")[2] in self.convolutions

    def is_kohya_conv(self, module: str) -> bool:
        """Say whether kohya's scripts hold a module as a convolution."""
        around = module.startswith("unet.") and module.rpartition(".")[2] in self.kohya_convolutions
        return around or self.is_conv(module)

    def canonical_shape(self, name: Name, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor has here: files differ in whether a matrix is one or a 1×1 convolution."""
        module, _, kind = f"{name.component}.{name.canonical}".rpartition(".")
        if kind != "weight":
            return shape
        if shape[2:] == (1, 1) and (name.conv or (name.component == "unet" and not self.is_conv(module))):
            return shape[:2]
        return (*shape, 1, 1) if len(shape) == 2 and self.is_conv(module) else shape

    def axes(self, name: Name) -> int:
        """Return how many axes a tensor has here."""
        module, _, kind = f"{name.component}.{name.canonical}".rpartition(".")
        last = module.rpartition(".")[2]
        if kind in ("bias", "class_embedding") or (kind == "weight" and "norm" in last):
            return 1
        kernels = last in ("patch_embedding", "quant_conv", "post_quant_conv")
        within = kernels or (name.component == "vae" and not name.conv and last in self.convolutions)
        return 4 if self.is_conv(module) or within else 2

    @cached_property
    def _weighted(self) -> tuple[frozenset[str], frozenset[str]]:
        weights = (f"{n.component}.{n.canonical}" for n in self.names() if n.component.startswith(("unet", "text")))
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

    def odd_fact(self, facts: dict[str, Any]) -> str:
        """Return the name of a fact that is unknown here, or stated as what it cannot be; "" where there is none."""
        return next((n for n, v in facts.items() if n not in self.neutral or not _can_be(n, v, self.neutral[n])), "")

    def fact(self, facts: dict[str, Json], name: str) -> Any:
        """Return a fact, stated or neutral."""
        return facts.get(name, self.neutral[name])


PREDICTIONS = ("epsilon", "v_prediction")
MOST = 1 << 32  # no number that a fact states is as large


def _can_be(name: str, value: Any, neutral: Any) -> bool:
    """Say whether a fact can have a value: of the type of its neutral one, numbers above 0, visible words."""
    if name == "prediction":
        return value in PREDICTIONS
    if name == "tokens":
        rows = value if isinstance(value, list) else [None]
        return all(isinstance(r, list) and len(r) == 2 and is_word(r[0]) and is_count(r[1]) for r in rows)
    if name == "unet_heads" and isinstance(value, list):
        return all(map(is_count, value))
    if isinstance(neutral, float):
        return type(value) in (int, float) and 0 < value < MOST
    if name == "unet_heads" or type(neutral) is int:
        return is_count(value)
    return is_word(value) if isinstance(neutral, str) else type(value) is type(neutral)


def is_count(value: Any) -> bool:
    """Say whether this is a whole number above 0, and one that a file can mean."""
    return type(value) is int and 0 < value < MOST


def is_word(value: Any) -> bool:
    """Say whether this is text of visible letters alone."""
    return isinstance(value, str) and value.isprintable()


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


@cache
def families() -> tuple[Family, ...]:
    """All families, those first that draw from words alone: what fits several of them is theirs."""
    return tuple(sorted(map(family, family_names()), key=lambda each: each.image_embeddings))


def deaf(checkpoint: Artifact | None, name: str, prompts: list[str]) -> tuple[str, str] | None:
    """Return what is wrong with saying something to a checkpoint that draws from pictures alone, and the way out."""
    if checkpoint is None or not checkpoint.family or family(checkpoint.family).text_encoders or not any(prompts):
        return None
    title, said = family(checkpoint.family).title, next(filter(None, prompts))
    return f"`{name}` is shown pictures and understands no words ({title}), as {said!r} is", 'only "" can be said to it'


def family_of(shapes: dict[str, tuple[int, ...]]) -> Family | None:
    """Return the family to which a single file with these tensors belongs, or None."""
    return next((each for each in families() if each.owns(shapes)), None)
