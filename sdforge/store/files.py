"""Every call to the operating system that the store makes: publish, lock, look at a file. One publish for everything.

A file appears under its final name whole or not at all: it is written in `tmp/` of the same file system, flushed,
made read-only, renamed, and the folder is flushed, as are those on the way there. An action's result is published last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from sdforge.errors import BrokenPromise, ForgeError, ResourceError, UsageError
from sdforge.places import FILE

CHUNK = 1 << 20
STALE = 7 * 86_400.0  # seconds without a change, after which what another machine left unfinished is given up
OWN_NAME = re.compile(r"\.?([0-9a-f]{12})-(\d+)-[0-9a-f]{12}")  # where, process, chance
CACHE_TAG = "CACHEDIR.TAG"  # lies in a cache whose own name, and all above it, have been flushed
FAULT = "FORGE_FAULT"  # tests: what is to happen at which publish of a process, as `planted` reads it

FULL = (errno.ENOSPC, errno.EDQUOT)
MAKE_ROOM = "make room (`forge clean --dry-run` shows what could go) and run the same command again"
ELSEWHERE = "files elsewhere are found by name in the folders that forge.local.toml lists"
ENDED = (b"Z", b"X")  # proc_pid_stat(5): zombie, dead
FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file

_published = 0
_lasting: set[Path] = set()  # folders whose names this process knows to be flushed


class Stat(NamedTuple):
    """What tells that a file is the one that was looked at: any write changes at least ctime."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


SETTLED = 2_000_000_000  # ns: a file changed less than that before it was looked at is looked at once more


def stat_of(path: Path | str) -> Stat | None:
    """Return a file's or folder's stat, or None if there is nothing, or a link that leads nowhere."""
    try:
        s = os.stat(path)  # noqa: PTH116 -- thousands of times in a null build
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return None
    return Stat(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


def is_settled(found: Stat, looked_ns: int) -> bool:
    """Say whether a look at `looked_ns` can be trusted: the file had not been changed just before."""
    return max(found.mtime_ns, found.ctime_ns) + SETTLED <= looked_ns


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raises UsageError for what is none, such as a pipe that nobody writes to."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UsageError(f"{path} is no regular file")
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_waiting(path: str, flags: int) -> int:
    """Open a file as `open` does, but wait for nobody at the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def open_regular(path: Path) -> int:
    """Open a file for reading; refuse all that is no regular file. Returns a descriptor; raises UsageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no regular file")
    return fd


def refuse_nothing(path: Path) -> None:
    """Refuse a path at which there is nothing, and a link that leads nowhere. Raises UsageError."""
    if stat_of(path) is None:
        os.close(open_regular(path))


def read_entry(path: Path) -> bytes:
    """Return the bytes of a file of the store. Raises FileNotFoundError, and ValueError for what is no file of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("a link lies in its place") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("what lies in its place is no file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


@contextmanager
def resources(what: str) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence with exit code 4."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(f"{what}: the disk is full", MAKE_ROOM) from error
        shut = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        hint = "it must be possible to write there; FORGE_CACHE names another cache" if shut else ""
        where = f" ({error.filename})" if error.filename else ""  # libraries raise some with a sentence alone
        raise ResourceError(f"{what}: {error.strerror or error}{where}", hint) from error


def publish(temporary: Path, final: Path, mode: int = 0o444) -> None:
    """Move a written file to its final name, whole and flushed. What is there already is replaced."""
    global _published
    _published += 1
    with resources(f"{final.name} could not be kept"):
        planted(_published, "early")
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        make_folder(final.parent)
        temporary.replace(final)
        planted(_published, "late")
        flush_folder(final.parent)


def share(path: Path, place: Path) -> str:
    """Put a file's bytes at a new place without writing them, where the file system can, else copy them; return how.

    What shares no blocks but is the same file (a hard link) is read-only at both places.
    """
    if clone(path, place):
        return "clone"
    try:
        place.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, place)
        return "copy"
    return "hard link"


def clone(path: Path, place: Path) -> bool:
    """Let a new file share another one's blocks until either is changed; leave nothing where that cannot be."""
    with path.open("rb") as source, place.open("xb") as target:
        try:
            fcntl.ioctl(target, FICLONE, source.fileno())
        except OSError:
            place.unlink()
            return False
    return True


def publish_bytes(data: bytes, final: Path, temporary_folder: Path, mode: int = 0o444) -> None:
    """Publish a small file's content."""
    with resources(f"{final.name} could not be written"):
        temporary_folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder / f".{own_name()}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
            publish(temporary, final, mode)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def own_name() -> str:
    """Return a new name for what is being made; `is_abandoned` tells by it whether its maker is gone."""
    return f"{here()}-{os.getpid()}-{os.urandom(6).hex()}"


@cache
def here() -> str:
    """Return 12 hexadecimal digits for where this process's id counts: this machine since it was started, or container.

    Caches and projects are shared by machines, and a process id says nothing on another one.
    """
    space = [os.uname().nodename]
    with suppress(OSError):  # Linux alone has these
        space += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(space).encode()).hexdigest()[:12]


def is_abandoned(path: Path) -> bool:
    """Say whether what has an `own_name` is nobody's any more: its process is gone, or it is of elsewhere and old."""
    found = OWN_NAME.fullmatch(path.name)
    if not found:
        return False
    if found[1] == here():
        return not is_alive(int(found[2]))
    with suppress(FileNotFoundError):
        newest = max(each.lstat().st_mtime for each in (path, *path.glob("*")))
        return newest + STALE < time.time()
    return False


def sweep_parts(folder: Path) -> None:
    """Remove the unfinished files that `publish_bytes` and the like left in a folder when their processes died."""
    for path in folder.glob(".*-*-*"):
        if is_abandoned(path) and path.is_file():
            with suppress(OSError):  # it may be another user's, who sweeps it
                path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Say whether a process of this machine lives. One that has ended does not, where Linux tells of it.

    Whoever started it may not have asked yet how it ended; until then its id is taken.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    with suppress(OSError):
        told = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]  # its name may hold brackets
        return told.split()[0] not in ENDED
    return True


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Their names are flushed: one that a power loss takes away takes all with it that was flushed within. A folder that
    is there may lack that too, since who made it may have been killed before, or be at it now. So all on the way from
    the project or cache are flushed, once a process.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)
        _lasting.add(folder)
    elif folder not in _lasting:
        if _may_be_new(folder):
            make_folder(folder.parent)
            with os.scandir(folder.parent) as entries:
                there = {folder.parent / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
            flush_folder(folder.parent)
            _lasting.update(there)
        _lasting.add(folder)


def _may_be_new(folder: Path) -> bool:
    """Say whether a folder's name may not be flushed yet: somebody like this process can have made it.

    Not a project's, which a person made, nor a tagged cache's, nor a disk's first one, nor another user's.
    """
    above = folder.parent
    if any((folder / mark).exists() for mark in (FILE, CACHE_TAG)):
        return False
    same_disk = above != folder and above.stat().st_dev == folder.stat().st_dev
    return same_disk and os.access(above, os.R_OK | os.W_OK)


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def planted(publish: int, moment: str) -> None:
    """Do at a publish what a test has planted there.

    FORGE_FAULT is `[late-]WHAT:N[+]`: at the N-th publish (`+`: and at all later ones), before its rename (`late-`:
    after it). WHAT is `kill`, or the name of an error of the operating system (EIO, ENOSPC, …). Raises OSError.
    """
    wish = os.environ.get(FAULT, "")
    if not wish or wish.startswith("late-") != (moment == "late"):
        return
    what, _, at = wish.removeprefix("late-").partition(":")
    first = int(at.removesuffix("+"))
    if publish == first or (publish > first and at.endswith("+")):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, what)
        raise OSError(number, f"planted: {os.strerror(number)}")


class Lock:
    """An exclusive `flock` on a file that is never deleted; the kernel frees it when the last holder is gone.

    A worker that gets the descriptor keeps the lock for as long as it works, even if the builder dies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with resources(f"the lock {path.name} cannot be had"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # through a link, somebody who may write beside the lock would have any file of ours emptied
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self.held = False

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; without `wait` return at once. Returns whether it is held now."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        self.held = True
        with suppress(OSError):  # on a full disk nobody is told who holds it
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def share(self, *, wait: bool) -> bool:
        """Take the lock together with others who share it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        self.held = True
        return True

    def holder(self) -> str:
        """Return what is known of who holds it: a process id, or nothing."""
        return os.pread(self.fd, 32, 0).decode(errors="replace").strip()

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.held = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def within(root: Path, relative: str) -> Path:
    """Return `root / relative`, refusing every way out of the root. Raises ForgeError."""
    plain = relative.replace("\\", "/")
    odd = plain.startswith(("/", "~")) or ".." in plain.split("/") or ":" in relative or "\0" in relative
    if odd or not relative.strip():
        raise UsageError(f"{relative!r} is no path within the project", ELSEWHERE)
    path = root / relative
    folder, name = os.path.split(path)
    real = os.path.join(_real(folder), name)  # noqa: PTH118 -- thousands of times in a null build
    if os.path.islink(real):  # noqa: PTH114
        real = os.path.realpath(real)
    if not f"{real}/".startswith(f"{_real(str(root))}/"):
        raise UsageError(f"{relative!r} leads out of the project through a link", ELSEWHERE)
    return path


def leads_out(path: Path, folders: list[Path]) -> bool:
    """Say whether a file lies, behind all links, in none of these folders."""
    real = os.path.realpath(path)
    return not any(f"{real}/".startswith(f"{_real(str(folder))}/") for folder in folders)


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def damaged(path: Path, quarantine: Path, why: str) -> ForgeError:
    """Set a damaged file aside and say so; the caller treats it as missing."""
    place = quarantine / path.name
    if place.is_dir():
        place = quarantine / f"{path.name}.{os.urandom(6).hex()}"
    try:
        quarantine.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    except OSError:
        return BrokenPromise(f"{path} is damaged ({why}) and cannot be moved aside")
    return BrokenPromise(f"{path} was damaged ({why}); it lies in {place} now")
