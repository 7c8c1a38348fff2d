"""What has to be done, in what order, and why: a pure function of recipes, sources, lock and what the store has.

An action's *manifest* is all that decides its result, as one value: it is hashed to the key, and `why` is the
difference of two of them. A content action (a training) has two keys: the plan key over the identities of its inputs,
which for what formulas make is how they are made, and the content key over the inputs' bytes. When the plan key is
unknown but the content key is, the result is kept: that is the early cut-off.

A formula whose bytes nobody takes but one other formula is computed within that one's pass, and kept nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sdforge.artifact import Artifact, Component, Tensor
from sdforge.errors import BrokenPromise, Problem, RecipeError, SettingErrors, UsageError
from sdforge.families import family
from sdforge.graph import Graph, Link, Node, Taken, way_in, wrong_kind
from sdforge.identity import H, canonical, digest_of_text
from sdforge.lock import Lock, Pin
from sdforge.method import method
from sdforge.recipe import Use
from sdforge.store import Known, Result

STATES = ("reuse", "fetch", "build", "maybe", "unneeded")
MOST_LISTED = 32  # formulas whose tensors are kept listed; a chain lists each of its links once


if TYPE_CHECKING:
    from sdforge.formula import Made
    from sdforge.formula import Plan as FormulaPlan


class View(Protocol):
    """What planning asks of the store."""

    def known(self, key: str) -> Known: ...
    def table(self, component: Component) -> list[Tensor]: ...
    def vocabulary(self, component: Component) -> dict[str, Any]: ...
    def holds(self, result: Result) -> bool: ...
    def offered(self, pin: Pin) -> bool: ...
    def vouched(self, key: str) -> Pin | None: ...
    def looks(self, step: Step) -> dict[str, Any]: ...
    def permits(self, step: Step) -> bool: ...


@dataclass(eq=False)
class Step:
    """A target as the plan sees it: one action, or a mere moving of components.

    manifest, key: over the identities of its inputs; "" while an input is not known yet.
    content_manifest, content_key: over their bytes; "" while those are not known.
    artifact: what it is, as far as can be told; result: what the store has of it; pin: what the lock wants.
    makers: component → id of the step that made it (a source's id for what passes from there).
    lineage: the name of how it came to be, all the way from the sources; files that embed it depend on it.
    """

    node: Node
    inputs: tuple[tuple[Link, Artifact | None], ...] = ()
    manifest: str = ""
    key: str = ""
    content_manifest: str = ""
    content_key: str = ""
    artifact: Artifact | None = None
    result: Result | None = None
    pin: Pin | None = None
    state: str = "unneeded"
    reason: str = ""
    lineage: str = ""
    makers: dict[str, str] = field(default_factory=dict)
    differs: bool = False  # from the pin
    idle: bool = False  # a formula that changes nothing here
    restore: bool = False  # the result is known, the files in `out/` are not whole
    within: str = ""  # id of the step in whose pass it is computed, where nobody else needs its bytes
    checks: tuple[Step, ...] = ()  # that have to pass before its files are written
    unchecked: bool = False  # it has checks, and was asked for without them
    barred: bool = False  # a check whose command may not run on this machine

    @property
    def id(self) -> str:
        return self.node.id

    @property
    def kind(self) -> str:
        return self.node.target.signature.kind

    @property
    def to_do(self) -> bool:
        return self.state in ("build", "maybe", "fetch")

    @property
    def passed(self) -> bool:
        """Whether a check passed (or none may be made here): until then what waits for it is not written."""
        return self.barred or (self.state == "reuse" and self.result is not None and not self.failed)

    @property
    def failed(self) -> bool:
        """Whether it is a check, and its verdict is known and bad."""
        return self.result is not None and self.result.kind == "verdict" and not self.result.facts["passed"]


@dataclass
class Plan:
    """The steps behind what is wanted, inputs first.

    notes: plan key → what a formula makes, to be remembered. aliases: (plan key, content key, manifest).
    """

    steps: dict[str, Step]
    wanted: list[str]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def to_do(self) -> list[Step]:
        """The steps that must (or may have to) run, and those whose files must be written again."""
        return [step for step in self.steps.values() if step.to_do or step.restore]


@dataclass(frozen=True)
class Wishes:
    """What a command asks of the plan.

    retrain: ids whose results are made again; locked: nothing may differ; checked: checks decide what is written.
    """

    retrain: frozenset[str] = frozenset()
    locked: bool = False
    checked: bool = True


class Planner:
    """Evaluates nodes one after the other. Raises RecipeError for inputs of a wrong kind or family."""

    def __init__(
        self,
        graph: Graph,
        sources: Callable[[Taken], Artifact],
        lock: Lock,
        view: View,
        whole: Callable[[Step], bool] = lambda _: True,
        wishes: Wishes = Wishes(),
    ) -> None:
        self.graph, self.sources, self.lock, self.view, self.whole, self.wishes = (
            graph,
            sources,
            lock,
            view,
            whole,
            wishes,
        )
        self.steps: dict[str, Step] = {}
        self.plan = Plan(self.steps, [])
        self.problems: list[Misfit] = []
        self._frames: dict[tuple[int, str, int | None], tuple[str, str]] = {}
        self._by_key: dict[str, Step] = {}
        self._listed: dict[str, FormulaPlan] = {}
        self._takers: dict[str, dict[str, dict[Taking, Step | None]]] = {}  # key → component → who takes its bytes

    def make(self, wanted: list[str]) -> Plan:
        """Plan what is needed for the wanted nodes."""
        for node in self.graph.behind(wanted):
            self.steps[node.id] = self._evaluate(node)
        if self.problems:
            raise Misfits(self.problems)
        for step in self.steps.values():
            checks = tuple(self.steps[identifier] for identifier in step.node.checks)
            step.checks, step.unchecked = (checks, False) if self.wishes.checked else ((), bool(checks))
        self.plan.wanted = wanted
        for identifier in wanted:
            self._want(self.steps[identifier])
        self._join_passes()
        self._state_the_rest()
        return self.plan

    # -- forwards: what is everything? -----------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> Step:
        found: list[tuple[Link, Artifact | None]] = []
        before = len(self.problems)
        for link in node.links:
            if link.id in self.graph.sources:
                try:
                    found.append((link, self.sources(self.graph.sources[link.id])))
                except UsageError as error:
                    problem = Problem("source", error.message, None, error.hint)
                    self.problems.append(Misfit(node, link.use, problem, source=link.id))
            else:
                found.append((link, self.steps[link.id].artifact))
        if len(self.problems) > before:
            return Step(node)
        step = Step(node, tuple(found))
        if not self._fits(step) or any(artifact is None for _, artifact in found):
            return step
        signature = node.target.signature
        if signature.kind == "moves":
            self._move(step)
            step.lineage = self._lineage(step)
            return step
        step.manifest = self._manifest(step, content=False)
        step.key = digest_of_text("action", step.manifest)
        self._by_key[step.key] = step
        if signature.kind == "formula":
            self._evaluate_formula(step)
        else:
            self._evaluate_content(step)
        step.lineage = self._lineage(step)
        return step

    def _fits(self, step: Step) -> bool:
        """Check kinds, families and widths of the inputs."""
        before = len(self.problems)
        widths: dict[str, tuple[Any, str]] = {}
        recipe = step.node.recipe
        for link, artifact in step.inputs:
            target, name = step.node.target, link.use.reference
            role = target.signature.roles[link.use.role]
            makes = artifact.kind if artifact else self.steps[link.id].node.target.signature.makes
            if makes not in role.kinds:
                hint = way_in(name, makes) if target.implicit else ""
                self._misfit(step, link.use, "kind", wrong_kind(name, makes, role), hint)
                continue
            if artifact is None:
                continue
            if not family(recipe.family).takes(artifact.kind, artifact.family):
                theirs, ours = family(artifact.family).title, family(recipe.family).title
                self._misfit(step, link.use, "family", f"`{name}` is for {theirs}, and the recipe is for {ours}")
            for key, value in artifact.notes.get("widths", {}).items():
                other, whose = widths.setdefault(key, (value, name))
                if other != value:
                    message = f"`{name}` does not fit `{whose}`: its {key} is {value} wide, the other's {other}"
                    self._misfit(step, link.use, "family", message)
        self._refuse_twins(step)
        return len(self.problems) == before

    def _refuse_twins(self, step: Step) -> None:
        """Refuse two artifacts that make one word, also where they have not been trained yet."""
        words: dict[str, str] = {}
        for link, artifact in step.inputs:
            if step.node.target.signature.roles[link.use.role].kind not in ("embedding", "custom"):
                continue
            facts = artifact.facts if artifact is not None else self.steps[link.id].node.target.raw
            word, name = str(facts.get("token", "")), link.use.reference
            if word in words:
                message = f"`{name}` and `{words[word]}` are both called {word!r}"
                self._misfit(step, link.use, "token", message, "give one of them another token")
            elif word:
                words[word] = name

    def _misfit(self, step: Step, use: Use | None, code: str, message: str, hint: str = "", *, key: str = "") -> None:
        self.problems.append(Misfit(step.node, use, Problem(code, message, None, hint), key))

    def _manifest(self, step: Step, *, content: bool) -> str:
        """Return all that decides an action's result, as canonical JSON."""
        target = step.node.target
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
                text = f'{{"artifact":{text},"use":{canonical(link.use.use or {})}}}'
            roles.setdefault(link.use.role, []).append(text)
        parts = []
        for role_name in sorted(roles):
            many = target.signature.roles[role_name].many
            texts = sorted(roles[role_name]) if many == "table" else roles[role_name]
            parts.append(f'"{role_name}":' + (f"[{','.join(texts)}]" if many else texts[0]))
        before, after = self._frame(step)
        # files tell in their headers how they came to be
        embeds = target.signature.makes == "files"
        lineage = f'"lineage":{self._lineages(step)},' if embeds else ""
        looks = self.view.looks(step) if target.signature.group == "checks" else {}
        seen = f'"looks":{canonical(looks)},' if looks else ""
        inputs = f"{{{','.join(parts)}}},{lineage}{seen}"
        return f'{before}{inputs}{after}{target.settings},"version":{target.signature.version}}}'

    def _lineage(self, step: Step) -> str:
        """Name how a step came to be: its manifest, the result that was chosen, and how its inputs came to be."""
        chosen = step.result or step.pin
        digest = chosen.digest if chosen and step.kind == "content" else ""
        name = step.node.target.signature.name
        return digest_of_text("lineage", f"{name} {step.key} {digest} {self._lineages(step)}")

    def _lineages(self, step: Step) -> str:
        """Return role → how its inputs came to be, in an order that no name decides, as canonical JSON."""
        roles: dict[str, list[str]] = {}
        for link, artifact in step.inputs:
            source = link.id in self.graph.sources
            came = (artifact.identity if artifact else "") if source else self.steps[link.id].lineage
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

    def _base(self, step: Step) -> Artifact:
        """The input from which passes what the action does not change: the first one."""
        artifact = step.inputs[0][1]
        assert artifact is not None
        return artifact

    def _pass_makers(self, step: Step) -> None:
        link, base = step.inputs[0]
        assert base is not None
        source = link.id in self.graph.sources
        makers = dict.fromkeys(base.components, link.id) if source else self.steps[link.id].makers
        step.makers = dict(makers)

    def _move(self, step: Step) -> None:
        base = self._base(step)
        self._pass_makers(step)
        components, facts = dict(base.components), dict(base.facts)
        owners = family(step.node.recipe.family).owners
        for link, artifact in step.inputs[1:]:
            moved = step.node.target.signature.roles[link.use.role].moves
            assert artifact is not None
            taken = [name for name in artifact.components if name.startswith(moved)]
            if not taken:
                self._misfit(step, link.use, "component", f"`{link.use.reference}` has no {moved[0]}")
            for name in [name for name in components if name.startswith(moved)]:
                del components[name]
            for name in taken:
                components[name] = artifact.components[name]
                step.makers[name] = link.id if link.id in self.graph.sources else self.steps[link.id].makers[name]
            for fact, owner in owners.items():
                if owner in moved and artifact.family:  # a network alone states nothing: it is for what is there
                    facts.pop(fact, None)
                    if fact in artifact.facts:
                        facts[fact] = artifact.facts[fact]
        step.artifact = replace(base, components=components, facts=facts)
        step.idle = True

    def _evaluate_formula(self, step: Step) -> None:
        base = self._base(step)
        known = self.view.known(step.key)
        made = known.formula
        if made is None:
            try:
                plan = self.formula(step)
            except Unlisted:
                return
            except SettingErrors as error:
                for key, message, hint in error.found:
                    self._misfit(step, None, "setting", message, hint, key=key)
                return
            except UsageError as error:
                self._misfit(step, None, "formula", error.message, error.hint)
                return
            dtypes = plan.dtypes()
            made = {
                "components": {name: [identity, dtypes[name]] for name, identity in plan.identities().items()},
                "facts": plan.facts,
            }
            if plan.family:
                made |= {"family": plan.family, "without": list(plan.without)}
            self.plan.notes[step.key] = made
        # all results of a formula's key are the same bytes, or building it would have failed
        step.result = known.results[0] if known.results else None
        self._pass_makers(step)
        dropped, kind = made.get("without", ()), step.node.target.signature.makes
        components = {name: component for name, component in base.components.items() if name not in dropped}
        step.makers = {name: maker for name, maker in step.makers.items() if name not in dropped}
        if kind != base.kind:  # a delta is no checkpoint: nothing passes into it
            components, step.makers = {}, {}
        base = replace(base, family=made.get("family", base.family))
        step.idle = True
        for name, (identity, dtype) in made["components"].items():
            if name in components and components[name].identity == identity:
                continue
            step.idle = False
            step.makers[name] = step.id
            done = step.result.components[name] if step.result else None
            components[name] = done or Component(identity, "", f"plan:{step.key}:{name}", dtype)
        if not step.idle:
            self._carry(step, components)
        facts = {**base.facts, **made["facts"]}
        facts = {k: v for k, v in facts.items() if v is not None}
        notes = base.notes | {"trigger": _words(step, kind)}
        step.artifact = replace(base, kind=kind, components=components, facts=facts, notes=notes)

    def _carry(self, step: Step, components: dict[str, Component]) -> None:
        """Let a formula's result hold, too, what it reads and passes on of formulas whose results nobody has kept."""
        reads = step.node.target.role(step.inputs[0][0].use.role).reads
        for name, component in components.items():
            if step.makers[name] == step.id or not component.table.startswith("plan:") or not name.startswith(reads):
                continue
            if step.result is None:
                step.makers[name] = step.id
            elif name in step.result.components:
                components[name], step.makers[name] = step.result.components[name], step.id

    def _evaluate_content(self, step: Step) -> None:
        known = self.view.known(step.key)
        key = known.alias or (step.key if known.results else "") or self.lock.content_key(step.key)
        if not key and all(a.by_content() is not None for _, a in step.inputs if a is not None and not a.whole):
            step.content_manifest = self._manifest(step, content=True)
            key = digest_of_text("action", step.content_manifest)
        step.content_key = key
        if not key:
            return
        results = {result.digest: result for result in (known if key == step.key else self.view.known(key)).results}
        pins = self.lock.pins(key) if step.node.target.signature.pinned else {}
        if len(pins) > 1 and step.id not in self.wishes.retrain:
            names = " and ".join(digest[:12] for digest in sorted(pins))
            raise BrokenPromise(
                f"{step.id}: the lock pins two results for the same inputs, {names}",
                hint="`forge lock --take DIGEST` chooses one",
            )
        step.pin = next(iter(pins.values()), None)
        if step.id in self.wishes.retrain:
            return
        if not results and not step.pin and step.node.target.signature.pinned:
            step.pin = self.view.vouched(key)
        step.result = self._chosen(results, step.pin)
        step.differs = bool(step.pin and step.result and step.result.digest != step.pin.digest)
        if step.result and not known.alias and key != step.key:
            self.plan.aliases.append((step.key, key, step.manifest))
        made = step.result.artifact() if step.result else step.pin.artifact() if step.pin else None
        if made is None:
            return
        step.artifact = self._completed(step, made)

    def _chosen(self, results: dict[str, Result], pin: Pin | None) -> Result | None:
        """Return the pinned one of a key's results, else the first made; one whose bytes are here goes before others.

        Without that a pinned result whose bytes are gone, and which comes out differently, would be trained for ever.
        Under `--locked` none but the pinned one is taken where that can be fetched.
        """
        pinned = [results[pin.digest]] if pin and pin.digest in results else []
        ranked = [*pinned, *results.values()]
        if len(results) > 1:  # where there is no choice no file is looked for
            ranked.sort(key=lambda result: not self.view.holds(result))
        chosen = next(iter(ranked), None)
        other = pin is not None and chosen is not None and chosen.digest != pin.digest
        return None if other and pin and self.wishes.locked and self.view.offered(pin) else chosen

    def _completed(self, step: Step, made: Artifact) -> Artifact:
        """Add what passes from the first input: a trained checkpoint's other components, and widths."""
        base = self._base(step)
        if made.kind == "pictures":
            made = self._drawn(step, made)
        own = dict.fromkeys(made.components or ("",), step.id)  # a data set has no components, and a maker
        if made.kind == "checkpoint":
            self._pass_makers(step)
            made = replace(made, components=base.components | made.components, facts=base.facts | made.facts)
        step.makers |= own
        widths = base.notes.get("widths", {}) if made.components else {}
        return replace(made, notes=made.notes | {"widths": widths, "trigger": _words(step, made.kind)})

    def _drawn(self, step: Step, made: Artifact) -> Artifact:
        """Name pictures, which are no tensors: by their bytes, and by which of them show the preset."""
        column = str(made.facts.get("column") or self._base(step).digest or self._base(step).identity)
        assert step.result is not None
        digest = step.result.digest
        whole = H("pictures", {"digest": digest, "column": column})
        return replace(made, whole=whole, notes={"column": column, "digest": digest, "key": step.result.key})

    # -- formulas, tensor by tensor, behind a miss -----------------------------------------------------------------

    def formula(self, step: Step) -> FormulaPlan:
        """List what a formula makes. Raises UsageError for inputs that do not fit together."""
        if step.key not in self._listed:
            found = self._list(step)
            while len(self._listed) >= MOST_LISTED:
                del self._listed[next(iter(self._listed))]
            self._listed[step.key] = found
        return self._listed[step.key]

    def carried(self, step: Step) -> dict[str, list[Tensor]]:
        """List the components that the result of a formula holds beside its own: those of formulas before it."""
        assert step.artifact is not None
        own = self.formula(step).components
        components = step.artifact.components.items()
        return {n: self.tensors(c) for n, c in components if step.makers[n] == step.id and n not in own}

    def within(self, step: Step) -> list[Step]:
        """Return the formulas that are computed in a step's pass, inputs first."""
        return [other for other in self.steps.values() if other.within and self.steps[other.within].key == step.key]

    def _list(self, step: Step) -> FormulaPlan:
        from sdforge.formula import Input

        target = step.node.target
        inputs: dict[str, list[Input]] = {}
        for link, artifact in step.inputs:
            assert artifact is not None
            each = Input(artifact, self.tensors, self.view.vocabulary, link.use.use or {})
            inputs.setdefault(link.use.role, []).append(each)
        found = method(target.signature.name)
        seed = {} if target.seed is None else {"seed": target.seed}
        return found.plan(found.table.model_validate(target.raw | seed), inputs, family(step.node.recipe.family))

    def tensors(self, component: Component) -> list[Tensor]:
        """Tensors of a component, planned ones included. Raises Unlisted for a pin whose bytes are not here."""
        if not component.table:
            raise Unlisted("a pinned result is not here")
        if not component.table.startswith("plan:"):
            return self.view.table(component)
        _, key, name = component.table.split(":")
        rows: list[Made] = self.formula(self._by_key[key]).components[name]
        return [made.tensor for made in rows]

    # -- backwards: whose bytes are needed? ------------------------------------------------------------------------

    def _want(self, step: Step) -> None:
        """Mark what is needed for a wanted target: all its bytes, and for a preset its files."""
        makes = step.node.target.signature.makes
        if step.node.target.placed:
            for check in step.checks:
                self._want(check)
            kept = step.result is not None and (makes == "files" or self.view.holds(step.result))
            step.state = "reuse" if kept else self._how(step)
            step.restore = kept and not self.whole(step)
            if not kept or (step.restore and makes == "files"):
                self._need_inputs(step)
            return
        if makes == "verdict":
            self._want_verdict(step)
            return
        if step.artifact is None:
            self._need(step)
            return
        for name, maker in step.makers.items():
            self._need_maker(maker, name, Taking(""), None)
        if step.state == "unneeded":
            step.state = "reuse"

    def _want_verdict(self, step: Step) -> None:
        """Mark what a check looks at, unless its verdict is known or this machine does not allow its command."""
        if step.result is not None:
            step.state = "reuse"
        elif not self.view.permits(step):
            step.state, step.barred = "unneeded", True
            step.reason = "this machine does not allow its command"
        elif step.state == "unneeded":
            step.state = self._how(step)
            self._need_inputs(step)

    def _need(self, step: Step) -> None:
        """Mark a step whose bytes are needed."""
        if step.state != "unneeded":
            return
        if step.result and self.view.holds(step.result):
            step.state = "reuse"
            return
        if step.idle:
            step.state = "reuse"
            self._need_inputs(step)
            return
        step.state = self._how(step)
        if step.state != "fetch":
            self._need_inputs(step)

    def _need_inputs(self, step: Step) -> None:
        for i, (link, artifact) in enumerate(step.inputs):
            if link.id in self.graph.sources:
                continue
            other = self.steps[link.id]
            if artifact is None:
                self._need(other)
                continue
            reads = step.node.target.role(link.use.role).reads
            for name, maker in other.makers.items():
                if name.startswith(reads or ("\0",)):
                    self._need_maker(maker, name, Taking(step.key or step.id, i), step)

    def _need_maker(self, identifier: str, component: str, taking: Taking, taker: Step | None) -> None:
        """Note who takes the bytes of a component, and need the step that makes it."""
        if maker := self.steps.get(identifier):
            self._takers.setdefault(maker.key, {}).setdefault(component, {})[taking] = taker
            self._need(maker)

    def _join_passes(self) -> None:
        """Compute formulas whose bytes only one other formula takes in that one's pass: nothing of them is written."""
        for step in reversed(self.steps.values()):  # takers first
            if root := self._only_pass(step):
                step.state, step.within = "unneeded", root.id

    def _only_pass(self, step: Step) -> Step | None:
        """Return the step in whose pass a formula can be computed: all that is taken of it, once each, is taken there.

        What is taken twice is kept instead of being computed twice.
        """
        if step.kind != "formula" or step.state != "build" or step.artifact is None or step.result:
            return None  # of a result whose bytes are lost the tensors are listed where they lay
        taken = self._takers[step.key].values()
        roots = {root.key: root for takers in taken for taker in takers.values() if (root := self._pass_of(taker))}
        once = all(len(takers) == 1 and self._pass_of(*takers.values()) for takers in taken)
        return next(iter(roots.values())) if once and len(roots) == 1 else None

    def _pass_of(self, taker: Step | None) -> Step | None:
        """Return the step in whose pass a taker computes, or None if it is no formula that has to run."""
        if taker is None or taker.kind != "formula":
            return None
        if taker.within:
            return self.steps[taker.within]
        return taker if taker.state in ("build", "maybe") else None

    def _how(self, step: Step) -> str:
        """Say whether a step that is needed must run, or may turn out not to."""
        if step.pin and not step.result and step.id not in self.wishes.retrain:
            if self.view.offered(step.pin):
                return "fetch"
            step.reason = "the pinned result is not to be had"
            return "build"
        waiting = any(artifact is None for _, artifact in step.inputs) or (
            step.kind == "content" and not step.content_key
        )
        return "maybe" if waiting and self._seen_alike(step) else "build"

    def _seen_alike(self, step: Step) -> bool:
        """Say whether store or lock hold a result whose manifest is equal apart from the identities of its inputs."""
        if step.id in self.wishes.retrain:
            return False
        if self.view.known(likeness(step)).alias:
            return True
        target = step.node.target
        settings = json.loads(target.settings) | ({"seed": target.seed} if target.seed is not None else {})
        wanted = (target.signature.name, target.signature.version, canonical(settings))
        pins = (pin for found in self.lock.results.values() for pin in found.values())
        return any((pin.method, pin.method_version, canonical(pin.settings)) == wanted for pin in pins)

    def _state_the_rest(self) -> None:
        for step in self.steps.values():
            if step.state == "unneeded" and (step.result or (step.idle and step.artifact)):
                step.state = "reuse"


def _words(step: Step, kind: str) -> list[str]:
    """Return, each once, the words that call what a result of this kind has from its inputs, or was trained on."""
    inputs = [a for link, a in step.inputs if a is not None and (a.kind == kind or link.use.role == "dataset")]
    return list(dict.fromkeys(word for artifact in inputs for word in artifact.notes.get("trigger", [])))


class Taking(NamedTuple):
    """Who takes bytes: the key of an action ("" for a person, who wants them), and by which of its inputs."""

    key: str
    place: int = 0


def likeness(step: Step) -> str:
    """Name an action apart from its inputs: by it the store remembers that something alike was made."""
    target = step.node.target
    return digest_of_text(
        "alike", f"{target.signature.name}/{target.signature.version}/{target.seed}/{target.settings}"
    )


class Unlisted(UsageError):
    """The tensors of a pinned result are not known before its bytes are here; what takes them waits for it."""


class Misfit(NamedTuple):
    """A problem of a node, not yet with its place.

    use: the input that it is about; key: of the target's table; source: the source that cannot be used.
    """

    node: Node
    use: Use | None
    problem: Problem
    key: str = ""
    source: str = ""


class Misfits(RecipeError):
    """Inputs that do not fit, not yet with the places where they are named."""

    def __init__(self, found: list[Misfit]) -> None:
        super().__init__([misfit.problem for misfit in found])
        self.found = found


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
