"""LoRA: low-rank updates of linear layers and convolutions (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from sdforge.settings import NotNegative, Share
from sdforge.trainings import Training

VERSION = 1
MAKES = "lora"


@final
class Lora(Training):
    """W + (alpha / rank) · up @ down, with down: (rank, in) from noise and up: (out, rank) from zeros.

    The trained layers are those of kohya's scripts: every linear layer of the U-Net's transformers with their input
    and output projections; with `conv_rank` also the residual blocks and samplers, 3×3 convolutions with that rank and
    the rest with `rank` (LoCon, https://arxiv.org/abs/2309.14859). The pictures' captions are used as they are.
    """

    rank: int = Field(16, ge=1, le=1024, description="rank of the update of linear layers and 1×1 convolutions")
    alpha: NotNegative = Field(0.0, description="the update is divided by rank / alpha; 0: alpha is the rank")
    conv_rank: int = Field(0, ge=0, le=1024, description="rank of the update of 3×3 convolutions; 0: none")
    conv_alpha: NotNegative = Field(0.0, description="as alpha, for conv_rank")
    text_encoder: bool = Field(False, description="train the text encoder's layers too")
    text_learning_rate: NotNegative = Field(5e-5, description="of the text encoder's layers")
    caption_dropout: Share = Field(0.05, description="share of captions replaced by the empty one")
    weight_decay: NotNegative = Field(0.01, description="of AdamW")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="as for all trainings")
    warmup: int = Field(50, ge=0, description="steps over which the learning rate rises")


TABLE = Lora
