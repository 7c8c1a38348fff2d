"""What holds for every kind that no weights can hold: the folder `sidecars/` is the registry."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import sdforge.sidecars
from sdforge.artifact import KINDS, SIDECARS
from sdforge.edits.export import Export
from sdforge.edits.previews import Previews
from sdforge.graph import PRESET
from sdforge.settings import takes
from sdforge.sidecars import attached, replayed
from tests.house.test_imports import HEAVY, loaded_by

MODULES = sorted(p.stem for p in Path(sdforge.sidecars.__file__).parent.glob("*.py") if p.stem != "__init__")
EACH = pytest.mark.parametrize("kind", MODULES)


@EACH
def test_a_module_is_called_as_a_kind_that_presets_take(kind: str) -> None:
    assert kind in SIDECARS
    assert kind in KINDS
    assert "sidecars" in PRESET[kind]


@EACH
def test_a_module_takes_part_in_every_picture_or_has_its_own(kind: str) -> None:
    found = attached(kind) or replayed(kind)
    assert found is not None
    assert (attached(kind) is None) != (replayed(kind) is None)
    assert list(inspect.signature(found.attach_pipeline).parameters)[:3] == ["pipeline", "tensors", "facts"]


@EACH
def test_a_module_has_the_parameters_of_its_interface(kind: str) -> None:
    if module := attached(kind):
        assert list(inspect.signature(module.attach).parameters)[:3] == ["diffusion", "tensors", "facts"]
    if own := replayed(kind):
        assert list(inspect.signature(own.replay).parameters) == ["diffusion", "tensors", "facts", "prompt"]
        assert list(inspect.signature(own.plain).parameters) == ["diffusion", "tensors"]


@pytest.mark.parametrize("table", [Export, Previews])
def test_export_and_previews_take_every_kind(table: type) -> None:
    mark = takes(table.model_fields["sidecars"])  # type: ignore[attr-defined]
    assert mark is not None
    assert (mark.kind, *mark.also) == SIDECARS


def test_the_package_alone_loads_no_torch() -> None:
    assert not loaded_by("import sdforge.sidecars") & {*HEAVY, "PIL", "pydantic"}


def test_importing_sdforge_is_light() -> None:
    found = loaded_by("import sdforge\nassert callable(sdforge.load_preset)")
    assert not found & {*HEAVY, "PIL", "pydantic", "rich"}
