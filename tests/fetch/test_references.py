"""What a source's `from` may be."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdforge.errors import UsageError
from sdforge.references import Civitai, Hub, Reference, Url, is_folder, is_remote, parse

FORMS: list[tuple[str, Reference]] = [
    ("hf://a/b", Hub("a/b")),
    ("hf://a/b@v1.0", Hub("a/b", "v1.0")),
    ("hf://a/b/x.safetensors", Hub("a/b", "main", "x.safetensors")),
    ("hf://a/b@refs/pr/1/vae/x.safetensors", Hub("a/b", "refs/pr/1", "vae/x.safetensors")),
    ("https://huggingface.co/a/b/blob/main/x.safetensors", Hub("a/b", "main", "x.safetensors")),
    ("https://huggingface.co/a/b/resolve/v2/vae/x.safetensors?download=true", Hub("a/b", "v2", "vae/x.safetensors")),
    ("https://huggingface.co/a/b/raw/main/My%20Model.safetensors", Hub("a/b", "main", "My Model.safetensors")),
    ("https://huggingface.co/a/b/blob/refs%2Fpr%2F1/x.safetensors", Hub("a/b", "refs/pr/1", "x.safetensors")),
    ("https://huggingface.co/a/b", Hub("a/b")),
    ("https://huggingface.co/a/b/tree/v2", Hub("a/b", "v2")),
    (
        "https://huggingface.co/datasets/a/b/resolve/main/x.safetensors",
        Url("https://huggingface.co/datasets/a/b/resolve/main/x.safetensors"),
    ),
    ("civitai.com/models/833294", Civitai(833294)),
    ("https://civitai.com/models/833294/noob?modelVersionId=1190596", Civitai(833294, 1190596)),
    ("https://civitai.com/api/download/models/1190596?type=Model", Civitai(0, 1190596)),
    ("urn:air:sdxl:checkpoint:civitai:833294@1190596", Civitai(833294, 1190596)),
    ("air:sd1:lora:civitai:12@34+56.safetensors", Civitai(12, 34, 56)),
    ("urn:air:sd1:checkpoint:huggingface:org/repo@main", Hub("org/repo", "main")),
    ("https://example.org/a%20b.safetensors", Url("https://example.org/a%20b.safetensors")),
]

REFUSED = [
    "hf://a",
    "hf://a/b/../c",
    "hf://a/b@",
    "https://huggingface.co/a/b/tree/main/vae",
    "https://huggingface.co/a/b/blob/main/%2e%2e/x.safetensors",
    "https://huggingface.co/a/b/commit/0123",
    "http://example.org/x.safetensors",
    "https://user:secret@example.org/x",
    "https:///x",
    "civitai.com/images/1",
    "https://civitai.com/models/7?modelVersionId=x",
    "urn:air:sdxl:checkpoint:elsewhere:1@2",
    "urn:air:sdxl:checkpoint:civitai:one@2",
]


@pytest.mark.parametrize(("text", "reference"), FORMS)
def test_each_form_is_read(text: str, reference: Reference) -> None:
    assert is_remote(text)
    assert parse(text) == reference


@pytest.mark.parametrize("text", REFUSED)
def test_what_names_no_file_elsewhere_is_refused_with_a_form_that_does(text: str) -> None:
    assert is_remote(text)
    with pytest.raises(UsageError) as said:
        parse(text)
    assert said.value.hint


def test_a_repository_without_a_file_is_a_folder() -> None:
    assert is_folder(parse("hf://a/b"))
    assert not is_folder(parse("hf://a/b/c.safetensors"))
    assert not is_folder(parse("civitai.com/models/1"))


@pytest.mark.parametrize("text", ["bases/flat.safetensors", "hf.safetensors", "aircraft/x.safetensors", "https"])
def test_a_path_is_a_path(text: str) -> None:
    assert not is_remote(text)


@settings(max_examples=50)
@given(st.sampled_from(["hf://", "https://", "civitai.com/", "urn:air:"]), st.text(max_size=40))
def test_any_text_is_a_reference_or_a_mistake(start: str, rest: str) -> None:
    with suppress(UsageError):
        parse(start + rest)
