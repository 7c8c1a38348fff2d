"""A preset with words, a LoRA and a sidecar: what is said of it, and what a program gets that loads it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdforge import load_preset
from sdforge.errors import BrokenPromise, UsageError
from sdforge.formats.safetensors import read_header
from sdforge.formats.single_file import TOKENIZER
from sdforge.formats.tokenizer import tokenizer_files
from sdforge.run.tokens import Words
from tests.conftest import Project, new_project
from tests.toys import vocabulary

pytestmark = pytest.mark.usefixtures("forked")

RECIPE = """\
family = "sd15"

[textual_inversion.word]
on = "base"
dataset = "drawings"
token = "<toy>"
vectors = 3
steps = 2
batch = 1
learning_rate = 0.5
precision = "fp32"

[textual_inversion.longer]
on = "base"
dataset = "drawings"
token = "<toy>-er"
polarity = "negative"
vectors = 2
steps = 1
batch = 1
precision = "fp32"

[lora.style]
on = "base"
dataset = "drawings"
rank = 2
steps = 2
batch = 1
precision = "fp32"

[null_text_inversion.cat]
on = "base"
image = "photo"
prompt = "a red square"
steps = 2
inner = 2

[hypernetwork.mood]
on = "base"
dataset = "drawings"
activation = "relu"
steps = 1
warmup = 0
learning_rate = 0.1
batch = 1
precision = "fp32"

[preset]
checkpoint = "base"
insert = ["word", "longer"]
bake = { style = 0.8 }
sidecars = ["cat", "mood"]
negative_prompt = "green <toy>-er"
clip_skip = 1
dtype = "fp16"
export = ["checkpoint", "diffusers", "loras", "embeddings", "embeddings-pt", "hypernetworks-pt"]

[preset.previews]
prompts = ["a drawing of <toy>"]
seeds = [1]
steps = 2
guidance = 3.0
"""
PROMPT = "a drawing of <toy>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    project = new_project(tmp_path_factory.mktemp("loaded") / "project", toy_checkpoint, RECIPE)
    for path in project.root.glob("drawings/*.txt"):
        path.write_text(path.read_text().strip() + " and no <toy>-er {trigger}")
    project.edit('trigger = "<toy>"', 'trigger = "<toy>"\nvalidation = 1', "forge.toml")
    with (project.root / "forge.toml").open("a") as file:
        file.write('\n[source.photo]\nfrom = "drawings/0.png"\n\n[run.samples]\nsteps = 1\n')
    project.build()
    return project


@pytest.fixture(scope="module")
def folder(made: Project) -> Path:
    return made.root / "out" / "toy"


@pytest.fixture(scope="module", params=["diffusers", "checkpoint"])
def pipeline(folder: Path, request: pytest.FixtureRequest) -> Any:
    found: Any = load_preset(folder, form=request.param)
    found.set_progress_bar_config(disable=True)
    return found


def pixels(picture: Any) -> Any:
    return np.asarray(picture).astype(int)


def drawn(pipeline: Any, prompt: Any = PROMPT, **wishes: Any) -> Any:
    return pixels(pipeline(prompt, generator=torch.Generator().manual_seed(1), **wishes).images[0])


def test_a_loaded_preset_draws_what_its_previews_show(pipeline: Any, folder: Path) -> None:
    """Words, LoRA, hypernetwork, sampler, guidance, negative prompt, size and clip skip are the preset's."""
    preview = pixels(Image.open(folder / "previews" / "1-1-toy.png"))
    assert np.abs(drawn(pipeline) - preview).max() <= 2
    assert np.abs(pixels(Image.open(folder / "previews" / "1-1-toy-without.png")) - preview).max() > 2
    assert np.abs(drawn(pipeline, negative_prompt="") - preview).max() > 2
    assert np.abs(drawn(pipeline, guidance_scale=9.0) - preview).max() > 2
    assert np.abs(drawn(pipeline, clip_skip=0) - preview).max() > 2


def test_a_sidecar_draws_its_picture_again_and_an_edit(pipeline: Any, folder: Path) -> None:
    for prompt, name in ((None, "cat-0-toy"), (PROMPT, "cat-1-toy")):
        expected = pixels(Image.open(folder / "previews" / f"{name}.png"))
        plain = pixels(Image.open(folder / "previews" / f"{name}-without.png"))
        found = pixels(pipeline.pictures["cat"](prompt).images[0])
        assert np.abs(found - expected).max() <= 2
        assert np.abs(found - plain).max() > 2


def test_words_of_several_rows_are_the_numbers_that_we_draw_with(pipeline: Any) -> None:
    words = Words(vocabulary(), [["<toy>", 3], ["<toy>-er", 2]])
    for prompt in (PROMPT, "<toy>-er of <toy>, red", "a<toy> red <toy>s", "<TOY>", "green"):
        written = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
        found = pipeline.tokenizer(written, padding="max_length", max_length=77).input_ids
        assert found == words.encode(prompt), prompt


def test_several_prompts_get_the_preset_s_negative_prompt_each(pipeline: Any) -> None:
    assert len(pipeline([PROMPT, "green"], output_type="latent").images) == 2


def test_a_loaded_preset_is_saved_under_the_name_of_its_class(pipeline: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    before, after = (p.text_encoder.get_input_embeddings().weight for p in (pipeline, again))
    assert torch.equal(before, after)


def test_what_is_said_of_a_preset(folder: Path) -> None:
    described = json.loads((folder / "preset.json").read_text())
    files = described.pop("files")
    assert described.pop("checkpoint")
    assert described == {
        "v": 2,
        "preset": "toy",
        "family": "sd15",
        "words": [
            {"word": "<toy>", "vectors": 3, "negative": False, "file": "embeddings/word.safetensors"},
            {"word": "<toy>-er", "vectors": 2, "negative": True, "file": "embeddings/longer.safetensors"},
        ],
        "negative_prompt": "green <toy>-er",
        "clip_skip": 1,
        "sampler": {
            "name": "DPM++ 2M",
            "diffusers": "DPMSolverMultistepScheduler",
            "settings": {
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "timestep_spacing": "trailing",
                "final_sigmas_type": "zero",
                "steps_offset": 1,
            },
            "prediction": "epsilon",
            "zero_terminal_snr": False,
            "steps": 2,
            "guidance": 3.0,
            "resolution": 64,
        },
        "checks": {"state": "none", "results": []},
        "trigger": [],
        "licence": "",
        "sidecars": [
            {"name": "mood", "kind": "hypernetwork", "path": "sidecars/mood.safetensors", "strength": 1.0},
            {"name": "cat", "kind": "null_text", "path": "sidecars/cat.safetensors", "strength": 1.0},
        ],
    }
    hashes = {"sha256", "bytes", "autov2", "autov3"}
    told = {row["path"]: {k: v for k, v in row.items() if k not in {*hashes, "path"}} for row in files}
    told = {path: row for path, row in told.items() if "of" not in row}  # what lies beside a model for other programs
    assert {row["kind"] for path, row in told.items() if path.startswith("diffusers/")} == {"diffusers"}
    assert {path: row for path, row in told.items() if not path.startswith("diffusers/")} == {
        "toy.safetensors": {"kind": "checkpoint"},
        "embeddings/word.safetensors": {"kind": "embedding", "name": "word", "trigger": ["<toy>"], "negative": []},
        "embeddings/word.pt": {"kind": "embedding", "name": "word", "trigger": ["<toy>"], "negative": []},
        "embeddings/longer.safetensors": {
            "kind": "embedding",
            "name": "longer",
            "trigger": [],
            "negative": ["<toy>-er"],
        },
        "embeddings/longer.pt": {"kind": "embedding", "name": "longer", "trigger": [], "negative": ["<toy>-er"]},
        "loras/style.safetensors": {"kind": "lora", "name": "style", "trigger": ["<toy>"], "strength": 0.8},
        "sidecars/mood.safetensors": {"kind": "hypernetwork", "name": "mood", "trigger": ["<toy>"], "strength": 1.0},
        "sidecars/mood.pt": {"kind": "hypernetwork", "name": "mood", "trigger": ["<toy>"], "strength": 1.0},
        "sidecars/cat.safetensors": {
            "kind": "null_text",
            "name": "cat",
            "trigger": [],
            "strength": 1.0,
            "guidance": 7.5,
            "steps": 2,
            "prompt": "a red square",
        },
    }
    assert all((folder / row["path"]).stat().st_size == row["bytes"] for row in files)


def test_another_guidance_rewrites_what_is_said_and_no_weights(made: Project, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.build("preset.export")  # the files of a copy are looked at once
    before = project.output.stat()
    project.edit("guidance = 3.0", "guidance = 4.0")
    ran = project.build("preset.export")
    assert (ran.built, ran.restored) == ([], ["preset.export"])
    described = json.loads((project.output.parent / "preset.json").read_text())
    assert described["sampler"]["guidance"] == 4.0
    assert project.output.stat().st_ino == before.st_ino
    assert project.build("preset.export").restored == []


def test_the_sheet_shows_what_a_sidecar_draws_beside_what_comes_without(folder: Path) -> None:
    with Image.open(folder / "previews" / "sheet.png") as sheet:
        assert sheet.size == (230 + 4 * 136 + 8, 44 + 3 * 136 + 8)  # base, before baking, without, toy; three rows


def test_the_log_of_a_training_tells_what_was_held_out_and_writes_its_samples(made: Project, tmp_path: Path) -> None:
    said = made.forge("log", "style").out
    assert "held-out pictures: loss" in said
    assert "least after step" in said
    assert "6 pictures after 3 steps" in said
    path = tmp_path / "samples.png"
    assert made.forge("log", "style", "--samples", str(path)).out == f"{path}: 6 pictures\n"
    with Image.open(path) as sheet:
        assert sheet.size == (230 + 2 * 136 + 8, 44 + 3 * 136 + 8)
    record = json.loads(made.forge("log", "style", "--json").out)
    assert [row[0] for row in record["samples"]] == [0, 0, 1, 1, 2, 2]
    assert record["recommended"] in [step for step, _ in record["validation"]]


def test_samples_that_were_not_drawn_or_have_no_name_are_refused(made: Project) -> None:
    assert "[run.samples]" in made.forge("log", "cat", "--samples", "x.png", code=2).err
    assert "FILE.png" in made.forge("log", "style", "--samples", "x.jpg", code=2).err


def test_show_says_the_words_and_the_rank(made: Project) -> None:
    assert "<toy> (3 vectors)" in made.forge("show", "word").out
    assert "<toy>-er (2 vectors) for the negative prompt" in made.forge("show", "longer").out
    assert "rank     2" in made.forge("show", "style").out
    assert '"a red square"' in made.forge("show", "cat").out


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_no_preset_or_lacks_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    with pytest.raises(UsageError, match="no preset"):
        load_preset(tmp_path)
    with pytest.raises(UsageError, match="no type of numbers"):
        load_preset(copy, dtype="fp8")  # type: ignore[arg-type]
    (copy / "sidecars" / "cat.safetensors").unlink()
    with pytest.raises(UsageError, match="cat is a part of the preset"):
        load_preset(copy)
    shutil.rmtree(copy / "diffusers")
    (copy / "embeddings" / "word.safetensors").unlink()
    with pytest.raises(UsageError, match="word"):
        load_preset(copy)
    (copy / "toy.safetensors").unlink()
    with pytest.raises(UsageError, match="neither a diffusers folder"):
        load_preset(copy)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("diffusers", "diffusers/unet/diffusion_pytorch_model.safetensors"),
        ("diffusers", "diffusers/scheduler/scheduler_config.json"),
        ("checkpoint", "toy.safetensors"),
        ("checkpoint", "embeddings/word.safetensors"),
        ("checkpoint", "sidecars/cat.safetensors"),
    ],
)
def test_a_file_that_was_changed_is_not_loaded(form: Any, name: str, folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    data = (copy / name).read_bytes()
    (copy / name).chmod(0o644)
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BrokenPromise, match=f"{name} is not the file that was written there"):
        load_preset(copy, form=form)


@pytest.mark.parametrize("form", ["diffusers", "checkpoint"])
def test_loading_says_nothing(form: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging

    load_preset(folder, form=form)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_what_libraries_say_of_what_they_load_is_not_shown(folder: Path, tmp_path: Path) -> None:
    """transformers warns with a table of every tensor that it did not expect, or misses."""
    from diffusers import StableDiffusionPipeline

    copy, handler = copied(folder, tmp_path), logging.Handler()
    heard: list[logging.LogRecord] = []
    (copy / "preset.json").write_text(json.dumps(json.loads((copy / "preset.json").read_text()) | {"files": []}))
    encoder = copy / "diffusers" / "text_encoder" / "model.safetensors"
    encoder.chmod(0o644)
    save_file(load_file(encoder) | {"text_model.other": torch.ones(1)}, encoder, {"format": "pt"})
    handler.emit = heard.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        load_preset(copy, form="diffusers")
        assert heard == []
        StableDiffusionPipeline.from_pretrained(copy / "diffusers")
        assert any("UNEXPECTED" in record.getMessage() for record in heard)
    finally:
        logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize("form", ["diffusers", "checkpoint"])
def test_loading_draws_no_random_numbers(form: Any, folder: Path) -> None:
    """transformers fills new rows of a table with some, unless it is told not to."""
    state = torch.random.get_rng_state()
    load_preset(folder, form=form)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_words_are_not_put_behind_rows_that_have_no_words(folder: Path, tmp_path: Path) -> None:
    """They would be read as the rows before theirs."""
    copy = copied(folder, tmp_path)
    (copy / "preset.json").write_text(json.dumps(json.loads((copy / "preset.json").read_text()) | {"files": []}))
    single = copy / "toy.safetensors"
    single.chmod(0o644)
    metadata = {key: text for key, text in read_header(single).metadata.items() if key != TOKENIZER}
    save_file(load_file(single), single, metadata)
    shutil.rmtree(copy / "diffusers")
    (copy / "tokenizer").mkdir()
    words = vocabulary()
    longer = {"vocab": words["vocab"] | {"one more": len(words["vocab"])}, "merges": words["merges"]}
    for name, text in tokenizer_files(longer, []).items():
        (copy / "tokenizer" / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"embeddings/word\.safetensors does not fit the text encoder of toy"):
        load_preset(copy, form="checkpoint")


def test_another_version_of_the_description_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    described = json.loads((copy / "preset.json").read_text())
    for version, way_out in ((1, "forge build toy"), (3, "newer sdforge")):
        (copy / "preset.json").write_text(json.dumps(described | {"v": version}))
        with pytest.raises(UsageError) as caught:
            load_preset(copy)
        assert way_out in caught.value.hint
    lacking = {name: value for name, value in described.items() if name != "sampler"}
    (copy / "preset.json").write_text(json.dumps(lacking))
    with pytest.raises(UsageError, match="does not say its sampler"):
        load_preset(copy)
    (copy / "preset.json").write_text(json.dumps({"v": described["v"], "grid": {}}))
    with pytest.raises(UsageError, match="the grid of a sweep"):
        load_preset(copy)


def test_a_diffusers_folder_or_a_single_file_names_its_preset(folder: Path) -> None:
    for path in (folder / "diffusers", folder / "toy.safetensors"):
        found: Any = load_preset(path)
        assert found.preset["preset"] == "toy"


def test_a_picture_that_was_inverted_with_another_unet_is_noticed(made: Project, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    assert "`cat` was inverted with another U-Net" in project.forge("check").err
    project.edit("bake = { style = 0.8 }\n", "")
    assert "another U-Net" not in project.forge("check").err  # fp16 makes no other one
