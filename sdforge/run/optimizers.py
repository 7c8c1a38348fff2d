"""Optimisers of the shared loop. Those beside AdamW are extras: a package more, and another way through the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdforge.errors import UsageError

if TYPE_CHECKING:
    from sdforge.run.adapter import Group
    from sdforge.trainings import Training

BETAS, EPS = (0.9, 0.999), 1e-8
EXTRAS = {"adamw8bit": ("bitsandbytes", "8bit"), "schedule_free": ("schedulefree", "schedule-free")}


def make_optimizer(settings: Training, groups: list[Group], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name. Raises UsageError if its package or device is not there.

    adamw: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101; adamw8bit: its moments in 8 bits, in blocks
    (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861), on CUDA; schedule_free: Defazio et al. 2024,
    https://arxiv.org/abs/2405.15682.
    """
    rows: list[dict[str, Any]] = [
        {"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(rows, betas=BETAS, eps=EPS, fused=True)
    if settings.optimizer == "adamw8bit" and device.type != "cuda":
        raise UsageError('optimizer = "adamw8bit" runs on CUDA devices only', hint='"adamw" runs everywhere')
    package, extra = EXTRAS[settings.optimizer]
    try:
        module = __import__(package)
    except ImportError:
        raise UsageError(
            f'optimizer = "{settings.optimizer}" needs the package {package}', hint=f"pip install 'sdforge[{extra}]'"
        ) from None
    if settings.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = module.optim.AdamW8bit(rows, betas=BETAS, eps=EPS)
    else:
        made = module.AdamWScheduleFree(rows, betas=BETAS, eps=EPS)
    return made


def set_training(optimizer: torch.optim.Optimizer, *, on: bool) -> None:
    """Schedule-free weights are an average when they are looked at, and another point when they are trained."""
    change = getattr(optimizer, "train" if on else "eval", None)
    if change is not None:
        change()


def progress_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers that an optimiser keeps for each group beside its tensors; the learning rate is not one."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float | bool) and key != "lr"}
        for group in optimizer.param_groups
    ]


class Average:
    """An exponential moving average of parameters (EMA), which is what is saved.

    Its decay rises to `decay` by (1 + step) / (10 + step), as diffusers' EMAModel has it.
    """

    def __init__(self, decay: float, parameters: dict[str, nn.Parameter]) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Let parameters and average change places; twice is nothing."""
        for name, value in self.values.items():
            kept: Tensor = self.parameters[name].detach().clone()
            self.parameters[name].copy_(value)
            value.copy_(kept)
