"""Full fine-tuning: a checkpoint's own weights go on learning (Rombach et al. 2022, https://arxiv.org/abs/2112.10752)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.errors import UsageError
from sdforge.settings import Block, NotNegative, Positive, Share
from sdforge.trainings import Advice, Shapes, Training

if TYPE_CHECKING:
    from sdforge.families import Family

VERSION = 1
MAKES = "checkpoint"
LAYERS = {"all": ("",), "attention": (".attn1.", ".attn2."), "cross_attention": (".attn2.",)}  # parts of names


class Weights(Training):
    """What trainings of a checkpoint's own weights share."""

    train: Annotated[list[Block], Field(min_length=1, max_length=64)] = Field(
        ["unet"], description="patterns over the U-Net's blocks (unet.mid, unet.out*): those that learn"
    )
    layers: Literal["all", "attention", "cross_attention"] = Field(
        "all", description="which layers of those blocks learn: all, the attentions, or only those to the text"
    )
    text_encoder: bool = Field(False, description="train the text encoders' weights too")
    text_learning_rate: NotNegative = Field(1e-6, description="of the text encoders' weights")
    weights: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of the weights while they learn; bf16 takes a quarter less memory, rounded by chance"
    )
    weight_decay: NotNegative = Field(0.01, description="of AdamW")
    warmup: int = Field(20, ge=0, description="steps over which the learning rate rises")

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        names = chosen(self, of)
        learning = [shape for name, shape in shapes["unet"].items() if name in names]
        for encoder in of.text_encoders if self.text_encoder else ():
            learning += shapes[encoder].values()
        return sum(map(prod, learning)), self.weights


@final
class FineTune(Weights):
    """min over the weights of E w(t) ‖f(z_t, t, c) − target‖².

    The result has the components that were trained; all others pass from the checkpoint it was trained on. Averages
    (`ema = 0.9999`) pay from about 2000 steps on; what goes on to merges or extraction is best kept as fp32.
    """

    learning_rate: Positive = Field(1e-5, description="of AdamW, after the warm-up")
    caption_dropout: Share = Field(0.1, description="share of captions replaced by the empty one, for guidance")


TABLE = FineTune


def advise(table: FineTune, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Blocks that are not there, and settings that exclude each other."""
    return mistakes(table, inputs)


def mistakes(table: Weights, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Return what cannot be trained as it is asked for, of any training of weights."""
    from sdforge.families import family

    found: list[tuple[str, str, str]] = []
    on = inputs["on"][0]
    if on is not None and on.family:
        try:
            chosen(table, family(on.family))
        except UsageError as error:
            found.append(("block", error.message, error.hint))
    if table.weights == "bf16":
        hint = 'weights = "fp32"'
        if table.precision == "fp32":
            found.append(("setting", 'weights = "bf16" cannot be computed in precision = "fp32"', hint))
        if table.optimizer != "adamw":
            found.append(("setting", f'weights = "bf16" is rounded by adamw, not by {table.optimizer}', hint))
        if table.ema:
            found.append(("setting", 'an average of weights = "bf16" would stand still: `ema` needs fp32', hint))
    return [("on", code, sentence, hint, False) for code, sentence, hint in found]


def chosen(table: Weights, family: Family) -> set[str]:
    """Return the names of the U-Net's tensors that learn. Raises UsageError where there are none."""
    from sdforge.method import places_of

    blocks: set[str] = set()
    for pattern in table.train:
        mine = {block for component, block in places_of(pattern, family) if component == "unet"}
        if not mine:
            hint = "`text_encoder = true` trains the text encoders"
            raise UsageError(f"`train` names parts of the U-Net, and {pattern!r} is none", hint)
        blocks |= mine
    parts = LAYERS[table.layers]
    names = [name for name in family.names() if name.component == "unet" and name.block in blocks]
    found = {name.canonical for name in names if any(part in name.canonical for part in parts)}
    if not found:
        raise UsageError(f"`train` names blocks without {table.layers.replace('_', ' ')}", 'layers = "all"')
    return found
