"""What a name looks like: of recipes, targets, sources and data sets."""

from __future__ import annotations

NAME = r"^[a-z][a-z0-9_-]{0,63}$"
# NAME, RECIPE:NAME, preset.STEP, check.CHECK.without.STEP
REFERENCE = r"^([a-z][a-z0-9_-]{0,63}:)?(preset\.|check\.([a-z][a-z0-9_-]{0,63}\.){2})?[a-z][a-z0-9_-]{0,63}$"


# what Windows takes for devices, with any ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def is_name(text: str) -> bool:
    """Say whether a text is a name: small letters, digits, - and _, at most 64, beginning with a letter."""
    return (
        0 < len(text) <= 64
        and text not in DEVICES
        and text[0].isascii()
        and text[0].islower()
        and all(c.isascii() and (c.islower() or c.isdigit() or c in "-_") for c in text)
    )


def is_reference(text: str) -> bool:
    """Say whether a text names a target or source as a recipe may: NAME, RECIPE:NAME, preset.STEP."""
    recipe, colon, name = text.rpartition(":")
    return (not colon or is_name(recipe)) and is_name(name.removeprefix("preset."))
