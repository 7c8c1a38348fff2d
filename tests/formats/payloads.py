"""Pickles that run something when they are opened, written opcode by opcode, in the forms in which weights come."""

from __future__ import annotations

import marshal
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from sdforge.run.import_step import main

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which torch's old form begins


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(what: bytes, *arguments: bytes) -> bytes:
    """Call what the first opcodes leave behind."""
    return what + b"(" + b"".join(arguments) + b"tR"


def listed(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"l"


def newer(module: str, name: str) -> bytes:
    """Name something as protocol 4 does, which reaches into classes."""
    return text(module) + text(name) + b"\x93"


def _function(code: str) -> bytes:
    data = marshal.dumps(compile(code, "x", "exec"))
    loaded = called(named("marshal", "loads"), b"B" + len(data).to_bytes(4, "little") + data)
    return called(called(named("types", "FunctionType"), loaded, b"}"))


def _built() -> bytes:
    """A harmless partial call whose state names another function."""
    return called(named("functools", "partial"), named("builtins", "print")) + b"(" + named("os", "mkdir")


# kind → the opcodes by which opening makes a file or a folder at a place
KINDS: dict[str, Callable[[str], bytes]] = {
    "a shell": lambda at: called(named("os", "system"), text(f"mkdir '{at}'")),
    "a function of the system": lambda at: called(named("posix", "mkdir"), text(at)),
    "exec": lambda at: called(named("builtins", "exec"), text(f"import os; os.mkdir({at!r})")),
    "eval": lambda at: called(named("builtins", "eval"), text(f"__import__('os').mkdir({at!r})")),
    "a program": lambda at: called(named("subprocess", "run"), listed(text("mkdir"), text(at))),
    "a name of protocol 4": lambda at: called(newer("os", "mkdir"), text(at)),
    "a name within a class": lambda at: called(
        newer("pathlib", "Path.touch"), called(named("pathlib", "PosixPath"), text(at))
    ),
    "INST": lambda at: b"(" + text(at) + b"iposix\nmkdir\n",
    "OBJ": lambda at: b"(" + named("logging", "FileHandler") + text(at) + b"o",
    "NEWOBJ": lambda at: called(
        named("builtins", "list"), named("builtins", "map") + b"(" + named("os", "mkdir") + listed(text(at)) + b"t\x81"
    ),
    "NEWOBJ_EX": lambda at: called(
        named("builtins", "list"),
        named("builtins", "map") + b"(" + named("os", "mkdir") + listed(text(at)) + b"t}\x92",
    ),
    "BUILD": lambda at: called(_built() + b"(" + text(at) + b"t}}tb"),
    "a registered number": lambda at: (
        called(named("copyreg", "add_extension"), text("posix"), text("mkdir"), b"K\xfa") + b"0"
        + called(b"\x82\xfa", text(at))
    ),
    "a pickle in a pickle": lambda at: called(
        named("pickle", "loads"),
        b"B" + len(inner := b"\x80\x02" + KINDS["exec"](at) + b".").to_bytes(4, "little") + inner,
    ),
    "an attribute of a module": lambda at: called(
        called(named("builtins", "getattr"), called(named("importlib", "import_module"), text("os")), text("mkdir")),
        text(at),
    ),
    "a method by its name": lambda at: called(
        called(named("operator", "methodcaller"), text("mkdir")), called(named("pathlib", "PosixPath"), text(at))
    ),
    "marshalled code": lambda at: _function(f"import os; os.mkdir({at!r})"),
    "runpy": lambda at: called(named("runpy", "_run_code"), text(f"import os; os.mkdir({at!r})"), b"}"),
    "timeit": lambda at: called(named("timeit", "timeit"), text("pass"), text(f"import os; os.mkdir({at!r})")),
    "a debugger": lambda at: called(
        called(named("operator", "methodcaller"), text("run"), text(f"import os; os.mkdir({at!r})")),
        called(named("bdb", "Bdb")),
    ),
    "a profiler": lambda at: called(named("cProfile", "run"), text(f"import os; os.mkdir({at!r})")),
    "a file that is opened": lambda at: called(named("io", "open"), text(at), text("w")),
    "a file that is copied": lambda at: called(named("shutil", "copyfile"), text("/etc/passwd"), text(at)),
}  # fmt: skip
FORMS = ("a zip", "torch's old form", "a bare pickle")


def write(path: Path, kind: str, form: str, harm: Path) -> None:
    """Write weights that make `harm` when they are opened without care."""
    opcodes = b"\x80\x04" + KINDS[kind](str(harm)) + b"."
    if form == "a zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            file.writestr("archive/data.pkl", opcodes)
            file.writestr("archive/byteorder", "little")
            file.writestr("archive/version", "3\n")
    elif form == "torch's old form":
        system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}
        head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, system))
        path.write_bytes(head + opcodes + pickle.dumps([], 2))
    else:
        path.write_bytes(opcodes)


def open_without_care(path: Path, form: str) -> None:
    """Do in a process of its own what programs did before there was `weights_only`."""

    def work() -> int:
        if form == "a bare pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        return 0

    apart(work, path.with_name("said"))


MOST_OPEN = 4096


def converted_apart(path: Path, into: Path) -> tuple[int, str]:
    """Import in a process of its own, but one that has torch already: (exit code, what it said)."""
    return apart(lambda: main([str(path), str(into), "pickle"]), path.with_name("said"))


def apart(work: Callable[[], int], said: Path) -> tuple[int, str]:
    """Do something in a fork: (its exit code, 99 if it raised; what it said)."""
    if (child := os.fork()) == 0:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.closerange(3, MOST_OPEN)  # what other tests have open counts towards the limit of open files
        sys.stdout = os.fdopen(1, "w")
        code = 99
        try:
            code = work()
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    found = said.read_text()
    said.unlink()
    return os.waitstatus_to_exitcode(status), found
