"""CLIP's vocabularies: read from either layout, named by content, written so that every word stays one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdforge.errors import UsageError
from sdforge.formats.tokenizer import (
    END,
    LENGTH,
    MOST_BYTES,
    read_tokenizer,
    row_words,
    tokenizer_files,
    tokenizer_identity,
)
from sdforge.run.tokens import Words
from tests.families.workbench import vocabulary

ADDED: list[list[Any]] = [["<toy>", 3], ["EasyNegative", 2], ["mytoy", 1]]
PROMPTS = ("a red cat", "A RED  House!", "", "über 7 naïve drawing…", "the <toy> of cats", "猫 and 👍🏽", "x " * 200)


def write(folder: Path, added: list[list[Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files(vocabulary(), added).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    files: list[Path] = []
    found = read_tokenizer(write(tmp_path / "t", ADDED), files)
    assert found == {**vocabulary(), "added": ADDED}
    assert {path.name for path in files} == {"vocab.json", "merges.txt", "added_tokens.json"}


def test_the_layout_of_transformers_5_is_read_as_the_same_words(tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(write(tmp_path / "t", [])).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    found = read_tokenizer(tmp_path / "new", [])
    assert found is not None
    assert tokenizer_identity(found) == tokenizer_identity(vocabulary())


def test_words_that_transformers_5_appended_are_read_from_its_one_file(tmp_path: Path) -> None:
    """It writes no added_tokens.json: without them what is appended next would be called by their rows' numbers."""
    CLIPTokenizer.from_pretrained(write(tmp_path / "t", ADDED)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "added_tokens.json").exists()
    files: list[Path] = []
    found = read_tokenizer(tmp_path / "new", files)
    assert found == {**vocabulary(), "added": ADDED}
    assert files == [tmp_path / "new" / "tokenizer.json"]


def test_the_files_that_transformers_4_looks_for_are_written(tmp_path: Path) -> None:
    """Its tokenizers in Python know no tokenizer.json; a word whose number stands nowhere would be spelled out."""
    folder, size = write(tmp_path / "t", ADDED), len(vocabulary()["vocab"])
    assert json.loads((folder / "vocab.json").read_text()) == vocabulary()["vocab"]
    assert (folder / "merges.txt").read_text().splitlines() == ["#version: 0.2", *vocabulary()["merges"]]
    assert json.loads((folder / "added_tokens.json").read_text()) == {
        "<toy>": size,
        "<toy>_1": size + 1,
        "<toy>_2": size + 2,
        "EasyNegative": size + 3,
        "EasyNegative_1": size + 4,
        "mytoy": size + 5,
    }
    assert {path.name for path in folder.iterdir()} == {
        *("vocab.json", "merges.txt", "added_tokens.json"),
        *("special_tokens_map.json", "tokenizer_config.json"),
    }


def test_no_folder_is_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path / "nothing", []) is None


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_become_the_numbers_that_transformers_gives(prompt: str, tmp_path: Path) -> None:
    stock = CLIPTokenizer.from_pretrained(write(tmp_path / "t", []))
    ours = Words(vocabulary(), []).encode(prompt)
    assert ours == stock(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids


def test_a_prompt_fills_as_many_places_as_a_text_encoder_has(tmp_path: Path) -> None:
    """Programs pad and cut to `model_max_length`; without it transformers would take any length."""
    stock = CLIPTokenizer.from_pretrained(write(tmp_path / "t", []))
    assert stock.model_max_length == 77
    assert len(stock("red " * 100, padding="max_length", truncation=True).input_ids) == 77


def test_appended_words_become_their_rows(tmp_path: Path) -> None:
    words, size = Words(vocabulary(), ADDED), len(vocabulary()["vocab"])
    stock = CLIPTokenizer.from_pretrained(write(tmp_path / "t", ADDED))
    ids = words.encode("a <toy> EasyNegative cat")
    assert ids[2:7] == [size, size + 1, size + 2, size + 3, size + 4]
    spelled = "a <toy> <toy>_1 <toy>_2 EasyNegative EasyNegative_1 cat"
    assert ids == stock(spelled, padding="max_length", max_length=LENGTH).input_ids


@pytest.mark.parametrize("text", ["mytoy2", "amytoy", "mytoy_1", "easynegative", "<toys>"])
def test_a_word_is_not_found_within_another_nor_in_other_letters(text: str, tmp_path: Path) -> None:
    words, size = Words(vocabulary(), ADDED), len(vocabulary()["vocab"])
    assert max(words.encode(f"a {text} cat")) < size
    stock = CLIPTokenizer.from_pretrained(write(tmp_path / "t", [["mytoy", 1], ["EasyNegative", 2], ["<toy>", 1]]))
    assert text == "mytoy_1" or max(stock(f"a {text} cat").input_ids) < size


def test_a_word_beside_punctuation_is_found() -> None:
    words, size = Words(vocabulary(), ADDED), len(vocabulary()["vocab"])
    assert size + 5 in words.encode("(mytoy, cat)")
    assert words.encode("<toy><toy>").count(size) == 2


def test_a_long_prompt_is_cut_at_75_tokens_and_ended() -> None:
    words = Words(vocabulary(), ADDED)
    ids = words.encode("<toy> " * 40)
    assert len(ids) == LENGTH
    assert ids[-1] == vocabulary()["vocab"][END]
    assert len(set(ids[1:76])) == 3


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.from_regex(r"<[a-z]{1,6}>", fullmatch=True), st.integers(1, 5)), unique_by=lambda r: r[0]))
def test_rows_and_words_are_counted_alike(tmp_path: Path, added: list[tuple[str, int]]) -> None:
    rows = [list(row) for row in added]
    assert len(set(row_words(rows))) == sum(count for _, count in added)
    found = read_tokenizer(write(tmp_path / f"t{len(list(tmp_path.iterdir()))}", rows), [])
    assert found is not None
    assert found["added"] == rows


def test_the_identity_knows_words_and_merges_and_nothing_else(tmp_path: Path) -> None:
    plain, found = vocabulary(), read_tokenizer(write(tmp_path / "t", ADDED), [])
    assert found is not None
    assert tokenizer_identity(found) == tokenizer_identity(plain)
    assert tokenizer_identity({**plain, "merges": plain["merges"][::-1]}) != tokenizer_identity(plain)
    turned = {"vocab": dict(reversed(plain["vocab"].items())), "merges": plain["merges"]}
    assert tokenizer_identity(turned) == tokenizer_identity(plain)


def _without_end(vocab: dict[str, int]) -> dict[str, int]:
    return {word: i for i, word in enumerate(w for w in vocab if w != END)}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", json.dumps(_without_end(vocabulary()["vocab"]))),
        ("vocab.json", json.dumps({**vocabulary()["vocab"], "one more": 9999})),
        ("vocab.json", json.dumps({**vocabulary()["vocab"], "!": "0"})),
        ("vocab.json", json.dumps({**vocabulary()["vocab"], "!": 0.0})),
        ("added_tokens.json", json.dumps({"<toy>": 9999})),
        ("added_tokens.json", "[1]"),
        ("added_tokens.json", '{"<toy>": "x"}'),
        ("added_tokens.json", "[" * 100_000),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [{"id": 528}]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 529, "content": "<toy>"}]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 528, "content": 1}]}'),
    ],
)
def test_files_that_do_not_fit_together_are_refused(file: str, text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "t", [])
    (folder / file).write_text(text)
    with pytest.raises(UsageError, match="is no CLIP tokenizer"):
        read_tokenizer(folder, [])


def test_a_folder_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds neither"):
        read_tokenizer(tmp_path, [])


def test_a_file_larger_than_any_tokenizers_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", [])
    os.truncate(folder / "vocab.json", MOST_BYTES + 1)
    with pytest.raises(UsageError, match=r"vocab\.json has more than"):
        read_tokenizer(folder, [])
