"""Networks built once a process: what a load fills is a copy of an empty one, at a tenth of a constructor's cost.

diffusers takes 70 ms to build a U-Net and a VAE, however small their modules are, and the suite loads a thousand.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

HOLDERS = (dict, OrderedDict, list, set)  # each module has its own; what else it holds is never changed in place


class Shell:
    """A class of networks whose constructor is called once for each configuration."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.built: dict[str, nn.Module] = {}

    def __call__(self, **config: Any) -> nn.Module:
        """Return a network of its own, as `kind(**config)` would; its parameters are the constructor's, on `meta`."""
        name = repr(sorted(config.items()))
        if name not in self.built:
            self.built[name] = self.kind(**config)
        return copied(self.built[name], {})


def copied(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """Copy the modules and all that they hold, but neither parameters nor buffers: a load replaces those.

    seen: what has been copied, by its id; a module that stands at two places does so in the copy too.
    """
    if found := seen.get(id(module)):
        return found
    copy = seen[id(module)] = module.__class__.__new__(module.__class__)
    own = {key: value.copy() if type(value) in HOLDERS else value for key, value in vars(module).items()}
    own["_modules"] = {name: inner and copied(inner, seen) for name, inner in module._modules.items()}
    vars(copy).update(own)
    return copy


def install() -> None:
    """Let the loaders of all families build from shells."""
    from sdforge.families import load

    for name in ("UNet2DConditionModel", "AutoencoderKL"):
        setattr(load, name, Shell(getattr(load, name)))
