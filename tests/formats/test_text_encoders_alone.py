"""A text encoder in a file or folder of its own, under every name that programs give its tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdforge.artifact import Artifact
from sdforge.cli import main
from sdforge.errors import RecipeError, UsageError
from sdforge.families.naming import open_clip_names
from sdforge.formats.layout import read_layout
from sdforge.formats.tokenizer import USUAL, tokenizer_identity, usual_words
from sdforge.session import open_session
from tests.families.toys import write_family
from tests.families.workbench import take

L, H, G = "text_encoder: ViT-L", "text_encoder: ViT-H", "text_encoder_2: ViT-bigG"
LAYERS = {L: 12, H: 24, G: 32}
WIDTH = 16
SERVES = {
    L: ["Stable Diffusion 1.x", "Stable Diffusion XL"],
    H: ["Stable Diffusion 2.x", "Stable unCLIP 2.1"],
    G: ["Stable Diffusion XL"],
}


def component(size: str) -> str:
    return size.partition(":")[0]


def encoder(size: str, width: int = WIDTH, words: int = USUAL, seed: int = 1) -> dict[str, Tensor]:
    """Return a CLIP text model with its projection as transformers 4 names them, of random numbers."""
    names = open_clip_names(component(size), "", LAYERS[size], projection=True)
    shapes = {"token_embedding.weight": (words, width), "position_embedding.weight": (77, width)}
    shapes |= {"fc1.weight": (2 * width, width), "fc1.bias": (2 * width,), "fc2.weight": (width, 2 * width)}
    generator, made = torch.Generator().manual_seed(seed), {}
    for name in names:
        *_, part, kind = name.canonical.split(".")
        default = (width,) if kind == "bias" or "norm" in part else (width, width)
        shape = shapes.get(f"{part}.{kind}", default)
        made[name.canonical] = torch.randn(shape, generator=generator).half()
    return made


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 5.6 and later name them."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def open_clip(size: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenCLIP names them, queries, keys and values in one."""
    fused: dict[str, list[Tensor]] = {}
    for name in open_clip_names(component(size), "", LAYERS[size], projection=True):
        tensor = tensors[name.canonical]
        fused.setdefault(name.single, []).append(tensor.T if name.turned else tensor)
    return {name: torch.cat(parts).contiguous() for name, parts in fused.items()}


def with_rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole CLIP as transformers saves it."""
    vision = {"vision_model.encoder.layers.30.mlp.fc1.bias": torch.zeros(2), "visual_projection.weight": torch.eye(2)}
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return tensors | vision | ids | {"logit_scale": torch.ones(())}


def as_comfy_saves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Among transformers' names, the projection as OpenCLIP has it."""
    others = {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}
    return others | {"text_projection": tensors["text_projection.weight"].T.contiguous(), "logit_scale": torch.ones(())}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    saved(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **config}))
    return path


@pytest.fixture(scope="module")
def encoders() -> dict[str, dict[str, Tensor]]:
    return {size: encoder(size) for size in LAYERS}


@pytest.mark.parametrize("size", LAYERS)
def test_every_name_of_its_tensors_means_the_same(
    size: str, encoders: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors, identities = encoders[size], set()
    forms = {
        "clip": tensors,
        "bare": bare(tensors),
        "whole": with_rest(tensors),
        "open": open_clip(size, tensors),
        "comfy": as_comfy_saves(tensors),
    }
    for name, form in forms.items():
        found = take(saved(tmp_path / f"{name}.safetensors", form))
        assert (found.artifact.kind, found.artifact.family, found.artifact.facts) == ("checkpoint", "", {})
        assert set(found.artifact.components) == {component(size), "tokenizer"}
        assert found.identity("tokenizer") == tokenizer_identity(usual_words())
        identities.add(found.identity(component(size)))
    assert len(identities) == 1
    assert ("text_projection.weight" in found.tensors(component(size))) == (size == G)


@pytest.mark.parametrize("size", LAYERS)
def test_its_layers_tell_for_which_families_it_is(
    size: str, encoders: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    layout = read_layout(saved(tmp_path / "x.safetensors", encoders[size]))
    assert layout.notes["serves"] == SERVES[size]
    assert layout.notes["widths"] == {"text_2" if size == G else "text": WIDTH}
    assert ("the text model's last layer, which is never used" in layout.passed) == (size == H)


def test_a_folder_states_what_no_tensor_tells(encoders: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    second = take(folder(tmp_path / "text_encoder_2", bare(encoders[G]), num_attention_heads=2, hidden_act="gelu"))
    assert second.artifact.facts == {"text_heads_2": 2, "text_activation_2": "gelu"}
    with pytest.raises(UsageError, match="states num_attention_heads as 'many'"):
        read_layout(folder(tmp_path / "odd", encoders[L], num_attention_heads="many"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_model.encoder.layers.7.mlp.fc1.bias": None}, "without text_model.encoder.layers.7.mlp.fc1.bias"),
        ({"text_model.odd": torch.zeros(1)}, "that no text encoder here has: text_model.odd"),
        (
            {"encoder.layers.0.mlp.fc1.bias": torch.zeros(32)},
            "no text encoder here has: text_model.encoder.layers.0.mlp",
        ),
        ({"text_model.encoder.layers.40.mlp.fc1.bias": torch.zeros(1)}, "a text encoder of 41 layers"),
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(49_411, WIDTH)}, "of 49411 words, of which"),
    ],
)
def test_what_is_no_whole_encoder_of_these_is_refused(
    change: dict[str, Tensor | None], sentence: str, encoders: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (encoders[L] | change).items() if tensor is not None}
    with pytest.raises(UsageError, match=sentence):
        read_layout(saved(tmp_path / "x.safetensors", tensors))


def test_the_text_encoder_of_later_families_is_refused_by_name(tmp_path: Path) -> None:
    t5 = {"shared.weight": torch.zeros(8, 4), "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}
    with pytest.raises(UsageError, match="is the T5 text encoder of Stable Diffusion 3 and FLUX"):
        read_layout(saved(tmp_path / "t5xxl.safetensors", t5))


@pytest.fixture
def project(toys: Path, encoders: dict[str, dict[str, Tensor]], tmp_path: Path) -> Path:
    """The toys of 1.x and XL, and every encoder; `wide` has SDXL's width of the second one."""
    for name in ("sd15", "sdxl"):
        shutil.copytree(write_family(toys / name, name), tmp_path / name)
    for name, size in (("clip_l", L), ("clip_h", H), ("clip_g", G)):
        saved(tmp_path / f"{name}.safetensors", encoders[size])
    saved(tmp_path / "wide.safetensors", encoder(G, width=24) | {"text_projection.weight": torch.zeros(20, 24).half()})
    sources = [f'[source.{p.stem}]\nfrom = "{p.name}"\n' for p in tmp_path.iterdir()]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "forge.toml").write_text("".join(sources))
    return tmp_path


def planned(root: Path, recipe: str, family: str = "sd15") -> Artifact:
    (root / "recipes" / "r.toml").write_text(f'family = "{family}"\n{recipe}')
    session = open_session(root)
    session.plan(session.resolve(["r:m"]))
    found = session.planner().steps["r:m"].artifact
    assert found is not None
    return found


def refused(root: Path, recipe: str, family: str = "sd15") -> tuple[str, str]:
    with pytest.raises(RecipeError) as caught:
        planned(root, recipe, family)
    problem = caught.value.problems[0]
    return problem.message, problem.hint


def parts(found: Artifact) -> dict[str, str]:
    return {name: component.identity for name, component in found.components.items()}


def test_it_takes_the_place_of_a_checkpoint_s_own(project: Path) -> None:
    whole, alone = take(project / "sd15"), take(project / "clip_l.safetensors")
    found = planned(project, '[swap.m]\ncheckpoint = "sd15"\ntext_encoder = "clip_l"\n')
    kept = {name: whole.identity(name) for name in ("unet", "vae")}
    assert parts(found) == kept | {name: alone.identity(name) for name in ("text_encoder", "tokenizer")}
    assert found.facts == whole.artifact.facts  # nothing in the file says how many heads it has


def test_words_that_were_appended_go_with_their_encoder(project: Path) -> None:
    rows = saved(project / "word.safetensors", {"emb_params": torch.zeros(1, WIDTH)})
    with (project / "forge.toml").open("a") as file:
        file.write(f'[source.word]\nfrom = "{rows.name}"\n')
    recipe = '[insert.more]\ncheckpoint = "sd15"\nembeddings.word = {}\n'
    swapped = planned(project, f'{recipe}[swap.m]\ncheckpoint = "more"\ntext_encoder = "clip_l"\n')
    assert planned(project, recipe.replace("more", "m")).facts["tokens"] == [["word", 1]]
    assert "tokens" not in swapped.facts


@pytest.mark.parametrize(
    ("family", "recipe", "sentence"),
    [
        ("sd15", 'text_encoder = "clip_g"', "`clip_g` is a text_encoder_2, and Stable Diffusion 1.x has none"),
        ("sd15", 'text_encoder_2 = "clip_l"', "`clip_l` has no text_encoder_2"),
        ("sdxl", 'text_encoder = "clip_g"', "`clip_g` does not fit `sdxl`: its text_2 is 16 wide, the other's 24"),
        ("sdxl", 'text_encoder = "clip_l"', "its text encoders would read different words"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_plan(family: str, recipe: str, sentence: str, project: Path) -> None:
    message, _ = refused(project, f'[swap.m]\ncheckpoint = "{family}"\n{recipe}\n', family)
    assert message.startswith(sentence)


def test_both_of_sdxl_come_from_files_of_their_own(project: Path) -> None:
    recipe = '[swap.m]\ncheckpoint = "sdxl"\ntext_encoder = "clip_l"\ntext_encoder_2 = "wide"\n'
    found = planned(project, recipe, "sdxl")
    first, second = take(project / "clip_l.safetensors"), take(project / "wide.safetensors")
    assert parts(found)["text_encoder"] == first.identity("text_encoder")
    assert parts(found)["text_encoder_2"] == second.identity("text_encoder_2")
    assert parts(found)["tokenizer"] == first.identity("tokenizer")
    # and one of them again, from the other: which leaves the second one in its place
    again = f'{recipe.replace("swap.m", "swap.both")}[swap.m]\ncheckpoint = "both"\ntext_encoder = "clip_l"\n'
    assert parts(planned(project, again, "sdxl")) == parts(found)


def test_the_second_one_alone_is_taken_from_a_checkpoint(project: Path, toys: Path) -> None:
    shutil.copytree(write_family(toys / "sdxl-2", "sdxl", seed=2), project / "other")
    with (project / "forge.toml").open("a") as file:
        file.write('[source.other]\nfrom = "other"\n')
    whole, other = take(project / "sdxl"), take(project / "other")
    found = planned(project, '[swap.m]\ncheckpoint = "sdxl"\ntext_encoder_2 = "other"\n', "sdxl")
    assert parts(found) == parts(whole.artifact) | {"text_encoder_2": other.identity("text_encoder_2")}


MERGE = (
    '[weighted_sum.m]\ncheckpoints = ["whole", "clip_l"]\nweights = [1, 0]\nblocks = { text_encoder = [0.5, 0.5] }\n'
)


def test_it_is_merged_into_a_checkpoint_where_weights_leave_the_rest_out(project: Path) -> None:
    (project / "sd15" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    swap = '[swap.whole]\ncheckpoint = "sd15"\ntext_encoder = "again"\n'
    saved(project / "again.safetensors", encoder(L, seed=2))
    with (project / "forge.toml").open("a") as file:
        file.write('[source.again]\nfrom = "again.safetensors"\n')
    found, whole = planned(project, swap + MERGE), take(project / "sd15")
    assert parts(found)["unet"] == whole.identity("unet")
    assert parts(found)["text_encoder"] not in (
        take(project / name).identity("text_encoder") for name in ("again.safetensors", "clip_l.safetensors")
    )
    assert found.facts["prediction"] == "v_prediction"  # of which a text encoder knows nothing
    message, hint = refused(project, swap + MERGE.replace("weights = [1, 0]", "weights = [0.9, 0.1]"))
    assert message == "weighted_sum needs unet.conv_in.bias, which checkpoint 2 does not have"
    assert "weights that leave it out there need none" in hint


def test_a_checkpoint_is_put_together_from_networks_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ComfyUI's users have them: a U-Net, a VAE and a text encoder, each a file."""
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        shutil.copy(project / "sd15" / part / f"{stem}.safetensors", project / f"{part}.safetensors")
    (project / "forge.toml").write_text(
        "".join(f'[source.{name}]\nfrom = "{name}.safetensors"\n' for name in ("unet", "vae", "clip_l"))
    )
    (project / "recipes" / "r.toml").write_text(
        'family = "sd15"\n[swap.whole]\ncheckpoint = "unet"\nvae = "vae"\ntext_encoder = "clip_l"\n'
        '[preset]\ncheckpoint = "whole"\nexport = ["checkpoint", "diffusers"]\n'
    )
    monkeypatch.chdir(project)
    assert main(["build", "r"]) == 0
    single, alone = take(project / "out" / "r" / "r.safetensors"), take(project / "clip_l.safetensors")
    whole = take(project / "sd15")
    assert {name: single.identity(name) for name in ("unet", "vae")} == {
        name: whole.identity(name) for name in ("unet", "vae")
    }
    assert single.identity("text_encoder") == alone.identity("text_encoder")
    assert take(project / "out" / "r" / "diffusers").identity("text_encoder") == alone.identity("text_encoder")
    capsys.readouterr()
    assert main(["show", "clip_l.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "serves   Stable Diffusion 1.x, Stable Diffusion XL" in said


def test_a_folder_with_words_of_its_own_is_refused_with_the_way_out(toys: Path) -> None:
    with pytest.raises(UsageError, match="of which only CLIP's 49408 are known") as caught:
        read_layout(write_family(toys / "sd15", "sd15") / "text_encoder")
    assert caught.value.hint == "name the whole checkpoint: `swap` takes its text encoder with its tokenizer"
