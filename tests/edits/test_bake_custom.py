"""Custom Diffusion in a checkpoint: W₀ + λ (W − W₀) to the last bit, and its word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdforge.edits import bake
from sdforge.edits.insert import ROWS
from sdforge.errors import UsageError
from sdforge.families.sd15.load import load
from sdforge.formula import Plan
from sdforge.recipe import read_recipe
from sdforge.trainings.custom_diffusion import TABLE
from sdforge.trainings.custom_diffusion.adapter import begin
from tests.families.loras import CROSS, kept_lora, random_lora
from tests.families.workbench import SD15, Taken, keep, made, same_bytes
from tests.run.order import settings
from tests.trainings.test_training_contract import CAPTIONS, batch, parameters

SIZE = 528  # words of the toys' tokenizer
MID = f"{CROSS.removeprefix('unet.')}.weight"


def concept(
    base: Taken, work: Path, token: str = "<toy>", *, seed: int = 0, dtype: torch.dtype = torch.float16
) -> Taken:
    """Return random matrices near the base's, and two rows."""
    draw, weights = torch.Generator().manual_seed(seed), base.tensors("unet")
    moved = {
        name: (weights[name].float() + 0.1 * torch.randn(weights[name].shape, generator=draw)).to(dtype)
        for name in SD15.cross_attention
    }
    rows = torch.randn(2, 16, generator=draw).to(dtype)
    tensors = {"custom": {f"unet.{n}": t for n, t in moved.items()}, "embedding": {"text_encoder": rows}}
    return keep(work / token.strip("<>"), tensors, kind="custom", facts={"token": token})


def planned(base: Taken, *customs: tuple[Taken, Any], dtype: str = "", loras: tuple[Taken, ...] = ()) -> Plan:
    uses = [use if isinstance(use, dict) else {"strength": use} for _, use in customs]
    stated = {f"c{i}": use for i, use in enumerate(uses)}
    table = bake.Bake.model_validate(
        {"checkpoint": "base", "custom": stated, "loras": {f"l{i}": {} for i in range(len(loras))}, "dtype": dtype}
    )
    inputs = {
        "checkpoint": [base.input()],
        "custom": [taken.input(**use) for (taken, _), use in zip(customs, uses, strict=True)],
        "loras": [lora.input() for lora in loras],
    }
    return bake.plan(table, inputs, SD15)


def test_at_strength_1_the_matrices_are_those_that_were_trained_bit_for_bit(toy: Taken, tmp_path: Path) -> None:
    for dtype, stated in ((torch.float16, ""), (torch.float32, "fp32"), (torch.float32, "")):
        one = concept(toy, tmp_path / f"{dtype}{stated}", dtype=dtype)
        plan = planned(toy, (one, 1.0), dtype=stated)
        result, before, trained = made(plan, toy, one), toy.tensors("unet"), one.tensors("custom")
        kind = torch.float32 if stated else torch.float16
        assert all(same_bytes(result["unet"][n], trained[f"unet.{n}"].to(kind)) for n in SD15.cross_attention)
        others = set(before) - set(SD15.cross_attention)
        assert all(same_bytes(result["unet"][n], before[n].to(kind)) for n in others)


def test_what_is_trained_in_the_checkpoints_type_passes_through_and_keeps_its_identity(
    toy: Taken, tmp_path: Path
) -> None:
    one = concept(toy, tmp_path)
    rows = {row.tensor.name: row for row in planned(toy, (one, 1.0)).components["unet"]}
    own = {t.name.removeprefix("unet."): t.identity for t in one.tables["custom"]}
    assert all(rows[name].tensor.identity == own[name] and not rows[name].method for name in SD15.cross_attention)


@pytest.mark.parametrize("strength", [0.5, -1.0, 1.7])
def test_any_other_strength_is_on_the_line_through_both(strength: float, toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path)
    result = made(planned(toy, (one, strength)), toy, one)["unet"]
    before, trained = toy.tensors("unet"), one.tensors("custom")
    for name in SD15.cross_attention:
        start = before[name].double()
        exact = start + strength * (trained[f"unet.{name}"].double() - start)
        assert torch.equal(result[name], exact.float().half())


def test_a_block_may_have_a_strength_of_its_own(toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path)
    result = made(planned(toy, (one, {"strength": 0.0, "blocks": {"unet.mid": 1.0}})), toy, one)["unet"]
    before = toy.tensors("unet")
    changed = {name for name in before if not same_bytes(result[name], before[name])}
    assert changed == {name for name in SD15.cross_attention if name.startswith("mid_block")}


def test_the_word_is_appended_as_insert_does_whatever_the_strength(toy: Taken, tmp_path: Path) -> None:
    one = concept(toy, tmp_path)
    for strength in (0.0, 0.5):
        plan = planned(toy, (one, strength))
        assert plan.facts == {"tokens": [["<toy>", 2]]}
        table, before = made(plan, toy, one)["text_encoder"][ROWS], toy.tensors("text_encoder")[ROWS]
        assert same_bytes(table[:SIZE].clone(), before)
        assert same_bytes(table[SIZE:].clone(), one.tensors("embedding")["text_encoder"])
    assert "unet" not in planned(toy, (one, 0.0)).components


def test_words_come_in_an_order_that_no_recipe_decides(toy: Taken, tmp_path: Path) -> None:
    one, two = concept(toy, tmp_path, "<b>"), concept(toy, tmp_path, "<a>", seed=1)
    there, back = planned(toy, (one, 0.5), (two, 0.5)), planned(toy, (two, 0.5), (one, 0.5))
    assert there.facts == back.facts == {"tokens": [["<a>", 2], ["<b>", 2]]}
    assert there.identities() == back.identities()
    result, before = made(there, toy, one, two)["unet"][MID], toy.tensors("unet")[MID].double()
    moves = [0.5 * (taken.tensors("custom")[f"unet.{MID}"].double() - before) for taken in (one, two)]
    assert torch.equal(result, (before + (moves[0] + moves[1])).float().half())


def test_a_lora_on_the_same_layer_is_added(toy: Taken, tmp_path: Path) -> None:
    one, lora = concept(toy, tmp_path), random_lora(toy, (CROSS,))
    kept = kept_lora(tmp_path / "lora", lora)
    result = made(planned(toy, (one, 1.0), dtype="fp32", loras=(kept,)), toy, one, kept)["unet"]
    exact = one.tensors("custom")[f"unet.{MID}"].double() + lora[CROSS].update
    assert torch.allclose(result[MID].double(), exact, rtol=2**-22, atol=1e-8)


def test_what_fits_nowhere_is_refused(toy: Taken, tmp_path: Path) -> None:
    one, two = concept(toy, tmp_path / "1"), concept(toy, tmp_path / "2", seed=1)
    with pytest.raises(UsageError, match="inserted twice"):
        planned(toy, (one, 1.0), (two, 1.0))
    with pytest.raises(UsageError, match="ordinary word"):
        planned(toy, (concept(toy, tmp_path / "3", "cat"), 1.0))
    wide = keep(tmp_path / "4", {"custom": {f"unet.{MID}": torch.zeros(16, 17)}}, kind="custom")
    with pytest.raises(UsageError, match=r"\[16, 17\], and the checkpoint's \[16, 16\]"):
        planned(toy, (wide, 1.0))
    strange = keep(tmp_path / "5", {"custom": {"unet.nowhere.weight": torch.zeros(2, 2)}}, kind="custom")
    with pytest.raises(UsageError, match="nowhere"):
        planned(toy, (strange, 1.0))


def test_a_baked_checkpoint_says_what_the_training_said(toy: Taken, tmp_path: Path) -> None:
    """To the bit: the same matrices, and rows behind the table instead of beside it."""
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    adapter = begin(TABLE.model_construct(**settings("custom_diffusion", vectors=2)), diffusion)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters(adapter).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        theirs = adapter.predict(batch(), diffusion.encode_text(CAPTIONS))
    learned = adapter.learned()
    tensors = {c: {n: t.detach() for n, t in rows.items()} for c, rows in learned.components.items()}
    one = keep(tmp_path / "one", tensors, kind="custom", facts=learned.facts)
    plan = planned(toy, (one, 1.0), dtype="fp32")
    parts: dict[str, dict[str, Tensor]] = {"vae": toy.tensors("vae"), **made(plan, toy, one)}
    baked = keep(tmp_path / "baked", parts, facts=toy.artifact.facts | plan.facts, words=toy.vocabulary)
    ours = load(baked.given(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        mine = ours.predict(batch().noisy_BCHW, batch().timesteps_B, ours.encode_text(CAPTIONS))
    assert torch.equal(mine, theirs)


def test_words_of_a_checkpoint_matter_to_a_bake_only_where_one_is_added() -> None:
    tables = "[bake.plain]\ncheckpoint = 'a'\nloras.l = {}\n[bake.worded]\ncheckpoint = 'a'\ncustom.c = {}\n"
    targets = read_recipe(b'family = "sd15"\n' + tables.encode(), "r", "r.toml").targets
    plain, worded = (targets[name].role("checkpoint") for name in ("plain", "worded"))
    assert (plain.reads, plain.facts) == (("unet", "text_encoder"), ())
    assert (worded.reads, worded.facts) == (("unet", "text_encoder", "tokenizer"), ("tokens",))
