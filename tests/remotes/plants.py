"""What somebody who may write to a remote cache can plant there: descriptions that fit their names, and are wrong."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sdforge.remotes.action_result import decode, encode
from tests.remotes.server import CacheServer

OUTSIDE = "../../../../precious.txt"  # from a workplace in the cache: a file in the project


def actions(side: CacheServer) -> list[str]:
    return [path for path in side.held if path.startswith("/ac/")]


def plant(side: CacheServer, change: Any) -> None:
    """Replace every description by one that was changed, with actions and digests that fit it."""
    for path in actions(side):
        files = {file.path: file for file in decode(side.held[path])}
        value = json.loads(side.held[f"/cas/{files['result.json'].sha256}"])
        del value["sum"]
        change(value, side, files)
        text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        data = json.dumps(value | {"sum": hashlib.sha256(text).hexdigest()}).encode()
        name = hashlib.sha256(data).hexdigest()
        side.held[f"/cas/{name}"] = data
        files["result.json"] = files["result.json"]._replace(sha256=name, size=len(data))
        side.held[path] = encode(list(files.values()))


def facts(value: dict[str, Any], _: CacheServer, __: dict[str, Any]) -> None:
    value["facts"] = value["facts"] | {"alpha": 1000.0}


def another_table(value: dict[str, Any], side: CacheServer, files: dict[str, Any]) -> None:
    for component in value["components"].values():
        rows = json.loads(side.held[f"/cas/{component[2]}"])
        rows[0][6] = [rows[0][6][0], rows[0][6][1] + 2]  # bytes from another place of the same pack
        data = json.dumps(rows, separators=(",", ":")).encode()
        component[2] = hashlib.sha256(data).hexdigest()
        side.held[f"/cas/{component[2]}"] = data
        files[f"objects/{component[2]}"] = files["result.json"]._replace(
            path=f"objects/{component[2]}", sha256=component[2], size=len(data)
        )


def a_way_out(value: dict[str, Any], _: CacheServer, __: dict[str, Any]) -> None:
    value["packs"] = ["../../../etc/passwd"]


def a_way_out_for_bytes(_: dict[str, Any], side: CacheServer, files: dict[str, Any]) -> None:
    """Call the manifest's bytes by a path on the reader's disk."""
    side.held[f"/cas/{OUTSIDE}"] = b"planted"
    files["manifest.json"] = files["manifest.json"]._replace(sha256=OUTSIDE)


def a_way_out_for_losses(value: dict[str, Any], side: CacheServer, files: dict[str, Any]) -> None:
    """Call the kept losses by a path on the reader's disk."""
    side.held[f"/cas/{OUTSIDE}"] = b"planted"
    value["record"]["losses"] = OUTSIDE
    files[f"objects/{OUTSIDE}"] = files["manifest.json"]._replace(path=f"objects/{OUTSIDE}")


def nonsense(value: dict[str, Any], _: CacheServer, __: dict[str, Any]) -> None:
    value["components"] = 7


PLANTS = (facts, another_table, a_way_out, a_way_out_for_bytes, a_way_out_for_losses, nonsense)
