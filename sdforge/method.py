"""Name → method: what it takes, what it makes, what can be set. The folders are the registry.

The name in a recipe is the name of a module in `merges/`, `trainings/`, `edits/` or `checks/`; nothing is registered
anywhere else. `FORGE_METHODS` may name further folders with the same folders in them, for methods under development.
Names are known without importing anything; a module is imported when a recipe that uses it is first read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_origin, get_type_hints

from sdforge.errors import SettingErrors, UsageError, nearest
from sdforge.places import code_folders

if TYPE_CHECKING:
    from sdforge.blocks import Place
    from sdforge.families import Family
    from sdforge.formula import Input, Plan
    from sdforge.settings import PerBlock, Table

GROUPS = ("merges", "trainings", "edits", "checks")
BY_PRESET = ("export", "previews")  # edits that only [preset] asks for
LOOP_VERSION = 1  # of the training loop that all trainings share
TENSOR, SEED, LATENTS = "tensor", "seed", "latents"  # what a merge may ask for by name, and no recipe gives it
ELSEWHERE = {  # what merge programs call blocks besides IN04, M00 and OUT03 → the pattern here
    "BASE": "text_encoder*",
    "TE": "text_encoder",
    "TE2": "text_encoder_2",
    "TIME": "unet.time",
    "LABEL": "unet.label",
    "OUT": "unet.out",
    "VAE": "vae",
}
ELEMENTS = ":"  # in a pattern: behind it stands what is in the names of the block's tensors that are meant
LISTS = ("blocks", "mbw", "mbw_preset")  # the settings by which a merge differs from block to block
WHOLE = ("dtype", "prediction")  # those that concern its result as a whole


@dataclass(frozen=True, slots=True)
class Role:
    """A field of a table that names artifacts. many: "" for one name, `list`, or `table` (name → how it is used).

    also: further kinds that serve. widens: other role → components and facts of it that matter too where this one is
    given.
    """

    kind: str
    reads: tuple[str, ...]
    facts: tuple[str, ...]
    moves: tuple[str, ...]
    many: str
    also: tuple[str, ...] = ()
    widens: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind, *self.also)


@dataclass(frozen=True, slots=True)
class Signature:
    """What planning needs to know of a method when its table has been read: no code, so it can be kept in a cache.

    kind: `formula` (class A, named by how it is made), `content` (named by its bytes), or `moves` (nothing is done).
    code: further code whose version decides the result. pinned: whether the lock chooses among its results.
    """

    name: str
    group: str
    version: int
    makes: str
    kind: str
    seeded: bool
    pinned: bool
    code: dict[str, int]
    roles: dict[str, Role]


class Unmatched(NamedTuple):
    """A pattern that matches nothing, as SettingErrors has it."""

    key: str
    message: str
    hint: str


@dataclass(frozen=True)
class Method:
    """A way to make an artifact: its table (settings and inputs) and its code."""

    name: str
    group: str
    version: int
    makes: str
    table: type[Table]
    module: ModuleType

    @cached_property
    def signature(self) -> Signature:
        """Return what planning needs to know of the method."""
        from sdforge.settings import Seeded, takes

        roles = {
            name: Role(mark.kind, mark.reads, mark.facts, mark.moves, _many(info.annotation), mark.also, mark.widens)
            for name, info in self.table.model_fields.items()
            if (mark := takes(info))
        }
        formula = self.group == "merges" or hasattr(self.module, "plan")
        moves = any(role.moves for role in roles.values())
        return Signature(
            name=self.name,
            group=self.group,
            version=self.version,
            makes=self.makes,
            kind="formula" if formula else "moves" if moves else "content",
            seeded=issubclass(self.table, Seeded),
            pinned=getattr(self.module, "PINNED", True),
            code=getattr(self.module, "CODE", {"loop": LOOP_VERSION} if self.group == "trainings" else {}),
            roles=roles,
        )

    def plan(self, table: Any, inputs: dict[str, list[Input]], family: Family) -> Plan:
        """Return what the formula makes, tensor by tensor. Raises UsageError for inputs that do not fit."""
        if self.group != "merges":
            found: Plan = self.module.plan(table, inputs, family)
            return found
        from inspect import signature

        from sdforge.formula import merge_plan, merged_facts

        flat = [each for role in inputs.values() for each in role]
        asked = signature(getattr(self.module, self.name)).parameters.keys()
        parameters = block_parameters(table, family, asked)
        made = merge_plan(self.name, self.version, self.module.simplify, flat, family, parameters, table.dtype)
        made.facts = merged_facts(flat, family, table.prediction)
        return made


def _many(annotation: Any) -> str:
    return {list: "list", dict: "table"}.get(get_origin(annotation), "")


@cache
def method_groups() -> dict[str, str]:
    """Return the name of every method → its group, from the folders alone."""
    found = {}
    for root in code_folders():
        for group in GROUPS:
            for path in sorted((root / group).glob("*")):
                name = path.stem if path.suffix == ".py" else path.name
                package = path.is_dir() and (path / "__init__.py").is_file()
                if (path.suffix == ".py" or package) and not name.startswith("_"):
                    found[name] = group
    return found


def is_target(name: str) -> bool:
    """Say whether a recipe may have `[name.…]` tables of a method: not of those that [preset] and [checks] ask for."""
    return name not in BY_PRESET and method_groups()[name] != "checks"


@cache
def module_of(group: str, name: str) -> ModuleType:
    """Import the module of a method (or its part, as in `lora.adapter`)."""
    package = importlib.import_module(f"sdforge.{group}")
    for root in code_folders()[1:]:
        folder = str(root / group)
        if folder not in package.__path__:
            package.__path__.append(folder)
    return importlib.import_module(f"sdforge.{group}.{name}")


@cache
def method(name: str) -> Method:
    """Return the method of that name. Raises UsageError with a guess at what was meant."""
    groups = method_groups()
    if name not in groups:
        guess = called_elsewhere(name) or nearest(name, list(groups))
        raise UsageError(f"there is no method {name!r}", hint=f"did you mean {guess!r}?" if guess else "")
    group = groups[name]
    module = module_of(group, name)
    if group == "merges":
        makes = getattr(module, "MAKES", "checkpoint")
        return Method(name, group, module.VERSION, makes, _merge_table(getattr(module, name)), module)
    return Method(name, group, module.VERSION, module.MAKES, module.TABLE, module)


def called_elsewhere(name: str) -> str:
    """Return the merge whose docstring names `name` among its sources, as what other programs call it, or nothing."""
    from inspect import getdoc

    for found, group in method_groups().items():
        if group == "merges":
            _, _, sources = (getdoc(getattr(module_of(group, found), found)) or "").partition("Source:")
            if f"`{name}`" in sources:
                return found
    return ""


def _merge_table(function: Callable[..., Any]) -> type[Table]:
    """Derive a merge's table from its signature: parameters are inputs, keyword-only ones are settings."""
    from inspect import getdoc, signature

    from pydantic import Field, create_model

    from sdforge.settings import Merge, PerBlock, Reference, SeededMerge, Takes

    hints = get_type_hints(function, localns={"Tensor": object}, include_extras=True)
    takes_ = Takes("checkpoint", ("unet", "text_encoder"), ())
    fields: dict[str, Any] = {}
    base: type[Merge] = Merge
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            bounds = getattr(hints[name], "__metadata__", ()) or (Field(min_length=1),)
            fields[name] = (Annotated[list[Reference], *bounds, takes_], ...)
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            own = next((m.kind for m in getattr(hints[name], "__metadata__", ()) if isinstance(m, Takes)), takes_.kind)
            fields[name] = (Annotated[Reference, replace(takes_, kind=own)], ...)
        elif name == SEED:
            base = SeededMerge
        elif name not in (TENSOR, LATENTS):
            default = ... if parameter.default is parameter.empty else parameter.default
            hint = hints[name]
            fields[name] = (hint, default)
            mark = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, PerBlock)), None)
            if mark is not None:
                fields |= _block_fields(hint, mark)
    model: type[Table] = create_model(function.__name__, __base__=base, __doc__=getdoc(function), **fields)
    return model


def _block_fields(hint: Any, mark: PerBlock) -> dict[str, Any]:
    """Return the settings by which another one, of this type, differs from block to block."""
    from pydantic import Field

    from sdforge.blocks import Preset
    from sdforge.settings import Block, Since, Weight

    note = (
        "component or component.block (patterns allowed: the longest text before a wildcard wins; "
        f"`{ELEMENTS}attn1.to_k` for some tensors) → the setting there"
    )
    found: dict[str, Any] = {"blocks": (dict[Block, hint], Field({}, description=note))}
    scalar = get_origin(hint) is not list and get_origin(getattr(hint, "__origin__", None)) is not list
    if scalar or mark.shares:
        each = hint if scalar else Weight
        what = "the second checkpoint's share" if mark.shares else "the same setting"
        note = f"{what} in BASE, IN00 … M00 … OUT11, as merge programs write it; `blocks` come before it"
        found["mbw"] = (Annotated[list[each], Since(2, [])], Field([], description=note))  # type: ignore[valid-type]
        note = "such a list that has a name"
        found["mbw_preset"] = (Annotated[Preset, Since(2, "")], Field("", description=note))
    return found


def per_block(table: Table | type[Table]) -> str:
    """Return the setting that `blocks` may override, or ""."""
    from sdforge.settings import PerBlock

    cls = table if isinstance(table, type) else type(table)
    marked = (n for n, f in cls.model_fields.items() if any(isinstance(m, PerBlock) for m in f.metadata))
    return next(marked, "")


def block_parameters(
    table: Any, family: Family, asked: Collection[str] = ()
) -> Callable[[str, str, str], dict[str, Any] | None]:
    """Return (component, block, tensor) → a merge's settings there; None for a VAE and its like that no pattern names.

    asked: what the merge asks for by name. Raises SettingErrors for lists and patterns that say nothing.
    """
    varies = per_block(table)
    settings = {k: v for k, v in table.settings().items() if k not in (*LISTS, *WHOLE)}
    settings |= {SEED: table.seed or 0} if SEED in asked else {}
    settings |= {LATENTS: family.latents} if LATENTS in asked else {}
    patterns = getattr(table, "blocks", {})
    places, elements = resolve_blocks(patterns, family), resolve_elements(patterns, family)
    listed = _listed(table, family)
    chosen = {component for component, _ in places}

    def at(component: str, block: str, tensor: str) -> dict[str, Any] | None:
        if component in family.kept and component not in chosen:
            return None
        found = settings | ({TENSOR: f"{component}.{tensor}"} if TENSOR in asked else {})
        if pattern := elements.get((component, tensor)) or places.get((component, block)):
            return found | {varies: patterns[pattern]}
        return found | {varies: listed[component, block]} if (component, block) in listed else found

    return at


def _listed(table: Any, family: Family) -> dict[Place, Any]:
    """Return what `mbw` or `mbw_preset` say of each block, in the form of the setting that they stand for."""
    from sdforge.blocks import of_whole_unet, preset, spelled_out
    from sdforge.exact import complement

    values, name = getattr(table, "mbw", []), getattr(table, "mbw_preset", "")
    if not values and not name:
        return {}
    if values and name:
        raise SettingErrors(
            [("mbw_preset", "`mbw` and `mbw_preset` are two lists for the same blocks", "leave one out")]
        )
    weights = of_whole_unet(preset(name, family) if name else spelled_out(values, family), family)
    if not isinstance(getattr(table, per_block(table)), list):
        return dict(weights)
    if len(table.checkpoints) != 2:
        message = f"a list of block weights is for two checkpoints, and there are {len(table.checkpoints)}"
        raise SettingErrors(
            [("mbw_preset" if name else "mbw", message, "write `blocks`, with a number for each of them")]
        )
    return {place: [complement(weight), weight] for place, weight in weights.items()}


def resolve_blocks(patterns: Iterable[str], family: Family) -> dict[Place, str]:
    """Return (component, block) → the pattern that decides there; patterns with elements decide nothing here.

    The pattern with the longest literal prefix wins. Raises SettingErrors for a pattern that matches nothing, and for
    two of equal length that match one block, since tables have no order.
    """
    places = block_places(family)

    def matched(pattern: str) -> list[Place]:
        return [place for place in places if block_matches(pattern, *place)]

    whole = [pattern for pattern in patterns if ELEMENTS not in pattern]
    return _decided(whole, matched, literal, lambda pattern: _unmatched(pattern, places, family))


def resolve_elements(patterns: Iterable[str], family: Family) -> dict[Place, str]:
    """Return (component, tensor) → the pattern with elements that decides there, as in `OUT04:attn1.to_k`.

    Before the colon stands a block's pattern, behind it what stands somewhere in tensors' names (`*` and `?` allowed).
    The longest literal prefix wins, then the most elements. What a merge keeps from its first checkpoint has no
    elements. Raises SettingErrors as `resolve_blocks` does.
    """
    names = [name for name in family.names() if name.component not in family.kept]

    @cache
    def within(block: str) -> list[Place]:
        here = [name for name in names if block_matches(block, name.component, name.block)]
        return [(name.component, name.canonical) for name in here]

    def matched(pattern: str) -> list[Place]:
        block, _, elements = pattern.partition(ELEMENTS)
        return [place for place in within(block) if elements and fnmatchcase(place[1], f"*{elements}*")]

    def unmatched(pattern: str) -> Unmatched:
        block, _, elements = pattern.partition(ELEMENTS)
        if not block:
            return Unmatched(pattern, f"the block pattern {pattern!r} names no block", f"did you mean 'unet{pattern}'?")
        there = next((name for _, name in within(block)), "")
        if not there and any(block_matches(block, component, "") for component in family.kept):
            return Unmatched(pattern, f"{block} is merged whole, or stays", f"name it without {ELEMENTS}{elements}")
        if not there:
            return _unmatched(block, block_places(family), family)._replace(key=pattern)
        message = f"no tensor of {block} has {elements!r} in its name"
        return Unmatched(pattern, message, f"names are diffusers': {there}, …")

    def rank(pattern: str) -> tuple[int, int]:
        block, _, elements = pattern.partition(ELEMENTS)
        return literal(block), len(elements)

    return _decided([pattern for pattern in patterns if ELEMENTS in pattern], matched, rank, unmatched)


def idle_patterns(patterns: Collection[str], family: Family) -> list[str]:
    """Return the patterns that decide nothing, as others go before them wherever they match. Raises as those do."""
    deciding = {*resolve_blocks(patterns, family).values(), *resolve_elements(patterns, family).values()}
    return [pattern for pattern in patterns if pattern not in deciding]


def _decided(
    patterns: list[str],
    matched: Callable[[str], list[Place]],
    rank: Callable[[str], Any],
    unmatched: Callable[[str], Unmatched],
) -> dict[Place, str]:
    """Return place → the pattern of the highest rank that matches there. Raises SettingErrors for none, and for two."""
    found: dict[Place, str] = {}
    wrong: dict[str, tuple[str, str, str]] = {}
    for pattern in patterns:
        places = matched(pattern)
        if not places:
            wrong[pattern] = unmatched(pattern)
        for place in places:
            other = found.get(place)
            if other is not None and rank(other) == rank(pattern):
                first, second = sorted((other, pattern))
                message = f"the block patterns {first!r} and {second!r} both match {'.'.join(filter(None, place))}"
                wrong.setdefault(second, (second, message, "make one of them longer before its wildcard"))
            if other is None or rank(pattern) > rank(other):
                found[place] = pattern
    if wrong:
        raise SettingErrors(list(wrong.values()))
    return found


def places_of(pattern: str, family: Family) -> list[tuple[str, str]]:
    """Return every (component, block) that a pattern matches. Raises SettingErrors if there is none."""
    places = block_places(family)
    matched = [place for place in places if block_matches(pattern, *place)]
    if not matched:
        raise SettingErrors([_unmatched(pattern, places, family)])
    return matched


def _unmatched(pattern: str, places: list[Place], family: Family) -> Unmatched:
    blocks = sorted(f"{component}.{block}" for component, block in places if block)
    words = sorted({component for component, _ in places})
    meant = {each.partition(".")[2]: each for each in blocks} | {each: each for each in (*blocks, *words)} | ELSEWHERE
    guess = meant.get(nearest(pattern, list(meant)), "")
    hint = f"did you mean {guess!r}?" if guess else f"blocks are {', '.join([*words, *blocks][:4])}, …"
    return Unmatched(pattern, f"the block pattern {pattern!r} matches nothing in {family.title}", hint)


def block_places(family: Family) -> list[tuple[str, str]]:
    """Return every (component, block) of a family, in the order of its names."""
    return list(dict.fromkeys((name.component, name.block) for name in family.names()))


def block_matches(pattern: str, component: str, block: str) -> bool:
    """Say whether a pattern over `component` or `component.block` matches a block; `IN04`, `M00`, `OUT0?` serve too."""
    pattern = spelled(pattern)
    return fnmatchcase(component, pattern) or (bool(block) and fnmatchcase(f"{component}.{block}", pattern))


def spelled(pattern: str) -> str:
    """Return the pattern for a block's name as the merge programs write it."""
    if pattern == "M00":
        return "unet.mid"
    if len(pattern) in (4, 5) and pattern[:-2] in ("IN", "OUT") and pattern[-2:].replace("?", "0").isdigit():
        return f"unet.{pattern.lower()}"
    return pattern


def literal(pattern: str) -> int:
    """Return how long a pattern's literal prefix is."""
    pattern = spelled(pattern)
    return min((pattern.index(c) for c in "*?[" if c in pattern), default=len(pattern) + 1)
