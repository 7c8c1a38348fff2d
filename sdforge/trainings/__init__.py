"""Trainings: a folder is a training method, and holds only what is particular to it.

`__init__.py` has `TABLE` (its settings, derived from `Training`), `VERSION` and `MAKES`; `adapter.py` has `begin(…)`,
which returns what is trained: see `sdforge.run.adapter.Adapter`. One loop (`sdforge/run/train.py`) serves them all; a
method that learns from no data set has a `run(order, report, stopped)` of its own instead. No training names a family;
what it needs to know of one it asks the loaded `Diffusion`. A module may have `advise(table, inputs)`, which says
before anything runs what cannot work, `advise_words(table, inputs, tokenizer)`, which says it of new words, and
`facts(table)`, the facts of its result that are known by then; `CAPTIONS = False` where captions are not read, and
`UNCAPTIONED`, roles whose pictures need none. Its settings say how much is trained, `learns(family, shapes)`, so that a
plan knows what train states take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.artifact import Artifact
from sdforge.dtypes import ITEM_SIZE, SAFETENSORS
from sdforge.edits.insert import ROWS
from sdforge.families import Family, family
from sdforge.formats.tokenizer import hidden, stands_in
from sdforge.settings import NotNegative, Positive, Reference, Seeded, Share, Since, Takes

On = Annotated[Reference, Takes("checkpoint", ("unet", "text_encoder", "vae", "tokenizer"))]
Pictures = Annotated[Reference, Takes("dataset")]
Prior = Annotated[Reference | SkipJsonSchema[None], Takes("dataset")]
Optimizer = Literal["adamw", "adamw8bit", "schedule_free"]
Token = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s,()\[\]{}:|]+$")]
Advice = tuple[str, str, str, str, bool]  # role, code, sentence, hint, whether it is a warning
Shape = tuple[int, ...]
Shapes = dict[str, dict[str, Shape]]  # component → name → shape of the checkpoint that is trained on
AVERAGE = 4  # bytes of a number of the average, which is fp32
# bytes of what an optimiser knows of a number: AdamW's two moments, in fp32 or 8 bits; schedule_free's z and second one
KNOWN = {"adamw": 8, "adamw8bit": 2, "schedule_free": 8}

# the layers that get updates, as kohya's scripts choose them
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RESIDUAL = ("time_emb_proj", "conv_shortcut")  # matrices of the residual blocks
CONV = ("conv1", "conv2", "conv")  # 3×3, of residual blocks and samplers
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


# settings that decide nothing without another one, and how that is stated
IDLE = {
    "text_learning_rate": ("text_encoder", "text_encoder = true"),
    "conv_alpha": ("conv_rank", "conv_rank = 8"),
    "keep_tokens": ("shuffle", "shuffle = true"),
    "prior_weight": ("prior", 'prior = "…", pictures of the class'),
    "preserve_weight": ("preserve", 'preserve = "…", the word of the class'),
    "trigger": ("preserve", 'preserve = "…", the word of the class'),
}


class Training(Seeded, ABC):
    """The settings that all trainings share."""

    on: On = Field(description="the checkpoint that is trained on")
    dataset: Pictures = Field(description="the pictures that are learned from")
    steps: int = Field(1000, ge=1, le=1_000_000, description="updates of the weights")
    batch: int = Field(4, ge=1, le=4096, description="pictures per step")
    learning_rate: Positive = Field(1e-4, description="of AdamW, after the warm-up")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="constant, or falling to 2 % over the second half of the steps"
    )
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises")
    weight_decay: NotNegative = Field(0.0, description="of AdamW")
    clip: NotNegative = Field(1.0, description="largest norm of the gradient; 0: no limit")
    min_snr: NotNegative = Field(5.0, description="γ of min-SNR weighting (Hang et al. 2023); 0: none")
    noise_from: int = Field(0, ge=0, le=999, description="first timestep that is trained, of 0 … 999")
    caption_dropout: Share = Field(0.0, description="share of captions replaced by the empty one")
    flip: bool = Field(False, description="show pictures mirrored half of the time")
    resolution: int = Field(
        0, ge=0, le=4096, multiple_of=64, description="edge in pixels of a square picture; 0: the checkpoint's own"
    )
    buckets: bool = Field(True, description="keep aspect ratios: pictures are grouped into shapes of equal area")
    prior: Prior = Field(None, description="pictures of the class, which must stay as they are (prior preservation)")
    prior_weight: Annotated[NotNegative, Since(2, 1.0)] = Field(
        1.0, description="of the prior's loss, a mean of its own, against that of the pictures"
    )
    shuffle: Annotated[bool, Since(2, False)] = Field(
        False, description="put the parts of captions (between commas) into another order at every step"
    )
    keep_tokens: Annotated[int, Since(2, 0)] = Field(
        0, ge=0, le=75, description="parts at the front of captions that shuffle leaves in their place"
    )
    noise_offset: Annotated[Share, Since(2, 0.0)] = Field(
        0.0, description="noise that is the same all over a channel, for darker darks and lighter lights"
    )
    ema: Annotated[Share, Since(2, 0.0)] = Field(
        0.0, description="decay of an average of the weights, which is then what is kept; 0: none"
    )
    optimizer: Annotated[Optimizer, Since(2, "adamw")] = Field(
        "adamw", description="adamw; adamw8bit and schedule_free need an extra package"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="type in which the result is kept")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the frozen networks' arithmetic")

    @abstractmethod
    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        """Return how many numbers are trained on a checkpoint of these tensors, and their type while they are."""

    def state_bytes(self, of: Family, shapes: Shapes) -> int:
        """Return the size of a train state: each number, what the optimiser knows of it, and its average."""
        numbers, dtype = self.learns(of, shapes)
        return numbers * (ITEM_SIZE[SAFETENSORS[dtype]] + self.beside())

    def beside(self) -> int:
        """Return how many bytes the optimiser and the average keep of every number."""
        return KNOWN[self.optimizer] + (AVERAGE if self.ema else 0)


class Updates(Training):
    """The settings of trainings of updates beside frozen layers: LoRA and its relatives."""

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
    preserve: Annotated[str, Since(2, "")] = Field(
        "", description="word of the class: with it in the trigger's place, pictures are to be as without the update"
    )
    trigger: Annotated[str, Since(2, "")] = Field("", description="word of the captions that `preserve` replaces")
    preserve_weight: Annotated[NotNegative, Since(2, 1.0)] = Field(
        1.0, description="of what `preserve` asks, against the loss of the pictures"
    )

    @abstractmethod
    def factors(self, weight: Shape, rank: int) -> Iterable[Shape]:
        """Return the shapes of what is trained beside a layer whose weight has this shape."""

    def layers(self, of: Family) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
        """Yield component, endings of layers' names, rank and alpha (the rank where none is stated)."""
        alpha = self.alpha or float(self.rank)
        yield "unet", LINEAR, self.rank, alpha
        if self.conv_rank:
            yield "unet", RESIDUAL, self.rank, alpha
            yield "unet", CONV, self.conv_rank, self.conv_alpha or float(self.conv_rank)
        for encoder in of.text_encoders if self.text_encoder else ():
            yield encoder, TEXT, self.rank, alpha

    def learns(self, of: Family, shapes: Shapes) -> tuple[int, str]:
        numbers = 0
        for component, layers, rank, _ in self.layers(of):
            endings = tuple(f".{layer}.weight" for layer in layers)
            weights = (shape for name, shape in shapes[component].items() if name.endswith(endings))
            numbers += sum(prod(factor) for weight in weights for factor in self.factors(weight, rank))
        return numbers, "fp32"


def numbers_of_rows(vectors: int, of: Family, shapes: Shapes) -> int:
    """Return how many numbers so many rows of a word have in all token tables."""
    return vectors * sum(shapes[encoder][ROWS][1] for encoder in of.text_encoders)


def advise_updates(table: Updates, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """What `preserve` needs to do anything; (role, code, sentence, hint, whether it is a warning)."""
    if not table.preserve:
        return []
    if not table.trigger:
        return [("dataset", "preserve", "`preserve` needs a trigger to replace", 'trigger = "…" beside it', False)]
    (dataset,) = inputs["dataset"]
    captions = [row[1] for row in dataset.notes["rows"]] if dataset else [table.trigger]
    if any(table.trigger in caption for caption in captions):
        return []
    name = f"no caption of `{table.dataset}` names the trigger {table.trigger!r}, which `preserve` would replace"
    return [("dataset", "preserve", name, "write {trigger} in the captions, and trigger = … in the data set", False)]


def advise(table: Any, inputs: dict[str, list[Artifact | None]], *, captions: bool = True) -> list[Advice]:
    """Return what cannot work, or hardly, in any training: mistakes and warnings; captions: whether it reads them."""
    found: list[Advice] = []
    on = next(iter(inputs.get("on", [])), None)
    if on is not None and on.facts.get("zero_terminal_snr") and on.facts.get("prediction", "epsilon") == "epsilon":
        sentence = f"`{table.on}` ends in pure noise (zero terminal SNR), of which ε says nothing"
        found.append(("on", "schedule", sentence, 'prediction = "v_prediction" is what such a base predicts', False))
    if not isinstance(table, Training):
        return found
    if captions:
        found += without("text_encoders", "what learns from captions", str(table.on), inputs)
    if table.warmup >= table.steps:
        sentence = f"the warm-up of {table.warmup} steps is as long as the training, {table.steps}"
        found.append(("warmup", "warmup", sentence, f"warmup = {table.steps // 20}", True))
    for name, (other, hint) in IDLE.items():
        stated = name in table.model_fields_set and getattr(table, name) != type(table).model_fields[name].default
        if stated and not getattr(table, other):
            found.append((name, "idle", f"`{name}` decides nothing without `{other}`", hint, True))
    if table.optimizer == "schedule_free" and table.schedule != "constant":
        sentence = f'schedule_free has no use for a schedule = "{table.schedule}"'
        found.append(("schedule", "schedule", sentence, 'schedule = "constant"', True))
    return found


def never_named(token: str, dataset: str, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse pictures of which no caption names a word that is to be learned, standing by itself."""
    (pictures,) = inputs["dataset"]
    captions = [row[1] for row in pictures.notes["rows"]] if pictures else []
    if any(stands_in(token, caption) for caption in captions):
        return []
    within = any(token in caption for caption in captions)
    sentence = f"no caption of `{dataset}` names the token {token!r}" + (" but within other words" if within else "")
    hint = f'write {{trigger}} in the captions, and trigger = "{token}" in the data set'
    return [("dataset", "token", sentence, hint, False)]


def hides_a_word(token: str, on: str, tokenizer: dict[str, Any], *, warning: bool) -> list[Advice]:
    """Say that a token is a word of the checkpoint already; warning: where it may be meant."""
    sentence = hidden(token, tokenizer, f"`{on}`")
    return [("token", "token", sentence, f'token = "<{token}>"', warning)] if sentence else []


def advise_token(
    table: Any,
    inputs: dict[str, list[Artifact | None]],  # noqa: ARG001 -- one signature for all methods
    tokenizer: dict[str, Any],
) -> list[Advice]:
    """Say that a token is a word already: `insert` takes it only over words that it names."""
    return hides_a_word(table.token, str(table.on), tokenizer, warning=True)


def unguided(what: str, on: str, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse a checkpoint on which classifier-free guidance does nothing."""
    (checkpoint,) = inputs["on"]
    if checkpoint is None or not checkpoint.family or family(checkpoint.family).guided(checkpoint.facts):
        return []
    sentence = f"{what} works through classifier-free guidance, which does nothing on `{on}`"
    return [("on", "guidance", sentence, "take the checkpoint that it was distilled from", False)]


LACKS = {
    "cross_attention": "has no separate keys and values for what it is told",
    "text_encoders": "is shown pictures and understands no words",
}


def without(part: str, what: str, on: str, inputs: dict[str, list[Artifact | None]]) -> list[Advice]:
    """Refuse a checkpoint of a family without a part that a method trains (a property of families that lists it)."""
    (checkpoint,) = inputs["on"]
    if checkpoint is None or not checkpoint.family or getattr(family(checkpoint.family), part):
        return []
    sentence = f"{what} cannot be trained on `{on}`: {family(checkpoint.family).title} {LACKS[part]}"
    return [("on", "family", sentence, "take a checkpoint of another family", False)]
