"""`forge.toml`, names on the command line, and the way from them to targets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge.cli import main
from tests.language.conftest import Said

RULE = "small letters, digits, - and _, at most 64, a letter first"
RECIPE = 'family = "sd15"\n[cast.{name}]\ncheckpoint = "flat"\ndtype = "fp16"\n'
Forge = Callable[..., Said]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "defaults = []\n",
            """forge.toml:1:1: error[unknown-setting]: `defaults` is no setting of forge.toml
  1 | defaults = []
    | ^^^^^^^^ did you mean `default`?
1 error
""",
        ),
        (
            '[source.flat]\npath = "x"\n',
            """forge.toml:1:2: error[missing]: source.flat needs `from`
  1 | [source.flat]
    |  ^^^^^^^^^^^
forge.toml:2:1: error[unknown-setting]: `source.flat.path` is no setting of forge.toml
  2 | path = "x"
    | ^^^^ here it is `from`
2 errors
""",
        ),
        (
            '[source.Flat]\nfrom = "x"\n',
            """forge.toml:1:2: error[name]: `Flat` is no name
  1 | [source.Flat]
    |  ^^^^^^^^^^^ small letters, digits, - and _, at most 64, a letter first: as in 'flat'
1 error
""",
        ),
        (
            '[source.flat]\nfrom = "x"\n[dataset.flat]\npath = "y"\n',
            """forge.toml:3:2: error[name]: `flat` is already a source
  3 | [dataset.flat]
    |  ^^^^^^^^^^^^ sources and data sets have different names
1 error
""",
        ),
        (
            '[run]\ndevice = "tpu"\n',
            """forge.toml:2:10: error[setting]: `run.device` cannot be "tpu"
  2 | device = "tpu"
    |          ^^^^^ one of auto, cpu, cuda, cuda:N
1 error
""",
        ),
        (
            "[run]\njobs = 0\n",
            """forge.toml:2:8: error[setting]: `run.jobs` is at least 1, not 0
  2 | jobs = 0
    |        ^
1 error
""",
        ),
    ],
)
def test_a_mistake_in_forge_toml_is_said_at_its_place(root: Path, forge: Forge, text: str, words: str) -> None:
    (root / "forge.toml").write_text(text)
    said = forge("plan", "r")
    assert said.code == 2
    assert said.err == words


def test_a_mistake_in_forge_local_toml_is_said_at_its_place(root: Path, forge: Forge) -> None:
    (root / "forge.local.toml").write_text("folder = []\n")
    said = forge("plan", "r")
    assert said.code == 2
    assert said.err.startswith("forge.local.toml:1:1: error[unknown-setting]: `folder` is no setting")


def test_forge_toml_is_under_the_limits_of_recipes(root: Path, forge: Forge) -> None:
    (root / "forge.toml").write_text("a = " + "[" * 100 + "]" * 100 + "\n")
    said = forge("plan", "r")
    assert said.code == 2
    assert "nests deeper than 64 levels" in said.err


def test_a_folder_without_a_project_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    code = main(["-C", str(folder), "plan"])
    words = capsys.readouterr().err
    assert code == 2
    assert words == (
        f"error: {folder} is in no project: there is no forge.toml here or above\nhint: `forge init` makes one\n"
    )


def test_a_project_is_found_from_a_folder_within_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "recipes" / "soft.toml").write_text(RECIPE.format(name="x"))
    assert main(["-C", str(root / "recipes"), "list"]) == 0
    assert "soft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["plan"],
            (
                "error: nothing to build: no recipe was named, and forge.toml has no `default`\n"
                "hint: there are: hard, soft\n"
            ),
        ),
        (["plan", "sofd"], "error: there is no recipe and no target 'sofd'\nhint: did you mean 'soft'?\n"),
        (["plan", "zzzzzz"], "error: there is no recipe and no target 'zzzzzz'\nhint: there are: hard, soft\n"),
        (["why", "onne"], "error: there is no recipe and no target 'onne'\nhint: did you mean 'one'?\n"),
        (
            ["build", "soft", "--retrain", "soft"],
            "error: 'soft' is no target of what is built\nhint: there are: x, one\n",
        ),
        (["plan", "soft:y"], "error: recipe 'soft' has no target 'y'\nhint: it has x, one\n"),
        (["plan", "soft:onne"], "error: recipe 'soft' has no target 'onne'\nhint: did you mean 'one'?\n"),
        (["plan", "sofd:x"], "error: there is no recipe 'sofd'\nhint: did you mean 'soft'?\n"),
        (["plan", "x"], "error: 'x' is a target of several recipes\nhint: hard:x or soft:x\n"),
        (["plan", "../soft"], "error: there is no recipe and no target '../soft'\nhint: did you mean 'soft'?\n"),
        (
            ["plan", "../soft:x"],
            f"error: '../soft' is no name for a recipe\nhint: {RULE}: as in 'soft'\n",
        ),
        (
            ["check", "Soft"],
            f"error: 'Soft' is no name for a recipe\nhint: {RULE}: as in 'soft'\n",
        ),
        (["check", "sofd"], "error: there is no recipe 'sofd'\nhint: did you mean 'soft'?\n"),
    ],
)
def test_a_name_that_means_nothing_is_guessed_at(root: Path, forge: Forge, arguments: list[str], words: str) -> None:
    (root / "recipes" / "soft.toml").write_text(RECIPE.format(name="x") + RECIPE.format(name="one").partition("\n")[2])
    (root / "recipes" / "hard.toml").write_text(RECIPE.format(name="x"))
    said = forge(*arguments)
    assert (said.code, said.err) == (2, words)


def test_usage_that_no_command_has_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["frobnicate"])
    assert caught.value.code == 2
    assert "there is no command 'frobnicate'" in capsys.readouterr().err


def test_a_recipe_that_is_no_regular_file_is_refused(root: Path, forge: Forge) -> None:
    import os

    os.mkfifo(root / "recipes" / "pipe.toml")
    said = forge("plan", "pipe")
    assert said.code == 2
    assert "Traceback" not in said.err


def test_a_recipe_that_is_a_folder_is_refused(root: Path, forge: Forge) -> None:
    (root / "recipes" / "folder.toml").mkdir()
    assert forge("plan", "folder").code == 2


@pytest.mark.parametrize("place", ["/etc/passwd", "../x.safetensors", "~/x.safetensors", "a/../../x", "C:x", "C:\\x"])
def test_a_source_outside_the_project_is_refused(root: Path, forge: Forge, place: str) -> None:
    (root / "recipes" / "r.toml").write_text(
        f'family = "sd15"\n[source.mine]\nfrom = \'{place}\'\n[cast.x]\ncheckpoint = "mine"\ndtype = "fp16"\n'
    )
    said = forge("check", "r")
    assert said.code == 2
    assert "is no path within the project" in said.err


def test_a_source_that_leads_out_through_a_link_is_refused(root: Path, forge: Forge, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "bases").symlink_to(outside)
    (root / "recipes" / "r.toml").write_text(RECIPE.format(name="x"))
    said = forge("check", "r")
    assert said.code == 2
    assert "leads out of the project through a link" in said.err
    assert "files elsewhere are found by name in the folders that forge.local.toml lists" in said.err


def test_a_source_that_is_not_there_says_where_it_was_looked_for(root: Path, forge: Forge) -> None:
    (root / "recipes" / "r.toml").write_text(RECIPE.format(name="x"))
    said = forge("check", "r")
    assert said.code == 2
    assert said.err.startswith("forge.toml:3:8: error[source]: flat: there is no bases/flat.safetensors in the project")


def test_a_source_from_elsewhere_says_how_it_is_fetched(root: Path, forge: Forge) -> None:
    (root / "forge.toml").write_text('[source.flat]\nfrom = "hf://a/b"\n')
    (root / "recipes" / "r.toml").write_text(RECIPE.format(name="x"))
    said = forge("check", "r")
    assert said.code == 2
    assert "flat comes from hf://a/b, and has not been fetched" in said.err
    assert "`forge fetch flat` gets it" in said.err


def test_a_folder_is_meant_from_forge_toml_and_a_name_is_no_pattern(
    root: Path, forge: Forge, toy_checkpoint: Path
) -> None:
    (root / "forge.local.toml").write_text('folders = ["../models"]\n')
    (root / "recipes" / "r.toml").write_text(
        'family = "sd15"\n[source.own]\nfrom = "sub/base [v1]"\n[cast.x]\ncheckpoint = "own"\ndtype = "fp16"\n'
    )
    models = root.parent / "models"
    shutil.copytree(toy_checkpoint, models / "another-sub" / "base [v1]")
    said = forge("check")
    assert said.code == 2
    assert "no sub/base [v1] in the project, nor in the 1 folder of forge.local.toml" in said.err
    shutil.copytree(toy_checkpoint, models / "sub" / "base [v1]")
    assert forge("check").code == 0


def test_a_folder_of_this_machine_that_is_not_there_is_named(root: Path, forge: Forge) -> None:
    (root / "forge.local.toml").write_text('folders = ["../modells"]\n')
    (root / "recipes" / "r.toml").write_text('family = "sd15"\n[cast.x]\ncheckpoint = "flat"\ndtype = "fp16"\n')
    said = forge("check")
    assert said.code == 2
    assert "forge.local.toml lists ../modells, which is no folder" in said.err


def test_a_path_that_a_shell_has_completed_is_stated_as_sources_are(
    root: Path, forge: Forge, toy_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = root.parent / "models"
    for place in (root / "recipes" / "bases" / "own", models / "base [v1]"):
        shutil.copytree(toy_checkpoint, place)
    monkeypatch.chdir(root / "recipes")
    assert forge("-C", ".", "add", "one", "bases/own").code == 0
    said = forge("-C", ".", "add", "two", "../../models/base [v1]")
    assert said.code == 2
    assert "../../models/base [v1] lies outside of the project" in said.err
    assert f'folders = ["{models}"]' in said.err
    (root / "forge.local.toml").write_text('folders = ["../models"]\n')
    assert forge("-C", ".", "add", "two", "../../models/base [v1]").code == 0
    assert forge("-C", ".", "add", "four", "~nobody-of-this-name/x").code == 2
    assert forge("-C", ".", "add", "three", "recipes/bases/own").code == 0, "from the project's folder, as ever"
    stated = (root / "forge.toml").read_text().partition("[source.one]")[2]
    assert stated.count('from = "recipes/bases/own"') == 2
    assert stated.count('from = "base [v1]"') == 1
