"""A folder that several machines see, or a disk that is carried between them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sdforge.store.files import CHUNK, own_name, publish, resources, sweep_parts


@dataclass(frozen=True)
class FolderRemote:
    """`FOLDER/cas/ab/SHA256` and `FOLDER/ac/ab/SHA256`."""

    folder: Path

    def _place(self, space: str, name: str) -> Path:
        return self.folder / space / name[:2] / name

    def has(self, space: str, name: str) -> bool:
        with resources(f"the remote cache {self.folder} cannot be read"):
            return self._place(space, name).is_file()

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        with resources(f"the remote cache {self.folder} cannot be read"):
            try:
                fd = os.open(self._place(space, name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            with os.fdopen(fd, "rb") as source, into.open("wb") as target:
                left = limit
                while left > 0 and (chunk := source.read(min(CHUNK, left))):
                    target.write(chunk)
                    left -= len(chunk)
        return True

    def put(self, space: str, name: str, path: Path) -> None:
        with resources(f"the remote cache {self.folder} cannot be written to"):
            waiting = self.folder / "tmp" / f".{own_name()}"
            waiting.parent.mkdir(parents=True, exist_ok=True)
            sweep_parts(waiting.parent)
            try:
                shutil.copyfile(path, waiting)
                publish(waiting, self._place(space, name))
            finally:
                waiting.unlink(missing_ok=True)
