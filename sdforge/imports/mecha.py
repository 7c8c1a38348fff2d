"""A recipe of sd-mecha (format 0.1.0, release 1.1.8): a line for each model, number and merge, named by its place.

sd-mecha has small methods, and what it calls add_difference_ties or train_difference is a graph of them; such graphs
are recognised. It merges every tensor, a VAE's too; so does the recipe, where the method has weights for blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import UsageError
from sdforge.exact import complement
from sdforge.imports.draft import MODELS, Draft, Wishes

FIRST = "version 0.1.0"
FAMILIES = {"sd1": "sd15", "sdxl": "sdxl"}  # how the names of their model configurations begin
TOKEN = re.compile(r'(?:[^\s"]*"(?:\\.|[^"\\])*")|\S+')
CONSTANTS = {"null": None, "true": True, "false": False}
IN_BLOCKS = {"sd1-supermerger_blocks": 12, "sdxl-supermerger_blocks": 9}  # layout of a list → levels
LORA = "kohya"  # in the name of a LoRA's configuration

Blocks = dict[str, float]  # BASE, IN00 … OUT11 → weight


class Node(NamedTuple):
    """A line: `model`, `merge`, `dict` or `literal` with what stands behind it."""

    kind: str
    positional: list[Any]
    named: dict[str, Any]
    line: int


class Ref(NamedTuple):
    """An argument that names an earlier line."""

    place: int

    def __repr__(self) -> str:
        return f"&{self.place}"


def recognises(path: Path, text: str) -> bool:
    """Say whether a text is such a recipe."""
    return path.suffix == ".mecha" or text.startswith("version 0.")


def read(path: Path, text: str, draft: Draft, wishes: Wishes) -> None:
    """Make a target of each merge. Raises UsageError for merges that have no counterpart."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != FIRST:
        found = lines[0].strip() if lines else "nothing"
        raise UsageError(f"{path} begins with {found!r}, and this forge reads sd-mecha's {FIRST!r}")
    nodes = [_node(path, number, line) for number, line in enumerate(lines[1:], 2) if _says(line)]
    draft.about = "a recipe of sd-mecha"
    graph = _Graph(path, nodes, draft)
    draft.family = wishes.family or graph.family()
    if not nodes or nodes[-1].kind != "merge":
        raise UsageError(f"{path} merges nothing: its last line is no merge")
    made = graph.made(Ref(len(nodes) - 1), wish=path.stem)
    graph.note_left()
    delta = next((method for method, name, _ in draft.targets if name == made), "") == "subtract"
    draft.preset = {} if delta else {"checkpoint": made}


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.strip().startswith("#")


def _node(path: Path, number: int, line: str) -> Node:
    kind, *rest = TOKEN.findall(line.strip())
    if kind not in ("model", "merge", "dict", "literal"):
        raise UsageError(f"{path}:{number}: there is no line {kind!r} in recipes of sd-mecha")
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for token in rest:
        key, equals, value = token.partition("=")
        if equals and not key.startswith('"'):
            named[key] = _value(path, number, value)
        else:
            positional.append(_value(path, number, token))
    return Node(kind, positional, named, number)


def _value(path: Path, number: int, token: str) -> Any:
    if token in CONSTANTS:
        return CONSTANTS[token]
    if re.fullmatch(r"&\d+", token):
        return Ref(int(token[1:]))
    if token.startswith('"') and token.endswith('"') and len(token) > 1:
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    try:
        return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
    except ValueError:
        raise UsageError(f"{path}:{number}: {token!r} is neither a number, a text nor a line's place") from None


class _Graph:
    """The lines of a file on their way into a draft."""

    def __init__(self, path: Path, nodes: list[Node], draft: Draft) -> None:
        self.path, self.nodes, self.draft = path, nodes, draft
        self._made: dict[int, str] = {}
        self._merges: dict[int, Node] = {}  # those that the recipe is made of, by their lines
        self._used: set[tuple[int, str]] = set()  # line and name of the settings that were read
        self._wish = ""  # what the merge that is being read is to be called

    def family(self) -> str:
        """Return the family that the models' configurations name, or nothing."""
        named = [str(node.named.get("model_config")) for node in self.nodes]
        found = [family for text in named for start, family in FAMILIES.items() if text.startswith(start)]
        return found[0] if found else ""

    def wrong(self, node: Node, message: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.path}:{node.line}: {message}", hint)

    def node(self, value: Any, of: Node) -> Node:
        """Return the line that an argument names."""
        found = self.nodes[value.place] if isinstance(value, Ref) and value.place < len(self.nodes) else None
        if found is None or found.line >= of.line:
            raise self.wrong(of, f"{value!r} names no line before this one")
        return found

    def is_merge(self, value: Any, of: Node, *names: str) -> Node | None:
        """Return the merge that an argument names, if it is one of these."""
        node = self.node(value, of) if isinstance(value, Ref) else None
        if node is None or node.kind != "merge" or not node.positional or node.positional[0] not in names:
            return None
        self._merges[node.line] = node
        return node

    def note_left(self) -> None:
        """Note the settings of merges that nobody has read, but for those that are off."""
        for node in self._merges.values():
            for name, value in node.named.items():
                if (node.line, name) not in self._used and value not in (None, False):
                    self.draft.note(f"`{name}` = {value} of {node.positional[0]} (line {node.line}) is left out")

    # -- numbers -------------------------------------------------------------------------------------------------------

    def number(self, value: Any, of: Node) -> Any:
        """Return a setting: a plain value, or (of blocks) block → weight."""
        if not isinstance(value, Ref):
            return value
        node = self.node(value, of)
        if node.kind == "merge" and str(node.positional[0]).startswith("convert_"):
            return self.number(node.positional[1], node)
        if node.kind == "literal":
            values = self.node(node.positional[0], node).named
            config = node.named.get("model_config")
            if config in IN_BLOCKS:
                return self._complete(values, IN_BLOCKS[config], node)
            if set(values) == {"key"}:
                return values["key"]
        raise self.wrong(of, "a setting is neither a number nor block weights", "a recipe holds numbers and `blocks`")

    def _complete(self, values: dict[str, Any], levels: int, node: Node) -> Blocks:
        """Return a weight for every block; one that is not named stays unmerged."""
        blocks = [f"IN{i:02}" for i in range(levels)] + ["M00"] + [f"OUT{i:02}" for i in range(levels)]
        names = ["BASE", *blocks]
        if others := set(values) - {*names, "VAE"}:
            raise self.wrong(node, f"there are no blocks {', '.join(sorted(others))}")
        if missing := [name for name in names if name not in values]:
            self.draft.note(f"no weight was given for {', '.join(missing)}: 0, so that they are those of the first")
        found = {name: float(values.get(name, 0)) for name in names}
        return found | {"VAE": float(values.get("VAE", found["BASE"]))}

    def settings(self, name: str, weight: Any, form: Callable[[float], Any] = float) -> dict[str, Any]:
        """Return the setting that varies by block, with the blocks where it is another one."""
        if not isinstance(weight, dict):
            return {name: form(float(weight)), "blocks": {"vae": form(float(weight))}}
        last = list(weight)[-2]  # before VAE: the last OUT, which the U-Net's output goes with
        blocks: dict[str, Any] = {"vae": form(weight["VAE"]), "unet.time": form(weight["BASE"])}
        blocks |= {_pattern(key): form(value) for key, value in weight.items() if key not in ("BASE", "VAE")}
        blocks |= {"unet.out": form(weight[last])}
        if self.draft.family == "sdxl":
            blocks["unet.label"] = form(weight["BASE"])
        return {name: form(weight["BASE"]), "blocks": blocks}

    # -- merges --------------------------------------------------------------------------------------------------------

    def made(self, value: Any, *, wish: str = "step", of: Node | None = None) -> str:
        """Return the source or target that an argument stands for, adding it if it is new."""
        if not isinstance(value, Ref):
            raise self.wrong(of or self.nodes[-1], f"{value!r} is no model")
        if value.place not in self._made:
            node = self.nodes[value.place] if of is None else self.node(value, of)
            self._made[value.place] = self._make(node, wish)
        return self._made[value.place]

    def _make(self, node: Node, wish: str) -> str:
        if node.kind == "model":
            name = str(node.positional[0])
            whole = name.endswith(MODELS) or self.draft.within(name)  # sd-mecha lets endings be left out
            return self.draft.source(name if whole else f"{name}.safetensors")
        if node.kind != "merge":
            raise self.wrong(node, f"a {node.kind} is no model")
        method, *arguments = node.positional
        read = getattr(self, f"_read_{method}", None)
        if read is None:
            raise self.wrong(
                node,
                f"`{method}` of sd-mecha has no counterpart here",
                "`forge list --methods` names the merges that there are",
            )
        self._merges[node.line] = node
        self._wish = wish
        made = read(node, arguments)
        return made if isinstance(made, str) else self.draft.target(made[0], wish, made[1])

    def _argument(self, node: Node, arguments: list[Any], place: int, name: str, default: Any) -> Any:
        """Return a setting, by its place or its name."""
        return self.number(self._given(node, arguments, place, name, default), node)

    def _given(self, node: Node, arguments: list[Any], place: int, name: str, default: Any) -> Any:
        """Return what is written for a setting, and count it as read."""
        self._used.add((node.line, name))
        return arguments[place] if len(arguments) > place else node.named.get(name, default)

    def _scalar(self, node: Node, arguments: list[Any], place: int, name: str, default: float) -> float:
        found = self._argument(node, arguments, place, name, default)
        if isinstance(found, dict):
            raise self.wrong(node, f"`{name}` has weights for blocks, and is one number here")
        return float(found)

    def _two(self, node: Node, arguments: list[Any]) -> dict[str, Any]:
        return {"a": self.made(arguments[0], of=node), "b": self.made(arguments[1], of=node)}

    def _all(self, node: Node, arguments: list[Any]) -> list[str]:
        return [self.made(each, of=node) for each in arguments]

    def _only_first_vae(self) -> None:
        self.draft.note("sd-mecha would merge the VAEs too; here the result has the first checkpoint's")

    def _read_weighted_sum(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        alpha = self._argument(node, arguments, 2, "alpha", 0.5)
        shares = self.settings("weights", alpha, lambda weight: [complement(weight), weight])
        return "weighted_sum", {"checkpoints": list(self._two(node, arguments).values()), **shares}

    def _read_n_average(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        names = self._all(node, arguments)
        return "linear", {"checkpoints": names, "blocks": {"vae": [1.0] * len(names)}}

    def _read_slerp(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        self.draft.note("slerp of sd-mecha turns directions and mixes lengths on a line; here the arc does both")
        weight = self.settings("weight", self._argument(node, arguments, 2, "alpha", 0.5))
        return "slerp", self._two(node, arguments) | weight

    def _read_subtract(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        self._only_first_vae()
        return "subtract", self._two(node, arguments)

    def _read_add_difference(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        """A difference that is added: which merge it is depends on how the difference came to be."""
        first, delta, *_ = arguments
        given = self._given(node, arguments, 2, "alpha", 1.0)
        if apart := self.is_merge(delta, node, "subtract"):
            return self._added(node, first, apart, given)
        if crooked := self.is_merge(delta, node, "perpendicular_component"):
            return self._perpendicular(node, first, crooked, given)
        if voted := self.is_merge(delta, node, "ties_sum", "ties_sum_with_dropout", "model_stock"):
            return self._joined(node, first, voted, given)
        if lora := self._lora(delta, node):
            strength = self._scalar(node, [given], 0, "alpha", 1.0)
            return "bake", {"checkpoint": self.made(first, of=node), "loras": {lora: {"strength": strength}}}
        weight = self.settings("weight", self.number(given, node))
        return "add", {"a": self.made(first, of=node), "delta": self.made(delta, of=node), **weight}

    def _lora(self, value: Any, of: Node) -> str:
        """Return the source of a LoRA that an argument names, also through a conversion; else nothing."""
        node = self.node(value, of) if isinstance(value, Ref) else None
        if node and node.kind == "merge" and str(node.positional[0]).startswith("convert_"):
            return self._lora(node.positional[1], node)
        is_lora = node and node.kind == "model" and LORA in str(node.named.get("model_config"))
        return self.made(value, of=of) if is_lora else ""

    def _added(self, node: Node, first: Any, apart: Node, given: Any) -> tuple[str, dict[str, Any]]:
        _, b, base = apart.positional
        if mask := self.is_merge(given, node, "train_difference_mask"):
            if mask.positional[1:4] != [first, b, base]:
                raise self.wrong(mask, "the mask of a train difference is of other models than the difference")
            method, weight = "train_difference", self._argument(mask, mask.positional[1:], 3, "alpha", 1.0)
        else:
            method, weight = "add_difference", self.number(given, node)
        table = {"a": self.made(first, of=node), "b": self.made(b, of=apart), "base": self.made(base, of=apart)}
        return method, table | self.settings("weight", weight)

    def _perpendicular(self, node: Node, first: Any, crooked: Node, given: Any) -> tuple[str, dict[str, Any]]:
        """Add α · the part of (b − base) that is perpendicular to (a − base) to a."""
        own, other = (self.is_merge(each, crooked, "subtract") for each in crooked.positional[1:3])
        if not own or not other or own.positional[1] != first or own.positional[2] != other.positional[2]:
            raise self.wrong(crooked, "a perpendicular component is known of (a − base) and (b − base), added to a")
        table = {"a": self.made(first, of=node), "b": self.made(other.positional[1], of=other)}
        table["base"] = self.made(other.positional[2], of=other)
        return "add_perpendicular", table | self.settings("weight", self.number(given, node))

    def _joined(self, node: Node, base: Any, voted: Node, given: Any) -> tuple[str, dict[str, Any]]:
        """Add α · what several differences from a base agree on to it."""
        method, *deltas = voted.positional
        apart = [self.is_merge(each, voted, "subtract") for each in deltas]
        if not all(each and each.positional[2] == base for each in apart):
            raise self.wrong(voted, f"`{method}` is known of differences from the checkpoint that they are added to")
        checkpoints = [self.made(each.positional[1], of=each) for each in apart if each]
        table: dict[str, Any] = {"base": self.made(base, of=node), "checkpoints": checkpoints}
        scale = self._scalar(node, [given], 0, "alpha", 1.0)
        if method == "model_stock":
            self._only_first_vae()
            self.draft.note("model_stock of sd-mecha compares neighbours row by row; here all pairs, tensor by tensor")
            if scale != 1:
                raise self.wrong(node, "a model stock is added as it is, with alpha 1")
            return "model_stock", table
        table |= {"scale": scale, "vote": "sum" if self._argument(voted, [], 0, "vote_sgn", False) else "count"}
        everywhere = {"blocks": {"vae": [1.0] * len(checkpoints)}}
        kept = self._scalar(voted, [], 0, "k", 1.0)
        if method == "ties_sum":
            self.draft.note("ties of sd-mecha keeps one value more than asked, and drops what has a tie of votes")
            return "ties", table | {"density": kept, "normalize": True} | everywhere
        return "dare", table | self._dropped(voted, kept) | everywhere

    def _dropped(self, voted: Node, kept: float) -> dict[str, Any]:
        if kept != 1 or self._scalar(voted, [], 0, "della_eps", 0.0):
            raise self.wrong(voted, "a dropout that also trims (k, della_eps) has no counterpart here")
        self.draft.note("dropout of sd-mecha draws other numbers, and shrinks the sum by a factor of model stock")
        density = complement(self._scalar(voted, [], 0, "probability", 0.9))
        rescale = bool(self._argument(voted, [], 0, "rescale", True))
        return {"density": density, "rescale": rescale, "normalize": True}

    def _read_geometric_median(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        self._only_first_vae()
        steps = int(self._scalar(node, [], 0, "maxiter", 100))
        return "geometric_median", {"checkpoints": self._all(node, arguments), "max_iter": steps}

    def _read_clamp(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        self._only_first_vae()
        first, *others = self._all(node, arguments)
        stiffness = self._scalar(node, [], 0, "stiffness", 0.0)
        return "clamp", {"a": first, "checkpoints": others, "stiffness": stiffness}

    def _read_tensor_sum(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        self.draft.note(
            "tensor_sum of sd-mecha rounds the bounds of its rows to the nearest; here they are rounded down"
        )
        width = self.settings("width", self._argument(node, arguments, 2, "width", 0.5))
        return "tensor_sum", self._two(node, arguments) | width | {
            "offset": self._scalar(node, arguments, 3, "offset", 0.0)
        }

    def _cosine(self, node: Node, arguments: list[Any], similarity: str) -> tuple[str, dict[str, Any]]:
        weight = self.settings("weight", self._argument(node, arguments, 2, "alpha", 0.5))
        return "cosine", self._two(node, arguments) | weight | {"similarity": similarity}

    def _read_add_cosine_a(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        return self._cosine(node, arguments, "columns")

    def _read_add_cosine_b(self, node: Node, arguments: list[Any]) -> tuple[str, dict[str, Any]]:
        return self._cosine(node, arguments, "mean")

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _read_cast(self, node: Node, arguments: list[Any]) -> str | tuple[str, dict[str, Any]]:
        found = self.made(arguments[0], of=node)
        named = str(self._argument(node, arguments, 2, "dtype", None))
        short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(named, named)
        if short not in ("fp16", "bf16", "fp32"):
            self.draft.note(f"a cast to {named} is left out")
            return found
        return "cast", {"checkpoint": found, "dtype": short}

    def _read_fallback(self, node: Node, arguments: list[Any]) -> str | tuple[str, dict[str, Any]]:
        """What a checkpoint lacks is taken of another one: of a component it is a swap, of a whole merge nothing."""
        first, other = arguments
        if picked := self.is_merge(first, node, "pick_component"):
            component = self.number(picked.positional[2], picked)
            if component not in ("vae", "unet"):
                raise self.wrong(picked, f"the component {component!r} is not known", "here there are unet and vae")
            return "swap", {
                "checkpoint": self.made(other, of=node),
                component: self.made(picked.positional[1], of=picked),
            }
        if isinstance(other, Ref) and self.nodes[other.place].kind != "model":
            self.draft.note("a merge that stood in for tensors that the first lacks is left out: checkpoints are whole")
        return self.made(first, of=node, wish=self._wish)


def _pattern(block: str) -> str:
    """Return the pattern here for a block as lists name it."""
    return "unet.mid" if block == "M00" else f"unet.{block.lower()}"
