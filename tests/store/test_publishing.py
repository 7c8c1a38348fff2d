"""What is published is there whole or not at all, and what is damaged counts as missing."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge.artifact import Component
from sdforge.errors import ActionFailed, BrokenPromise, ResourceError, UsageError
from sdforge.identity import digest_of_text
from sdforge.store import Store, files, seen
from sdforge.store.entries import Known, alias_in, alias_text, load_result, preimage_in
from sdforge.store.files import (
    FAULT,
    Lock,
    open_regular,
    publish,
    publish_bytes,
    read_entry,
    sha256_of,
    stat_of,
    within,
)
from tests.store.conftest import digest_of, make_result, manifest_of

ROOT = Path(__file__).parents[2]
KEY = "ab" * 32
WRITER = f"""
import sys
from pathlib import Path
from sdforge.store import Store
from tests.store.conftest import make_result
print(make_result(Store(Path(sys.argv[1])), "{KEY}", b"some bytes").digest)
"""
PUBLISHES = 7  # pack, table, log, losses, a sample, preimage, result


def write(cache: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != FAULT} | ({FAULT: fault} if fault else {})
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(cache)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def published(cache: Path) -> list[Path]:
    """All that lies under final names."""
    ours = ("objects", "results", "aliases", "preimages")
    return sorted(p for kind in ours for p in (cache / "v1" / kind).rglob("*") if p.is_file())


def assert_whole(cache: Path) -> None:
    for path in published(cache):
        if path.parts[-3] == "objects":
            assert sha256_of(path) == path.name
        elif path.suffix == ".json":
            assert json.loads(path.read_bytes())["digest"] == path.stem


def test_a_result_is_published_in_as_many_steps_as_this_file_thinks(cache: Path) -> None:
    write(cache)
    assert len(published(cache)) == PUBLISHES


@pytest.mark.parametrize("at", range(1, PUBLISHES + 1))
def test_a_kill_at_any_publish_leaves_nothing_half(cache: Path, at: int) -> None:
    killed = write(cache, f"kill:{at}")
    assert killed.returncode == -9
    assert_whole(cache)
    assert Store(cache).known(KEY).results == []
    done = write(cache)
    assert [result.digest for result in Store(cache).known(KEY).results] == [done.stdout.strip()]
    assert_whole(cache)
    assert not list((cache / "v1" / "results").rglob(".*"))


@pytest.mark.parametrize("at", range(1, PUBLISHES + 1))
def test_an_error_at_any_publish_leaves_nothing_half(cache: Path, at: int) -> None:
    failed = write(cache, f"EIO:{at}")
    assert failed.returncode != 0
    assert "planted: Input/output error" in failed.stderr
    assert_whole(cache)
    assert Store(cache).known(KEY).results == []


def test_what_a_dead_process_left_is_swept(cache: Path) -> None:
    write(cache, "kill:1")
    assert any((cache / "v1" / "tmp").iterdir())
    Store(cache).prepare()
    assert not any(p.is_dir() for p in (cache / "v1" / "tmp").iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells of processes that have ended")
def test_what_a_killed_process_left_is_swept_before_anybody_asks_how_it_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(os, "getpid", lambda: killed.pid)
    folder = store.workplace()
    monkeypatch.undo()
    Store(store.root.parent).prepare()
    assert folder.is_dir()
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its exit code
    Store(store.root.parent).prepare()
    assert not folder.exists()
    assert killed.wait() == -9


def test_the_workplace_of_a_living_process_is_left_alone(store: Store) -> None:
    folder = store.workplace()
    Store(store.root.parent).prepare()
    assert folder.is_dir()


def test_what_another_machine_is_making_is_left_alone_until_it_is_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process ids say nothing there: this one's are of processes that are gone here."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(files, "here", lambda: "0123456789ab")  # a second machine, or this one before it was restarted
    monkeypatch.setattr(os, "getpid", lambda: gone.pid)
    folder = store.workplace()
    (folder / "pack").touch()
    part = store.derived() / f".{files.own_name()}"
    part.parent.mkdir()
    part.touch()
    monkeypatch.undo()
    Store(store.root.parent).prepare()
    assert folder.is_dir()
    assert part.exists()
    old = time.time() - files.STALE - 1
    for path in (folder, part):
        os.utime(path, (old, old))
    Store(store.root.parent).prepare()
    assert folder.is_dir()  # something in it is new
    assert not part.exists()
    os.utime(folder / "pack", (old, old))
    Store(store.root.parent).prepare()
    assert not folder.exists()


def test_a_folder_in_an_entrys_place_is_set_aside(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    alias = store.keyed("aliases", "cd" * 32)
    for path in (alias, store.keyed("results", KEY) / f"{result.digest}.json"):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
        (path / "x").touch()
    store.keep(result, "{}")
    store.add_alias("cd" * 32, KEY)
    assert [found.digest for found in store.fresh(KEY).results] == [result.digest]
    assert store.fresh("cd" * 32).alias == KEY


def test_containers_on_one_machine_count_as_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their process ids are counted apart."""
    own = files.here.__wrapped__()
    monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    assert files.here.__wrapped__() != own


def test_bytes_are_flushed_before_their_name_and_the_name_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

    def note_fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        done.append(f"flush {name}" if stat.S_ISDIR(os.fstat(fd).st_mode) else "flush file")
        fsync(fd)

    def note_mkdir(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        done.append(f"make {path.name}")

    def note_replace(*arguments: str | Path) -> None:
        done.append("rename")
        replace(*arguments)

    files.make_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", note_fsync)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "mkdir", note_mkdir)
    publish_bytes(b"x", tmp_path / "final", tmp_path / "tmp")
    assert done == ["flush file", "rename", f"flush {tmp_path.name}"]
    done.clear()
    publish_bytes(b"x", tmp_path / "a/b/final", tmp_path / "tmp")
    made = ["make a", f"flush {tmp_path.name}", "make b", "flush a"]
    assert done == ["flush file", *made, "rename", "flush b"]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are flushed from now on, by a process that knows of none yet."""
    found: list[Path] = []

    def note(folder: Path, flush: Callable[[Path], None] = files.flush_folder) -> None:
        found.append(folder)
        flush(folder)

    monkeypatch.setattr(files, "flush_folder", note)
    monkeypatch.setattr(files, "_lasting", set())
    return found


def test_folders_that_a_killed_build_made_and_did_not_flush_are_flushed_by_the_next_one(
    store: Store, tmp_path: Path, flushed: list[Path]
) -> None:
    """Or by one that is at work beside it: a power loss would take what it said is done."""
    place = store.object(digest_of(b"x")).parent
    place.mkdir(parents=True)
    store.put_bytes(b"x")
    assert flushed.index(tmp_path) < flushed.index(store.root) < flushed.index(place.parent) < flushed.index(place)


@pytest.mark.parametrize("mark", ["forge.toml", "CACHEDIR.TAG"])
def test_nothing_above_a_project_or_a_cache_is_looked_at(tmp_path: Path, flushed: list[Path], mark: str) -> None:
    (tmp_path / mark).touch()
    (tmp_path / "out").mkdir()
    publish_bytes(b"x", tmp_path / "out/toy/card.md", tmp_path)
    assert flushed == [tmp_path, tmp_path / "out", tmp_path / "out/toy"]


def test_folders_are_flushed_once_a_process_and_where_a_disk_is_mounted_never(
    store: Store, flushed: list[Path]
) -> None:
    made = [store.object(digest_of(data)).parent for data in (b"x", b"y")]
    for place in made:
        place.mkdir(parents=True)
    store.put_bytes(b"x")
    flushed.clear()
    store.put_bytes(b"y")  # its folder was there when the one above was flushed
    assert flushed == made[1:]
    late = store.object(digest_of(b"z")).parent
    late.mkdir()
    flushed.clear()
    store.put_bytes(b"z")
    assert flushed == [late.parent, late]
    flushed.clear()
    files._lasting.clear()
    files.make_folder(Path("/proc"))
    assert flushed == []


def test_an_objects_file_cannot_be_written_to(store: Store) -> None:
    store.prepare()
    sha256 = store.put_bytes(b"x")
    assert stat.S_IMODE(store.object(sha256).stat().st_mode) == 0o444


def test_publishing_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "final").write_bytes(b"old")
    publish_bytes(b"new", tmp_path / "final", tmp_path / "tmp")
    assert (tmp_path / "final").read_bytes() == b"new"


def test_a_failed_publish_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "x").touch()
    with pytest.raises(ResourceError, match="final could not be kept") as caught:
        publish_bytes(b"new", tmp_path / "final", tmp_path / "tmp")
    assert caught.value.exit_code == 4
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        publish_bytes(b"x", tmp_path / "final", tmp_path / "tmp")
    assert "forge clean" in caught.value.hint
    assert not (tmp_path / "final").exists()


def test_a_cache_that_cannot_be_made_is_a_resource(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError) as caught:
        Store(tmp_path / "file").prepare()
    assert caught.value.exit_code == 4


def test_the_same_bytes_are_kept_once(store: Store) -> None:
    store.prepare()
    one = store.put_bytes(b"x")
    before = store.object(one).stat()
    assert store.put_bytes(b"x") == one
    assert store.object(one).stat() == before


def test_a_damaged_object_is_set_aside_and_missing_from_then_on(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    path = store.object(result.packs[0])
    path.chmod(0o644)
    path.write_bytes(b"same bytes")
    with pytest.raises(BrokenPromise, match="its bytes are not what its name says") as caught:
        store.read_object(path.name)
    assert caught.value.exit_code == 3
    assert (store.root / "quarantine" / path.name).read_bytes() == b"same bytes"
    with pytest.raises(BrokenPromise, match="the store has no object"):
        store.read_object(path.name)
    assert not store.holds(result)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"key": 3}', "null", '"x"', "[" * 2000, '{"components": []}', "\0"]
)
def test_a_damaged_result_is_set_aside_and_counts_as_missing(store: Store, text: str) -> None:
    result = make_result(store, KEY, b"some bytes")
    path = store.root / "results" / KEY[:2] / KEY / f"{result.digest}.json"
    path.chmod(0o644)
    path.write_text(text)
    assert Store(store.root.parent).fresh(KEY).results == []
    assert (store.root / "quarantine" / path.name).is_file()


def test_a_changed_digit_in_a_result_is_noticed(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    path = store.root / "results" / KEY[:2] / KEY / f"{result.digest}.json"
    path.chmod(0o644)
    content = result.components["lora"].content
    path.write_text(path.read_text().replace(content, "0" + content[1:] if content[0] != "0" else "1" + content[1:]))
    assert Store(store.root.parent).fresh(KEY).results == []


def test_a_result_under_another_name_is_set_aside(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    folder = store.root / "results" / KEY[:2] / KEY
    (folder / f"{result.digest}.json").rename(folder / f"{'0' * 64}.json")
    assert store.fresh(KEY).results == []


def test_of_several_results_the_first_made_comes_first(store: Store) -> None:
    late = make_result(store, KEY, b"late", made=2.0)
    early = make_result(store, KEY, b"early", made=1.0)
    assert [result.digest for result in store.known(KEY).results] == [early.digest, late.digest]


def test_a_result_comes_back_as_it_was_kept(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    (found,) = Store(store.root.parent).fresh(KEY).results
    assert found == result
    assert store.record(found) == result.record
    assert store.preimage(KEY) == json.loads(manifest_of(KEY))


def test_under_no_key_nothing_is_kept_and_nothing_is_lost(store: Store) -> None:
    store.note_preimage(KEY, manifest_of(KEY))
    assert store.preimage("") is None
    assert not store.known("").results
    assert store.preimage(KEY) == json.loads(manifest_of(KEY))


def test_what_is_known_survives_the_index(store: Store) -> None:
    known = Known([make_result(store, KEY, b"some bytes")], alias="x", formula={"components": {}, "facts": {}})
    (found,) = Known.load(known.dump()).results
    assert found.record == {}
    assert (found.digest, found.packs) == (known.results[0].digest, known.results[0].packs)
    assert (Known.load(known.dump()).alias, Known.load(known.dump()).formula) == (known.alias, known.formula)


def test_an_alias_leads_to_another_key(store: Store) -> None:
    make_result(store, KEY, b"some bytes")
    store.add_alias("cd" * 32, KEY, manifest_of("cd" * 32))
    assert Store(store.root.parent).known("cd" * 32).alias == KEY
    assert store.preimage("cd" * 32) == json.loads(manifest_of("cd" * 32))


def test_every_changed_bit_of_a_manifest_is_seen() -> None:
    data = b'{"method":"x","settings":{}}'
    key = digest_of_text("action", data.decode())
    assert preimage_in(key, data) == {"method": "x", "settings": {}}
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r".+"):
            preimage_in(key, bytes(spoilt))


def test_every_changed_bit_of_an_alias_is_seen() -> None:
    data = alias_text(KEY, "cd" * 32).encode()
    assert alias_in(KEY, data) == "cd" * 32
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="not the alias that its name says"):
            alias_in(KEY, bytes(spoilt))
    with pytest.raises(ValueError, match="not the alias that its name says"):
        alias_in("ef" * 32, data)  # it stands under another key


def test_a_pipe_in_an_entrys_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no file"):
        read_entry(tmp_path / "pipe")


def test_a_link_in_an_entrys_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match="a link"):
        read_entry(tmp_path / "link")


def test_a_dropped_result_is_set_aside(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    store.drop(result, "its bytes are damaged")
    assert store.known(KEY).results == []
    assert Store(store.root.parent).known(KEY).results == []


def test_a_table_of_tensors_comes_back_sorted(store: Store) -> None:
    result = make_result(store, KEY, b"some bytes")
    (tensor,) = Store(store.root.parent).table(result.components["lora"])
    assert (tensor.name, tensor.shape, tensor.sha256) == ("x", (10,), digest_of(b"some bytes"))
    assert tensor.spot is not None
    assert tensor.spot.file == result.packs[0]


def test_a_table_that_is_missing_is_a_broken_promise(store: Store) -> None:
    with pytest.raises(BrokenPromise, match="the store has no object"):
        store.table(Component("x", "x", "0" * 64, ""))


def test_a_lock_is_held_once_and_free_when_its_holder_is_gone(store: Store) -> None:
    one, two = store.lock(KEY), store.lock(KEY)
    assert one.acquire(wait=False)
    assert not two.acquire(wait=False)
    assert two.holder() == str(os.getpid())
    one.release()
    assert two.acquire(wait=False)


def test_nothing_of_an_earlier_holder_is_left_in_a_lock(store: Store) -> None:
    lock = store.lock(KEY)
    lock.path.write_text("123456789012\n")
    assert lock.acquire(wait=False)
    assert lock.holder() == str(os.getpid())


def test_a_lock_lives_as_long_as_anybody_has_its_descriptor(store: Store) -> None:
    lock = store.lock(KEY)
    lock.acquire(wait=False)
    worker = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fd])
    lock.release()
    try:
        assert not store.lock(KEY).acquire(wait=False)
    finally:
        worker.kill()
        worker.wait()
    assert store.lock(KEY).acquire(wait=False)


def test_a_shared_guard_keeps_out_who_wants_it_alone(store: Store) -> None:
    store.prepare()
    one, two, alone = store.guard(), store.guard(), store.guard()
    assert one.share(wait=False)
    assert two.share(wait=False)
    assert not alone.acquire(wait=False)
    one.release()
    two.release()
    assert alone.acquire(wait=False)


def test_a_lock_file_is_never_deleted(store: Store) -> None:
    with Lock(store.lock(KEY).path) as lock:
        lock.acquire(wait=False)
    assert lock.path.is_file()


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "~/x", "C:x", "a\\..\\..\\x", "", " ", "a\0b", "\\\\host\\x"]
)
def test_no_path_leads_out_of_the_project(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no path within the project"):
        within(tmp_path, name)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nothing"):
        with pytest.raises(UsageError):
            open_regular(path)


def test_publish_says_what_could_not_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="final could not be kept"):
        publish(tmp_path / "nothing", tmp_path / "final")


def test_no_lock_is_taken_through_a_link(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    store.prepare()
    (store.root / "locks").mkdir(exist_ok=True)
    (store.root / "locks" / f"{KEY}.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ResourceError, match="cannot be had"):
        store.lock(KEY)
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_lock_is_held_though_the_disk_has_no_room_for_who_holds_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "pwrite", full)
    with store.lock(KEY) as lock, store.lock(KEY) as other:
        assert lock.acquire(wait=False)
        assert not other.acquire(wait=False)


def test_a_file_that_changes_at_every_look_is_given_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x")

    def grow(path: Path) -> str:
        path.write_bytes(path.read_bytes() + b"x")
        return "0" * 64

    monkeypatch.setattr(seen, "sha256_of", grow)
    with pytest.raises(ActionFailed, match="growing keeps changing while it is read"):
        store.seen.digest(path)
    assert not store.seen.has(path, "0" * 64)  # among others it is passed over


def test_a_name_that_is_too_long_for_a_file_is_none(tmp_path: Path) -> None:
    assert stat_of(tmp_path / ("x" * 300)) is None


def test_a_file_whose_name_is_no_text_is_hashed_all_the_same(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "m\udcff.safetensors"
    path.write_bytes(b"some bytes")
    store.prepare()
    with store.seen.gathering():
        assert store.seen.digest(path) == digest_of(b"some bytes")
    assert store.index.read("seen") == []  # which holds text


def test_a_file_that_cannot_be_read_has_not_the_bytes_that_are_looked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shut(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = tmp_path / "shut"
    path.write_bytes(b"x")
    assert store.seen.has(path, digest_of(b"x"))
    path.write_bytes(b"y")
    monkeypatch.setattr(seen, "sha256_of", shut)
    assert not store.seen.has(path, digest_of(b"y"))


@pytest.mark.parametrize("data", [b'{"key": "a\n"}', b'{"key": ', b"\xff\xfe{}", b""])
def test_what_is_no_json_any_more_is_said_in_our_words(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    path.write_bytes(data)
    for look in (load_result, lambda found: preimage_in(KEY, found.read_bytes())):
        with pytest.raises(ValueError, match="its bytes are not what they were"):
            look(path)
