"""P10: a remote cache that breaks, lies or stalls, for a machine that has only git content."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks.reliability.place import Bench, Found, Problems, at
from tests.remotes.plants import PLANTS, plant
from tests.remotes.server import ACTIONS, ANSWERS, BYTES, LINES, PUTS, STATUS, CacheServer, caching
from tests.survival import Whole

MOST = 60.0  # seconds that a fault may cost
STALLED = 90.0  # seconds that a line which hangs stays open, if nobody loses patience
NOBODY, UNPINNED = "refuse", "unpinned"
S3 = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "eu-west-1",
    "AWS_ALLOW_HTTP": "true",
}
FAULTS: tuple[str | Callable[..., None], ...] = (
    *("", *STATUS, *LINES, *ANSWERS, *BYTES, *ACTIONS, *PUTS, *PLANTS),
    *(NOBODY, UNPINNED),
)


CASES = [(fault, bucket) for bucket in (False, True) for fault in FAULTS]  # the same server over HTTP, and as S3


@cache
def _held(bench: Bench) -> dict[str, bytes]:
    """What lies on the remote after a build that writes to it."""
    with bench.clone() as root, caching(CacheServer()) as side:
        _at(root, side.url)
        assert bench.quick.forge(root, "build", "--remote=write").code == 0
        return dict(side.held)


def _at(root: Path, address: str) -> None:
    path = root / "forge.toml"
    text = re.sub(r"\n\[remote\]\n.*\n", "", path.read_text())
    path.write_text(f'{text}\n[remote]\naddress = "{address}"\n')


def remote(bench: Bench, i: int) -> Found | None:
    """Build with a fault of the remote: the right bytes come out, soon, and nothing planted is believed."""
    if i >= len(CASES):
        return None
    fault, bucket = CASES[i]
    name = fault or "no fault" if isinstance(fault, str) else f"planted: {fault.__name__}"
    name += " as S3" if bucket else ""
    with bench.clone() as root, caching(CacheServer(dict(_held(bench)), patience=STALLED)) as side:
        if not isinstance(fault, str):
            plant(side, fault)
        elif fault in PUTS:
            side.held.clear()
        side.fault = fault if isinstance(fault, str) else ""
        origin = f"http://127.0.0.1:{9 if fault == NOBODY else side.port}"
        _at(root, "s3://cache" if bucket else f"{origin}/cache")
        if fault not in (UNPINNED, *PUTS):
            shutil.copy(bench.whole.root / "forge.lock", root)
        began = time.monotonic()
        mode = "--remote=write" if fault in PUTS else "--remote=read"
        ran = bench.quick.forge(root, "build", "--json", mode, **S3, AWS_ENDPOINT_URL=origin)
        took = time.monotonic() - began
        problems = _wrong(bench.whole, root, ran.code, ran.out + ran.err)
        if took > MOST:
            problems.append(f"took {took:.0f} s")
        trained = (root / "rehearsal.log").is_file()
        if trained != (fault != "") and fault not in ACTIONS:  # what they name wrongly may be of no matter
            problems.append("trained" if trained else "believed the remote")
        return Found("faults", at(name, problems))


def _wrong(whole: Whole, root: Path, code: int, said: str) -> Problems:
    problems = whole.differences(root)
    if code or "Traceback" in said:
        problems.append(f"code {code}: {said[-300:]}")
    return problems
