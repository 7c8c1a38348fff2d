"""Embeddings become words of a checkpoint: rows behind the vocabulary, or in the place of words that are given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from sdforge.artifact import Tensor
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formula import Input, Plan, computed, passes, target_dtype
from sdforge.settings import Reference, Table, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"
ROWS = "text_model.embeddings.token_embedding.weight"


@final
class Place(Table):
    """Where an embedding goes: behind the vocabulary, or over one-token words that are lost by it."""

    over: list[str] = Field([], max_length=64, description="words to overwrite, one for each vector")


@final
class Insert(Target):
    """Append rows to the token table (and the word to the tokenizer), or overwrite rows of existing words.

    Appended words exist in diffusers folders; a single file has no room for them and gets a file beside it.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("text_encoder", "tokenizer"), ("tokens",))]
    embeddings: Annotated[dict[Reference, Place], Field(min_length=1), Takes("embedding")]


TABLE = Insert


def plan(table: Insert, inputs: dict[str, list[Input]], family: Family) -> Plan:  # noqa: ARG001 -- the widths say it
    """Return the new token tables. Raises UsageError for widths or words that do not fit."""
    (checkpoint,) = inputs["checkpoint"]
    embeddings = sorted(inputs["embeddings"], key=lambda each: str(each.artifact.facts["token"]))
    tokens: Any = checkpoint.artifact.facts.get("tokens", [])
    known = [word for word, _ in tokens]
    _refuse_twice([word.lower() for each in embeddings for word in each.use.get("over", [])])
    appended: list[Any] = []
    for each in embeddings:
        word = str(each.artifact.facts["token"])
        if word in known:
            raise UsageError(f"the word {word!r} is inserted twice", hint="give one of the embeddings another token")
        known.append(word)
        if not each.use.get("over"):
            _refuse_word(word, checkpoint)
            count = next(iter(each.tensors("embedding").values())).shape[0]
            appended.append([word, count])
    result = Plan()
    encoders = [name for name in checkpoint.artifact.components if name.startswith("text_encoder")]
    for encoder in encoders:
        result.components[encoder] = [
            _inserted(table, checkpoint, encoder, tensor, embeddings) if tensor.name == ROWS else passes(tensor)
            for tensor in checkpoint.tensors(encoder).values()
        ]
    if appended:
        result.facts["tokens"] = [*tokens, *appended]
    return result


def _refuse_twice(words: list[str]) -> None:
    twice = next((word for word in words if words.count(word) > 1), "")
    if twice:
        raise UsageError(f"the word {twice!r} is overwritten twice", hint="name another word for each vector")


def _refuse_word(word: str, checkpoint: Input) -> None:
    vocabulary = checkpoint.tokenizer().get("vocab", {})
    if f"{word.lower()}</w>" in vocabulary:
        raise UsageError(
            f"{word!r} is an ordinary word of the checkpoint's tokenizer; as a token it would hide that word",
            hint=f"call it <{word}>, or overwrite the word with over = [{word!r}]",
        )


def _inserted(table: Insert, checkpoint: Input, encoder: str, tensor: Tensor, embeddings: list[Input]) -> Any:
    taken = {id(each): each.tensors("embedding").get(encoder) for each in embeddings}
    inputs, places, total = [tensor], [], tensor.shape[0]
    for each in embeddings:
        rows = taken[id(each)]
        word = each.artifact.facts["token"]
        if rows is None:
            raise UsageError(f"the embedding {word!r} has no rows for {encoder}")
        if rows.shape[1] != tensor.shape[1]:
            raise UsageError(
                f"the embedding {word!r} is {rows.shape[1]} numbers wide, the checkpoint's words are {tensor.shape[1]}",
                hint="it was made for another family",
            )
        inputs.append(rows)
        over = each.use.get("over", [])
        places.append(_ids(over, rows.shape[0], checkpoint))
        total += 0 if over else rows.shape[0]
    target = target_dtype(table.dtype, tensor)
    return computed("insert", VERSION, ROWS, target, (total, tensor.shape[1]), inputs, {"over": places})


def _ids(words: list[str], count: int, checkpoint: Input) -> list[int]:
    """Return the numbers of the words to overwrite; each must be one token, and there must be one for each row."""
    if not words:
        return []
    vocabulary = checkpoint.tokenizer().get("vocab", {})
    missing = [word for word in words if f"{word.lower()}</w>" not in vocabulary]
    if missing:
        raise UsageError(f"{missing[0]!r} is not one token of the checkpoint's tokenizer", hint="choose another word")
    if len(words) != count:
        raise UsageError(f"the embedding has {count} vectors, and {len(words)} words are named to be overwritten")
    return [vocabulary[f"{word.lower()}</w>"] for word in words]


def compute(parameters: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the token table with rows written over words or appended; the rounding is the engine's."""
    import torch

    table, *embeddings = (tensor.to(torch.promote_types(torch.float32, dtype)) for tensor in tensors)
    result = table.clone()
    for rows, places in zip(embeddings, parameters["over"], strict=True):
        if places:
            result[places] = rows
        else:
            result = torch.cat([result, rows])
    return result
