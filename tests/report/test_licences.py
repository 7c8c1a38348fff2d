"""What licences ask together, and where a preset's own one gives away what an input's keeps."""

from __future__ import annotations

import pytest

from sdforge.licences import KNOWN, TERMS, combined, conflicts, licence


@pytest.mark.parametrize("name", ["cc-by-nc-4.0", "CC-BY-NC-4.0", "CC BY-NC 4.0", "cc_by_nc_4.0"])
def test_a_licence_is_known_however_it_is_written(name: str) -> None:
    found = licence(name)
    assert found is not None
    assert found.title == "CC-BY-NC-4.0"


@pytest.mark.parametrize("name", ["gpl-3.0", "GPL-3.0-only", "GPL-3.0-or-later"])
def test_the_gpl_is_known_as_spdx_calls_it(name: str) -> None:
    found = licence(name)
    assert found is not None
    assert (found.title, "alike" in found.terms) == ("GPL-3.0", True)


def test_plus_signs_tell_licences_apart() -> None:
    assert licence("openrail") != licence("openrail++")


def test_every_licence_has_terms_that_are_explained() -> None:
    assert {term for each in KNOWN.values() for term in each.terms} == set(TERMS)


@pytest.mark.parametrize(
    ("own", "theirs", "says"),
    [
        ("CC0-1.0", "cc-by-nc-4.0", "forbids commercial use"),
        ("creativeml-openrail-m", "NoobAI", "forbids commercial use"),
        ("CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "stays under that licence"),
        ("MIT", "creativeml-openrail-m", "restrictions of use"),
        ("CC0-1.0", "apache-2.0", "authors are to be named"),
        ("CC-BY-ND-4.0", "cc-by-nd-4.0", "nothing made from it"),
    ],
)
def test_what_an_input_asks_and_the_preset_does_not_keep_is_a_conflict(own: str, theirs: str, says: str) -> None:
    (reason,) = conflicts(own, {"ink": theirs})
    assert reason.startswith(f"`ink` is under {licence(theirs).title}: ")  # type: ignore[union-attr]
    assert says in reason


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("creativeml-openrail-m", "openrail++"),
        ("NoobAI", "noobai"),
        ("Apache-2.0", "cc0-1.0"),
        ("", "cc-by-nc-4.0"),
        ("CC0-1.0", "a licence of our own"),
        ("mine alone", "cc-by-nc-4.0"),
    ],
)
def test_what_is_kept_or_not_known_is_none(own: str, theirs: str) -> None:
    assert list(conflicts(own, {"ink": theirs})) == []


def test_licences_together_ask_for_all_that_any_of_them_asks() -> None:
    found = combined(["noobai", "cc-by-4.0", "unheard of"])
    assert found == [TERMS["private"], TERMS["alike"], TERMS["uses"], TERMS["credit"]]
