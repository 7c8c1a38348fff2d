"""Linear hypernetworks in weights.

With MLP(c) = A c + b and strength m a context becomes h(c) = c + m (A c + b):
W_k becomes W_k (I + m A_k); what b_k adds is the same for all keys of a query, so softmax takes it out again.
W_v becomes W_v (I + m A_v), and since attention's weights sum to 1, W_o W_v m b_v goes into the bias behind W_o.
Several are applied one after the other, h₂(h₁(c)), in an order that their contents decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdforge.artifact import Tensor
from sdforge.edits.bake.update import Place, Strengths, UNetStrength, Update
from sdforge.errors import UsageError
from sdforge.families import Family
from sdforge.formats.hypernetwork import SIDES, check_shapes, fact, layers_of, nonlinear, widths_of
from sdforge.formula import Input

if TYPE_CHECKING:
    import torch

WAY_OUT = "[preset] sidecars applies it while pictures are drawn"


def updates(given: Input, family: Family, weights: dict[Place, Tensor]) -> dict[Place, list[Update]]:
    """Return the update of every weight that is baked at a strength other than 0. Every width must find its layers."""
    facts = given.artifact.facts
    if reason := nonlinear(facts):
        raise UsageError(f"a hypernetwork with {reason} is no matrix, and only those become weights", hint=WAY_OUT)
    strengths = Strengths(given.use, family, UNetStrength)
    nets, after = given.tensors("hypernetwork"), given.artifact.components["hypernetwork"].identity
    check_shapes("the hypernetwork", {name: tensor.shape for name, tensor in nets.items()}, facts)
    found: dict[Place, list[Update]] = {}
    widths = set()
    for place in _contexts(family, str(fact(facts, "attention"))):
        component, name = place
        if place not in weights or f"{weights[place].shape[1]}.k.linear.0.weight" not in nets:
            continue
        width, side = weights[place].shape[1], name.removesuffix(".weight")[-1]
        widths.add(width)
        if not (strength := strengths.at(*place)):
            continue
        layers = [f"{width}.{side}.linear.{i}" for i in range(layers_of(facts))]
        parameters: dict[str, Any] = {"chain": [[strength, len(layers)]]}
        matrices = tuple(nets[f"{layer}.weight"] for layer in layers)
        found[place] = [Update("hypernetwork", parameters | {"of": "matrix"}, matrices, after=after)]
        if side == "v":
            output = name.removesuffix("to_v.weight") + "to_out.0."
            around = weights[place], weights[component, f"{output}weight"]
            offsets = tuple(nets[f"{layer}.bias"] for layer in layers)
            parts = (*around, *matrices, *offsets)
            bias = Update("hypernetwork", parameters | {"of": "offset"}, parts, after=after)
            found[component, f"{output}bias"] = [bias]
    if lost := sorted(set(widths_of(list(nets))) - widths):
        if not any(component == "unet" for component, _ in weights):
            raise UsageError("the checkpoint has no unet, which a hypernetwork changes")
        raise UsageError(
            f"the hypernetwork is for contexts {lost[0]} wide, which no attention of the checkpoint has",
            hint="it was made for a checkpoint of other widths",
        )
    return found


def _contexts(family: Family, attention: str) -> list[Place]:
    """Return the layers that make keys and values: of the conditioning (`cross`), or of anything."""
    if attention == "cross":
        return [("unet", name) for name in family.cross_attention]
    ends = tuple(f".to_{side}.weight" for side in SIDES)
    return [("unet", n.canonical) for n in family.names() if n.component == "unet" and n.canonical.endswith(ends)]


def joined(updates: list[Update]) -> list[Update]:
    """Return the updates of one weight as one: maps that follow each other do not add up."""
    first = updates[0]
    around = first.tensors[:2] if first.parameters["of"] == "offset" else ()
    chain = [link for update in updates for link in update.parameters["chain"]]
    tensors = [tensor for update in updates for tensor in update.tensors[len(around) :]]
    return [Update("hypernetwork", {"of": first.parameters["of"], "chain": chain}, (*around, *tensors))]


def delta(
    weight: torch.Tensor, parameters: dict[str, Any], tensors: list[torch.Tensor], *, exact: bool
) -> torch.Tensor:
    """Return W (∏ (I + m A) − I) for a matrix, W_o W_v c for the bias behind it, c the offset of the whole chain."""
    if parameters["of"] == "matrix":
        return _through(weight, parameters["chain"], tensors, exact=exact)
    (value, output), rest = tensors[:2], tensors[2:]
    offset = _offset(parameters["chain"], rest, exact=exact)
    return _times(output, _times(value, offset, exact=exact), exact=exact)[:, 0]


def _through(weight: torch.Tensor, chain: list[list[Any]], tensors: list[torch.Tensor], *, exact: bool) -> torch.Tensor:
    """Return W ((I + m_n A_n) … (I + m_1 A_1)) − W; tensors: the layers of A_1, of A_2, …, each from first to last."""
    change, rest = weight.new_zeros(weight.shape), list(tensors)
    for strength, count in reversed(chain):
        layers, rest = rest[-count:], rest[:-count]
        moved = weight + change
        for layer in reversed(layers):
            moved = _times(moved, layer, exact=exact)
        change = change + float(strength) * moved
    return change


def _offset(chain: list[list[Any]], tensors: list[torch.Tensor], *, exact: bool) -> torch.Tensor:
    """Return c (width, 1) of h(x) = … x + c for the whole chain; tensors: matrices, then biases, of every link."""
    total, rest = None, list(tensors)
    for strength, count in chain:
        matrices, biases, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
        # what the network says of the offset so far, which starts at nothing
        value = total
        for matrix, bias in zip(matrices, biases, strict=True):
            column = bias.double()[:, None]
            value = column if value is None else _times(matrix, value, exact=exact) + column
        assert value is not None
        total = float(strength) * value if total is None else total + float(strength) * value
    assert total is not None
    return total


def _times(left: torch.Tensor, right: torch.Tensor, *, exact: bool) -> torch.Tensor:
    from sdforge.exact import product

    return product(left, right, sliced=exact)
