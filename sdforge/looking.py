"""Looking around: `list`, `show`, `log`, `graph`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from sdforge.artifact import Artifact, Tensor
from sdforge.drawn import previews_in
from sdforge.errors import RecipeError, UsageError
from sdforge.families import family, family_names
from sdforge.formats.embedding import negative_word, words_of
from sdforge.method import is_target, method, method_groups
from sdforge.plan import Plan, Step
from sdforge.recipe import Recipe
from sdforge.report.progress import names, short, shown_digest, width_of
from sdforge.report.table import IDLE, row
from sdforge.report.words import say, seconds, size
from sdforge.session import Session
from sdforge.store.entries import Result
from sdforge.target import EXPORT, Use
from sdforge.variants import MARK, cells, lines

MOST_LETTERS = 80  # of what `list --methods` says of one
CITED = re.compile(r" \([^()]*https?://[^()]*\)")
MOST_CAPTIONS = 4  # and of a data set
PRESETS = 26  # letters of the column of variants


# -- list --------------------------------------------------------------------------------------------------------------


def show_list(session: Session, wishes: argparse.Namespace) -> None:
    """`forge list`: recipes with the states of their targets, or methods, families, sources."""
    if wishes.names:
        _list_names(session)
    elif wishes.methods:
        _list_methods(as_json=wishes.json)
    elif wishes.families:
        found = {name: family(name).title for name in family_names()}
        event = json.dumps({"v": 1, "event": "families", "families": found})
        say(event if wishes.json else "\n".join(f"  {name:<8} {title}" for name, title in found.items()))
    elif wishes.sources:
        _list_sources(session, as_json=wishes.json)
    else:
        _list_recipes(session, _terminal(wishes), as_json=wishes.json)


def _terminal(wishes: argparse.Namespace) -> str:
    """Return how the terminal takes pictures: as it says of itself, or as `--pictures` does; "" for none."""
    from sdforge.report.inline import protocol

    if wishes.json or wishes.pictures == "never" or not sys.stdout.isatty():
        return ""
    return protocol(sys.stdout) if wishes.pictures == "auto" else str(wishes.pictures)


def _show_previews(session: Session, recipe: str, terminal: str) -> None:
    """Show the previews of a preset that lie in `out/`."""
    from sdforge.report.inline import escape, strip

    if found := previews_in(session.project.out / recipe, recipe):
        sys.stdout.write(escape(terminal, strip([found[cell] for cell in sorted(found)])))


def _list_names(session: Session) -> None:
    """Print recipes, and targets with their recipes; bare where they are the only ones of their name."""
    targets = []
    for recipe in session.project.recipe_names():
        say(recipe)
        with suppress(RecipeError, UsageError):  # a recipe with mistakes has a name all the same
            found = session.project.recipe(recipe)
            targets += [(recipe, name) for name in found.targets]
            for variant in (*found.variants, *found.sweeps):
                say(f"{recipe}{MARK}{variant}")
    names = [name for _, name in targets]
    for recipe, name in targets:
        say(f"{recipe}:{name}")
        if names.count(name) == 1:
            say(name)


def _list_methods(*, as_json: bool) -> None:
    found: dict[str, dict[str, Any]] = {
        name: {"group": group, "makes": method(name).makes, "says": _first_line(name)}
        for name, group in method_groups().items()
        if is_target(name)
    }
    if as_json:
        print(json.dumps({"v": 1, "event": "methods", "methods": found}))
        return
    names, kinds = max(map(len, found)), max(len(about["makes"]) for about in found.values())
    for group in ("merges", "trainings", "edits"):
        say(group)
        for name, about in found.items():
            if about["group"] == group:
                says = CITED.sub("", about["says"])  # where it is from is in the module, and in --json
                say(f"  {name:<{names}}  {about['makes']:<{kinds}}  {shorten(says, MOST_LETTERS, placeholder=' …')}")


def _first_line(name: str) -> str:
    return (method(name).module.__doc__ or "").strip().splitlines()[0]


def _list_sources(session: Session, *, as_json: bool) -> None:
    rows = {**session.project.sources, **session.project.datasets}
    found = {name: table.get("from") or table.get("path") for name, table in rows.items()}
    if as_json:
        print(json.dumps({"v": 1, "event": "sources", "sources": found}))
        return
    lines = [f"  {name:<20} {place}" for name, place in found.items()]
    say("\n".join(lines) or "forge.toml declares no source: `forge add NAME REF` writes one")


def _list_recipes(session: Session, terminal: str, *, as_json: bool) -> None:
    found: list[dict[str, Any]] = [
        {"recipe": str(problem.place), "mistake": problem.message, "shown_by": "forge check"}
        for problem in session.project.misnamed()
    ]
    for name in session.project.recipe_names():
        try:
            names = session.project.with_variants(name)
            session.open_recipes(names)
            plan = session.plan([i for i, node in session.graph.nodes.items() if node.recipe.name in names])
        except (RecipeError, UsageError) as error:
            found.append({"recipe": name, "mistake": error.message, "shown_by": f"forge check {name}"})
            continue
        steps = [step for step in plan.steps.values() if step.node.recipe.name == name and step.listed]
        about = session.project.recipe(name)
        found.append(
            {
                "recipe": name,
                "family": about.family,
                "description": about.description,
                "targets": [
                    {
                        "target": short(s),
                        "method": s.node.target.signature.name,
                        "state": s.state,
                        "digest": shown_digest(s, s.result),
                    }
                    for s in steps
                ],
                "variants": [
                    {"preset": each.preset, "settings": each.settings, "to_do": each.to_do}
                    for each in _varied(session, about, plan)
                ],
            }
        )
        if not as_json:
            say(f"{name}  {family(about.family).title}{'  ' + about.description if about.description else ''}")
            width = width_of(map(short, steps))
            for step in steps:
                say(row(step, short(step), width=width))
            for each in _varied(session, about, plan):
                state = f"{each.to_do} to do" if each.to_do else "made"
                say(f"    {each.preset:<{PRESETS}} {state:<9} {'; '.join(each.settings)}")
            if terminal:
                _show_previews(session, name, terminal)
    if as_json:
        print(json.dumps({"v": 1, "event": "recipes", "recipes": found}))
        return
    if not found:
        say("there are no recipes yet: write recipes/NAME.toml, or `forge init DIR` makes a project with some")
    for entry in found:
        if "mistake" in entry:
            say(f"{entry['recipe']}  has mistakes; `{entry['shown_by']}` shows them")


class _Varied(NamedTuple):
    """A variant, or a sweep with all its cells. to_do: how many of its ends are to be made: files, and previews."""

    preset: str
    settings: list[str]
    to_do: int


def _varied(session: Session, recipe: Recipe, plan: Plan) -> Iterator[_Varied]:
    """Yield the variants and sweeps of a recipe."""
    ends = {end for name in recipe.variants for end in session.ends_of(f"{recipe.name}{MARK}{name}")}
    to_do = Counter(step.node.recipe.name for step in plan.to_do if step.id in ends)
    swept = {cell for name, axes in recipe.sweeps.items() for cell in cells(name, axes)}
    for name, changes in recipe.variants.items():
        if name not in swept:
            preset = f"{recipe.name}{MARK}{name}"
            yield _Varied(preset, lines(changes), to_do[preset])
    for name, axes in recipe.sweeps.items():
        count = sum(to_do[f"{recipe.name}{MARK}{cell}"] for cell in cells(name, axes))
        listed = [line for axis in axes for line in lines({axis.path: list(axis.values)})]
        yield _Varied(f"{recipe.name}{MARK}{name}", listed, count)


# -- show --------------------------------------------------------------------------------------------------------------


def show(session: Session, name: str, *, as_json: bool) -> None:
    """`forge show TARGET`: an artifact's record."""
    found = {i.partition(":")[0]: i for i in reversed(session.resolve([name]))}  # of a sweep each cell's export
    plan = session.plan(list(reversed(found.values())))
    for identifier in plan.wanted:
        _show_step(session, plan.steps[identifier], as_json=as_json)


def _show_step(session: Session, step: Step, *, as_json: bool) -> None:
    if step.idle and step.artifact is not None:
        _show_idle(step, step.artifact, as_json=as_json)
        return
    if step.result is None:
        raise UsageError(f"{step.id} has not been made yet", hint=f"forge build {step.id}")
    record = session.store.record(step.result)
    if as_json:
        about = {"v": 1, "event": "show", "target": step.id}
        manifest = json.loads(step.manifest)
        print(json.dumps(about | step.result.to_json() | {"record": record, "manifest": manifest}))
        return
    _show_result(session, step, step.result, record)


def _show_idle(step: Step, artifact: Artifact, *, as_json: bool) -> None:
    """Say of a swap, or an edit that changes nothing, whose parts it has."""
    if as_json:
        about = {"v": 1, "event": "show", "target": step.id, "kind": artifact.kind, "digest": artifact.digest}
        print(json.dumps(about | {"components": step.makers, "facts": artifact.facts}))
        return
    say(f"{step.id}  {step.node.target.signature.name} → {artifact.kind}: {IDLE}")
    for name, maker in step.makers.items():
        say(f"  {name:<12} of {maker}")
    for name, fact in sorted(artifact.facts.items()):
        say(f"  {name} = {json.dumps(fact, ensure_ascii=False)}")


def _show_result(session: Session, step: Step, result: Result, record: dict[str, Any]) -> None:
    say(f"{step.id}  {step.node.target.signature.name} → {result.kind.replace('_', ' ')}")
    say(f"  key      {result.key}")
    say(f"  digest   {shown_digest(step, result)}   class {result.grade}")
    for role in dict.fromkeys(link.use.role for link, _ in step.inputs):
        say(f"  {role:<8} {', '.join(_used(link.use) for link, _ in step.inputs if link.use.role == role)}")
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(result.made))
    say(f"  made     {made} in {seconds(record.get('seconds', 0))}")
    for name, value in sorted(result.fingerprint.items()):
        say(f"  {name:<8} {value}")
    tables = {name: session.store.table(component) for name, component in result.components.items()}
    for name, table in tables.items():
        dtype = result.components[name].dtype
        say(f"  {name:<8} {len(table)} tensors, {dtype}, {size(sum(t.size for t in table))}")
    for name, told in telling(result.kind, result.facts, tables):
        say(f"  {name:<8} {told}")
    for name, fact in sorted(result.facts.items()):
        if result.kind == "dataset":
            _show_pictures(session, result, fact)
        else:
            say(f"  {name:<8} {json.dumps(fact, ensure_ascii=False)}")
    for setting, value in sorted(json.loads(step.node.target.settings).items()):
        say(f"  {setting} = {json.dumps(value, ensure_ascii=False)}")
    for name, found in sorted(result.files.items()) if result.kind != "dataset" else ():
        say(f"  {name}  {size(found[1])}  sha256 {found[0][:16]}…")
    if "loss" in record:
        say(f"  loss     {record['loss']:.4f} at the end; `forge log {step.id}` shows more")


def _used(use: Use) -> str:
    """Return an input's name, and how it is used where that is stated of each."""
    stated = {name: value for name, value in (use.use or {}).items() if value != {}}
    return f"{use.reference} {json.dumps(stated, ensure_ascii=False)}" if stated else use.reference


def telling(kind: str, facts: dict[str, Any], tables: dict[str, list[Tensor]]) -> Iterator[tuple[str, str]]:
    """Yield what a person asks first of an artifact: the words that it brings, the rank of its factors."""
    if kind == "embedding":
        for component, word in words_of(facts).items():
            vectors = tables[component][0].shape[0] if component in tables else 0
            of = "for the negative prompt" if word == negative_word(facts) else ""
            yield "word", " ".join(filter(None, [word, f"({vectors} vectors)", of]))
    for word, vectors in facts.get("tokens", []):
        yield "word", f"{word} ({vectors} vectors)"
    downs = [t.shape[0] for table in tables.values() for t in table if t.name.endswith(".lora_down")]
    if downs:
        yield "rank", " … ".join(map(str, dict.fromkeys((min(downs), max(downs)))))


def _show_pictures(session: Session, result: Result, rows: list[list[Any]]) -> None:
    """Say what a data set holds that was made: how many pictures, what they show, and where the first ones lie."""
    captions = sorted({row[1] for row in rows})
    said = {sha256: caption for sha256, caption, *_ in rows}
    say(f"  pictures {len(rows)}, {size(sum(found[1] for found in result.files.values()))}")
    for caption in captions[:MOST_CAPTIONS]:
        say(f"  says     {json.dumps(caption, ensure_ascii=False)}")
    if len(captions) > MOST_CAPTIONS:
        say(f"           and {len(captions) - MOST_CAPTIONS} more")
    for name in sorted(result.files, key=lambda name: (len(name), name))[:MOST_CAPTIONS]:
        sha256 = result.files[name][0]
        say(f"  {name:<8} {json.dumps(said.get(sha256, ''), ensure_ascii=False)} in {session.store.object(sha256)}")


# -- log ---------------------------------------------------------------------------------------------------------------

BARS = "▁▂▃▄▅▆▇█"


def log(session: Session, name: str, samples: Path | None, *, as_json: bool) -> None:
    """`forge log`: the last run of a target, or of all targets of the default recipes; its losses, its output.

    samples: a file for the pictures that were drawn while it ran.
    """
    if samples is not None:
        _write_samples(session, name, samples)
        return
    wanted = session.resolve([name] if name else [])
    plan = session.plan(wanted)
    steps = [plan.steps[wanted[0]]] if name and ":" in wanted[0] and wanted[0].endswith(name.split(":")[-1]) else []
    steps = steps or [step for step in plan.steps.values() if step.result]
    if not steps and not as_json:
        recipes = dict.fromkeys(identifier.partition(":")[0] for identifier in wanted)
        say(f"nothing of {', '.join(recipes)} has run here")
    width = width_of(map(short, steps))
    for step in steps:
        if step.idle:
            raise UsageError(f"{step.id} has no run: {IDLE} for it", hint=f"forge show {step.id}")
        result = step.result or _last_result(session, step)
        if result is None or (not step.result and _unfinished(session, step)):
            _log_unfinished(session, step, as_json=as_json)
            continue
        record = session.store.record(result)
        losses = [json.loads(line)["loss"] for line in _text(session, record.get("losses")).splitlines()]
        if as_json:
            print(
                json.dumps(
                    {
                        "v": 1,
                        "event": "log",
                        "target": step.id,
                        "made": result.made,
                        "current": step.result is not None,
                        "seconds": record.get("seconds"),
                        "losses": losses,
                        "validation": record.get("validation", []),
                        "recommended": record.get("recommended"),
                        "remark": record.get("remark"),
                        "samples": record.get("samples", []),
                        "log": _text(session, record.get("log")),
                    }
                )
            )
            continue
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(result.made))
        head = f"{short(step):<{width}} {step.node.target.signature.name:<18}"
        say(f"  {head} {made}  {seconds(record.get('seconds', 0))}")
        if not step.result:
            say("    made with other settings or inputs than now: `forge why` says which")
        if losses:
            say(f"    {len(losses)} steps, loss {losses[0]:.4f} → {losses[-1]:.4f}  {curve(losses, 48)}")
        for line in _watched(step, record):
            say(f"    {line}")
        if len(steps) == 1:
            for resumed in record.get("resumed", []):
                say(f"    went on from step {resumed['step']}")
            say(_text(session, record.get("log")) or "    (it printed nothing)")


def _watched(step: Step, record: dict[str, Any]) -> Iterator[str]:
    """Yield what was seen of a training: the loss on held-out pictures, what it remarks on its result, and samples."""
    if found := record.get("validation"):
        values, best = [loss for _, loss in found], record.get("recommended")
        yield f"held-out pictures: loss {values[0]:.4f} → {values[-1]:.4f}  {curve(values, 48)}"
        least = f"least after step {best}: {min(values):.4f}"
        if not best:
            yield "no step did better on them than the checkpoint itself: a smaller learning_rate, or more pictures"
        else:
            yield f"{least}; steps = {best} is recommended" if best < max(at for at, _ in found) else least
    if remark := record.get("remark"):
        yield remark
    if drawn := record.get("samples"):
        steps = len({row[0] for row in drawn})
        yield f"{len(drawn)} pictures after {steps} steps: `forge log {step.id} --samples FILE.png`"


def _write_samples(session: Session, name: str, path: Path) -> None:
    """Write the samples of a training as a contact sheet. Raises UsageError where there are none."""
    from sdforge.report.sheet import sample_sheet

    if path.suffix != ".png":
        raise UsageError(f"{path} is no name for a picture", hint="samples are written as FILE.png")
    wanted = session.resolve([name] if name else [])
    step = session.plan(wanted).steps[wanted[0]]
    result = step.result or _last_result(session, step)
    drawn = session.store.record(result).get("samples", []) if result else []
    drawn = [row for row in drawn if session.store.object(row[2]).is_file()]
    if not drawn:
        raise UsageError(
            f"no picture was drawn while {step.id} was made",
            hint="[run.samples] steps = 100 in forge.toml draws some every 100 steps",
        )
    path.write_bytes(sample_sheet(drawn, session.store.read_object))
    say(f"{path}: {len(drawn)} pictures")


def _last_result(session: Session, step: Step) -> Result | None:
    """Return what a target came out as when it was last built here, with whatever settings."""
    known = session.store.known(session.chronicle.last_key(step.id))
    results = known.results or (session.store.known(known.alias).results if known.alias else [])
    return results[0] if results else None


def _unfinished(session: Session, step: Step) -> list[float]:
    """Return the losses of a training that has been begun and not ended, step by step.

    A killed one may have written half a line, and repeats the steps since its last state when it goes on.
    """
    from sdforge.orders import state_folder

    if step.node.target.signature.group != "trainings" or not step.manifest:
        return []
    path = state_folder(session, step, step.content_manifest or step.manifest) / "metrics.jsonl"
    losses: dict[int, float] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            losses[row["step"]] = row["loss"]
    return [losses[at] for at in sorted(losses)]


def _log_unfinished(session: Session, step: Step, *, as_json: bool) -> None:
    """Say how far a training came that was stopped. Raises UsageError where nothing was begun."""
    losses = _unfinished(session, step)
    if not losses:
        raise UsageError(f"{step.id} has not been made yet", hint=f"forge build {step.id}")
    if as_json:
        print(json.dumps({"v": 1, "event": "log", "target": step.id, "finished": False, "losses": losses}))
        return
    say(f"  {short(step):<18} {step.node.target.signature.name:<18} not finished; `forge build` goes on")
    say(f"    {len(losses)} steps so far, loss {losses[0]:.4f} → {losses[-1]:.4f}  {curve(losses, 48)}")


def _text(session: Session, sha256: str | None) -> str:
    if not sha256 or not session.store.object(sha256).is_file():
        return ""
    return session.store.read_object(sha256).decode(errors="replace")


def curve(values: list[float], width: int) -> str:
    """Return a line of bars, each the mean of its share of the values."""
    count = min(width, len(values))
    means = [
        sum(part) / len(part)
        for i in range(count)
        if (part := values[i * len(values) // count : (i + 1) * len(values) // count])
    ]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(7, int((value - low) / span * 8))] for value in means)


# -- graph -------------------------------------------------------------------------------------------------------------


def graph(session: Session, wanted: list[str], form: str) -> None:
    """`forge graph`: what is made from what, as mermaid, dot or JSON, with states."""
    plan = session.plan(session.resolve(wanted))
    steps = [step for step in plan.steps.values() if not step.passes]
    edges = list(dict.fromkeys((plan.before(link.id), step.id) for step in steps for link, _ in step.inputs))
    sources = sorted({a for a, _ in edges if a not in plan.steps})
    if form == "json":
        nodes = [{"id": step.id, "method": step.node.target.signature.name, "state": step.state} for step in steps]
        nodes += [{"id": name, "method": "", "state": "source"} for name in sources]
        print(json.dumps({"v": 1, "event": "graph", "nodes": nodes, "edges": [list(edge) for edge in edges]}))
    elif form == "dot":
        _dot(names(plan), steps, sources, edges)
    else:
        _mermaid(names(plan), steps, sources, edges)


def _mermaid(called: dict[str, str], steps: list[Step], sources: list[str], edges: list[tuple[str, str]]) -> None:
    number = {name: f"n{i}" for i, name in enumerate([*sources, *(step.id for step in steps)])}
    print("flowchart LR")
    for name in sources:
        print(f'  {number[name]}(["{name}"])')
    for step in steps:
        print(f'  {number[step.id]}["{called[step.id]}<br/><i>{step.node.target.signature.name}</i>"]:::{step.state}')
    for a, b in edges:
        print(f"  {number[a]} --> {number[b]}")
    print("  classDef build fill:#fde2c8,stroke:#b35900\n  classDef maybe fill:#fff4cc,stroke:#a08000")
    print("  classDef reuse fill:#e2f1e3,stroke:#3c7a44\n  classDef unneeded fill:#eeeeee,stroke:#999999")


def _dot(called: dict[str, str], steps: list[Step], sources: list[str], edges: list[tuple[str, str]]) -> None:
    print("digraph forge {\n  rankdir=LR; node [shape=box, fontname=sans];")
    for name in sources:
        print(f'  "{name}" [shape=ellipse];')
    for step in steps:
        style = ', style=filled, fillcolor="#fde2c8"' if step.to_do else ""
        print(f'  "{step.id}" [label="{called[step.id]}\\n{step.node.target.signature.name}"{style}];')
    for a, b in edges:
        print(f'  "{a}" -> "{b}";')
    print("}")


# -- report ------------------------------------------------------------------------------------------------------------


def unbuilt(session: Session, identifier: str, name: str) -> UsageError:
    """Return what is said of a target that is to be looked at, and is not here; name: as the command calls it."""
    past = "is not built as its recipe has it" if session.chronicle.last_key(identifier) else "has not been built yet"
    return UsageError(f"{name} {past}", hint=f"forge build {name}")


def report(session: Session, name: str, *, as_json: bool) -> None:
    """`forge report`: write what is told of a preset anew, and print where its report lies.

    Raises UsageError for what is no preset, or is not built.
    """
    from sdforge.chapters import presets
    from sdforge.telling import REPORT, tell

    wanted = session.resolve([name] if name else [])
    recipe = wanted[0].partition(":")[0]
    if f"{recipe}:preset.export" not in wanted:
        raise UsageError(f"{name or recipe} is no preset", hint="a recipe with a [preset] is; `forge list` names them")
    plan = session.plan(wanted)
    if plan.to_do or recipe not in presets(plan):
        failed = next((check for step in plan.steps.values() for check in step.checks if check.failed), None)
        if failed is not None:
            words = str(failed.result.facts["says"]) if failed.result else ""
            raise UsageError(f"{recipe} does not pass its checks: {words}", hint=f"forge build {recipe} --no-checks")
        raise unbuilt(session, f"{recipe}:{EXPORT}", recipe)
    session.store.prepare()
    for place in tell(session, plan, recipe):
        say(f"  what lay in the way was not ours: it is in {place} now")
    path = session.outputs.folder(plan.steps[f"{recipe}:preset.export"]) / REPORT
    shown = str(path.relative_to(session.project.root))
    say(json.dumps({"v": 1, "event": "report", "path": shown}) if as_json else shown)
