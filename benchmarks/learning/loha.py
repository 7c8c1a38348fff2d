"""LoHa: the style of twenty chalk drawings. Do pictures of other faces show it?"""

from __future__ import annotations

from benchmarks.learning.bench import Bench, Finding
from benchmarks.learning.lora import teach

SETTINGS = "rank = 4\nlearning_rate = 8e-3"


def measure(bench: Bench) -> list[Finding]:
    """Return how many pictures show the style; at strength 0 none may show more of it than before."""
    return [teach(bench, "loha", "loha", SETTINGS), teach(bench, "loha", "loha", SETTINGS, strength=0.0)]
