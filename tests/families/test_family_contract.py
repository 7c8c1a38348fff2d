"""What every family in the folder promises."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path

import pytest

import sdforge.families
from sdforge.families import Family, family, family_names, family_of
from sdforge.formats.single_file import single_shape
from sdforge.method import block_places
from tests.families.workbench import Taken

EACH = pytest.mark.parametrize("name", family_names())
NAMES = Path(__file__).parent


def test_the_families_that_recipes_rely_on_are_found_in_the_folder() -> None:
    assert "sd15" in family_names()


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
    assert [k for k, n in Counter(n.single for n in names).items() if n > 1] == []
    assert {n.component for n in names} == set(family(name).networks)


@EACH
def test_names_are_as_the_committed_table_has_them(name: str) -> None:
    """A name that changes renames, and so retrains, all that was ever made: raise the family's version."""
    rows = [
        "\t".join([n.component, n.canonical, n.single, n.block or "-", _marks(n.optional, n.conv)])
        for n in family(name).names()
    ]
    assert rows == (NAMES / f"{name}.names").read_text().splitlines()


def _marks(optional: bool, conv: bool) -> str:
    return ",".join(word for word, there in (("optional", optional), ("conv", conv)) if there) or "-"


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
    assert changed == set(found.kohya_prefix) == set(found.networks) - {"vae"}
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


def test_the_toy_is_of_the_family_that_wrote_it(toy: Taken) -> None:
    """The shapes of a single file are enough to tell a family."""
    found = family(toy.artifact.family)
    single = {(n.component, n.canonical): n.single for n in found.names()}
    shapes = {
        single[part, t.name]: single_shape(found, part, t.name, t.shape)
        for part in toy.tables
        for t in toy.tables[part]
    }
    assert family_of(shapes) is found
    assert family_of({"what.is.this": (1,)}) is None


def test_configurations_and_facts_say_the_same(toy: Taken) -> None:
    found = family(toy.artifact.family)
    facts = toy.artifact.facts | {"prediction": "v_prediction", "zero_terminal_snr": True, "text_activation": "gelu"}
    configs = found.configs(facts, toy.given().shapes())
    assert found.facts_of_folder(configs) == facts
    assert found.owns_folder(configs)


def test_widths_tell_what_fits(toy: Taken) -> None:
    found = family(toy.artifact.family)
    assert found.widths(toy.given().shapes()) == {"channels": 8, "context": 16, "text": 16}
