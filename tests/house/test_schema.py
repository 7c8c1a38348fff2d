"""The committed schemas are those of the code, and an editor that reads them finds mistakes where they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdforge.cli import main
from sdforge.housekeeping import schemas
from sdforge.method import is_target, method, method_groups

ROOT = Path(__file__).parents[2]
TAPLO = Path(sys.executable).with_name("taplo")  # of the same environment, whether or not that is active


def lint(folder: Path, file: str, schema: str) -> tuple[int, list[int]]:
    """Lint a file against a schema; return the exit code and the lines that are complained of."""
    address = (ROOT / ".forge" / schema).as_uri()
    command = [str(TAPLO), "lint", "--no-auto-config", "--schema", address, str(folder / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, [int(n) for n in re.findall(rf"{re.escape(file)}:(\d+):\d+", done.stdout + done.stderr)]


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_committed_schema_is_up_to_date(name: str) -> None:
    text = (ROOT / ".forge" / name).read_text(encoding="utf-8")
    assert text == schemas()[name], "`forge schema` writes it"


def test_forge_schema_says_whether_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forge.toml").write_text("")
    assert main(["-C", str(tmp_path), "schema", "--check"]) == 2
    assert main(["-C", str(tmp_path), "schema"]) == 0
    assert main(["-C", str(tmp_path), "schema", "--check"]) == 0
    assert capsys.readouterr().out.endswith("the schemas are up to date\n")


def test_a_schema_that_is_no_text_any_more_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "forge.toml").touch()
    (tmp_path / ".forge").mkdir()
    (tmp_path / ".forge" / "recipe.schema.json").write_bytes(b"\xff")
    assert main(["-C", str(tmp_path), "schema", "--check"]) == 2
    assert main(["-C", str(tmp_path), "schema"]) == 0
    assert main(["-C", str(tmp_path), "schema", "--check"]) == 0


def test_a_recipe_may_hold_every_method_and_nothing_else() -> None:
    schema = json.loads(schemas()["recipe.schema.json"])
    own = {"family", "description", "seed", "source", "dataset", "preset", "variant", "sweep", "checks"}
    assert set(schema["properties"]) - own == {name for name in method_groups() if is_target(name)}
    checks = {name for name, group in method_groups().items() if group == "checks"}
    assert set(schema["properties"]["checks"]["properties"]) == checks
    assert schema["additionalProperties"] is False


def test_the_schema_has_no_unions() -> None:
    """Editors complete and check what is one thing; `anyOf` they do not."""
    text = "".join(schemas().values())
    assert "anyOf" not in text
    assert "oneOf" not in text


def test_every_table_of_the_schema_is_closed() -> None:
    for name in method_groups():
        assert method(name).table.model_json_schema()["additionalProperties"] is False


def test_the_shipped_recipes_hold_to_the_schema() -> None:
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert lint(path.parent, path.name, "recipe.schema.json") == (0, [])


def test_the_shipped_project_holds_to_the_schema() -> None:
    assert lint(ROOT, "forge.toml", "forge.schema.json") == (0, [])


GOOD = """family = "sd15"
[weighted_sum.soft]
checkpoints = ["flat", "ink"]
weights = [0.6, 0.4]
[lora.sketchy]
on = "soft"
dataset = "sketches"
rank = 8
[preset]
checkpoint = "soft"
bake = { sketchy = 0.8 }
export = ["loras"]
[preset.previews]
prompts = ["a girl"]
"""


def test_a_sound_recipe_holds_to_the_schema(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(GOOD)
    assert lint(tmp_path, "r.toml", "recipe.schema.json") == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('family = "sd15"', 'family = "sd16"', 1),
        ('family = "sd15"', "family = 15", 1),
        ("[weighted_sum.soft]", "[weighted_sum.Soft]", 2),
        ("weights = [0.6, 0.4]", 'weights = ["0.6", 0.4]', 4),
        ("rank = 8", "rank = 0", 8),
        ("rank = 8", "ranc = 8", 8),
        ("rank = 8", 'rank = "8"', 8),
        ('on = "soft"', 'on = "../soft.safetensors"', 6),
        ("bake = { sketchy = 0.8 }", "bake = { sketchy = { strength = 0.8 } }", 11),
        ('export = ["loras"]', 'export = ["lora"]', 12),
        ('prompts = ["a girl"]', 'prompts = "a girl"', 14),
    ],
)
def test_a_planted_mistake_is_reported_in_its_line(tmp_path: Path, old: str, new: str, line: int) -> None:
    assert old in GOOD
    (tmp_path / "r.toml").write_text(GOOD.replace(old, new))
    code, lines = lint(tmp_path, "r.toml", "recipe.schema.json")
    assert code != 0
    assert line in lines
