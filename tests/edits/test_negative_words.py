"""A word for the negative prompt does nothing until it stands there: that is noticed before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from sdforge.artifact import Artifact
from sdforge.edits.export import Export, advise
from tests.conftest import Project

BAD: dict[str, Any] = {"token": "<bad>", "polarity": "negative"}
INK: dict[str, Any] = {"token": "<ink>", "negative": "<ink-neg>", "guidance": 3.0}


def advice(negative_prompt: str, *facts: dict[str, Any] | None) -> list[str]:
    names = [f"e{i}" for i in range(len(facts))]
    table = Export(checkpoint="b", embeddings={n: {} for n in names}, negative_prompt=negative_prompt)  # type: ignore[misc]
    embeddings = [None if each is None else Artifact("embedding", facts=each) for each in facts]
    return [f"{row[0]} {row[3]}" for row in advise(table, {"checkpoint": [None], "embeddings": embeddings})]


@pytest.mark.parametrize(("facts", "word"), [(BAD, "<bad>"), (INK, "<ink-neg>")])
def test_a_negative_prompt_that_does_not_name_the_word_is_noticed(facts: dict[str, Any], word: str) -> None:
    assert advice("", facts) == [f'embeddings.e0 [preset] negative_prompt = "{word}"']
    assert advice("lowres", {"token": "<x>"}, facts) == [f'embeddings.e1 [preset] negative_prompt = "lowres, {word}"']
    assert advice(f"lowres, {word}", facts) == []


def test_a_word_within_another_is_not_the_word() -> None:
    bad = {"token": "bad", "polarity": "negative"}
    assert len(advice("badly, abad", bad)) == 1
    assert advice("badly, bad", bad) == []


def test_words_for_the_prompt_and_what_is_not_known_yet_are_no_matter() -> None:
    assert advice("", {"token": "<x>"}, None) == []


TRAINED = """\
family = "sd15"
[dreamartist.ink]
on = "base"
dataset = "drawings"
token = "<toy>"
[preset]
checkpoint = "base"
insert = ["ink"]
"""


def test_check_points_at_the_insertion_before_anything_is_trained(project: Project) -> None:
    project.recipe.write_text(TRAINED)
    said = project.forge("check").err
    assert "'<toy-neg>' for negative prompts" in said
    assert "toy.toml:8" in said
    project.edit('checkpoint = "base"\ninsert', 'checkpoint = "base"\nnegative_prompt = "<toy-neg>"\ninsert')
    assert "<toy-neg>" not in project.forge("check").err
