"""Plans: a pure function of recipes, sources, lock and what the store has.

A content action (a training) has two keys: the plan key over the identities of its inputs, and the content key over the
inputs' bytes. When the plan key is unknown but the content key is, the result is kept: that is the early cut-off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdforge.artifact import Artifact, Component, Tensor
from sdforge.errors import BrokenPromise, InputError, Problem, SettingErrors, UsageError
from sdforge.families import family
from sdforge.fitting import Misfit, Misfits, misfit, misfits
from sdforge.graph import Graph, Link, Node, Taken
from sdforge.identity import H, digest_of_text
from sdforge.lock import Lock, Pin
from sdforge.manifest import Manifests
from sdforge.method import method
from sdforge.moving import immovable, miscounted, moved_into, parts, words_of
from sdforge.needs import Needs
from sdforge.plan import Plan, Step, View, Wishes
from sdforge.store.entries import Result

if TYPE_CHECKING:
    from sdforge.formula import Made
    from sdforge.formula import Plan as FormulaPlan

MOST_LISTED = 32  # formulas whose tensors are kept listed; a chain lists each of its links once


class Planner:
    """Evaluates nodes one after the other. whole: whether a preset's files lie in `out/` as they were made."""

    def __init__(
        self,
        graph: Graph,
        sources: Callable[[Taken], Artifact],
        lock: Lock,
        view: View,
        whole: Callable[[Step], bool],
        wishes: Wishes,
    ) -> None:
        self.graph, self.sources, self.lock, self.view = graph, sources, lock, view
        self.whole, self.wishes = whole, wishes
        self.steps: dict[str, Step] = {}
        self.plan = Plan(self.steps, [])
        self.problems: list[Misfit] = []
        self._manifests = Manifests(self.steps, view.looks)
        self._by_key: dict[str, Step] = {}
        self._listed: dict[str, FormulaPlan] = {}

    def make(self, wanted: list[str]) -> Plan:
        """Plan what is needed for the wanted nodes. Raises Misfits, and BrokenPromise for two pins of one key."""
        for node in self.graph.behind(wanted):
            self.steps[node.id] = self._evaluate(node)
        if self.problems:
            raise Misfits(self.problems)
        for step in self.steps.values():
            checks = tuple(self.steps[identifier] for identifier in step.node.checks)
            step.checks, step.unchecked = (checks, False) if self.wishes.checked else ((), bool(checks))
        self.plan.wanted = wanted
        Needs(self.steps, self.lock, self.view, self.whole, self.wishes).mark(wanted)
        return self.plan

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
        unfit = list(misfits(step, self.steps))
        self.problems += unfit
        if unfit or any(artifact is None for _, artifact in found):
            return step
        signature = node.target.signature
        if signature.kind == "moves":
            self._move(step)
            step.lineage = self._manifests.lineage(step)
            return step
        step.manifest = self._manifests.of(step, content=False)
        step.key = digest_of_text("action", step.manifest)
        self._by_key[step.key] = step
        if signature.kind == "formula":
            self._evaluate_formula(step)
        else:
            self._evaluate_content(step)
        step.lineage = self._manifests.lineage(step)
        return step

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
        found, ours = self._base(step), family(step.node.recipe.family)
        self._pass_makers(step)
        if not step.inputs[1:]:
            named = ", ".join(name for name, role in step.node.target.signature.roles.items() if role.moves)
            problem = misfit(step, None, "component", "there is nothing to swap", f"name something: {named}")
            self.problems.append(problem)
        words = {name: words_of(found) for name in ours.text_encoders if name in found.components}
        for link, artifact in step.inputs[1:]:
            moves = step.node.target.signature.roles[link.use.role].moves
            assert artifact is not None
            for message in immovable(link.use.reference, artifact, moves, ours):
                self.problems.append(misfit(step, link.use, "component", message))
            for message in miscounted(link.use.reference, found, artifact, moves):
                self.problems.append(misfit(step, link.use, "component", message, "take its text encoders as well"))
            found = moved_into(found, artifact, moves, ours)
            for name in parts(artifact, moves):
                step.makers[name] = link.id if link.id in self.graph.sources else self.steps[link.id].makers[name]
                words |= {name: words_of(artifact)} if name in ours.text_encoders else {}
        if len(set(words.values())) > 1:
            message = "its text encoders would read different words: they share one vocabulary, and what is appended"
            self.problems.append(misfit(step, None, "component", message, "swap both, or `insert` words afterwards"))
        step.artifact, step.idle = found, True

    def _evaluate_formula(self, step: Step) -> None:
        known = self.view.known(step.key)
        made = known.formula or self._foretold(step)
        if made is None:
            return
        # all results of a formula's key are the same bytes, or building it would have failed
        step.result = known.results[0] if known.results else None
        self._pass_makers(step)
        base, kind = self._base(step), step.node.target.signature.makes
        dropped = made.get("without", ())
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
        facts = {name: value for name, value in {**base.facts, **made["facts"]}.items() if value is not None}
        notes = base.notes | {"trigger": _words(step, kind)}
        step.artifact = replace(base, kind=kind, components=components, facts=facts, notes=notes)

    def _foretold(self, step: Step) -> dict[str, Any] | None:
        """Return what a formula would make, to be remembered under its key; None where its inputs do not allow it."""
        try:
            plan = self.formula(step)
        except Unlisted:
            return None
        except SettingErrors as error:
            self.problems += [misfit(step, None, "setting", text, hint, key=key) for key, text, hint in error.found]
            return None
        except UsageError as error:
            name = error.name if isinstance(error, InputError) else ""
            use = next((link.use for link, _ in step.inputs if link.use.reference == name), None)
            self.problems.append(misfit(step, use, "formula", error.message, error.hint))
            return None
        dtypes = plan.dtypes()
        made: dict[str, Any] = {
            "components": {name: [identity, dtypes[name]] for name, identity in plan.identities().items()},
            "facts": plan.facts,
        }
        if plan.family:
            made |= {"family": plan.family, "without": list(plan.without)}
        self.plan.notes[step.key] = made
        return made

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
            step.content_manifest = self._manifests.of(step, content=True)
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
            each = Input(artifact, self.tensors, self.view.vocabulary, link.use.use or {}, link.use.reference)
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


class Unlisted(UsageError):
    """The tensors of a pinned result are not known before its bytes are here; what takes them waits for it."""


def _words(step: Step, kind: str) -> list[str]:
    """Return, each once, the words that call what a result of this kind has from its inputs, or was trained on."""
    inputs = [a for link, a in step.inputs if a is not None and (a.kind == kind or link.use.role == "dataset")]
    return list(dict.fromkeys(word for artifact in inputs for word in artifact.notes.get("trigger", [])))
