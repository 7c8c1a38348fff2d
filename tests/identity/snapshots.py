"""What a method means: its key for one recipe, and its defaults. `python -m tests.identity.snapshots` writes both.

It adds what is new and refuses to change what a version that stands in the snapshot means.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sdforge.families import family_names
from sdforge.identity import H
from sdforge.method import method, method_groups
from sdforge.settings import Since, plain, takes
from sdforge.store.entries import Known, Result
from tests.identity.conftest import fixed_world
from tests.planner.conftest import World

HERE = Path(__file__).parent
KEYS, DEFAULTS = HERE / "keys.json", HERE / "defaults.json"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def defaults_of(name: str) -> dict[str, Any]:
    """Return version, code versions, and every setting's default for every family."""
    found = method(name)
    settings = _settings(found.table)
    return {
        "version": found.version,
        "code": found.signature.code,
        "families": dict.fromkeys(family_names(), settings),
    }


def _settings(model: type[BaseModel]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = [m for m in _models(field.annotation) if m.model_fields]
        if inner:
            rows[name] = _settings(inner[0])
        elif not takes(field):
            default = field.get_default(call_default_factory=True)
            rows[name] = "required" if default is PydanticUndefined else plain(default)
            if later := next((m for m in field.metadata if isinstance(m, Since)), None):
                rows[name] = {"since": later.version, "neutral": later.neutral, "default": rows[name]}
    return rows


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def key_of(name: str, recipe: str) -> str:
    """Return the key of the one target of a method in a recipe over artifacts with fixed names."""
    with tempfile.TemporaryDirectory() as folder:
        world = fixed_world(Path(folder))
        world.recipe(recipe)
        if method(name).group == "checks":
            draw(world)
        steps = world.plan().steps.values()
        step = next(step for step in steps if step.node.target.signature.name == name)
    if step.key:
        return step.key
    assert step.artifact is not None  # nothing runs, it is only put together
    return step.artifact.identity


def draw(world: World) -> None:
    """Give all previews results with fixed names, so that what looks at them has a key."""
    for step in world.plan().steps.values():
        if step.node.target.signature.makes == "pictures":
            result = Result(step.key, H("drawn", step.key), "pictures", facts={"column": "d" * 64})
            world.store.keys[step.key] = Known(results=[result])


def write() -> None:
    keys, defaults = read(KEYS), read(DEFAULTS)
    for name in sorted(method_groups()):
        now, before = defaults_of(name), defaults.get(name)
        if before and before != now and before["version"] == now["version"] and not _only_later(name, before, now):
            raise SystemExit(f"the defaults of {name} changed: raise its VERSION")
        defaults[name] = now
        if name in keys:
            keys[name]["key"] = key_of(name, keys[name]["recipe"])
            keys[name]["version"] = now["version"]
    for path, value in ((KEYS, keys), (DEFAULTS, defaults)):
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _only_later(method_name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether all that is new are settings marked `Since`, and inputs, which no key knows that has none of them."""
    old = next(iter(before["families"].values()))
    new = next(iter(now["families"].values()))
    inputs = {name for name in method(method_name).signature.roles if name not in old}
    kept = {name: value for name, value in new.items() if name not in inputs}
    return (_without_later(kept, old), now["code"]) == (old, before["code"])


def _without_later(new: Any, old: Any) -> Any:
    """Leave out what `old` has no row of and is marked `Since`, in tables within tables too."""
    if not isinstance(new, dict) or not isinstance(old, dict):
        return new
    later = {name for name, value in new.items() if isinstance(value, dict) and "since" in value and name not in old}
    return {name: _without_later(value, old.get(name)) for name, value in new.items() if name not in later}


if __name__ == "__main__":
    write()
