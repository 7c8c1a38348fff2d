"""A Ray cluster that runs already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdforge.errors import ResourceError
from sdforge.executors.jobs import Ended, library, run_folder
from sdforge.places import amount


class RayJob:
    """A task of a Ray cluster."""

    log = ""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def ended(self) -> Ended | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        return Ended("its worker or its node is lost") if ready else None

    def stands(self) -> str:
        return ""

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


class RayLauncher:
    """Tasks of a Ray cluster. resources: of a task, as `[cluster]` has them."""

    def __init__(self, address: str, resources: dict[str, Any]) -> None:
        self.ray = library("ray", "cluster")
        try:
            self.ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ResourceError(f"no Ray cluster answers at {address}: {first}", hint="`ray start --head`") from None
        wanted = amount(resources["memory"])
        wishes = {"num_cpus": resources["cpus"], "num_gpus": resources["gpus"], "max_retries": 0}
        self.task: Any = self.ray.remote(**wishes, **({"memory": wanted} if wanted else {}))(run_folder)

    def launch(self, folder: Path) -> RayJob:
        return RayJob(self.ray, self.task.remote(str(folder)))
