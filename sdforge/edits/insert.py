"""Embeddings become words of a checkpoint: rows behind the vocabulary, or in the place of words that are given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, final

from pydantic import Field

from sdforge.artifact import Artifact, Tensor
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.families.stable_diffusion import TABLE as TOKEN_TABLE
from sdforge.formats.embedding import words_of
from sdforge.formats.tokenizer import hidden, is_ordinary
from sdforge.formula import Input, Made, Plan, computed, passes, target_dtype
from sdforge.identity import Json
from sdforge.settings import Reference, Table, Takes, Target

if TYPE_CHECKING:
    import torch

VERSION = 1
MAKES = "checkpoint"
WHOSE = "the checkpoint's tokenizer"
ROWS = TOKEN_TABLE


@final
class Place(Table):
    """Where an embedding goes: behind the vocabulary, or over one-token words that are lost by it."""

    over: list[str] = Field(
        [], max_length=128, description="words to overwrite, one for each vector (a negative word's come last, or none)"
    )


@final
class Insert(Target):
    """Append rows to the token table (and the word to the tokenizer), or overwrite rows of existing words.

    An embedding with a word for the negative prompt brings both words. Appended words exist in diffusers folders; a
    single file has no room for them and gets a file beside it.
    """

    checkpoint: Annotated[Reference, Takes("checkpoint", ("text_encoder", "tokenizer"), ("tokens",))]
    embeddings: Annotated[dict[Reference, Place], Field(min_length=1), Takes("embedding")]


TABLE = Insert


def advise_words(
    table: Insert, inputs: dict[str, list[Artifact | None]], tokenizer: dict[str, Any]
) -> list[tuple[str, str, str, str, bool]]:
    """Refuse what would hide a word of the checkpoint before it is trained; (role, code, sentence, hint, False)."""
    named = zip(table.embeddings.items(), inputs.get("embeddings", []), strict=True)
    appended = {name: words_of(each.facts).values() for (name, place), each in named if each and not place.over}
    return [
        (f"embeddings.{name}", "token", sentence, _way_out(word, tokenizer), False)
        for name, words in appended.items()
        for word in words
        if (sentence := hidden(word, tokenizer, WHOSE))
    ]


class Word(NamedTuple):
    """A word with its rows (text encoder → tensor), and the words that they overwrite: as many, or none."""

    word: str
    rows: dict[str, Tensor]
    over: list[str]

    @property
    def vectors(self) -> int:
        return next(iter(self.rows.values())).shape[0]


def plan(table: Insert, inputs: dict[str, list[Input]], family: Family) -> Plan:  # noqa: ARG001 -- the widths say it
    """Return the new token tables. Raises UsageError for widths or words that do not fit."""
    (checkpoint,) = inputs["checkpoint"]
    embeddings = sorted(inputs["embeddings"], key=lambda each: str(each.artifact.facts["token"]))
    _refuse_twice([word.lower() for each in embeddings for word in each.use.get("over", [])])
    words: list[Word] = []
    for each in embeddings:
        with each.named():
            words += _words(each)
    tables, facts = with_words(checkpoint, words, table.dtype)
    result = Plan(facts=facts)
    for encoder, made in tables.items():
        result.components[encoder] = [
            made if tensor.name == ROWS else passes(tensor) for tensor in checkpoint.tensors(encoder).values()
        ]
    return result


def with_words(checkpoint: Input, words: list[Word], dtype: str) -> tuple[dict[str, Made], dict[str, Json]]:
    """Return text encoder → its token table with words in it, and the facts that say so.

    Raises UsageError for widths or words that do not fit, and for a checkpoint that reads no words.
    """
    encoders = [name for name in checkpoint.artifact.components if name.startswith("text_encoder")]
    if words and not encoders:
        sentence = f"the checkpoint has no text encoder that could read {words[0].word!r}"
        raise UsageError(sentence, hint="take one from another checkpoint with [swap.NAME]")
    tokens: Any = checkpoint.artifact.facts.get("tokens", [])
    known = [word for word, _ in tokens]
    appended: list[Any] = []
    for each in words:
        if each.word in known:
            raise UsageError(f"the word {each.word!r} is inserted twice", hint="give one of them another token")
        known.append(each.word)
        if not each.over:
            _refuse_word(each.word, checkpoint)
            appended.append([each.word, each.vectors])
    _refuse_row_names(tokens, appended)
    tables = {
        encoder: _inserted(dtype, checkpoint, encoder, checkpoint.tensors(encoder)[ROWS], words) for encoder in encoders
    }
    return tables, {"tokens": [*tokens, *appended]} if appended else {}


def _words(embedding: Input) -> list[Word]:
    """Return the words of an embedding; those to overwrite go to them in turn, and need not reach the negative one."""
    named = words_of(embedding.artifact.facts)
    found = [Word(word, embedding.tensors(component), []) for component, word in named.items()]
    over: list[str] = list(embedding.use.get("over", []))
    if not over:
        return found
    counts = [word.vectors for word in found]
    if len(over) not in (counts[0], sum(counts)):
        either = f"{counts[0]} vectors" + (f" (and {counts[1]} of its negative word)" if counts[1:] else "")
        raise UsageError(f"it has {either}, and {len(over)} words are named to be overwritten")
    starts = [0, *counts]
    return [
        word._replace(over=over[start : start + word.vectors]) for word, start in zip(found, starts[:-1], strict=True)
    ]


def _refuse_twice(words: list[str]) -> None:
    twice = next((word for word in words if words.count(word) > 1), "")
    if twice:
        raise UsageError(f"the word {twice!r} is overwritten twice", hint="name another word for each vector")


def _refuse_word(word: str, checkpoint: Input) -> None:
    tokenizer = checkpoint.tokenizer()
    if sentence := hidden(word, tokenizer, WHOSE):
        raise UsageError(sentence, _way_out(word, tokenizer))


def _way_out(word: str, tokenizer: dict[str, Any]) -> str:
    """Return what can be done about a word that the checkpoint has already."""
    over = f", or overwrite the word with over = [{word!r}]" if is_ordinary(word, tokenizer) else ""
    return f"call it <{word}>{over}"


def _refuse_row_names(tokens: list[Any], appended: list[Any]) -> None:
    """Refuse a word that is called as a further row of another one (`<x>_1` of `<x>`), or as the next would be."""
    words, new = [*tokens, *appended], {word for word, _ in appended}
    names = {word for word, _ in words}
    for word, count in words:
        for row in range(1, count + 1):
            other = f"{word}_{row}"
            if other in names and {word, other} & new:
                raise UsageError(
                    f"the word {other!r} is called as row {row + 1} of {word!r} is, or would be",
                    hint="give one of them another token",
                )


def _inserted(dtype: str, checkpoint: Input, encoder: str, tensor: Tensor, words: list[Word]) -> Made:
    inputs, places, total = [tensor], [], tensor.shape[0]
    for each in words:
        rows = each.rows.get(encoder)
        if rows is None:
            raise UsageError(f"the embedding {each.word!r} has no rows for {encoder}")
        if rows.shape[1] != tensor.shape[1]:
            raise UsageError(
                f"the embedding {each.word!r} is {rows.shape[1]} numbers wide, the checkpoint's words are "
                f"{tensor.shape[1]}",
                hint="it was made for another family",
            )
        inputs.append(rows)
        places.append(_ids(each.over, checkpoint))
        total += 0 if each.over else rows.shape[0]
    target = target_dtype(dtype, tensor)
    return computed("insert", VERSION, ROWS, target, (total, tensor.shape[1]), inputs, {"over": places})


def _ids(words: list[str], checkpoint: Input) -> list[int]:
    """Return the numbers of the words to overwrite; each must be one token."""
    tokenizer = checkpoint.tokenizer()
    missing = [word for word in words if not is_ordinary(word, tokenizer)]
    if missing:
        raise UsageError(f"{missing[0]!r} is not one token of the checkpoint's tokenizer", hint="choose another word")
    return [tokenizer["vocab"][f"{word.lower()}</w>"] for word in words]


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
