"""What is remembered of builds: one record a recipe. What another version wrote, or what is damaged, stops no build."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sdforge.chronicle import Chapter, Chronicle, Did, Past
from sdforge.drawn import Pictures
from sdforge.index import Index
from sdforge.session import open_session
from tests.quick import Quick
from tests.survival import Whole

# version 1 as it lies in indices: whoever changes it raises `chronicle.VERSION`
RECORD = (
    '{"v":1,"keys":{"r:a":"k2"},"before":{"r:a":"k1"},'
    '"builds":[{"made":2.0,"recipe":"seed = 2","steps":{"r:a":{"key":"k2","digest":"d2","state":"built",'
    '"why":"seed 1 → 2"}},"pictures":["p","d","c"]},'
    '{"made":1.0,"recipe":"seed = 1","steps":{},"pictures":null}],"passed":[["p","d","c"]]}'
)
FIRST, SECOND, THIRD = (Pictures(name, name, "c") for name in ("one", "two", "three"))


@pytest.fixture
def root(whole: Whole, quick: Quick, tmp_path: Path) -> Path:
    """A project that was built once, where it lies."""
    root = whole.clone(tmp_path / "project")
    assert quick.forge(root, "build", "--json").code == 0
    return root


def past(root: Path) -> Past:
    session = open_session(root)
    found = session.chronicle.past("toy")
    session.store.close()
    return found


def write(root: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(root / "cache/v1/index.db")) as connection, connection:
        connection.execute(statement, values)


def edit(root: Path, steps: int) -> None:
    path = root / "recipes" / "toy.toml"
    path.write_text(path.read_text().replace("steps = 6", f"steps = {steps}"))


def test_a_record_is_read_as_it_was_written() -> None:
    did = Did("k2", "d2", "built", "seed 1 → 2")
    chapters = (Chapter(2.0, "seed = 2", {"r:a": did}, Pictures("p", "d", "c")), Chapter(1.0, "seed = 1"))
    kept = Past({"r:a": "k2"}, {"r:a": "k1"}, chapters, (Pictures("p", "d", "c"),))
    assert Past.load(RECORD) == kept
    assert json.loads(kept.dump()) == json.loads(RECORD)


@pytest.mark.parametrize("text", [RECORD.replace('"v":1', '"v":2'), '{"keys":{}}', '[["a","b"]]', "null"])
def test_a_record_of_another_version_counts_as_lost(text: str) -> None:
    assert Past.load(text) == Past()


def test_what_was_before_is_what_the_last_change_changed() -> None:
    first = Past().with_keys({"r:a": "1", "r:b": "1"})
    second = first.with_keys({"r:b": "2"})
    assert (second.keys, second.before) == ({"r:a": "1", "r:b": "2"}, first.keys)
    assert second.with_keys({"r:a": "1"}) is second


def test_two_previews_that_passed_are_remembered_and_unchecked_ones_begin_anew() -> None:
    found = Past().with_passed(FIRST, unchecked=False).with_passed(SECOND, unchecked=False)
    assert found.passed == (SECOND, FIRST)
    assert found.with_passed(SECOND, unchecked=False) is found
    assert found.with_passed(FIRST, unchecked=False).passed == (FIRST, SECOND)
    assert found.with_passed(THIRD, unchecked=False).passed == (THIRD, SECOND)
    assert found.with_passed(SECOND, unchecked=True).passed == (SECOND,)


def test_what_another_process_has_entered_meanwhile_is_not_lost(tmp_path: Path) -> None:
    Index(tmp_path / "index.db").put("history", {"x": "1"})
    one, two = (Chronicle(Index(tmp_path / "index.db"), tmp_path, tmp_path / "out") for _ in range(2))
    assert one.past("r") == Past()
    two.change("r", lambda found: found.with_keys({"r:a": "1"}))
    one.change("r", lambda found: found.with_keys({"r:b": "1"}))
    assert one.past("r").keys == {"r:a": "1", "r:b": "1"}


def test_a_build_remembers_what_it_made_and_why(root: Path, quick: Quick) -> None:
    first = past(root)
    edit(root, 7)
    assert quick.forge(root, "build", "--json").code == 0
    now = past(root)
    assert (now.before, now.builds[1]) == (first.keys, first.builds[0])
    assert now.builds[0].steps["toy:a"].why == "steps 6 → 7"


def test_an_index_of_the_time_before_stops_no_build(root: Path, quick: Quick) -> None:
    """Builds were remembered in three other ways, in the table of histories."""
    write(root, "DROP TABLE builds")
    rows = {f"{kind}:{root}:toy": json.dumps(["of", {"another": "form"}]) for kind in ("builds", "keys", "passed")}
    session = open_session(root)
    session.store.index.put("history", rows | {f"last:{root}:toy:a": '"key"'})
    session.store.close()
    edit(root, 7)
    assert quick.forge(root, "why", "toy:a").code == 0
    assert quick.forge(root, "build", "--json").built == ["a", "preset.export"]
    assert [build.steps["toy:a"].state for build in past(root).builds] == ["built"]
    assert past(root).before == {}


def test_a_damaged_record_counts_as_lost(root: Path, quick: Quick) -> None:
    write(root, "UPDATE builds SET value = replace(value, 'built', 'burnt')")
    assert past(root) == Past()
    edit(root, 7)
    assert quick.forge(root, "build", "--json").built == ["a", "preset.export"]
    assert len(past(root).builds) == 1


def test_what_a_failed_build_did_not_make_is_still_explained(root: Path, quick: Quick) -> None:
    path = root / "recipes" / "toy.toml"
    path.write_text(path.read_text().replace("steps = 6", "steps = 6\nfails = true"))
    assert quick.forge(root, "build", "--json").code == 1
    assert "fails false → true" in quick.forge(root, "why", "toy:a").out
