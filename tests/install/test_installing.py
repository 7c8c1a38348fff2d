"""A preset's files get to where other programs look for them, and leave no trace when they are taken away."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.install import command
from sdforge.install.layouts import LAYOUTS
from sdforge.outputs import MANIFEST

FILES = {
    "ink.safetensors": "checkpoint",
    "ink.preview.png": "picture",
    "ink.json": "about",
    "diffusers/model_index.json": "diffusers",
    "loras/chalk.safetensors": "lora",
    "loras/chalk.diffusers.safetensors": "lora",
    "loras/chalk.json": "about",
    "embeddings/cat.safetensors": "embedding",
    "hypernetworks/mood.pt": "hypernetwork",
    "sidecars/look.safetensors": "image_embedding",
}
COMFY = {
    "models/checkpoints/ink.safetensors",
    "models/checkpoints/ink.preview.png",
    "models/checkpoints/ink.json",
    "models/loras/chalk.safetensors",
    "models/loras/chalk.json",
    "models/embeddings/cat.safetensors",
    "models/hypernetworks/mood.pt",
}


@dataclass
class House:
    """A project with a preset in `out/`, and a place for programs."""

    root: Path
    said: Callable[[], tuple[str, str]]

    def preset(self, name: str, files: dict[str, str], **content: str) -> None:
        """Lay a preset's files into `out/`. content: of files, by their stem; else it is their path."""
        rows = []
        for path, kind in files.items():
            place = self.root / "out" / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.write_text(content.get(place.stem, path))
            rows.append({"path": path, "kind": kind, "sha256": hashlib.sha256(place.read_bytes()).hexdigest()})
        described = {"v": MANIFEST, "preset": name, "files": rows}
        (self.root / "out" / name / "preset.json").write_text(json.dumps(described))

    def predicts(self, name: str, family: str, prediction: str) -> None:
        """State of a preset what its checkpoint is."""
        path = self.root / "out" / name / "preset.json"
        told = json.loads(path.read_bytes()) | {"family": family, "sampler": {"prediction": prediction}}
        path.write_text(json.dumps(told))

    def program(self, name: str) -> Path:
        folder = self.root / "programs" / name
        for mark in LAYOUTS[name].marks:
            place = folder / mark
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch() if "." in place.name else place.mkdir(exist_ok=True)
        return folder

    def install(self, into: str, *more: str, preset: str = "ink", code: int = 0) -> str:
        """Run the command; return what it said."""
        found = main(["-C", str(self.root), "install", preset, "--into", into, *more])
        out, err = self.said()
        assert found == code, out + err
        return out + err


@pytest.fixture
def house(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.delenv("FORGE_CACHE", raising=False)
    (tmp_path / "forge.toml").write_text("")
    house = House(tmp_path, lambda: tuple(capsys.readouterr()))  # type: ignore[arg-type]
    house.preset("ink", FILES)
    return house


def inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_a_program_reads_lies_where_it_looks_and_is_gone_without_a_trace(house: House) -> None:
    comfy = house.program("comfyui")
    before = sorted(comfy.rglob("*"))
    said = house.install(f"comfyui:{comfy}")
    assert inside(comfy) == COMFY
    assert "embedding:cat" in said
    assert "sidecars/look.safetensors" in said  # what it does not read is named
    assert all((comfy / path).read_text().rpartition("/")[2] == Path(path).name for path in COMFY)
    house.install(f"comfyui:{comfy}", "--undo")
    assert sorted(comfy.rglob("*")) == before
    assert [p.name for p in (house.root / "out" / ".installed").iterdir()] == ["lock"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_program_gets_the_checkpoint_and_the_lora_where_its_layout_says(house: House, name: str) -> None:
    folder = house.program(name)
    house.install(f"{name}:{folder}")
    layout = LAYOUTS[name]
    found = inside(folder)
    assert {f"{layout.folders['checkpoint']}/ink.safetensors", f"{layout.folders['lora']}/chalk.safetensors"} <= found
    assert (f"{layout.folders['checkpoint']}/ink.json" in found) == layout.sidecars


def test_large_files_are_linked_and_texts_copied_and_all_are_with_copy(house: House) -> None:
    comfy = house.program("comfyui")
    house.install(f"comfyui:{comfy}")
    model, text = "models/checkpoints/ink.safetensors", "models/checkpoints/ink.json"
    out = house.root / "out" / "ink"
    assert not (comfy / text).samefile(out / "ink.json")
    linked = (comfy / model).samefile(out / "ink.safetensors")
    assert ("hard link" in house.install(f"a1111:{house.program('a1111')}")) == linked
    house.install(f"comfyui:{comfy}", "--undo")
    house.install(f"comfyui:{comfy}", "--copy")
    assert not (comfy / model).samefile(out / "ink.safetensors")


def test_a_stranger_s_file_is_not_overwritten_and_then_nothing_is_put(house: House) -> None:
    comfy = house.program("comfyui")
    (comfy / "models/loras").mkdir()
    (comfy / "models/loras/chalk.safetensors").write_text("somebody's")
    said = house.install(f"comfyui:{comfy}", code=2)
    assert "models/loras/chalk.safetensors: forge did not write it" in said
    assert inside(comfy) == {"models/loras/chalk.safetensors"}


def test_the_same_file_of_somebody_else_stays_theirs(house: House) -> None:
    comfy = house.program("comfyui")
    (comfy / "models/loras").mkdir()
    (comfy / "models/loras/chalk.safetensors").write_text("loras/chalk.safetensors")
    house.install(f"comfyui:{comfy}")
    house.install(f"comfyui:{comfy}", "--undo")
    assert inside(comfy) == {"models/loras/chalk.safetensors"}


def test_installing_again_renews_its_own_files_and_removes_what_the_preset_no_longer_has(house: House) -> None:
    comfy = house.program("comfyui")
    house.install(f"comfyui:{comfy}")
    fewer = {path: kind for path, kind in FILES.items() if "cat" not in path}
    house.preset("ink", fewer, chalk="a new one")
    said = house.install(f"comfyui:{comfy}")
    assert inside(comfy) == {path for path in COMFY if "cat" not in path}
    assert (comfy / "models/loras/chalk.safetensors").read_text() == "a new one"
    assert "in place of the former one" in said
    assert "is there already" in said


def test_what_was_changed_since_is_neither_renewed_nor_removed(house: House) -> None:
    comfy = house.program("comfyui")
    house.install(f"comfyui:{comfy}", "--copy")
    changed = comfy / "models/loras/chalk.json"
    changed.write_text("my own words")
    house.preset("ink", FILES, chalk="a new one")
    said = house.install(f"comfyui:{comfy}", code=2)
    assert "chalk.json: it was changed since forge put it there" in said
    assert "it stays" in house.install(f"comfyui:{comfy}", "--undo")
    assert inside(comfy) == {"models/loras/chalk.json"}


def test_what_two_presets_share_stays_until_the_last_is_taken_away(house: House) -> None:
    comfy = house.program("comfyui")
    shared = {"loras/chalk.safetensors": "lora"}
    house.preset("other", shared)
    house.install(f"comfyui:{comfy}")
    house.install(f"comfyui:{comfy}", preset="other")
    house.install(f"comfyui:{comfy}", "--undo")
    assert inside(comfy) == {"models/loras/chalk.safetensors"}
    house.preset("third", shared, chalk="another one")
    said = house.install(f"comfyui:{comfy}", preset="third", code=2)
    assert "it is another one, of other" in said
    assert "`--undo` with other takes away" in said
    house.install(f"comfyui:{comfy}", "--undo", preset="other")
    assert inside(comfy) == set()


def test_two_presets_with_one_word_are_there_together_and_the_first_tells_of_it(house: House) -> None:
    """What lies beside a model names its preset, so it differs where the model does not."""
    comfy = house.program("comfyui")
    model, text = "embeddings/cat.safetensors", "embeddings/cat.json"
    for name in ("ink", "chalk"):
        house.preset(name, {model: "embedding", text: "about"}, cat="rows")
        (house.root / "out" / name / text).write_text(name)
        rows = json.loads((house.root / "out" / name / "preset.json").read_text())
        rows["files"][1]["sha256"] = hashlib.sha256(name.encode()).hexdigest()
        (house.root / "out" / name / "preset.json").write_text(json.dumps(rows))
    house.install(f"comfyui:{comfy}")
    assert "with the same weights" in house.install(f"comfyui:{comfy}", preset="chalk")
    assert (comfy / "models" / text).read_text() == "ink"
    house.install(f"comfyui:{comfy}", "--undo")
    assert inside(comfy) == {f"models/{model}", f"models/{text}"}
    house.install(f"comfyui:{comfy}", preset="chalk")
    assert (comfy / "models" / text).read_text() == "chalk"
    house.install(f"comfyui:{comfy}", "--undo", preset="chalk")
    assert inside(comfy) == set()


def test_a_dry_run_says_the_same_and_does_nothing(house: House) -> None:
    comfy = house.program("comfyui")
    assert "would be put" in house.install(f"comfyui:{comfy}", "--dry-run")
    assert inside(comfy) == set()
    house.install(f"comfyui:{comfy}")
    assert "would be removed" in house.install(f"comfyui:{comfy}", "--undo", "-n")
    assert inside(comfy) == COMFY


def stop_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupt at the n-th moment: before a file's bytes are brought, or after it has its name."""
    calls, bring = iter(range(1, 1000)), command._bring

    def stop(_: Path) -> None:
        if next(calls) == moment:
            raise KeyboardInterrupt

    def bring_late(source: Path, part: Path, *, copy: bool) -> str:
        stop(part)
        return bring(source, part, copy=copy)

    patch.setattr(command, "flush_folder", stop)
    patch.setattr(command, "_bring", bring_late)


def test_a_stop_at_any_moment_leaves_only_what_undo_removes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = house.program("comfyui")
    before = sorted(comfy.rglob("*"))
    for moment in range(1, 16):
        with monkeypatch.context() as patch:
            stop_at(moment, patch)
            main(["-C", str(house.root), "install", "ink", "--into", f"comfyui:{comfy}"])
        house.install(f"comfyui:{comfy}", "--undo", code=0)
        assert sorted(comfy.rglob("*")) == before, moment


def test_a_file_that_comes_to_be_meanwhile_is_not_overwritten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = house.program("comfyui")
    bring = command._bring

    def late(source: Path, part: Path, *, copy: bool) -> str:
        (part.parent / "ink.safetensors").write_text("quicker")
        return bring(source, part, copy=copy)

    monkeypatch.setattr(command, "_bring", late)
    assert "meanwhile" in house.install(f"comfyui:{comfy}", code=2)
    assert (comfy / "models/checkpoints/ink.safetensors").read_text() == "quicker"
    assert "it stays" in house.install(f"comfyui:{comfy}", "--undo")


def test_a_file_that_is_not_what_was_exported_is_not_put_anywhere(house: House) -> None:
    comfy = house.program("comfyui")
    (house.root / "out/ink/ink.safetensors").write_text("damaged")
    assert "is not the file that was written there" in house.install(f"comfyui:{comfy}", code=3)
    assert inside(comfy) == set()


@pytest.mark.parametrize(
    ("program", "path", "kind", "read"),
    [  # what the programs' own code makes of such files: see docs/programs.md
        ("comfyui", "loras/chalk.diffusers.safetensors", "lora", False),
        ("comfyui", "embeddings/cat.pt", "embedding", True),
        ("a1111", "loras/chalk.diffusers.safetensors", "lora", False),
        ("sdnext", "loras/chalk.diffusers.safetensors", "lora", False),
        ("invokeai", "loras/chalk.diffusers.safetensors", "lora", False),
        ("invokeai", "embeddings/cat.diffusers.safetensors", "embedding", False),
        ("invokeai", "embeddings/cat.diffusers_2.safetensors", "embedding", False),
        ("comfyui", "embeddings/cat.diffusers_2.safetensors", "embedding", False),
        ("invokeai", "embeddings/cat.pt", "embedding", True),
        ("comfyui", "hypernetworks/mood.pt", "hypernetwork", True),
        ("a1111", "hypernetworks/mood.pt", "hypernetwork", True),
        ("forge", "hypernetworks/mood.pt", "hypernetwork", False),
        ("sdnext", "hypernetworks/mood.pt", "hypernetwork", False),
    ],
)
def test_a_program_gets_the_forms_that_its_own_code_reads(
    house: House, program: str, path: str, kind: str, read: bool
) -> None:
    house.preset("ink", {"ink.safetensors": "checkpoint", path: kind})
    folder = house.program(program)
    said = house.install(f"{program}:{folder}")
    assert ("does not read it" not in said) == read
    assert (Path(path).name in {Path(each).name for each in inside(folder)}) == read


def test_a_folder_with_appended_words_goes_only_where_one_is_read(house: House) -> None:
    """ComfyUI's text encoder has a table of 49408 rows, and refuses one that has more."""
    house.preset("ink", {"diffusers/model_index.json": "diffusers", "embeddings/cat.safetensors": "embedding"})
    manifest = house.root / "out" / "ink" / "preset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"words": [{"word": "<cat>"}]}))
    comfy, sdnext = house.program("comfyui"), house.program("sdnext")
    assert "reads none to which words were appended" in house.install(f"comfyui:{comfy}")
    assert "models/diffusers/ink/model_index.json" not in inside(comfy)
    house.install(f"sdnext:{sdnext}")
    assert "models/Diffusers/ink/model_index.json" in inside(sdnext)


def test_where_there_is_no_single_file_the_diffusers_folder_is_put(house: House) -> None:
    house.preset("ink", {path: kind for path, kind in FILES.items() if kind != "checkpoint"})
    comfy, a1111 = house.program("comfyui"), house.program("a1111")
    house.install(f"comfyui:{comfy}")
    assert "models/diffusers/ink/model_index.json" in inside(comfy)
    assert "reads no such folders" in house.install(f"a1111:{a1111}")


@pytest.mark.parametrize(
    ("into", "words"),
    [
        ("comfyui:{root}/nowhere", "there is no folder"),
        ("comfyui:{root}/programs/a1111", "did you mean --into a1111:"),
        ("comfyui:{root}/programs", "there is no models/checkpoints in it"),
        ("comfyui:{comfy}/models", "did you mean --into comfyui:{comfy}?"),
        ("comfy:{comfy}", "did you mean comfyui:{comfy}?"),
        ("comfyui", "as in comfyui:PATH"),
        ("blender:{comfy}", "PROGRAM is one of comfyui"),
    ],
)
def test_a_wrong_folder_is_refused_with_what_it_misses_and_what_was_meant(house: House, into: str, words: str) -> None:
    names = {"root": house.root, "comfy": house.program("comfyui"), "a1111": house.program("a1111")}
    assert words.format(**names) in house.install(into.format(**names), code=2)


def test_a_preset_that_is_not_built_and_an_undo_of_nothing_are_refused(house: House) -> None:
    comfy = house.program("comfyui")
    (house.root / "recipes").mkdir()
    (house.root / "recipes" / "soft.toml").write_text("")
    assert "forge build soft" in house.install(f"comfyui:{comfy}", preset="soft", code=2)
    assert "did you mean 'soft'?" in house.install(f"comfyui:{comfy}", preset="sof", code=2)
    described = {"v": MANIFEST, "preset": "ink@two", "grid": {"cells": [{"preset": f"ink@two-{i}"} for i in (1, 2)]}}
    (house.root / "out" / "ink@two").mkdir()
    (house.root / "out" / "ink@two" / "preset.json").write_text(json.dumps(described))
    assert "its presets are ink@two-1 … ink@two-2" in house.install(f"comfyui:{comfy}", preset="ink@two", code=2)
    assert "has put nothing of 'ink'" in house.install(f"comfyui:{comfy}", "--undo", code=2)
    assert not os.path.lexists(comfy / "models/loras")


def test_what_was_put_is_said_to_programs_too(house: House) -> None:
    said = json.loads(house.install(f"comfyui:{house.program('comfyui')}", "--json"))
    assert {row["path"] for row in said["files"]} == COMFY
    assert {row["state"] for row in said["files"]} == {"put"}
    assert {row["path"] for row in said["passed"]} >= {"sidecars/look.safetensors", "diffusers/"}


@pytest.mark.parametrize(
    ("name", "family", "prediction", "way"),
    [
        (
            "comfyui",
            "sd15",
            "v_prediction",
            "takes it to predict epsilon: the node ModelSamplingDiscrete with v_prediction",
        ),
        ("comfyui", "sd15", "epsilon", ""),
        ("comfyui", "sd2", "v_prediction", ""),
        ("a1111", "sd15", "v_prediction", "beside it, as ink.yaml"),
        ("forge", "sd2", "v_prediction", "`model: {params: {parameterization: v}}`"),
        ("forge", "sdxl", "v_prediction", ""),
        ("invokeai", "sd2", "epsilon", "choose epsilon as its prediction type"),
        ("invokeai", "sdxl", "v_prediction", "takes it to predict epsilon"),
        ("sdnext", "sd15", "v_prediction", ""),
        ("sdnext", "sd2", "v_prediction", ""),
        ("sdnext", "sd2", "epsilon", "choose epsilon as the prediction method"),
    ],
)
def test_it_is_said_where_a_program_takes_a_checkpoint_to_predict_something_else(
    name: str, family: str, prediction: str, way: str, house: House
) -> None:
    """Each program's own code was asked what it takes such a file for."""
    house.preset("ink", FILES)
    house.predicts("ink", family, prediction)
    said = house.install(f"{name}:{house.program(name)}", "--dry-run")
    assert (way in said) if way else ("predict" not in said)
    told = json.loads(house.install(f"{name}:{house.program(name)}", "--dry-run", "--json"))["misread"]
    assert bool(told) == bool(way)
    if told:
        assert told[0].startswith(f"ink predicts {prediction}, and {LAYOUTS[name].title} takes it to predict")
