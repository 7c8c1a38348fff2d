"""`forge doctor` finds what is wrong with a machine, says what to do, and exits with what it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sdforge.doctor as doctor
from sdforge.cli import main
from sdforge.run.golden import VECTORS, digest

WELL: dict[str, Any] = {
    "differing": [],
    "vectors": 7,
    "seconds": 0.1,
    "processor": "AVX2",
    "kernel": "",
    "built_for": "",
    "gpus": [],
    "unfit": {},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project; the child that would import torch says that all is well."""
    (tmp_path / "forge.toml").write_text("")
    pretend(monkeypatch)
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(WELL | changed), "")

    monkeypatch.setattr(doctor.subprocess, "run", run)


def examine(root: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, dict[str, Any]]:
    """Return what it finds, by name."""
    capsys.readouterr()
    assert main(["-C", str(root), "doctor", "--json"]) == code
    return {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def test_it_looks_at_a_machine_from_its_source_too(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def requires(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert examine(root, capsys)["libraries"]["state"] == "well"


def test_it_says_whether_the_compiled_kernel_computes_merges(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine(root, capsys)["kernel"]["state"] == "well"
    pretend(monkeypatch, kernel="it is not compiled")
    found = examine(root, capsys)["kernel"]
    assert (found["state"], found["code"]) == ("note", 0)
    assert found["text"].endswith("it is not compiled")
    assert "python -m sdforge.kernel" in found["hint"]


def test_a_gpu_that_sorts_otherwise_than_the_processor_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "selection" not in examine(root, capsys)
    pretend(monkeypatch, unfit={"cuda:1": "it selects otherwise than the processor"})
    found = examine(root, capsys)["selection"]
    assert (found["state"], found["code"]) == ("note", 0)
    assert found["text"].startswith("cuda:1 leaves choosing and ranking of merges to the processor")


@pytest.mark.parametrize("name", VECTORS)
def test_a_golden_vector_has_the_bytes_that_the_doctor_expects(name: str) -> None:
    assert digest(name) == VECTORS[name][1]


def test_the_child_computes_the_golden_vectors() -> None:
    (found, kernel, devices) = doctor._computing()
    assert (found.code, kernel.code, devices.code) == (0, 0, 0)
    assert f"{len(VECTORS)} known results come out right" in found.text


def test_a_machine_that_is_well_has_nothing_to_mend(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(root, capsys)
    assert {row["code"] for row in found.values()} == {0}
    assert {"python", "libraries", "arithmetic", "devices", "memory", "disk", "file system", "clock", "cache"} <= set(
        found
    )
    assert not list(root.glob(".doctor-*"))


def test_other_bytes_of_class_a_are_a_broken_promise(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, differing=["slerp", "bake"])
    found = examine(root, capsys, 3)["arithmetic"]
    assert "slerp, bake" in found["text"]
    assert "another build of torch" in found["hint"]


def test_a_torch_that_cannot_be_imported_is_said(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ImportError")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert "golden` says why" in examine(root, capsys, 4)["torch"]["hint"]


@pytest.mark.parametrize(
    ("version", "code", "name", "said"),
    [("0.1.0", 4, "diffusers", "is too old"), ("99.0.0", 0, "libraries", "diffusers 99.0.0 (tested: ")],
)
def test_versions_are_held_against_what_is_tested(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    code: int,
    name: str,
    said: str,
) -> None:
    whole = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda n: version if n == "diffusers" else whole(n))
    assert said in examine(root, capsys, code)[name]["text"]


@pytest.mark.parametrize(
    ("files", "built_for", "said", "hint"),
    [
        ({}, "", "no GPU", ""),
        ({"dev/nvidia0": ""}, "", "was built without CUDA", "pytorch.org"),
        ({"dev/nvidia0": ""}, "12.8", "torch (CUDA 12.8) cannot use it", "nvidia-smi"),
        ({"dev/dxg": ""}, "", "dxg (a GPU of Windows) is there, and this torch was built without CUDA", "pytorch.org"),
        ({"0/class": "0x030000\n", "0/vendor": "0x10de\n"}, "12.8", "no driver for it is loaded", "NVIDIA's driver"),
        ({"0/class": "0x030000\n", "0/vendor": "0x1002\n"}, "", "an AMD GPU is built in", ""),
        ({"0/class": "0x020000\n", "0/vendor": "0x10de\n"}, "", "no GPU", ""),
    ],
)
def test_a_gpu_that_is_not_used_is_said_with_the_reason(
    tmp_path: Path, files: dict[str, str], built_for: str, said: str, hint: str
) -> None:
    for name, text in files.items():
        path = tmp_path / (name if name.startswith("dev") else f"sys/bus/pci/devices/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = doctor._gpus({"gpus": [], "built_for": built_for}, tmp_path)
    assert said in found.text
    assert hint in found.hint


def test_a_torchvision_for_another_torch_is_noted(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = doctor.metadata.version
    versions = {"torchvision": "0.28.0", "torch": f"{whole('torch').partition('+')[0]}+cpu"}
    monkeypatch.setattr(doctor.metadata, "version", lambda n: versions.get(n) or whole(n))
    assert "uninstall torchvision" in examine(root, capsys)["torchvision"]["hint"]


def test_a_file_system_whose_clock_is_off_is_noted(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() - 3600)
    assert "+3600 s off" in examine(root, capsys)["clock"]["text"]


def test_a_file_system_without_locks_is_broken(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)  # it says yes to everybody
    assert "no locks" in examine(root, capsys, 4)["file system"]["text"]


def test_a_clock_behind_what_was_written_last_is_noted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "cache" / "v1" / "results").mkdir(parents=True)
    ahead = time.time() + 3600
    os.utime(root / "cache" / "v1" / "results", (ahead, ahead))
    assert "s behind what was written into the cache last" in examine(root, capsys)["clock"]["text"]


@pytest.mark.parametrize("call", ["mkdtemp", "replace"])
@pytest.mark.parametrize(
    ("number", "way"), [(errno.ENOSPC, "make room"), (errno.EROFS, "make it writable"), (errno.EIO, "another place")]
)
def test_a_place_that_takes_no_file_is_said_and_the_rest_looked_at(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    way: str,
    call: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*{"mkdtemp": (doctor.tempfile, "mkdtemp"), "replace": (Path, "write_bytes")}[call], refuse)
    found = examine(root, capsys, 4)
    assert os.strerror(number) in found["file system"]["text"]
    assert way in found["file system"]["hint"]
    assert "cache" in found
    assert not list(root.glob(".doctor-*"))


def test_a_disk_that_takes_few_more_files_is_noted(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), 10**8)
    disk = SimpleNamespace(f_frsize=4096, f_files=1000, f_favail=1, **room)
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: disk)
    assert "only 1 file more" in examine(root, capsys)["disk"]["text"]


@pytest.mark.parametrize("place", ["cache", "cache/v1", "cache/v1/objects", "cache/v1/locks", "cache/v1/index.db"])
@pytest.mark.parametrize("put", [Path.touch, lambda path: path.symlink_to("/nowhere"), os.mkfifo, Path.mkdir])
def test_what_lies_in_the_way_of_the_cache_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], place: str, put: Callable[[Path], Any]
) -> None:
    """A folder is in the way of the index alone, and a file everywhere else; a link to nowhere is no index yet."""
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path)
    fits = path.is_file() or not path.exists() if path.suffix else path.is_dir()
    found = examine(root, capsys, 0 if fits else 4)["cache"]
    assert (f"{path} is in the way" in found["text"]) is not fits


def test_what_lies_in_quarantine_is_noted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "cache" / "v1" / "quarantine").mkdir(parents=True)
    (root / "cache" / "v1" / "quarantine" / "x").write_bytes(b"damaged")
    found = examine(root, capsys)["cache"]
    assert "1 quarantine" in found["text"]
    assert "forge verify" in found["hint"]


def test_outside_a_project_the_machine_is_looked_at_all_the_same(
    root: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert root
    found = examine(tmp_path_factory.mktemp("nowhere"), capsys)
    assert "no project here" in found["cache"]["text"]


def test_a_library_that_is_not_there_is_named_and_the_others_are_not_praised(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = doctor.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise doctor.metadata.PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = examine(root, capsys, 4)
    assert found["torch"]["text"] == "is not installed"
    assert "libraries" not in found
