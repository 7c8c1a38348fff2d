"""Picture files: which are read, how one is opened, and what can be told of it by its header."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif")
# pictures too, but of endings that are passed over
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".jxl", ".heic", ".heif", ".psd", ".jfif")
MOST = 200_000_000  # pixels of a picture: what says that it has more is a mistake, or an attack on memory
DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's modes of grey in more than 8 bits, which it turns into white
ORIENTATION = 0x0112  # of EXIF
TURNED = (5, 6, 7, 8)  # its values by which a picture is turned by a quarter; others mean nothing, whatever they are


class UnreadablePicture(ValueError):
    """A file that is called a picture, and cannot be read as one, or not without loss."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture. Raises UnreadablePicture, also where what is wrong shows only later, at its pixels."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns before it refuses; ours, below, only refuses
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST:
                raise ValueError(f"{image.width} × {image.height} pixels are more than {MOST:,}")
            if image.mode in DEEP:
                raise ValueError("it is grey in more than 8 bits; save it with 8")
            yield image
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # RuntimeError: of AVIF
        # Pillow names the file too, or how it was opened
        reason = "it is none of a known form" if type(error).__name__ == "UnidentifiedImageError" else error
        raise UnreadablePicture(f"{path} is no picture that can be read: {reason}") from None


def size_of(image: Image.Image) -> tuple[int, int]:
    """Return width and height in pixels of an opened picture, once it is turned as its EXIF says.

    A PNG without EXIF before its pixels is read to the end, where it may stand too.
    """
    return _upright(image, image.getexif())


def size_by_header(image: Image.Image) -> tuple[int, int]:
    """Return the same without looking at a pixel."""
    from PIL import Image

    return _upright(image, Image.Image.getexif(image))


def _upright(image: Image.Image, exif: Image.Exif) -> tuple[int, int]:
    turned = exif.get(ORIENTATION) in TURNED
    return (image.height, image.width) if turned else (image.width, image.height)


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, with white where it is transparent: by an alpha channel, or by a colour that is none."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
