"""HTML and SVG that cannot be broken by what people wrote: whatever is not `Markup` already is escaped."""

from __future__ import annotations

from html import escape

VOID = {"meta", "img", "line", "rect", "circle", "path", "polyline"}  # elements without an inside


class Markup(str):
    """Text that is markup already. Made by `element` and `joined` alone, and from texts that stand in our code."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return a value as text of a page: escaped, and without control characters, which HTML knows no way to write."""
    if isinstance(value, Markup):
        return value
    plain = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(value))
    return Markup(escape(plain, quote=True))


def joined(*inner: object, by: str = "") -> Markup:
    """Return things one after the other, as markup."""
    return Markup(text(by).join(text(each) for each in inner))


def element(tag: str, *inner: object, **attributes: object) -> Markup:
    """Return an element. `_` at the end of an attribute's name is left out, other ones become `-`.

    An attribute that is None or False is not written, one that is True stands without a value.
    """
    written = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written.append(name if value is True else f'{name}="{text(value)}"')
    start = " ".join(written)
    return Markup(f"<{start}/>" if tag in VOID else f"<{start}>{joined(*inner)}</{tag}>")
