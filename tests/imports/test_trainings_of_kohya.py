"""What kohya's scripts were told, a recipe says: their defaults where a file is silent, and nothing lost in silence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.imports.conftest import Importer

TRAINING = """\
[model_arguments]
pretrained_model_name_or_path = "alpha"
v_parameterization = false
[more]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_args = ["conv_dim=4", "conv_alpha=2", "rank_dropout=0.1"]
dataset_config = "pictures.toml"
output_name = "Chalk 2"
max_train_steps = 500
gradient_accumulation_steps = 2
learning_rate = 1e-4
unet_lr = 2e-4
text_encoder_lr = 5e-5
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 0.1
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.99"]
mixed_precision = "bf16"
save_precision = "fp16"
cache_latents = true
xformers = true
save_every_n_epochs = 1
seed = 42
min_snr_gamma = 5
noise_offset = 0.05
prior_loss_weight = 0.5
min_timestep = 100
loss_type = "l2"
max_token_length = 225
"""
PICTURES = """\
[general]
enable_bucket = true
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
color_aug = true

[[datasets]]
resolution = 768
batch_size = 2
flip_aug = true

  [[datasets.subsets]]
  image_dir = 'drawings'
  num_repeats = 10
  class_tokens = 'a sks square'
  caption_prefix = "best, "

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\\classes\\5_square'
  class_tokens = 'a square'
"""


def imported(importer: Importer, text: str, *more: str, name: str = "train.toml", pictures: str = PICTURES) -> str:
    """Return the recipe, which is not written."""
    folder = importer.root / "theirs"
    folder.mkdir(exist_ok=True)
    (folder / "pictures.toml").write_text(pictures)
    return importer.run(name, text, "--dry-run", *more)


def values(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def notes(text: str) -> str:
    return text.partition("family =")[0].replace("\n#  ", "")


def test_a_training_and_its_data_sets_are_carried_over(importer: Importer) -> None:
    found = values(imported(importer, TRAINING))
    assert found["lora"]["chalk-2"] == {
        "on": "alpha",
        "dataset": "drawings",
        "prior": "square",
        "rank": 8,
        "alpha": 4.0,
        "conv_rank": 4,
        "conv_alpha": 2.0,
        "text_encoder": True,
        "text_learning_rate": 5e-5,
        "steps": 500,
        "batch": 4,
        "learning_rate": 2e-4,
        "optimizer": "adamw8bit",
        "schedule": "constant",
        "warmup": 50,
        "weight_decay": 0.05,
        "clip": 1.0,
        "min_snr": 5.0,
        "caption_dropout": 0.0,
        "noise_offset": 0.05,
        "noise_from": 100,
        "flip": True,
        "shuffle": True,
        "keep_tokens": 1,
        "buckets": True,
        "resolution": 768,
        "prior_weight": 0.5,
        "dtype": "fp16",
        "precision": "bf16",
        "seed": 42,
    }
    assert found["dataset"] == {
        "drawings": {"path": "drawings", "captions": "txt", "caption": "a sks square", "repeats": 10},
        "square": {"path": "data/square", "captions": "txt", "caption": "a square"},
    }
    assert found["preset"] == {"checkpoint": "alpha", "bake": {"chalk-2": 1.0}, "export": ["loras"]}


def test_every_option_is_taken_or_named_in_the_recipe(importer: Importer) -> None:
    said = notes(imported(importer, TRAINING))
    for word in (
        "rank_dropout = 0.1",
        "betas = 0.9,0.99",
        "cache_latents, save_every_n_epochs, xformers",
        "max_token_length = 225",
        "color_aug = True",
        "caption_prefix = best, ",
        "C:\\classes\\5_square belong into data/square",
    ):
        assert word in said


def test_what_a_file_leaves_out_is_as_the_scripts_have_it(importer: Importer) -> None:
    text = 'pretrained_model_name_or_path = "alpha"\nnetwork_module = "networks.lora"\ndataset_config = "pictures.toml"'
    pictures = '[[datasets]]\n  [[datasets.subsets]]\n  image_dir = "drawings"'
    found = values(imported(importer, text, pictures=pictures))
    training = found["lora"]["train"]
    expected = {"rank": 4, "alpha": 1.0, "steps": 1600, "batch": 1, "min_snr": 0.0, "caption_dropout": 0.0, "warmup": 0}
    expected |= {"learning_rate": 2e-6, "text_learning_rate": 2e-6}
    assert {key: training[key] for key in expected} == expected
    assert (training["buckets"], training["resolution"], training["dtype"]) == (False, 512, "fp32")
    assert found["dataset"]["drawings"]["captions"] == "caption"


def test_epochs_are_counted_in_steps_where_the_pictures_are_here(importer: Importer) -> None:
    text = TRAINING.replace("max_train_steps = 500", "max_train_epochs = 6")
    said = imported(importer, text)
    assert values(said)["lora"]["chalk-2"]["steps"] == 6 * 8  # 3 pictures 10 times, 4 in a step
    elsewhere = PICTURES.replace("'drawings'", "'/far/drawings'")
    assert "the steps are to be chosen" in notes(imported(importer, text, pictures=elsewhere))


COMMAND = """\
# how I trained it
accelerate launch --num_cpu_threads_per_process 1 {script} \\
  --pretrained_model_name_or_path="alpha" --train_data_dir {folder} \\
  --learning_rate=1e-5 --max_train_steps 100 --train_batch_size=2 --resolution=512,512 {more}
"""


@pytest.mark.parametrize(
    ("script", "more", "method", "family", "settings"),
    [
        ("sdxl_train_network.py", "--network_module networks.lora", "lora", "sdxl", {"rank": 4, "batch": 2}),
        (
            "train_network.py",
            "--network_module=lycoris.kohya --network_args algo=lokr factor=4 --network_train_unet_only",
            "lokr",
            "sd15",
            {"factor": 4, "text_encoder": False},
        ),
        (
            "train_textual_inversion.py",
            "--token_string mip --init_word cat --num_vectors_per_token 3",
            "textual_inversion",
            "sd15",
            {"token": "mip", "vectors": 3, "init": "cat"},
        ),
        ("fine_tune.py", "--train_text_encoder", "fine_tune", "sd15", {"text_encoder": True, "learning_rate": 1e-5}),
        ("train_network.py", "--v2 --network_module=networks.lora", "lora", "sd2", {"steps": 100}),
    ],
)
def test_a_command_line_tells_training_and_family(
    importer: Importer, script: str, more: str, method: str, family: str, settings: dict[str, Any]
) -> None:
    text = COMMAND.format(script=script, more=more, folder="drawings")
    found = values(imported(importer, text, name="run.sh"))
    assert found["family"] == family
    training = found[method]["run"]
    assert {key: training[key] for key in settings} == settings
    assert found["dataset"]["drawings"]["layout"] == "kohya"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1", "is no configuration of kohya's scripts"),
        ("a = ", "is no TOML"),
        (TRAINING.replace("networks.lora", "networks.oft"), "trains networks.oft"),
        (TRAINING.replace("networks.lora", "lycoris.kohya").replace("rank_dropout=0.1", "algo=boft"), "trains boft"),
        (TRAINING.replace('network_module = "networks.lora"', ""), "does not tell what it trains"),
        (TRAINING.replace("pictures.toml", "nowhere.toml"), "nowhere.toml, which is not there"),
        (TRAINING.replace('dataset_config = "pictures.toml"', ""), "names no pictures"),
        (TRAINING + "network_train_text_encoder_only = true", "trains the text encoder alone"),
        (TRAINING.replace("network_dim = 8", 'network_dim = "many"'), "is not written as such files are"),
        (TRAINING.replace("min_snr_gamma = 5", "min_snr_gamma = nan"), "is not written as such files are"),
    ],
)
def test_a_training_without_a_counterpart_is_refused(importer: Importer, text: str, words: str) -> None:
    (importer.root / "theirs").mkdir()
    (importer.root / "theirs" / "pictures.toml").write_text(PICTURES)
    assert words in importer.run("train.toml", text, code=2)
    assert list((importer.root / "recipes").iterdir()) == []


def test_an_optimiser_that_finds_its_rate_leaves_ours_alone_and_a_second_folder_is_named(importer: Importer) -> None:
    text = TRAINING.replace("AdamW8bit", "Prodigy").replace("unet_lr = 2e-4", "unet_lr = 1.0")
    pictures = PICTURES + "  [[datasets.subsets]]\n  image_dir = '/far/others'\n  num_repeats = 2\n"
    said = imported(importer, text, pictures=pictures)
    assert "learning_rate" not in values(said)["lora"]["chalk-2"]
    assert "the optimiser Prodigy is not here" in notes(said)
    assert "/far/others is declared and not used" in notes(said)


def test_a_data_set_alone_becomes_data_sets(importer: Importer) -> None:
    found = values(imported(importer, PICTURES, "--family", "sdxl", name="only.toml"))
    assert found["family"] == "sdxl"
    assert set(found["dataset"]) == {"drawings", "square"}


def test_the_recipe_that_is_written_has_no_mistakes(importer: Importer) -> None:
    (importer.root / "theirs").mkdir()
    pictures = PICTURES.partition("  [[datasets.subsets]]\n  is_reg")[0]
    (importer.root / "theirs" / "pictures.toml").write_text(pictures)
    said = importer.run("train.toml", TRAINING)
    assert "1 recipe: no mistakes found" in said
    assert "no part of a recipe: cache_latents" in said
