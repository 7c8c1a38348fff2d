"""Every form of an export, as the programs read it for which it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdforge.edits.export import FORMS, Form, run
from sdforge.families.sd15 import FAMILY
from sdforge.formats.layout import read_layout
from sdforge.order import Given, Order, Outcome
from tests.families.workbench import Taken, keep

SETTINGS: dict[str, Any] = {
    "forms": [],
    "title": "Toy",
    "description": "",
    "licence": "CC0-1.0",
    "trigger": [],
    "negative_prompt": "",
    "clip_skip": 0,
}
Export = Callable[..., Outcome]


@pytest.fixture
def export(tmp_path: Path, toy: Taken) -> Export:
    """Write some forms of a preset with other artifacts behind it (role → givens)."""

    def write(*forms: str, work: str = "work", trigger: Sequence[str] = (), **roles: list[Given]) -> Outcome:
        (tmp_path / work).mkdir()
        inputs = {"checkpoint": [toy.given()], **roles}
        settings = SETTINGS | {"forms": list(forms), "trigger": list(trigger)}
        return run(Order("", "", "export", "edits", "sd15", settings, str(tmp_path / work), inputs), lambda **_: None)

    return write


@pytest.fixture(scope="module")
def word(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """A word and its opposite."""
    rows = {"embedding": {"text_encoder": torch.ones(2, 16)}, "negative": {"text_encoder": -torch.ones(3, 16)}}
    facts = {"token": "<ink>", "negative": "<ink-neg>", "guidance": 3.0}
    return keep(tmp_path_factory.mktemp("word"), rows, kind="embedding", facts=facts)


@pytest.fixture(scope="module")
def sdxl_word(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    rows = {"embedding": {"text_encoder": torch.ones(2, 16), "text_encoder_2": torch.zeros(2, 24)}}
    return keep(tmp_path_factory.mktemp("sdxl"), rows, kind="embedding", facts={"token": "<big>"})


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_every_form_is_known_and_written() -> None:
    assert set(FORMS) == set(Form.__args__)  # type: ignore[attr-defined]


def test_a_word_and_its_opposite_are_two_files(export: Export, word: Taken, tmp_path: Path) -> None:
    made = export("embeddings", embeddings=[word.given()])
    name = f"embeddings/{word.artifact.digest[:16]}"
    assert set(made.files) == {f"{name}.safetensors", f"{name}-neg.safetensors"}
    assert metadata(tmp_path / "work" / f"{name}-neg.safetensors") == {
        "sdforge.token": "<ink-neg>",
        "sdforge.polarity": "negative",
        "sdforge.guidance": "3",
    }
    (negative,) = load_file(tmp_path / "work" / f"{name}-neg.safetensors").values()
    assert torch.equal(negative, -torch.ones(3, 16))


def test_diffusers_calls_the_tensor_as_the_word(export: Export, word: Taken, tmp_path: Path) -> None:
    export("embeddings-diffusers", embeddings=[word.given()])
    path = tmp_path / "work" / f"embeddings/{word.artifact.digest[:16]}.diffusers.safetensors"
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {"<ink>": (2, 16)}
    stated = metadata(path)
    assert stated["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert (stated["modelspec.trigger_phrase"], stated["modelspec.license"]) == ("<ink>", "CC0-1.0")
    assert read_layout(path).facts["token"] == "<ink>"


def test_a_file_states_its_own_words_and_else_those_that_no_other_has(
    export: Export, word: Taken, tmp_path: Path
) -> None:
    """The preset's words are those of all that is in it."""
    first, second = (
        keep(tmp_path / name, {"image_embedding": {"vector": torch.full((8,), i)}}, kind="image_embedding")
        for i, name in enumerate(["first", "second"], 1)
    )
    of_first = first.given(trigger=["glowing", "dim"])
    export(
        "image-embeddings",
        trigger=["<ink>", "glowing", "bold"],
        image_embeddings=[of_first, second.given()],
        embeddings=[word.given()],
    )
    stated = [
        metadata(tmp_path / "work" / f"image_embeddings/{taken.artifact.digest[:16]}.safetensors")
        for taken in (first, second)
    ]
    assert [told["modelspec.trigger_phrase"] for told in stated] == ["glowing, dim", "bold"]


def test_of_two_text_encoders_each_gets_a_file_for_diffusers_and_others_one(
    export: Export, sdxl_word: Taken, tmp_path: Path
) -> None:
    made = export("embeddings", "embeddings-diffusers", embeddings=[sdxl_word.given()])
    name = f"embeddings/{sdxl_word.artifact.digest[:16]}"
    assert set(made.files) == {f"{name}{end}.safetensors" for end in ("", ".diffusers", ".diffusers_2")}
    both = load_file(tmp_path / "work" / f"{name}.safetensors")
    assert {key: tuple(t.shape) for key, t in both.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    assert load_file(tmp_path / "work" / f"{name}.diffusers_2.safetensors")["<big>"].shape == (2, 24)


def test_a1111_reads_the_pickle_as_its_own(export: Export, word: Taken, tmp_path: Path) -> None:
    export("embeddings-pt", embeddings=[word.given()])
    found = torch.load(tmp_path / "work" / f"embeddings/{word.artifact.digest[:16]}.pt", weights_only=True)
    assert list(found) == ["string_to_token", "string_to_param", "name", "step", "sd_checkpoint", "sd_checkpoint_name"]
    assert (found["string_to_token"], found["name"]) == ({"*": 265}, "<ink>")
    assert torch.equal(found["string_to_param"]["*"], torch.ones(2, 16))


def test_every_word_of_custom_diffusion_is_an_embedding_too(export: Export, toy: Taken, tmp_path: Path) -> None:
    """Two concepts in one, as `custom_merge` makes them: the first word's file has no number."""
    matrix = {f"unet.{name}": toy.tensors("unet")[name] for name in FAMILY.cross_attention[:1]}
    rows = {"text_encoder": torch.ones(2, 16), "text_encoder.1": torch.zeros(1, 16)}
    facts = {"token": "<a>", "further": ["<b>"]}
    both = keep(tmp_path / "both", {"custom": matrix, "embedding": rows}, kind="custom", facts=facts)
    made = export("custom-embeddings", custom=[both.given()])
    name = f"custom/{both.artifact.digest[:16]}"
    assert list(made.files) == [f"{name}.safetensors", f"{name}.1.safetensors"]
    layouts = [read_layout(tmp_path / "work" / file) for file in made.files]
    assert [(layout.kind, layout.facts) for layout in layouts] == [
        ("embedding", {"token": "<a>"}),
        ("embedding", {"token": "<b>"}),
    ]
    assert [tuple(t.shape) for file in made.files for t in load_file(tmp_path / "work" / file).values()] == [
        (2, 16),
        (1, 16),
    ]


def test_sidecars_are_written_whatever_forms_are_named(export: Export, tmp_path: Path) -> None:
    tensors = {"null_text": {"uncond": torch.ones(2, 3, 16), "start": torch.zeros(1, 4, 8, 8)}}
    facts = {"prompt": "a cat", "guidance": 7.5, "steps": 2, "resolution": 64, "spacing": "leading"}
    cat = keep(tmp_path / "cat", tensors, kind="null_text", facts=facts)
    made = export(sidecars=[cat.given()])
    (name,) = made.files
    assert name == f"sidecars/{cat.artifact.digest[:16]}.safetensors"
    layout = read_layout(tmp_path / "work" / name)
    assert (layout.kind, layout.family, layout.facts) == ("null_text", "sd15", facts)
    assert metadata(tmp_path / "work" / name)["modelspec.license"] == "CC0-1.0"


def test_equal_presets_are_equal_files(export: Export, word: Taken) -> None:
    forms = [form for form in FORMS if form not in ("checkpoint", "diffusers")]
    first, second = (export(*forms, work=work, embeddings=[word.given()]) for work in ("one", "two"))
    assert first.files == second.files
