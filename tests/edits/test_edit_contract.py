"""What every edit in the folder promises."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from sdforge.artifact import KINDS
from sdforge.method import method, method_groups, module_of
from sdforge.settings import Table, takes

EDITS = sorted(name for name, group in method_groups().items() if group == "edits")
EACH = pytest.mark.parametrize("name", EDITS)


def test_the_edits_that_recipes_rely_on_are_found_in_the_folder() -> None:
    assert {"bake", "insert", "cast", "swap", "export", "previews"} <= set(EDITS)


@EACH
def test_an_edit_states_what_it_makes(name: str) -> None:
    found = method(name)
    assert found.makes in KINDS
    assert found.version >= 1
    assert issubclass(found.table, Table)
    assert inspect.getdoc(found.table)


@EACH
def test_an_edit_is_a_formula_or_runs_or_moves(name: str) -> None:
    module, signature = module_of("edits", name), method(name).signature
    moves = any(role.moves for role in signature.roles.values())
    ways = [hasattr(module, "plan"), hasattr(module, "run"), moves]
    assert sum(ways) == 1
    assert signature.kind == ("formula" if ways[0] else "moves" if moves else "content")


@EACH
def test_an_edit_takes_artifacts(name: str) -> None:
    roles = method(name).signature.roles
    assert roles
    assert {role.kind for role in roles.values()} <= set(KINDS)


@EACH
def test_a_formulas_arithmetic_is_told_its_type_and_nothing_of_the_device(name: str) -> None:
    module = module_of("edits", name)
    compute = getattr(module, "compute", None)
    if compute is not None:
        assert hasattr(module, "plan")
        assert list(inspect.signature(compute).parameters) == ["parameters", "tensors", "dtype"]
    else:  # what computes nothing names no method of its own
        assert "computed(" not in inspect.getsource(module)


@EACH
def test_tables_are_closed_and_frozen(name: str) -> None:
    table = method(name).table
    assert table.model_config["extra"] == "forbid"
    assert table.model_config["frozen"]
    with pytest.raises(ValidationError):
        table.model_validate({"no-such-setting": 1})


@EACH
def test_every_setting_that_is_no_artifact_reaches_the_manifest(name: str) -> None:
    table = method(name).table
    plain = {field for field, info in table.model_fields.items() if not takes(info)} - set(table.FREE)
    assert set(table.model_construct(**dict.fromkeys(table.model_fields)).settings()) == plain


@EACH
def test_results_that_can_always_be_made_again_are_not_pinned(name: str) -> None:
    signature = method(name).signature
    assert signature.pinned == (signature.makes not in ("files", "pictures"))
