"""`python -m sdforge.run`: one worker process. With `--socket FD` it takes orders there; with a file it runs one order.

A worker does one order at a time. When its builder is gone it stops at the next step of a training, after the state is
published; the lock's descriptor that came with the order keeps others out until then.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdforge.errors import ForgeError, ResourceError
from sdforge.method import module_of
from sdforge.order import Order, Outcome
from sdforge.ref import Damaged
from sdforge.run.states import Stopped
from sdforge.store.files import resources
from sdforge.wire import Channel


class Worker:
    """Runs orders that come over a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.stopping = False
        self.locks: list[int] = []

    def serve(self) -> None:
        """Take orders until the channel closes."""
        while received := self.channel.receive(None):
            message, files = received
            if "order" in message:
                self.locks = files
                self.stopping = False
                self._serve_one(message)
                for fd in self.locks:
                    os.close(fd)
                self.locks = []

    def _serve_one(self, message: dict[str, Any]) -> None:
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        order = Order.from_json(message["order"])
        self.say(run_reporting(order, self.report, self.stopped))
        sys.stdout.flush()
        sys.stderr.flush()

    def report(self, **event: Any) -> None:
        """Say how it goes."""
        self.say({"event": "progress", **event})

    def say(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except OSError:  # the builder is gone; `stopped` will notice
            self.stopping = True

    def stopped(self) -> bool:
        """Say whether to stop at this step: we were asked to, or nobody is there any more."""
        received = self.channel.receive(0)
        if received and received[0].get("stop"):
            self.stopping = True
        return self.stopping or self.channel.closed


def run_reporting(order: Order, report: Any, stopped: Any) -> dict[str, Any]:
    """Run an order; return what to say of its end."""
    try:
        outcome = run(order, report, stopped)
    except Damaged as error:
        return {"event": "damaged", "path": error.path, "message": error.message}
    except ForgeError as error:
        return {"event": "failed", "code": error.exit_code, "message": error.message, "hint": error.hint}
    except MemoryError:
        return _too_little(order, "this machine")
    except Stopped:
        return {"event": "stopped"}
    except OSError as error:
        return _refused(error)
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, RuntimeError) and "t allocate memory" in str(error):  # what torch says of the CPU's
            return _too_little(order, "this machine")
        if "OutOfMemory" in type(error).__name__ or "out of memory" in str(error):
            return _too_little(order, "the device")
        return _unforeseen(error)
    return {"event": "done", "outcome": outcome.__dict__}


def _refused(error: OSError) -> dict[str, Any]:
    """Say what the operating system would not do."""
    try:
        with resources("it could not go on"):
            raise error
    except ResourceError as found:
        return {"event": "failed", "code": found.exit_code, "message": found.message, "hint": found.hint}


def _too_little(order: Order, what: str) -> dict[str, Any]:
    """Say that there is too little memory, and how it is done with less."""
    return {"event": "failed", "code": 4, "message": f"{what} is out of memory", "hint": order.with_less()}


def _unforeseen(error: Exception) -> dict[str, Any]:
    first = str(error).splitlines()[0] if str(error) else ""
    return {"event": "failed", "code": 1, "message": f"{type(error).__name__}: {first}", "hint": ""}


def run(order: Order, report: Any, stopped: Any) -> Outcome:
    """Run an order: a training by the shared loop (or its own), a formula tensor by tensor, an edit by its `run`."""
    made: Outcome
    module = module_of(order.group, order.method)
    own = getattr(module, "run", None)
    if order.compute:
        # formulas bring threads of their own, on whose number nothing depends, and are exact without torch's help
        made = _formula().run_formula(order, report)
    elif own and getattr(module, "INLINE", False):  # it only moves bytes
        made = own(order, report)
    else:
        if not getattr(module, "BARE", False):  # it needs no torch
            prepare(order.how["device"], order.how["threads"])
        own = own or importlib.import_module("sdforge.run.train").run_training
        keeps_state = order.group == "trainings" or getattr(module, "KEEPS_STATE", False)
        made = own(order, report, stopped) if keeps_state else own(order, report)
    return made


def _formula() -> Any:
    """Return the module that computes formulas. What torch's import makes stays anyway, and is not looked through.

    Only then: whatever a process made before it would stay as well, the networks of a training among it.
    """
    if "torch" in sys.modules:
        return importlib.import_module("sdforge.run.formula")
    gc.disable()
    found = importlib.import_module("sdforge.run.formula")
    gc.freeze()
    gc.enable()
    return found


def prepare(device: str, threads: int) -> None:
    """Set what must be set before torch computes: threads, determinism, quiet libraries. Raises ResourceError."""
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a tenth of a step's time on an H200, for memory that is written next
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            reason = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device answers"
            raise ResourceError(f"the device {device} is not to be had: {reason}", hint="--device cpu serves too")
        torch.cuda.set_device(torch.device(device))
        torch.backends.cudnn.benchmark = False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sdforge.run")
    parser.add_argument("order", nargs="?", help="a file with one order")
    parser.add_argument("--socket", type=int, help="a descriptor over which orders come")
    parser.add_argument("--expecting", action="store_true", help="read what most orders need before one comes")
    arguments = parser.parse_args()
    if arguments.socket is None:
        order = Order.from_json(json.loads(Path(arguments.order).read_bytes()))
        print(json.dumps(run_reporting(order, lambda **e: print(json.dumps(e)), lambda: False)))
        return 0
    # a Ctrl-C in the terminal is the builder's to hear; it says what to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.expecting:
        with suppress(Exception):  # whatever is wrong, the order that needs it says so
            _formula()
    Worker(Channel(socket.socket(fileno=arguments.socket))).serve()
    os._exit(0)  # the builder waits for the end, and torch takes a fifth of a second to take itself down in order


if __name__ == "__main__":
    sys.exit(main())
