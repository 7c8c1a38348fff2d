"""Jobs done side by side by processes: for what would hand the interpreter's lock to and fro as threads.

The processes are forked from this one, so that nothing is imported again or sent to them. What a job returns comes back
through a pipe, which also ends them: nobody reads what a process says whose parent is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from sdforge.errors import ResourceError

NUMBER = 4  # bytes of a job's number
CAN_FORK = sys.platform == "linux"  # elsewhere libraries do not survive it

Answer = TypeVar("Answer")


def each_done(jobs: Mapping[str, Callable[[], Answer]], processes: int) -> Generator[tuple[str, Answer]]:
    """Do all jobs, and yield the name of each with what it returned (which can be pickled), as they end.

    processes: how many work beside this one, which meanwhile is its caller's; 0: this one works. Raises what a job
    raises, and ResourceError if a process was ended from outside.
    """
    if processes and CAN_FORK:
        yield from _forked(jobs, processes)
    else:
        yield from ((name, job()) for name, job in jobs.items())


def _forked(jobs: Mapping[str, Callable[[], Answer]], processes: int) -> Iterator[tuple[str, Answer]]:
    context, open_ends, workers = get_context("fork"), list[Connection](), []
    numbers = os.memfd_create("jobs")
    try:
        os.pwrite(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in range(len(jobs))), 0)
        for _ in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            open_ends.append(ours)
            workers.append(context.Process(target=_work, args=(jobs, numbers, theirs, open_ends), daemon=True))
            workers[-1].start()
            theirs.close()
        yield from _answers(open_ends)
        for worker in workers:
            worker.join()
            if worker.exitcode:
                hint = "the system may have been out of memory" if worker.exitcode < 0 else ""
                raise ResourceError(f"a process that computes was ended ({worker.exitcode})", hint)
    finally:
        os.close(numbers)
        for worker in workers:
            worker.kill()
            worker.join()


def _answers(pipes: Sequence[Connection]) -> Iterator[tuple[str, Answer]]:
    """Yield what comes out of pipes until all are closed at their other ends. Raises the first error that comes."""
    still_open = list(pipes)
    while still_open:
        for pipe in wait(still_open):
            assert isinstance(pipe, Connection)
            try:
                name, answer, error = pipe.recv()
            except EOFError:
                still_open.remove(pipe)
                continue
            if error is not None:
                raise error
            yield name, answer


def _work(
    jobs: Mapping[str, Callable[[], Answer]], numbers: int, answers: Connection, others: Sequence[Connection]
) -> None:
    """Do jobs as long as there are any: each process reads the next number from one file, whose place all share."""
    for each in others:
        each.close()  # an end that stayed open here would hide that the parent is gone
    names = list(jobs)
    while number := os.read(numbers, NUMBER):
        name = names[int.from_bytes(number, "little")]
        try:
            answer = name, jobs[name](), None
        except Exception as error:
            answers.send((name, None, error))
            return
        answers.send(answer)
