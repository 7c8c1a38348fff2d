"""What a name looks like: of recipes, targets, sources and data sets; and of bytes, which is their sha256."""

from __future__ import annotations

import re

DIGEST = r"^[0-9a-f]{64}$"
NAME = r"^[a-z][a-z0-9_-]{0,63}$"
# NAME, RECIPE:NAME, RECIPE@VARIANT:NAME, preset.STEP, check.CHECK.without.STEP
REFERENCE = (
    r"^([a-z][a-z0-9_-]{0,63}(@[a-z][a-z0-9_-]{0,63})?:)?"
    r"(preset\.|check\.([a-z][a-z0-9_-]{0,63}\.){2})?[a-z][a-z0-9_-]{0,63}$"
)


ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin")  # of files that are named where a name belongs
# what Windows takes for devices, with any ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def is_digest(text: str) -> bool:
    """Say whether a text is a sha256 as we write it."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def is_name(text: str) -> bool:
    """Say whether a text is a name: small letters, digits, - and _, at most 64, beginning with a letter."""
    return (
        0 < len(text) <= 64
        and text not in DEVICES
        and text[0].isascii()
        and text[0].islower()
        and all(c.isascii() and (c.islower() or c.isdigit() or c in "-_") for c in text)
    )


def is_path(text: str) -> bool:
    """Say whether a text is meant as a file or folder, where a name belongs too."""
    return "/" in text or text.endswith(ENDINGS)


def hint_at_name(text: str) -> str:
    """Return what to do about a text that is no name: the name that was meant, where that is clear."""
    stem = text.rpartition("/")[2].removesuffix(".toml")
    meant = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-")
    rule = "small letters, digits, - and _, at most 64, a letter first"
    return f"{rule}: as in {meant!r}" if is_name(meant) and meant != text else rule


def is_reference(text: str) -> bool:
    """Say whether a text names a target or source as a recipe may: see REFERENCE."""
    recipe, colon, name = text.rpartition(":")
    home, mark, variant = recipe.partition("@")
    named = not colon or (is_name(home) and (not mark or is_name(variant)))
    return named and is_name(name.removeprefix("preset."))
