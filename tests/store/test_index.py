"""The index only repeats what can be found again: lost, damaged or not writable, it changes no answer."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sdforge.index import VERSION, Index
from sdforge.store import Store, seen
from sdforge.store.files import SETTLED, Stat, is_settled, stat_of
from tests.store.conftest import digest_of, make_result

KEY = "ab" * 32


def delete(path: Path) -> None:
    path.unlink()


def overwrite(path: Path) -> None:
    path.write_bytes(b"this is no database" * 500)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def age(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={VERSION + 1}")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [delete, overwrite, truncate, empty, age, replace_by_folder]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_without_its_index_finds_its_results_again(store: Store, damage: Callable[[Path], None]) -> None:
    result = make_result(store, KEY, b"some bytes")
    store.close()
    damage(store.index.path)
    again = Store(store.root.parent)
    assert [found.digest for found in again.known(KEY).results] == [result.digest]


@pytest.mark.parametrize("damage", [delete, overwrite, empty, age])
def test_a_damaged_index_is_made_anew_at_the_next_write(store: Store, damage: Callable[[Path], None]) -> None:
    make_result(store, KEY, b"some bytes")
    store.close()
    damage(store.index.path)
    again = Store(store.root.parent)
    again.note_run("x", [1, 2])
    again.close()
    assert Store(store.root.parent).run_noted("x") == [1, 2]


def test_an_index_that_cannot_be_written_is_no_failure(store: Store) -> None:
    store.prepare()
    store.index.path.mkdir()
    result = make_result(store, KEY, b"some bytes")
    assert [found.digest for found in Store(store.root.parent).known(KEY).results] == [result.digest]
    assert store.run_noted("x") is None


def test_an_index_that_is_not_there_is_not_made_by_reading(cache: Path) -> None:
    store = Store(cache)
    assert store.known(KEY).results == []
    assert store.find("0" * 64) is None
    assert not cache.exists()


WRITER = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=1")
connection.execute("BEGIN IMMEDIATE")
for i in range(2000):
    connection.execute("INSERT OR REPLACE INTO history VALUES (?, ?, '')", (f"dead {i}", "x" * 500))
os.kill(os.getpid(), 9)
"""


def test_a_journal_that_a_dead_process_left_is_rolled_back(cache: Path) -> None:
    store = Store(cache)
    store.note_run("before", 1)
    store.close()
    subprocess.run([sys.executable, "-c", WRITER, str(store.index.path)], check=False, timeout=60)
    assert store.index.path.with_name("index.db-journal").exists()
    again = Store(cache)
    assert again.run_noted("before") == 1
    assert again.run_noted("dead 3") is None


ROWS = {f"recipe {i}": f'{{"weights": [0.{i}, 0.{9 - i}]}}' * 20 for i in range(1, 9)}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An index with rows in every table."""
    index = Index(tmp_path_factory.mktemp("index") / "index.db")
    index.put("parsed", ROWS)
    index.put("seen", {name: (text, 1, text) for name, text in ROWS.items()})
    index.insert("digests", ROWS.items())
    for table in ("known", "expected", "tensors", "verdicts", "history"):
        index.put(table, ROWS)
    index.close()
    return index.path.read_bytes()


def test_no_byte_of_an_index_misleads(filled: bytes, tmp_path: Path) -> None:
    """Every 101st byte is another one, in turn: a row is what was written, or it is not there."""
    path, misses = tmp_path / "index.db", 0
    for place in range(0, len(filled), 101):
        path.write_bytes(filled[:place] + bytes([filled[place] ^ 1 << place % 8]) + filled[place + 1 :])
        index = Index(path)
        found = index.read("parsed")
        assert set(found) <= set(ROWS.items()), place
        seen = index.read("seen")
        assert set(seen) <= {(name, text, 1, text) for name, text in ROWS.items()}, place
        assert set(index.read("digests")) <= set(ROWS.items()), place
        for table in ("known", "expected", "tensors", "verdicts", "history"):
            assert index.read_keyed(table, ROWS).items() <= ROWS.items(), (table, place)
        misses += len(found) + len(seen) < 2 * len(ROWS)
        index.close()
    assert misses > 10  # so that flips did hit rows


def test_a_row_with_another_weight_in_it_is_not_believed(tmp_path: Path) -> None:
    """SQLite itself would not notice."""
    path = tmp_path / "index.db"
    Index(path).put("parsed", {"recipe": "weights = [0.6, 0.4]"})
    path.write_bytes(path.read_bytes().replace(b"[0.6,", b"[0.7,"))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT value FROM parsed").fetchone() == ("weights = [0.7, 0.4]",)
    assert Index(path).read_keyed("parsed", ["recipe"]) == {}


def test_an_index_that_breaks_while_it_is_written_is_made_anew(filled: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    page = 4096
    path.write_bytes(filled[:page] + b"\xff" * (len(filled) - page))  # its head is whole, all its tables are not
    index = Index(path)
    index.put("history", {"x": "1"})
    index.close()
    assert Index(path).read_keyed("history", ["x"]) == {"x": "1"}


def test_many_keys_are_looked_up_at_once(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    index.put("known", {f"k{i}": str(i) for i in range(3000)})
    found = Index(tmp_path / "index.db").read_keyed("known", [f"k{i}" for i in range(0, 6000, 2)])
    assert found == {f"k{i}": str(i) for i in range(0, 3000, 2)}


def test_a_place_with_odd_letters_has_an_index_too(tmp_path: Path) -> None:
    path = tmp_path / "a ?#%ü" / "index.db"
    Index(path).put("history", {"x": "1"})
    assert Index(path).read_keyed("history", ["x"]) == {"x": "1"}


# -- files that are not ours -------------------------------------------------------------------------------------------


def test_a_look_right_after_a_change_cannot_be_trusted() -> None:
    stat = Stat(1, 1, 1, mtime_ns=10 * SETTLED, ctime_ns=10 * SETTLED)
    assert not is_settled(stat, 11 * SETTLED - 1)
    assert is_settled(stat, 11 * SETTLED)


def test_a_change_of_the_name_alone_counts_too() -> None:
    stat = Stat(1, 1, 1, mtime_ns=0, ctime_ns=10 * SETTLED)
    assert not is_settled(stat, 11 * SETTLED - 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(b"first")
    return path


def settle(store: Store, path: Path) -> str:
    """Remember a file as if it had been looked at long after its last change; forget what this process knows."""
    stat, sha256 = stat_of(path), digest_of(path.read_bytes())
    assert stat is not None
    store.seen.remember(path, stat, sha256, stat.ctime_ns + SETTLED)
    store.close()
    return sha256


def test_a_file_that_was_just_written_is_looked_at_once_more(store: Store, cache: Path, file: Path) -> None:
    store.seen.digest(file)
    store.close()
    assert Store(cache).seen.known_digest(file) == ""


def test_a_settled_file_is_not_read_again(store: Store, cache: Path, file: Path) -> None:
    """What was remembered is believed: here it is made wrong on purpose."""
    stat = stat_of(file)
    assert stat is not None
    store.seen.remember(file, stat, "0" * 64, stat.ctime_ns + SETTLED)
    store.close()
    assert Store(cache).seen.digest(file) == "0" * 64


def test_an_edit_that_keeps_size_and_mtime_is_noticed_by_ctime(store: Store, cache: Path, file: Path) -> None:
    settle(store, file)
    before = file.stat()
    time.sleep(0.02)  # coarser than the clock of any file system here
    file.write_bytes(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert Store(cache).seen.digest(file) == digest_of(b"other")


def test_a_file_put_in_its_place_is_noticed_by_its_inode(store: Store, cache: Path, file: Path) -> None:
    settle(store, file)
    before = file.stat()
    twin = file.with_name("twin")
    twin.write_bytes(b"other")
    os.utime(twin, ns=(before.st_atime_ns, before.st_mtime_ns))
    twin.replace(file)
    assert file.stat().st_ino != before.st_ino
    assert Store(cache).seen.digest(file) == digest_of(b"other")


def test_of_many_files_the_index_is_told_at_once_also_if_something_breaks(
    store: Store, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it waits for the disk, and a data set has thousands of pictures."""
    told: list[int] = []
    write = Index.write

    def watched(index: Index, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        told.append(len(rows := list(rows)))
        write(index, statement, rows)

    monkeypatch.setattr(Index, "write", watched)
    monkeypatch.setattr(seen, "MANY", 3)
    paths = [tmp_path / f"{n}.png" for n in range(5)]

    def look() -> None:
        with store.seen.gathering():
            for path in paths:
                path.write_bytes(path.name.encode())
                stat = stat_of(path)
                assert stat is not None
                store.seen.remember(path, stat, digest_of(path.read_bytes()), stat.ctime_ns + SETTLED)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert told == [3, 3, 2, 2]  # what they hold, and by what they are found
    store.close()
    assert [Store(cache).seen.known_digest(path) for path in paths] == [digest_of(p.read_bytes()) for p in paths]


def test_a_file_is_found_by_its_bytes_while_it_is_unchanged(store: Store, cache: Path, file: Path) -> None:
    sha256 = settle(store, file)
    assert Store(cache).find(sha256) == file
    file.write_bytes(b"other")
    assert Store(cache).find(sha256) is None
    file.unlink()
    assert Store(cache).find(sha256) is None


def test_a_file_that_is_not_there_has_no_stat(tmp_path: Path) -> None:
    assert stat_of(tmp_path / "nothing") is None
    (tmp_path / "file").touch()
    assert stat_of(tmp_path / "file" / "below") is None
