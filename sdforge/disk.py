"""`forge du`: what the cache holds, by kind, and for whom."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import ForgeError
from sdforge.graph import Node
from sdforge.orders import keeps_states, state_folder
from sdforge.plan import Step
from sdforge.repack import packs_of, unneeded
from sdforge.report.words import say, size
from sdforge.session import Session, open_session
from sdforge.store import Store
from sdforge.store.entries import Result

KINDS = {
    "packs": "tensors that were merged, baked or trained",
    "tables": "which tensors a result has, and where they lie",
    "sources": "the same of sources, with their words",
    "pictures": "drawn ones: previews, samples, class images",
    "logs": "losses, and what trainings printed",
    "results": "what was made under which key, and from what",
    "states": "of trainings, to go on from",
    "fetched": "sources from elsewhere",
    "derived": "latents and text encodings",
    "quarantine": "what was damaged",
    "left over": "what no result names: `forge clean` frees it",
    "builds": "locks, projects, and what is being made",
    "index": "for quick look-ups, made anew when it is lost",
}
OF_FOLDER = {
    **dict.fromkeys(("results", "aliases", "preimages"), "results"),
    **{name: name for name in ("states", "fetched", "derived", "quarantine")},
    **dict.fromkeys(("locks", "roots", "tmp"), "builds"),
    "index.db": "index",
}


class Owner(NamedTuple):
    """For whom a file is kept."""

    project: str
    recipe: str
    target: str


@dataclass
class Share:
    """Bytes that somebody needs, and those of them that nobody else needs."""

    total: int = 0
    alone: int = 0

    @property
    def shared(self) -> int:
        return self.total - self.alone


@dataclass
class Usage:
    """What the cache holds.

    kinds: kind → [files, bytes]; owners: file → for whom it is kept; methods: owner → method. unlisted: bytes in packs
    that no result lists any more. unread: projects whose recipes cannot be planned → why.
    """

    kinds: dict[str, list[int]] = field(default_factory=lambda: {kind: [0, 0] for kind in KINDS})
    sizes: dict[Path, int] = field(default_factory=dict)
    owners: dict[Path, set[Owner]] = field(default_factory=dict)
    methods: dict[Owner, str] = field(default_factory=dict)
    unlisted: int = 0
    unread: dict[str, str] = field(default_factory=dict)

    def share(self, depth: int) -> dict[tuple[str, ...], Share]:
        """Return owner → share: projects at depth 1, recipes at 2, targets at 3."""
        found: dict[tuple[str, ...], Share] = {}
        for path, owners in self.owners.items():
            heads = {owner[:depth] for owner in owners}
            for head in heads:
                share = found.setdefault(head, Share())
                share.total += self.sizes.get(path, 0)
                share.alone += self.sizes.get(path, 0) if len(heads) == 1 else 0
        return found


def disk_usage(session: Session) -> Usage:
    """Return what the cache of a project holds, for all projects that use it. Nothing is changed."""
    store, usage = session.store, Usage()
    usage.sizes = {path: path.lstat().st_size for path in sorted(store.root.rglob("*")) if path.is_file()}
    kinds = _kinds_of_objects(store)
    for path, count in usage.sizes.items():
        head, *rest = path.relative_to(store.root).parts
        found = kinds.get(rest[-1], "left over") if head == "objects" else OF_FOLDER.get(head, "left over")
        usage.kinds[found][0] += 1
        usage.kinds[found][1] += count
    usage.unlisted = _unlisted(store)
    for root in sorted({session.project.root, *store.roots()}):
        try:
            other = session if root == session.project.root else open_session(root, cache=store.root.parent)
            for owner, method, paths in _kept_for(other):
                usage.methods[owner] = method
                for path in paths:
                    usage.owners.setdefault(path, set()).add(owner)
        except ForgeError as error:
            usage.unread[str(root)] = error.message
    return usage


def _kinds_of_objects(store: Store) -> dict[str, str]:
    """Return sha256 → kind of the objects that results and sources need."""
    found = dict.fromkeys(store.source_tables(), "sources")
    for _, result in store.results():
        drawn = result.kind in ("pictures", "dataset")
        found |= {row[2]: "pictures" for row in result.record.get("samples", [])}
        found |= {str(result.record[name]): "logs" for name in ("losses", "log") if name in result.record}
        found |= dict.fromkeys((component.table for component in result.components.values()), "tables")
        found |= dict.fromkeys(result.packs, "pictures" if drawn else "packs")
    return found


def _unlisted(store: Store) -> int:
    """Return the bytes of tensors that lie in packs of the store, and in the table of no result."""
    return sum(map(unneeded, packs_of(store, [result for _, result in store.results()])))


def _kept_for(session: Session) -> Iterator[tuple[Owner, str, set[Path]]]:
    """Yield every target of a project with its method and the files of the cache that it needs."""
    session.open_recipes(session.project.preset_names())
    plan = session.plan(list(session.graph.nodes))
    for step in plan.steps.values():
        made = plan.steps.get(plan.before(step.id))  # what changes nothing is kept for whoever made it
        if made is not None and (paths := set(_files(session, step))):
            yield _owner(session, made.node), made.node.target.signature.name, paths


def _owner(session: Session, node: Node) -> Owner:
    return Owner(str(session.project.root), node.recipe.name, node.target.name)


def _files(session: Session, step: Step) -> Iterator[Path]:
    store = session.store
    for key in {step.key, step.content_key} - {""}:
        yield from (path for kind in ("aliases", "preimages") if (path := store.keyed(kind, key)).is_file())
        for result in store.known(key).results:
            yield store.keyed("results", key) / f"{result.digest}.json"
            yield from _objects(store, result)
    if keeps_states(step) and step.manifest:
        folder = state_folder(session, step, step.content_manifest or step.manifest)
        yield from (path for path in folder.rglob("*") if path.is_file())


def _objects(store: Store, result: Result) -> Iterable[Path]:
    whole = Result.from_json(result.to_json(record=False) | {"record": store.record(result)})
    return (path for name in whole.objects() if (path := store.object(name)).is_file())


# -- how it is shown ---------------------------------------------------------------------------------------------------


def show_usage(session: Session, *, as_json: bool) -> None:
    """`forge du`: print what the cache holds."""
    usage = disk_usage(session)
    shares = {depth: usage.share(depth) for depth in (1, 2, 3)}
    files, total = len(usage.sizes), sum(usage.sizes.values())
    if as_json:
        kinds = {name: {"files": count, "bytes": each} for name, (count, each) in usage.kinds.items()}
        rows = [_row(usage, head, share) for found in shares.values() for head, share in sorted(found.items())]
        about = {"v": 1, "event": "du", "cache": str(session.store.root), "files": files, "bytes": total}
        print(json.dumps(about | {"kinds": kinds, "unlisted": usage.unlisted, "owners": rows, "unread": usage.unread}))
        return
    for name, (count, each) in usage.kinds.items():
        if count:
            say(f"  {name:<11} {size(each):>8}  {count:>6} files  {KINDS[name]}")
    say(f"  {'all':<11} {size(total):>8}  {files:>6} files  {total} bytes in {session.store.root}")
    if usage.unlisted:
        say(f"  of the packs {size(usage.unlisted)} no result needs; `forge clean` frees it where it is most of a pack")
    for (project,), own in sorted(shares[1].items()):
        say("")
        say(f"{project if len(shares[1]) > 1 else 'for':<38} {'total':>9} {'shared':>9} {'alone':>9}")
        for head, share in sorted(shares[2].items()):
            if head[0] == project:
                say(_line(f"  {head[1]}", share))
                for owner, method in usage.methods.items():
                    if owner[:2] == head:
                        say(_line(f"    {owner.target:<18} {method}", shares[3][owner]))
        if len(shares[1]) > 1:
            say(_line("  all of it", own))
    for root, why in usage.unread.items():
        say(f"  note: the recipes of {root} cannot be planned, so what they need is not told apart: {why}")


def _line(name: str, share: Share) -> str:
    return f"{name:<38} {size(share.total):>9} {size(share.shared):>9} {size(share.alone):>9}"


def _row(usage: Usage, head: tuple[str, ...], share: Share) -> dict[str, Any]:
    named: dict[str, Any] = dict(zip(Owner._fields, head, strict=False))
    named |= {"method": usage.methods[Owner(*head)]} if len(head) == len(Owner._fields) else {}
    return named | {"bytes": share.total, "shared": share.shared, "alone": share.alone}
