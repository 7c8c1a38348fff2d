"""What a whole run of the tests loads weights into is what the constructors of diffusers make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.families.workbench import UNET, VAE
from tests.shells import HOLDERS, Shell

UNETS = pytest.param(UNet2DConditionModel, UNET, id="U-Net")
VAES = pytest.param(AutoencoderKL, VAE, id="VAE")


def empty(kind: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return kind(**config)


def filled(network: nn.Module) -> Any:
    """Give a network weights, in place of those on `meta`."""
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.rand(t.shape, generator=draw) - 0.5 for name, t in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network.eval()


def own(network: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what no two networks may share: their modules and the containers in them."""
    for name, module in network.named_modules():
        yield name, module
        yield from ((f"{name}.{key}", value) for key, value in vars(module).items() if type(value) in HOLDERS)


@pytest.mark.parametrize(("kind", "config"), [UNETS, VAES])
def test_a_copy_is_what_the_constructor_makes(kind: Any, config: dict[str, Any]) -> None:
    new, copy = empty(kind, config), empty(Shell(kind), config)
    assert type(copy) is kind
    assert repr(copy) == repr(new)
    assert copy.config == new.config
    assert [*map(str, vars(copy))] == [*map(str, vars(new))]
    for find in ("named_parameters", "named_buffers"):
        made, wanted = ({name: (t.shape, t.dtype, t.is_meta) for name, t in getattr(n, find)()} for n in (copy, new))
        assert made == wanted
    seen = drawn(filled(copy))
    assert seen.isfinite().all()
    assert seen.equal(drawn(filled(new)))


@torch.no_grad()
def drawn(network: Any) -> Tensor:
    if isinstance(network, AutoencoderKL):
        return network(torch.ones(1, 3, 64, 64)).sample  # type: ignore[no-any-return]
    return network(torch.ones(1, 4, 8, 8), 7, torch.ones(1, 2, 16)).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "config"), [UNETS, VAES])
def test_copies_share_nothing_that_changes(kind: Any, config: dict[str, Any]) -> None:
    shell = Shell(kind)
    one, other = empty(shell, config), empty(shell, config)
    mine = {id(value) for _, value in own(one)}
    assert [name for name, value in own(other) if id(value) in mine] == []
    assert len([*one.modules()]) == len({id(module) for module in one.modules()})


def test_what_is_done_to_a_copy_leaves_the_next_as_it_was() -> None:
    shell = Shell(UNet2DConditionModel)
    used = filled(empty(shell, UNET))
    used.enable_gradient_checkpointing()
    used.register_forward_hook(lambda *_: None)
    used.train().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), used)
    new, next_ = empty(UNet2DConditionModel, UNET), empty(shell, UNET)
    assert repr(next_) == repr(new) != repr(used)
    assert next_.is_gradient_checkpointing is False
    assert next_._forward_hooks == {}
    assert all(p.requires_grad and p.is_meta for p in next_.parameters())
    assert all(module.training == twin.training for module, twin in zip(next_.modules(), new.modules(), strict=True))


def test_another_configuration_is_another_network() -> None:
    shell = Shell(AutoencoderKL)
    small, large = empty(shell, VAE), empty(shell, VAE | {"block_out_channels": (8, 8, 8, 8)})
    assert repr(small) != repr(large)
    assert repr(empty(shell, VAE)) == repr(small)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.last = nn.SiLU()


def test_a_module_that_stands_at_two_places_does_so_in_a_copy() -> None:
    copy: Any = Shell(Twice)()
    assert copy.first is copy.last
