"""Embeddings that A1111 hides in pictures: as text beside the picture, or in the lowest bits of stripes at its sides.

The text is base64 of JSON. The stripes hold zlib's packing of the same JSON, the lower half of every byte in the left
one, the upper half in the right one, columns of black between them and the picture, and all of it mixed with the
numbers of a linear congruential generator (github.com/AUTOMATIC1111/stable-diffusion-webui, `image_embedding.py`).
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdforge.errors import UsageError

TEXT = "sd-ti-embedding"
MOST_PIXELS = 64 << 20
MOST_JSON = 256 << 20  # bytes: 75 rows of the widest encoder are 3 MB
MULTIPLIER, INCREMENT, MODULUS, RANGE = 1664525, 1013904223, 2**32, 255


def read_picture(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return an embedding's rows as `emb_params`, and no metadata. Raises UsageError where there is none."""
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses what is twice as large
    try:
        with Image.open(path) as picture:
            text = picture.info.get(TEXT)
            hidden = base64.b64decode(text) if text else unhidden(np.asarray(picture.convert("RGB")))
        terms = json.loads(hidden)["string_to_param"]
        ((_, rows),) = terms.items()
        tensor = torch.tensor(rows["TORCHTENSOR"], dtype=torch.float32)
    except (Image.DecompressionBombError, OSError) as error:
        raise UsageError(f"{path} is no picture that can be opened: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
        raise UsageError(f"{path} is a picture in which no embedding is hidden") from None
    return {"emb_params": tensor}, {}


def unhidden(pixels_HWC: Any) -> bytes:
    """Return what stripes at both sides of a picture hold. Raises ValueError, zlib.error."""
    bright_HW = (pixels_HWC > 0).all(2)
    if not bright_HW.any():
        raise ValueError
    columns, lines = np.flatnonzero(bright_HW.any(0)), np.flatnonzero(bright_HW.any(1))
    low_HWC = pixels_HWC[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1] & 15
    (black,) = np.nonzero(low_HWC.sum((0, 2)) == 0)
    if len(black) < 2:
        raise ValueError
    left, right = unmixed(low_HWC[:, : black.min()]), unmixed(low_HWC[:, black.max() + 1 :])
    unpacking = zlib.decompressobj()
    data = unpacking.decompress((right << 4 | left).tobytes(), MOST_JSON)
    if not unpacking.eof:
        raise ValueError
    return data


def unmixed(block_HWC: Any) -> Any:
    """Return a stripe's numbers in 0 … 15 without those that they were mixed with."""
    numbers, state = np.empty(block_HWC.size, np.uint8), 0
    for i in range(block_HWC.size):
        state = (MULTIPLIER * state + INCREMENT) % MODULUS
        numbers[i] = state % RANGE & 15
    return block_HWC ^ numbers.reshape(block_HWC.shape)
