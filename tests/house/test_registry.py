"""The folders are the registry: what lies there is found, and what is found holds to the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdforge.artifact import KINDS
from sdforge.families import Family, family, family_names
from sdforge.method import GROUPS, method, method_groups
from sdforge.names import is_name
from sdforge.recipe import RESERVED
from sdforge.settings import Table

HOUSE = Path(__file__).parents[2] / "sdforge"
METHODS = sorted(method_groups())


def test_what_users_were_promised_is_there() -> None:
    groups = method_groups()
    assert {n for n, g in groups.items() if g == "merges"} >= {"weighted_sum", "add_difference", "slerp"}
    assert {n for n, g in groups.items() if g == "trainings"} >= {"lora", "textual_inversion"}
    assert {n for n, g in groups.items() if g == "edits"} >= {"bake", "cast", "export", "insert", "previews", "swap"}
    assert "sd15" in family_names()


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_and_folder_of_a_group_is_found(group: str) -> None:
    files = {p.stem for p in (HOUSE / group).glob("*.py") if not p.name.startswith("_")}
    folders = {p.parent.name for p in (HOUSE / group).glob("*/__init__.py")}
    assert {name for name, of in method_groups().items() if of == group} == files | folders


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_be_named_in_a_recipe(name: str) -> None:
    assert is_name(name)
    assert name not in RESERVED


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_makes_and_takes(name: str) -> None:
    found = method(name)
    assert issubclass(found.table, Table)
    assert found.table.model_config["extra"] == "forbid"
    assert found.makes in KINDS
    assert isinstance(found.version, int)
    assert found.version >= 1
    assert found.signature.roles
    assert {role.kind for role in found.signature.roles.values()} <= set(KINDS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_of_itself_what_it_does(name: str) -> None:
    assert (method(name).module.__doc__ or "").strip()


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_words_for_the_editor(name: str) -> None:
    """Roles explain themselves by their names; a merge's parameters are explained in its docstring."""
    if method(name).group == "merges" or name == "export":
        return
    roles = method(name).signature.roles
    silent = [n for n, field in method(name).table.model_fields.items() if n not in roles and not field.description]
    assert silent == []


def test_methods_under_development_are_found_in_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "merges").mkdir()
    (tmp_path / "merges" / "first.py").write_text(
        '"""The first of two."""\nVERSION = 1\n\n\ndef first(a: \'Tensor\', b: \'Tensor\'):\n    return a\n\n\n'
        "def simplify(inputs, parameters):\n    return inputs[0]\n"
    )
    code = "from sdforge.method import method, method_groups\n"
    code += "print(method_groups()['first'], method('first').makes, sorted(method('first').signature.roles))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=HOUSE.parent,
        env={"FORGE_METHODS": str(tmp_path), "PATH": ""},
    )
    assert (done.stdout, done.stderr) == ("merges checkpoint ['a', 'b']\n", "")


@pytest.mark.parametrize("name", family_names())
def test_a_family_names_every_tensor_once(name: str) -> None:
    names = family(name).names()
    assert isinstance(family(name), Family)
    assert len({(n.component, n.canonical) for n in names}) == len(names)
    assert len({(n.single, n.share) for n in names}) == len(names)
    assert {n.component for n in names} == set(family(name).networks)


@pytest.mark.parametrize("name", family_names())
def test_every_fact_of_a_family_has_a_neutral_value_and_an_owner(name: str) -> None:
    assert family(name).neutral.keys() == family(name).owners.keys()
    assert set(family(name).owners.values()) <= set(family(name).networks)
