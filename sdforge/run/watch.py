"""Watching a training without touching it: validation loss, samples on the way, metrics.

None of it draws a number that the training draws, and none of it decides what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.run.adapter import Batch
from sdforge.run.seeds import generator

if TYPE_CHECKING:
    from sdforge.run.diffusion import Diffusion
    from sdforge.run.images import Latents, Picture

TIMESTEPS = (100, 300, 500, 800)  # at which held-out pictures are judged
POINTS = 10  # validations of a training, and one before it
SAMPLE_STEPS, SAMPLE_GUIDANCE = 12, 5.0


class Validation:
    """The loss on held-out pictures, always at the same timesteps and noises: a number that can be compared.

    It is the mean square without weights of min-SNR or masks.
    """

    def __init__(self, pictures: list[Picture], latents: Latents, diffusion: Diffusion, total: int) -> None:
        self.pictures, self.latents, self.diffusion = pictures, latents, diffusion
        self.every = max(1, total // POINTS)
        self.found: list[list[float]] = []  # [step, loss]

    def due(self, step: int, total: int) -> bool:
        """Say whether a value is wanted after `step` steps and is not there yet."""
        wanted = step % self.every == 0 or step == total
        return bool(self.pictures) and wanted and not any(row[0] == step for row in self.found)

    @torch.no_grad()
    def look(self, step: int, predict: Callable[[Batch], Tensor]) -> float:
        """Judge the training as it is after `step` steps; return the loss."""
        total, schedule, device = 0.0, self.diffusion.schedule, self.diffusion.device
        for picture in self.pictures:
            latents = self.latents.of(picture, flip=False).to(device).expand(len(TIMESTEPS), -1, -1, -1)
            draw = generator(0, f"validation {picture.sha256}")
            noise = torch.randn(latents.shape, generator=draw).to(device)
            timesteps = torch.tensor(TIMESTEPS, device=device)
            batch = Batch(
                schedule.add_noise(latents, noise, timesteps),
                schedule.target(latents, noise, timesteps),
                timesteps,
                [picture.caption] * len(TIMESTEPS),
                pictures=[picture] * len(TIMESTEPS),
            )
            total += float((predict(batch) - batch.target_BCHW).square().mean())
        loss = total / len(self.pictures)
        self.found.append([step, loss])
        return loss

    @property
    def recommended(self) -> int | None:
        """The step with the least loss; None where none has less than there was before the first."""
        best = min(self.found, key=lambda row: row[1], default=[0])[0]
        return int(best) or None


class Samples:
    """Pictures drawn while a training runs: same prompts, same seeds, every so many steps."""

    def __init__(self, wish: dict[str, Any], captions: list[str], folder: Path | None) -> None:
        self.every = int(wish.get("steps", 0)) if folder else 0
        self.prompts = list(wish.get("prompts") or sorted(set(captions))[:2])
        self.seed, self.folder = int(wish.get("seed", 1)), folder

    def due(self, step: int, total: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == total)

    def draw(self, step: int, diffusion: Diffusion) -> None:
        """Draw every prompt with the training as it is after `step` steps."""
        from sdforge.edits.previews.draw import save_png
        from sdforge.run.sample import Wish, sample

        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        wishes = [
            Wish(prompt, "", self.seed, SAMPLE_STEPS, SAMPLE_GUIDANCE, diffusion.resolution) for prompt in self.prompts
        ]
        for i, (wish, pixels_CHW) in enumerate(zip(wishes, sample(diffusion, wishes), strict=True)):
            save_png(self.folder / f"{step}-{i + 1}.png", pixels_CHW, wish)

    def drawn(self) -> list[list[Any]]:
        """Return [step, prompt, path] of all pictures, also of those that were drawn before a stop."""
        rows = []
        for path in self.folder.glob("*-*.png") if self.folder and self.folder.is_dir() else ():
            step, _, number = path.stem.partition("-")
            if step.isdigit() and number.isdigit() and int(number) <= len(self.prompts):
                rows.append([int(step), self.prompts[int(number) - 1], str(path)])
        return sorted(rows)


class Metrics:
    """Every step as a line of JSON, and, where it is asked for, as TensorBoard's events."""

    def __init__(self, path: Path | None, board: str, name: str) -> None:
        self.file: TextIO | None = None
        self.writer: Any = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
        if board:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError(
                    "[run] tensorboard needs the package tensorboard", hint="pip install 'sdforge[tensorboard]'"
                ) from None
            self.writer = SummaryWriter(str(Path(board) / name))

    def note(self, step: int, **values: float) -> None:
        """Note values after `step` steps."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Let others read what has been noted."""
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()
