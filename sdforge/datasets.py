"""A folder of pictures with captions → what a data set is: rows of picture, caption, repeats and mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdforge.artifact import dataset_identity
from sdforge.errors import UsageError
from sdforge.pictures import OTHERS, PICTURES, UnreadablePicture, opened, size_by_header

VERSION = 6  # raised when the same folder is told of otherwise
MASK = ".mask.png"
MOST_CAPTION = 100_000  # bytes: a prompt of a thousand times the length that is read
MOST_REPEATS = 10_000  # times that a picture is shown in a round
DECIDE = ("layout", "captions", "caption", "templates", "trigger", "repeats", "validation", "masks")  # of its table
# what is told of a data set beside what it is: pictures without a caption; sizes, sha256 → width and height in pixels;
# what is wrong with pictures that cannot be read; pictures that lie there and are passed over
TOLD = ("without", "sizes", "unreadable", "passed_over")

Row = list[Any]  # [sha256 of the picture, caption, repeats], and where masks are used the mask's sha256 or `alpha`


def read_dataset(
    name: str, table: dict[str, Any], path: Path, digest: Callable[[Path], str], check: Callable[[Path], None]
) -> tuple[dict[str, Any], list[Path]]:
    """Return what a folder of pictures is, and the files and folders on which that depends.

    digest: a file → its sha256; check: refuses a file that lies where it may not be read. Raises UsageError for what
    cannot be learned from.
    """
    if not path.is_dir():
        raise UsageError(f"{name}: {path} is no folder")
    reading = _Reading(name, table, path, digest, check)
    for folder, repeats, words in folders(table["layout"], path, table["repeats"]):
        reading.read(folder, repeats, words)
    reading.refuse_nothing()
    reading.rows.sort()
    value = {
        "kind": "dataset",
        "identity": dataset_identity(reading.rows, table["validation"]),
        "rows": reading.rows,
        "names": {sha256: sorted(found) for sha256, found in reading.names.items()},
        "without": reading.without,
        "sizes": reading.sizes,
        "unreadable": reading.unreadable,
        "passed_over": reading.passed_over,
    }
    return value, reading.places


def folders(layout: str, path: Path, repeats: int) -> Iterator[tuple[Path, int, str]]:
    """Yield the folders with pictures: (folder, how often its pictures are shown, their caption where they have none).

    kohya's scripts take both from a folder's name: `10_ohwx woman`; `0_…` they leave alone. Raises UsageError for more
    than MOST_REPEATS.
    """
    if layout == "flat":
        yield path, repeats, ""
        return
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        found = re.fullmatch(r"(\d+)_(.+)", folder.name)
        if found and (times := int(found[1]) * repeats):
            if times > MOST_REPEATS:
                raise UsageError(f"{folder} says to show its pictures {times:,} times", f"{MOST_REPEATS:,} at most")
            yield folder, times, found[2].strip()


class _Reading:
    def __init__(
        self,
        name: str,
        table: dict[str, Any],
        path: Path,
        digest: Callable[[Path], str],
        check: Callable[[Path], None],
    ) -> None:
        self.name, self.table, self.path, self.digest, self.check = name, table, path, digest, check
        self.rows: list[Row] = []
        self.names: dict[str, list[str]] = {}
        self.places = [path]
        self.without: list[str] = []  # names of pictures without a caption
        self.pictures: set[str] = set()
        self.sizes: dict[str, list[int]] = {}
        self.unreadable: list[str] = []
        self.passed_over: list[str] = []

    def read(self, folder: Path, repeats: int, words: str) -> None:
        """Take in the pictures of one folder."""
        if folder != self.path:
            self.places.append(folder)
        self.passed_over += [self._shown(p.name) for p in sorted(folder.iterdir()) if p.suffix.lower() in OTHERS]
        for picture in sorted(p for p in folder.iterdir() if self._is_picture(p)):
            captions = self._captions(picture, words)
            mask = self._mask(picture)
            sha256 = self._named(picture)
            self.pictures.add(sha256)
            self._measure(picture, sha256)
            self.rows += [[sha256, caption, repeats, *mask] for caption in captions]

    def _is_picture(self, path: Path) -> bool:
        return path.suffix.lower() in PICTURES and not path.name.endswith(MASK) and path.is_file()

    def _measure(self, picture: Path, sha256: str) -> None:
        """Note a picture's size, or what is wrong with it, as far as its header shows."""
        try:
            with opened(picture) as image:
                self.sizes[sha256] = list(size_by_header(image))
        except UnreadablePicture as error:
            self.unreadable.append(str(error))

    def _named(self, path: Path) -> str:
        name = self._shown(str(path.relative_to(self.path)))
        self.check(path)
        self.places.append(path)
        sha256 = self.digest(path)
        self.names.setdefault(sha256, []).append(name)
        return sha256

    def _shown(self, name: str) -> str:
        """Return a name that can be written down. Raises UsageError for one that cannot."""
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{self.name}: the name {name!r} is not UTF-8", hint="rename it") from None
        return name

    def _captions(self, picture: Path, words: str) -> list[str]:
        """Return the captions of a picture, as they are used."""
        table = self.table
        text = picture.with_suffix(f".{table['captions']}")
        found = list(table["templates"]) or [words or table["caption"]]
        if table["captions"] != "none" and text.is_file():
            self.check(text)
            self.places.append(text)
            if text.stat().st_size > MOST_CAPTION:
                raise UsageError(f"{self.name}: {text} is no caption: it has more than {MOST_CAPTION:,} bytes")
            try:
                found = [text.read_text(encoding="utf-8-sig").strip()]  # some editors put a mark in front
            except UnicodeDecodeError:
                raise UsageError(f"{self.name}: {text} is not UTF-8", hint="save it as UTF-8") from None
        elif found == [""]:
            self.without.append(picture.name)
        if any("{trigger}" in caption for caption in found) and not table["trigger"]:
            raise UsageError(
                f"{self.name}: a caption names {{trigger}}, and the data set has no `trigger`",
                hint=f'trigger = "<word>" in [dataset.{self.name.rpartition("/")[2]}] says what it stands for',
            )
        return [caption.replace("{trigger}", table["trigger"]) for caption in found]

    def _mask(self, picture: Path) -> list[str]:
        """Return what says which places of a picture count, if anything does."""
        masks = self.table["masks"]
        if masks == "none":
            return []
        if masks == "alpha":
            return ["alpha"]
        path = picture.with_name(picture.stem + MASK)
        if not path.is_file():
            return [""]
        return [self._named(path)]

    def refuse_nothing(self) -> None:
        """Refuse a data set of which nothing is learned."""
        if not self.rows:
            raise UsageError(f"{self.name}: {self.path} holds no pictures", hint=self._elsewhere())
        held_out = self.table["validation"]
        if held_out >= len(self.pictures):
            raise UsageError(
                f"{self.name}: {held_out} of {len(self.pictures)} pictures are held out, so none is learned from"
            )

    def _elsewhere(self) -> str:
        """Return where pictures could be, for a folder that holds none."""
        if self.table["layout"] == "kohya":
            return 'its folders are called as in "10_ohwx woman"; layout = "flat" takes the pictures of the folder'
        within = [folder for folder, _, _ in folders("kohya", self.path, 1)]
        if any(self._is_picture(path) for folder in within for path in folder.iterdir()):
            return 'folders in it do, called as kohya\'s scripts have them: layout = "kohya"'
        deeper = next((p for p in sorted(self.path.glob("*/*")) if self._is_picture(p)), None)
        if deeper is not None:
            return f"{deeper.parent.relative_to(self.path)} in it does: name that folder, or put them together"
        return f"they end in {', '.join(PICTURES)}"
