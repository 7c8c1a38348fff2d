"""A recipe that nobody has read cannot reach outside: no file, no network, no program; and no secret gets anywhere.

An audit hook (PEP 578) in every process of `forge` notes what is opened, connected and started.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import METHODS, Project

ROOT = Path(__file__).parents[2]
HOOK = """
import json, os, sys

fd = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STARTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.startfile")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

def shown(value):
    paths = isinstance(value, (str, bytes, os.PathLike))
    return os.path.abspath(os.fsdecode(value)) if paths else repr(value)

def note(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        row = [event, shown(arguments[0]), bool((arguments[2] or 0) & WRITES)]
    elif event in CHANGES:
        row = [event, *map(shown, arguments)]
    elif event.startswith(STARTS):
        row = [event, *map(repr, arguments)]
    else:
        return
    os.write(fd, (json.dumps(row) + "\\n").encode())

sys.addaudithook(note)
"""
RECIPE = """\
family = "sd15"

[weighted_sum.soft]
checkpoints = ["base", "second"]
weights = [0.6, 0.4]

[rehearsal.a]
on = "soft"
dataset = "drawings"

[preset]
checkpoint = "a"
"""
SECRETS = {
    "HF_TOKEN": "hf_CANARYonethatnobodymaysee",
    "CIVITAI_TOKEN": "civitai-CANARY-two",
    "AWS_SECRET_ACCESS_KEY": "aws/CANARY/three",
    "GITHUB_TOKEN": "ghp_CANARYfour",
}


@pytest.fixture
def watched(project: Project, tmp_path: Path) -> Project:
    """A project with a merge (torch) and a training, whose processes are all listened to."""
    project.recipe.write_text(RECIPE)
    with (project.root / "forge.toml").open("a") as file:
        file.write('\n[source.second]\nfrom = "second"\n')
    os.rename(project.root / "base", project.root / "second")  # noqa: PTH104
    shutil.copytree(project.root / "second", project.root / "base")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    project.environment |= {
        "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}",
        "AUDIT_LOG": str(tmp_path / "audit.log"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return project


def noted(project: Project) -> list[list[str]]:
    return [json.loads(line) for line in Path(project.environment["AUDIT_LOG"]).read_text().splitlines()]


def may_read(path: str, project: Project) -> bool:
    """Say whether a path is the project's, Python's own, or one by which libraries learn about the machine."""
    own = [str(project.root), str(METHODS), str(ROOT / "sdforge"), str(ROOT / "constraints.txt")]
    own += [project.environment["PYTHONPATH"].partition(os.pathsep)[0]]
    python = [sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), *sys.path]
    machine = [
        "/proc/",
        "/sys/",
        "/dev/null",
        "/dev/urandom",
        "/dev/shm",
        "/etc/ld.so",
        "/etc/localtime",
        "/lib",
        "/usr/",
    ]
    machine += ["/etc/mime.types", "/etc/httpd", "/etc/apache", "/etc/os-release", f"/tmp/sdforge-{os.getuid()}/"]
    return any(path.startswith(place) for place in own + [p for p in python if p] + machine)


def may_write(path: str, project: Project) -> bool:
    places = [str(project.root), "/dev/null", "/dev/shm", "/proc/self", f"/tmp/sdforge-{os.getuid()}"]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return any(path.startswith(place) for place in [*places, *([runtime] if runtime else []), _temporary()])


def _temporary() -> str:
    """Where libraries try whether they may write, with names of their own."""
    return f"{tempfile.gettempdir()}/tmp"


def test_planning_and_building_reach_nothing_outside(watched: Project) -> None:
    watched.forge("plan")
    watched.forge("build")
    rows = noted(watched)
    opened = [row for row in rows if row[0] == "open"]
    assert len(opened) > 100  # the hook listens
    assert [row[1] for row in opened if not may_read(row[1], watched) and not may_write(row[1], watched)] == []
    assert [row[1] for row in opened if row[2] and not may_write(row[1], watched)] == []
    changed = [
        row for row in rows if row[0] in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link")
    ]
    assert changed
    assert [row for row in changed if not may_write(row[1], watched)] == []


def test_no_socket_is_connected_and_no_program_started_but_the_worker(watched: Project) -> None:
    watched.forge("build")
    rows = noted(watched)
    sockets = [row for row in rows if row[0].startswith("socket.")]
    assert {row[0] for row in sockets} <= {"socket.__new__", "socket.sendmsg"}  # none is bound, connected or resolved
    assert all("family=1," in row[1] or row[2] in ("1", "-1") for row in sockets), sockets  # AF_UNIX: the worker's pair
    started = [row for row in rows if row[0].startswith(("subprocess.", "os.exec", "os.posix_spawn", "os.system"))]
    assert all("sdforge.run" in " ".join(row) for row in started), started
    assert len([row for row in started if row[0] == "subprocess.Popen"]) == 1


HOSTILE = {
    "up": 'from = "../outside.safetensors"',
    "absolute": 'from = "/etc/passwd"',
    "home": 'from = "~/.ssh/id_rsa"',
    "variable": 'from = "$HOME/x.safetensors"',
    "device": 'from = "/dev/zero"',
    "a link out": 'from = "link.safetensors"',
    "a link to a folder": 'from = "folder/x.safetensors"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_source_outside_the_project_is_never_opened(watched: Project, name: str) -> None:
    outside = watched.root.parent / "outside.safetensors"
    outside.write_bytes(b"secret")
    (watched.root / "link.safetensors").symlink_to(outside)
    (watched.root / "folder").symlink_to(watched.root.parent)
    (watched.root.parent / "x.safetensors").write_bytes(b"secret")
    watched.recipe.write_text(f"{RECIPE}\n[source.evil]\n{HOSTILE[name]}\n".replace('"second"]', '"evil"]'))
    ran = watched.forge("build", code=2)
    assert "secret" not in ran.out + ran.err
    opened = [row[1] for row in noted(watched) if row[0] == "open"]
    assert [path for path in opened if not may_read(path, watched) and not may_write(path, watched)] == []


def test_a_secret_appears_nowhere(project: Project) -> None:
    project.environment |= SECRETS
    text = "".join(map(str, [project.start(*command).communicate(timeout=120) for command in _commands(project)]))
    assert "built" in text
    assert "Traceback" in text  # with --debug
    files = {str(p): p.read_bytes() for p in project.root.rglob("*") if p.is_file()}
    assert len(files) > 30
    for name, secret in SECRETS.items():
        assert secret not in text, name
        assert [path for path, data in files.items() if secret.encode() in data] == [], name


def _commands(project: Project) -> list[tuple[str, ...]]:
    """Commands that succeed, one that fails in the worker, one that is wrong, and what shows of records and logs."""
    text = 'family = "sd15"\n[rehearsal.a]\non = "base"\ndataset = "drawings"\nfails = true\n'
    (project.root / "recipes" / "bad.toml").write_text(text)
    build = [("build", "--json"), ("build", "bad"), ("build", "--debug", "nowhere")]
    return [*build, ("plan", "bad"), ("why", "toy:a"), ("show", "toy:a"), ("log",), ("graph",), ("verify",), ("list",)]
