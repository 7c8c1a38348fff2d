"""`forge push`, `forge pull`, `forge sign`, and the fetching of a pinned result while a build runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdforge.errors import BrokenPromise, ForgeError, ResourceError, UsageError
from sdforge.executors.beside import Beside
from sdforge.lock import Pin
from sdforge.places import LOCK
from sdforge.remotes import is_folder
from sdforge.report.hashing import Fetching
from sdforge.report.words import glyphs, safe, say, size
from sdforge.session import Session
from sdforge.sharing import ABSENT, SIGN_ANEW, Poisoned, Sharing, pinned_results
from sdforge.signing import check_key, sign, signer
from sdforge.store.entries import Result
from sdforge.store.files import publish_bytes


def fetching(sharing: Sharing, pin: Pin) -> Beside:
    """Start to bring a pinned result here, beside the build, which keeps it: the index is for one thread only."""

    def work(say: Callable[[dict[str, Any]], None]) -> None:
        end: dict[str, Any]
        try:
            came = sharing.bring(pin, lambda done, total: say({"event": "progress", "bytes": [done, total]}))
            if came is None:
                end = {"event": "missed", "message": "the remote cache has not all of it", "gone": False}
            else:
                end = {"event": "fetched", "result": came[0], "manifest": came[1]}
        except Poisoned as error:
            end = {"event": "missed", "message": f"{error.message}; {error.hint}", "gone": False}
        except ForgeError as error:
            end = {"event": "missed", "message": error.message, "gone": isinstance(error, ResourceError)}
        except Exception as error:  # whatever it is, the build goes on without the remote
            end = {"event": "missed", "message": f"{type(error).__name__}: {error}", "gone": True}
        say(end)

    return Beside(work)


# -- commands ----------------------------------------------------------------------------------------------------------


def push(session: Session, wishes: argparse.Namespace) -> int:
    """`forge push`: put what the lock pins and the store has into the remote cache.

    Returns 3 where a statement there is not believed. Raises BrokenPromise for what cannot be written anew.
    """
    sharing, sent, doubtful = _sharing(session), 0, False
    key = Path(wishes.at) / wishes.key if wishes.key else None
    if key:
        check_key(key)  # before gigabytes travel
    for pin, name in _wanted(session, wishes.targets):
        results = {result.digest: result for result in session.store.known(pin.key).results}
        result = results.get(pin.digest)
        if result is None or not session.store.holds(result):
            _tell(wishes, name, pin, "not here", 0)
            continue
        whole = replace(result, record=session.store.record(result))  # which the index has not
        state, amount = _pushed(sharing, wishes, whole, pin, name)
        if key:
            sharing.put_statement(pin, key)
        elif wishes.verify and sharing.trusted:
            doubtful |= _is_doubtful(sharing, pin, name)
        _tell(wishes, name, pin, state, amount)
        sent += amount
    _end(wishes, "sent", sent)
    return 3 if doubtful else 0


def _pushed(sharing: Sharing, wishes: argparse.Namespace, result: Result, pin: Pin, name: str) -> tuple[str, int]:
    """Put a result there; return what is said of it, and how many bytes travelled."""
    if not wishes.verify:
        amount = sharing.push(result, _shown(wishes, name))
        return "pushed" if amount else "was there", amount
    wrong, amount = sharing.mend(result, pin, _shown(wishes, name))
    if wrong in ("", ABSENT):
        return "pushed" if wrong else "is as it was pushed", amount
    _warn(name, wrong)
    return "put anew", amount


def _is_doubtful(sharing: Sharing, pin: Pin, name: str) -> bool:
    """Say whether somebody has signed something about a key that is not believed, or is not what the lock pins."""
    try:
        said = sharing.statement(pin.key)
    except BrokenPromise as error:
        _warn(name, f"{error.message}; {error.hint}")
        return True
    if said is not None and said.digest != pin.digest:
        _warn(name, f"signed is {said.digest[:12]}, pinned is {pin.digest[:12]}; {SIGN_ANEW}")
        return True
    return False


def _warn(name: str, text: str) -> None:
    print(safe(f"warning: {name}: {text}", sys.stderr), file=sys.stderr)


def pull(session: Session, wishes: argparse.Namespace) -> int:
    """`forge pull`: bring what the lock pins here. Returns 3 if something is not to be had."""
    came, states = _bring(_sharing(session), session, wishes, _wanted(session, wishes.targets))
    _end(wishes, "fetched", came)
    return 3 if "not to be had" in states else 0


def look_for_pinned(session: Session, wishes: argparse.Namespace, recipes: list[str]) -> bool:
    """Bring what the lock pins of recipes (none: of all) and the store has not, from a remote cache if one is named.

    Offline a folder is looked into, and nothing else. Returns whether there was something to look for. Raises
    ResourceError.
    """
    remote = session.project.remote
    if not remote.get("address") or remote.get("mode") == "off":
        return False
    lacking = [(pin, name) for pin, name in _wanted(session, recipes) if not _is_here(session, pin)]
    if lacking and wishes.offline and not is_folder(remote["address"]):
        names = ", ".join(name for _, name in lacking)
        raise ResourceError(
            f"pinned and not on this machine: {names}; --offline opens no connection", hint="run it without --offline"
        )
    session.share()
    if session.unreachable:
        raise session.unreachable
    assert session.sharing is not None
    _bring(session.sharing, session, wishes, lacking)
    return bool(lacking)


def _is_here(session: Session, pin: Pin) -> bool:
    found = {result.digest: result for result in session.store.known(pin.key).results}.get(pin.digest)
    return found is not None and session.store.holds(found)


def _bring(
    sharing: Sharing, session: Session, wishes: argparse.Namespace, wanted: list[tuple[Pin, str]]
) -> tuple[int, list[str]]:
    """Bring pinned results here; return how many bytes came, and what is said of each."""
    came, states = 0, []
    with session.store.used_by(session.project.root):
        for pin, name in wanted:
            if _is_here(session, pin):
                state, amount = "was here", 0
            else:
                state, amount = _pulled(sharing, wishes, pin, name)
            _tell(wishes, name, pin, state, amount)
            states.append(state)
            came += amount
    return came, states


def _pulled(sharing: Sharing, wishes: argparse.Namespace, pin: Pin, name: str) -> tuple[str, int]:
    try:
        result = sharing.pull(pin, _shown(wishes, name))
    except Poisoned as error:
        _warn(name, f"{error.message}; {error.hint}")
        result = None
    if result is None:
        return "not to be had", 0
    return "pulled", sum(sharing.store.object(pack).stat().st_size for pack in result.packs)


def sign_lock(session: Session, wishes: argparse.Namespace) -> int:
    """`forge sign`: write the signature of forge.lock beside it."""
    path = session.project.lock
    if not path.is_file():
        raise UsageError(f"there is no {LOCK} yet", hint="`forge build` or `forge lock` writes it")
    signature = sign(path.read_bytes(), Path(wishes.at) / wishes.key)
    publish_bytes(signature.encode(), path.with_name(f"{LOCK}.sig"), path.parent, 0o644)
    if wishes.json:
        print(json.dumps({"v": 1, "event": "sign", "file": f"{LOCK}.sig"}))
    else:
        say(f"  {LOCK}.sig is written; commit it. `forge verify --signed` checks it against [trust] keys")
    return 0


def verify_signature(session: Session) -> str:
    """Return the trusted key that signed forge.lock as it is. Raises BrokenPromise."""
    path = session.project.lock
    signature = path.with_name(f"{LOCK}.sig")
    if not path.is_file() or not signature.is_file():
        raise BrokenPromise(f"{LOCK} is not signed", hint="`forge sign --key FILE` signs it")
    try:
        return signer(path.read_bytes(), signature.read_bytes().decode(errors="replace"), session.project.trusted)
    except BrokenPromise as error:
        raise BrokenPromise(f"{LOCK}.sig: {error.message}", error.hint) from None


def verify_signed(session: Session, *, as_json: bool) -> int:
    """`forge verify --signed`: say whose signature the lock bears. Raises BrokenPromise."""
    key = verify_signature(session)
    if as_json:
        print(json.dumps({"v": 1, "event": "signed", "file": LOCK, "key": key}))
    else:
        say(f"  {LOCK} is signed by {key}")
    return 0


def _sharing(session: Session) -> Sharing:
    if session.project.remote.get("mode") == "off":
        raise UsageError("[remote] is switched off", hint='`mode = "read"` or `"write"` there switches it on')
    session.share("write")
    if session.unreachable:
        raise session.unreachable
    if session.sharing is None:
        raise UsageError(
            "no remote cache is named", hint='in forge.toml or forge.local.toml: [remote] address = "https://…"'
        )
    session.store.prepare()
    return session.sharing


def _wanted(session: Session, names: list[str]) -> list[tuple[Pin, str]]:
    """Return the pins behind targets (default: all of the lock), each with a name to show."""
    targets = {row["key"]: name for name, row in session.lock.targets.items() if "key" in row}
    keys = None
    if names:
        wanted = session.resolve(names)
        behind = {node.id for node in session.graph.behind(wanted)}
        keys = {key for key, name in targets.items() if name in behind}
    return [(pin, targets.get(pin.key, pin.method)) for pin in pinned_results(session.lock.results, keys)]


def _shown(wishes: argparse.Namespace, name: str) -> Callable[[int, int], None]:
    shown = Fetching()
    return (lambda *_: None) if wishes.json else lambda done, total: shown(name, done, total)


def _tell(wishes: argparse.Namespace, name: str, pin: Pin, state: str, amount: int) -> None:
    if wishes.json:
        about = {"target": name, "key": pin.key, "digest": pin.digest, "state": state, "bytes": amount}
        print(json.dumps({"v": 1, "event": wishes.command, **about}))
        return
    sign = glyphs(sys.stdout)["failed" if state in ("not here", "not to be had") else "reuse"]
    say(f"  {sign} {name:<30} {pin.digest[:8]}  {state}{f'  {size(amount)}' if amount else ''}")


def _end(wishes: argparse.Namespace, verb: str, amount: int) -> int:
    if not wishes.json:
        say(f"  {size(amount)} {verb}")
    return 0
