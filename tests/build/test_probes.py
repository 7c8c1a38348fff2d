"""What is rebuilt after what change: the probes of which no build tool passes all, through the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Project, new_project

pytestmark = pytest.mark.usefixtures("forked")

Wait = Callable[[Callable[[], object]], None]
ALL = ["a", "b", "c", "preset.export"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    """A project that has been built."""
    project = new_project(tmp_path_factory.mktemp("probes") / "project", toy_checkpoint)
    assert project.build().built == ALL
    assert project.starts() == ["a", "b", "c"]
    return project


@pytest.fixture
def built(finished: Project, tmp_path: Path) -> Project:
    """A copy of it, cache and all, for one test."""
    shutil.copytree(finished.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.build()  # a copy's files are new to the stat cache
    project.trained()
    return project


def change_pixel(path: Path) -> None:
    with Image.open(path) as picture:
        changed = picture.copy()
    r, g, b = changed.getpixel((0, 0))  # type: ignore[misc]
    changed.putpixel((0, 0), (r ^ 1, g, b))
    changed.save(path)


def test_second_build_runs_nothing(built: Project) -> None:
    again = built.build()
    assert again.built == again.restored == built.trained() == []


def test_touching_sources_runs_nothing(built: Project) -> None:
    for path in [*(built.root / "base").rglob("*"), *(built.root / "drawings").iterdir(), built.recipe]:
        os.utime(path)
    assert built.build().built == built.trained() == []


def test_an_edit_runs_all_behind_it(built: Project) -> None:
    change_pixel(built.root / "drawings" / "0.png")
    assert built.build().built == ALL


def test_an_edited_caption_runs_all_behind_it(built: Project) -> None:
    (built.root / "drawings" / "1.txt").write_text("a green circle\n")
    assert built.build().built == ALL


def test_an_edit_in_the_middle_leaves_what_is_before_it(built: Project) -> None:
    built.edit("rank = 5", "rank = 4")
    assert built.build().built == ["c", "preset.export"]


def test_going_back_to_the_first_content_runs_nothing(built: Project) -> None:
    before = built.output.read_bytes()
    built.edit("rank = 8", "rank = 16")
    assert built.build().built == ALL
    assert built.output.read_bytes() != before
    built.edit("rank = 16", "rank = 8")
    built.trained()
    back = built.build()
    assert back.built == []
    assert back.restored == ["preset.export"]
    assert built.trained() == []
    assert built.output.read_bytes() == before


def test_an_edit_that_an_action_maps_to_the_same_bytes_stops_there(built: Project) -> None:
    built.edit("rank = 8", "rank = 8\ngrain = 1024")
    assert built.build().built == ALL
    change_pixel(built.root / "drawings" / "0.png")
    built.edit('[rehearsal.b]\non = "a"\ndataset = "drawings"', '[rehearsal.b]\non = "a"\ndataset = "others"')
    built.edit('[rehearsal.c]\non = "b"\ndataset = "drawings"', '[rehearsal.c]\non = "b"\ndataset = "others"')
    shutil.copytree(built.root / "drawings", built.root / "others")
    with (built.root / "forge.toml").open("a") as file:
        file.write('\n[dataset.others]\npath = "others"\ntrigger = "<toy>"\n')
    built.build()
    built.trained()
    change_pixel(built.root / "drawings" / "1.png")
    assert built.build().built == ["a", "preset.export"]  # a file tells in its header how it came to be
    assert built.starts() == ["a"]
    assert built.build().built == []


def test_a_changed_setting_with_the_same_result_runs_that_action_alone(built: Project) -> None:
    built.edit('on = "a"', 'on = "a"\nremark = "nothing"')
    assert built.build().built == ["b", "preset.export"]
    assert built.build().built == []
    built.output.unlink()
    assert built.build().restored == ["preset.export"]
    other = built.clone(built.root.with_name("other"))
    assert other.build().built == ALL
    assert other.output.read_bytes() == built.output.read_bytes()


def test_a_raised_version_of_a_method_with_the_same_bytes_runs_nothing_behind_it(
    tmp_path: Path, toy_checkpoint: Path
) -> None:
    methods = tmp_path / "methods"
    shutil.copytree(Path(__file__).parents[1] / "methods", methods)
    merge = methods / "merges" / "halves.py"
    project = new_project(tmp_path / "merging", toy_checkpoint)
    project.environment["FORGE_METHODS"] = str(methods)
    recipe = 'family = "sd15"\n[halves.soft]\nfirst = "base"\nsecond = "base2"\n'
    recipe += '[rehearsal.a]\non = "soft"\ndataset = "drawings"\n[preset]\ncheckpoint = "a"\n'
    project.recipe.write_text(recipe)
    shutil.copytree(toy_checkpoint, project.root / "base2")
    second = project.root / "base2" / "text_encoder" / "model.safetensors"
    data = bytearray(second.read_bytes())
    data[-2:] = b"\x00\x40"  # the last number of the last tensor becomes 2
    second.write_bytes(data)
    with (project.root / "forge.toml").open("a") as file:
        file.write('[source.base2]\nfrom = "base2"\n')
    assert project.build().built == ["soft", "a", "preset.export"]
    assert project.starts() == ["a"]
    merge.write_text(merge.read_text().replace("VERSION = 1", "VERSION = 2"))
    plan = project.forge("plan", "--exit-code", code=10).out
    assert "0 or" in plan
    assert project.build().built == ["soft", "preset.export"]
    assert project.starts() == []
    assert project.build().built == []


def test_a_deleted_intermediate_is_not_missed(built: Project) -> None:
    store = built.root / "cache" / "v1"
    results = [json.loads(path.read_bytes()) for path in (store / "results").rglob("*.json")]
    (pack,) = next(result["packs"] for result in results if result["record"]["target"] == "toy:a")
    (store / "objects" / pack[:2] / pack).unlink()
    again = built.build()
    assert again.built == again.restored == built.trained() == []


def test_a_deleted_output_is_restored(built: Project) -> None:
    before = built.output.read_bytes()
    built.output.unlink()
    again = built.build()
    assert again.built == []
    assert again.restored == ["preset.export"]
    assert built.output.read_bytes() == before
    assert built.trained() == []
    built.output.unlink()
    assert "1 restored, 3 reused" in built.forge("build").out


def test_a_tampered_output_is_moved_aside_and_restored(built: Project) -> None:
    before = built.output.read_bytes()
    built.output.chmod(0o644)
    built.output.write_bytes(before[:-1] + b"!")
    again = built.build()
    assert again.restored == ["preset.export"]
    (moved,) = again.of("result")[0]["moved"]
    assert moved == "out/.replaced/toy/toy.safetensors"
    assert (built.root / moved).read_bytes() == before[:-1] + b"!"
    assert built.output.read_bytes() == before


def test_an_output_that_somebody_else_wrote_is_never_overwritten(project: Project) -> None:
    project.output.parent.mkdir(parents=True)
    project.output.write_text("mine")
    project.build()
    assert (project.root / "out/.replaced/toy/toy.safetensors").read_text() == "mine"
    assert project.output.stat().st_size > 100_000


def test_an_edit_that_keeps_size_and_mtime_is_seen(built: Project) -> None:
    path = built.root / "drawings" / "0.txt"
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("red", "RED"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert path.stat().st_size == stat.st_size
    assert built.build().built == ALL


def test_a_source_edited_while_an_action_reads_it_is_read_again(project: Project, wait_for: Wait) -> None:
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", "--plain", REHEARSAL_GATE=str(gate))
    wait_for(lambda: (gate / "toy-a").exists())
    change_pixel(project.root / "drawings" / "0.png")
    (gate / "go").touch()
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0, out
    assert "changed while it was read" in out
    assert project.starts() == ["a", "a", "b", "c"]
    again = project.build()
    assert again.built == project.trained() == []
    clean = project.clone(project.root.with_name("clean"))
    (clean.root / "forge.lock").unlink()
    clean.build()
    assert clean.output.read_bytes() == project.output.read_bytes()


def test_a_source_that_keeps_changing_is_an_error(project: Project, wait_for: Wait) -> None:
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", "--plain", REHEARSAL_GATE=str(gate))
    for _ in range(2):
        wait_for(lambda: (gate / "toy-a").exists())
        change_pixel(project.root / "drawings" / "0.png")
        (gate / "toy-a").unlink()
        (gate / "go").touch()
        wait_for(lambda: "step toy:a 9" in project.trained())
        (gate / "go").unlink()
    out, err = running.communicate(timeout=60)
    assert running.returncode == 1, out
    assert "keeps changing" in out + err


def test_kill_9_in_the_middle_loses_nothing(project: Project, wait_for: Wait) -> None:
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", REHEARSAL_GATE=str(gate), REHEARSAL_AT="0")
    wait_for(lambda: (gate / "toy-a").exists())
    (gate / "go").touch()
    wait_for(lambda: "start toy:b" in project.trained())
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    shutil.rmtree(gate)
    assert project.build().built[-2:] == ["c", "preset.export"]
    assert "a" not in project.starts()
    assert project.build().built == []


@pytest.mark.parametrize("shared", [False, True], ids=["one project", "two projects on one cache"])
def test_two_builds_at_once_share_the_work(project: Project, wait_for: Wait, tmp_path: Path, shared: bool) -> None:
    other = project
    if shared:
        cache = str(tmp_path / "cache")
        project.environment["FORGE_CACHE"] = cache
        other = project.clone(tmp_path / "other")
    gate = tmp_path / "gate"
    gate.mkdir()
    log = str(tmp_path / "both.log")
    first = project.start("build", "--json", REHEARSAL_GATE=str(gate), REHEARSAL_LOG=log)
    wait_for(lambda: (gate / "toy-a").exists())
    second = other.start("build", "--json", REHEARSAL_LOG=log)
    said = ""
    while '"state": "waiting"' not in said:
        assert second.stdout
        said += second.stdout.readline()
    (gate / "go").touch()
    (one, _), (two, errors) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, errors
    assert f'"holder": "{first.pid}"' in said
    starts = sorted(line for line in Path(log).read_text().splitlines() if line.startswith("start"))
    assert starts == ["start toy:a", "start toy:b", "start toy:c"]
    assert one
    assert two
    assert project.output.read_bytes() == other.output.read_bytes()
    assert other.build().built == project.build().built == []
