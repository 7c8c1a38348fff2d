"""P7 and P8: recipes and headers that somebody has bent."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from pathlib import Path

from benchmarks.reliability.place import ROOT, Bench, Found, Problems, at

PIECES = (
    *(b"[", b"]", b"{", b"}", b'"', b"'", b"=", b".", b",", b"\n", b"#", b"\\u0000", b"\xff", b"9" * 40, b"-1", b"nan"),
    *(
        b"lora",
        b"bake",
        b"insert",
        b"preset",
        b"base",
        b"a:b",
        b"../x",
        b"on",
        b"weights",
        b"true",
        b"1e400",
        b"dataset",
    ),
)
RECIPES = (
    b'family = "sd15"\n[weighted_sum.a]\ncheckpoints = ["x", "y"]\nweights = [1, 0]\nblocks = {"unet.mid" = [1, 0]}\n',
    b'family = "sd15"\n[lora.a]\non = "x"\ndataset = "d"\nrank = 8\nsteps = 400\n[preset]\ncheckpoint = "x"\n',
    b'family = "sdxl"\n[source.x]\nfrom = "x.safetensors"\n[preset]\ncheckpoint = "x"\nbake = { l = 0.8 }\n',
    b'[textual_inversion.w]\non = "x"\ndataset = "d"\ntoken = "<w>"\nvectors = 4\n[preset.previews]\nprompts = ["a"]\n',
)
RECIPES_A_CASE, HEADERS_A_CASE, COMMANDS = 2_000, 20_000, 100
EVERY_COMMAND = 6  # 500 cases in process and 100 by the command make 10⁶ and 10⁴
LONGEST, LARGEST = 5.0, 1 << 30  # seconds of CPU for one text, and bytes
HEADER = (
    b'{"__metadata__":{"a":"b"},"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
    b'"y":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}'
)


def mutant(dice: random.Random, text: bytes) -> bytes:
    """Change a text at one to six places."""
    data, bits = bytearray(text), dice.getrandbits
    for _ in range(1 + bits(16) % 6):
        at, what = bits(20) % (len(data) + 1), bits(3)
        if what < 2 and data:
            data[at % len(data)] ^= 1 << bits(3)
        elif what < 5:
            data[at:at] = PIECES[bits(16) % len(PIECES)]
        elif what < 7:
            del data[at : at + 1 + bits(16) % 30]
        else:
            data[at:at] = data[bits(20) % (len(data) + 1) :][: 1 + bits(16) % 60]
    return bytes(data)


def recipes(bench: Bench, i: int) -> Found:
    """Read mutants of recipes: each is read, or refused with its mistakes. Every sixth case asks the command."""
    if i % EVERY_COMMAND == EVERY_COMMAND - 1:
        return _check(bench, i)
    from sdforge.errors import RecipeError, UsageError
    from sdforge.recipe import read_recipe

    texts = [*RECIPES * 4, *(path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.toml")))]
    dice, problems = random.Random(i), []
    most = _resident()
    for n in range(RECIPES_A_CASE):
        text = mutant(dice, texts[dice.getrandbits(16) % len(texts)])
        began = time.process_time()
        try:
            read_recipe(text, "toy", "toy.toml")
        except (RecipeError, UsageError):
            pass
        except Exception as error:
            problems.append(f"{i}.{n}: {type(error).__name__}: {error}")
        if time.process_time() - began > LONGEST:
            problems.append(f"{i}.{n}: took {time.process_time() - began:.1f} s")
    if _resident() > most + LARGEST:
        problems.append(f"{i}: took {_resident() - most:,} bytes")
    return Found("mutants", problems, RECIPES_A_CASE)


def _resident() -> int:
    """Return the most bytes that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _check(bench: Bench, i: int) -> Found:
    """Let `forge check` read a project of mutants: mistakes are code 2, and nothing appears or changes."""
    dice = random.Random(i)
    with bench.clone() as root:
        for n in range(COMMANDS):
            text = mutant(dice, dice.choice(RECIPES).replace(b'"x"', b'"base"').replace(b'"d"', b'"drawings"'))
            (root / "recipes" / f"m{n}.toml").write_bytes(text)
        before = _files(root)
        ran = bench.quick.forge(root, "check")
        problems = [] if ran.code in (0, 2) and "Traceback" not in ran.out + ran.err else [f"{i}: {ran.code} {ran.err}"]
        odd = sorted(name for name, _ in _files(root) ^ before if not name.startswith(("cache", ".forge")))
        return Found("by `forge check`", problems + at(f"{i}: appeared, changed or gone", odd), COMMANDS)


def _files(root: Path) -> set[tuple[str, tuple[int, int]]]:
    """Return the files of a project with size and time."""
    found = ((path.relative_to(root), path.stat()) for path in root.rglob("*") if path.is_file())
    return {(str(name), (stat.st_size, stat.st_mtime_ns)) for name, stat in found}


def headers(bench: Bench, i: int) -> Found:  # noqa: ARG001 -- every case's form
    """Read mutants of a small safetensors file, in memory: what the library refuses is refused."""
    from safetensors import SafetensorError, deserialize

    from sdforge.errors import UsageError
    from sdforge.formats.safetensors import read_header

    problems: Problems = []
    dice, fd = random.Random(i), os.memfd_create("header")
    path = Path(f"/proc/self/fd/{fd}")
    for n in range(HEADERS_A_CASE):
        changed = mutant(dice, HEADER)
        length, odd = len(changed), dice.getrandbits(6)
        if odd < 6:
            length = (0, 1, length + 1, 2**40, 2**63, 2**64 - 1)[odd]
        data = struct.pack("<Q", length) + changed + bytes(16 if odd < 58 else dice.getrandbits(5))
        os.ftruncate(fd, len(data))
        os.pwrite(fd, data, 0)
        try:
            read_header(path)
        except UsageError:
            continue
        except Exception as error:
            problems.append(f"{i}.{n}: {type(error).__name__}: {error}: {data!r:.300}")
            continue
        try:
            deserialize(data)  # type: ignore[no-untyped-call]
        except (SafetensorError, TypeError, OverflowError) as error:
            problems.append(f"{i}.{n}: accepted, and the library says {error}: {data!r:.300}")
    os.close(fd)
    return Found("mutants", problems, HEADERS_A_CASE)
