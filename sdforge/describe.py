"""`forge show FILE`: what a file or a checkpoint's folder says of itself, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdforge.dtypes import SAFETENSORS
from sdforge.errors import UsageError, counted
from sdforge.formats.finite import Finite
from sdforge.formats.layout import Layout, read_layout
from sdforge.formats.own import MANIFEST
from sdforge.formats.pickled import is_pickle
from sdforge.formats.safetensors import Header, read_header, read_range
from sdforge.formats.single_file import FACTS, TOKENIZER
from sdforge.import_step import import_file
from sdforge.pictures import PICTURES
from sdforge.report.words import safe, screen_width, size
from sdforge.store.files import open_regular, sha256_of

MOST_TENSORS = 12  # of a file of no known kind, that are named
MOST_LETTERS = 100  # of a metadata entry
KEY = 8  # letters of the column that says what a line is about
TIED = "\u00a0"  # a space at which no line is broken
SAID = (FACTS, TOKENIZER, MANIFEST)  # metadata whose content stands among the other lines
UNSAID: tuple[Any, ...] = ("", None, [], {})  # settings that nobody wrote
TYPES = {theirs: ours for ours, theirs in SAFETENSORS.items()}  # as files write them → as recipes do


def show_file(path: Path, *, as_json: bool) -> None:
    """Print what is known of a file or folder. Raises UsageError for what is neither safetensors nor a pickle."""
    described = describe(path)
    if as_json:
        print(json.dumps({"v": 1, "event": "file"} | described))
        return
    for key, value in described.items():
        for line in _lines(key, value):
            print(safe(_broken(line, screen_width(sys.stdout)), sys.stdout))


def _broken(line: str, width: int) -> str:
    """Return a line that is set in, broken where a terminal is `width` letters wide (0: nowhere); words stay whole.

    What a file says in several lines is one here, as none of them is to look like another entry.
    """
    inset, hang, line = "  ", " " * (KEY + 3), " ".join(line.splitlines())
    if not width:
        return inset + line.replace(TIED, " ")
    return textwrap.fill(
        line,
        width,
        initial_indent=inset,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace(TIED, " ")


def _model_in(path: Path) -> Path:
    """Return the model that a preset's folder in `out/` holds; of anything else the path itself."""
    if not (path / "preset.json").is_file():
        return path
    single = path / f"{path.resolve().name}.safetensors"
    return next((model for model in (single, path / "diffusers") if model.exists()), path)


def describe(path: Path) -> dict[str, Any]:
    """Return what is known of a file or folder: kind, dialect, family, facts, hashes, metadata, how it was made.

    broken: its tensors that hold NaN or Inf.
    """
    path = _model_in(path)
    described: dict[str, Any] = {"path": str(path)}
    if not path.is_dir() and path.suffix.lower() in PICTURES:
        return described | _picture(path)
    if not path.is_dir() and is_pickle(path):
        return described | _pickle(path)
    header = None if path.is_dir() else read_header(path)
    try:
        layout = read_layout(path)
    except UsageError as error:
        if header is None:
            raise
        described |= {"refused": error.message, "hint": error.hint, "tensors": _some(header)}
    else:
        described |= _told(layout)
    return described | (_of_file(path, header) if header else _of_folder(path, layout))


def _told(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": layout.kind, "dialect": layout.dialect, "family": layout.family}
    found["facts"] = layout.facts
    found["tensors"] = {name: len(table) for name, table in layout.shapes().items()}
    found["dtypes"] = _dtypes(tensor.dtype for tensor in layout.tensors)
    if layout.tokenizer:
        found["words"] = len(layout.tokenizer["vocab"])
    return found | {"passed": dict(layout.passed)} | layout.notes


def _some(header: Header) -> dict[str, list[int]]:
    return {name: list(entry.shape) for name, entry in list(header.tensors.items())[:MOST_TENSORS]}


def _dtypes(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _of_file(path: Path, header: Header) -> dict[str, Any]:
    """Return size and hashes (Civitai's AutoV2 and AutoV3 too), what stands beside the tensors, which hold NaN, Inf."""
    whole, body, broken = hashlib.sha256(), hashlib.sha256(), []
    with path.open("rb") as file:
        whole.update(file.read(header.data))
        for name, entry in sorted(header.tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
            finite = Finite(entry.dtype)
            for chunk in read_range(file.fileno(), entry.offset, entry.size):
                whole.update(chunk)
                body.update(chunk)
                finite.update(chunk)
            broken += [name] if finite.broken else []
    found: dict[str, Any] = {
        "bytes": header.size,
        "sha256": whole.hexdigest(),
        "autov2": whole.hexdigest()[:10].upper(),
        "autov3": body.hexdigest()[:12].upper(),
        "dtypes": _dtypes(entry.dtype for entry in header.tensors.values()),
        "metadata": header.metadata,
    }
    found |= {"broken": broken} if broken else {}
    return found | ({"made": made} if (made := made_by(header.metadata)) else {})


def made_by(metadata: dict[str, str]) -> list[dict[str, Any]]:
    """Return the actions behind a file of ours, in their order, as its metadata has them; nothing of what is none."""
    try:
        actions = json.loads(metadata.get(MANIFEST, "{}")).get("actions", [])
    except (ValueError, AttributeError, RecursionError):
        return []
    return actions if isinstance(actions, list) and all(map(_is_action, actions)) else []


def _is_action(action: Any) -> bool:
    """Say whether something is laid out as an action is in a file's metadata, where anybody may write."""
    manifest = action.get("manifest", {}) if isinstance(action, dict) else None
    return isinstance(manifest, dict) and all(isinstance(manifest.get(k, {}), dict) for k in ("settings", "inputs"))


def _of_folder(path: Path, layout: Layout) -> dict[str, Any]:
    files = {str(file.relative_to(path)): file for file in layout.files}
    return {
        "bytes": sum(file.stat().st_size for file in files.values()),
        "files": {name: sha256_of(file) for name, file in files.items()},
    }


def _picture(path: Path) -> dict[str, Any]:
    """Return what an embedding is that a picture carries. Raises UsageError for a picture without one."""
    with tempfile.TemporaryDirectory() as work:
        imported = Path(work) / f"{path.stem}.safetensors"
        import_file(path, imported, "picture")
        told = _told(read_layout(imported))
    return told | {"dialect": "A1111, in a picture"} | _whole(path)


def _whole(path: Path) -> dict[str, Any]:
    """Return size and hashes of a file that is no safetensors."""
    sha256 = sha256_of(path)
    return {"bytes": path.stat().st_size, "sha256": sha256, "autov2": sha256[:10].upper()}


def _pickle(path: Path) -> dict[str, Any]:
    """Return what can be said of a pickle without opening it: its hashes."""
    os.close(open_regular(path))
    refused = (
        "it could run code when it is opened; `forge convert --pickle allow`, or a source that states "
        'pickle = "allow", converts it safely'
    )
    return {"kind": "pickle", "refused": refused} | _whole(path)


def _lines(key: str, value: Any) -> Iterator[str]:
    """Yield one entry as people read it."""
    if key in ("metadata", "files"):
        for name, text in sorted(value.items()):
            if name not in SAID:
                yield f"{_cut(name)}: {_cut(text)}"
    elif key == "made":
        for number, action in enumerate(value):
            yield f"made {number:<3} {_action(action)}"
    elif key == "passed":
        yield from (f"{key:<{KEY}} {counted(count, 'tensor')}: {reason}" for reason, count in value.items())
    elif key == "tensors" and any(isinstance(each, list) for each in value.values()):
        yield from (f"{key:<{KEY}} {name} {each}" for name, each in value.items())
    elif value or value == 0:
        yield f"{key:<{KEY}} {_text(key, value)}"


def _text(key: str, value: Any) -> str:
    """Return a value in words: a table as `name value, name value`, a list as its parts."""
    if key == "bytes":
        return size(value)
    if isinstance(value, dict):
        return ", ".join(f"{TYPES.get(name, name)}{TIED}{_text('', each)}" for name, each in value.items())
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}… ({len(text):,} characters)"


def _action(action: dict[str, Any]) -> str:
    """Say in a line what an action behind a file was: its method, or the source that it is."""
    if "source" in action:
        return f"{action.get('kind', 'source')} {str(action['source'])[:16]}"
    manifest = action.get("manifest")
    method = manifest.get("method") if isinstance(manifest, dict) else action.get("method")
    settings = manifest.get("settings", {}) if isinstance(manifest, dict) else {}
    told = ", ".join(f"{name} = {json.dumps(each)}" for name, each in sorted(settings.items()) if each not in UNSAID)
    digest = f" → {str(action['digest'])[:8]}" if "digest" in action else ""
    return f"{method}{_inputs(action)}{digest}" + (f"  {_cut(told)}" if told else "")


def _inputs(action: dict[str, Any]) -> str:
    """Return the numbers of the actions from which one was made: ` of 0, 1`."""
    inputs = action.get("inputs")
    lists = inputs.values() if isinstance(inputs, dict) else ()
    numbers = [str(number) for each in lists if isinstance(each, list) for number in each]
    return f" of {', '.join(numbers)}" if numbers else ""
