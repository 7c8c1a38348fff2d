"""Embedding files of every program that writes safetensors, and ours in stock diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.embedding import read_named
from sdforge.formats.layout import read_layout
from sdforge.formats.safetensors import read_header
from tests.families.workbench import Taken, keep, same_bytes, take
from tests.formats.conftest import export

ROWS = torch.arange(48, dtype=torch.float32).reshape(3, 16) / 7


def kept_rows(work: Path, rows: Tensor = ROWS, **facts: Any) -> Taken:
    return keep(work, {"embedding": {"text_encoder": rows}}, kind="embedding", facts={"token": "<toy>", **facts})


def exported_rows(work: Path, toy: Taken, kept: Taken) -> Path:
    export(work / "out", toy, ["embeddings"], {}, embeddings=[kept.given()])
    (path,) = (work / "out" / "embeddings").iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_export_and_reading_give_the_same_embedding(dtype: torch.dtype, toy: Taken, tmp_path: Path) -> None:
    kept = kept_rows(tmp_path / "kept", ROWS.to(dtype), polarity="negative")
    taken = take(exported_rows(tmp_path, toy, kept))
    assert taken.artifact.digest == kept.artifact.digest
    assert taken.artifact.facts == {"token": "<toy>", "polarity": "negative"}
    assert same_bytes(taken.tensors("embedding")["text_encoder"], ROWS.to(dtype))


def test_an_embedding_is_written_as_a1111_and_comfy_read_it(toy: Taken, tmp_path: Path) -> None:
    path = exported_rows(tmp_path, toy, kept_rows(tmp_path / "kept"))
    assert list(load_file(path)) == ["emb_params"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"sdforge.token": "<toy>"}


@pytest.mark.parametrize(
    ("tensors", "token"),
    [
        ({"<cat-toy>": ROWS}, "<cat-toy>"),
        ({"<cat-toy>": ROWS[0]}, "<cat-toy>"),
        ({"emb_params": ROWS}, "style"),
        ({"emp_params": ROWS}, "style"),  # OneTrainer's spelling
        ({"clip_l": ROWS}, "style"),
        ({"": ROWS}, "style"),  # no prompt holds a word of nothing, and every prompt does
        ({" cat toy ": ROWS}, "cat toy"),
    ],
)
def test_the_token_is_the_files_own_or_its_name(tensors: dict[str, Tensor], token: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "style.safetensors")
    taken = take(tmp_path / "style.safetensors")
    assert taken.artifact.facts == {"token": token}
    (rows,) = tensors.values()
    assert torch.equal(taken.tensors("embedding")["text_encoder"], rows.reshape(-1, 16))


def test_an_embedding_for_two_encoders_has_rows_for_both(tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "x.safetensors")
    layout = read_layout(tmp_path / "x.safetensors")
    assert layout.shapes() == {"embedding": {"text_encoder": (2, 768), "text_encoder_2": (2, 1280)}}


@pytest.mark.parametrize(
    ("widths", "family"),
    [({"emb_params": 768}, "sd15"), ({"<x>": 1024}, "sd2"), ({"clip_l": 768, "clip_g": 1280}, "sdxl"), ({"a": 16}, "")],
)
def test_widths_tell_for_which_family_rows_are(widths: dict[str, int], family: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, width) for name, width in widths.items()}, tmp_path / "x.safetensors")
    assert read_layout(tmp_path / "x.safetensors").family == family


def test_diffusers_two_files_of_one_word_are_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "word"
    folder.mkdir()
    save_file({"<x>": torch.ones(2, 768)}, folder / "learned_embeds.safetensors")
    save_file({"<x>": torch.ones(2, 1280)}, folder / "learned_embeds_2.safetensors")
    layout = read_layout(folder)
    assert (layout.family, layout.facts, layout.notes["vectors"]) == ("sdxl", {"token": "<x>"}, 2)
    assert layout.shapes() == {"embedding": {"text_encoder": (2, 768), "text_encoder_2": (2, 1280)}}
    save_file({"<y>": torch.ones(2, 1280)}, folder / "learned_embeds_2.safetensors")
    with pytest.raises(UsageError, match="different words"):
        read_layout(folder)


@pytest.mark.parametrize(
    ("bundle", "name", "encoders"),
    [
        ({"bundle_emb.foo.string_to_param.*": ROWS}, "foo", {"text_encoder": (3, 16)}),
        ({"bundle_emb.foo.emb_params": ROWS}, "foo", {"text_encoder": (3, 16)}),
        ({"bundle_emb.foo.<foo>": ROWS}, "foo", {"text_encoder": (3, 16)}),
        ({"bundle_emb.a.b.emb_params": ROWS[0]}, "a.b", {"text_encoder": (1, 16)}),
        (
            {"bundle_emb.foo.clip_l": ROWS, "bundle_emb.foo.clip_g": torch.ones(3, 20)},
            "foo",
            {"text_encoder": (3, 16), "text_encoder_2": (3, 20)},
        ),
        ({"<first>": ROWS, "<second>": ROWS[:2].clone()}, "<second>", {"text_encoder": (2, 16)}),
    ],
)
def test_one_of_several_embeddings_is_taken_by_its_name(
    bundle: dict[str, Tensor], name: str, encoders: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    save_file(bundle | {"lora_unet_x.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    layout = read_named(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors"), name)
    assert layout.facts == {"token": name}
    assert layout.shapes() == {"embedding": encoders}


def test_words_without_brackets_are_taken_by_their_names_too(tmp_path: Path) -> None:
    save_file({"ink": ROWS, "chalk": ROWS[:2].clone()}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="holds the embeddings of 2 words") as error:
        read_layout(tmp_path / "x.safetensors")
    assert error.value.hint.startswith('embedding = "chalk" beside `from`')
    layout = read_named(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors"), "ink")
    assert (layout.facts, layout.notes["vectors"]) == ({"token": "ink"}, 3)


def test_a_word_that_nobody_can_write_is_refused(tmp_path: Path) -> None:
    save_file({"emb_params": ROWS}, tmp_path / "two\nlines.safetensors")
    with pytest.raises(UsageError, match="which no prompt can hold"):
        read_layout(tmp_path / "two\nlines.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(3, 1280)}, "another number of vectors"),
        ({"emb_params": torch.ones(2, 3, 4)}, "is no embedding"),
        ({"emb_params": torch.ones(0, 768)}, "a word without a vector"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280), "t5": torch.ones(2, 4096)}, "3 or FLUX"),
        ({"clip_l": torch.ones(2, 768), "t5xxl": torch.ones(2, 4096)}, "Stable Diffusion 3 or FLUX"),
        ({"emp_params": torch.ones(2, 768), "emp_params_out": torch.ones(2, 768)}, "behind the text encoder"),
        ({"clip_l": torch.ones(1, 768), "clip_l_out": torch.ones(1, 768)}, "behind the text encoder"),
        ({"IN01": torch.ones(1, 768), "MID": torch.ones(1, 768)}, "a word for every layer"),
        ({"<a>": torch.ones(2, 768), "<b>": torch.ones(3, 768)}, "of 2 words: '<a>', '<b>'"),
        ({"a": torch.ones(768), "b": torch.ones(3, 768)}, "of 2 words: 'a', 'b'"),
        ({"net.weight": torch.ones(8, 8), "net.bias": torch.ones(8)}, "of no kind"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=words):
        read_layout(tmp_path / "x.safetensors")


def test_stock_diffusers_loads_our_embedding(toy: Taken, tmp_path: Path) -> None:
    folder = export(tmp_path / "base", toy, ["diffusers"], {}) / "diffusers"
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.load_textual_inversion(str(exported_rows(tmp_path, toy, kept_rows(tmp_path / "kept"))), token="<toy>")
    prompt = pipeline.maybe_convert_prompt("a <toy> cat", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, add_special_tokens=False).input_ids
    size = len(toy.vocabulary["vocab"])
    assert ids[1:4] == [size, size + 1, size + 2]
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[size : size + 3], ROWS)


def test_a_word_with_its_opposite_becomes_two_files(toy: Taken, tmp_path: Path) -> None:
    parts = {"embedding": {"text_encoder": ROWS}, "negative": {"text_encoder": ROWS[:2] + 1}}
    facts = {"token": "<ink>", "negative": "<ink-neg>", "guidance": 3.0}
    kept = keep(tmp_path / "ink", parts, kind="embedding", facts=facts)
    export(tmp_path / "out", toy, ["embeddings"], {}, embeddings=[kept.given()])
    name = kept.artifact.digest[:16]
    positive, negative = (tmp_path / "out" / "embeddings" / f"{name}{end}.safetensors" for end in ("", "-neg"))
    assert take(positive).artifact.facts == {"token": "<ink>"}
    assert take(negative).artifact.facts == {"token": "<ink-neg>", "polarity": "negative"}
    assert same_bytes(take(negative).tensors("embedding")["text_encoder"], (ROWS[:2] + 1).clone())
    with safe_open(negative, "pt") as file:
        assert file.metadata()["sdforge.guidance"] == "3"
