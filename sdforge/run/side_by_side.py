"""Bytes made side by side by processes, and taken in their order by this one.

As threads they would hand the interpreter's lock to and fro. The processes are forked from this one, so that nothing
is imported again or sent to them. Each fills slots of a memory of its own, says so through a pipe, and goes on as far
as it has slots: so a large tensor is followed while it is made, and nothing is read back from a file. A process ends
where its pipes do: nobody takes what a process makes whose parent is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from sdforge.errors import ResourceError

NUMBER = 4  # bytes of a job's number
SLOT = 1 << 20  # bytes that are handed over at once
SLOTS = 24  # of each process: so far it may be ahead
KEPT = 64 << 20  # bytes of freed memory that each process keeps at most
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)'s numbers
CAN_FORK = sys.platform == "linux"  # elsewhere libraries do not survive it

Answer = TypeVar("Answer")
Bytes = bytes | bytearray | memoryview
Stream = Generator[Bytes, None, Answer]  # bytes from front to back, and what is to be said of them
Take = Callable[[memoryview], object]


def in_order(
    jobs: Mapping[str, Callable[[], Stream[Answer]]], take: Take, processes: int, here: Collection[str] = ()
) -> Generator[tuple[str, Answer]]:
    """Do all jobs, have their bytes taken one after the other, and yield each name with what the job returned.

    take: is given what comes next, which is overwritten afterwards. processes: how many work beside this one; 0: this
    one works. here: jobs that this process does in any case, when it is their turn. What a job returns can be pickled.
    Raises what a job raises, and ResourceError if a process was ended from outside.
    """
    if processes and CAN_FORK:
        yield from _forked(jobs, take, processes, here)
    else:
        yield from ((name, drained(job(), take)) for name, job in jobs.items())


def drained(stream: Stream[Answer], take: Take) -> Answer:
    """Have all bytes of a stream taken, and return what it returns."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        take(memoryview(piece))


class _Piece(NamedTuple):
    """What a process says: how many bytes of a job lie in which slot; at a job's end what it returned, or raised."""

    name: str
    slot: int
    size: int
    done: bool = False
    answer: Any = None
    error: Exception | None = None


class _Ends(NamedTuple):
    """What joins this process and another one: pieces come, the numbers of slots that were taken go back."""

    pieces: Connection
    said: Connection
    free: int
    freed: int
    memory: mmap.mmap

    def slot(self, number: int, size: int = SLOT) -> memoryview:
        return memoryview(self.memory)[number * SLOT : number * SLOT + size]


def _joined() -> _Ends:
    pieces, said = get_context("fork").Pipe(duplex=False)
    return _Ends(pieces, said, *os.pipe(), mmap.mmap(-1, SLOTS * SLOT))


def _forked(
    jobs: Mapping[str, Callable[[], Stream[Answer]]], take: Take, processes: int, here: Collection[str]
) -> Generator[tuple[str, Answer]]:
    numbers = os.memfd_create("jobs")
    ends = [_joined() for _ in range(processes)]
    workers = [get_context("fork").Process(target=_work, args=(jobs, numbers, own, ends), daemon=True) for own in ends]
    try:
        theirs = (i for i, name in enumerate(jobs) if name not in here)
        os.pwrite(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in theirs), 0)
        for worker in workers:
            worker.start()
        taker = _Taker[Answer](ends, workers, take)
        for name, job in jobs.items():
            yield name, drained(job(), take) if name in here else taker.answer(name)
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
    """Whoever takes the pieces of all processes, in the order of the jobs."""

    def __init__(self, ends: Sequence[_Ends], workers: Sequence[BaseProcess], take: Take) -> None:
        self.take = take
        self.open = {own.pieces: (own, worker) for own, worker in zip(ends, workers, strict=True)}
        self.waiting: dict[str, deque[tuple[_Ends, _Piece]]] = defaultdict(deque)
        for own in ends:
            own.said.close()  # an end that stayed open here would hide that the other one is gone

    def answer(self, name: str) -> Answer:
        """Take all bytes of a job, and return what it returned."""
        while True:
            while not self.waiting[name]:
                self._receive()
            own, piece = self.waiting[name].popleft()
            if piece.size:
                self.take(own.slot(piece.slot, piece.size))
                os.write(own.freed, bytes([piece.slot]))
            if piece.done:
                del self.waiting[name]
                answer: Answer = piece.answer
                return answer

    def _receive(self) -> None:
        """Wait for pieces. Raises the first error that comes."""
        for pipe in wait(list(self.open)):
            assert isinstance(pipe, Connection)
            own, worker = self.open[pipe]
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
            self.waiting[piece.name].append((own, piece))


class _Hand:
    """A process's slots."""

    def __init__(self, own: _Ends) -> None:
        self.own, self.free = own, deque(range(SLOTS))
        self.slot, self.filled = -1, 0

    def pass_on(self, name: str, stream: Stream[Any]) -> None:
        """Hand over the bytes of a job, and what it returned. Raises what it raises."""
        answer = drained(stream, lambda piece: self._put(name, piece))
        self._say(_Piece(name, max(self.slot, 0), self.filled, done=True, answer=answer))

    def _put(self, name: str, memory: memoryview) -> None:
        memory = memory.cast("B")
        while memory:
            if self.slot < 0:
                self.slot = self._next()
            part = memory[: SLOT - self.filled]
            self.own.slot(self.slot)[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            memory = memory[len(part) :]
            if self.filled == SLOT:
                self._say(_Piece(name, self.slot, SLOT))

    def _next(self) -> int:
        """Return a free slot, as soon as there is one."""
        if not self.free:
            numbers = os.read(self.own.free, SLOTS)
            if not numbers:
                raise SystemExit(0)  # the parent is gone
            self.free.extend(numbers)
        return self.free.popleft()

    def _say(self, piece: _Piece) -> None:
        self.own.said.send(piece)
        self.slot, self.filled = -1, 0  # where nothing was filled, no slot was taken


def _keep_memory() -> None:
    """Let the C library keep what is freed: parts come and go by thousands, and each would be given back and zeroed."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, KEPT // 2)


def _work(jobs: Mapping[str, Callable[[], Stream[Any]]], numbers: int, own: _Ends, all_ends: Sequence[_Ends]) -> None:
    """Do jobs as long as there are any."""
    _keep_memory()
    for each in all_ends:
        each.pieces.close()
        os.close(each.freed)
        if each is not own:
            each.said.close()
            os.close(each.free)
    names, hand = list(jobs), _Hand(own)
    while number := _next(numbers):
        name = names[int.from_bytes(number, "little")]
        try:
            hand.pass_on(name, jobs[name]())
        except BrokenPipeError:  # the parent is gone
            return
        except Exception as error:
            own.said.send(_Piece(name, 0, 0, error=error))
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
