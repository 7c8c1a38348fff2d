"""A configuration of mergekit (0.1.5) for checkpoints: YAML with `merge_method` and `models`.

mergekit merges every tensor that it finds, a VAE's too; so does the recipe, where the method has weights for blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import UsageError, nearest
from sdforge.imports.draft import Draft, Wishes, listed

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
RUNS = {  # keys that say how to run, or what language models need, and nothing of a checkpoint's numbers
    "int8_mask",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
}


class Way(NamedTuple):
    """A method of theirs, as ours. settings: what it fixes; defaults: theirs of what a file may leave out."""

    method: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    differs: str = ""


DRAWN = "which values are dropped is drawn otherwise, and those kept are divided by the density as the paper does"
WAYS = {
    "linear": Way("linear", {}, {"normalize": True}),
    "slerp": Way("slerp", {}, {"t": None}),
    "task_arithmetic": Way("task_arithmetic", {}, {"normalize": False, "lambda": 1.0}),
    "ties": Way("ties", {"vote": "sum"}, {"normalize": True, "lambda": 1.0, "density": 1.0}),
    "dare_linear": Way(
        "dare", {"vote": "none"}, {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": True}, DRAWN
    ),
    "dare_ties": Way(
        "dare", {"vote": "sum"}, {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": True}, DRAWN
    ),
    "breadcrumbs": Way(
        "breadcrumbs", {"vote": "none"}, {"normalize": False, "lambda": 1.0, "density": 1.0, "gamma": 0.01}
    ),
    "breadcrumbs_ties": Way(
        "breadcrumbs", {"vote": "sum"}, {"normalize": False, "lambda": 1.0, "density": 1.0, "gamma": 0.01}
    ),
    "della": Way(
        "della",
        {"vote": "sum"},
        {"normalize": True, "lambda": 1.0, "density": 1.0, "epsilon": 0.15, "rescale": True},
        DRAWN,
    ),
    "della_linear": Way(
        "della",
        {"vote": "none"},
        {"normalize": False, "lambda": 1.0, "density": 1.0, "epsilon": 0.15, "rescale": True},
        DRAWN,
    ),
    "model_stock": Way("model_stock", {}, {"filter_wise": False}),
    "nearswap": Way("nearswap", {}, {"t": None}),
    "karcher": Way("karcher", {}, {"max_iter": 10, "tol": 1e-5}),
    "sce": Way("sce", {}, {"select_topk": 1.0}),
    "passthrough": Way("scale", {}, {"scale": 1.0}),
}
CALLED = {"lambda": "scale", "t": "weight", "scale": "weight"}  # a parameter of theirs → our setting
BETWEEN = ("slerp", "nearswap")  # from the base towards one other
EQUAL = ("karcher", "linear")  # of checkpoints alone, none of them a base
PER_MODEL = ("density", "gamma", "epsilon")  # which mergekit has for each model, and we for all of them


def recognises(path: Path, text: str) -> bool:
    """Say whether a text is such a configuration, by its name and one key."""
    return path.suffix in (".yaml", ".yml") and "merge_method" in text


def read(path: Path, text: str, draft: Draft, wishes: Wishes) -> None:
    """Make one merge of it. Raises UsageError for methods and forms that have no counterpart."""
    config = _yaml(path, text)
    name = str(config.get("merge_method"))
    draft.about = f"a configuration of mergekit ({name})"
    draft.family = wishes.family
    if parts := [key for key in ("slices", "modules") if config.get(key)]:
        raise UsageError(f"{path} takes models apart by layers (`{parts[0]}`)", hint="a recipe names blocks: `blocks`")
    if name not in WAYS:
        guess = nearest(name, list(WAYS))
        raise UsageError(
            f"the method {name!r} of mergekit has no counterpart here",
            hint=f"did you mean {guess!r}?" if guess else f"there are {', '.join(WAYS)}",
        )
    _Reading(path, config, draft, WAYS[name]).make(path.stem)


def _yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UsageError(f"{path} names parts of itself (`*NAME`), which can unfold without end", "write them out")
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no configuration of mergekit: it is no mapping")
    return found


class _Reading:
    """One configuration on its way into a draft."""

    def __init__(self, path: Path, config: dict[str, Any], draft: Draft, way: Way) -> None:
        self.path, self.config, self.draft, self.way = path, config, draft, way
        self.shared = self._parameters(config.get("parameters"))
        self.models = [self._model(row) for row in self._rows()]
        self.used: set[str] = set()

    def _rows(self) -> list[Any]:
        rows = self.config.get("models")
        if not isinstance(rows, list) or not rows:
            raise UsageError(f"{self.path} names no models", hint="models: a list of {model: FILE, parameters: …}")
        return rows

    def _model(self, row: Any) -> tuple[str, dict[str, Any]]:
        named = row.get("model") if isinstance(row, dict) else None
        if not isinstance(named, str) or not named:
            raise UsageError(f"{self.path}: a model is written as model: FILE, and one is {row!r}")
        if "+" in named:
            raise UsageError(
                f"{self.path}: {named} bakes a LoRA on the way", hint="bake it first: [bake.NAME] makes a checkpoint"
            )
        return named, self._parameters(row.get("parameters"))

    def _parameters(self, found: Any) -> dict[str, Any]:
        """Return parameters as plain values; what differs from layer to layer has none."""
        if not isinstance(found, dict):
            return {}
        return {str(key): self._plain(str(key), value) for key, value in found.items()}

    def _plain(self, key: str, value: Any) -> Any:
        """Return the value that holds for tensors that no filter names."""
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            return float(value) if isinstance(value, str) and _is_number(value) else value
        if not all(isinstance(each, dict) for each in value):
            raise UsageError(
                f"{self.path}: `{key}` changes from layer to layer, which checkpoints of pictures do not have",
                hint="write one number, and `blocks` in the recipe",
            )
        general = [each.get("value") for each in value if each.get("filter") in (None, "*")]
        for each in value:
            if each.get("filter") not in (None, "*"):
                self.draft.note(f"`{key}` = {each.get('value')} for tensors with {each['filter']!r} in their names")
        if not general:
            raise UsageError(f"{self.path}: `{key}` has no value for tensors that no filter names")
        return self._plain(key, general[0])

    def make(self, stem: str) -> None:
        """Add the merge, its sources and the preset."""
        base = self.config.get("base_model")
        method = self.way.method
        others = [(name, own) for name, own in self.models if name != base or method in EQUAL]
        if not isinstance(base, str) and method not in (*EQUAL, "scale"):
            raise UsageError(f"{self.path} has no `base_model`, which {self.config['merge_method']} needs")
        names = [self.draft.source(name) for name, _ in others]
        table: dict[str, Any] = {}
        if method in BETWEEN:
            if len(others) != 1:
                raise UsageError(f"{self.path}: {self.config['merge_method']} goes from the base to one other model")
            table |= {"a": self.draft.source(str(base)), "b": names[0]}
        elif method == "scale":
            table |= {"a": names[0]}
        else:
            table |= {} if method in EQUAL else {"base": self.draft.source(str(base))}
            table |= {"checkpoints": names}
        method = self._settings(method, others, table)
        self._left()
        self.draft.preset = {"checkpoint": self.draft.target(method, stem, table)}

    def _settings(self, method: str, others: list[tuple[str, dict[str, Any]]], table: dict[str, Any]) -> str:
        """Fill in what is set; return the method, which for sums depends on it."""
        weights = self._weights(method, others)
        for key, default in self.way.defaults.items():
            value = self._one(key, others, default)
            if value is None:
                raise UsageError(f"{self.path} does not say `{key}`, which {self.config['merge_method']} needs")
            if method == "linear":
                method = "linear" if value else "weighted_sum"
            else:
                table["t" if method == "nearswap" else CALLED.get(key, key)] = value
        table |= {"weights": weights} if weights else {}
        table |= self.way.settings
        self._everywhere(method, table)
        dtype = self.config.get("out_dtype") or self.config.get("dtype")
        if dtype and str(dtype) not in DTYPES:
            self.draft.note(f"dtype = {dtype}: the result has the type of the first checkpoint")
        elif dtype:
            table["dtype"] = DTYPES[str(dtype)]
        if self.config.get("out_dtype") and self.config.get("dtype"):
            self.draft.note(
                f"dtype = {self.config['dtype']}: all is computed as exactly as the formula asks, not in it"
            )
        if self.way.differs:
            self.draft.note(self.way.differs)
        return method

    def _weights(self, method: str, others: list[tuple[str, dict[str, Any]]]) -> list[float]:
        """Return the weight of each model, for methods that have weights."""
        if method not in ("linear", "task_arithmetic", "ties", "dare", "breadcrumbs", "della"):
            return []
        self.used.add("weight")
        found: list[Any] = [own.get("weight", self.shared.get("weight")) for _, own in others]
        if missing := [name for (name, _), weight in zip(others, found, strict=True) if weight is None]:
            raise UsageError(f"{self.path} gives no `weight` to {listed(missing)}")
        return [float(weight) for weight in found]

    def _one(self, key: str, others: Iterable[tuple[str, dict[str, Any]]], default: Any) -> Any:
        """Return the one value of a parameter. Raises UsageError where models have several."""
        self.used.add(key)
        found = {str(v): v for _, own in others if (v := own.get(key, self.shared.get(key))) is not None}
        if len(found) > 1 and key in PER_MODEL:
            raise UsageError(
                f"{self.path} gives models different values of `{key}` ({listed(found)})",
                hint=f"here all have the same one; merge in two steps, or choose one {key}",
            )
        value = next(iter(found.values()), self.shared.get(key, default))
        return float(value) if isinstance(default, float) and isinstance(value, int) else value

    def _everywhere(self, method: str, table: dict[str, Any]) -> None:
        """Let the merge hold for VAEs too, where it has weights for blocks."""
        if (
            weights := table.get("weights") or table.get("weight" if method != "nearswap" else "t")
        ) and method != "scale":
            table["blocks"] = {"vae": weights}
        elif method != "scale":
            first = "base" if "base" in table else "first checkpoint"
            self.draft.note(f"mergekit would merge the VAEs too; here the result has the {first}'s")

    def _left(self) -> None:
        """Note what of the file says nothing in the recipe."""
        known = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype"}
        given = set(self.shared).union(*(own for _, own in self.models))
        for key in sorted(set(map(str, self.config)) - known | given - self.used):
            if key in RUNS:
                self.draft.note(f"`{key}` concerns how mergekit runs, or language models, and no checkpoint")
            else:
                self.draft.note(f"`{key}` is not known, and left out")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
