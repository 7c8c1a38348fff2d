"""Names never change: committed vectors of what is hashed, and of what comes out."""

from __future__ import annotations

import struct
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdforge.artifact import Artifact, Component, artifact_identity, dataset_identity
from sdforge.formats.tokenizer import tokenizer_identity
from sdforge.identity import H, canonical, component_identity, decimal, number, tensor_identity

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | FLOATS
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


def test_a_value_is_hashed_as_its_kind_and_its_canonical_json(vectors: dict[str, Any]) -> None:
    for row in vectors["hashes"]:
        assert canonical(row["value"]) == row["text"]
        assert H(row["kind"], row["value"]) == row["name"]


def test_two_kinds_never_share_a_name() -> None:
    assert H("action", {}) != H("dataset", {})


def test_canonical_json_is_that_of_the_rfc(vectors: dict[str, Any]) -> None:
    for row in vectors["canonical"]:
        assert canonical(row["value"]) == row["text"]


def test_numbers_are_written_as_the_rfc_does(vectors: dict[str, Any]) -> None:
    for bits, text in vectors["numbers"].items():
        (value,) = struct.unpack(">d", bytes.fromhex(bits))
        assert number(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2**53 + 1, -(2**53) - 1])
def test_what_json_cannot_carry_exactly_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="written"):
        canonical(value)


def test_a_value_that_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes is no JSON value"):
        canonical(b"")  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(FLOATS)
def test_a_number_comes_back_as_it_was(value: float) -> None:
    assert float(number(value)) == value


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON)
def test_canonical_json_reads_back_as_the_value(value: Any) -> None:
    import json

    assert json.loads(canonical(value), parse_int=float) == value


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9), max_size=6))
def test_the_order_of_a_table_does_not_matter(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical(dict(value)) == canonical(dict(turned))


def test_weights_are_summed_as_they_were_written() -> None:
    assert sum(map(decimal, (0.6, 0.3, 0.1))) == 1
    assert decimal(0.1) == Decimal("0.1")


def test_a_tensor_is_named_by_dtype_shape_and_bytes(vectors: dict[str, Any]) -> None:
    for row in vectors["tensors"]:
        assert tensor_identity(row["dtype"], row["shape"], row["sha256"]) == row["name"]
    assert len({row["name"] for row in vectors["tensors"]}) == len(vectors["tensors"])


def test_a_tensors_name_is_the_hash_of_plain_json() -> None:
    value = {"dtype": "F16", "shape": [4, 8], "sha256": "0" * 64}
    assert tensor_identity("F16", (4, 8), "0" * 64) == H("tensor", value)  # type: ignore[arg-type]


def test_a_component_is_named_by_its_tensors_in_any_order(vectors: dict[str, Any]) -> None:
    rows = [(name, identity) for name, identity in vectors["component"]["tensors"]]
    assert component_identity(rows) == component_identity(reversed(rows)) == vectors["component"]["name"]


def test_a_component_depends_on_the_tensors_names() -> None:
    assert component_identity([("a", "1" * 64)]) != component_identity([("b", "1" * 64)])


def test_a_checkpoint_is_named_by_components_and_facts(vectors: dict[str, Any]) -> None:
    row = vectors["checkpoint"]
    assert artifact_identity("checkpoint", row["components"], row["facts"]) == row["name"]
    assert artifact_identity("checkpoint", row["components"], {}) == row["without_facts"]


def test_notes_enter_no_name() -> None:
    components = {"unet": Component("1" * 64, "1" * 64, "", "F16")}
    noted = Artifact("checkpoint", "sd15", components, {}, {"licence": "CC0-1.0", "title": "x", "trigger": ["y"]})
    assert noted.identity == Artifact("checkpoint", "sd15", components).identity


def test_an_artifact_has_no_digest_while_some_bytes_are_unseen() -> None:
    half = Artifact(
        "checkpoint", "sd15", {"a": Component("1" * 64, "2" * 64, "", ""), "b": Component("3" * 64, "", "", "")}
    )
    assert half.digest == ""
    assert half.by_content() is None
    assert half.identity


def test_a_data_set_is_named_by_its_pictures_in_any_order(vectors: dict[str, Any]) -> None:
    row = vectors["dataset"]
    turned = list(reversed(row["pictures"]))
    assert dataset_identity(row["pictures"], row["validation"]) == row["name"]
    assert dataset_identity(turned, row["validation"]) == row["name"]


@pytest.mark.parametrize("changed", [["b" * 64, "other", 1], ["b" * 64, "a <x>", 2], ["c" * 64, "a <x>", 1]])
def test_caption_repeats_and_pixels_are_another_data_set(vectors: dict[str, Any], changed: list[Any]) -> None:
    row = vectors["dataset"]
    assert dataset_identity([changed, row["pictures"][1]], row["validation"]) != row["name"]


def test_the_number_held_out_is_another_data_set(vectors: dict[str, Any]) -> None:
    row = vectors["dataset"]
    assert dataset_identity(row["pictures"], row["validation"] + 1) != row["name"]


def test_a_picture_twice_is_not_a_picture_once(vectors: dict[str, Any]) -> None:
    row = vectors["dataset"]
    assert dataset_identity([*row["pictures"], row["pictures"][0]], row["validation"]) != row["name"]


def test_a_vocabulary_is_named_by_words_and_merges(vectors: dict[str, Any]) -> None:
    assert tokenizer_identity(vectors["tokenizer"]["value"]) == vectors["tokenizer"]["name"]
