"""What every family in the folder promises."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path

import pytest

import sdforge.families
from sdforge.families import Family, Name, families, family, family_names, family_of
from sdforge.formats.single_file import single_pieces
from sdforge.method import block_places
from tests.families.workbench import Taken

EACH = pytest.mark.parametrize("name", family_names())
NAMES = Path(__file__).parent


def test_the_families_that_recipes_rely_on_are_found_in_the_folder() -> None:
    assert {"image_variations", "sd15", "sd2", "sdxl", "unclip"} <= set(family_names())


@EACH
def test_a_family_is_called_as_its_folder(name: str) -> None:
    found = family(name)
    assert found.name == name
    assert found.version >= 1
    assert inspect.isabstract(type(found)) is False
    assert isinstance(found, Family)
    assert (Path(sdforge.families.__file__).parent / name / "load.py").is_file()


@EACH
def test_every_tensor_has_one_name_in_each_layout(name: str) -> None:
    names = family(name).names()
    assert [k for k, n in Counter((n.component, n.canonical) for n in names).items() if n > 1] == []
    assert [k for k, n in Counter((n.single, n.share) for n in names).items() if n > 1] == []
    assert {n.component for n in names} == set(family(name).networks)


@EACH
def test_names_are_as_the_committed_table_has_them(name: str) -> None:
    """A name that changes renames, and so retrains, all that was ever made: raise the family's version."""
    rows = ["\t".join([n.component, n.canonical, n.single, n.block or "-", _marks(n)]) for n in family(name).names()]
    assert rows == (NAMES / f"{name}.names").read_text().splitlines()


def _marks(name: Name) -> str:
    part, count = name.share
    share = f"{part}/{count}" if count > 1 else ""
    marks = (("optional", name.optional), ("conv", name.conv), ("turned", name.turned), (share, count > 1))
    return ",".join(word for word, there in marks if there) or "-"


@EACH
def test_what_is_fused_in_a_single_file_is_there_whole(name: str) -> None:
    shares: dict[str, set[tuple[int, int]]] = {}
    for n in family(name).names():
        shares.setdefault(n.single, set()).add(n.share)
    assert all(found == {(i, len(found)) for i in range(len(found))} for found in shares.values())


@EACH
def test_every_fact_belongs_to_a_part_of_the_checkpoint(name: str) -> None:
    found = family(name)
    assert set(found.owners) == set(found.neutral)
    assert {owner for owner in found.owners.values() if owner not in found.networks} == set()


@EACH
def test_a_fact_at_its_neutral_value_is_left_out(name: str) -> None:
    found = family(name)
    assert found.stated(dict(found.neutral)) == {}
    assert all(found.fact({}, fact) == value for fact, value in found.neutral.items())
    assert found.stated({"resolution": 1}) == {"resolution": 1}


@EACH
def test_every_network_that_a_lora_can_change_has_a_prefix(name: str) -> None:
    found = family(name)
    changed = {module.partition(".")[0] for module in found.modules()}
    assert changed == set(found.kohya_prefix) == set(found.networks) - set(found.kept)
    assert len(set(found.kohya_prefix.values())) == len(found.kohya_prefix)


@EACH
def test_modules_are_matrices_and_convolutions_of_the_networks(name: str) -> None:
    found = family(name)
    weights = {f"{n.component}.{n.canonical}" for n in found.names()}
    assert all(f"{module}.weight" in weights for module in found.modules())
    assert not any(".norm" in module or "embedding.weight" in module for module in found.modules())


@EACH
def test_blocks_of_the_unet_have_names(name: str) -> None:
    places = block_places(family(name))
    assert ("unet", "mid") in places
    assert ("unet", "") not in places


@EACH
def test_a_plan_can_ask_what_conditions_the_unet(name: str) -> None:
    found = family(name)
    assert found.text_encoders or found.image_embeddings
    assert len(found.tokenizers()) == len(found.text_encoders)
    assert len(found.cross_attention) == 2 * sum(n.canonical.endswith(".attn2.to_q.weight") for n in found.names())
    assert found.guided({})
    assert not found.guided({"guidance_free": True})


def test_the_toy_is_of_the_family_that_wrote_it(each: Taken) -> None:
    """The shapes of a single file are enough to tell a family, and no other family claims it."""
    found = family(each.artifact.family)
    here = {(part, t.name): (t.dtype, t.shape) for part in each.tables for t in each.tables[part]}
    shapes = {single: piece.shape for single, piece in single_pieces(found, here).items()}
    assert [other.name for other in families() if other.owns(shapes)] == [found.name]
    assert family_of({"what.is.this": (1,)}) is None


def test_configurations_and_facts_say_the_same(each: Taken) -> None:
    found = family(each.artifact.family)
    facts = each.artifact.facts | {"prediction": "v_prediction", "zero_terminal_snr": True, "guidance_free": True}
    facts = found.stated(facts)
    configs = found.configs(facts, each.given().shapes())
    paddings = {fact: facts[fact] for fact in found.tokenizers().values() if fact in facts}
    assert found.facts_of_folder(configs) | paddings == facts
    assert [other.name for other in families() if other.owns_folder(configs)] == [found.name]


def test_widths_tell_what_fits(toy: Taken) -> None:
    found = family(toy.artifact.family)
    assert found.widths(toy.given().shapes()) == {"channels": 8, "context": 16, "text": 16}
