"""Pickles and pictures as sources: converted once, by a process in which nothing of them runs and little fits."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import struct
import sys
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge import import_step
from sdforge.errors import UsageError
from sdforge.formats.safetensors import read_header
from sdforge.graph import Taken as Named
from sdforge.import_step import import_file
from sdforge.run.embedding_picture import read_picture
from sdforge.run.import_step import IGNORED, read_pickle
from sdforge.run.scaled import write_scaled
from sdforge.session import Session, open_session
from tests.families.loras import LINEAR, random_lora, write_kohya
from tests.families.workbench import Taken, take
from tests.formats.payloads import converted_apart

ROWS = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what is kept of a pickle ------------------------------------------------------------------------------------------


class ModelCheckpoint:
    """As training programs leave it beside the weights."""

    def __init__(self) -> None:
        self.best = 0.5


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lightning's class of that name, as far as a pickle can tell."""
    name = IGNORED[0].rpartition(".")[0]
    module = types.ModuleType(name)
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    found = type("ModelCheckpoint", (ModelCheckpoint,), {"__module__": name})
    module.ModelCheckpoint = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_taken_from_under_what_else_a_training_keeps(zipped: bool, lightning: Any, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 3).half(), "b": torch.arange(4)}
    whole = {
        "state_dict": tensors | {"epoch": 3},
        "callbacks": {lightning: {"best": 1.0}, "one": lightning()},
        "loss": np.float64(0.5),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }
    torch.save(whole, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert same(read_pickle(tmp_path / "x.ckpt")[0], tensors)


def test_tensors_that_share_their_numbers_become_two(tmp_path: Path) -> None:
    both = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": both, "turned": both.t(), "row": both[1]}, tmp_path / "x.pt")
    assert same(read_pickle(tmp_path / "x.pt")[0], {"a": both, "turned": both.t(), "row": both[1]})


A1111 = {"string_to_token": {"*": 265}, "name": "toy", "step": 5, "sd_checkpoint": None, "sd_checkpoint_name": None}


@pytest.mark.parametrize(
    "terms", [{"*": ROWS}, {"*": torch.nn.Parameter(ROWS)}, torch.nn.ParameterDict({"*": torch.nn.Parameter(ROWS)})]
)
def test_the_rows_of_an_embedding_are_found_in_every_table_that_kept_them(terms: Any, tmp_path: Path) -> None:
    torch.save(A1111 | {"string_to_param": terms, "string_to_token": {"*": torch.tensor(265)}}, tmp_path / "x.pt")
    assert same(read_pickle(tmp_path / "x.pt")[0], {"emb_params": ROWS})


def test_a_table_of_parameters_as_the_first_inversions_wrote_it(tmp_path: Path) -> None:
    """torch kept them under `_parameters` then."""
    table = torch.nn.ParameterDict()
    table.__dict__ = {"training": True, "_parameters": {"*": torch.nn.Parameter(ROWS)}, "_buffers": {}, "_modules": {}}
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, tmp_path / "x.pt")
    assert same(read_pickle(tmp_path / "x.pt")[0], {"emb_params": ROWS})


def test_an_embedding_of_two_terms_is_refused(tmp_path: Path) -> None:
    torch.save(A1111 | {"string_to_param": {"*": ROWS, "+": ROWS}}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="an embedding of 2 terms"):
        read_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize(("name", "component"), [("x.pt", "unet"), ("x.text_encoder.pt", "text_encoder")])
def test_a_list_is_the_first_implementations_lora(name: str, component: str, tmp_path: Path) -> None:
    pairs = [torch.randn(4, 2), torch.randn(2, 4), torch.randn(6, 2), torch.randn(2, 6)]
    torch.save(pairs, tmp_path / name)
    expected = {f"{component}:{i // 2}:{('up', 'down')[i % 2]}": tensor for i, tensor in enumerate(pairs)}
    assert same(read_pickle(tmp_path / name)[0], expected)


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (torch.ones(768), "no table of tensors"),
        ("a text", "no table of tensors"),
        ({}, "holds no tensors"),
        ({"a": 1}, "holds no tensors"),
        ({"a": torch.ones(1), "b": [torch.ones(1)]}, "'b', which is neither"),
        ({"a": {"b": torch.ones(1)}}, "'a', which is neither"),
        ({"a": torch.ones(2).to_sparse()}, "'a', which is neither"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a', which is neither"),
        ([torch.ones(1)], "is a list that is no LoRA"),
        ([torch.ones(1), 2], "is a list that is no LoRA"),
        ({5: 1, "a": torch.ones(1)}, "no pair of networks"),
        ({5: (1, 2)}, "a network that is no table"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(whole: Any, words: str, tmp_path: Path) -> None:
    torch.save(whole, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=words):
        read_pickle(tmp_path / "x.pt")


# -- pickles that somebody made to hurt --------------------------------------------------------------------------------


class Harm:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def zipped(path: Path, opcodes: bytes, packing: int = zipfile.ZIP_STORED) -> None:
    """A zip as torch writes it around these opcodes."""
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("archive/data.pkl", opcodes)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")


def bomb(name: str, path: Path) -> None:
    """Write a pickle that does harm or takes all there is."""
    if name == "code in a zip":
        torch.save({"a": Harm(path.parent / "harm")}, path)
    elif name == "code in torch's old form":
        torch.save({"a": Harm(path.parent / "harm")}, path, _use_new_zipfile_serialization=False)
    elif name == "a bare pickle with code":
        path.write_bytes(pickle.dumps(Harm(path.parent / "harm")))
    elif name == "two gigabytes of nothing":
        zipped(path, b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.")
    elif name == "a view of few numbers without end":
        torch.save({"a": torch.ones(1).expand(10**5, 10**5)}, path)
    elif name == "packed parts":
        zipped(path, b"\x80\x02" + b"0" * (1 << 20), zipfile.ZIP_DEFLATED)
    elif name == "lists within lists":
        zipped(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    elif name == "a list that holds itself twice, forty times over":
        twice = (b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
        zipped(path, b"\x80\x02]q\0" + b"".join(twice) + b".")
    elif name == "a damaged zip":
        path.write_bytes(b"PK\3\4" + b"\0" * 100)
    else:
        path.write_bytes(b"\x80\x02" + name.encode())


BOMBS = {
    "code in a zip": "'posix.mkdir', which is code",
    "code in torch's old form": "'posix.mkdir', which is code",
    "a bare pickle with code": "it is damaged",
    "two gigabytes of nothing": "more memory than a file of its size should",
    "a view of few numbers without end": "would become 40,000,000,000 bytes",
    "packed parts": "packed parts",
    "lists within lists": "a list that is no LoRA",
    "a list that holds itself twice, forty times over": "a list that is no LoRA",
    "a damaged zip": "it is damaged",
    "nonsense": "it is damaged",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_pickle_is_refused_in_one_sentence_and_runs_nothing(name: str, tmp_path: Path) -> None:
    bomb(name, tmp_path / "x.ckpt")
    code, said = converted_apart(tmp_path / "x.ckpt", tmp_path / "out")
    assert code == 2
    assert BOMBS[name] in said.splitlines()[0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]  # no harm, and nothing half written


def test_what_the_process_says_of_code_reaches_the_person(tmp_path: Path) -> None:
    bomb("code in a zip", tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match="which is code") as caught:
        import_file(tmp_path / "x.ckpt", tmp_path / "out", "pickle")
    assert "best as safetensors" in caught.value.hint
    assert not (tmp_path / "harm").exists()


def test_a_converting_process_has_no_secrets_and_too_slow_a_one_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen: dict[str, Any] = {}
    run = import_step.subprocess.run

    def watched(command: list[str], **more: Any) -> Any:
        seen.update(more["env"])
        return run(command, **more)

    monkeypatch.setattr(import_step.subprocess, "run", watched)
    monkeypatch.setattr(import_step, "PATIENCE", 0.05)
    with pytest.raises(UsageError, match="takes longer to convert"):
        import_file(tmp_path / "x.pt", tmp_path / "out", "pickle")
    assert "HF_TOKEN" not in seen


def test_a_pipe_is_no_pickle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(UsageError, match="no regular file"):
        import_file(tmp_path / "x.pt", tmp_path / "out", "pickle")


# -- pictures that carry an embedding ----------------------------------------------------------------------------------


def hidden(rows: Tensor) -> str:
    return json.dumps({"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}})


def picture() -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(17, 255, (48, 40, 3), np.uint8))


def with_stripes(data: bytes) -> Any:
    """A1111's hiding, written anew: the lower and upper halves of bytes in the lowest bits left and right."""
    shown = np.asarray(picture())
    height = len(shown)
    width = -(-len(data) // (height * 3))
    plain = np.frombuffer(data.ljust(height * width * 3, b"\0"), np.uint8).reshape(height, width, 3)
    state, numbers = 0, []
    for _ in range(plain.size):
        state = (1664525 * state + 1013904223) % 2**32
        numbers.append(state % 255 & 15)
    mixed = np.array(numbers, np.uint8).reshape(plain.shape)
    low, high = ((half ^ mixed) | 0x50 for half in (plain & 15, plain >> 4))
    black = np.zeros((height, 1, 3), np.uint8)
    return Image.fromarray(np.concatenate([low, black, shown, black, high], axis=1))


def test_an_embedding_is_read_from_the_text_beside_a_picture(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(hidden(ROWS).encode()).decode())
    picture().save(tmp_path / "x.png", pnginfo=info)
    assert same(read_picture(tmp_path / "x.png")[0], {"emb_params": ROWS})


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_an_embedding_is_read_from_a_pictures_pixels(ending: str, tmp_path: Path) -> None:
    with_stripes(zlib.compress(hidden(ROWS).encode(), 9)).save(tmp_path / f"x.{ending}", lossless=True)
    assert same(read_picture(tmp_path / f"x.{ending}")[0], {"emb_params": ROWS})


@pytest.mark.parametrize(
    "make", [picture, lambda: with_stripes(b"nothing"), lambda: with_stripes(zlib.compress(b"[" * 10**6))]
)
def test_a_picture_without_an_embedding_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no embedding is hidden"):
        read_picture(tmp_path / "x.png")


def test_a_picture_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(UsageError, match="no picture that can be opened"):
        read_picture(tmp_path / "x.png")


# -- as sources of a project -------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in this process, which has torch already."""

    def import_here(path: Path, into: Path, what: str) -> None:
        if what == "scaled":
            write_scaled(path, into)
            return
        tensors, metadata = read_pickle(path) if what == "pickle" else read_picture(path)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, into, metadata)

    monkeypatch.setattr(import_step, "import_file", import_here)


def session(root: Path, sources: dict[str, str]) -> Session:
    """A project with these sources: name → what its table says beside `from`, which is the name."""
    lines = [f'[source.{name.partition(".")[0]}]\nfrom = "{name}"\n{more}\n' for name, more in sources.items()]
    (root / "forge.toml").write_text("".join(lines))
    return open_session(root)


def artifact(opened: Session, name: str) -> Any:
    return opened.sources.artifact(Named(name, "source", opened.project.sources[name]))


def test_a_pickled_checkpoint_is_the_one_that_it_was_made_from(exported: Path, toy: Taken, tmp_path: Path) -> None:
    tensors = load_file(exported / "checkpoint.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt")
    save_file(tensors, tmp_path / "new.safetensors")
    opened = session(tmp_path, {"old.ckpt": 'pickle = "allow"', "new.safetensors": "", "not.ckpt": ""})
    old, new = artifact(opened, "old"), artifact(opened, "new")
    assert old.digest == new.digest
    assert old.components["unet"].identity == toy.artifact.components["unet"].identity
    assert list(old.notes["files"]) == ["old.ckpt"]
    home = next(iter(opened.store.table(old.components["unet"]))).spot.file
    assert opened.store.object(home).is_file()
    assert home in opened.store.source_tables()  # so that `clean` leaves it


@pytest.mark.usefixtures("here")
def test_it_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"emb_params": torch.ones(2, 768)}, tmp_path / "word.pt")
    first = artifact(session(tmp_path, {"word.pt": 'pickle = "allow"'}), "word")
    monkeypatch.setattr(import_step, "import_file", None)
    os.utime(tmp_path / "word.pt", (1e9, 1e9))
    again = artifact(session(tmp_path, {"word.pt": 'pickle = "allow"'}), "word")
    assert (again.kind, again.family, again.facts) == ("embedding", "sd15", {"token": "word"})
    assert again.digest == first.digest


@pytest.mark.usefixtures("here")
def test_what_was_allowed_once_is_refused_when_it_no_longer_is(tmp_path: Path) -> None:
    torch.save({"emb_params": torch.ones(2, 768)}, tmp_path / "word.pt")
    assert artifact(session(tmp_path, {"word.pt": 'pickle = "allow"'}), "word").kind == "embedding"
    with pytest.raises(UsageError, match="is a pickle, which could run code") as caught:
        artifact(session(tmp_path, {"word.pt": ""}), "word")
    assert 'pickle = "allow"' in caught.value.hint


@pytest.mark.usefixtures("here")
def test_a_folder_of_pickles_is_the_folder_it_was_made_from(exported: Path, toy: Taken, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "diffusers", tmp_path / "folder"))
    for place, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (weights,) = (folder / place).glob("*.safetensors")
        torch.save(load_file(weights), folder / place / f"{name}.bin")
        weights.unlink()
    assert artifact(session(tmp_path, {"folder": 'pickle = "allow"'}), "folder").digest == toy.artifact.digest
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is a pickle"):
        artifact(session(tmp_path, {"folder": ""}), "folder")


@pytest.mark.usefixtures("here")
def test_a_picture_with_an_embedding_is_one_and_any_other_is_a_picture(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(hidden(ROWS).encode()).decode())
    picture().save(tmp_path / "word.png", pnginfo=info)
    picture().save(tmp_path / "plain.png", pnginfo=PngInfo())
    with_stripes(zlib.compress(hidden(ROWS).encode(), 9)).save(tmp_path / "striped.png")
    opened = session(tmp_path, {"word.png": "", "plain.png": "", "striped.png": 'embedding = "<toy>"'})
    assert artifact(opened, "word").facts == {"token": "word"}
    assert artifact(opened, "plain").kind == "picture"
    assert artifact(opened, "striped").facts == {"token": "<toy>"}
    assert artifact(opened, "striped").components == artifact(opened, "word").components


def test_a_lora_gives_its_embedding_to_a_source_that_names_it(toy: Taken, tmp_path: Path) -> None:
    write_kohya(tmp_path / "line.safetensors", random_lora(toy, (LINEAR,)))
    tensors = load_file(tmp_path / "line.safetensors")
    bundle = {"bundle_emb.my.word.emb_params": ROWS, "bundle_emb.other.string_to_param.*": ROWS[:1].clone()}
    save_file(tensors | bundle, tmp_path / "line.safetensors")
    opened = session(tmp_path, {"line.safetensors": 'embedding = "my.word"'})
    found = artifact(opened, "line")
    assert (found.kind, found.facts, found.notes["vectors"]) == ("embedding", {"token": "my.word"}, 3)
    with pytest.raises(UsageError, match="carries no embedding 'word'") as caught:
        artifact(session(tmp_path, {"line.safetensors": 'embedding = "word"'}), "line")
    assert caught.value.hint == "it carries my.word, other"
    assert take(tmp_path / "line.safetensors").artifact.kind == "lora"


# -- fp8 weights whose scales stand beside them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaled", "inputs", "mark"),
    [("scale_weight", "scale_input", "scaled_fp8"), ("weight_scale", "input_scale", "cond_stage_model.comfy_quant")],
)
def test_scaled_weights_are_multiplied_once(
    scaled: str, inputs: str, mark: str, exported: Path, tmp_path: Path
) -> None:
    """As ComfyUI called what stands beside them, and as it does now."""
    whole = load_file(exported / "checkpoint.safetensors")
    place = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    conv = "model.diffusion_model.middle_block.0.in_layers.2"
    eight = {name: whole[f"{name}.weight"].to(torch.float8_e4m3fn) for name in (place, conv)}
    scales = {place: torch.tensor(0.5), conv: torch.linspace(0.1, 2, eight[conv].shape[0])}
    beside = {f"{name}.{scaled}": scale for name, scale in scales.items()}
    beside |= {f"{place}.{inputs}": torch.tensor(3.0), mark: torch.empty(0).to(torch.float8_e4m3fn)}
    stated = {"_quantization_metadata": "{}", "modelspec.title": "toy"}
    save_file(whole | {f"{name}.weight": t for name, t in eight.items()} | beside, tmp_path / "x.safetensors", stated)
    import_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "scaled")
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == whole.keys()
    assert read_header(tmp_path / "y.safetensors").metadata == {"modelspec.title": "toy"}
    assert torch.equal(found[f"{place}.weight"], (eight[place].float() * 0.5).half())
    assert torch.equal(found[f"{conv}.weight"], (eight[conv].float() * scales[conv].reshape(-1, 1, 1, 1)).half())
    assert all(torch.equal(found[n], t) for n, t in whole.items() if n not in (f"{place}.weight", f"{conv}.weight"))


@pytest.mark.usefixtures("here")
def test_a_scaled_checkpoint_is_a_source_like_any_other(exported: Path, tmp_path: Path) -> None:
    whole = load_file(exported / "checkpoint.safetensors")
    name = "model.diffusion_model.out.2"
    scale = {f"{name}.weight": whole[f"{name}.weight"].to(torch.float8_e5m2), f"{name}.scale_weight": torch.tensor(1.0)}
    save_file(whole | scale, tmp_path / "x.safetensors")
    found = artifact(session(tmp_path, {"x.safetensors": ""}), "x")
    assert (found.kind, found.family, found.components["unet"].dtype) == ("checkpoint", "sd15", "F16")
    with pytest.raises(UsageError, match="keeps the scales of its fp8 weights apart"):
        take(tmp_path / "x.safetensors")


def test_whole_numbers_with_scales_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2).to(torch.int8), "a.weight_scale": torch.ones(())}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"keeps a\.weight as I8 with a scale beside it"):
        write_scaled(tmp_path / "x.safetensors", tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("shape", "scale", "words"),
    [
        ((2, 2), ("b.scale_weight", 1), "no weight that it scales"),
        ((2, 2), ("a.scale_weight", 3), "by 3 numbers"),
        ((), ("a.scale_weight", 3), "by 3 numbers"),
    ],
)
def test_scales_that_belong_to_nothing_are_refused(
    shape: tuple[int, ...], scale: tuple[str, int], words: str, tmp_path: Path
) -> None:
    weight = torch.ones(shape).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, scale[0]: torch.ones(scale[1])}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=words):
        write_scaled(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
