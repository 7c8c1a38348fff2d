"""Derived caches: made once, checked whenever they are read, made again when they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdforge.run import derived
from sdforge.run.derived import Derived, Recent
from tests.families.workbench import same_bytes

NAME = "ab" + "0" * 62


def make() -> dict[str, Tensor]:
    return {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2).bfloat16()}


def never() -> dict[str, Tensor]:
    raise AssertionError("it is there already")


def same(found: dict[str, Tensor]) -> bool:
    wanted = make()
    return set(found) == set(wanted) and all(same_bytes(found[name], tensor) for name, tensor in wanted.items())


def test_what_was_made_is_reused(tmp_path: Path) -> None:
    first, second = Derived(str(tmp_path)), Derived(str(tmp_path))
    assert same(first.get("latents", NAME, make))
    assert same(second.get("latents", NAME, never))
    assert (first.made, first.reused, second.made, second.reused) == ({"latents": 1}, {}, {}, {"latents": 1})


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    Derived(str(tmp_path)).get("latents", NAME, make)
    found = Derived(str(tmp_path)).get("latents", NAME, never)
    found["x"] += 1
    assert same(Derived(str(tmp_path)).get("latents", NAME, never))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "folder"])
def test_what_is_damaged_is_made_again(damage: str, tmp_path: Path) -> None:
    Derived(str(tmp_path)).get("latents", NAME, make)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.symlink_to("/dev/null")
    again = Derived(str(tmp_path))
    assert same(again.get("latents", NAME, make))
    assert again.made == {"latents": 1}
    assert same(Derived(str(tmp_path)).get("latents", NAME, never))


def test_what_another_user_keeps_is_reused_and_what_is_cleaned_meanwhile_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time cannot be changed then, by which `clean` sees that it is used."""
    Derived(str(tmp_path)).get("latents", NAME, make)
    (path,) = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr("sdforge.run.derived.os.utime", refuse)
    assert same(Derived(str(tmp_path)).get("latents", NAME, never))
    monkeypatch.undo()
    real = derived._read

    def cleaned(place: Path) -> dict[str, Tensor] | None:
        found = real(place)
        place.unlink()
        return found

    monkeypatch.setattr(derived, "_read", cleaned)
    assert same(Derived(str(tmp_path)).get("latents", NAME, never))
    assert not path.exists()


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_without_a_folder_nothing_is_kept() -> None:
    nowhere = Derived("")
    assert same(nowhere.get("latents", NAME, make))
    assert same(nowhere.get("latents", NAME, make))
    assert nowhere.made == {"latents": 2}


def test_nothing_is_left_beside_what_is_kept(tmp_path: Path) -> None:
    Derived(str(tmp_path)).get("latents", NAME, make)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "ab" / f"{NAME}.safetensors"]


@pytest.mark.parametrize(("folder", "made"), [(True, 4), (False, 3)])
def test_no_more_is_kept_in_memory_than_that_is_meant_for(
    folder: bool, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was used last stays; where nothing keeps the rest, all of it does."""
    monkeypatch.setattr(derived, "MOST", 100)
    had: list[str] = []
    recent = Recent[str, Tensor](Derived(str(tmp_path) if folder else ""), lambda tensor: tensor.nbytes)
    for name in "abacbc":
        recent.get(name, lambda name=name: had.append(name) or torch.zeros(10))  # type: ignore[misc]
    assert len(had) == made
    assert recent.bytes == (80 if folder else 120)
    assert recent.get("large", lambda: torch.zeros(1000)).nbytes == 4000  # what is too large alone is kept for its time
