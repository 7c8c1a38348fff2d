"""The commonest build does nothing, and does it with its hands in its pockets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import FORGE, METHODS, Project, new_project

WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
STRACE = "openat,open,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,socket,connect,execve,fork,vfork"


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    """A project that has been built, and looked at once more when its files were no longer new."""
    project = new_project(tmp_path_factory.mktemp("null") / "project", toy_checkpoint)
    project.build()
    time.sleep(2.1)
    project.build()
    return project


def environment(project: Project) -> dict[str, str]:
    own = {"FORGE_METHODS": str(METHODS), "REHEARSAL_LOG": str(project.root / "rehearsal.log")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FORGE_", "PYTHONDONTWRITE"))}
    return clean | own


def test_it_opens_only_the_index_and_small_texts_and_writes_nothing(settled: Project, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", f"trace={STRACE}", "-o", str(trace), str(FORGE), "build"]
    subprocess.run(command, cwd=settled.root, env=environment(settled), check=True, capture_output=True)
    lines = [line.partition(" ")[2].strip() for line in trace.read_text().splitlines()]
    opened = [line for line in lines if line.startswith(("open", "creat")) and "= -1" not in line]
    wrote = [line for line in opened if WRITES.search(line) and "/dev/null" not in line and "__pycache__" not in line]
    assert wrote == []
    assert [line for line in lines if line.startswith(("rename", "unlink", "mkdir", "socket", "connect"))] == []
    assert len([line for line in lines if line.startswith("execve")]) == 1
    ours = {m[1] for line in opened if (m := re.search(r'"([^"]+)"', line)) and str(settled.root) in m[1]}
    ours |= {m[1] for line in opened if (m := re.search(r'"((?!/)[^"]+)"', line))}
    names = {Path(path).name for path in ours}
    assert names <= {"forge.toml", "forge.lock", "forge.local.toml", "toy.toml", "index.db", "recipes", "project"}
    assert not any("torch" in line or "pydantic" in line or "numpy" in line for line in opened)


def test_it_leaves_nothing_running_and_changes_no_file(settled: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in settled.root.rglob("*")}
    process = settled.start("build", "--json")
    out, _ = process.communicate()
    assert json.loads(out.splitlines()[-1])["event"] == "result"
    assert {path: path.stat().st_mtime_ns for path in settled.root.rglob("*")} == before
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_it_needs_little_memory(settled: Project) -> None:
    """80 MB are allowed; no more than that whatever else this process has started."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code, str(FORGE), "build"],
        cwd=settled.root,
        env=environment(settled),
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(ran.stdout) < 80 * 1000


def test_it_works_where_nothing_can_be_written(settled: Project) -> None:
    root = str(settled.root)
    (settled.root / "drawings" / "0.png").touch()  # so that there would be something to note
    script = f"mount --bind {root} {root} && mount -o remount,ro,bind {root} && cd {root} && "
    script += f"! touch written 2>/dev/null && {FORGE} build && {FORGE} plan && {FORGE} why preset.export && "
    script += f"{FORGE} build --retrain c; echo $?"
    mounted = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("this machine does not let us mount anything")
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env=environment(settled),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing to do" in ran.stdout
    assert ran.stdout.endswith("\n4\n")
    assert "FORGE_CACHE names another cache" in ran.stderr
