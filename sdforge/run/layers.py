"""Updates beside frozen layers: in which places kohya's scripts put them, and what trainings of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdforge.formats.lora import alpha_fact, canonical_shape
from sdforge.order import Order
from sdforge.run.adapter import Adapter, Batch, Group, Learned
from sdforge.run.diffusion import Conditioning, Diffusion
from sdforge.run.images import Picture
from sdforge.run.seeds import generator

if TYPE_CHECKING:
    from sdforge.trainings import Updates


class Places(NamedTuple):
    """Layers of one network that get updates of one rank: canonical module → path in the network."""

    network: nn.Module
    paths: dict[str, str]
    rank: int
    alpha: float


def chosen_places(settings: Updates, diffusion: Diffusion) -> list[Places]:
    """Return the layers that are trained."""
    networks = {"unet": diffusion.unet, **diffusion.text_encoders}
    return [
        _places(component, networks[component], layers, rank, alpha)
        for component, layers, rank, alpha in settings.layers(diffusion.family)
    ]


def _places(component: str, network: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> Places:
    prefix = component if component == "unet" else f"{component}.text_model"
    paths = {
        f"{prefix}.{path.removeprefix('text_model.')}": path
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and path.endswith(tuple(f".{target}" for target in targets))
    }
    return Places(network, paths, rank, alpha)


class LayerAdapter(Adapter, ABC):
    """A training of updates beside layers: they can be switched off, so the base can be asked at every step."""

    def __init__(self, settings: Updates, diffusion: Diffusion) -> None:
        self.settings, self.diffusion = settings, diffusion
        self.text_is_frozen = not settings.text_encoder
        self.static = not settings.preserve  # it asks about the captions that name the trigger, which are more or fewer
        self._classes: dict[str, Conditioning] = {}  # what captions with the class's word say

    def prepare(self, order: Order, pictures: list[Picture]) -> None:  # noqa: ARG002 -- it reads captions alone
        """Encode what captions say with the class's word, as long as the text encoders are there."""
        trigger, word = self.settings.trigger, self.settings.preserve
        if not (word and trigger and self.text_is_frozen) or self.settings.shuffle:
            return
        with torch.no_grad():
            for caption in sorted({picture.caption for picture in pictures if trigger in picture.caption}):
                self._class([caption.replace(trigger, word)])

    @abstractmethod
    def switch(self, *, on: bool) -> None:
        """Let the updates take part, or not."""

    @contextmanager
    def _base(self) -> Iterator[None]:
        self.switch(on=False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.switch(on=True)

    def also(self, batch: Batch) -> Tensor | None:
        """Differential output preservation: the class is predicted as the base predicts it.

        Where a caption names the trigger, the class's word is put in its place, and on the same noisy latents the
        prediction must be what it is without the updates. A mean over the batch's pictures.
        Source: ai-toolkit's differential output preservation, https://github.com/ostris/ai-toolkit
        """
        word, trigger = self.settings.preserve, self.settings.trigger
        rows = [i for i, caption in enumerate(batch.captions) if trigger and trigger in caption]
        if not word or not rows:
            return None
        captions = [batch.captions[i].replace(trigger, word) for i in rows]
        noisy, target, timesteps = batch.noisy_BCHW[rows], batch.target_BCHW[rows], batch.timesteps_B[rows]
        asked = Batch(noisy, target, timesteps, captions, pictures=[batch.pictures[i] for i in rows])
        with self._base():
            text = self.diffusion.sized(self._class(captions), asked.framings)
            expected_BCHW = self.predict(asked, text)
        if not self.text_is_frozen:
            text = self.diffusion.sized(self.diffusion.encode_text(captions), asked.framings)
        square_BCHW = (self.predict(asked, text) - expected_BCHW).square()
        return self.settings.preserve_weight * square_BCHW.mean((1, 2, 3)).sum() / len(batch.captions)

    def _class(self, captions: list[str]) -> Conditioning:
        """Return what captions say to the base, encoded once each; shuffled ones hardly come again."""
        found = []
        for caption in captions:
            said = self._classes.get(caption) or self.diffusion.encode_text([caption]).to(torch.device("cpu"))
            if not self.settings.shuffle:
                self._classes[caption] = said
            found.append(said)
        return Conditioning.stack(found).to(self.diffusion.device)

    def _groups(self, parameters: dict[str, nn.Parameter]) -> list[Group]:
        """Return the parameters (`component.….factor`) in groups: the U-Net's, the text encoders'."""
        groups = []
        for part, rate in (("unet", self.settings.learning_rate), ("text", self.settings.text_learning_rate)):
            own = {name: parameter for name, parameter in parameters.items() if name.startswith(part)}
            if own:
                groups.append(Group(own, rate, self.settings.weight_decay))
        return groups


class Beside(nn.Module, ABC):
    """A frozen layer with an update beside it: y = W·x + b + ΔW·x. Its parameters have the factors' canonical names.

    scale: of the update (alpha / rank); rank: 0 where no factor has one.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, alpha: float) -> None:
        super().__init__()
        self.layer, self.alpha, self.on = layer, alpha, True
        self.rank = 0

    @abstractmethod
    def product(self) -> Tensor:
        """Return what the factors say of the weight, before it is scaled, in the weight's shape."""

    def update(self) -> Tensor:
        """Return ΔW."""
        return self.product() * (self.alpha / self.rank if self.rank else 1.0)

    def factors(self) -> dict[str, nn.Parameter]:
        """Return the factors under their canonical names."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        if not self.on:
            return result
        update, layer = self.update(), self.layer
        if isinstance(layer, nn.Conv2d):
            return result + functional.conv2d(x, update, None, layer.stride, layer.padding, layer.dilation)
        return result + functional.linear(x, update)


# layer, rank, alpha, the numbers it begins with → what takes the layer's place
Make = Callable[["nn.Linear | nn.Conv2d", int, float, torch.Generator], Beside]


@final
class BesideAdapter(LayerAdapter):
    """A training whose layers are all of one kind of `Beside`."""

    def __init__(self, settings: Updates, diffusion: Diffusion, make: Make) -> None:
        super().__init__(settings, diffusion)
        self.layers: dict[str, Beside] = {}
        for places in chosen_places(settings, diffusion):
            for module, path in places.paths.items():
                layer = places.network.get_submodule(path)
                assert isinstance(layer, nn.Linear | nn.Conv2d)
                draw = generator(int(settings.seed or 0), f"init {module}")
                beside = make(layer, places.rank, places.alpha, draw).to(diffusion.device)
                places.network.set_submodule(path, beside)
                self.layers[module] = beside

    def switch(self, *, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on

    def groups(self) -> list[Group]:
        return self._groups({f"{m}.{n}": p for m, layer in self.layers.items() for n, p in layer.factors().items()})

    @torch.no_grad()
    def learned(self) -> Learned:
        tensors: dict[str, Tensor] = {}
        update: list[tuple[str, Tensor, Tensor | None]] = []
        for module, layer in self.layers.items():
            for name, factor in layer.factors().items():
                tensors[f"{module}.{name}"] = factor.detach().reshape(canonical_shape(name, tuple(factor.shape)))
            update.append((module, layer.update().flatten(1), None))
        ranked = {module: layer for module, layer in self.layers.items() if layer.rank}
        alphas = {module: layer.alpha for module, layer in ranked.items()}
        facts = alpha_fact(alphas, {module: layer.rank for module, layer in ranked.items()})
        return Learned({"lora": tensors}, facts, update)
