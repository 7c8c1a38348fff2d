"""Hypernetworks: small networks before keys and values; no paper, but the form of A1111's web UI.

NovelAI wrote of them first (https://blog.novelai.net/novelai-improvements-on-stable-diffusion-e10d38db82ac), and what
people train and share is what A1111 reads (https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import AfterValidator, Field

from sdforge.artifact import Artifact
from sdforge.formats.hypernetwork import SIDES, is_structure, shapes_of, stated
from sdforge.settings import NotNegative, Positive
from sdforge.trainings import Advice, Shapes, Training, without

if TYPE_CHECKING:
    from sdforge.families import Family

VERSION = 1
MAKES = "hypernetwork"


def _closed(structure: list[float]) -> list[float]:
    if not is_structure(structure):
        raise ValueError("it begins and ends with 1, and nothing in it is above 64")
    return structure


Structure = Annotated[list[Positive], Field(min_length=2, max_length=16), AfterValidator(_closed)]


@final
class Hypernetwork(Training):
    """Keys and values are made of h(c) = c + MLP(c) instead of the context c: one MLP for keys, one for values.

    All attentions whose context has the same width share them. What would change the output first starts at zero, so
    the first step predicts as the base does. With the linear activation all of it is a matrix and a vector, which
    `bake` puts into the weights; any other is drawn with as a sidecar. The pictures' captions are used as they are.
    """

    structure: Structure = Field(
        [1.0, 2.0, 1.0], description="widths from layer to layer, in widths of the context; begins and ends with 1"
    )
    activation: Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid"] = Field(
        "linear", description="behind every layer but the last; only linear ones can be baked"
    )
    layer_norm: bool = Field(False, description="norms behind every layer; then it cannot be baked")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of every inner layer's output that is left out at a step"
    )
    attention: Literal["cross", "all"] = Field(
        "cross",
        description="cross: what the conditioning is turned into; all: what pictures are told of themselves too",
    )
    learning_rate: Positive = Field(1e-5, description="of AdamW, after the warm-up")
    steps: int = Field(2000, ge=1, le=1_000_000, description="updates of the weights")
    warmup: int = Field(200, ge=0, description="steps over which the learning rate rises")
    weight_decay: NotNegative = Field(0.01, description="of AdamW")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        names = of.cross_attention
        if self.attention == "all":
            names = tuple(name for name in shapes["unet"] if name.endswith((".to_k.weight", ".to_v.weight")))
        widths = {shapes["unet"][name][1] for name in names}
        nets = [shape for width in widths for shape in shapes_of(width, facts(self)).values()]
        return len(SIDES) * sum(map(prod, nets)), "fp32"


TABLE = Hypernetwork


def facts(table: Hypernetwork) -> dict[str, Any]:
    """Return what is known of the artifact before it is trained."""
    return stated(table.structure, activation=table.activation, layer_norm=table.layer_norm, attention=table.attention)


def advise(table: Hypernetwork, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse checkpoints in which there are no keys and values to change."""
    return without("cross_attention", "a hypernetwork", table.on, inputs)
