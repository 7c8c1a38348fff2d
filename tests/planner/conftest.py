"""A project whose store is a dictionary and whose worker makes results up: planning needs no bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdforge.artifact import Artifact, Component, Spot, Tensor, artifact_identity, dataset_identity
from sdforge.errors import RecipeError
from sdforge.explain import Cause, Explainer
from sdforge.formula import Plan as FormulaPlan
from sdforge.graph import Graph, Taken, link_recipes
from sdforge.identity import H, component_identity, tensor_identity
from sdforge.lock import Lock, Pin, pin_of
from sdforge.manifest import likeness
from sdforge.plan import Plan, Step, Wishes
from sdforge.planner import Planner
from sdforge.project import Project
from sdforge.store.entries import Known, Result

MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NAMES = {
    "unet": ("conv_in.weight", f"{MID}.weight", "conv_out.weight"),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    "vae": ("encoder.conv_in.weight",),
}
WORDS = {"vocab": {"girl</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, "merges": []}


@dataclass
class Memory:
    """What planning asks of a store, in dictionaries.

    files: the packs whose bytes are there; remote: the digests of the results that a remote cache has;
    signed: what trusted keys say on it, by content key.
    """

    keys: dict[str, Known] = field(default_factory=dict)
    tables: dict[str, list[Tensor]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    preimages: dict[str, dict[str, Any]] = field(default_factory=dict)
    remote: set[str] = field(default_factory=set)
    signed: dict[str, Pin] = field(default_factory=dict)

    def offered(self, pin: Pin) -> bool:
        return pin.digest in self.remote

    def looks(self, step: Step) -> dict[str, Any]:  # noqa: ARG002 -- of no recipe here a check looks at more
        return {}

    def permits(self, step: Step) -> bool:  # noqa: ARG002
        return True

    def vouched(self, key: str) -> Pin | None:
        return self.signed.get(key)

    def known(self, key: str) -> Known:
        return self.keys.get(key, Known())

    def table(self, component: Component) -> list[Tensor]:
        return self.tables[component.table]

    def vocabulary(self, component: Component) -> dict[str, Any]:  # noqa: ARG002 -- all toys speak alike
        return WORDS

    def holds(self, result: Result) -> bool:
        return all(pack in self.files for pack in result.packs)

    def preimage(self, key: str) -> dict[str, Any] | None:
        return self.preimages.get(key)

    def component(self, rows: Iterable[tuple[str, str, str]]) -> Component:
        """List a component's tensors: (name, identity, what its bytes are)."""
        table = [
            Tensor(name, "F16", (2, 2), identity, H("bytes", text), H("bytes", text)[:32], Spot("0" * 64, 0))
            for name, identity, text in rows
        ]
        content = component_identity((t.name, tensor_identity(t.dtype, t.shape, t.sha256)) for t in table)
        identity = component_identity((t.name, t.identity) for t in table)
        self.tables[identity + content] = table
        return Component(identity, content, identity + content, "F16")


class NoIndex:
    """Remembers nothing of what was parsed."""

    def read_keyed(self, *_: Any) -> dict[str, Any]:
        return {}

    def put(self, *_: Any) -> None:
        pass


@dataclass
class World:
    """A project in which everything but the recipes' text is made up.

    bytes_of: how what a formula makes is named → the bytes it gives (else every name has its own bytes).
    same_pictures: what every data set that is made shows, whatever it is made from.
    """

    root: Path
    store: Memory = field(default_factory=Memory)
    lock: Lock = field(default_factory=Lock)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_of: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    same_pictures: str = ""
    trained: list[str] = field(default_factory=list)
    graph: Graph = field(default_factory=Graph)
    _planner: Planner | None = None

    # -- what nobody makes -----------------------------------------------------------------------------------------

    def checkpoint(self, name: str, *, width: int = 8, **changed: str) -> None:
        """Declare a base; `changed` gives a component other bytes."""
        components = {}
        for part, names in NAMES.items():
            salt = f"{name}/{changed.get(part, '')}"
            rows = [(n, H("bytes", f"{salt}/{part}/{n}"), f"{salt}/{part}/{n}") for n in names]
            components[part] = self.store.component((n, tensor_identity("F16", (2, 2), i), t) for n, i, t in rows)
        words = H("tokenizer", "words")
        components["tokenizer"] = Component(words, words, words, "")
        self.artifacts[name] = Artifact("checkpoint", "sd15", components, {}, {"widths": {"context": width}})
        self.tables[name] = {"from": name}

    def lora(self, name: str, *words: str) -> None:
        """Declare a LoRA that somebody else trained, and the words that call what it knows."""
        rows = [(f"unet.{MID}.{factor}", H("bytes", f"{name}/{factor}"), name) for factor in ("lora_down", "lora_up")]
        self.artifacts[name] = Artifact(
            "lora", "sd15", {"lora": self.store.component(rows)}, notes={"trigger": list(words)}
        )
        self.tables[name] = {"from": name}

    def pictures(self, name: str, rows: dict[str, str], *words: str) -> None:
        """Declare a data set: picture → caption, and the word that stands in them."""
        listed = [[H("picture", picture), caption, 1] for picture, caption in rows.items()]
        notes = {"rows": sorted(listed), "names": {H("picture", p): [p] for p in rows}, "without": [], "validation": 0}
        notes["trigger"] = list(words)
        self.artifacts[name] = Artifact("dataset", whole=dataset_identity(listed, 0), notes=notes)

    def recipe(self, text: str, name: str = "r") -> None:
        path = self.root / "recipes" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text.startswith("family") else f'family = "sd15"\n{text}')

    # -- questions -------------------------------------------------------------------------------------------------

    def plan(self, *wanted: str, retrain: Iterable[str] = (), without: Iterable[str] = ()) -> Plan:
        """Plan RECIPE:NAMEs, or all of recipe `r`."""
        datasets: dict[str, dict[str, Any]] = {name: {} for name, artifact in self.artifacts.items() if artifact.whole}
        project = Project(self.root, NoIndex(), sources=self.tables, datasets=datasets)  # type: ignore[arg-type]
        self.project = project
        self.graph = link_recipes(project, sorted({name.partition(":")[0] for name in wanted} or {"r"}))
        wishes = Wishes(frozenset(retrain))
        self._planner = Planner(
            self.graph, self._source, self.lock, self.store, lambda step: step.id not in set(without), wishes
        )
        return self._planner.make(list(wanted) or list(self.graph.nodes))

    def _source(self, taken: Taken) -> Artifact:
        return self.artifacts[taken.id]

    def states(self, *wanted: str, **wishes: Any) -> dict[str, str]:
        """Return name → state, without the recipe's name."""
        return {step.node.target.name: step.state for step in self.plan(*wanted, **wishes).steps.values()}

    def misfits(self) -> list[str]:
        """Return what planning complains of."""
        with pytest.raises(RecipeError) as caught:
            self.plan()
        return [problem.message for problem in caught.value.problems]

    def why(self, target: str, **wishes: Any) -> list[Cause]:
        """Return why a target of recipe `r` would be made, with everything else planned too."""
        plan = self.plan(**wishes)
        session: Any = SimpleNamespace(
            project=self.project,
            store=self.store,
            lock=self.lock,
            graph=self.graph,
            retrain=set(wishes.get("retrain", ())),
            chronicle=SimpleNamespace(last_key=lambda identifier: self.last.get(identifier, "")),
        )
        return Explainer(session, plan).causes(plan.steps[f"r:{target}"])

    # -- the worker ------------------------------------------------------------------------------------------------

    def build(self, *wanted: str, salt: str = "", pin: bool = True, **wishes: Any) -> Plan:
        """Make everything that is to do; `salt` makes trainings come out differently."""
        retrain = set(wishes.pop("retrain", ()))
        for _ in range(50):
            plan = self.plan(*wanted, retrain=retrain, **wishes)
            for key, formula in plan.notes.items():
                self.store.keys[key] = replace(self.store.known(key), formula=formula)
            for key, content_key, _ in plan.aliases:
                self.store.keys[key] = replace(self.store.known(key), alias=content_key)
            ready = [s for s in plan.to_do if all(a is not None for _, a in s.inputs) and self._can_run(plan, s)]
            if not ready:
                self._remember(plan)
                return plan
            self._run(ready[0], salt, pin=pin, again=ready[0].id in retrain)
            retrain.discard(ready[0].id)
        raise AssertionError("the plan never ends")

    def _can_run(self, plan: Plan, step: Step) -> bool:
        return not any(link.id in plan.steps and plan.steps[link.id].to_do for link, _ in step.inputs)

    def _run(self, step: Step, salt: str, *, pin: bool, again: bool) -> None:
        key, manifest = step.content_key or step.key, step.content_manifest or step.manifest
        target = step.node.target
        facts: dict[str, Any] = {}
        if target.signature.makes == "dataset":
            self.trained.append(step.id)
            settings, components = _loaded(manifest)["settings"], {}
            said = self.same_pictures or f"{key}/{salt}"
            facts = {
                "pictures": [[H("picture", f"{said}/{i}"), settings["prompt"], 1] for i in range(settings["count"])]
            }
        elif step.kind == "formula":
            assert self._planner is not None
            plan = self._planner.formula(step)
            components = {
                name: self.store.component(
                    (m.tensor.name, m.tensor.identity, self.bytes_of.get(m.tensor.identity, m.tensor.identity))
                    for m in rows
                )
                for name, rows in plan.components.items()
            }
            components |= {
                name: self.store.component(
                    (t.name, t.identity, self.bytes_of.get(t.identity, t.identity)) for t in table
                )
                for name, table in self._planner.carried(step).items()
            }
        else:
            self.trained.append(step.id)
            text = f"{key}/{salt}/{len(self.trained) if again else ''}"
            names = {"lora": (f"unet.{MID}.lora_down", f"unet.{MID}.lora_up"), "embedding": ("text_encoder",)}
            listed = names.get(target.signature.makes, ("file",))
            component = self.store.component(
                (n, tensor_identity("F16", (2, 2), H("bytes", f"{text}/{n}")), f"{text}/{n}") for n in listed
            )
            components = {target.signature.makes: component._replace(identity=component.content)}
            facts = {"token": "<x>"} if target.signature.makes == "embedding" else {}
        if target.signature.makes == "dataset":
            digest = dataset_identity(facts["pictures"], 0)
        else:
            digest = artifact_identity(target.signature.makes, {n: c.content for n, c in components.items()}, facts)
        pack = H("pack", digest)
        result = Result(key, digest, target.signature.makes, "sd15", components, facts, packs=(pack,), grade="B")
        known = self.store.known(key)
        self.store.keys[key] = replace(known, results=[*known.results, result])
        self.store.files.add(pack)
        self.store.preimages[key] = _loaded(manifest)
        if key != step.key:
            self.store.keys[step.key] = replace(self.store.known(step.key), alias=key)
        if step.kind == "content":
            self.store.keys[likeness(step)] = Known(alias=key)
            if target.signature.pinned and pin and (again or not self.lock.pins(key)):
                self.lock.pin(pin_of(result, [step.key], _loaded(manifest)), replace=again)

    def _remember(self, plan: Plan) -> None:
        for step in plan.steps.values():
            if step.key:
                self.last[step.id] = step.key
                self.store.preimages[step.key] = _loaded(step.manifest)
            for _, artifact in step.inputs:
                if artifact is not None and artifact.whole:
                    self.store.preimages[artifact.whole] = dict(artifact.notes)

    def formula(self, plan: Plan, name: str) -> FormulaPlan:
        """List what a formula of recipe `r` makes."""
        assert self._planner is not None
        return self._planner.formula(plan.steps[f"r:{name}"])

    def forget_bytes(self, name: str) -> None:
        """Drop what the store holds of a target's result, not that it was ever made."""
        step = self.plan().steps[f"r:{name}"]
        assert step.result is not None
        self.store.files -= set(step.result.packs)

    def forget_formulas(self) -> None:
        """Drop what formulas made; what was trained stays."""
        for key, known in self.store.keys.items():
            self.store.keys[key] = replace(known, results=[r for r in known.results if r.kind != "checkpoint"])

    def forget_results(self) -> None:
        """A fresh clone: the lock is all there is."""
        self.store.keys.clear()
        self.store.files.clear()
        self.store.preimages.clear()
        self.last.clear()


def _loaded(manifest: str) -> dict[str, Any]:
    import json

    value: dict[str, Any] = json.loads(manifest)
    return value


def toy_world(root: Path) -> World:
    """Two bases, a LoRA from elsewhere and two data sets."""
    found = World(root)
    found.checkpoint("flat")
    found.checkpoint("ink")
    found.lora("glow")
    found.pictures("sketches", {"a.png": "a cat", "b.png": "a dog"})
    found.pictures("faces", {"c.png": "a <x>", "d.png": "another <x>"})
    return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return toy_world(tmp_path)
