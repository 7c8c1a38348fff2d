"""Inserting: embeddings become rows of the token table and words of the tokenizer, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.artifact import Artifact
from sdforge.edits import insert
from sdforge.edits.export import run as run_export
from sdforge.edits.insert import ROWS
from sdforge.errors import ActionFailed, InputError, UsageError
from sdforge.formats.safetensors import read_header
from sdforge.formula import Plan
from sdforge.order import Order
from tests.families.workbench import SD15, Taken, keep, made, same_bytes, take

SIZE = 528  # words of the toys' tokenizer
RED, CAT = (f"{word}</w>" for word in ("red", "cat"))


def embedding(work: Path, token: str, vectors: int, *, width: int = 16, dtype: torch.dtype = torch.float32) -> Taken:
    draw = torch.Generator().manual_seed(sum(token.encode()))
    rows = torch.randn(vectors, width, generator=draw).to(dtype)
    return keep(
        work / token.strip("<>"), {"embedding": {"text_encoder": rows}}, kind="embedding", facts={"token": token}
    )


def planned(base: Taken, *embeddings: Taken, over: dict[str, list[str]] | None = None, dtype: str = "") -> Plan:
    names = {str(e.artifact.facts["token"]): e for e in embeddings}
    places = {token: {"over": words} for token, words in (over or {}).items()}
    table = insert.Insert.model_validate(
        {"checkpoint": "base", "embeddings": {f"e{i}": places.get(t, {}) for i, t in enumerate(names)}, "dtype": dtype}
    )
    inputs = [
        replace(each.input(**places.get(token, {})), name=f"e{i}") for i, (token, each) in enumerate(names.items())
    ]
    return insert.plan(table, {"checkpoint": [base.input()], "embeddings": inputs}, SD15)


def rows_of(taken: Taken) -> Tensor:
    return taken.tensors("embedding")["text_encoder"]


@pytest.fixture
def face(tmp_path: Path) -> Taken:
    return embedding(tmp_path, "<face>", 3)


@pytest.fixture
def ink(tmp_path: Path) -> Taken:
    """A word of two vectors with an opposite of three."""
    draw = torch.Generator().manual_seed(5)
    sets = {"embedding": torch.randn(2, 16, generator=draw), "negative": torch.randn(3, 16, generator=draw)}
    facts = {"token": "<ink>", "negative": "<ink-neg>", "guidance": 3.0}
    parts = {component: {"text_encoder": rows} for component, rows in sets.items()}
    return keep(tmp_path / "ink", parts, kind="embedding", facts=facts)


@pytest.fixture
def style(tmp_path: Path) -> Taken:
    return embedding(tmp_path, "<style>", 2)


def test_appended_rows_follow_the_table_and_nothing_else_changes(toy: Taken, face: Taken) -> None:
    plan = planned(toy, face)
    assert plan.facts == {"tokens": [["<face>", 3]]}
    assert set(plan.components) == {"text_encoder"}
    result, before = made(plan, toy, face)["text_encoder"], toy.tensors("text_encoder")
    assert same_bytes(result[ROWS][:SIZE].clone(), before[ROWS])
    assert same_bytes(result[ROWS][SIZE:].clone(), rows_of(face).half())
    assert all(same_bytes(tensor, before[name]) for name, tensor in result.items() if name != ROWS)
    assert [row.tensor.name for row in plan.components["text_encoder"] if row.method] == [ROWS]


def test_the_order_in_which_a_recipe_names_embeddings_is_no_matter(toy: Taken, face: Taken, style: Taken) -> None:
    there, back = planned(toy, face, style), planned(toy, style, face)
    assert there.identities() == back.identities()
    assert there.facts == back.facts == {"tokens": [["<face>", 3], ["<style>", 2]]}
    table = made(there, toy, face, style)["text_encoder"][ROWS]
    assert torch.equal(table[SIZE + 3 :], rows_of(style).half())


def test_words_that_are_there_already_keep_their_rows(toy: Taken, face: Taken, style: Taken, tmp_path: Path) -> None:
    first = planned(toy, style)
    kept = keep(
        tmp_path / "kept", made(first, toy, style), facts=toy.artifact.facts | first.facts, words=toy.vocabulary
    )
    second = planned(kept, face)
    assert second.facts == {"tokens": [["<style>", 2], ["<face>", 3]]}
    table = made(second, kept, face)["text_encoder"][ROWS]
    assert torch.equal(table[SIZE : SIZE + 2], rows_of(style).half())
    assert torch.equal(table[SIZE + 2 :], rows_of(face).half())


def test_words_may_be_overwritten_in_place(toy: Taken, style: Taken) -> None:
    plan = planned(toy, style, over={"<style>": ["cat", "RED"]})
    assert plan.facts == {}
    table, before = made(plan, toy, style)["text_encoder"][ROWS], toy.tensors("text_encoder")[ROWS]
    places = [toy.vocabulary["vocab"][CAT], toy.vocabulary["vocab"][RED]]
    assert torch.equal(table[places], rows_of(style).half())
    others = [i for i in range(SIZE) if i not in places]
    assert same_bytes(table[others], before[others])
    assert table.shape == before.shape


def test_one_may_be_appended_and_another_overwrite(toy: Taken, face: Taken, style: Taken) -> None:
    plan = planned(toy, face, style, over={"<style>": ["cat", "red"]})
    assert plan.facts == {"tokens": [["<face>", 3]]}
    table = made(plan, toy, face, style)["text_encoder"][ROWS]
    assert table.shape[0] == SIZE + 3
    assert torch.equal(table[toy.vocabulary["vocab"][CAT]], rows_of(style)[0].half())
    assert torch.equal(table[SIZE:], rows_of(face).half())


@pytest.mark.parametrize(("dtype", "stored"), [("", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_table_has_the_declared_type(dtype: str, stored: torch.dtype, toy: Taken, face: Taken) -> None:
    table = made(planned(toy, face, dtype=dtype), toy, face)["text_encoder"][ROWS]
    assert table.dtype == stored
    assert torch.equal(table[SIZE:], rows_of(face).to(stored))


def test_a_word_may_not_hide_an_ordinary_one(toy: Taken, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'Cat' is an ordinary word") as caught:
        planned(toy, embedding(tmp_path, "Cat", 1))
    assert caught.value.hint == "call it <Cat>, or overwrite the word with over = ['Cat']"


def test_a_word_may_not_be_a_piece_of_words(toy: Taken, tmp_path: Path) -> None:
    vocabulary = toy.vocabulary["vocab"]
    piece = next(word for word in vocabulary if word.isalpha() and f"{word}</w>" not in vocabulary)
    # transformers would not append it, and prompts would go on reading the piece
    with pytest.raises(UsageError, match="is a piece of words in the checkpoint's tokenizer") as refused:
        planned(toy, embedding(tmp_path / "e", piece, 1))
    assert refused.value.hint == f"call it <{piece}>"


@pytest.mark.parametrize(("first", "rows", "second"), [("<x>", 2, "<x>_1"), ("<x>", 1, "<x>_1"), ("<x>", 3, "<x>_3")])
def test_a_word_may_not_be_called_as_a_row_of_another(
    first: str, rows: int, second: str, toy: Taken, tmp_path: Path
) -> None:
    # a folder names the rows of <x> so, and would be read as that of one word, or not at all
    with pytest.raises(UsageError, match=f"the word '{second}' is called as row"):
        planned(toy, embedding(tmp_path / "a", first, rows), embedding(tmp_path / "b", second, 1))


def test_a_checkpoint_without_a_text_encoder_learns_no_words(toy: Taken, face: Taken) -> None:
    components = {name: each for name, each in toy.artifact.components.items() if not name.startswith("text_")}
    mute = replace(toy, artifact=replace(toy.artifact, components=components))
    with pytest.raises(UsageError, match="has no text encoder that could read '<face>'"):
        planned(mute, face)


def test_a_word_may_not_be_inserted_twice(toy: Taken, face: Taken, tmp_path: Path) -> None:
    plan = planned(toy, face)
    kept = keep(tmp_path / "kept", made(plan, toy, face), facts=plan.facts, words=toy.vocabulary)
    with pytest.raises(UsageError, match="'<face>' is inserted twice"):
        planned(kept, face)


def test_an_embedding_of_another_width_is_refused(toy: Taken, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="24 numbers wide, the checkpoint's words are 16"):
        planned(toy, embedding(tmp_path, "<wide>", 1, width=24))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["cat"], "has 2 vectors, and 1 words"), (["cat", "catred"], "'catred' is not one token")],
)
def test_words_to_overwrite_are_one_token_each_and_one_for_each_row(
    words: list[str], sentence: str, toy: Taken, style: Taken
) -> None:
    with pytest.raises(UsageError, match=sentence):
        planned(toy, style, over={"<style>": words})


def test_the_embedding_that_does_not_fit_its_words_is_named(toy: Taken, face: Taken, style: Taken) -> None:
    with pytest.raises(InputError, match="`e1`: it has 2 vectors, and 1 words") as caught:
        planned(toy, face, style, over={"<style>": ["cat"]})
    assert caught.value.name == "e1"


@pytest.mark.parametrize(
    "over", [{"<style>": ["cat", "CAT"]}, {"<style>": ["cat", "red"], "<face>": ["house", "drawing", "cat"]}]
)
def test_one_word_cannot_be_overwritten_twice(
    over: dict[str, list[str]], toy: Taken, style: Taken, face: Taken
) -> None:
    with pytest.raises(UsageError, match="'cat' is overwritten twice"):
        planned(toy, style, face, over=over)


def test_rows_that_do_not_fit_into_fp16_stop_with_the_tables_name(toy: Taken, tmp_path: Path) -> None:
    big = keep(
        tmp_path, {"embedding": {"text_encoder": torch.full((1, 16), 1e6)}}, kind="embedding", facts={"token": "<b>"}
    )
    with pytest.raises(ActionFailed, match=r"token_embedding\.weight holds 1e\+06"):
        made(planned(toy, big), toy, big)


def exported(work: Path, base: Taken, plan: Plan, *embeddings: Taken) -> Path:
    parts = {part: base.tensors(part) for part in ("unet", "vae")} | made(plan, base, *embeddings)
    kept = keep(work / "kept", parts, facts=base.artifact.facts | plan.facts, words=base.vocabulary)
    settings: dict[str, Any] = {"title": "", "description": "", "licence": "", "trigger": [], "clip_skip": 0}
    (work / "out").mkdir()
    forms = {"forms": ["diffusers", "checkpoint"]}
    order = Order(
        "", "", "export", "edits", "sd15", settings | forms, str(work / "out"), {"checkpoint": [kept.given()]}
    )
    run_export(order, lambda **_: None)
    return work / "out"


def test_stock_diffusers_finds_the_new_words(toy: Taken, face: Taken, style: Taken, tmp_path: Path) -> None:
    out = exported(tmp_path, toy, planned(toy, face, style), face, style)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(out / "diffusers", dtype=torch.float32)
    prompt = pipeline.maybe_convert_prompt("a <face> and <style> cat", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, add_special_tokens=False).input_ids
    assert [i - SIZE for i in ids if i >= SIZE] == [0, 1, 2, 3, 4]
    assert pipeline.text_encoder.config.vocab_size == SIZE + 5
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id == SIZE - 1
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[SIZE : SIZE + 3], rows_of(face).half().float())


def test_stock_diffusers_reads_a_prompt_as_we_do(toy: Taken, face: Taken, tmp_path: Path) -> None:
    from sdforge.families.sd15.load import load

    out = exported(tmp_path, toy, planned(toy, face), face)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(out / "diffusers", dtype=torch.float32)
    ours = load(take(out / "diffusers").given(), torch.device("cpu"), torch.float32)
    theirs, _ = pipeline.encode_prompt("a <face>, red", torch.device("cpu"), 1, False)
    with torch.no_grad():
        assert torch.equal(ours.encode_text(["a <face>, red"]).hidden_BLD, theirs)


def test_a_folder_with_new_words_is_read_as_the_same_checkpoint(toy: Taken, face: Taken, tmp_path: Path) -> None:
    out = exported(tmp_path, toy, planned(toy, face), face)
    again = take(out / "diffusers")
    assert again.artifact.facts["tokens"] == [["<face>", 3]]
    assert again.vocabulary == toy.vocabulary
    assert again.tensors("text_encoder")[ROWS].shape == (SIZE + 3, 16)


def test_a_folder_with_new_words_that_diffusers_saved_anew_is_the_same_checkpoint(
    toy: Taken, face: Taken, style: Taken, tmp_path: Path
) -> None:
    """transformers 5 keeps appended words elsewhere; what is appended next must follow them, rows and numbers alike."""
    out = exported(tmp_path, toy, planned(toy, face), face)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(out / "diffusers", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "saved")
    again = take(tmp_path / "saved")
    assert again.artifact.facts == take(out / "diffusers").artifact.facts
    assert again.identity("text_encoder") == take(out / "diffusers").identity("text_encoder")
    plan = planned(again, style)
    assert plan.facts == {"tokens": [["<face>", 3], ["<style>", 2]]}
    assert torch.equal(made(plan, again, style)["text_encoder"][ROWS][SIZE + 3 :], rows_of(style).half())


@pytest.mark.parametrize("count", [SIZE - 1, SIZE + 1])
def test_a_table_with_more_or_fewer_rows_than_words_is_refused(
    count: int, toy: Taken, style: Taken, tmp_path: Path
) -> None:
    """Where a prompt ends is counted from the last row: pooled, a row too many is the prompt's beginning."""
    out = exported(tmp_path, toy, planned(toy, style, over={"<style>": ["cat", "red"]}), style)
    folder, single = out / "diffusers" / "text_encoder" / "model.safetensors", out / "checkpoint.safetensors"
    rows = torch.ones(count, 16, dtype=torch.float16)
    for path, source, name in (
        (folder, out / "diffusers", ROWS),
        (single, single, f"cond_stage_model.transformer.{ROWS}"),
    ):
        save_file(load_file(path) | {name: rows}, path, read_header(path).metadata)
        with pytest.raises(UsageError, match=f"has {count} rows in its text_encoder and {SIZE} words in its tokenizer"):
            take(source)


def test_a_single_file_has_no_room_for_appended_words(toy: Taken, face: Taken, tmp_path: Path) -> None:
    out = exported(tmp_path, toy, planned(toy, face), face)
    again = take(out / "checkpoint.safetensors")
    assert again.identity("text_encoder") == toy.identity("text_encoder")
    assert "tokens" not in again.artifact.facts


def test_overwritten_words_reach_the_single_file(toy: Taken, style: Taken, tmp_path: Path) -> None:
    out = exported(tmp_path, toy, planned(toy, style, over={"<style>": ["cat", "red"]}), style)
    table = take(out / "checkpoint.safetensors").tensors("text_encoder")[ROWS]
    assert torch.equal(table[toy.vocabulary["vocab"][CAT]], rows_of(style)[0].half())


# -- a word with its opposite ------------------------------------------------------------------------------------------


def test_a_word_brings_its_opposite(toy: Taken, face: Taken, ink: Taken) -> None:
    plan = planned(toy, face, ink)
    assert plan.facts == {"tokens": [["<face>", 3], ["<ink>", 2], ["<ink-neg>", 3]]}
    table = made(plan, toy, face, ink)["text_encoder"][ROWS]
    both = torch.cat([ink.tensors(part)["text_encoder"] for part in ("embedding", "negative")])
    assert torch.equal(table[SIZE + 3 :], both.half())


@pytest.mark.parametrize("count", [2, 5])
def test_words_are_overwritten_by_the_word_and_then_by_its_opposite(count: int, toy: Taken, ink: Taken) -> None:
    words = ["cat", "red", "house", "drawing", "x"][:count]
    plan = planned(toy, ink, over={"<ink>": words})
    assert plan.facts == ({"tokens": [["<ink-neg>", 3]]} if count == 2 else {})
    table = made(plan, toy, ink)["text_encoder"][ROWS]
    both = torch.cat([ink.tensors(part)["text_encoder"] for part in ("embedding", "negative")]).half()
    places = [toy.vocabulary["vocab"][f"{word}</w>"] for word in words]
    assert torch.equal(table[places], both[:count])
    assert torch.equal(table[SIZE:], both[count:])


def test_words_that_reach_only_part_of_the_opposite_are_refused(toy: Taken, ink: Taken) -> None:
    with pytest.raises(UsageError, match=r"has 2 vectors \(and 3 of its negative word\), and 3 words"):
        planned(toy, ink, over={"<ink>": ["cat", "red", "house"]})


def test_an_opposite_may_not_be_inserted_twice(toy: Taken, ink: Taken, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'<ink-neg>' is inserted twice"):
        planned(toy, ink, embedding(tmp_path, "<ink-neg>", 1))


def test_rows_go_to_the_text_encoder_that_they_were_trained_for(toy: Taken, tmp_path: Path) -> None:
    names = {"text_encoder": 16, "text_encoder_2": 24}
    parts = {name: {ROWS: torch.zeros(SIZE, width)} for name, width in names.items()}
    base = keep(tmp_path / "two", parts, words=toy.vocabulary)
    rows = {name: torch.randn(2, width) for name, width in names.items()}
    word = keep(tmp_path / "word", {"embedding": rows}, kind="embedding", facts={"token": "<two>"})
    tables = made(planned(base, word), base, word)
    assert all(torch.equal(tables[name][ROWS][SIZE:], rows[name]) for name in names)
    over = made(planned(base, word, over={"<two>": ["cat", "red"]}), base, word)
    places = [toy.vocabulary["vocab"][CAT], toy.vocabulary["vocab"][RED]]
    assert all(torch.equal(over[name][ROWS][places], rows[name]) for name in names)
    lonely = keep(
        tmp_path / "one",
        {"embedding": {"text_encoder": rows["text_encoder"]}},
        kind="embedding",
        facts={"token": "<one>"},
    )
    with pytest.raises(UsageError, match="'<one>' has no rows for text_encoder_2"):
        planned(base, lonely)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_rows_that_are_no_numbers_or_too_large_stop_with_the_tables_name(
    value: float, toy: Taken, tmp_path: Path
) -> None:
    rows = torch.full((1, 16), value)
    sick = keep(tmp_path / "e", {"embedding": {"text_encoder": rows}}, kind="embedding", facts={"token": "<sick>"})
    with pytest.raises(ActionFailed, match=r"text_encoder\.text_model\.embeddings\.token_embedding\.weight"):
        made(planned(toy, sick), toy, sick)


def test_a_word_that_would_be_hidden_is_refused_before_it_is_trained(toy: Taken) -> None:
    foretold = {"one": {"token": "<face>"}, "two": {"token": "Cat"}, "pair": {"token": "<ink>", "negative": "red"}}
    inputs = [Artifact("embedding", facts=facts) for facts in foretold.values()]  # type: ignore[arg-type]

    def said(**over: list[str]) -> list[tuple[str, str]]:
        places = {name: {"over": over.get(name, [])} for name in foretold}
        table = insert.Insert.model_validate({"checkpoint": "base", "embeddings": places})
        found = insert.advise_words(table, {"embeddings": [*inputs]}, toy.vocabulary)
        return [(role, sentence.partition(" ")[0]) for role, _, sentence, _, _ in found]

    assert said() == [("embeddings.two", "'Cat'"), ("embeddings.pair", "'red'")]
    assert said(two=["cat"], pair=["red", "cat"]) == []


def test_what_an_embedding_that_is_not_there_is_called_is_not_talked_about(toy: Taken) -> None:
    table = insert.Insert.model_validate({"checkpoint": "base", "embeddings": {"one": {}}})
    assert insert.advise_words(table, {"embeddings": [None]}, toy.vocabulary) == []
