"""Concepts in one: every one says of its name what it said, and everything else is moved as little as can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.artifact import Artifact
from sdforge.edits import bake
from sdforge.edits.custom_merge import TABLE, advise, captions_of, run
from sdforge.errors import ActionFailed
from sdforge.families.sd15.load import load
from sdforge.order import Order
from sdforge.run.concepts import Problem, pose, solve
from tests.edits.test_bake_custom import concept
from tests.families.workbench import SD15, Taken, keep, made

WIDTH, OUTPUTS = 32, 24


def random_problem(*, names: int = 4, captions: int = 200) -> tuple[Problem, Tensor, Tensor, list[Tensor]]:
    """Return a problem of two concepts, its captions, the base's matrix, and what was trained of it."""
    draw = torch.Generator().manual_seed(0)
    # what text encoders say lies mostly in a few directions
    weights_D = torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    captions_ND = torch.randn(captions, WIDTH, generator=draw, dtype=torch.float64) * weights_D
    # a name is near to what captions say, and a little beside it
    names_SD = captions_ND[:names] + 0.2 * torch.randn(names, WIDTH, generator=draw, dtype=torch.float64)
    base = torch.randn(OUTPUTS, WIDTH, generator=draw, dtype=torch.float64)
    trained = [base + 0.3 * torch.randn(OUTPUTS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2)]
    owners = torch.tensor([0] * (names // 2) + [1] * (names - names // 2))
    return pose(names_SD, owners, captions_ND), captions_ND, base, trained


def residual(problem: Problem, merged: Tensor, trained: list[Tensor]) -> float:
    """How far what is said of the names is from what each concept says, relative to that."""
    worst = 0.0
    for number, matrix in enumerate(trained):
        own = problem.names_SD[problem.owners_S == number]
        wanted = own @ matrix.T
        worst = max(worst, float((own @ merged.T - wanted).norm() / wanted.norm()))
    return worst


def drift(merged: Tensor, base: Tensor, captions_ND: Tensor) -> float:
    return float((captions_ND @ (merged - base).T).norm() / (captions_ND @ base.T).norm())


def test_every_concept_says_of_its_name_what_it_said_and_captions_move_less_than_by_averaging() -> None:
    problem, captions, base, trained = random_problem()
    merged, average = solve(problem, base, trained), torch.stack(trained).mean(0)
    assert residual(problem, merged, trained) < 1e-10
    assert residual(problem, average, trained) > 0.1
    assert drift(merged, base, captions) < 0.3 * drift(average, base, captions)


def test_no_other_matrix_that_says_so_is_nearer() -> None:
    problem, captions, base, trained = random_problem()
    merged = solve(problem, base, trained)
    least, draw = drift(merged, base, captions), torch.Generator().manual_seed(1)
    # what leaves the names alone: the part of a change that is orthogonal to all of them
    _, _, names = torch.linalg.svd(problem.names_SD, full_matrices=False)
    for size in (1e-3, 1e-1, 10.0):
        change = size * torch.randn(OUTPUTS, WIDTH, generator=draw, dtype=torch.float64)
        other = merged + change - change @ names.T @ names
        assert residual(problem, other, trained) < 1e-8
        assert drift(other, base, captions) > least


def test_one_concept_alone_is_what_it_was_on_its_name() -> None:
    problem, _, base, _ = random_problem()
    again = solve(problem, base, [base, base])
    assert torch.allclose(again, base, atol=1e-12)
    assert problem.condition > 1


def test_names_that_begin_alike_share_what_their_beginning_says() -> None:
    """The first tokens of two names are the same to the bit; both concepts cannot be right about them."""
    problem, captions, base, trained = random_problem()
    names = torch.cat([problem.names_SD, problem.names_SD[:1]])
    shared = pose(names, torch.tensor([0, 0, 1, 1, 1]), captions)
    merged = solve(shared, base, trained)
    mean = names[0] @ (trained[0] + trained[1]).T / 2
    assert torch.allclose(names[0] @ merged.T, mean, atol=1e-6)
    assert torch.allclose(names[2] @ merged.T, names[2] @ trained[1].T, atol=1e-6)


# -- an order ----------------------------------------------------------------------------------------------------------


def merged(base: Taken, work: Path, concepts: list[Taken], **changes: Any) -> tuple[Taken, dict[str, Any]]:
    work.mkdir(parents=True, exist_ok=True)
    settings = {"dtype": "fp32", "template": "a drawing of a {}", "captions": ["a red cat", "a house", ""]} | changes
    uses = settings.pop("uses", [{}] * len(concepts))
    given = [each.given(**use) for each, use in zip(concepts, uses, strict=True)]
    inputs = {"checkpoint": [base.given()], "custom": given}
    order = Order("", "", "custom_merge", "edits", "sd15", settings, str(work), inputs, how={"device": "cpu"})
    outcome = run(order, lambda **_: None)
    tensors = {
        part: {row[0]: _read(work / outcome.pack, row) for row in rows} for part, rows in outcome.components.items()
    }
    return keep(work / "kept", tensors, kind="custom", facts=outcome.facts), outcome.record


def _read(path: Path, row: list[Any]) -> Tensor:
    kinds = {"F32": torch.float32, "F16": torch.float16}
    count = 1
    for n in row[2]:
        count *= n
    data = bytearray(path.read_bytes())
    return torch.frombuffer(data, dtype=kinds[row[1]], count=count, offset=row[5]).reshape(row[2]).clone()


@torch.no_grad()
def test_baked_it_says_of_every_name_what_the_concepts_said_alone(toy: Taken, tmp_path: Path) -> None:
    one, two = (concept(toy, tmp_path, f"<{x}>", seed=i, dtype=torch.float32) for i, x in enumerate("ab"))
    uses = [{"name": "<a> cat"}, {"name": "<b>"}]
    both, record = merged(toy, tmp_path / "work", [one, two], uses=uses)
    assert both.artifact.facts == {"token": "<a>", "further": ["<b>"]}
    assert record["tokens"] == (2 + 1 + 1) + (2 + 1)  # the ends of text among them
    assert record["condition"] > 1
    states = []
    for taken in (one, two, both):
        table = bake.Bake.model_validate({"checkpoint": "b", "custom": {"c": {}}, "dtype": "fp32"})
        plan = bake.plan(table, {"checkpoint": [toy.input()], "custom": [taken.input()]}, SD15)
        parts = {"vae": toy.tensors("vae")} | made(plan, toy, taken)
        kept = keep(
            tmp_path / f"baked{len(states)}", parts, facts=toy.artifact.facts | plan.facts, words=toy.vocabulary
        )
        states.append(load(kept.given(), torch.device("cpu"), torch.float32))
    # start, a, drawing, o, f, a: the name comes behind, and behind it the end of text
    first = states[2].words.encode("a drawing of a ").index(states[2].words.number("<|endoftext|>"))
    for alone, name, count in ((states[0], "<a> cat", 4), (states[1], "<b>", 3)):
        said = []
        for diffusion in (alone, states[2]):
            (hidden,) = diffusion.encode_text([f"a drawing of a {name}"]).hidden_BLD
            own = dict(diffusion.unet.named_parameters())
            said.append(torch.cat([hidden[first : first + count] @ own[n].T for n in SD15.cross_attention], 1))
        assert torch.allclose(said[0], said[1], atol=2e-4)
    plain = toy.tensors("unet")
    moved = [both.tensors("custom")[f"unet.{n}"] - plain[n].float() for n in SD15.cross_attention]
    assert all(bool(change.any()) for change in moved)


def test_concepts_come_in_an_order_that_no_recipe_decides_and_can_be_merged_again(toy: Taken, tmp_path: Path) -> None:
    one, two, three = (concept(toy, tmp_path, f"<{x}>", seed=i) for i, x in enumerate("bac"))
    there, _ = merged(toy, tmp_path / "1", [one, two])
    back, _ = merged(toy, tmp_path / "2", [two, one])
    assert there.artifact.digest == back.artifact.digest
    assert torch.equal(there.tensors("embedding")["text_encoder"], two.tensors("embedding")["text_encoder"])
    all_, _ = merged(toy, tmp_path / "3", [there, three], dtype="")
    assert all_.artifact.facts == {"token": "<a>", "further": ["<b>", "<c>"]}
    assert {t.dtype for t in all_.tensors("custom").values()} == {torch.float16}
    last = all_.tensors("embedding")["text_encoder.2"]
    assert torch.equal(last, three.tensors("embedding")["text_encoder"])


def test_what_cannot_be_merged_is_refused(toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path, "<a>")
    matrices = one.tensors("custom")
    wordless = keep(tmp_path / "w", {"custom": matrices}, kind="custom")
    with pytest.raises(ActionFailed, match="without a word"):
        merged(toy, tmp_path / "1", [one, wordless])
    more = matrices | {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.zeros(16, 16)}
    rows = {"embedding": one.tensors("embedding")}
    whole = keep(tmp_path / "q", {"custom": more, **rows}, kind="custom", facts={"token": "<q>"})
    with pytest.raises(ActionFailed, match="<q> has other layers") as caught:
        merged(toy, tmp_path / "2", [one, whole])
    assert caught.value.hint == 'train it with freeze = "kv"'
    with pytest.raises(ActionFailed, match="two concepts are called '<a>'"):
        merged(toy, tmp_path / "3", [one, concept(toy, tmp_path / "again", "<a>", seed=5)])


def test_two_hundred_captions_stand_for_all_others() -> None:
    captions = captions_of([])
    assert len(captions) == len(set(captions)) == 200
    assert captions_of(["a cat"]) == ["a cat"]


def test_a_template_without_a_place_and_a_name_without_its_word_are_refused() -> None:
    table = TABLE.model_validate(
        {"checkpoint": "b", "custom": {"x": {"name": "a cat"}, "y": {}}, "template": "a photo"}
    )
    told: list[Artifact | None] = [Artifact("custom", facts={"token": token}) for token in ("<x>", "<y>")]
    first, second = advise(table, {"checkpoint": [None], "custom": told})
    assert "no one place {} for a name" in first[2]
    assert (second[0], second[2]) == ("custom.x", "`x` is called '<x>', which 'a cat' does not name")
