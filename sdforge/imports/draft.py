"""A recipe as it takes shape: targets, what they are made from, and what could not be carried over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from sdforge import toml
from sdforge.errors import UsageError
from sdforge.names import is_name
from sdforge.recipe import RESERVED
from sdforge.references import is_remote
from sdforge.store.files import open_regular
from sdforge.syntax import MOST_BYTES

SCHEMA = "#:schema ../.forge/recipe.schema.json"
WIDTH = 118  # of a comment's line
LONGEST = 48  # of a name that is made from a file's
MODELS = (".safetensors", ".ckpt", ".pt", ".bin")
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")  # ORG/REPO, as programs write a repository


class Wishes(NamedTuple):
    """What the command line says of an import. family, checkpoints: where the file does not tell."""

    family: str = ""
    checkpoints: tuple[str, ...] = ()


@dataclass
class Draft:
    """The recipe. root: the project; beside: the folder of the file that is read; known: the sources of forge.toml."""

    root: Path
    beside: Path
    known: dict[str, dict[str, Any]]
    about: str = ""  # what the file is, in words
    family: str = ""
    targets: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # method, name, table
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)
    _files: dict[str, str] = field(default_factory=dict)  # what a file was called → the source's name

    def note(self, sentence: str) -> None:
        """Say once what is not as it was in the file."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def target(self, method: str, wish: str, table: dict[str, Any]) -> str:
        """Add a target; return its name."""
        name = self.name(wish)
        self.targets.append((method, name, table))
        return name

    def source(self, text: str, **stated: Any) -> str:
        """Return the source for a file that somebody named by a path or an address; `stated` is said of it too."""
        if text not in self._files:
            table: dict[str, Any] = {"from": self._place(text), **stated}
            same = [name for name, other in self.known.items() if other.get("from") == table["from"]]
            stem = PureWindowsPath(text.partition("@")[0]).name
            name = same[0] if same else self.name(stem.rpartition(".")[0] if stem.endswith(MODELS) else stem)
            self._files[text] = name
            if not same:
                self.sources[name] = table
        return self._files[text]

    def _place(self, text: str) -> str:
        """Return what `from` says: a path within the project, an address, or the name of a file elsewhere."""
        if is_remote(text):
            return text
        if found := self.within(text):
            return found
        plain = text.replace("\\", "/")
        if HUB.fullmatch(plain) and not plain.endswith(MODELS):
            return f"hf://{plain}"
        name = plain.rstrip("/").rpartition("/")[2]
        self.note(f"{text} is taken by its name: put it into the project, or list its folder in forge.local.toml")
        return name

    def within(self, text: str) -> str:
        """Return the path within the project of what lies there, seen from the project or from beside the file."""
        for base in (self.root, self.beside):
            path = (base / text.replace("\\", "/")).resolve()
            if path.exists() and path.is_relative_to(self.root):
                return str(path.relative_to(self.root))
        return ""

    def name(self, wish: str) -> str:
        """Return a name that nothing else has, as near as can be to the wished one."""
        stem = plain_name(wish)
        names = (stem, *(f"{stem}-{i}" for i in range(2, 1000)))
        taken = self._taken | set(RESERVED) | set(self.known)
        name = next(each for each in names if each not in taken and is_name(each))
        self._taken.add(name)
        return name

    def text(self, file: str) -> str:
        """Return the recipe. Raises UsageError where its family is not known."""
        if not self.family:
            raise UsageError(f"{file} does not tell for which family it is", hint="--family sd15, sd2 or sdxl says so")
        parts = [
            f"{SCHEMA}\n# By `forge import` from {_seen(file)}, {self.about}.\n{''.join(map(_comment, self.notes))}"
        ]
        parts[0] += f"family = {toml.value(self.family)}\n"
        parts += [_table(f"source.{name}", table) for name, table in self.sources.items()]
        parts += [_table(f"dataset.{name}", table) for name, table in self.datasets.items()]
        parts += [_table(f"{method}.{name}", table) for method, name, table in self.targets]
        parts += [_table("preset", self.preset)] if self.preset else []
        return "\n".join(parts)


def plain_name(text: str) -> str:
    """Return a text as a name: small letters, digits and -."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST].strip("-")
    return stem if stem[:1].isalpha() else f"from-{stem}".strip("-")


def _table(head: str, values: dict[str, Any]) -> str:
    """Return a table; its settings stay in their order, and what is empty is left out."""
    rows = "".join(f"{name} = {toml.value(found)}\n" for name, found in values.items() if found not in (None, {}, []))
    return f"[{head}]\n{rows}"


def _comment(note: str) -> str:
    """Return a sentence as comment lines, without what could end one."""
    words, lines = _seen(note).split(" "), ["# -"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("#  ")
        lines[-1] += f" {word}"
    return "".join(f"{line}\n" for line in lines)


def _seen(text: str) -> str:
    """Return a text with a blank for each letter that nobody sees: such a letter could end a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def text_of(path: Path) -> str:
    """Return a small text. Raises UsageError for what is none."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES} bytes: it is no recipe of any kind")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None


def listed(words: Iterable[str]) -> str:
    """Return words as a sentence lists them: a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
