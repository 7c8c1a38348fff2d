"""Single tensors are reused: what an earlier result holds is neither read nor computed again, and stored once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdforge.families import family
from sdforge.room import bytes_needed, room
from tests.build.inline import Bench
from tests.toys import WIDTH

SOFT = '[weighted_sum.soft]\ncheckpoints = ["base", "ink"]\nweights = [0.6, 0.4]\n'
MID = 'blocks = { "unet.mid" = [0.5, 0.5] }\n'
BLOCKS = {f"{name.component}.{name.canonical}": name.block for name in family("sd15").names()}
BAKED = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def variants(count: int) -> str:
    bake = '[bake.v{0}]\ncheckpoint = "base"\ndtype = "fp32"\nloras.glow = {{ strength = {1} }}\n'
    return "".join(bake.format(i, (i + 1) / 10) for i in range(count))


def test_after_one_block_changes_that_block_alone_is_read_and_computed(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    before, read, first = bench.bytes_of("soft"), bench.read(), bench.computed("soft")
    bench.recipe(SOFT + MID)
    assert bench.built() == ["soft"]
    changed = bench.computed("soft")
    assert changed == {name for name in first if BLOCKS[name] == "mid"} != set()
    assert len(bench.read()) == 2 * len(changed) < len(read)
    after = bench.bytes_of("soft")
    assert {name for name in after if after[name] != before[name]} == changed


def test_a_result_of_old_and_new_tensors_is_what_a_build_from_nothing_gives(bench: Bench, tmp_path: Path) -> None:
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    bench.build()
    fresh = bench.clone(tmp_path / "fresh")
    fresh.build()
    assert fresh.bytes_of("soft") == bench.bytes_of("soft")
    assert (fresh.root / "forge.lock").read_text() == (bench.root / "forge.lock").read_text()


def test_variants_of_a_lora_strength_take_one_base_and_the_changed_tensors(bench: Bench) -> None:
    """All ten are in fp32, and the base in fp16: one of them holds what they share."""
    bench.recipe(variants(10))
    bench.build()
    packs = bench.packs()
    first = max(packs.values())
    one = len(bench.bytes_of("v0")[BAKED])
    header = 400
    assert len(packs) == 10
    assert sum(packs.values()) - first <= 9 * (one + header)
    assert [len(bench.computed(f"v{i}")) for i in range(1, 10)] == [1] * 9


def test_a_setting_that_comes_back_computes_nothing(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    bench.build()
    bench.recipe(SOFT.replace("soft", "again"))
    assert bench.plan().to_do == []


def test_another_recipe_that_computes_some_of_the_same_tensors_takes_them(bench: Bench) -> None:
    """The text encoders of a sum are the same tensors whatever the U-Net's weights are."""
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT.replace("[0.6, 0.4]", "[0.5, 0.5]") + 'blocks = { "text_encoder" = [0.6, 0.4] }\n')
    bench.build()
    assert {name.partition(".")[0] for name in bench.computed("soft")} == {"unet"}


def test_a_lost_index_is_made_anew_and_finds_the_tensors_again(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    (bench.root / "cache" / "v1" / "index.db").unlink()
    bench.recipe(SOFT + MID)
    bench.build()
    assert {BLOCKS[name] for name in bench.computed("soft")} == {"mid"}


def test_the_plan_counts_the_bytes_that_are_written_alone(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    session = bench.session()
    plan = session.plan(session.resolve(["r"]))
    needed, _ = room(session, plan)
    bench.build()
    after = bench.bytes_of("soft")
    assert needed == sum(len(after[name]) for name in bench.computed("soft"))


TRAINED = """
[lora.style]
on = "base"
dataset = "drawings"
rank = {rank}
[custom_diffusion.toy]
on = "base"
dataset = "drawings"
token = "<toy>"
init = "red"
ema = {ema}
"""


def test_the_plan_counts_the_states_of_trainings(bench: Bench) -> None:
    """Three of each, 12 bytes a number and 4 more for an average: two are kept, one is written beside them."""
    needed = {}
    for rank, ema in ((1, 0.0), (2, 0.0), (1, 0.5)):
        bench.recipe(TRAINED.format(rank=rank, ema=ema))
        session = bench.session()
        plan = session.plan(session.resolve(["r"]))
        needed[rank, ema] = {step.node.target.name: bytes_needed(session, step) for step in plan.to_do}
        assert room(session, plan)[0] == sum(needed[rank, ema].values())
    first, wider, averaged = needed.values()
    assert wider["style"] == 2 * first["style"] > 0
    widths = [4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4]  # of the cross-attentions, on the way down and up
    assert first["toy"] == 3 * 12 * (sum(2 * WIDTH * width for width in widths) + WIDTH)
    assert averaged["toy"] / first["toy"] == 16 / 12


def test_a_pack_that_another_result_needs_is_kept_by_clean(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    from sdforge.cli import main

    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    bench.build()
    before = bench.bytes_of("soft")
    assert main(["-C", str(bench.root), "clean"]) == 0
    assert "freed" in capsys.readouterr().out
    assert bench.plan().to_do == []
    assert bench.bytes_of("soft") == before
    bench.recipe(SOFT)  # its result is gone, and its pack is not: most of it is there
    bench.build()
    assert {BLOCKS[name] for name in bench.computed("soft")} == {"mid"}


def test_tensors_whose_pack_is_lost_are_computed_again(bench: Bench) -> None:
    bench.recipe(SOFT)
    bench.build()
    before = bench.bytes_of("soft")
    bench.recipe(SOFT + MID)
    bench.build()
    for name in bench.packs():
        (bench.root / "cache" / "v1" / "objects" / name[:2] / name).unlink()
    bench.recipe(SOFT)
    assert bench.built() == ["soft"]
    assert bench.bytes_of("soft") == before


def test_damaged_tensors_are_found_when_they_are_read_and_made_again(bench: Bench) -> None:
    """A reused tensor's bytes are verified by whoever reads them; every result that lies there is made anew."""
    bench.recipe(SOFT)
    bench.build()
    bench.recipe(SOFT + MID)
    bench.build()
    right = bench.bytes_of("soft")
    largest = max(bench.packs(), key=lambda name: bench.packs()[name])
    pack = bench.root / "cache" / "v1" / "objects" / largest[:2] / largest
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    bench.recipe(SOFT + MID + '[cast.wide]\ncheckpoint = "soft"\ndtype = "fp32"\n')
    assert bench.built() == ["wide"]
    bench.build("soft")
    assert bench.bytes_of("soft") == right
