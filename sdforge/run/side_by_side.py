"""Bytes made side by side by processes, and written in their order by this one.

As threads they would hand the interpreter's lock to and fro. The processes are forked from this one, so that nothing
is imported again or sent to them. Each puts its bytes where the file will have them, into the window that the file
passes through, says so through a pipe, and goes on as far as the window reaches: so a large tensor is followed while it
is made, nothing is copied from hand to hand, and nothing is read back from a file. A process ends where its pipes do:
nobody takes what a process makes whose parent is gone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from sdforge.errors import ResourceError
from sdforge.store.poured import Poured

NUMBER = 4  # bytes of a job's number
KEPT = 64 << 20  # bytes of freed memory that each process keeps at most
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)'s numbers
CAN_FORK = sys.platform == "linux"  # elsewhere libraries do not survive it

Answer = TypeVar("Answer")
Bytes = bytes | bytearray | memoryview
Stream = Generator[Bytes, None, Answer]  # bytes from front to back, and what is to be said of them
Take = Callable[[memoryview], object]
Spans = Mapping[str, tuple[int, int]]  # job → the place in the file at which its bytes begin, and how many they are


def in_order(
    jobs: Mapping[str, Callable[[], Stream[Answer]]],
    file: Poured,
    spans: Spans,
    processes: int,
    here: Collection[str] = (),
) -> Generator[tuple[str, Answer]]:
    """Do all jobs, have their bytes written one after the other, and yield each name with what the job returned.

    spans: where the bytes of each job lie in the file: one behind the other, from where it is. processes: how many work
    beside this one; 0: this one works. here: jobs that this process does in any case, when it is their turn. What a job
    returns can be pickled. Raises what a job raises, and ResourceError if a process was ended from outside.
    """
    if processes and CAN_FORK:
        yield from _forked(jobs, _Place(file, spans), processes, here)
    else:
        yield from ((name, drained(job(), file.write)) for name, job in jobs.items())


def drained(stream: Stream[Answer], take: Take) -> Answer:
    """Have all bytes of a stream taken, and return what it returns."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        take(memoryview(piece))


class _Place(NamedTuple):
    """The file, and where in it the bytes of each job lie."""

    file: Poured
    spans: Spans


class _Piece(NamedTuple):
    """What a process says: how many bytes more of a job there are; at the job's end what it returned, or raised."""

    name: str
    size: int
    done: bool = False
    answer: Any = None
    error: Exception | None = None


class _Ends(NamedTuple):
    """What joins this process and another: pieces come, and a byte goes back for every part that left the window."""

    pieces: Connection
    said: Connection
    free: int
    freed: int


def _joined() -> _Ends:
    pieces, said = get_context("fork").Pipe(duplex=False)
    free, freed = os.pipe()
    os.set_blocking(freed, False)
    return _Ends(pieces, said, free, freed)


def _forked(
    jobs: Mapping[str, Callable[[], Stream[Answer]]], place: _Place, processes: int, here: Collection[str]
) -> Generator[tuple[str, Answer]]:
    numbers = os.memfd_create("jobs")
    ends = [_joined() for _ in range(processes)]
    arguments = [(jobs, place, numbers, own, ends) for own in ends]
    workers = [get_context("fork").Process(target=_work, args=each, daemon=True) for each in arguments]
    try:
        theirs = (i for i, name in enumerate(jobs) if name not in here)
        os.pwrite(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in theirs), 0)
        taker = _Taker[Answer](ends, workers, place.file)
        for worker in workers:
            worker.start()
        taker.begin()
        for name, job in jobs.items():
            yield name, drained(job(), taker.write) if name in here else taker.answer(name)
    finally:
        os.close(numbers)
        for worker, own in zip(workers, ends, strict=True):
            if worker.pid is not None:
                worker.kill()
                worker.join()
            own.pieces.close()
            own.said.close()
            os.close(own.freed)
            os.close(own.free)


class _Taker(Generic[Answer]):
    """Whoever has the pieces of all processes written, in the order of the jobs. Made before they are started."""

    def __init__(self, ends: Sequence[_Ends], workers: Sequence[BaseProcess], file: Poured) -> None:
        self.file, self.ends = file, ends
        self.told = [file.freed] * len(ends)  # how many parts have left the window, as far as each process knows
        self.open = {own.pieces: worker for own, worker in zip(ends, workers, strict=True)}
        self.waiting: dict[str, deque[_Piece]] = defaultdict(deque)

    def begin(self) -> None:
        """Close what is the processes' own: an end that stayed open here would hide that the other one is gone."""
        for own in self.ends:
            own.said.close()

    def write(self, memory: memoryview) -> None:
        """Write what this process has made."""
        self.file.write(memory)
        self._tell()

    def answer(self, name: str) -> Answer:
        """Have all bytes of a job written, and return what it returned."""
        while True:
            while not self.waiting[name]:
                self._tell()
                self._receive()
            piece = self.waiting[name].popleft()
            self.file.grew(piece.size)
            if piece.done:
                del self.waiting[name]
                answer: Answer = piece.answer
                return answer

    def _tell(self) -> None:
        """Let the processes know what has left the window."""
        for i, own in enumerate(self.ends):
            if more := self.file.freed - self.told[i]:
                try:
                    self.told[i] += os.write(own.freed, bytes(more))
                except BlockingIOError:  # it has not looked for long, and learns it from what the pipe holds
                    continue

    def _receive(self) -> None:
        """Wait for pieces. Raises the first error that comes."""
        for pipe in wait(list(self.open)):
            assert isinstance(pipe, Connection)
            worker = self.open[pipe]
            try:
                piece: _Piece = pipe.recv()
            except EOFError:
                worker.join()
                del self.open[pipe]
                if worker.exitcode:
                    hint = "the system may have been out of memory" if worker.exitcode < 0 else ""
                    raise ResourceError(f"a process that computes was ended ({worker.exitcode})", hint) from None
                continue
            if piece.error is not None:
                raise piece.error
            self.waiting[piece.name].append(piece)


class _Hand:
    """What a process has of the window."""

    def __init__(self, own: _Ends, place: _Place) -> None:
        self.own, self.spans, self.window, self.freed = own, place.spans, place.file.window, place.file.freed
        self.name, self.begin, self.at, self.end = "", 0, 0, 0  # of the job's bytes; `begin`: of those not said yet

    def pass_on(self, name: str, stream: Stream[Any]) -> None:
        """Hand over the bytes of a job, and what it returned. Raises what it raises."""
        place, size = self.spans[name]
        self.name, self.begin, self.at, self.end = name, place, place, place + size
        answer = drained(stream, self._put)
        self._say(done=True, answer=answer)

    def _put(self, memory: memoryview) -> None:
        memory = memory.cast("B")
        if len(memory) > self.end - self.at:
            raise ValueError(f"{self.name} makes more bytes than it has")
        while memory:
            while self.window.number(self.at) >= self.freed + self.window.count:
                self._wait()
            part = self.window.part(self.at, len(memory))
            part[:] = memory[: len(part)]
            self.at += len(part)
            memory = memory[len(part) :]
            if not self.at % self.window.buffer:  # only whole parts are written
                self._say()

    def _wait(self) -> None:
        """Wait until something has left the window, after saying what is in it: that may be what all wait for."""
        if self.at > self.begin:
            self._say()
        freed = os.read(self.own.free, 1 << 16)
        if not freed:
            raise SystemExit(0)  # the parent is gone
        self.freed += len(freed)

    def _say(self, *, done: bool = False, answer: Any = None) -> None:
        self.own.said.send(_Piece(self.name, self.at - self.begin, done, answer))
        self.begin = self.at


def _keep_memory() -> None:
    """Let the C library keep what is freed: parts come and go by thousands, and each would be given back and zeroed."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, KEPT // 2)


def _work(
    jobs: Mapping[str, Callable[[], Stream[Any]]], place: _Place, numbers: int, own: _Ends, all_ends: Sequence[_Ends]
) -> None:
    """Do jobs as long as there are any."""
    _keep_memory()
    for each in all_ends:
        each.pieces.close()
        os.close(each.freed)
        if each is not own:
            each.said.close()
            os.close(each.free)
    names, hand = list(jobs), _Hand(own, place)
    while number := _next(numbers):
        name = names[int.from_bytes(number, "little")]
        try:
            hand.pass_on(name, jobs[name]())
        except BrokenPipeError:  # the parent is gone
            return
        except Exception as error:
            own.said.send(_Piece(name, 0, error=error))
            return


def _next(numbers: int) -> bytes:
    """Return the number of the next job, read from one file whose place all processes share; nothing at its end.

    Linux moves that place and reads as one step, but not in a file that is only in memory: two might get one job.
    """
    import fcntl

    fcntl.lockf(numbers, fcntl.LOCK_EX)
    try:
        return os.read(numbers, NUMBER)
    finally:
        fcntl.lockf(numbers, fcntl.LOCK_UN)
