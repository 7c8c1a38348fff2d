"""A project with one training, which can be held at its fifth step: what interrupts and lost machines are tried on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Project

Wait = Callable[[Callable[[], object]], None]
RECIPE = """\
family = "sd15"

[rehearsal.a]
on = "base"
dataset = "drawings"

[preset]
checkpoint = "a"
"""
# of which two fit on a machine of tests at once
CLUSTER = """\
[cluster]
gpus = 0
cpus = 1
memory = "1GiB"
minutes = 30
"""


def begin(project: Project, wait_for: Wait, *options: str) -> subprocess.Popen[str]:
    """Start a build and wait until its training is at step 5, with the state of step 4 published.

    It waits there for as long as the gate is: `gate` in the project, or where the project's environment says.
    """
    gate = Path(project.environment.get("REHEARSAL_GATE", project.root / "gate"))
    gate.mkdir()
    command = project.start("build", "--plain", *options, REHEARSAL_GATE=str(gate), REHEARSAL_AT="5")
    wait_for(lambda: (gate / "toy-a").exists())
    return command
