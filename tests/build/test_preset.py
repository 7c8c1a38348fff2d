"""A whole preset through the real command, with the real trainings on toy networks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.build.test_interrupts import children, is_alive
from tests.build.test_probes import change_pixel
from tests.conftest import METHODS, Project, new_project

pytestmark = pytest.mark.usefixtures("forked")

Wait = Callable[[Callable[[], object]], None]

RECIPE = """\
family = "sd15"

[weighted_sum.soft]
checkpoints = ["base", "base2"]
weights = [0.6, 0.4]

[textual_inversion.word]
on = "soft"
dataset = "drawings"
token = "<toy>"
vectors = 2
steps = 14
batch = 2
precision = "fp32"

[lora.style]
on = "soft"
dataset = "drawings"
rank = 2
steps = 14
batch = 2
precision = "fp32"

[preset]
checkpoint = "soft"
insert = ["word"]
bake = { style = 0.8 }
dtype = "fp16"
export = ["checkpoint", "diffusers", "loras", "embeddings"]

[preset.previews]
prompts = ["a drawing of <toy>"]
seeds = [1]
steps = 2
"""

FILES = {
    "toy.safetensors",
    "preset.json",
    "loras/style.safetensors",
    "embeddings/word.safetensors",
    "diffusers/model_index.json",
    "previews/sheet.png",
}
BEHIND_THE_LORA = ["style", "preset.bake", "preset.export", "preset.previews"]


def make(root: Path, toy_checkpoint: Path, second: Path) -> Project:
    project = new_project(root, toy_checkpoint, RECIPE)
    shutil.copytree(second, root / "base2")
    with (root / "forge.toml").open("a") as file:
        file.write('\n[source.base2]\nfrom = "base2"\n\n[run.states]\nsteps = 4\n')
    return project


@pytest.fixture(scope="module")
def second_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.toys import write_checkpoint

    folder = tmp_path_factory.mktemp("toy2") / "base2"
    write_checkpoint(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path, second_checkpoint: Path) -> Project:
    project = make(tmp_path_factory.mktemp("preset") / "project", toy_checkpoint, second_checkpoint)
    ran = project.real("build", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert sorted(ran.built) == sorted(["soft", "word", "preset.insert", *BEHIND_THE_LORA])
    return project


@pytest.fixture
def built(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    again = project.build()
    assert again.built == []
    return project


@pytest.fixture
def fresh(finished: Project, tmp_path: Path) -> Project:
    """The project with nothing but what git would hold, and no pins."""
    project = finished.clone(tmp_path / "fresh")
    (project.root / "forge.lock").unlink()
    return project


def states(project: Project) -> dict[str, str]:
    """What a build would do, by target."""
    actions = json.loads(project.forge("plan", "--json").out)["actions"]
    return {action["target"].partition(":")[2]: action["state"] for action in actions}


def to_do(project: Project) -> set[str]:
    found = {name for name, state in states(project).items() if state in ("build", "maybe")}
    return found - {"preset.cast"}  # it turns out to have nothing to do


EVERYTHING = {"soft", "word", "preset.insert", *BEHIND_THE_LORA}


def test_the_files_are_there_and_the_second_build_is_null(finished: Project) -> None:
    folder = finished.root / "out" / "toy"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} >= FILES
    assert finished.build().built == []


def test_previews_are_a_sheet_and_pictures_that_say_how_they_were_drawn(finished: Project) -> None:
    folder = finished.root / "out" / "toy" / "previews"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 3 * 64
    paths = [path for path in folder.glob("*.png") if path.name != "sheet.png"]
    texts = {path.name: Image.open(path).info["parameters"] for path in paths}
    assert len(texts) >= 3  # the preset, both bases
    assert all("Steps: 2" in text and "Seed: 1" in text for text in texts.values())


def test_a_changed_rank_runs_the_lora_and_what_follows(built: Project) -> None:
    built.edit("rank = 2", "rank = 4")
    line = built.recipe.read_text().splitlines().index("rank = 4") + 1
    why = built.forge("why", "style").out
    assert "rank 2 → 4" in why
    assert f"recipes/toy.toml:{line}" in why
    assert sorted(built.build().built) == sorted(BEHIND_THE_LORA)
    built.edit("rank = 4", "rank = 2")
    back = built.build()
    assert back.built == []
    assert sorted(back.restored) == ["preset.export", "preset.previews"]


def test_what_changes_nothing_runs_nothing(built: Project) -> None:
    text = built.recipe.read_text().replace("word", "mascot").replace("style", "sketchy")
    tables = text.split("\n\n")
    text = "\n\n".join([tables[0], *reversed(tables[1:])]) + "\n# the end\n"
    text = text.replace("steps = 14\n", "steps=14   # enough\n").replace("rank = 2\n", "rank = 2\nflip = false\n")
    built.recipe.write_text(text)
    (built.root / "drawings" / "0.png").rename(built.root / "drawings" / "z.png")
    (built.root / "drawings" / "0.txt").rename(built.root / "drawings" / "z.txt")
    assert to_do(built) == set()


def test_one_caption_runs_exactly_what_depends_on_it(built: Project) -> None:
    (built.root / "drawings" / "1.txt").write_text("a green circle\n")
    assert to_do(built) == EVERYTHING - {"soft"}


def test_one_pixel_runs_exactly_what_depends_on_it(built: Project) -> None:
    change_pixel(built.root / "drawings" / "0.png")
    assert to_do(built) == EVERYTHING - {"soft"}


def test_metadata_that_nobody_uses_runs_nothing(built: Project) -> None:
    path = built.root / "base" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "elsewhere"}))
    weights = built.root / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    add_metadata(weights, {"comment": "nobody reads this"})
    assert to_do(built) == set()


def test_a_declared_prediction_type_runs_what_reads_it(built: Project) -> None:
    built.edit('from = "base"', 'from = "base"\nprediction = "v_prediction"', "forge.toml")
    built.edit('from = "base2"', 'from = "base2"\nprediction = "v_prediction"', "forge.toml")
    assert {"word", "style", "preset.export", "preset.previews"} <= to_do(built)
    assert "soft" not in to_do(built)  # numbers are merged the same way, whatever they predict


def test_a_loras_alpha_runs_what_reads_it(built: Project) -> None:
    shutil.copyfile(built.root / "out/toy/loras/style.safetensors", built.root / "taken.safetensors")
    with (built.root / "forge.toml").open("a") as file:
        file.write('\n[source.taken]\nfrom = "taken.safetensors"\n')
    built.edit("bake = { style = 0.8 }", "bake = { style = 0.8, taken = 0.5 }")
    built.edit('"loras", ', "")
    built.build("preset.bake")
    assert "preset.bake" not in to_do(built)
    change_alpha(built.root / "taken.safetensors")
    assert "preset.bake" in to_do(built)
    assert not {"style", "word"} & to_do(built)


def test_after_other_weights_of_the_unet_alone_latents_are_reused(built: Project) -> None:
    built.edit("weights = [0.6, 0.4]", 'weights = [0.6, 0.4]\nblocks = { "unet.*" = [0.5, 0.5] }')
    ran = built.build("style")
    assert ran.built == ["soft", "style"]
    (derived,) = [event["derived"] for event in ran.of("progress") if "derived" in event]
    assert derived["reused"]["latents"] == 3
    assert "latents" not in derived["made"]
    assert "texts" not in derived["made"]


@pytest.mark.parametrize("target", ["style", "word"])
def test_a_killed_training_ends_with_the_same_bits(
    fresh: Project, finished: Project, wait_for: Wait, target: str
) -> None:
    command = fresh.start("build", "--json", target)
    step = 0
    while step < 9:
        assert command.stdout
        event = json.loads(command.stdout.readline())
        step = event.get("step", 0) if event.get("target") == f"toy:{target}" else 0
    workers = children(command.pid)
    for pid in [command.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    command.communicate()
    wait_for(lambda: not any(map(is_alive, workers)))
    ran = fresh.build(target)
    (resumed,) = [event for event in ran.of("progress") if "resumed" in event]
    assert resumed["resumed"] >= 8
    assert resumed["same"] is True
    first = min(event["step"] for event in ran.of("progress") if "loss" in event and event["target"] == f"toy:{target}")
    assert first == resumed["resumed"] + 1
    assert digest(fresh, target) == digest(finished, target)


def digest(project: Project, target: str) -> str:
    shown: dict[str, Any] = json.loads(project.forge("show", f"toy:{target}", "--json").out)
    return str(shown["digest"])


def test_a_second_clone_comes_out_as_the_lock_says(finished: Project, tmp_path: Path) -> None:
    project = finished.clone(tmp_path / "clone")
    before = project.lock
    ran = project.build()
    assert {event["target"]: event["equal"] for event in ran.of("pin")} == {"toy:word": True, "toy:style": True}
    assert project.lock == before
    assert project.output.read_bytes() == finished.output.read_bytes()


def test_a_merge_that_comes_out_the_same_trains_nothing(fresh: Project, tmp_path: Path) -> None:
    methods = tmp_path / "methods"
    shutil.copytree(METHODS, methods)
    fresh.environment["FORGE_METHODS"] = str(methods)
    fresh.edit("[weighted_sum.soft]", "[halves.soft]")
    fresh.edit('checkpoints = ["base", "base2"]\nweights = [0.6, 0.4]', 'first = "base"\nsecond = "base2"')
    assert sorted(fresh.build("word", "style").built) == ["soft", "style", "word"]
    merge = methods / "merges" / "halves.py"
    merge.write_text(merge.read_text().replace("VERSION = 1", "VERSION = 2"))
    assert states(fresh)["style"] == states(fresh)["word"] == "maybe"
    assert fresh.build("word", "style").built == ["soft"]


def test_a_device_that_is_not_there_is_a_resource_that_lacks(fresh: Project) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("here it is there")
    ran = fresh.forge("build", "style", "--device", "cuda", code=4)
    assert "--device cpu" in ran.out + ran.err


def test_stock_programs_open_the_export(finished: Project) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    folder = finished.root / "out" / "toy" / "diffusers"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert "<toy>" in pipeline.tokenizer.get_vocab()
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a drawing of <toy>", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Write a safetensors file again after a change of its tensors and metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dictionary
        metadata = file.metadata() or {}
    change(tensors, metadata)
    path.unlink()
    save_file(tensors, path, metadata=metadata)


def add_metadata(path: Path, more: dict[str, str]) -> None:
    rewrite(path, lambda _, metadata: metadata.update(more))


def change_alpha(path: Path) -> None:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:  # noqa: ARG001
        for name in tensors:
            if name.endswith(".alpha"):
                tensors[name] = tensors[name] * 0.5

    rewrite(path, change)


def test_the_lora_file_is_what_other_programs_expect(finished: Project) -> None:
    from safetensors import safe_open

    with safe_open(finished.root / "out/toy/loras/style.safetensors", "pt") as file:
        names = list(file.keys())
        metadata = file.metadata()
    assert all(name.startswith("lora_unet_") for name in names)
    assert metadata["ss_network_dim"] == "2"
