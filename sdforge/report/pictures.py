"""Pictures that become part of a page: made small, as WebP, so that all of them together stay within a bound."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable

from PIL import Image

BUDGET = 1_300_000  # bytes of all pictures of a page; in a page they are a third larger
STEPS = ((384, 86), (320, 80), (256, 76), (224, 68), (192, 60), (160, 50), (128, 40), (96, 30))  # edge, quality
SHEET = (1600, 80)  # the same of a grid, which is one large picture


class Pictures:
    """Pictures by the name of their bytes, all made small alike. read: sha256 → bytes, empty where they are lost."""

    def __init__(self, names: list[str], read: Callable[[str], bytes]) -> None:
        self.small = self._fitting({name: data for name in dict.fromkeys(names) if name and (data := read(name))})

    def _fitting(self, whole: dict[str, bytes]) -> dict[str, tuple[bytes, int, int]]:
        """Return the largest form of all pictures that the budget has room for, or the smallest one there is."""
        found: dict[str, tuple[bytes, int, int]] = {}
        for edge, quality in STEPS:
            found = {name: webp(data, edge, quality) for name, data in whole.items()}
            if sum(len(data) for data, _, _ in found.values()) <= BUDGET:
                break
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.small

    def uri(self, name: str) -> str:
        """Return a picture as an address that holds it."""
        return uri(self.small[name][0])

    def size(self, name: str) -> tuple[int, int]:
        """Return width and height in pixels."""
        return self.small[name][1:]


def webp(data: bytes, edge: int, quality: int) -> tuple[bytes, int, int]:
    """Return a picture as WebP with no side longer than `edge`, never enlarged; its width and height."""
    with Image.open(io.BytesIO(data)) as whole:
        picture = whole.convert("RGB")
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue(), *picture.size


def uri(data: bytes) -> str:
    """Return WebP as an address that holds it."""
    return "data:image/webp;base64," + b64encode(data).decode()
