"""Jobs of Slurm, submitted by submitit; or, for trials, processes of this machine that submitit treats alike.

Whether a job is still there is asked of `squeue`, of all jobs at once: submitit asks `sacct`, which not every Slurm
has, and believes its answer for ten minutes.
"""

from __future__ import annotations

import math
import re
import subprocess
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import ResourceError
from sdforge.executors import Resources
from sdforge.executors.jobs import CANCELLED, LIMITS, LOST, MEMORY, Ended, library, run_folder

ASKED = 10.0  # seconds between two questions to Slurm, which serves many
PATIENCE = 30.0  # seconds for it to answer
GONE = "GONE"  # Slurm forgets a job some minutes after its end
OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT", GONE),
}  # fmt: skip
FOR_GOOD = {"CANCELLED": CANCELLED, "OUT_OF_MEMORY": MEMORY}  # how a job ends that would end alike again
# what Slurm says in a job's log of one that it ended for its memory, which not every Slurm then calls OUT_OF_MEMORY
TOO_MUCH = re.compile(
    rb"^(slurmstepd|srun)\b.*(exceeded .*memory limit|oom.kill|out of memory)", re.IGNORECASE | re.MULTILINE
)
TAIL = 1 << 16  # bytes of a log in which that is looked for
# why a job waits that will not begin until somebody changes it, the partition or its account
HOPELESS = re.compile(
    r"PartitionTimeLimit|PartitionConfig|BadConstraints|AccountNotAllowed|QOSNotAllowed|Invalid(Account|QOS)|QOSMin\w+"
    r"|(Assoc|QOS)?Max\w*Per(Job|Node)(Limit)?"
)


class Row(NamedTuple):
    """What Slurm says of a job. reason: why it waits; node: where it runs."""

    state: str
    reason: str = ""
    node: str = ""


UNASKED = Row("")


class Queue:
    """What Slurm says of jobs, asked at most every `ASKED` seconds by whichever thread comes first.

    round: how often it has answered.
    """

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        self.rows: dict[str, Row] = {}
        self.round, self.asked = 0, 0.0
        self.guard = threading.Lock()

    def add(self, job: str) -> None:
        with self.guard:
            self.jobs.add(job)

    def look(self, job: str) -> tuple[int, Row]:
        """Return the round and what was said of a job in it."""
        with self.guard:
            if time.monotonic() - self.asked > ASKED:
                self._ask()
                self.asked = time.monotonic()
            return self.round, self.rows.get(job, UNASKED)

    def _ask(self) -> None:
        command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%N", f"--jobs={','.join(self.jobs)}"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return
        if said.returncode and "Invalid job id" not in said.stderr:  # it does not answer, which tells nothing of jobs
            return
        lines = [line.split("|") for line in said.stdout.splitlines() if line.count("|") == 3]
        found = {job: Row(state, reason, node) for job, state, reason, node in lines}
        self.rows = {job: found.get(job, Row(GONE)) for job in self.jobs}
        self.round += 1


class Task:
    """What submitit runs; when a job is preempted, it is put into the queue again as it is."""

    def __call__(self, folder: str) -> None:
        run_folder(folder)

    def checkpoint(self, folder: str) -> Any:
        return import_module("submitit.helpers").DelayedSubmission(self, folder)


class SlurmJob:
    """A job of Slurm's."""

    def __init__(self, job: Any, queue: Queue) -> None:
        self.job, self.queue = job, queue
        self.name, self.log = str(job.job_id), str(job.paths.stderr)
        self.over_in = 0  # the round in which it was over for the first time
        queue.add(self.name)

    def ended(self) -> Ended | None:
        """Wait for a second such answer: a job that Slurm puts into its queue again counts as over for a moment."""
        number, row = self.queue.look(self.name)
        hopeless = row.state == "PENDING" and HOPELESS.fullmatch(row.reason)
        if not (row.state in OVER or hopeless):
            self.over_in = 0
            return None
        self.over_in = self.over_in or number
        if number == self.over_in:
            return None
        if hopeless:
            return Ended(row.reason, LIMITS)
        if row.state == "FAILED" and TOO_MUCH.search(_tail(Path(self.log))):
            return Ended("FAILED, and its log says why", MEMORY)
        return Ended(row.state, FOR_GOOD.get(row.state, LOST))

    def stands(self) -> str:
        _, row = self.queue.look(self.name)
        if row.state == "PENDING":
            reason = f" ({row.reason})" if row.reason != "None" else ""
            return f"job {self.name} waits in Slurm's queue{reason}"
        return f"job {self.name} runs on {row.node}" if row.state == "RUNNING" else ""

    def cancel(self) -> None:
        self.job.cancel(check=False)


def _tail(path: Path) -> bytes:
    """Return the end of a file; nothing of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read()
    except OSError:
        return b""


class ProcessJob:
    """A process of this machine under submitit."""

    def __init__(self, job: Any) -> None:
        self.job, self.log = job, str(job.paths.stderr)

    def ended(self) -> Ended | None:
        return Ended("its process is gone") if self.job.done() else None

    def stands(self) -> str:
        return ""

    def cancel(self) -> None:
        self.job.cancel(check=False)


class SubmititLauncher:
    """Slurm, or processes (kind) of this machine. partition: of jobs that ask for none; logs: submitit's folder."""

    def __init__(self, kind: str, partition: str, logs: Path) -> None:
        self.kind, self.partition, self.logs = kind, partition, logs
        self.submitit = library("submitit", "slurm")
        self.queue = Queue() if kind == "slurm" else None
        try:
            self._executor()
        except RuntimeError as error:
            raise ResourceError(f"Slurm is not to be had here: {error}", hint="run forge where sbatch is") from None

    def _executor(self) -> Any:
        """Return a new executor of submitit's: one has the same resources for all of its jobs."""
        cluster = "local" if self.kind == "processes" else "slurm"
        return self.submitit.AutoExecutor(folder=self.logs, cluster=cluster)

    def launch(self, folder: Path, resources: Resources) -> SlurmJob | ProcessJob:
        executor = self._executor()
        executor.update_parameters(**self._parameters(resources))
        job = executor.submit(Task(), str(folder))
        return SlurmJob(job, self.queue) if self.queue else ProcessJob(job)

    def _parameters(self, resources: Resources) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": "forge",
            "timeout_min": resources.minutes,
            "cpus_per_task": resources.cpus,
        }
        if resources.gpus:
            found["gpus_per_node"] = resources.gpus
        if resources.memory:
            found["mem_gb"] = math.ceil(resources.memory / 2**20) / 2**10  # its GB are 1024 MB of Slurm's
        if self.kind == "slurm":
            # Slurm since 22.05 gives a step one CPU, however many its job has, unless srun is told
            found["slurm_srun_args"] = [f"--cpus-per-task={resources.cpus}"]
            if partition := resources.partition or self.partition:
                found["slurm_partition"] = partition
        return found
