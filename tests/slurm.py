"""A Slurm of two nodes on this machine, all of it in one folder: authentication, controller and node daemons.

The nodes share one GPU that is none (`/dev/null`), so that what a job asks for can be seen; each claims 8 GB of memory.
A partition `urgent` takes nodes away from jobs of the other one, which go back into the queue. What takes more memory
than it asked for is ended within a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")

CONFIGURATION = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ReturnToService=2
SlurmdTimeout=10
KillWait=2
SchedulerParameters=batch_sched_delay=0,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Name a program that is needed and not here."""
    return next((name for name in NEEDED if shutil.which(name) is None), "")


@dataclass
class Slurm:
    """environment: by which its programs find it. nodes: name → its daemon."""

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout.strip()

    def job(self, state: str) -> str:
        """Return the id of a job of ours in a state; "" if there is none."""
        return self.ask("squeue", "--noheader", "--format=%i", "--name=forge", f"--states={state}")

    def is_idle(self) -> bool:
        """Say whether both nodes answer and have nothing to do, and no job waits."""
        nodes = self.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split()
        return nodes == ["idle", "idle"] and not self.ask("squeue", "--noheader")

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{command[0]}-{command[-1].replace('/', '-')}.log").open("ab")
        with log:
            return subprocess.Popen(
                command, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def begin_node(self, name: str) -> None:
        self.nodes[name] = self.begin("slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon and whatever it runs, as if its power were gone."""
        daemon = self.nodes.pop(name)
        inside = f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.folder}".encode()
        daemon.kill()
        daemon.wait()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes()
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if all(each in words for each in inside) or (title.startswith(b"slurmstepd") and inside[1] in words):
                os.kill(int(folder.name), signal.SIGKILL)


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Have a Slurm until the end of the block."""
    for name in ("munge", "controller"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    values = {"host": socket.gethostname(), "user": os.environ.get("USER", "root"), "folder": folder}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(ports=_free_ports(), **values))
    (folder / "gres.conf").write_text("NodeName=n1 Name=gpu File=/dev/null\n")
    found = Slurm(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
    files = [
        f"--{name}={folder}/munge/{name.partition('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    try:
        found.others.append(found.begin("munged", "--foreground", "--force", f"--log-file={folder}/munge/log", *files))
        found.others.append(found.begin("slurmctld", "-D"))
        for name in ("n1", "n2"):
            found.begin_node(name)
        until = time.monotonic() + 30
        while found.ask("sinfo", "--noheader", "--format=%D", "--states=idle", "--partition=low") != "2":
            assert time.monotonic() < until, found.ask("sinfo")
            time.sleep(0.2)
        yield found
    finally:
        found.ask("scancel", "--name=forge", "--full")
        for each in (*found.nodes.values(), *reversed(found.others)):
            each.terminate()
            each.wait()
