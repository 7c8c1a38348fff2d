"""How much of the promises P1–P16 holds: `python -m benchmarks.reliability`."""
