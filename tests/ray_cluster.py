"""A Ray cluster on this machine, in a process of its own: a head without resources, and two nodes.

One node has a GPU that is none, so that what a task asks for can be seen. `python -m tests.ray_cluster` is told by
lines what to do, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

GIB = 2**30
SMALL: dict[str, Any] = {"num_cpus": 1, "memory": GIB}
LARGE: dict[str, Any] = {"num_cpus": 2, "num_gpus": 1, "memory": 4 * GIB}


@dataclass
class Ray:
    """address: of the cluster itself; client: where Ray's client is served."""

    process: subprocess.Popen[str]
    address: str = ""
    client: str = ""

    def ask(self, what: str) -> Any:
        """Return what the cluster says: `used` (resource → how much of it is taken), `lose` or `gain` a large node."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def ray_cluster(**environment: str) -> Iterator[Ray]:
    """Have a Ray cluster until the end of the block. environment: of its nodes."""
    command = [sys.executable, "-m", "tests.ray_cluster"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | environment) as process:
        found = Ray(process)
        found.address, found.client = found.ask("addresses")
        yield found
        found.ask("end")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Have the cluster, and do what is asked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray's own words
    import ray
    from ray.cluster_utils import Cluster

    port = _free_port()
    head = {"num_cpus": 0, "memory": 0, "ray_client_server_port": port, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    cluster.add_node(**SMALL)
    large = cluster.add_node(**LARGE)
    cluster.wait_for_nodes()
    for line in sys.stdin:
        answer: Any = "done"
        if line == "addresses\n":
            answer = cluster.address, f"127.0.0.1:{port}"
        elif line == "used\n":
            free = ray.available_resources()
            answer = {name: total - free.get(name, 0) for name, total in ray.cluster_resources().items()}
        elif line == "lose\n":
            cluster.remove_node(large, allow_graceful=False)
        elif line == "gain\n":
            large = cluster.add_node(**LARGE)
        print(json.dumps(answer), file=answers, flush=True)
        if line == "end\n":
            break
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
