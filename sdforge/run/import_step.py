"""What cannot be read where it lies → safetensors: `python -m sdforge.run.import_step OLD NEW pickle|picture|scaled`.

Pickles could run code when they are opened, pictures could unfold to anything, and numbers that stand apart from their
scales are no weights yet. So a process of its own converts them, once: without network where the system allows that,
with limits on memory, time, open files and what it writes that follow from the file's size. Of a pickle torch takes
numbers and plain containers and refuses everything else (`weights_only`); what comes out is flat, name → dense tensor,
and no larger than the file.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdforge.errors import ForgeError, UsageError
from sdforge.formats.safetensors import MOST_HEADER, MOST_TENSORS, write_file

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of Linux' unshare(2)
SPARE_MEMORY = 1 << 30  # bytes beyond what the process has when it begins, and twice the file
SPARE_SECONDS, PACE = 30, 20 << 20  # of processor time, and bytes of the file for one second more
MOST_FILES = 64
MOST_PICKLE = 64 << 20  # bytes of the opcodes alone; those of a real checkpoint are less than one
STATES = ("state_dict",)  # under which training programs keep the weights, beside what else they keep
# classes of which nothing is kept, but which stand in old checkpoints beside their weights
IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
PARAMETERS = "torch.nn.modules.container.ParameterDict"  # as the first textual inversions keep their rows


class Stub:
    """Stands for an object of a class of IGNORED or PARAMETERS: takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Stub:  # noqa: PYI034 -- mypy: a pickle calls it with anything
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def main(arguments: list[str]) -> int:
    """Convert; return the exit code. What is wrong is printed: a sentence, and a hint below it."""
    old, new, what = Path(arguments[0]), Path(arguments[1]), arguments[2]
    leave_network()
    size = old.stat().st_size
    from sdforge.run.embedding_picture import read_picture
    from sdforge.run.scaled import write_scaled
    from sdforge.run.tensors import NAMES, raw

    limit(size)
    try:
        if what == "scaled":
            write_scaled(old, new)
            return 0
        tensors, metadata = read_pickle(old) if what == "pickle" else read_picture(old)
        if what == "pickle":
            refuse_larger(old, tensors, size)
        shapes = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_file(new, shapes, lambda name: [raw(tensors[name])], metadata)
    except MemoryError:
        print(f"{old} needs more memory than a file of its size should")
        return UsageError.exit_code
    except ForgeError as error:
        print(f"{error.message}\n{error.hint}")
        return UsageError.exit_code
    return 0


# -- limits ------------------------------------------------------------------------------------------------------------


def leave_network() -> None:
    """Go where there is no network; only a process of one thread can, so before torch begins any."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def limit(size: int) -> None:
    """Limit what the rest of this process may take. size: of the file, in bytes."""
    with suppress(OSError):  # not everywhere can a process say how large it is
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + 2 * size + SPARE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    seconds = int(time.process_time()) + SPARE_SECONDS + size // PACE
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    written = 2 * size + MOST_HEADER  # fp8 becomes fp16
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError):  # of an administrator it is not asked
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def refuse_larger(path: Path, tensors: dict[str, Any], size: int) -> None:
    """Refuse tensors that are more than the file can hold: views that repeat a few numbers without end."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > size:
        raise UsageError(f"{path} would become {total:,} bytes of tensors out of a file of {size:,}")


# -- pickles -----------------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a pickle's tensors by the names of its kind, and metadata. Raises UsageError for what has none."""
    whole = load(path)
    if isinstance(whole, dict):
        whole = next((whole[key] for key in STATES if isinstance(whole.get(key), dict)), whole)
    if isinstance(whole, list | tuple):
        return numbered(path, whole), {}
    if not isinstance(whole, dict):
        raise UsageError(f"{path} holds no table of tensors")
    if "string_to_param" in whole:
        return {"emb_params": rows(path, whole["string_to_param"])}, {}
    if any(type(key) is int for key in whole):
        from sdforge.run.hypernetwork_pt import read_networks

        return read_networks(path, whole)
    return flat(path, whole), {}


def load(path: Path) -> Any:
    """Load a pickle as numbers and plain containers. Raises UsageError for anything else in it."""
    import torch

    zipped = refuse_packed(path)
    stubs: Any = [(type(name, (Stub,), {}), name) for name in (*IGNORED, PARAMETERS)]
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:
        if "can't allocate memory" in str(error) or "Cannot allocate memory" in str(error):
            raise MemoryError from None
        named = re.search(r"GLOBAL (\S{1,80})", str(error))
        what = f"it names {named[1]!a}, which is code" if named else "it is damaged"
        raise UsageError(f"{path} is no pickle of mere numbers: {what}") from None


def refuse_packed(path: Path) -> bool:
    """Refuse zips that are not as torch writes them, their parts stored as they are; return whether it is a zip."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UsageError(f"{path} is a damaged zip: {error}") from None
    if len(parts) > MOST_TENSORS:
        raise UsageError(f"{path} holds {len(parts):,} parts; the most is {MOST_TENSORS:,}")
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise UsageError(f"{path} is a zip with packed parts, which torch does not write")
    if any(part.filename.endswith(".pkl") and part.file_size > MOST_PICKLE for part in parts):
        raise UsageError(f"{path} has more to unpickle than {MOST_PICKLE:,} bytes")
    return True


def flat(path: Path, whole: dict[Any, Any]) -> dict[str, Any]:
    """Return the tensors of a flat table; plain values beside them are no tensors. Raises UsageError for others."""
    if len(whole) > MOST_TENSORS:
        raise UsageError(f"{path} holds {len(whole):,} tensors; the most is {MOST_TENSORS:,}")
    tensors = {}
    for name, value in whole.items():
        if is_dense(value) and isinstance(name, str):
            tensors[name] = value.detach()
        elif not isinstance(value, str | int | float | bool | None):
            raise UsageError(f"{path} holds {str(name)[:60]!a}, which is neither a plain tensor nor a plain value")
    if not tensors:
        raise UsageError(f"{path} holds no tensors")
    return tensors


def is_dense(value: Any) -> bool:
    """Say whether this is a tensor of a type that safetensors has, with numbers of its own."""
    import torch

    from sdforge.run.tensors import NAMES

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype in NAMES


def rows(path: Path, terms: Any) -> Any:
    """Return the rows of an A1111 embedding, or of one of the first, whose table is torch's own."""
    found = list(_tensors_within(terms))
    if len(found) != 1:
        raise UsageError(f"{path} is an embedding of {len(found)} terms; one is read")
    return found[0].detach()


def _tensors_within(value: Any, depth: int = 4) -> Iterator[Any]:
    if is_dense(value):
        yield value
    elif depth and isinstance(value, dict):
        for inner in list(value.values())[:8]:
            yield from _tensors_within(inner, depth - 1)
    elif isinstance(value, Stub):
        yield from _tensors_within(value.state, depth)


def numbered(path: Path, whole: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """Return the factors of a LoRA of the first implementation, a list of up and down, as its safetensors call them.

    That of the text encoder lies in a file of its own, `….text_encoder.pt`.
    """
    if not whole or len(whole) % 2 or len(whole) > MOST_TENSORS or not all(is_dense(each) for each in whole):
        raise UsageError(f"{path} is a list that is no LoRA: pairs of tensors are read")
    component = "text_encoder" if path.stem.endswith(".text_encoder") else "unet"
    return {f"{component}:{i // 2}:{('up', 'down')[i % 2]}": each.detach() for i, each in enumerate(whole)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
