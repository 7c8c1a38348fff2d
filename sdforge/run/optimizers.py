"""Optimisers of the shared loop. Those beside AdamW are extras: a package more, and another way through the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from sdforge.errors import UsageError
from sdforge.run.seeds import generator

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
    if settings.optimizer == "adamw" and any(p.dtype == torch.bfloat16 for row in rows for p in row["params"]):
        return RoundedAdamW(rows, int(settings.seed or 0))
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


@final
class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights: an update is made in fp32 and rounded by chance, so that small ones are not lost.

    A weight that stands between two values of bf16 becomes the nearer one more often, and stays in the mean where it
    is (Gupta et al. 2015, https://arxiv.org/abs/1502.02551). Moments are fp32.
    """

    def __init__(self, rows: list[dict[str, Any]], seed: int) -> None:
        super().__init__(rows, {"lr": 0.0, "weight_decay": 0.0, "updates": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 -- torch's signature
        for number, group in enumerate(self.param_groups):
            group["updates"] += 1
            draw: torch.Generator | None = None
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if draw is None:  # of the step alone, so that a training that goes on draws the same
                    draw = generator(self.seed, f"rounding {number}", group["updates"], parameter.device)
                self._update(parameter, group, draw)

    def _update(self, parameter: Tensor, group: dict[str, Any], draw: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        assert parameter.grad is not None
        gradient, (beta1, beta2), t = parameter.grad.float(), BETAS, group["updates"]
        m = state["exp_avg"].lerp_(gradient, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(m, (v / (1 - beta2**t)).sqrt_().add_(EPS), value=-group["lr"] / (1 - beta1**t))
        parameter.copy_(rounded_by_chance(value, draw) if parameter.dtype == torch.bfloat16 else value)


def rounded_by_chance(value: Tensor, draw: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that keep the mean: a random tail is added and cut off."""
    bits = value.contiguous().view(torch.int32)
    tail = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draw)
    return (bits + tail).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


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

    Its decay rises to `decay` by (1 + step) / (10 + step), as in diffusers' EMAModel; but that takes the weights of the
    first update as they are, where a tenth is left here of what they began with.
    """

    def __init__(self, decay: float, parameters: dict[str, nn.Parameter]) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in; step: the number of the update that was just made, from 0."""
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
