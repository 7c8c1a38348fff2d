"""Every command of the guide runs, what it is said to print it prints, and its reference is the schemas'."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from docs.write_reference import PLACE, reference
from tests.quick import Quick

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("merging", "character", "training", "looking", "sharing", "programs")  # they go on in the tutorial's workshop
DEFINED = re.compile(r"^def (test_\w+)", re.MULTILINE)
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAST = (
    (r"^steps = .*", "steps = 2"),
    (r"^batch = .*", "batch = 1"),
    (r"^count = .*", "count = 1"),
    (r"^seeds = .*", "seeds = [1]"),
    (r"^prompts = \[\n(.*\n)(?:.*,\n)*\]", r"prompts = [\n\1]"),
)
DRIVE = "/mnt/drive"  # of the guide's network drive
OTHERS = ("git", "mkdir")  # programs that the guide uses besides
WRITER = {f"GIT_{who}_{what}": "guide" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class Block(NamedTuple):
    """A fenced block: what the comment above it says is done with it."""

    comment: str
    language: str
    text: str


class Reader:
    """Somebody who follows a page word for word."""

    def __init__(self, quick: Quick, folder: Path) -> None:
        self.quick, self.folder = quick, folder

    def follow(self, page: str, *, slow: bool = False) -> None:
        for block in blocks(page):
            if block.comment == "slow" and not slow:
                continue
            if block.language == "console":
                self._edit(block.comment)
                self._run(block.text)
            else:
                self._write(block)

    def _write(self, block: Block) -> None:
        kind, _, name = block.comment.partition(": ")
        if kind == "file":
            (self.folder / name).write_text(short(block.text))
        elif kind == "add to":
            path = self.folder / name
            text = block.text.replace(DRIVE, str(self.folder.parent / "drive"))
            path.write_text(f"{path.read_text()}\n{text}")

    def _edit(self, comment: str) -> None:
        if not comment.startswith("edit: "):
            return
        name, _, change = comment.removeprefix("edit: ").partition(": ")
        old, new = (text.replace("\\n", "\n") for text in change.split(" → "))
        path = self.folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def _run(self, session: str) -> None:
        for part in filter(None, re.split(r"^\$ ", session, flags=re.MULTILINE)):
            line, _, shown = part.partition("\n")
            said = self._command(shlex.split(line), line)
            missing = [text for text in shown.splitlines() if text not in said.splitlines()]
            assert not missing, f"{line}\n{said}"

    def _command(self, words: list[str], line: str) -> str:
        program, *arguments = words
        if program == "cd":
            self.folder = (self.folder / arguments[0]).resolve()
            return ""
        if program == "forge":
            ran = self.quick.forge(self.folder, *arguments)
            assert ran.code == 0, f"{line}\n{ran.out}\n{ran.err}"
            self._shorten()
            return ran.out
        assert program in OTHERS, f"{line}: no test runs this"
        subprocess.run(words, cwd=self.folder, env=os.environ | WRITER, check=True, capture_output=True)
        return ""

    def _shorten(self) -> None:
        """Let the recipes of a new project train for two steps."""
        workshop = self.folder / "workshop"
        if workshop.is_dir() and not (workshop / "cache" / "v1").exists():
            for path in (workshop / "recipes").glob("*.toml"):
                path.write_text(short(path.read_text()))


def short(text: str) -> str:
    for pattern, fast in FAST:
        text = re.sub(pattern, fast, text, flags=re.MULTILINE)
    return text


def blocks(page: str) -> Iterator[Block]:
    for comment, language, text in BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        yield Block(comment, language, text)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, quick: Quick) -> Path:
    """Where the tutorial ends."""
    reader = Reader(quick, tmp_path_factory.mktemp("guide"))
    reader.follow("tutorial")
    return reader.folder


def page_reader(quick: Quick, workshop: Path, folder: Path) -> Reader:
    """Begin another page in a copy of the workshop, without its history."""
    shutil.copytree(workshop, folder / "workshop", ignore=shutil.ignore_patterns(".git"))
    return Reader(quick, folder / "workshop")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(quick: Quick, workshop: Path, tmp_path: Path, page: str) -> None:
    page_reader(quick, workshop, tmp_path).follow(page)


@pytest.mark.slow
def test_the_long_commands_run_too(quick: Quick, workshop: Path, tmp_path: Path) -> None:
    pages = [page for page in PAGES if any(block.comment == "slow" for block in blocks(page))]
    assert pages
    for page in pages:
        (tmp_path / page).mkdir()
        page_reader(quick, workshop, tmp_path / page).follow(page, slow=True)


def test_the_reference_is_what_the_schemas_say() -> None:
    assert PLACE.read_text(encoding="utf-8") == reference(), "python -m docs.write_reference writes it anew"


def test_every_page_is_followed_or_holds_no_commands_and_is_in_the_list() -> None:
    pages = {path.stem for path in DOCS.glob("*.md")}
    with_commands = {page for page in pages if any(block.language == "console" for block in blocks(page))}
    assert with_commands == {"tutorial", *PAGES}
    listed = set(re.findall(r"\]\((\w+)\.md\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert listed == pages - {"README"}


@pytest.mark.parametrize("page", sorted(path.stem for path in DOCS.glob("*.md")))
def test_links_of_the_guide_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https)([^)#]+)\)", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert not [link for link in links if not (DOCS / link).is_file()]


def test_the_tests_that_show_the_expectations_exist() -> None:
    rows = re.findall(r"^\| (E\d\d) \|(.*)\|$", (DOCS / "expectations.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [number for number, _ in rows] == [f"E{i:02}" for i in range(1, 31)]
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(DEFINED, path.read_text())}
    assert not {name for _, row in rows for name in re.findall(r"`(test_\w+)`", row)} - there
    assert all("`test_" in row or "| no " in row for _, row in rows)
