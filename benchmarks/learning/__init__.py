"""Does a training method teach what it says? One module per method: `python -m benchmarks.learning [METHOD …]`.

Each module has `measure(bench) -> list[Finding]`: it builds with the real `forge build`, draws pictures before and
after with the same prompts and noises, and lets pixels be judged. A finding compares two lots of pictures; it holds
where the difference lies outside the 95 % bootstrap interval, or (for a control) where none does.
"""
