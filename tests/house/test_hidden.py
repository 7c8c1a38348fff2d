"""What is quoted of files and addresses: secrets have stars, and all else stays as it is."""

from __future__ import annotations

import json

import pytest

from sdforge.cli import complain, unforeseen
from sdforge.errors import Place, Problem, ResourceError
from sdforge.hidden import hidden
from sdforge.report.problems import show_problems
from sdforge.report.words import say

SECRET = "s3cr3t-Value_0123456789"
HOLDING = (
    f'from = "https://me:{SECRET}@example.org/x?a=1"',
    f'from = "https://{SECRET}@example.org/x"',
    f'address = "s3://key:{SECRET}@bucket/folder"',
    f'from = "https://example.org/x.safetensors?a=1&token={SECRET}&b=2"',
    f'from = "https://example.org/x?X-Amz-Signature={SECRET}"',
    f'password = "{SECRET}"',
    f"api_key = {SECRET}",
    f'token = "{SECRET}"',
    "here is hf_0123456789abcdefghij to use",
)
HARMLESS = (
    'token = "<mascot>"',
    'from = "hf://org/repo@refs/pr/1/x.safetensors"',
    'address = "abfs://container@account.dfs.core.windows.net/folder"',
    "a drawing of <mascot>, hair: blue; https://example.org/x?width=3#token",
    "write to me@example.org // or not",
)


@pytest.mark.parametrize("text", HOLDING)
def test_a_secret_has_stars_and_the_caret_its_place(text: str) -> None:
    shown = hidden(text)
    assert SECRET not in shown
    assert "0123456789" not in shown
    assert "***" in shown
    assert len(shown) == len(text)
    assert shown.split()[0] == text.split()[0]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_none_is_shown_as_it_is(text: str) -> None:
    assert hidden(text) == text


@pytest.mark.parametrize("as_json", [True, False])
def test_errors_and_problems_hide_it(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    complain(ResourceError(f"no {HOLDING[0]} here", hint=HOLDING[3]), as_json=as_json)
    place = Place("forge.toml", 3, 8, 20, HOLDING[0])
    show_problems([Problem("source", f"it: {HOLDING[1]}", place, HOLDING[2])], as_json=as_json)
    said = "".join(capsys.readouterr())
    assert SECRET not in said
    if as_json:
        (row,) = json.loads(said.splitlines()[-1])["problems"]
        assert (row["place"]["column"], row["place"]["line"]) == (8, 3)


def test_whatever_else_is_printed_hides_it(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"  toy:a: {HOLDING[0]}")
    assert SECRET not in capsys.readouterr().out


def test_what_is_kept_of_a_mistake_of_ours_hides_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("unforeseen")
    try:
        raise KeyError(HOLDING[0])
    except KeyError as error:
        said = unforeseen(error, root)
    assert SECRET not in said.message
    kept = (root / ".forge/log/unforeseen.txt").read_text()
    assert SECRET not in kept
    assert "KeyError" in kept
