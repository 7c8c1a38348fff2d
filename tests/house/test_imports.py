"""Imports go down; what plans needs neither torch nor a schema library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sdforge.families import family_names

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "sdforge"
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub")
ADAPTERS = (".draw", ".adapter", ".load", ".forms")  # files beside a method or family that only the worker imports

# from the bottom up, as DESIGN §3 lists the house; a module may import its own floor and those below
FLOORS = (
    {"slips", "elsewhere", "hidden", "kernel"},
    {"errors", "identity", "licences", "toml", "names", "dtypes", "exact", "sampler", "wire", "references", "signing"},
    {"pictures", "artifact", "settings", "syntax", "places", "index", "variants", "selection"},
    {"store.files", "store.entries", "store.seen", "verdict", "devices"},
    {"store", "formats", "families", "formula", "file_layout", "order", "ref", "datasets", "blocks", "lines"},
    {"method", "merges", "trainings", "edits", "checks", "tables", "target", "complaints", "implicit", "recipe"},
    {"project", "graph", "lock", "remotes", "repack", "picture_advice", "written"},
    {"plan", "import_step", "sources", "outputs", "drawn", "looks", "chronicle"},
    {"manifest", "fitting", "moving", "needs", "planner"},
    {"one_pass"},
    {"report", "session", "lockfile", "orders", "explain", "run", "results", "grids", "advice", "room", "placing"},
    {"chapters", "report.story", "report.page", "report.card"},
    {"sidecars", "telling"},
    {"sharing"},
    {"executors", "resources", "under_way", "ready", "interrupts", "intake", "build", "bounded", "fetch", "exchange"},
    {"install", "nearby"},
    {"commands", "looking", "describe", "convert", "housekeeping", "verify", "made_again", "doctor", "notebook"},
    {"disk", "rebuild", "difference", "imports", "trial"},
    {"arguments", "cli"},
    {"__main__"},
)


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name → file."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path, *, lazily: bool) -> set[str]:
    """What a file imports when it is imported (`lazily`: also within functions), but not for types alone."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazily:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module or ""
                for a in node.names
            }
        todo += ast.iter_child_nodes(node)
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name == "sdforge" or name.startswith("sdforge.")}


def floor(name: str) -> int:
    inner = "run" if name.endswith(ADAPTERS) else name.removeprefix("sdforge").lstrip(".")
    for end in range(inner.count(".") + 1, 0, -1):
        start = ".".join(inner.split(".")[:end])
        for number, names in enumerate(FLOORS):
            if start in names:
                return number
    return -1


def test_every_module_has_its_floor() -> None:
    assert [name for name in MODULES if floor(name) < 0] == ["sdforge"]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    above = {other for other in ours(imported(MODULES[name], lazily=False)) if floor(other) > floor(name)}
    assert above == set()


def named(path: Path) -> set[str]:
    """What a file names of the package: imports wherever they stand, those for types too, and modules as texts."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found & MODULES.keys()


def circle(knows: dict[str, set[str]]) -> set[str]:
    """Return the modules that a circle keeps from standing above others."""
    left = dict(knows)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return set(left)


def test_no_circle_of_imports() -> None:
    assert (
        circle({name: ours(imported(path, lazily=False)) - {name, "sdforge"} for name, path in MODULES.items()})
        == set()
    )


def test_no_circle_of_names_either() -> None:
    """Also not lazily, by name or for types; but a folder runs its own adapter, which reads what the folder states."""
    knows = {name: named(path) - {name, "sdforge"} for name, path in MODULES.items()}
    own = {name: {other for other in knows[name] if other.startswith(f"{name}.")} for name in knows}
    assert circle({name: others - own[name] for name, others in knows.items()}) == set()


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_what_only_stands_beside_it(name: str) -> None:
    tops = {each.partition(".")[0] for each in imported(MODULES[name], lazily=True)}
    assert not tops & {"tests", "demo", "benchmarks", "pytest", "hypothesis"}


@pytest.mark.parametrize(
    "name", [m for m in MODULES if not m.startswith(("sdforge.run", "sdforge.sidecars")) and not m.endswith(ADAPTERS)]
)
def test_no_module_above_the_line_imports_heavy_libraries(name: str) -> None:
    tops = {each.partition(".")[0] for each in imported(MODULES[name], lazily=False)}
    assert not tops & set(HEAVY)


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith(("sdforge.trainings", "sdforge.families"))])
def test_a_training_names_no_family_and_a_family_no_training(name: str) -> None:
    # what all families share may be asked: a picture is looked at by CLIP whatever draws it
    others = [f"sdforge.families.{each}" for each in family_names()] if ".trainings" in name else ["sdforge.trainings"]
    assert not any(each.startswith(tuple(others)) for each in imported(MODULES[name], lazily=True))


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after some code."""
    text = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, check=True, timeout=120, cwd=ROOT, text=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_alone_loads_neither_torch_nor_a_schema_library() -> None:
    found = loaded_by(
        "import sdforge.cli, sdforge.session, sdforge.plan, sdforge.lockfile, sdforge.explain, sdforge.telling"
    )
    assert not found & {*HEAVY, "PIL", "pydantic", "rich", "tree_sitter", "tomli"}


@pytest.mark.parametrize(
    "command", ["build", "plan", "commands", "looking", "housekeeping", "outputs", "sources", "orders"]
)
def test_no_module_of_the_builder_loads_torch(command: str) -> None:
    assert not loaded_by(f"import sdforge.{command}") & {*HEAVY, "PIL"}


def test_reading_a_recipe_and_asking_every_method_loads_no_torch() -> None:
    found = loaded_by(
        "from sdforge.method import method, method_groups\n[method(n).signature for n in method_groups()]"
    )
    assert "pydantic" in found
    assert not found & set(HEAVY)


def test_writing_schemas_and_listing_families_loads_no_torch() -> None:
    code = "from sdforge.housekeeping import schemas\nschemas()\n"
    code += "from sdforge.families import family, family_names\n[family(n).names() for n in family_names()]"
    assert not loaded_by(code) & {*HEAVY, "PIL"}


@pytest.mark.parametrize(
    "arguments", [["check"], ["list"], ["list", "--methods"], ["graph", "r"], ["plan", "r"], ["du"]]
)
def test_a_command_that_only_looks_loads_no_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "forge.toml").write_text("")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text('family = "sd15"\n')
    code = f"from sdforge.cli import main\nmain(['-C', {str(tmp_path)!r}, *{arguments!r}])"
    assert not loaded_by(code) & {*HEAVY, "PIL"}
