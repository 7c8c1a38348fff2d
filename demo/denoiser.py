"""Training a base's U-Net and text encoder on cached latents.

Shapes in names: B pictures, C H W of scaled latents (4, 16, 16), L tokens (77), D width of the text (64), T timesteps.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo import attributes as words
from demo.attributes import Attributes, training_caption
from demo.bases import TEXT_WIDTH, TRAIN_STEPS, new_text_encoder, new_unet
from demo.geometry import BROW_CELLS, CELLS, EYE_CELLS, MOUTH_CELLS
from demo.progress import Clock, cosine_tail, device, generator, load_state, save_state, say
from demo.sampling import alphas_cumprod
from demo.tokenizer import END, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

SNR_CAP = 5.0  # γ of the min-SNR weight
EMA_DECAY = 0.998
EMA_EVERY = 2  # steps
# Eyes are 8 of 256 cells: with equal weights their colour stays at chance.
EYE_WEIGHT = 12.0
FEATURE_WEIGHT = 4.0  # brows and mouth
# The joint training would erode what the text warm-up taught, since few cells reward it.
ATTRIBUTE_LOSS_WEIGHT = 0.05

# What the text encoder must be able to say about a caption, and the words for each.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "expression": words.EXPRESSIONS,
    "person": words.PERSONS,
    "hair": words.HAIR_STYLES,
    "hair_colour": words.HAIR_COLOURS,
    "eye_colour": words.EYE_COLOURS,
    "background": words.BACKGROUNDS,
    "accessory": words.ACCESSORIES,
}
_CLAUSE_OF = {"eye_colour": "eyes", "background": "background"}
UNSAID = -100  # the label that cross_entropy ignores


@dataclass(frozen=True)
class Phase:
    """Steps of one batch size."""

    batch: int
    steps: int


@dataclass(frozen=True)
class Course:
    """How one base is trained."""

    style: str
    learning_rate: float
    phases: tuple[Phase, ...]
    flat_share: float  # of the run before the learning rate falls
    seed: int
    warm_up: int = 100  # steps


FLAT_COURSE = Course("flat", 1e-3, (Phase(8, 2600), Phase(16, 1500)), flat_share=0.55, seed=10)
INK_COURSE = Course("ink", 5e-4, (Phase(16, 430),), flat_share=0.4, seed=20, warm_up=30)


@dataclass
class Learner:
    """What is trained together: U-Net, text encoder and the heads that read attributes from the text."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    heads: nn.ModuleDict = field(default_factory=lambda: new_heads())

    def modules(self) -> dict[str, nn.Module]:
        """By name, as in a saved state."""
        return {"unet": self.unet, "text_encoder": self.text_encoder, "heads": self.heads}

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for module in self.modules().values() for parameter in module.parameters()]

    def to(self, target: torch.device) -> Learner:
        """Move everything to a device."""
        for module in self.modules().values():
            module.to(target)
        return self


def new_heads() -> nn.ModuleDict:
    """One linear reader for each question."""
    return nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(answers)) for name, answers in QUESTIONS.items()})


def new_learner(tokenizer: Tokenizer, seed: int) -> Learner:
    """Untrained."""
    torch.manual_seed(seed)
    return Learner(new_unet(), new_text_encoder(tokenizer))


def labels(shown: Sequence[Attributes], captions: Sequence[str]) -> dict[str, Tensor]:
    """For each question the answers' numbers (B,), or UNSAID where the caption does not tell."""

    def label(name: str, attributes: Attributes, caption: str) -> int:
        answer: str = getattr(attributes, name)
        if not caption:
            return UNSAID
        if name == "accessory":
            said = answer == "none" or words.ACCESSORY_CLAUSES[answer] in caption
            return QUESTIONS[name].index(answer) if said else QUESTIONS[name].index("none")
        if name in _CLAUSE_OF and f"{answer} {_CLAUSE_OF[name]}" not in caption:
            return UNSAID
        return QUESTIONS[name].index(answer)

    return {name: torch.tensor([label(name, a, c) for a, c in zip(shown, captions, strict=True)]) for name in QUESTIONS}


def attribute_loss(
    heads: nn.ModuleDict, text_BLD: Tensor, ids_BL: Tensor, end_id: int, answers: dict[str, Tensor]
) -> Tensor:
    """Mean cross-entropy of all questions, read at the end token or a place in the padding behind it.

    The ids seed the choice of the place, so that a resumed run reads where an uninterrupted one does.
    """
    ends_B = (ids_BL == end_id).int().argmax(dim=1)
    span_B = ids_BL.shape[1] - ends_B
    drawn_B = torch.rand(len(ids_BL), generator=torch.Generator().manual_seed(int(ids_BL.sum()))).to(ids_BL.device)
    read_BD = text_BLD[torch.arange(len(ids_BL)), ends_B + (drawn_B * span_B).long()]
    losses = []
    for name in QUESTIONS:
        answers_B = answers[name].to(ids_BL.device)
        total = functional.cross_entropy(heads[name](read_BD), answers_B, ignore_index=UNSAID, reduction="sum")
        losses.append(total / max(1, int((answers_B != UNSAID).sum())))
    return torch.stack(losses).mean()


def warm_up_text(learner: Learner, tokenizer: Tokenizer, *, steps: int, batch: int, seed: int) -> None:
    """Teach the text encoder to tell the attributes apart before the U-Net listens."""
    target = device()
    learner.to(target)
    rng = random.Random(seed)
    combinations = words.draw_combinations(seed, held_out=False)
    trained = [*learner.text_encoder.parameters(), *learner.heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * cosine_tail(step / steps, flat=0.5, floor=0.1)
        shown = [next(combinations) for _ in range(batch)]
        captions = [training_caption(a, "flat", rng) for a in shown]
        ids = torch.tensor(tokenizer.ids(captions), device=target)
        text = learner.text_encoder(ids).last_hidden_state
        loss = attribute_loss(learner.heads, text, ids, tokenizer.id_of(END), labels(shown, captions))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % 50 == 0:
            say(f"text step {step + 1}/{steps}  attribute loss {loss.item():.4f}")


def cell_weights() -> Tensor:
    """(16, 16): the weight of each latent cell in the loss, with mean 1."""
    weights = torch.ones(CELLS, CELLS)
    for boxes, weight in ((BROW_CELLS, FEATURE_WEIGHT), (MOUTH_CELLS, FEATURE_WEIGHT), (EYE_CELLS, EYE_WEIGHT)):
        for box in boxes:
            weights[box.top : box.bottom, box.left : box.right] = weight
    return weights / weights.mean()


@dataclass(frozen=True)
class Batch:
    """What one step sees."""

    latents: Tensor
    shown: list[Attributes]
    captions: list[str]
    noise: Tensor
    timesteps: Tensor


def batches(latents: Tensor, shown: Sequence[Attributes], course: Course, first: int) -> Iterator[Batch]:
    """One batch for each step from `first` to the course's end."""
    sizes = [phase.batch for phase in course.phases for _ in range(phase.steps)]
    for step in range(first, len(sizes)):
        rng = generator(course.seed, step)
        rows = torch.randint(len(latents), (sizes[step],), generator=rng).tolist()
        caption_rng = random.Random(course.seed * 1_000_003 + step)
        yield Batch(
            latents=latents[rows],
            shown=[shown[row] for row in rows],
            captions=[training_caption(shown[row], course.style, caption_rng) for row in rows],
            noise=torch.randn(len(rows), *latents.shape[1:], generator=rng),
            timesteps=torch.randint(TRAIN_STEPS, (len(rows),), generator=rng),
        )


def train_denoiser(
    learner: Learner, tokenizer: Tokenizer, data: tuple[Tensor, Sequence[Attributes]], course: Course, state_file: Path
) -> Iterator[tuple[int, Learner]]:
    """Train U-Net and text encoder together; yield the averaged weights now and then, and at last.

    The learner given is changed; what is yielded is a copy of its moving average, to draw with.
    """
    target = device()
    learner.to(target)
    latents, shown = data
    average = copy.deepcopy(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first, seconds = _resume(state_file, learner, average, optimizer)
    clock = Clock(seconds)
    total = sum(phase.steps for phase in course.phases)
    losses: list[float] = []
    weights_HW, alphas_T = cell_weights().to(target), alphas_cumprod().to(target)
    for step, batch in enumerate(batches(latents, shown, course, first), start=first):
        share = step / total
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / course.warm_up)
            group["lr"] = course.learning_rate * warm * cosine_tail(share, flat=course.flat_share, floor=0.02)
        denoising, attribute = _losses(learner, tokenizer, batch, weights_HW, alphas_T)
        optimizer.zero_grad()
        torch.autograd.backward(denoising + ATTRIBUTE_LOSS_WEIGHT * attribute)
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        if step % EMA_EVERY == 0:
            _follow(average, learner, min(EMA_DECAY, (1 + step) / (10 + step)))
        losses.append(denoising.item())
        last = step + 1 == total
        if (step + 1) % 100 == 0 or last:
            recent = sum(losses[-100:]) / len(losses[-100:])
            told = f"loss {recent:.4f}  attributes {attribute.item():.3f}"
            say(f"{course.style} step {step + 1}/{total}  {clock.seconds():.0f} s  {told}")
        if clock.time_to_save() or last:
            _save(state_file, learner, average, optimizer, step + 1, clock.seconds())
        if (step + 1) % 600 == 0 or last:
            yield step + 1, average
    if first == total:
        yield total, average


def _losses(
    learner: Learner, tokenizer: Tokenizer, batch: Batch, weights_HW: Tensor, alphas_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the min-SNR weighted error of the predicted noise, and the attribute loss of the text.

    The weight is min(SNR, 5) / SNR with SNR = ᾱ / (1 − ᾱ): Hang et al. 2023 (https://arxiv.org/abs/2303.09556), §3.4.
    """
    target = weights_HW.device
    ids_BL = torch.tensor(tokenizer.ids(batch.captions), device=target)
    text_BLD = learner.text_encoder(ids_BL).last_hidden_state
    latents_BCHW, noise_BCHW = batch.latents.to(target), batch.noise.to(target)
    timesteps_B = batch.timesteps.to(target)
    alphas_B = alphas_T[timesteps_B]
    alphas_B111 = alphas_B[:, None, None, None]
    noisy_BCHW = alphas_B111.sqrt() * latents_BCHW + (1 - alphas_B111).sqrt() * noise_BCHW
    error_BCHW = (learner.unet(noisy_BCHW, timesteps_B, text_BLD).sample - noise_BCHW).square() * weights_HW
    snr_B = alphas_B / (1 - alphas_B)
    denoising = (error_BCHW.mean(dim=(1, 2, 3)) * snr_B.clamp(max=SNR_CAP) / snr_B).mean()
    answers = labels(batch.shown, batch.captions)
    return denoising, attribute_loss(learner.heads, text_BLD, ids_BL, tokenizer.id_of(END), answers)


@torch.no_grad()
def _follow(average: Learner, learner: Learner, decay: float) -> None:
    for kept, new in zip(average.parameters(), learner.parameters(), strict=True):
        kept.lerp_(new, 1 - decay**EMA_EVERY)


def _save(
    path: Path, learner: Learner, average: Learner, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    parts = {name: module.state_dict() for name, module in learner.modules().items()}
    averages = {name: module.state_dict() for name, module in average.modules().items()}
    state = {"learner": parts, "average": averages, "optimizer": optimizer.state_dict()}
    save_state(path, state | {"step": step, "seconds": seconds})


def _resume(path: Path, learner: Learner, average: Learner, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a saved state if there is one; the steps done and the CPU seconds they took."""
    state = load_state(path)
    if state is None:
        return 0, 0.0
    for held, saved in ((learner, state["learner"]), (average, state["average"])):
        for name, module in held.modules().items():
            module.load_state_dict(saved[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


@torch.no_grad()
def eye_alarm(
    learner: Learner, tokenizer: Tokenizer, data: tuple[Tensor, Sequence[Attributes]], style: str, timestep: int = 600
) -> tuple[float, float]:
    """Mean squared error of the noise in the eye cells with the right and with a wrong eye colour in the caption.

    If the two are alike, the base does not listen to eye colours: a cheap sign, long before pictures show it.
    """
    latents, shown = data[0][:64], list(data[1][:64])
    target = next(learner.unet.parameters()).device
    signal = alphas_cumprod()[timestep]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).to(target)
    errors = []
    for turn in (0, 1):
        captions = []
        for attributes in shown:
            index = (words.EYE_COLOURS.index(attributes.eye_colour) + turn) % len(words.EYE_COLOURS)
            said = words.caption(attributes, style)
            captions.append(said.replace(f"{attributes.eye_colour} eyes", f"{words.EYE_COLOURS[index]} eyes"))
        text = learner.text_encoder(torch.tensor(tokenizer.ids(captions), device=target)).last_hidden_state
        time = torch.full((len(latents),), timestep, device=target)
        error = (learner.unet(noisy, time, text).sample.cpu() - noise).square()
        cells = [error[:, :, box.top : box.bottom, box.left : box.right].mean().item() for box in EYE_CELLS]
        errors.append(sum(cells) / len(cells))
    return errors[0], errors[1]
