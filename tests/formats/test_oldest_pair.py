"""Exports in the oldest diffusers and transformers that we promise: opened there, they say what they say here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdforge.families import family, family_names
from tests.families.loras import LINEAR, TEXT, random_lora, write_kohya
from tests.families.toys import write_family
from tests.families.workbench import Taken, keep, take
from tests.formats.conftest import export

pytestmark = pytest.mark.slow

# with what of their time they need beside them; torch is the one that is here
PAIR = ("diffusers==0.35.2", "transformers==4.57.*", "peft==0.17.*", "accelerate==1.10.*")
SCRIPT = Path(__file__).with_name("opened.py")
SINGLE = ("sd15", "sd2", "sdxl")  # families of which those pipelines open single files
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": "/nowhere"}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the old pair, and all else from here."""
    folder = tmp_path_factory.mktemp("older")
    venv.create(folder, with_pip=True, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PAIR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' and '.join(PAIR[:2])} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def jobs(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A preset of every family, with words of its own, a LoRA and an embedding where its pipeline takes them."""
    folder = tmp_path_factory.mktemp("exports")
    return [_exported(name, toys, folder / name) for name in family_names()]


def _exported(name: str, toys: Path, work: Path) -> dict[str, Any]:
    taken = take(write_family(toys / ("toy" if name == "sd15" else name), name))
    export(work, taken, ["checkpoint", "diffusers"], {})
    job = {"pipeline": family(name).pipeline, "folder": str(work / "diffusers"), "lora": "", "embedding": ""}
    job["file"] = str(work / "checkpoint.safetensors") if name in SINGLE else ""
    if name == "sd15":
        write_kohya(work / "line.safetensors", random_lora(taken, (LINEAR, TEXT)))
        export(
            work / "more", taken, ["loras", "embeddings"], {}, loras=[_given(work)], embeddings=[_rows(work).given()]
        )
        (lora,), (rows,) = ((work / "more" / kind).iterdir() for kind in ("loras", "embeddings"))
        job |= {"lora": str(lora), "embedding": str(rows)}
    return job


def _given(work: Path) -> Any:
    return take(work / "line.safetensors").given()


def _rows(work: Path) -> Taken:
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    return keep(work / "rows", {"embedding": {"text_encoder": rows}}, kind="embedding", facts={"token": "<ink>"})


def _said(python: Path, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """Open all exports with that Python; return what their networks say."""
    outs = [folder / f"{number}.safetensors" for number in range(len(jobs))]
    (folder / "jobs.json").write_text(json.dumps([job | {"out": str(o)} for job, o in zip(jobs, outs, strict=True)]))
    done = subprocess.run(
        [python, SCRIPT, folder / "jobs.json"], capture_output=True, text=True, env=QUIET, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(out) for out in outs]


def test_the_oldest_pair_opens_what_we_write(older: Path, jobs: list[dict[str, Any]], tmp_path: Path) -> None:
    versions = subprocess.run(
        [older, "-c", "import diffusers, transformers; print(diffusers.__version__, transformers.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [version[:4] for version in versions] == ["0.35", "4.57"]
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    there = _said(older, jobs, tmp_path / "there")
    here = _said(Path(sys.executable), jobs, tmp_path / "here")
    for name, old, new in zip(family_names(), there, here, strict=True):
        assert old.keys() == new.keys()
        different = {part: float((old[part] - new[part]).abs().max()) for part in old}
        # units in the last place of fp32, where the two pairs add in another order
        assert not {part: far for part, far in different.items() if far > 1e-5}, (name, different)
