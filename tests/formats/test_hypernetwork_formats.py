"""Hypernetworks' files: ours, and A1111's pickles, of all ages and of nobody's making."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.formats.hypernetwork import sequence, stated
from sdforge.formats.own import own_statement
from sdforge.import_step import import_file
from sdforge.run.import_step import read_pickle
from tests.families.workbench import Taken, keep, take
from tests.formats.conftest import export
from tests.run.hypernetworks import DEEP, LINEAR, SWISH, kept, random_nets

KINDS = [
    LINEAR,
    SWISH,
    stated(DEEP, activation="relu", layer_norm=True),
    stated([1.0, 2.0, 1.0], activation="elu", activate_output=True),
]


def written(base: Taken, one: Taken, work: Path, form: str = "hypernetworks") -> Path:
    export(work, base, [form], {"title": "mood"}, hypernetworks=[one.given()])
    (file,) = (work / "hypernetworks").iterdir()
    return file


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A pickle's tensors and facts, as they are converted."""
    tensors, metadata = read_pickle(path)
    return tensors, own_statement(metadata)[1]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("facts", KINDS)
def test_our_file_is_read_as_what_was_written(facts: dict[str, Any], toy: Taken, tmp_path: Path) -> None:
    one = kept(tmp_path / "h", facts)
    again = take(written(toy, one, tmp_path / "out"))
    assert (again.artifact.kind, again.artifact.family, again.artifact.facts) == ("hypernetwork", "sd15", facts)
    assert again.artifact.digest == one.artifact.digest


@pytest.mark.parametrize("facts", [fact for fact in KINDS if fact.get("attention") != "cross"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a1111s_file_is_read_as_what_was_written(
    facts: dict[str, Any], dtype: torch.dtype, toy: Taken, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_nets(facts).items()}
    one = keep(tmp_path / "h", {"hypernetwork": tensors}, kind="hypernetwork", facts=facts)
    file = written(toy, one, tmp_path / "out", "hypernetworks-pt")
    assert file.suffix == ".pt"
    again, said = read(file)
    assert said == facts
    assert same(again, tensors)
    assert written(toy, one, tmp_path / "twice", "hypernetworks-pt").read_bytes() == file.read_bytes()


def theirs(facts: dict[str, Any], *, dropped: bool = False) -> Any:
    """Return the sequence of modules of which A1111 makes a network 16 wide, in its order."""
    kinds = {"relu": torch.nn.ReLU, "swish": torch.nn.Hardswish, "elu": torch.nn.ELU}
    structure, modules = facts["structure"], []
    for i in range(len(structure) - 1):
        modules.append(torch.nn.Linear(int(16 * structure[i]), int(16 * structure[i + 1])))
        last = i == len(structure) - 2
        if "activation" in facts and (not last or facts.get("activate_output")):
            modules.append(kinds[facts["activation"]]())
        if facts.get("layer_norm"):
            modules.append(torch.nn.LayerNorm(int(16 * structure[i + 1])))
        if dropped and not last:
            modules.append(torch.nn.Dropout(0.3))
    return torch.nn.Sequential(*modules)


@pytest.mark.parametrize("facts", KINDS)
def test_what_a1111_would_build_takes_our_file_strictly(facts: dict[str, Any], toy: Taken, tmp_path: Path) -> None:
    one = kept(tmp_path / "h", facts)
    whole = torch.load(written(toy, one, tmp_path / "out", "hypernetworks-pt"), weights_only=True)
    assert {key for key in whole if isinstance(key, int)} == {8, 16}
    assert whole["layer_structure"] == facts["structure"]
    assert "name" not in whole  # else A1111 takes it for the file of that name, which may be another one
    assert whole["use_dropout"] is False
    assert whole["activate_output"] == facts.get("activate_output", False)
    network = theirs(facts)
    network.load_state_dict({name.removeprefix("linear."): t for name, t in whole[16][0].items()}, strict=True)
    expected = {f"linear.{name}" for name in network.state_dict()}
    assert {f"linear.{i}.{part}" for i in sequence(facts).values() for part in ("weight", "bias")} == expected


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("facts", KINDS)
def test_layers_are_found_behind_activations_norms_and_dropout(
    facts: dict[str, Any], dropped: bool, tmp_path: Path
) -> None:
    networks = [theirs(facts, dropped=dropped) for _ in "kv"]
    states = tuple({f"linear.{k}": v for k, v in network.state_dict().items()} for network in networks)
    stated_ = {
        "layer_structure": facts["structure"],
        "activation_func": facts.get("activation"),
        "is_layer_norm": facts.get("layer_norm", False),
        "activate_output": facts.get("activate_output", False),
        "use_dropout": dropped,
    }
    torch.save({16: states, "step": 5, "optional_info": "a text", **stated_}, tmp_path / "x.pt")
    tensors, said = read(tmp_path / "x.pt")
    assert said == {name: value for name, value in facts.items() if name != "attention"}
    matrices = [module.weight for module in networks[1] if isinstance(module, torch.nn.Linear)]
    assert all(torch.equal(tensors[f"16.v.linear.{i}.weight"], matrix) for i, matrix in enumerate(matrices))


def test_ten_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    facts = stated([1.0] * 12)
    torch.save({16: tuple(_state(theirs(facts)) for _ in "kv"), "layer_structure": [1] * 12}, tmp_path / "x.pt")
    tensors, said = read(tmp_path / "x.pt")
    assert said == facts
    whole = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(tensors["16.k.linear.10.weight"], whole[16][0]["linear.10.weight"])


def _state(network: Any) -> dict[str, Tensor]:
    return {f"linear.{name}": tensor for name, tensor in network.state_dict().items()}


def test_the_first_files_named_their_layers_otherwise_and_said_nothing_else(tmp_path: Path) -> None:
    pair = [
        {f"linear{i + 1}.{part}": tensor for i in range(2) for part, tensor in network[i].state_dict().items()}
        for network in (theirs(LINEAR), theirs(LINEAR))
    ]
    torch.save({16: tuple(pair), "step": 100, "name": "old"}, tmp_path / "old.pt")
    tensors, said = read(tmp_path / "old.pt")
    assert said == {"structure": [1.0, 2.0, 1.0]}
    assert torch.equal(tensors["16.v.linear.1.bias"], pair[1]["linear2.bias"])


def test_a_file_that_does_not_say_so_activates_its_output(tmp_path: Path) -> None:
    states = tuple(_state(theirs(stated([1.0, 2.0, 1.0], activation="relu"))) for _ in "kv")
    torch.save({16: states, "activation_func": "relu"}, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt")[1] == {"structure": [1.0, 2.0, 1.0], "activation": "relu", "activate_output": True}
    torch.save({16: states, "activation_func": "relu", "activate_output": False}, tmp_path / "y.pt")
    assert read(tmp_path / "y.pt")[1] == {"structure": [1.0, 2.0, 1.0], "activation": "relu"}


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    torch.save({16: Harm()}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="no pickle of mere numbers"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation_func": "mish"}, "has the activation 'mish'"),
        ({"layer_structure": [1, 2]}, "does not begin and end with 1"),
        ({"layer_structure": [1, 3, 1]}, "no 16.k.linear.0.weight of shape"),
        ({"is_layer_norm": True}, "no 16.k.norm.0.weight"),
        ({16: ({},)}, "no pair of networks"),
        ({16: ({"a.weight": torch.zeros(1)}, {})}, "'a.weight', which is no part"),
        ({16: ({"linear.0.weight": torch.zeros(1, 1)}, {})}, "a layer without its bias"),
        ({16: ()}, "no pair of networks"),
    ],
)
def test_a_pickle_that_is_no_hypernetwork_is_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    whole = {16: tuple(_state(theirs(LINEAR)) for _ in "kv")}
    torch.save(whole | change, tmp_path / "x.pt")
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "x.pt")
    assert sentence in caught.value.message


def test_a_pickle_becomes_a_file_that_can_be_a_source(tmp_path: Path) -> None:
    states = tuple(_state(theirs(SWISH)) for _ in "kv")
    torch.save({16: states, "layer_structure": DEEP, "activation_func": "swish"}, tmp_path / "x.pt")
    import_file(tmp_path / "x.pt", tmp_path / "x.safetensors", "pickle")
    taken = take(tmp_path / "x.safetensors")
    assert taken.artifact.facts == {"structure": DEEP, "activation": "swish", "activate_output": True}
    assert same(taken.tensors("hypernetwork"), read(tmp_path / "x.pt")[0])


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "does not say which structure"),
        ({"sdforge.facts": "{"}, "does not say which structure"),
        ({"sdforge.facts": '{"structure":[1,2]}'}, "does not say which structure"),
        ({"sdforge.facts": '{"structure":[1,2,1],"activation":"mish"}'}, "activation = 'mish'"),
        ({"sdforge.facts": '{"structure":[1,2,1],"more":1}'}, "more = 1"),
        ({"sdforge.facts": '{"structure":[1,1]}'}, "of shape"),
    ],
)
def test_a_file_that_does_not_say_what_it_computes_is_refused(
    metadata: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    save_file(random_nets(LINEAR), tmp_path / "x.safetensors", {"sdforge.kind": "hypernetwork", **metadata})
    with pytest.raises(UsageError) as caught:
        take(tmp_path / "x.safetensors")
    assert sentence in caught.value.message
    assert len(load_file(tmp_path / "x.safetensors")) == 16
