"""P11, P12 and P16: the same bits elsewhere, the same bits again, and what keeping them costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reliability.place import ROOT, Bench, Found, at

RESUMES, REPEATS, FIFTIES = 20, 3, 10
SLOWEST = 20.0  # milliseconds of a publish
SURROUNDINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OPENBLAS_CORETYPE": "Haswell"},
    {"OPENBLAS_CORETYPE": "Prescott"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"},
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"},
    {"LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Kathmandu"},
    {"PYTHONHASHSEED": "1"},
    {"MALLOC_PERTURB_": "170"},
    {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"},
    {"ATEN_CPU_CAPABILITY": "default", "MKL_DEBUG_CPU_TYPE": "5", "OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"},
)


def surroundings(bench: Bench, i: int) -> Found | None:  # noqa: ARG001
    """Compute every merge in three dtypes in another surrounding: the committed digests come out."""
    if i >= len(SURROUNDINGS):
        return None
    command = [sys.executable, "-m", "tests.merges.test_merge_vectors"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | SURROUNDINGS[i], capture_output=True, text=True, check=False
    )
    wanted = json.loads((ROOT / "tests/merges/vectors.json").read_text())
    if done.returncode:
        return Found("surroundings", [f"{SURROUNDINGS[i]}: {done.stderr[-300:]}"])
    found = json.loads(done.stdout)
    differ = [case for case in wanted if found.get(case) != wanted[case]]
    return Found("surroundings", at(str(SURROUNDINGS[i]), differ))


def training(bench: Bench, i: int) -> Found | None:
    """Kill a real training (torch) after one of its states, and go on; or repeat it."""
    if i >= RESUMES + REPEATS:
        return None
    whole, quick = bench.trained, bench.torch
    with bench.clone(whole) as root:
        before, place = divmod(i, 7)
        if place == 6:
            ran = quick.forge(root, "build", "--json")
            return Found("repeats", [*whole.differences(root), *([] if ran.code == 0 else [ran.out[-300:]])])
        cycle, place = divmod(i - before, 7)  # of resumes alone
        fault = f"{('kill', 'late-kill')[cycle % 2]}:{place * 2 + 4 + cycle // 2}"
        ran = quick.forge(root, "build", "--json", FORGE_FAULT=fault)
        problems = [] if ran.code == -9 else [f"not killed by {fault}: {ran.code}"]
        return Found("resumes", at(fault, problems + bench.mends_itself(root, whole)))


def costs(bench: Bench, i: int) -> Found | None:  # noqa: ARG001 -- every case's form
    """Time publishes of 4 KiB on the disk on which the repository lies."""
    from sdforge.store.files import publish_bytes

    if i >= FIFTIES:
        return None
    place = Path(tempfile.mkdtemp(dir=ROOT / "cache"))
    times = []
    for n in range(50):
        began = time.perf_counter()
        publish_bytes(os.urandom(4096), place / f"{n}", place / "tmp")
        times.append(1000 * (time.perf_counter() - began))
    shutil.rmtree(place)
    times.sort()
    problems = [f"a median of {times[25]:.1f} ms"] if times[25] > SLOWEST else []
    facts = {"publish median ms": round(times[25], 2), "publish p95 ms": round(times[47], 2)}
    return Found("publishes", problems, len(times), facts)
