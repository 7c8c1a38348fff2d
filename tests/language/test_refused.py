"""What a person reads when a recipe is wrong: `refused.txt` holds recipes, exit codes and every word that is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.language.conftest import Said

CASES = {
    name: rest
    for block in (Path(__file__).parent / "refused.txt").read_text(encoding="utf-8").split("=== ")[1:]
    for name, _, rest in [block.partition("\n")]
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_said_with_place_line_caret_and_way_out(name: str, check: Callable[[str], Said]) -> None:
    recipe, _, rest = CASES[name].partition("--- ")
    code, _, words = rest.partition("\n")
    said = check(recipe)
    assert said.err == words
    assert (said.code, said.out) == (int(code), "")


def test_programs_get_the_same_mistakes_as_json(root: Path, check: Callable[[str], Said]) -> None:
    from sdforge.cli import main

    check('family = "sd15"\n[cast.x]\ncheckpoint = "flatt"\ndtype = "fp16"\n')
    assert main(["-C", str(root), "check", "r", "--json"]) == 2


def test_a_mistake_as_json_has_place_and_hint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdforge.cli import main

    (root / "recipes" / "r.toml").write_text('family = "sd15"\n[cast.x]\ncheckpoint = "flatt"\ndtype = "fp16"\n')
    main(["-C", str(root), "check", "--json"])
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["place"] == {
        "file": "recipes/r.toml",
        "line": 3,
        "column": 14,
        "length": 7,
        "text": 'checkpoint = "flatt"',
    }
    assert (problem["code"], problem["hint"]) == ("unknown-name", "did you mean `flat`?")


def test_mistakes_of_several_recipes_are_said_together(root: Path, forge: Callable[..., Said]) -> None:
    for name in ("one", "two"):
        (root / "recipes" / f"{name}.toml").write_text('family = "sd16"\n')
    said = forge("check")
    assert [line.partition(" ")[0] for line in said.err.splitlines() if "error[" in line] == [
        "recipes/one.toml:1:10:",
        "recipes/two.toml:1:10:",
    ]
    assert said.err.endswith("2 errors\n")


def test_mistakes_of_a_recipe_that_is_taken_from_are_said_at_their_place(
    root: Path, check: Callable[[str], Said]
) -> None:
    (root / "recipes" / "base.toml").write_text('family = "sd15"\n[cast.soft]\ncheckpoint = "flat"\ndtype = "f16"\n')
    said = check('family = "sd15"\n[cast.x]\ncheckpoint = "base:soft"\ndtype = "fp16"\n')
    assert said.err.startswith("recipes/base.toml:4:9: error[setting]: `dtype` is one of")
    assert said.err.endswith("1 error\n")


def test_a_target_that_another_recipe_does_not_have_is_guessed_at(root: Path, check: Callable[[str], Said]) -> None:
    (root / "recipes" / "base.toml").write_text('family = "sd15"\n[cast.soft]\ncheckpoint = "flat"\ndtype = "fp16"\n')
    said = check('family = "sd15"\n[cast.x]\ncheckpoint = "base:sofd"\ndtype = "fp16"\n')
    assert "recipe `base` has no target `sofd`" in said.err
    assert "did you mean `base:soft`?" in said.err


def test_a_circle_through_two_recipes_is_named(root: Path, check: Callable[[str], Said]) -> None:
    (root / "recipes" / "base.toml").write_text('family = "sd15"\n[cast.soft]\ncheckpoint = "r:x"\ndtype = "fp16"\n')
    said = check('family = "sd15"\n[cast.x]\ncheckpoint = "base:soft"\ndtype = "fp16"\n')
    assert said.code == 2
    assert "base:soft → r:x → base:soft" in said.err


def test_a_long_chain_of_targets_is_no_circle_and_no_recursion(check: Callable[[str], Said]) -> None:
    chain = "".join(f'[swap.t{i}]\ncheckpoint = "t{i + 1}"\n' for i in range(2000))
    said = check(f'family = "sd15"\n{chain}[swap.t2000]\ncheckpoint = "t0"\n')
    assert said.code == 2
    assert "error[cycle]" in said.err


def test_a_line_that_is_very_long_is_cut(check: Callable[[str], Said]) -> None:
    said = check('family = "sd16" #' + "x" * 1000 + "\n")
    assert max(map(len, said.err.splitlines())) < 200


def test_of_a_long_line_the_part_around_the_mistake_is_shown(check: Callable[[str], Said]) -> None:
    glow = '[source.glow]\nfrom = "glow.safetensors"\n'
    line = "loras.glow = {" + " " * 500 + "strenght = 1 }\n"
    said = check(f'family = "sd15"\n[bake.x]\ncheckpoint = "flat"\n{line}{glow}')
    _, line, caret, _ = said.err.splitlines()
    assert line.startswith("  4 | …")
    assert line[caret.index("^") :].startswith("strenght")


def test_control_characters_of_a_recipe_reach_no_terminal(check: Callable[[str], Said]) -> None:
    said = check('family = "sd15\u009b31m"\n')
    assert "\u009b" not in said.err
    assert said.code == 2


def test_a_wrong_setting_does_not_hide_a_wrong_name(check: Callable[[str], Said]) -> None:
    said = check('family = "sd15"\n[cast.x]\ncheckpoint = "flatt"\ndtype = "fp16"\n[cast.y]\ncheckpoint = "flat"\n')
    assert said.err.endswith("2 errors\n")
