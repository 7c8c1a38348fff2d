"""`forge show FILE` of every format: kind, dialect, family, hashes, and how a file of ours was made."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from sdforge import describe
from sdforge.cli import main
from sdforge.formats.safetensors import read_header
from sdforge.run.embedding_picture import TEXT
from tests.conftest import Project
from tests.edits.test_bake_forms import ALL, FLAT
from tests.families.conftest import each, toy, toys
from tests.families.forms import random_factors
from tests.families.loras import LINEAR, random_lora, write_kohya
from tests.families.workbench import Taken
from tests.formats.conftest import export, exported

__all__ = ["each", "exported", "toy", "toys"]

Show = Callable[[Path], dict[str, Any]]

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    def run(path: Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["show", str(path), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_a_checkpoint_tells_what_it_is_and_by_which_hashes_others_know_it(
    each: Taken, show: Show, tmp_path: Path
) -> None:
    """AutoV2 is of the file, AutoV3 of what lies behind the header."""
    file = export(tmp_path, each, ["checkpoint", "diffusers"], {"title": "A toy"}) / "checkpoint.safetensors"
    shown = show(file)
    assert (shown["kind"], shown["family"], shown["title"]) == ("checkpoint", each.artifact.family, "A toy")
    assert shown["dialect"] == ("SGM" if each.artifact.family == "sdxl" else "LDM")
    assert shown["facts"] == each.artifact.facts
    whole = file.read_bytes()
    behind = 8 + struct.unpack("<Q", whole[:8])[0]
    assert shown["sha256"] == hashlib.sha256(whole).hexdigest()
    assert shown["autov2"] == shown["sha256"][:10].upper()
    assert shown["autov3"] == hashlib.sha256(whole[behind:]).hexdigest()[:12].upper()
    folder = show(tmp_path / "diffusers")
    assert (folder["kind"], folder["dialect"], folder["facts"]) == ("checkpoint", "diffusers", each.artifact.facts)
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert folder["files"][unet] == hashlib.sha256((tmp_path / "diffusers" / unet).read_bytes()).hexdigest()


def test_a_lora_tells_its_dialect_rank_and_what_it_brings_along(toy: Taken, show: Show, tmp_path: Path) -> None:
    lora = random_lora(toy, (LINEAR,))
    write_kohya(tmp_path / "k.safetensors", lora)
    save_file(
        load_file(tmp_path / "k.safetensors") | {"bundle_emb.ink.emb_params": torch.ones(1, 16)},
        tmp_path / "b.safetensors",
    )
    up, down = lora[LINEAR].up, lora[LINEAR].down
    save_file({f"{LINEAR}.lora_A.weight": down, f"{LINEAR}.lora_B.weight": up}, tmp_path / "d.safetensors")
    old = LINEAR.replace(".to_q", ".processor.to_q_lora")
    save_file({f"{old}.down.weight": down, f"{old}.up.weight": up}, tmp_path / "o.safetensors")
    factors = random_factors(ALL["loha"], (64, 8))
    name = "lora_" + FLAT.replace(".", "_")
    save_file({f"{name}.{factor}": tensor for factor, tensor in factors.items()}, tmp_path / "l.safetensors")
    save_file({"unet:0:up": up, "unet:0:down": down}, tmp_path / "c.safetensors")
    dialects = {
        "k": "kohya",
        "b": "kohya",
        "d": "diffusers",
        "o": "diffusers, before PEFT",
        "l": "LyCORIS",
        "c": "cloneofsimo",
    }
    for file, dialect in dialects.items():
        shown = show(tmp_path / f"{file}.safetensors")
        assert (shown["kind"], shown["dialect"]) == ("lora", dialect)
    assert show(tmp_path / "k.safetensors")["rank"] == down.shape[0]
    assert show(tmp_path / "b.safetensors")["embeddings"] == ["ink"]


def test_an_embedding_tells_its_word_and_for_what_it_is(show: Show, tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "x.safetensors")
    shown = show(tmp_path / "x.safetensors")
    assert (shown["kind"], shown["family"], shown["facts"], shown["vectors"]) == (
        "embedding",
        "sdxl",
        {"token": "x"},
        2,
    )


def test_an_embedding_in_a_picture_is_shown_as_one(show: Show, tmp_path: Path) -> None:
    path = hidden(tmp_path / "ink.png", torch.ones(2, 768))
    shown = show(path)
    assert (shown["kind"], shown["dialect"], shown["vectors"]) == ("embedding", "A1111, in a picture", 2)
    assert (shown["facts"], shown["sha256"]) == ({"token": "ink"}, hashlib.sha256(path.read_bytes()).hexdigest())


def hidden(path: Path, rows: torch.Tensor) -> Path:
    terms = {"string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}}
    text = PngInfo()
    text.add_text(TEXT, base64.b64encode(json.dumps(terms).encode()).decode())
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    return path


def test_what_is_shown_is_in_words_and_fits_the_terminal(
    toy: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables are no JSON, values stay beside their names where lines are broken, and nothing is said twice."""
    path = export(tmp_path, toy, ["checkpoint"], {"title": "A toy"}) / "checkpoint.safetensors"
    save_file(load_file(path) | {"model_ema.oddweight": torch.ones(1)}, path, read_header(path).metadata)
    monkeypatch.setattr(describe, "screen_width", lambda _: 60)
    assert main(["show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  family   sd15") + 1
    assert lines[at : at + 3] == [
        "  facts    latent_scaling 0.2, resolution 64, text_heads 2,",
        "           unet_groups 4, unet_heads 2, vae_groups 4",
        "  tensors  text_encoder 36, vae 244, unet 684",
    ]
    assert "  dtypes   fp16 964, fp32 1" in lines
    assert "  passed   1 tensor: a second copy of the weights (EMA)" in lines
    assert not any("sdforge." in line or "{" in line for line in lines)


@pytest.mark.parametrize("in_a_project", [True, False])
def test_a_folder_is_shown_by_its_plain_name_where_no_target_has_it(
    in_a_project: bool, toys: Path, toy: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert toy.artifact.kind == "checkpoint"
    for name in ("vae", "soft"):
        shutil.copytree(toys / "toy" / "vae", tmp_path / name)
    if in_a_project:
        (tmp_path / "forge.toml").touch()
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "r.toml").write_text(
            'family = "sd15"\n[source.a]\nfrom = "vae"\n[source.b]\nfrom = "vae"\n'
            '[weighted_sum.soft]\ncheckpoints = ["a", "b"]\nweights = [0.5, 0.5]\n'
        )
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["show", "vae", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == {"vae": 244}
    assert main(["show", "soft"]) == 0
    assert capsys.readouterr().out.startswith("r:soft  weighted_sum" if in_a_project else "  path     soft")


def test_a_presets_folder_is_shown_by_the_model_in_it(show: Show, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "preset.json").write_text("{}")
    save_file({"emb_params": torch.zeros(1, 768)}, folder / "mine.safetensors")
    assert (show(folder)["path"], show(folder)["kind"]) == (str(folder / "mine.safetensors"), "embedding")


def test_what_cannot_be_used_is_shown_with_the_reason(show: Show, tmp_path: Path) -> None:
    flux = "double_blocks.0.img_attn.qkv.weight"
    save_file({flux: torch.ones(3, 1)}, tmp_path / "x.safetensors")
    shown = show(tmp_path / "x.safetensors")
    assert "a FLUX checkpoint" in shown["refused"]
    assert shown["tensors"] == {flux: [3, 1]}


def test_what_a_file_says_in_several_lines_is_no_entry_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"modelspec.description": "a\n  sha256   0000\x1b[2J\u2028b\r\nc"}
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "x\n  kind     lora.safetensors", metadata)
    assert main(["show", str(tmp_path / "x\n  kind     lora.safetensors")]) == 0
    said = capsys.readouterr().out
    assert sum(line.startswith("  sha256") for line in said.splitlines()) == 1
    assert not any(line.startswith("  kind") for line in said.splitlines())  # no word is called so: it is refused
    assert "\x1b" not in said


def test_names_of_metadata_are_cut_as_what_they_say_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "x.safetensors", {"a" * 10_000: "b"})
    assert main(["show", str(tmp_path / "x.safetensors")]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 200


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.ckpt", "out/gone", "round.safetensors"])
@pytest.mark.parametrize("command", [["show"], ["diff", "whole.safetensors"]])
def test_a_path_that_leads_to_nothing_is_no_misspelt_target(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == ["diff", "whole.safetensors"]:
        (tmp_path / "forge.toml").touch()
    (tmp_path / "round.safetensors").symlink_to("round.safetensors")
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "whole.safetensors")
    assert main(["-C", str(tmp_path), *command, name]) == 2
    said = capsys.readouterr().err
    assert "does not exist" in said or "cannot be opened" in said
    assert name in said


def test_what_can_be_done_about_a_refused_file_is_shown_too(show: Show, tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(1, 768), "<b>": torch.ones(2, 768)}, tmp_path / "x.safetensors")
    assert 'embedding = "<a>"' in show(tmp_path / "x.safetensors")["hint"]


def test_a_pickle_is_not_opened(show: Show, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    shown = show(tmp_path / "x.ckpt")
    assert (shown["kind"], shown["bytes"]) == ("pickle", (tmp_path / "x.ckpt").stat().st_size)
    assert 'pickle = "allow"' in shown["refused"]


def test_a_built_preset_tells_how_it_was_made(project: Project) -> None:
    project.build()
    said = project.forge("show", str(project.output)).out
    made = [line.split() for line in said.splitlines() if line.startswith("  made")]
    assert [row[2] for row in made] == ["dataset", "checkpoint", "rehearsal", "rehearsal", "rehearsal"]
    shown = json.loads(project.forge("show", "--json", str(project.output)).out)
    assert [entry.get("inputs", {}) for entry in shown["made"]][-1]
    assert shown["made"][-1]["digest"]


HOSTILE = {
    "a pipe": lambda path: os.mkfifo(path),
    "nothing": lambda path: path.write_bytes(b""),
    "a huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "no header": lambda path: path.write_bytes(b"\xff" * 64),
    "a link into nowhere": lambda path: path.symlink_to(path.with_name("gone")),
}


@pytest.mark.parametrize("command", [["show"], ["convert"]])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_by_the_command(
    what: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    HOSTILE[what](path)
    more = [str(tmp_path / "out.safetensors")] if command == ["convert"] else []
    assert main([*command, str(path), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


def test_hostile_sources_end_a_build_in_one_sentence(project: Project) -> None:
    """Through the whole command: nothing waits, nothing runs, and the source is named."""
    for name, text in (
        ("cut.safetensors", b"\x40\0\0\0\0\0\0\0{"),
        ("code.ckpt", b"\x80\x02cos\nsystem\n(S'touch harm'\ntR."),
    ):
        (project.root / name).write_bytes(text)
    os.mkfifo(project.root / "pipe.safetensors")
    for name in ("cut.safetensors", "code.ckpt", "pipe.safetensors"):
        project.edit('from = "base"', f'from = "{name}"\npickle = "allow"', "forge.toml")
        for command in ("check", "plan", "build"):
            said = project.forge(command, code=2).err
            assert name in said
            assert (
                len(said.splitlines()) <= 5
            )  # the sentence, the line with its caret, the hint, and how many there are
        project.edit(f'from = "{name}"\npickle = "allow"', 'from = "base"', "forge.toml")
    assert not (project.root / "harm").exists()


def test_tensors_that_hold_nan_or_inf_are_named(exported: Path, show: Show, tmp_path: Path) -> None:
    whole = exported / "checkpoint.safetensors"
    tensors = load_file(whole)
    names = sorted(name for name, tensor in tensors.items() if tensor.ndim == 1)[:2]
    for name, value in zip(names, (float("nan"), float("inf")), strict=True):
        tensors[name][-1] = value
    save_file(tensors, tmp_path / "broken.safetensors")
    assert sorted(show(tmp_path / "broken.safetensors")["broken"]) == names
    assert "broken" not in show(whole)
