"""Textual inversion: rows of one new word, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sdforge.artifact import Artifact
from sdforge.families.sd15.load import load
from sdforge.method import method
from sdforge.order import Given
from sdforge.run.adapter import Adapter
from sdforge.run.diffusion import Diffusion, TokenTable
from sdforge.trainings.textual_inversion import TABLE, advise
from sdforge.trainings.textual_inversion.adapter import begin
from tests.families.workbench import Taken, digest
from tests.run.order import order, settings, train
from tests.trainings.test_training_contract import batch, parameters, said

SIZE = 528  # words of the toys' tokenizer


def begun(on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return diffusion, begin(TABLE.model_construct(**settings("textual_inversion", **changes)), diffusion)


def rows(adapter: Adapter) -> torch.Tensor:
    (found,) = parameters(adapter).values()
    return found.detach()


@pytest.mark.parametrize("vectors", [1, 3, 8])
def test_a_word_is_as_many_tokens_as_it_has_vectors(vectors: int, toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=vectors)
    assert rows(adapter).shape == (vectors, 16)
    ids = diffusion.words.encode("a <toy>, red")
    assert ids[2 : 2 + vectors] == list(range(SIZE, SIZE + vectors))


def test_rows_begin_as_the_words_of_init_in_turns(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=5, init="red cat")
    table, vocabulary = diffusion.token_tables()["text_encoder"].weight, toy.vocabulary["vocab"]
    words = [table[vocabulary[f"{word}</w>"]] for word in ("red", "cat", "red", "cat", "red")]
    assert torch.equal(rows(adapter), torch.stack(words))


def test_rows_begin_as_those_of_a_word_that_was_inserted_before(toy: Taken) -> None:
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    table, hat = diffusion.token_tables()["text_encoder"], torch.randn(2, 16)
    table.weight = torch.nn.Parameter(torch.cat([table.weight, hat]), requires_grad=False)
    diffusion.words.add("<hat>", 2)
    adapter = begin(TABLE.model_construct(**settings("textual_inversion", vectors=3, init="<hat> red")), diffusion)
    assert torch.equal(rows(adapter)[:2], hat)
    assert torch.equal(rows(adapter)[2], table.weight[toy.vocabulary["vocab"]["red</w>"]])


def test_rows_begin_as_noise_as_wide_as_the_table_where_there_is_no_init(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=64)
    table = diffusion.token_tables()["text_encoder"].weight
    assert float(rows(adapter).std() / table.std()) == pytest.approx(1, rel=0.1)


def test_every_row_is_trained_and_the_table_never(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=4)
    table, before = diffusion.token_tables()["text_encoder"], rows(adapter).clone()
    whole = digest(table.weight)
    optimizer = torch.optim.AdamW(parameters(adapter).values(), lr=0.01, weight_decay=0.1)
    (said(diffusion, adapter) - batch().target_BCHW).square().mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert bool((rows(adapter) != before).any(1).all())
    assert table.weight.grad is None
    assert digest(table.weight) == whole


def test_a_caption_without_the_word_says_nothing_about_it(toy: Taken) -> None:
    diffusion, adapter = begun(toy)
    one = batch(["a cat", "a house"])
    loss = adapter.predict(one, diffusion.encode_text(one.captions)).square().mean()
    assert (
        torch.autograd.grad(loss, list(parameters(adapter).values()), allow_unused=True, materialize_grads=True)[0]
        .abs()
        .max()
        == 0
    )


def test_the_word_and_its_polarity_are_facts(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    outcome = train(order(tmp_path / "a", "textual_inversion", toy, pictures, steps=1, vectors=2))
    assert outcome.facts == {"token": "<toy>"}
    ((name, dtype, shape, *_),) = outcome.components["embedding"]
    assert (name, dtype, shape) == ("text_encoder", "F32", [2, 16])
    negative = order(tmp_path / "b", "textual_inversion", toy, pictures, steps=1, polarity="negative")
    assert train(negative).facts == {"token": "<toy>", "polarity": "negative"}


def test_a_checkpoint_with_inserted_words_gets_its_new_rows_behind_them(toy: Taken) -> None:
    table = toy.tensors("text_encoder")["text_model.embeddings.token_embedding.weight"]
    diffusion, _ = begun(toy)
    diffusion.words.add("<more>", 2)
    assert diffusion.words.encode("<more>")[1:3] == [SIZE + 4, SIZE + 5]
    assert table.shape[0] == SIZE


@pytest.mark.parametrize("token", ["two words", "a:b", "(toy)", "[toy]", "", "x" * 65, "a|b", "{t}"])
def test_a_token_that_prompts_cannot_hold_is_refused(token: str) -> None:
    with pytest.raises(ValidationError):
        TABLE.model_validate({"on": "base", "dataset": "drawings", "token": token})


def _advice(*captions: str) -> list[Any]:
    table = TABLE.model_validate({"on": "base", "dataset": "drawings", "token": "<toy>"})
    dataset = Artifact("dataset", whole="x", notes={"rows": [[str(i), text, 1] for i, text in enumerate(captions)]})
    return advise(table, {"on": [None], "dataset": [dataset]})


def test_captions_that_never_name_the_word_are_noticed_before_hours_are_spent() -> None:
    ((role, code, sentence, hint, warning),) = _advice("a cat", "a house")
    assert (role, code, warning) == ("dataset", "token", False)
    assert "<toy>" in sentence
    assert 'trigger = "<toy>"' in hint
    assert _advice("a cat", "a <toy>") == []


@pytest.mark.parametrize("name", ["textual_inversion", "dreamartist"])
def test_a_token_that_is_a_word_already_is_noticed(name: str, toy: Taken) -> None:
    found, stated = method(name), {"on": "base", "dataset": "drawings"}
    ((role, code, sentence, hint, warning),) = found.module.advise_words(
        found.table.model_validate(stated | {"token": "cat"}), {}, toy.vocabulary
    )
    assert (role, code, hint, warning) == ("token", "token", 'token = "<cat>"', True)
    assert sentence == "'cat' is an ordinary word of `base`; as a token it would hide that word"
    assert not found.module.advise_words(found.table.model_validate(stated | {"token": "<cat>"}), {}, toy.vocabulary)


def test_no_row_grows_beyond_the_longest(toy: Taken) -> None:
    diffusion, adapter = begun(toy, vectors=2, longest=2.0)
    median = float(diffusion.token_tables()["text_encoder"].weight.norm(dim=1).median())
    with torch.no_grad():
        rows(adapter)[0].mul_(1000)
        rows(adapter)[1].mul_(0.5 * median / rows(adapter)[1].norm())
    adapter.stepped(0)
    assert rows(adapter).norm(dim=1).tolist() == pytest.approx([2 * median, 0.5 * median], rel=1e-4)


def test_every_text_encoder_has_rows_of_its_own(toy: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    wide = TokenTable(torch.randn(SIZE, 24, generator=torch.Generator().manual_seed(0)))
    tables = {**diffusion.token_tables(), "text_encoder_2": wide}
    monkeypatch.setattr(type(diffusion), "token_tables", lambda _: tables)
    adapter = begin(TABLE.model_construct(**settings("textual_inversion", vectors=2, init="red")), diffusion)
    red = toy.vocabulary["vocab"]["red</w>"]
    found = adapter.learned().components["embedding"]
    assert set(found) == {"text_encoder", "text_encoder_2"}
    assert torch.equal(found["text_encoder_2"], wide.weight[red].expand(2, -1))
    assert torch.equal(wide(torch.tensor([[SIZE, red]]))[0, 0], wide.weight[red])
    (group,) = adapter.groups()
    assert {tuple(p.shape) for p in group.parameters.values()} == {(2, 16), (2, 24)}
