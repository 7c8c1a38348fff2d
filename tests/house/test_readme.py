"""What the README shows is what happens: its lines run, its output is ours, its recipe is the shipped one."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from sdforge.arguments import parser
from sdforge.method import is_target, method_groups
from tests.conftest import Project

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = "recipes/anime-preset.toml"
FAST = ((r"^steps = .*", "steps = 2"), (r"^batch = .*", "batch = 1"), (r"^seeds = .*", "seeds = [1]"))

# what differs between machines, and between these short trainings and the shipped ones
DIFFERS = (
    (r"\b[0-9a-f]{8}\b", "DIGEST"),
    (r"\b(\d+ min )?\d+(\.\d+)? s\b|\b\d+ min\b", "TIME"),
    (r" · \+.*?\(free: .*?\)", ""),
    (r" +", " "),
)


def blocks(language: str) -> list[tuple[str, str]]:
    """The README's code in a language: (the comment above it, code)."""
    return re.findall(rf"^(?:<!-- ([^\n]*) -->\n)?```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(first_column: str) -> list[str]:
    return re.findall(rf"^\| {first_column} \|", README, re.MULTILINE)


def alike(output: str) -> list[str]:
    for pattern, word in DIFFERS:
        output = re.sub(pattern, word, output)
    return [line.strip() for line in output.splitlines()]


def setup(name: str) -> str:
    """The one line that sets everything up, as `.ci/run` takes it from the README."""
    (line,) = (code for comment, code in blocks("sh") if comment == f".ci/run: {name}")
    return line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The shipped project, built by the README's line, but with short trainings and few previews."""
    root = tmp_path_factory.mktemp("readme") / "demo"
    shutil.copytree(ROOT / "recipes", root / "recipes")
    shutil.copyfile(ROOT / "forge.toml", root / "forge.toml")
    (root / "forge.local.toml").write_text('[remote]\naddress = "shared"\n')  # for push and pull
    (root / "ComfyUI" / "models" / "checkpoints").mkdir(parents=True)  # for install
    text = (root / RECIPE).read_text()
    for pattern, short in FAST:
        text = re.sub(pattern, short, text, flags=re.MULTILINE)
    (root / RECIPE).write_text(text)
    project = Project(root)
    project.forge(*shlex.split(setup("preset").rpartition("forge ")[2]))
    return project


def test_what_the_readme_says_that_forge_prints_it_prints(demo: Project) -> None:
    for comment, session in blocks("console"):
        if comment:
            old, new = comment.removeprefix("edit: ").split(" → ")
            demo.edit(old, new, RECIPE)
        for part in filter(None, re.split(r"^\$ ", session, flags=re.MULTILINE)):
            command, _, output = part.partition("\n")
            assert alike(demo.forge(*shlex.split(command)[1:]).out) == alike(output), command


@pytest.mark.parametrize("command", table("`forge (.*?)`"))
def test_a_command_of_the_table_works(demo: Project, command: str) -> None:
    assert demo.forge(*shlex.split(command)).out


def test_the_table_holds_every_command() -> None:
    actions = next(action for action in parser()._actions if action.dest == "command")
    assert {command.split()[0] for command in table("`forge (.*?)`")} == set(actions.choices or ())


def test_every_line_of_the_recipe_stands_in_the_shipped_one_in_that_order() -> None:
    ((_, shown),) = blocks("toml")
    shipped = iter((ROOT / RECIPE).read_text(encoding="utf-8").splitlines())
    missing = [line for line in shown.splitlines() if line and line not in shipped]
    assert not missing


def test_the_recipe_is_a_recipe_by_itself(demo: Project) -> None:
    ((_, shown),) = blocks("toml")
    (demo.root / "recipes" / "shown.toml").write_text(shown)
    demo.forge("check", "shown")
    (demo.root / "recipes" / "shown.toml").unlink()


def test_methods_that_are_there_and_no_others_are_named_as_such() -> None:
    named = {
        name for kind in ("merges", "trainings", "edits") for row in table(f"{kind} (.*?)") for name in row.split()
    }
    there = {name for name in method_groups() if is_target(name)} - {"rehearsal"}
    assert {name.strip("`|,;") for name in named if name.startswith("`")} == there


def test_the_lines_of_python_do_what_they_say(demo: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, shown),) = blocks("python")
    monkeypatch.chdir(demo.root)
    lines = shown.splitlines()
    drawing = next(i for i, line in enumerate(lines) if "load_preset" in line)  # tests/build/test_load_preset.py draws
    found: dict[str, Any] = {}
    exec(compile("\n".join(lines[:drawing]), "README.md", "exec"), found)
    assert found["plan"].to_do == ()
    assert found["built"].folders == (demo.root / "out" / "anime-preset",)
    assert any(path.name == "1-1-anime-preset.png" for path in found["built"].pictures)


def test_links_lead_to_files() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", README)
    assert linked
    assert not [path for path in linked if not (ROOT / path).is_file()]


def test_ci_runs_the_two_lines_of_the_readme() -> None:
    asked = re.findall(r"\$\(line (\w+)\)", (ROOT / ".ci" / "run").read_text())
    assert asked == ["preset", "tests"]
    assert all(setup(name).count("\n") == 1 for name in asked)


def test_the_constraints_pin_everything_that_the_project_asks_for() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text
