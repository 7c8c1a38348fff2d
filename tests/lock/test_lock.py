"""`forge.lock` as text: the same content is the same text, and what forge did not write is refused."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdforge.errors import UsageError
from sdforge.identity import digest_of_text
from sdforge.lock import Lock, Pin, read_lock
from tests.lock.conftest import a_pin

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LEAF = st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE: st.SearchStrategy[Any] = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def again(lock: Lock) -> Lock:
    return read_lock(lock.dump().encode(), "forge.lock")


def test_what_is_written_is_read_again(lock: Lock) -> None:
    assert again(lock).dump() == lock.dump()
    assert (again(lock).sources, again(lock).targets) == (lock.sources, lock.targets)
    assert again(lock).results == lock.results


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(TEXT, VALUE, max_size=4), st.dictionaries(TEXT, VALUE, max_size=4))
def test_whatever_settings_and_facts_hold_is_read_again(chosen: dict[str, Any], facts: dict[str, Any]) -> None:
    lock = Lock()
    lock.pin(a_pin(settings=chosen, facts=facts), replace=True)
    (found,) = again(lock).pins("a" * 64).values()
    assert (found.settings, found.facts) == (chosen, facts)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(["a:x", "a:y", "b:x", "b:y"]), st.permutations("123"))
def test_the_order_in_which_entries_came_does_not_show(names: list[str], digests: list[str]) -> None:
    one, two = Lock(), Lock()
    for lock, order, pins in ((one, sorted(names), sorted(digests)), (two, names, digests)):
        for name in order:
            lock.targets[name] = {"key": "8" * 64}
        for digest in pins:
            lock.pin(a_pin(digest=digest), replace=False)
    assert one.dump() == two.dump()


def test_an_empty_lock_is_read_again() -> None:
    assert again(Lock()) == Lock()


def test_every_entry_is_a_table_of_its_own(lock: Lock) -> None:
    """So a merge in git keeps both sides' tables."""
    heads = [line for line in lock.dump().splitlines() if line.startswith("[")]
    assert heads == [
        "[source.flat]",
        "[source.sketches]",
        '[target."other:soft"]',
        '[target."r:preset.export"]',
        '[target."r:soft"]',
        f"[result.{'a' * 64}.{'1' * 64}]",
    ]


def test_it_says_that_it_is_to_be_committed(lock: Lock) -> None:
    assert lock.dump().startswith("# Written by forge; commit it.")


def test_a_pin_is_found_by_its_plan_keys_and_by_its_own(lock: Lock) -> None:
    assert lock.content_key("f" * 64) == lock.content_key("a" * 64) == "a" * 64
    assert lock.content_key("0" * 64) == ""


def test_a_new_pin_is_found_at_once(lock: Lock) -> None:
    assert lock.content_key("e" * 64) == ""
    lock.pin(a_pin("c", plans=["e" * 64]), replace=False)
    assert lock.content_key("e" * 64) == "c" * 64


def test_a_second_result_stands_beside_the_first_unless_it_replaces_it(lock: Lock) -> None:
    lock.pin(a_pin(digest="2"), replace=False)
    assert sorted(lock.pins("a" * 64)) == ["1" * 64, "2" * 64]
    lock.pin(a_pin(digest="3"), replace=True)
    assert sorted(lock.pins("a" * 64)) == ["3" * 64]


def test_both_sides_of_a_git_merge_are_read(lock: Lock) -> None:
    other = Lock()
    other.pin(a_pin(digest="2"), replace=True)
    table = other.dump().partition("version = 1\n")[2]
    found = read_lock((lock.dump() + table).encode(), "forge.lock")
    assert sorted(found.pins("a" * 64)) == ["1" * 64, "2" * 64]


def with_targets(*names: str) -> Lock:
    """A lock of targets that are their own results."""
    lock = Lock()
    for name in names:
        lock.targets[f"r:{name}"] = {"key": digest_of_text("k", name), "digest": digest_of_text("d", name)}
        lock.pin(replace(a_pin(), key=digest_of_text("k", name), digest=digest_of_text("d", name)), replace=False)
    return lock


@pytest.mark.parametrize("style", ["merge", "diff3"])
@pytest.mark.parametrize("count", [0, 3, 7])
def test_two_branches_of_git_are_merged_entry_by_entry(tmp_path: Path, style: str, count: int) -> None:
    """With the real git, which leaves a conflict wherever both sides have something new at one place."""
    old = [f"old{i}" for i in range(count)]

    def git(*arguments: str) -> None:
        own = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", f"merge.conflictStyle={style}")
        subprocess.run(["git", *own, *arguments], cwd=tmp_path, check=arguments[0] != "merge", capture_output=True)

    git("init", "-q", "-b", "main")
    for branch, names in (("main", old), ("one", [*old, "one"]), ("two", [*old, "two"])):
        if branch != "main":
            git("checkout", "-q", "-b", branch)
        (tmp_path / "forge.lock").write_text(with_targets(*names).dump())
        git("add", "forge.lock")
        git("commit", "-qm", branch)
        git("checkout", "-q", "main")
    git("merge", "-q", "one")
    git("merge", "-q", "two")
    text = (tmp_path / "forge.lock").read_bytes()
    assert b"<<<<<<<" in text
    assert read_lock(text, "forge.lock").dump() == with_targets(*old, "one", "two").dump()


def test_two_results_of_one_key_stand_side_by_side_after_a_conflict() -> None:
    """So that the plan stops, and `forge lock --take` chooses."""
    one, two = Lock(), Lock()
    one.pin(a_pin(digest="1"), replace=True)
    two.pin(a_pin(digest="2"), replace=True)
    text = f"<<<<<<< HEAD\n{one.dump()}=======\n{two.dump()}>>>>>>> other\n"
    assert sorted(read_lock(text.encode(), "forge.lock").pins("a" * 64)) == ["1" * 64, "2" * 64]


def test_plan_keys_of_one_result_add_up_after_a_conflict() -> None:
    one, two = Lock(), Lock()
    one.pin(a_pin(plans=["e" * 64]), replace=True)
    two.pin(a_pin(plans=["f" * 64]), replace=True)
    text = f"<<<<<<< HEAD\n{one.dump()}=======\n{two.dump()}>>>>>>> other\n"
    (pin,) = read_lock(text.encode(), "forge.lock").pins("a" * 64).values()
    assert pin.plans == ["e" * 64, "f" * 64]


def test_the_marks_of_a_git_merge_are_refused_with_the_way_out(lock: Lock) -> None:
    text = lock.dump().replace("[source.flat]", "<<<<<<< HEAD\n[source.flat]")
    with pytest.raises(UsageError) as caught:
        read_lock(text.encode(), "forge.lock")
    assert caught.value.message.startswith("forge.lock cannot be read: ")
    assert caught.value.hint == "keep both sides' tables between the conflict's marks, and delete the marks"


@pytest.mark.parametrize("version", ["2", '"1"', "0"])
def test_a_lock_of_another_version_is_refused(lock: Lock, version: str) -> None:
    text = lock.dump().replace("version = 1\n", f"version = {version}\n")
    with pytest.raises(UsageError, match=r"forge\.lock was written by another version of sdforge") as caught:
        read_lock(text.encode(), "forge.lock")
    assert caught.value.hint == "update sdforge"


def test_a_lock_without_a_version_is_refused() -> None:
    with pytest.raises(UsageError, match="another version"):
        read_lock(b"", "forge.lock")


@pytest.mark.parametrize(
    "text",
    [
        "source = 3",
        "target = []",
        "result = 3",
        'source.flat = "x"',
        "target.x = 3",
        "[source.flat]\nsize = 3",
        "[source.flat]\ndigest = 3",
        '[source.flat]\nresolved = "hf://a/b"\nfiles = { "x" = "../../elsewhere" }',
        "[source.flat]\nresolved = 'hf://a/b'\nfiles = 3",
        '[target."r:x"]\nkey = 3',
        "[result]\naa = 3",
        "[result.aa]\nbb = 3",
        "[result.aa.bb]\nplans = 3",
        "[result.aa.bb]\nplans = [3]",
        "[result.aa.bb]\nkind = []",
        "[result.aa.bb]\ncomponents = []",
        "[result.aa.bb]\ncomponents = { lora = 3 }",
        '[result.aa.bb]\nnorm = "x"',
        "[result.aa.bb]\nunknown = 3",
        '[result.aa.bb]\nkey = "x"',
        '[result."../../elsewhere".bb]\nkind = "lora"',
        '[result.aa."/etc/passwd"]\nkind = "lora"',
        '[result.aa.bb]\nplans = ["../../elsewhere"]',
        '[result.aa.bb]\nkind = "dataset"',
        '[result.aa.bb]\nkind = "dataset"\nfacts = { pictures = [3] }',
        '[result.aa.bb]\nkind = "dataset"\nfacts = { pictures = [["../elsewhere", "a cat", 1]] }',
        "[result.aa.bb]\nfacts = { alpha = 99999999999999999999 }",
        "[result.aa.bb]\nsettings = { steps = 2026-11-28 }",
        "[result.aa.bb]\ninputs = { on = [nan] }",
    ],
)
def test_a_lock_that_was_damaged_by_hand_is_refused_in_one_sentence(text: str) -> None:
    """Where bytes lie has their name: what is no digest would lead out of the cache."""
    text = text.replace("aa", "a" * 64).replace("bb", "b" * 64)
    with pytest.raises(UsageError, match=r"^forge\.lock holds "):
        read_lock(f"version = 1\n{text}\n".encode(), "forge.lock")


def test_a_key_without_a_result_is_left_out() -> None:
    found = read_lock(f"version = 1\n[result.{'a' * 64}]\n".encode(), "forge.lock")
    assert Lock.from_json(found.to_json()).results == {}


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"version = 1\0", b"version = ", b"\x00" * 100, b"version = " + b"9" * 5000]
)
def test_bytes_that_are_no_lock_are_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"^forge\.lock cannot be read: "):
        read_lock(data, "forge.lock")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2000), st.integers(0, 255))
def test_one_damaged_byte_is_an_error_or_a_lock(place: int, byte: int) -> None:
    lock = Lock(targets={"r:soft": {"key": "8" * 64}})
    lock.pin(a_pin(), replace=True)
    data = bytearray(lock.dump().encode())
    data[place % len(data)] = byte
    try:
        found = read_lock(bytes(data), "forge.lock")
    except UsageError:
        return
    assert isinstance(found.dump(), str)


@pytest.mark.parametrize("end", range(0, 900, 60))
def test_a_lock_that_was_cut_off_is_an_error_or_a_shorter_lock(lock: Lock, end: int) -> None:
    try:
        found = read_lock(lock.dump().encode()[:end], "forge.lock")
    except UsageError:
        return
    assert len(found.dump()) <= len(lock.dump())


def test_a_number_that_is_none_has_no_place_in_it() -> None:
    lock = Lock()
    lock.pin(a_pin(norm=float("nan")), replace=True)
    with pytest.raises(ValueError, match="has no place in a table"):
        lock.dump()


def test_a_pin_is_an_artifact_whose_tensors_are_not_listed() -> None:
    artifact = a_pin().artifact()
    assert artifact.components["lora"].table == ""
    assert artifact.identity == artifact.digest


def test_the_cache_of_a_lock_holds_all_of_it(lock: Lock) -> None:
    assert Lock.from_json(lock.to_json()).dump() == lock.dump()


def test_every_field_of_a_pin_reaches_the_lock(lock: Lock) -> None:
    fields = set(Pin.__dataclass_fields__) - {"key", "digest"}
    text = lock.dump().partition("[result.")[2]
    assert {line.partition(" = ")[0] for line in text.splitlines()[1:]} == fields
