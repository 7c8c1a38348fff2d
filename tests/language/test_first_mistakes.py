"""Slips of people who are here for the first time: what they read, and that the rest still works."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.errors import RecipeError
from sdforge.report.problems import rendered
from sdforge.slips import explain_slip
from sdforge.syntax import read_toml
from tests.language.conftest import Forge
from tests.toys import write_drawings

SOFT = '[weighted_sum.soft]\ncheckpoints = ["flat", "ink"]\nweights = [60, 40]\n'


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["bulid"], "error: there is no command 'bulid'\nhint: did you mean `forge build`?\n"),
        (["xyzzy"], "error: there is no command 'xyzzy'\nhint: `forge --help` lists them\n"),
        (
            ["plan", "--lokced"],
            "error: there is no option --lokced\nhint: did you mean --locked? `forge COMMAND --help`",
        ),
        (["pull", "--take"], "error: there is no option --take here\nhint: it belongs to lock; `forge COMMAND --help`"),
        ([], "usage: forge"),
    ],
)
def test_a_command_line_that_means_nothing_is_guessed_at(
    typed: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(typed)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith(words)
    if not typed:
        assert "forge init mine" in said, "who says nothing is shown all commands, and the first one"


def test_a_file_whose_name_is_none_is_named_and_hides_no_other_recipe(root: Path, forge: Forge) -> None:
    (root / "recipes" / "My Preset.toml").write_text('family = "sd15"\n')
    (root / "recipes" / "other.toml").write_text('family = "sd16"\n')
    said = forge("check").err
    assert "recipes/My Preset.toml: error[name]: 'My Preset' is no name for a recipe" in said
    assert "as in 'my-preset'" in said
    assert "there is no family 'sd16'" in said
    assert "recipes/My Preset.toml  has mistakes; `forge check` shows them" in forge("list").out
    assert "there is no recipe and no target 'x'" in forge("why", "x").err


def test_shares_in_per_cent_are_remarked_where_they_stand(world_of_two: Forge) -> None:
    said = world_of_two("check")
    assert said.code == 0
    assert "recipes/r.toml:4:1: warning[weights]: the weights of soft sum to 100, not to 1" in said.err


def test_weights_that_miss_1_by_a_digit_are_shown_with_it(root: Path, world_of_two: Forge) -> None:
    recipe = root / "recipes" / "r.toml"
    recipe.write_text(recipe.read_text().replace("[60, 40]", "[0.0348, 0.9652000000000001]"))
    assert "sum to 1.0000000000000001, not to 1" in world_of_two("check").err


def test_a_recipe_that_is_a_link_to_itself_is_not_said_to_be_missing(root: Path, forge: Forge) -> None:
    (root / "recipes" / "round.toml").symlink_to("round.toml")
    assert "round.toml cannot be opened: Too many levels of symbolic links" in forge("plan", "round").err


@pytest.fixture
def world_of_two(root: Path, forge: Forge, toy_checkpoint: Path) -> Forge:
    """A project with a recipe that merges two bases, which are there."""
    (root / "forge.toml").write_text('[source.flat]\nfrom = "flat"\n[source.ink]\nfrom = "ink"\n')
    for name in ("flat", "ink"):
        shutil.copytree(toy_checkpoint, root / name)
    (root / "recipes" / "r.toml").write_text('family = "sd15"\n' + SOFT)
    return forge


def test_pictures_are_added_as_a_data_set_and_a_trainers_folders_as_such(root: Path, forge: Forge) -> None:
    for folder in (root / "mine", root / "kohya" / "10_ohwx cat", root.parent / "far"):
        write_drawings(folder)
        for caption in folder.glob("*.txt"):
            caption.write_text("a cat")
    assert "[dataset.mine]\n" in forge("add", "mine", "mine").out
    assert forge("add", "theirs", "kohya", "--licence", "CC0-1.0").code == 0
    text = (root / "forge.toml").read_text()
    assert text.endswith(
        '[dataset.mine]\npath = "mine"\n\n[dataset.theirs]\npath = "kohya"\nlayout = "kohya"\nlicence = "CC0-1.0"\n'
    )
    said = forge("add", "more", "mine", "--sha256", "0" * 64)
    assert (said.code, "folder of pictures" in said.err) == (2, True)
    assert "copy or move the folder" in forge("add", "far", str(root.parent / "far")).err


@pytest.mark.parametrize(
    ("line", "column", "hint"),
    [
        ('from = "C:\\models"', 12, "with /"),
        ("x = none", 5, "true or false"),
        ("x =", 4, "missing"),
        ("rank = 1,5", 9, "0.5"),
    ],
)
def test_a_slip_is_answered_with_the_way_out(line: str, column: int, hint: str) -> None:
    sentence = {"f": "unescaped", "r": "expected newline or end of document"}.get(line[0], "invalid value")
    assert hint in explain_slip(sentence, line, column).hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("family = 'sd15\"\n[preset]\nbake = 1\n", "r.toml:1:10: error[syntax]: a text is not closed\n"),
        ('family = "sd15\n[preset]\n', '^^^^^ " is missing at its end'),
        ('description = """\nabout\n[preset]\n', "r.toml:1:15: error[syntax]: a text is not closed\n"),
        ('description = """\nabout\n[preset]\n', '^^^ """ is missing at its end'),
        ("weights = [1 2]\n", "a comma or ] is missing"),
        ('seed = 1\nx = ["a"\n', "r.toml:2:1: error[syntax]: unclosed array\n"),
        ("[lora.my style]\n", "no spaces"),
        ("[preset\n", "a ] is missing"),
        ("// about\n", "a comment begins with #"),
        ("rank = 8 alpha = 4\n", "each setting has a line of its own"),
        ("rank = \n", "r.toml:1:8: error[syntax]: invalid value\n"),
    ],
)
def test_what_is_no_toml_is_said_where_it_begins(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_toml(text.encode(), "r.toml")
    (problem,) = caught.value.problems
    assert words in rendered(problem)


def test_a_disk_that_becomes_full_leaves_no_half_project(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[object] = []

    def write(place: Path) -> None:
        if len(copied) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(place)
        place.write_bytes(b"")

    monkeypatch.setattr(shutil, "copyfile", lambda _, place: write(Path(place)))
    (tmp_path / "cache").mkdir()
    assert main(["-C", str(tmp_path), "init"]) == 4
    said = capsys.readouterr().err
    assert "cannot be written: the disk is full" in said
    assert said.count("\n") == 2, "one file is named, not all that there was no room for"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "what was there before stays"
