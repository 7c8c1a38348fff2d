"""An action's manifest: all that decides its result. It is hashed to the key, and `why` is the difference of two.

A content action (a training) has two: over the identities of its inputs, which for what formulas make is how they are
made, and over the inputs' bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sdforge.families import family
from sdforge.identity import canonical, digest_of_text
from sdforge.plan import Step


class Manifests:
    """Writes the manifests of the steps of one plan.

    steps: those that are evaluated already, by id; looks: what a check looks at besides what it takes.
    """

    def __init__(self, steps: Mapping[str, Step], looks: Callable[[Step], dict[str, Any]]) -> None:
        self.steps, self.looks = steps, looks
        self._frames: dict[tuple[int, str, int | None], tuple[str, str]] = {}

    def of(self, step: Step, *, content: bool) -> str:
        """Return a step's manifest as canonical JSON. content: over its inputs' bytes, which have to be known."""
        target = step.node.target
        embeds = target.signature.makes == "files"  # they tell in their headers what they are, and how they came to be
        roles: dict[str, list[str]] = {}
        for link, artifact in step.inputs:
            role = target.role(link.use.role)
            if role.moves:
                continue
            assert artifact is not None
            taken = artifact.by_content() if content else artifact
            assert taken is not None
            text = taken.named(role.reads, role.facts)
            if role.many == "table":
                use = (link.use.use or {}) | (artifact.stated() if embeds else {})
                text = f'{{"artifact":{text},"use":{canonical(use)}}}'
            roles.setdefault(link.use.role, []).append(text)
        parts = []
        for role_name in sorted(roles):
            many = target.signature.roles[role_name].many
            texts = sorted(roles[role_name]) if many == "table" else roles[role_name]
            parts.append(f'"{role_name}":' + (f"[{','.join(texts)}]" if many else texts[0]))
        before, after = self._frame(step)
        lineage = f'"lineage":{self._lineages(step)},' if embeds else ""
        looks = self.looks(step) if target.signature.group == "checks" else {}
        seen = f'"looks":{canonical(looks)},' if looks else ""
        inputs = f"{{{','.join(parts)}}},{lineage}{seen}"
        return f'{before}{inputs}{after}{target.settings},"version":{target.signature.version}}}'

    def lineage(self, step: Step) -> str:
        """Name how a step came to be: its manifest, the result that was chosen, and how its inputs came to be."""
        chosen = step.result or step.pin
        digest = chosen.digest if chosen and step.kind == "content" else ""
        name = step.node.target.signature.name
        return digest_of_text("lineage", f"{name} {step.key} {digest} {self._lineages(step)}")

    def _lineages(self, step: Step) -> str:
        """Return role → how its inputs came to be, in an order that no name decides, as canonical JSON."""
        roles: dict[str, list[str]] = {}
        for link, artifact in step.inputs:
            maker = self.steps.get(link.id)  # of a source there is none
            came = maker.lineage if maker else artifact.identity if artifact else ""
            roles.setdefault(link.use.role, []).append(came)
        known = step.node.target.signature.roles
        parts = []
        for name in sorted(roles):
            found = sorted(roles[name]) if known[name].many == "table" else roles[name]
            parts.append(f'"{name}":[' + ",".join(f'"{each}"' for each in found) + "]")
        return f"{{{','.join(parts)}}}"

    def _frame(self, step: Step) -> tuple[str, str]:
        """The parts of a manifest around inputs and settings."""
        target = step.node.target
        recipe = step.node.recipe
        key = (id(target.signature), recipe.family, target.seed)
        if (frame := self._frames.get(key)) is None:
            code = target.signature.code | {"family": family(recipe.family).version}
            seed = "" if target.seed is None else f'"seed":{target.seed},'
            frame = (
                f'{{"code":{canonical(dict(code))},"family":"{recipe.family}","inputs":',
                f'"method":"{target.signature.name}",{seed}"settings":',
            )
            self._frames[key] = frame
        return frame


def likeness(step: Step) -> str:
    """Name an action apart from its inputs: by it the store remembers that something alike was made."""
    target = step.node.target
    return digest_of_text(
        "alike", f"{target.signature.name}/{target.signature.version}/{target.seed}/{target.settings}"
    )


class Change(NamedTuple):
    """A difference of two manifests: where, and both values (None: not there)."""

    path: tuple[str, ...]
    old: Any
    new: Any


def changes(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Change]:
    """Yield where two manifests differ, leaf by leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if key not in old or key not in new or old[key] != new[key]:
                yield from changes(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and path[:1] == ("inputs",):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from changes(a, b, (*path, str(i)))
    elif old != new:
        yield Change(path, old, new)
