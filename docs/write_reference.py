"""Write `docs/reference.md` from the schemas of recipes and `forge.toml`: `python -m docs.write_reference`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdforge.housekeeping import schemas
from sdforge.method import method_groups
from sdforge.names import REFERENCE

LARGE = 2**53 - 1  # a bound that says only that JSON holds the number
PLACE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference

Written by `python -m docs.write_reference` from the schemas; a test holds it to them. The same schemas complete and
check recipes in editors (`.forge/*.schema.json`, written by `forge schema`).

A recipe is `recipes/NAME.toml`. At its top stand `family` (one of {families}), `description` and `seed`; then tables.
A value that names an artifact is a target of the recipe, `RECIPE:TARGET` of another one, or a source.
"""
GROUPS = {
    "merges": "Merges: [METHOD.NAME]",
    "trainings": "Trainings: [METHOD.NAME]",
    "edits": "Edits: [METHOD.NAME]",
}
NAMED = "mbw_preset"  # a setting with so many names that they stand once, at the end
LISTED = ("export", "previews")  # methods that [preset] uses for itself


def reference() -> str:
    """Return the whole page."""
    found = {name: json.loads(text) for name, text in schemas().items()}
    recipe, project, local = (found[f"{name}.schema.json"] for name in ("recipe", "forge", "forge.local"))
    families = ", ".join(f"`{name}`" for name in recipe["properties"]["family"]["enum"])
    parts = [HEAD.format(families=families), *_preset(recipe)]
    for group, title in GROUPS.items():
        parts += _group(recipe, title, [n for n, g in method_groups().items() if g == group and n not in LISTED])
    parts += _checks(recipe)
    parts += ["## forge.toml: the project, in git\n", _rows(project, project)]
    parts += _tables("source", recipe) + _tables("dataset", recipe)
    parts += [f"### [{name}]\n\n{text}" for name, text in _inner((), project)]
    parts += ["## forge.local.toml: this machine, not in git\n", "It goes before `forge.toml`.\n", _rows(local, local)]
    lists = recipe["properties"]["weighted_sum"]["additionalProperties"]["properties"][NAMED]["enum"]
    names = ", ".join(f"`{name}`" for name in lists if name)
    parts += [f"## Lists of block weights that have a name: `{NAMED}`\n\n{names}\n"]
    return "\n".join(parts)


def _preset(recipe: dict[str, Any]) -> Iterator[str]:
    table = recipe["properties"]["preset"]
    yield f"## [preset]\n\n{table['description']}\n\n{_rows(table, recipe)}"
    previews = _resolved(table["properties"]["previews"], recipe)
    yield f"### [preset.previews]\n\n{previews['description']}\n\n{_rows(previews, recipe)}"


def _group(recipe: dict[str, Any], title: str, names: list[str]) -> Iterator[str]:
    """Yield the methods of a group; what all of them have stands once before them."""
    tables = {name: recipe["properties"][name]["additionalProperties"] for name in names}
    first, *others = (table["properties"] for table in tables.values())
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    yield f"## {title}\n"
    if shared:
        yield f"All of them have:\n\n{_rows({'properties': shared}, recipe)}"
    for name, table in tables.items():
        about = table.get("description", recipe["properties"][name]["description"])
        own = {key: value for key, value in table["properties"].items() if key not in shared}
        rows = _rows(table | {"properties": own}, recipe) if own else ""
        yield f"### {name}\n\n{_paragraphs(about)}\n\n{rows}"


def _checks(recipe: dict[str, Any]) -> Iterator[str]:
    kinds = recipe["properties"]["checks"]
    yield f"## Checks: [checks.KIND.NAME]\n\nA recipe says {kinds['description']}.\n"
    for name, tables in kinds["properties"].items():
        table = tables["additionalProperties"]
        about = table.get("description", tables["description"])
        yield f"### {name}\n\n{_paragraphs(about)}\n\n{_rows(table, recipe)}"


def _inner(
    path: tuple[str, ...], table: dict[str, Any], whole: dict[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the tables within a table: their dotted name, and what can be set there; those that are alike once."""
    whole = whole or table
    alike: dict[str, list[str]] = {}
    for name, value in table["properties"].items():
        if "$ref" in value or "allOf" in value:
            alike.setdefault(str(value.get("$ref", name)), []).append(name)
    for first, *others in alike.values():
        found = _resolved(table["properties"][first], whole)
        if "properties" in found:
            names = "], [".join(".".join((*path, name)) for name in (first, *others))
            yield names, f"{found.get('description', '')}\n\n{_rows(found, whole)}"
            yield from _inner((*path, first), found, whole)


def _tables(key: str, recipe: dict[str, Any]) -> list[str]:
    table = recipe["properties"][key]["additionalProperties"]
    return [f"### [{key}.NAME], in forge.toml or in a recipe\n\n{table['description']}\n\n{_rows(table, recipe)}"]


def _rows(table: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return a table's settings as rows."""
    required = table.get("required", [])
    rows = ["| setting | value | default | |", "| --- | --- | --- | --- |"]
    for name, value in table["properties"].items():
        default = "needed" if name in required else _default(value)
        about = _cell(value.get("description", ""))
        value = value if name != NAMED else {"type": "string"}
        rows.append(f"| `{name}` | {_cell(_kind(value, whole))} | {_cell(default)} | {about} |")
    return "\n".join(rows) + "\n"


def _default(value: dict[str, Any]) -> str:
    found = value.get("default")
    return (
        "" if found in (None, "", [], {}) or isinstance(found, dict) else f"`{json.dumps(found, ensure_ascii=False)}`"
    )


def _kind(value: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return in words what a value may be."""
    if "$ref" in value or "allOf" in value:
        found = _resolved(value, whole)
        return "table" if "properties" in found else _kind(found, whole)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(each, whole) for each in value["anyOf"] if each.get("type") != "null"))
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"] if each != "")
    if "const" in value:
        return f"`{value['const']}`"
    kind = value.get("type")
    if kind == "array":
        return f"list of {_kind(value.get('items', {}), whole)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"table: name → {_kind(inner, whole)}" if isinstance(inner, dict) else "table"
    if value.get("pattern") == REFERENCE:
        return "a name"
    words = {"string": "text", "number": "number", "integer": "whole number", "boolean": "true, false"}
    return words.get(str(kind), "value") + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    low, high = value.get("minimum"), value.get("maximum")
    above, below = value.get("exclusiveMinimum"), value.get("exclusiveMaximum")
    high, below = (None if bound and bound >= LARGE else bound for bound in (high, below))
    words = [f"from {low:g}" if low is not None else f"above {above:g}" if above is not None else ""]
    words += [f"to {high:g}" if high is not None else f"below {below:g}" if below is not None else ""]
    return "".join(f" {word}" for word in words if word)


def _resolved(value: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    ref = value.get("$ref") or value["allOf"][0]["$ref"]
    found: dict[str, Any] = whole["$defs"][ref.rpartition("/")[2]]
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _paragraphs(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines()).replace("<", "&lt;")


if __name__ == "__main__":
    PLACE.write_text(reference(), encoding="utf-8")
