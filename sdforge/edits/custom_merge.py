"""Several concepts of Custom Diffusion in one: keys and values in closed form, no training.

Source: Kumari et al. 2022, https://arxiv.org/abs/2212.04488, §3.2 (constrained optimisation to merge concepts)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, final

from pydantic import Field

from sdforge.artifact import Artifact
from sdforge.order import Order, Outcome
from sdforge.settings import Reference, Table, Takes, Target

VERSION = 2  # also of the captions that stand for all others
MAKES = "custom"

Caption = Annotated[str, Field(min_length=1, max_length=1000)]
WAYS = ("a photo of {}", "a drawing of {}", "a painting of {}", "a picture of {}", "{}")
THINGS = (
    "a girl with long blonde hair",
    "a boy with short black hair",
    "an old man with a hat",
    "a woman in a red dress",
    "a smiling face",
    "a crowd of people",
    "a dog on the grass",
    "a cat on a chair",
    "a white horse",
    "a bird in a tree",
    "fish under water",
    "an elf with green eyes",
    "a robot",
    "a castle on a hill",
    "a house by the sea",
    "a street at night",
    "a bridge over a river",
    "a car on a road",
    "a train in the snow",
    "a boat on a lake",
    "an airplane in a blue sky",
    "a mountain at sunset",
    "a forest in autumn",
    "a beach with palm trees",
    "a field of yellow flowers",
    "a table with fruit",
    "a cup of coffee",
    "a plate of food",
    "a book and a lamp",
    "a chair in an empty room",
    "a wooden box",
    "a clock on the wall",
    "a guitar",
    "a sword and a shield",
    "a purple background",
    "a pattern of circles",
    "fire and smoke",
    "clouds and rain",
    "a city from above",
    "the moon and stars",
)


@final
class Concept(Table):
    """How prompts name a concept."""

    name: str = Field("", max_length=256, description='the word and its noun, as "<toy> cat"; empty: the word alone')


@final
class CustomMerge(Target):
    """Of all W with W cᵢ = Wᵢ cᵢ for the tokens cᵢ of every concept's name, that with least ‖(W − W₀) C_regᵀ‖.

    The end of text behind a name is one of its tokens: to a text encoder it is the whole prompt.

    With G = C_regᵀ C_reg and D = C G⁻¹: W = W₀ + (V − W₀ Cᵀ)(D Cᵀ)⁻¹ D. All of it in fp64.
    """

    checkpoint: Annotated[
        Reference, Takes("checkpoint", ("unet", "text_encoder", "vae", "tokenizer"))
    ]  # the one that the concepts were trained on
    custom: Annotated[dict[Reference, Concept], Field(min_length=2), Takes("custom")]
    template: str = Field("photo of a {}", max_length=256, description="where the names stand in prompts")
    captions: list[Caption] = Field(
        [],
        max_length=2000,
        description="prompts that are to say what they said; empty: 200 of people, beasts and things",
    )


TABLE = CustomMerge


def captions_of(settings: list[str]) -> list[str]:
    """Return the captions that stand for all prompts without the new words."""
    return settings or [way.format(thing) for thing in THINGS for way in WAYS]


def advise(table: CustomMerge, inputs: dict[str, list[Artifact | None]]) -> list[tuple[str, str, str, str, bool]]:
    """Refuse a template without a place for names, and names without the word they are for."""
    found = []
    if table.template.count("{}") != 1:
        sentence = f"the template {table.template!r} has no one place {{}} for a name"
        found.append(("checkpoint", "template", sentence, 'template = "photo of a {}"', False))
    for (reference, concept), artifact in zip(table.custom.items(), inputs.get("custom", []), strict=True):
        word = str(artifact.facts.get("token", "")) if artifact is not None else ""
        if word and concept.name and word not in concept.name:
            sentence = f"`{reference}` is called {word!r}, which {concept.name!r} does not name"
            found.append((f"custom.{reference}", "token", sentence, f'name = "{word} …"', False))
    return found


def run(order: Order, report: Callable[..., None]) -> Outcome:
    """Merge the concepts. Raises ActionFailed where they leave no choice."""
    captions = captions_of(order.settings["captions"])
    outcome: Outcome = importlib.import_module("sdforge.run.concepts").merge(order, captions, report)
    return outcome
