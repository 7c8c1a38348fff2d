"""LoKr, of a whole second factor and of a decomposed one: the style of twenty chalk drawings. Do others show it?"""

from __future__ import annotations

from benchmarks.learning.bench import Bench, Finding
from benchmarks.learning.lora import teach

VARIANTS = {
    "lokr": "factor = 4\nrank = 4\nlearning_rate = 8e-3",
    "lokr-whole": "factor = 4\nwhole = true\nlearning_rate = 8e-3",
}


def measure(bench: Bench) -> list[Finding]:
    """Return how many pictures show the style, by variant; at strength 0 none may show more of it than before."""
    taught = [teach(bench, "lokr", name, settings) for name, settings in VARIANTS.items()]
    return [*taught, teach(bench, "lokr", "lokr", VARIANTS["lokr"], strength=0.0)]
