"""`forge convert`: one form into another and back, byte for byte, with the words of `[preset] export`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdforge.cli import main
from sdforge.convert import KINDS
from sdforge.edits.export import FORMS
from sdforge.families.sd15 import FAMILY
from sdforge.formats.custom_diffusion import MATRICES, raw_name
from tests.families.conftest import each, toy, toys
from tests.families.loras import LINEAR, random_lora, write_kohya
from tests.families.workbench import Taken, same_bytes, take
from tests.formats.conftest import export, exported
from tests.run.hypernetworks import LINEAR as PLAIN
from tests.run.hypernetworks import kept

__all__ = ["each", "exported", "toy", "toys"]

Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Run the command; return its exit code and what it said."""

    def run(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["convert", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_every_form_of_an_export_can_be_had() -> None:
    assert {form for forms in KINDS.values() for form in forms} == set(FORMS)


def test_a_folder_becomes_a_file_and_the_same_folder_again(each: Taken, convert: Convert, tmp_path: Path) -> None:
    folder = export(tmp_path / "made", each, ["diffusers"], {}) / "diffusers"
    assert convert(folder, tmp_path / "one.safetensors")[0] == 0
    assert convert(tmp_path / "one.safetensors", tmp_path / "again")[0] == 0
    assert convert(tmp_path / "again", tmp_path / "two.safetensors")[0] == 0
    assert take(tmp_path / "one.safetensors").artifact.digest == each.artifact.digest
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_it_says_what_it_wrote_and_what_it_read_over(exported: Path, convert: Convert, tmp_path: Path) -> None:
    tensors = load_file(exported / "checkpoint.safetensors") | {"model_ema.decay": torch.tensor(0.9)}
    with safe_open(exported / "checkpoint.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "x.safetensors", file.metadata())
    code, said = convert("--json", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    told = json.loads(said)
    assert (code, told["event"], told["form"], told["family"]) == (0, "convert", "checkpoint", "sd15")
    (row,) = told["files"]
    assert (row["path"], row["bytes"]) == (str(tmp_path / "y.safetensors"), (tmp_path / "y.safetensors").stat().st_size)
    assert len(row["autov3"]) == 12
    (note,) = told["notes"]
    assert note.startswith("1 tensor read over")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_numbers_are_rounded_to_the_type_that_is_asked_for(
    dtype: str, exported: Path, convert: Convert, tmp_path: Path
) -> None:
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert convert(exported / "checkpoint.safetensors", tmp_path / "x.safetensors", "--dtype", dtype)[0] == 0
    before, after = load_file(exported / "checkpoint.safetensors"), load_file(tmp_path / "x.safetensors")
    assert all(same_bytes(after[name], tensor.to(wanted)) for name, tensor in before.items())


def test_numbers_that_do_not_fit_are_not_written(convert: Convert, tmp_path: Path) -> None:
    save_file({"emb_params": torch.full((1, 768), 1e5)}, tmp_path / "x.safetensors")
    code, said = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--dtype", "fp16")
    assert (code, "does not fit into float16" in said) == (1, True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_nothing_is_overwritten(exported: Path, convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    code, said = convert(exported / "checkpoint.safetensors", tmp_path / "x.safetensors")
    assert (code, "is there already" in said) == (2, True)
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_a_lora_of_diffusers_becomes_kohyas(toy: Taken, convert: Convert, tmp_path: Path) -> None:
    lora = random_lora(toy, (LINEAR,))
    tensors = {f"{module}.lora_A.weight": each.down for module, each in lora.items()}
    tensors |= {f"{module}.lora_B.weight": each.up for module, each in lora.items()}
    save_file(tensors, tmp_path / "d.safetensors")
    assert convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "--to", "loras", "--family", "sd15")[0] == 0
    assert take(tmp_path / "k.safetensors").artifact.digest == take(tmp_path / "d.safetensors").artifact.digest
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
        assert len(file.metadata()["sshs_model_hash"]) == 64


def test_what_a_lora_says_of_its_training_is_carried(toy: Taken, convert: Convert, tmp_path: Path) -> None:
    write_kohya(tmp_path / "k.safetensors", random_lora(toy, (LINEAR,)))
    stated = {"ss_tag_frequency": '{"ink": {"girl": 3}}', "ss_network_args": '{"conv_dim": "4"}', "other": "left"}
    save_file(load_file(tmp_path / "k.safetensors"), tmp_path / "old.safetensors", stated)
    assert (
        convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "--to", "loras", "--family", "sd15")[0] == 0
    )
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        found = file.metadata()
    assert {key: found.get(key) for key in stated} == stated | {"other": None}


def test_an_embedding_goes_through_every_form_and_back(convert: Convert, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(3, 768)}, tmp_path / "ink.safetensors")
    forms = {
        "embeddings-pt": "a/ink.pt",
        "embeddings-diffusers": "b/ink.safetensors",
        "embeddings": "c/ink.safetensors",
    }
    before = tmp_path / "ink.safetensors"
    for form, name in forms.items():
        (tmp_path / name).parent.mkdir()
        assert convert(before, tmp_path / name, "--to", form, "--pickle", "allow")[0] == 0
        before = tmp_path / name
    first, last = take(tmp_path / "ink.safetensors"), take(before)
    assert last.artifact.digest == first.artifact.digest
    assert torch.load(tmp_path / "a/ink.pt", weights_only=True)["name"] == "ink"
    assert list(load_file(tmp_path / "b/ink.safetensors")) == ["ink"]


def test_a_word_of_two_encoders_is_two_files_of_diffusers(convert: Convert, tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "ink.safetensors")
    assert convert(tmp_path / "ink.safetensors", tmp_path / "x.safetensors", "--to", "embeddings-diffusers")[0] == 0
    assert load_file(tmp_path / "x.safetensors")["ink"].shape == (1, 768)
    assert load_file(tmp_path / "x_2.safetensors")["ink"].shape == (1, 1280)
    (tmp_path / "y_2.safetensors").symlink_to("nowhere")
    code, said = convert(tmp_path / "ink.safetensors", tmp_path / "y.safetensors", "--to", "embeddings-diffusers")
    assert (code, "y_2.safetensors is there already" in said) == (2, True)
    assert not (tmp_path / "y.safetensors").exists()  # all of it or nothing


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_word_of_the_second_encoder_alone_goes_there_and_back(ending: str, convert: Convert, tmp_path: Path) -> None:
    save_file({"clip_g": torch.ones(2, 1280)}, tmp_path / "word.safetensors")
    assert convert(tmp_path / "word.safetensors", tmp_path / f"other.{ending}")[0] == 0
    assert convert("--pickle", "allow", tmp_path / f"other.{ending}", tmp_path / "again.safetensors")[0] == 0
    assert list(load_file(tmp_path / "again.safetensors")) == ["clip_g"]


@pytest.mark.parametrize(
    ("out", "file"), [("out", "out/learned_embeds.safetensors"), ("word.safetensors", "word.safetensors")]
)
def test_a_folder_of_custom_diffusion_may_lack_rows_for_an_encoder(
    out: str, file: str, convert: Convert, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    name = raw_name("down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k.weight")  # which SDXL alone has
    save_file({name: torch.ones(4, 8)}, tmp_path / "theirs" / MATRICES)
    save_file({"<toy>": torch.ones(1, 8)}, tmp_path / "theirs" / "learned_embeds.safetensors")
    form = "custom-embeddings" if out == file else "custom"
    assert convert("--to", form, tmp_path / "theirs", tmp_path / out)[0] == 0
    assert take(tmp_path / file).artifact.kind == "embedding"


def test_an_embedding_is_taken_out_of_a_lora(toy: Taken, convert: Convert, tmp_path: Path) -> None:
    write_kohya(tmp_path / "k.safetensors", random_lora(toy, (LINEAR,)))
    rows = torch.randn(2, 768)
    save_file(load_file(tmp_path / "k.safetensors") | {"bundle_emb.ink.emb_params": rows}, tmp_path / "b.safetensors")
    assert convert(tmp_path / "b.safetensors", tmp_path / "x.safetensors", "--embedding", "ink")[0] == 0
    assert torch.equal(load_file(tmp_path / "x.safetensors")["emb_params"], rows)
    assert take(tmp_path / "x.safetensors").artifact.facts == {"token": "ink"}


def test_a_hypernetwork_becomes_a1111s_and_ours_again(toy: Taken, convert: Convert, tmp_path: Path) -> None:
    one = kept(tmp_path / "h", PLAIN)
    (file,) = (
        export(tmp_path / "out", toy, ["hypernetworks"], {}, hypernetworks=[one.given()]) / "hypernetworks"
    ).iterdir()
    assert convert(file, tmp_path / "x.pt")[0] == 0
    code, _ = convert(tmp_path / "x.pt", tmp_path / "y.safetensors", "--pickle", "allow", "--family", "sd15")
    assert code == 0
    assert take(tmp_path / "y.safetensors").artifact.digest == one.artifact.digest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.safetensors", "--to", "loras"], "there is no form 'loras' of a checkpoint"),
        (["x.ckpt"], "x.ckpt is no name for any form of a checkpoint"),
        (["x.safetensors", "--to", "diffusers"], "x.safetensors is no name for diffusers"),
        (["gone/x.safetensors"], "there is no folder"),
        (["x.safetensors", "--family", "sdxl"], "is for Stable Diffusion 1.x, not for Stable Diffusion XL"),
        (["x.safetensors", "--family", "sd3"], "there is no family 'sd3'"),
        (["x.safetensors", "--embedding", "ink"], "carries no embedding 'ink'"),
    ],
)
def test_what_cannot_be_had_is_said(
    arguments: list[str], words: str, exported: Path, convert: Convert, tmp_path: Path
) -> None:
    code, said = convert(exported / "checkpoint.safetensors", tmp_path / arguments[0], *arguments[1:])
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert words in said


def test_a_file_that_is_no_whole_checkpoint_becomes_no_folder(exported: Path, convert: Convert, tmp_path: Path) -> None:
    with safe_open(exported / "checkpoint.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(exported / "checkpoint.safetensors")
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    save_file(less, tmp_path / "x.safetensors", metadata)
    assert "has no vae" in convert(tmp_path / "x.safetensors", tmp_path / "folder")[1]
    del metadata["sdforge.tokenizer"]
    save_file(tensors, tmp_path / "y.safetensors", metadata)
    assert "has other words than CLIP's" in convert(tmp_path / "y.safetensors", tmp_path / "folder")[1]
    assert not (tmp_path / "folder").exists()


def test_a_pickle_is_converted_where_that_is_allowed(exported: Path, convert: Convert, tmp_path: Path) -> None:
    tensors = load_file(exported / "checkpoint.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    code, said = convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert (code, "`--pickle allow`" in said) == (2, True)
    assert convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors", "--pickle", "allow")[0] == 0
    assert all(same_bytes(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "x.safetensors").items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.ckpt", "x.safetensors"]


def test_the_word_of_custom_diffusion_becomes_an_embedding(toy: Taken, convert: Convert, tmp_path: Path) -> None:
    name = FAMILY.cross_attention[0]
    (tmp_path / "cat").mkdir()
    save_file({raw_name(name): toy.tensors("unet")[name]}, tmp_path / "cat" / MATRICES)
    code, said = convert(tmp_path / "cat", tmp_path / "cat.safetensors", "--to", "custom-embeddings")
    assert (code, "holds matrices and no word" in said) == (2, True)
    save_file({"<cat>": torch.ones(2, 16)}, tmp_path / "cat" / "learned_embeds.safetensors")
    assert convert(tmp_path / "cat", tmp_path / "cat.safetensors", "--to", "custom-embeddings")[0] == 0
    assert torch.equal(load_file(tmp_path / "cat.safetensors")["emb_params"], torch.ones(2, 16))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_alone_goes_from_its_folder_into_a_file_with_its_facts(
    part: str, toy: Taken, toys: Path, convert: Convert, tmp_path: Path
) -> None:
    assert part in toy.artifact.components
    assert convert(toys / "toy" / part, tmp_path / "x.safetensors", "--family", "sd15")[0] == 0
    folder, file = take(toys / "toy" / part), take(tmp_path / "x.safetensors")
    assert file.artifact.digest == folder.artifact.digest
    assert file.artifact.facts == folder.artifact.facts
    code, said = convert(toys / "toy" / part, tmp_path / "folder", "--family", "sd15")
    assert (code, "without which no folder can be loaded" in said) == (2, True)
