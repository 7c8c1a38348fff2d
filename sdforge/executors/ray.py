"""A Ray cluster that runs already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sdforge.errors import ResourceError
from sdforge.executors import Resources
from sdforge.executors.jobs import LIMITS, LOST, MEMORY, Ended, library, run_folder
from sdforge.report.words import size

ASKED = 10.0  # seconds between two looks at the nodes
PATIENCE = 600.0  # seconds in which a cluster that grows by itself may bring a node that has what is asked for


class RayJob:
    """A task of a Ray cluster. needs: what it asks a node for, as Ray calls it."""

    log = ""

    def __init__(self, ray: Any, reference: Any, needs: dict[str, float]) -> None:
        self.ray, self.reference, self.needs = ray, reference, needs
        self.begun = self.looked = time.monotonic()
        self.lacking = self._lacking()

    def ended(self) -> Ended | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if ready:
            return self._end()
        if self.lacking and time.monotonic() - self.looked > ASKED:
            self.lacking, self.looked = self._lacking(), time.monotonic()
        given_up = self.lacking and time.monotonic() - self.begun > PATIENCE
        return Ended(self.lacking, LIMITS) if given_up else None

    def _end(self) -> Ended:
        """Say how a task ended that said nothing itself: it returns nothing, but its failures are kept."""
        try:
            self.ray.get(self.reference)
        except self.ray.exceptions.OutOfMemoryError:
            return Ended("OutOfMemoryError", MEMORY)
        except self.ray.exceptions.RayError as error:
            return Ended(type(error).__name__, LOST)
        return Ended("it returned without a word", LOST)

    def _lacking(self) -> str:
        """Say that no node has what it asks for, though nothing else ran there; "" once one has."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= wanted for name, wanted in self.needs.items()) for node in nodes):
            return ""
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in self.needs}
        shown = [f"{most[name]:g} {name}s" if name != "memory" else f"{size(most[name])} of memory" for name in most]
        return f"no node of the cluster has as much, but at most {', '.join(shown)}"

    def stands(self) -> str:
        return f"waits: {self.lacking}" if self.lacking else ""

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


class RayLauncher:
    """Tasks of a Ray cluster."""

    def __init__(self, address: str) -> None:
        self.ray = library("ray", "cluster")
        if "://" in address:
            library("grpc", "cluster")  # by which Ray's client speaks
        try:
            self.ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ResourceError(f"no Ray cluster answers at {address}: {first}", hint="`ray start --head`") from None
        self.task: Any = self.ray.remote(max_retries=0)(run_folder)

    def launch(self, folder: Path, resources: Resources) -> RayJob:
        wishes: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        needs: dict[str, float] = {"CPU": resources.cpus}
        needs |= {"GPU": resources.gpus} if resources.gpus else {}
        if resources.memory:
            wishes["memory"] = needs["memory"] = resources.memory
        return RayJob(self.ray, self.task.options(**wishes).remote(str(folder)), needs)
