"""Train states: there whole or not at all, damaged ones passed over, the newest two kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdforge.errors import ResourceError
from sdforge.run.states import described_in, load_state, save_state
from sdforge.store import files


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_state(folder, step, {"x": ("F32", (1,), bytes([step, 0, 0, 0]))}, {"losses": [0.5] * step})


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    save(tmp_path, 7)
    state = load_state(tmp_path, 10)
    assert state is not None
    assert (state.step, state.notes) == (7, {"losses": [0.5] * 7})
    assert state.tensors == {"x": ("F32", (1,), b"\x07\0\0\0")}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.json", "10.safetensors", "4.json", "4.safetensors"]


def test_a_shorter_training_keeps_its_states_beside_those_of_a_longer_one(tmp_path: Path) -> None:
    """Both are found under one name, since nothing that is computed depends on where they end."""
    save(tmp_path, 90, 100, 20, 30, 40, 10, 15)
    assert sorted(int(path.stem) for path in tmp_path.glob("*.json")) == [10, 15, 90, 100]
    assert [getattr(load_state(tmp_path, most), "step", None) for most in (5, 50, 95, 200)] == [None, 15, 90, 100]


@pytest.mark.parametrize(("fault", "left"), [("EIO:1", []), ("EIO:2", ["7.safetensors"])])
def test_its_description_comes_last(
    fault: str, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_published", 0)
    monkeypatch.setenv(files.FAULT, fault)
    with pytest.raises(ResourceError):
        save(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == left
    assert load_state(tmp_path, 10) is None


@pytest.mark.parametrize(("most", "step"), [(10, 4), (4, 4), (3, 2), (1, None)])
def test_a_state_beyond_the_end_is_no_help(most: int, step: int | None, tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    state = load_state(tmp_path, most)
    assert (state.step if state else None) == step


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("4.safetensors", b""),
        ("4.safetensors", b"\0" * 100),
        ("4.safetensors", None),
        ("4.json", b"{"),
        ("4.json", b"[]"),
        ("4.json", b"{}"),
        ("4.json", json.dumps({"v": 1, "step": 4, "sha256": "", "notes": {}}).encode()),
        ("4.json", b"\xff"),
        ("4.json", None),
    ],
)
def test_a_damaged_state_is_passed_over(file: str, content: bytes | None, tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    state = load_state(tmp_path, 10)
    assert state is not None
    assert state.step == 2


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    path = tmp_path / "4.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    state = load_state(tmp_path, 10)
    assert state is not None
    assert state.step == 2


def test_where_nothing_was_kept_there_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nothing", 10) is None


def test_every_changed_bit_of_a_description_is_seen(tmp_path: Path) -> None:
    """Losses and fingerprint stand in it too: a run would go on with wrong ones."""
    save(tmp_path, 4)
    data = (tmp_path / "4.json").read_bytes()
    assert described_in(data)["notes"] == {"losses": [0.5] * 4}
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r".+"):
            described_in(bytes(spoilt))
