"""A checkpoint with parts of others: components move with the facts that belong to them, and nothing is computed.

What they come from may be one network alone, which is of no family and states little: then the facts hold of what was
there, and only its like makes room (one of SDXL's text encoders leaves the other where it is).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sdforge.artifact import WORDS, Artifact
from sdforge.errors import counted
from sdforge.families import Family
from sdforge.identity import canonical

TOKENS = "tokens"  # the fact that says which words the rows of a text encoder have besides the vocabulary


def parts(artifact: Artifact, moves: tuple[str, ...]) -> list[str]:
    """Return the components that move, by how their names begin."""
    return [name for name in artifact.components if name.startswith(moves)]


def immovable(name: str, artifact: Artifact, moves: tuple[str, ...], family: Family) -> Iterator[str]:
    """Yield why an artifact that a recipe calls `name` cannot give what is asked for."""
    taken = parts(artifact, moves)
    if not any(part.startswith(moves[0]) for part in taken):
        yield f"`{name}` has no {moves[0]}"
    for part in taken:
        if part not in (*family.networks, "tokenizer"):
            yield f"`{name}` is a {part}, and {family.title} has none"


def miscounted(name: str, checkpoint: Artifact, artifact: Artifact, moves: tuple[str, ...]) -> Iterator[str]:
    """Yield that a tokenizer has another number of words than those text encoders read with which it would be."""
    theirs, ours = artifact.notes.get(WORDS, 0), checkpoint.notes.get(WORDS, 0)
    if moves == ("tokenizer",) and theirs and ours and theirs != ours:
        yield f"`{name}` has {counted(theirs, 'word')}, and the text encoders have rows for {ours}"


def moved_into(checkpoint: Artifact, artifact: Artifact, moves: tuple[str, ...], family: Family) -> Artifact:
    """Return a checkpoint with parts of an artifact in the place of its own."""
    taken = parts(artifact, moves)
    stay = {
        name: component
        for name, component in checkpoint.components.items()
        if not name.startswith(moves) or (not artifact.family and name not in taken)
    }
    going = {fact for fact, owner in family.owners.items() if _goes(fact, owner, moves)}
    # a network alone says nothing of most facts, but brings the rows of its words
    stated = going if artifact.family else going & {*artifact.facts, TOKENS}
    facts = {fact: value for fact, value in checkpoint.facts.items() if fact not in stated}
    facts |= {fact: artifact.facts[fact] for fact in stated if fact in artifact.facts}
    widths = checkpoint.notes.get("widths", {}) | artifact.notes.get("widths", {})
    words = {WORDS: artifact.notes[WORDS]} if "text_encoder" in taken and WORDS in artifact.notes else {}
    return replace(
        checkpoint,
        components=stay | {name: artifact.components[name] for name in taken},
        facts=family.stated(facts),
        notes=checkpoint.notes | {"widths": widths} | words,
    )


def _goes(fact: str, owner: str, moves: tuple[str, ...]) -> bool:
    """Say whether a fact moves: those of all text encoders belong to `text_encoder`, the second one's end in `_2`."""
    return owner in moves or (fact.endswith("_2") and f"{owner}_2" in moves)


def words_of(checkpoint: Artifact) -> tuple[str, str]:
    """Name the words that a checkpoint's text encoders read: its vocabulary, and what was appended to it."""
    vocabulary = checkpoint.components.get("tokenizer")
    return vocabulary.identity if vocabulary else "", canonical(checkpoint.facts.get(TOKENS, []))
