"""What pydantic complains of, in the words of recipes and with the place in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args

from sdforge.elsewhere import our_setting, our_value
from sdforge.errors import Problem, UsageError, nearest
from sdforge.exact import complement
from sdforge.hidden import hidden
from sdforge.method import per_block
from sdforge.names import DIGEST, REFERENCE, hint_at_name, is_path
from sdforge.places import DEVICE, VRAM
from sdforge.references import refuse_secrets
from sdforge.syntax import Document

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

MOST_CHOICES = 12  # that a sentence lists
FORMS = {  # pattern → how it is written
    VRAM: 'as in "8GB" or "500MiB"',
    DEVICE: "one of auto, cpu, cuda, cuda:N",
    DIGEST: "64 of 0-9 and a-f, in small letters",
}
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?")  # that somebody has put into quotes
NUMBERS = re.compile(r"\s*,\s*|\s+")  # what stands between several


def explain(
    error: ValidationError, model: type[BaseModel], document: Document, path: tuple[str, ...]
) -> Iterator[Problem]:
    """Yield a problem for each complaint of pydantic, in the words of recipes."""
    for fault in error.errors(include_url=False):
        kind = fault["type"]
        if kind == "none_required":  # the other half of an optional setting's complaint
            continue
        place = _walked(fault["loc"], document, path)
        where = (*path, *place)
        name = _spelled(place) or path[-1]
        what = ".".join(path) or document.file
        if kind == "extra_forbidden":
            known = _known(model, place[:-1])
            hint = _other_word(str(place[-1]), known)
            yield Problem("unknown-setting", f"`{name}` is no setting of {what}", document.place(*where), hint)
        elif kind == "missing":
            table = ".".join(map(str, where[:-1])) or document.file
            yield Problem("missing", f"{table} needs `{place[-1]}`", document.place(*where[:-1]), "")
        else:
            sentence, written = _sentence(fault), document.place(*where, value=True)
            hint = _other_list(fault, model, place, _at(document, path)) or _other_value(fault, _known(model, place))
            yield Problem("setting", f"`{name}` {sentence}", written, hint)


def secrets_in(addresses: Iterable[tuple[tuple[str, ...], str]], document: Document) -> Iterator[Problem]:
    """Yield a problem for each address with a secret, before anything that was read is kept.

    addresses: (path in the document, what stands there).
    """
    for path, address in addresses:
        try:
            refuse_secrets(address)
        except UsageError as error:
            yield Problem("secret", error.message, document.place(*path, value=True), error.hint)


def _other_word(word: str, known: list[str]) -> str:
    """Return a hint at the setting that was meant."""
    if elsewhere := our_setting(word, known):
        return elsewhere
    guess = nearest(word, known)
    return f"did you mean `{guess}`?" if guess else f"it has {', '.join(sorted(known)) or 'none'}"


def _other_list(fault: Any, model: Any, place: tuple[int | str, ...], table: Any) -> str:
    """Return a hint at the list that was meant by a number, or by numbers in quotes; table: in which it stands."""
    given = fault["input"]
    if fault["type"] != "list_type" or not isinstance(given, str | int | float):
        return ""
    if isinstance(given, str):
        numbers = NUMBERS.split(given.strip())
        return f"[{', '.join(numbers)}]" if all(map(NUMBER.fullmatch, numbers)) else ""
    varies, each = per_block(model), table.get("checkpoints")
    if not isinstance(each, list) or len(each) < 2 or place[0] not in ("blocks", varies):
        return ""
    shares = any(getattr(mark, "shares", False) for mark in model.model_fields[varies].metadata)
    if shares and len(each) == 2:
        return f"[{complement(given):g}, {given}]"
    return f"[{given}, …]: a number for each of the {len(each)} checkpoints"


def _other_value(fault: Any, known: list[str]) -> str:
    """Return a hint at the value that was meant, or at the form that it has; known: the settings of a table there."""
    kind, given = fault["type"], fault["input"]
    if kind == "literal_error":
        guess = our_value(str(given), _choices(fault)) or nearest(str(given), _choices(fault))
        return f"did you mean {guess!r}?" if guess else ""
    if kind == "list_type" and isinstance(given, str | int | float):
        return f"[{json.dumps(given, ensure_ascii=False)}]"
    if kind in ("dict_type", "model_type") and isinstance(given, list) and all(isinstance(n, str) for n in given):
        return f"{{ {', '.join(f'{name} = 1.0' for name in given)} }}"
    if kind == "model_type" and type(given) in (int, float) and "strength" in known:
        return f"{{ strength = {given} }}"
    if kind in ("int_type", "float_type") and isinstance(given, str) and NUMBER.fullmatch(given):
        return f"without quotes: {given}"
    pattern = fault["ctx"]["pattern"] if kind == "string_pattern_mismatch" else ""
    if pattern == REFERENCE:
        if is_path(given):
            return "a path is declared and gets a name: `forge add NAME PATH`, or [dataset.NAME] for pictures"
        return "a target of another recipe is RECIPE:NAME" if "." in given else hint_at_name(given)
    return FORMS.get(pattern, "")


def _at(document: Document, path: tuple[str, ...]) -> Any:
    value: Any = document.values
    for table in path:
        value = value.get(table, {}) if isinstance(value, dict) else {}
    return value


def _walked(location: tuple[int | str, ...], document: Document, path: tuple[str, ...]) -> tuple[int | str, ...]:
    """Return pydantic's location without what stands in no document: names of unions' members and `[key]`."""
    value = _at(document, path)
    kept: list[int | str] = []
    for i, part in enumerate(location):
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            kept.append(part)
            value = value[part]
        elif i == len(location) - 1 and isinstance(value, dict) and part != "[key]":
            kept.append(part)  # what is missing
    return tuple(kept)


def _spelled(place: tuple[int | str, ...]) -> str:
    """Return a location as a person writes it: `blocks.unet.mid`, `weights[2]` (counted from 1)."""
    text = ""
    for part in place:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _known(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """Return the settings of the (sub-)table in which an unknown one stands."""
    for part in place:
        if isinstance(part, str) and hasattr(model, "model_fields") and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
            model = inner[0] if inner else model
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]


def _choices(fault: Any) -> list[str]:
    """Return the words that a setting may have, without the empty one."""
    return [word.strip("'") for word in fault["ctx"]["expected"].replace(" or ", ", ").split(", ") if word != "''"]


def _sentence(fault: Any) -> str:
    kind, context, given = fault["type"], fault.get("ctx", {}), fault.get("input")
    shown = hidden(json.dumps(given, default=str, ensure_ascii=False))
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    if kind in ("int_type", "int_from_float"):
        return f"is a whole number, not {shown}"
    if kind in ("float_type", "finite_number"):
        return f"is a number, not {shown}"
    if kind == "bool_type":
        return f"is true or false, not {shown}"
    if kind == "string_type":
        return f"is text, not {shown}"
    if kind in ("list_type", "dict_type", "model_type"):
        return f"is a {'list' if kind == 'list_type' else 'table'}, not {shown}"
    if kind == "literal_error":
        known = _choices(fault)
        listed = ", ".join(map(repr, known[:MOST_CHOICES])) + (" …" if len(known) > MOST_CHOICES else "")
        return f"is one of {listed}, not {shown}"
    if kind == "string_pattern_mismatch":
        return f"is no name: {shown}" if context["pattern"] == REFERENCE else f"cannot be {shown}"
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
        "multiple_of": ("multiple_of", "a multiple of"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return f"is {words} {context[key]:g}, not {shown}"
    if kind in ("too_short", "string_too_short"):
        return f"holds at least {context['min_length']}, not {len(given)}" if given else "is empty"
    if kind in ("too_long", "string_too_long"):
        return f"holds at most {context['max_length']}, not {len(given)}"
    return f"does not fit: {fault['msg'].lower()}"
