"""How alike pictures are, in numpy: structural similarity, peak signal to noise, root mean square difference.

Shapes in names: H rows, W columns, C colours. Values are 0 … 1.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sdforge.checks import verdict
from sdforge.errors import ActionFailed
from sdforge.formats.embedding import negative_word, words_of
from sdforge.formats.tokenizer import stands_in
from sdforge.order import Given, Order, Outcome
from sdforge.pictures import UnreadablePicture, on_white, opened

Pixels = NDArray[np.float64]
SIGMA, RADIUS = 1.5, 5  # pixels, of the Gaussian window (11 × 11) of Wang et al. 2004, §III-B
C1, C2 = 0.01**2, 0.03**2  # (K₁ L)² and (K₂ L)² there, with the range L = 1
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601): SSIM is defined for grey pictures
PREFIX = "prompt {}, seed {}"


def read(path: str, size: tuple[int, int] | None = None) -> Pixels:
    """Return a picture's pixels (H, W, C), upright, resized to (width, height). Raises ActionFailed."""
    try:
        with opened(path) as image:
            upright = on_white(ImageOps.exif_transpose(image))
    except UnreadablePicture as error:
        raise ActionFailed(str(error)) from None
    if size and upright.size != size:
        upright = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
    return np.asarray(upright, np.float64) / 255


def ssim(a_HWC: Pixels, b_HWC: Pixels) -> float:
    """Return the mean structural similarity of two pictures, −1 … 1 (Wang et al. 2004, eq. 13 and 17).

    Over a Gaussian window that lies wholly within the picture; of one that is smaller, over what there is.
    """
    a_HW, b_HW = a_HWC @ LUMA, b_HWC @ LUMA
    mean_a, mean_b = _blurred(a_HW), _blurred(b_HW)
    variance_a = _blurred(a_HW * a_HW) - mean_a * mean_a
    variance_b = _blurred(b_HW * b_HW) - mean_b * mean_b
    covariance = _blurred(a_HW * b_HW) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return float((luminance * structure).mean())


def _blurred(values_HW: Pixels) -> Pixels:
    """Return the Gaussian-weighted means around every pixel whose window lies within the picture."""
    for axis in (0, 1):
        radius = min(RADIUS, (values_HW.shape[axis] - 1) // 2)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SIGMA) ** 2)
        windows = np.lib.stride_tricks.sliding_window_view(values_HW, len(weights), axis)
        values_HW = windows @ (weights / weights.sum())
    return values_HW


def rms(a_HWC: Pixels, b_HWC: Pixels) -> float:
    """Return the root mean square of the difference of all values, 0 … 1."""
    return float(np.sqrt(((a_HWC - b_HWC) ** 2).mean()))


def psnr(a_HWC: Pixels, b_HWC: Pixels) -> float:
    """Return the peak signal to noise in dB, −20 log₁₀ of the root mean square difference; infinite for equals."""
    difference = rms(a_HWC, b_HWC)
    return -20 * math.log10(difference) if difference else math.inf


# -- checks ------------------------------------------------------------------------------------------------------------


def like_reference(order: Order) -> Outcome:
    """Compare pictures with a reference."""
    settings = order.settings
    chosen = [
        row
        for row in order.the("pictures").pictures
        if settings["prompt"] in (0, row[3]) and settings["seed"] in (-1, row[4])
    ]
    if not chosen:
        said = PREFIX.format(settings["prompt"] or "any", settings["seed"] if settings["seed"] >= 0 else "any")
        raise ActionFailed(f"no preview is of {said}", hint="[preset.previews] says which are drawn")
    ((reference, *_),) = order.the("to").pictures
    resized = cache(partial(read, reference))
    pairs = []
    for row in chosen:
        drawn_HWC = read(row[0])
        pairs.append((row, drawn_HWC, resized((drawn_HWC.shape[1], drawn_HWC.shape[0]))))
    return _compared(pairs, settings)


def like_previous(order: Order) -> Outcome:
    """Compare pictures with those of the previous build, by prompt and seed."""
    before = {(row[2], row[4]): row[0] for given in order.inputs.get("previous", []) for row in given.pictures}
    pairs = []
    for row in order.the("pictures").pictures:
        if path := before.get((row[2], row[4])):
            drawn_HWC = read(row[0])
            pairs.append((row, drawn_HWC, read(path, (drawn_HWC.shape[1], drawn_HWC.shape[0]))))
    if not pairs:
        return verdict([], "nothing to compare with: no earlier build here drew the same prompts", {})
    return _compared(pairs, order.settings)


def _compared(pairs: list[tuple[list[Any], Pixels, Pixels]], settings: dict[str, Any]) -> Outcome:
    """Return the verdict over pairs of pictures: each has to be within the bounds."""
    least, most, quiet = settings["ssim"], settings.get("most_ssim", 1.0), settings["psnr"]
    faults, alike, clear = [], [], []
    for row, one_HWC, two_HWC in pairs:
        alike.append(ssim(one_HWC, two_HWC))
        clear.append(psnr(one_HWC, two_HWC))
        which = PREFIX.format(row[3], row[4])
        if alike[-1] < least:
            faults.append(f"{which}: SSIM {alike[-1]:.3f} is less than {least:g}")
        if alike[-1] > most:
            faults.append(f"{which}: SSIM {alike[-1]:.3f} is more than {most:g}")
        if clear[-1] < quiet:
            faults.append(f"{which}: PSNR {clear[-1]:.1f} dB is less than {quiet:g}")
    measured = {"least_ssim": min(alike), "most_ssim": max(alike)}
    if math.isfinite(min(clear)):  # equal pictures have no noise to measure
        measured["least_psnr"] = min(clear)
    return verdict(faults, f"SSIM {min(alike):.3f} … {max(alike):.3f}", measured)


def effect(order: Order) -> Outcome:
    """Say whether an artifact shows where it should, and nowhere else."""
    least, most = order.settings["least"], order.settings["most"]
    words = _words(order.the("of"))
    named: list[float] = []
    quiet: list[tuple[list[Any], float, str]] = []
    for row, difference in _differences(order.the("pictures"), order.the("without")):
        if not words or any(stands_in(word, row[2]) for word in words):
            named.append(difference)
        else:
            quiet.append((row, difference, "names none of its words"))
    for given in order.inputs.get("at_zero", []):
        quiet += [(*found, "has it at strength 0") for found in _differences(given, order.the("without"))]
    present = max(named, default=0.0)
    faults = [] if present >= least else [f"no picture shows it: the largest difference is {present:.4f} of {least:g}"]
    if not named:
        faults = ["no prompt of [preset.previews] names its word"]
    faults += [
        f"{PREFIX.format(row[3], row[4])} {where}, and differs by {difference:.4f}"
        for row, difference, where in quiet
        if difference > most
    ]
    absent = max((difference for _, difference, _ in quiet), default=0.0)
    return verdict(faults, f"it changes pictures by up to {present:.3f}", {"present": present, "absent": absent})


def _words(of: Given) -> list[str]:
    """Return the words that call an artifact; none for what takes part in every picture: weights, negative words."""
    called = of.kind == "embedding" and not negative_word(of.facts)
    return list(words_of(of.facts).values()) if called else []


def _differences(one: Given, two: Given) -> list[tuple[list[Any], float]]:
    """Return the pictures of one that the other has too, each with how far apart both are."""
    other = {(row[3], row[4]): row for row in two.pictures}
    found = []
    for row in one.pictures:
        twin = other[row[3], row[4]]
        found.append((row, 0.0 if row[1] == twin[1] else rms(read(row[0]), read(twin[0]))))
    return found
