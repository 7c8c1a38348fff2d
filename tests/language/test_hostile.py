"""Texts that were made to hurt: each is refused (or read) soon, with one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROMISE = 5  # seconds of the processor's time, after which the system ends the process
BOUND = 20.0  # seconds by the clock, on a machine that does other things too
HEAD = b'family = "sd15"\n'
MIB = 1 << 20

HOSTILE: dict[str, tuple[bytes, str]] = {
    "arrays in arrays": (HEAD + b"seed = " + b"[" * 300_000, "error[syntax]"),
    "arrays in arrays that end": (HEAD + b"seed = " + b"[" * 100_000 + b"]" * 100_000, "nests deeper than 64 levels"),
    "inline tables in inline tables": (HEAD + b"seed = " + b"{a = " * 50_000 + b"}" * 50_000, "nests deeper than 64"),
    "one level too deep": (HEAD + b"seed = " + b"[" * 65 + b"]" * 65 + b"\n", "nests deeper than 64 levels"),
    "a large array": (HEAD + b"seed = [" + b"1," * 90_000 + b"]\n", "`seed` is a whole number"),
    "a huge array": (HEAD + b"seed = [" + b"1," * 400_000 + b"]\n", "has more than 100,000 values in arrays"),
    "a long key": (HEAD + b"a" * 500_000 + b" = 1\n", "error[unknown-setting]"),
    "a long quoted key": (HEAD + b'"' + b"a" * 500_000 + b'" = 1\n', "error[unknown-setting]"),
    "a long text": (HEAD + b'description = "' + b"a" * 900_000 + b'"\nseed = -1\n', "`seed` is a whole number"),
    "a long line that is no TOML": (HEAD + b"=" * 900_000, "error[syntax]"),
    "a number of 5000 digits": (HEAD + b"seed = " + b"9" * 5000 + b"\n", "error[syntax]"),
    "a number of 500000 digits": (HEAD + b"seed = " + b"9" * 500_000 + b"\n", "error[syntax]"),
    "a huge hexadecimal number": (HEAD + b"seed = 0x" + b"f" * 500_000 + b"\n", "beyond 2^53"),
    "a float of many digits": (HEAD + b"seed = 0." + b"1" * 500_000 + b"\n", "`seed` is a whole number"),
    "a float beyond all bounds": (HEAD + b"seed = 1e99999\n", "`seed` is a whole number"),
    "a NUL": (HEAD + b'description = "a\0b"\n', "holds a NUL character"),
    "a byte order mark": (b"\xef\xbb\xbf" + HEAD, "begins with a byte order mark"),
    "a byte order mark of UTF-16": (b"\xff\xfe" + HEAD, "is not UTF-8"),
    "no UTF-8": (HEAD + b'description = "\xff"\n', "is not UTF-8"),
    "half a surrogate": (HEAD + b'description = "\xed\xa0\x80"\n', "is not UTF-8"),
    "an escaped surrogate": (HEAD + b'description = "\\ud800"\n', "error[syntax]"),
    "a bare carriage return": (HEAD + b"seed = 1\rfoo", "error[syntax]"),
    "a dotted key of 20000 parts": (HEAD + b".".join([b"a"] * 20_000) + b" = 1\n", "has a key of more than 16 parts"),
    "a header of 20000 parts": (HEAD + b"[" + b".".join([b"a"] * 20_000) + b"]\n", "has a key of more than 16 parts"),
    "a key of 17 parts": (HEAD + b".".join([b"a"] * 17) + b" = 1\n", "has a key of more than 16 parts"),
    "100000 tables": (HEAD + b"".join(b"[a%d]\n" % i for i in range(100_000)), "has more than 4,096 tables"),
    "100000 tables of an array": (HEAD + b"[[a]]\n" * 100_000, "has more than 4,096 tables"),
    "100000 keys": (HEAD + b"".join(b"a%d=1\n" % i for i in range(100_000)), "has more than 20,000 keys"),
    "100000 keys in an inline table": (
        HEAD + b"a = {" + b",".join(b"a%d=1" % i for i in range(60_000)) + b"}\n",
        "has more than 20,000 keys",
    ),
    "20000 dotted keys": (HEAD + b"".join(b"a.b.c.d.e%d=1\n" % i for i in range(20_000)), "error["),
    "4096 tables with one mistake each": (
        HEAD + b"".join(b"[lora.t%d]\n" % i for i in range(4000)),
        "needs `dataset`",
    ),
    "a byte too many": (HEAD + b"#" * (MIB + 1 - len(HEAD)), "is 1,048,577 bytes long; the most is 1,048,576"),
    "brackets of every kind": (HEAD + b"[{(" * 100_000, "error[syntax]"),
    "quotes without end": (HEAD + b'"""' * 100_000, "error[syntax]"),
    "a comment with control characters": (HEAD + b"# \x1b[31m\x07\n", "error[syntax]"),
    "nothing": (b"", "error[missing]"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hostile")
    (found / "recipes").mkdir()
    (found / "forge.toml").write_text("")
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_refused_soon_and_in_one_sentence(name: str, folder: Path) -> None:
    text, words = HOSTILE[name]
    (folder / "recipes" / "r.toml").write_bytes(text)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
    code += f"resource.setrlimit(resource.RLIMIT_CPU, ({PROMISE}, {PROMISE})); "
    code += "from sdforge.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-C", str(folder), "check", "r"]
    done = subprocess.run(command, capture_output=True, timeout=BOUND, check=False)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 2, said[-2000:]
    assert words in said
    assert "Traceback" not in said
    assert "recipes/r.toml" in said


def test_what_is_just_within_the_limits_is_read(folder: Path) -> None:
    deep = b"[" * 64 + b"]" * 64
    lines = [b"a.%s = 1" % b".".join([b"b"] * 15), b"[a.c]", b"d = " + deep]
    (folder / "recipes" / "r.toml").write_bytes(HEAD + b"\n".join(lines) + b"\n")
    code = "import sys; from pathlib import Path; from sdforge.syntax import read_toml; "
    code += "print(len(read_toml(Path(sys.argv[1]).read_bytes(), 'r').values))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "recipes" / "r.toml")],
        capture_output=True,
        timeout=BOUND,
        check=True,
    )
    assert done.stdout == b"2\n"
