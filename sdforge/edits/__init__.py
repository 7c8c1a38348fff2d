"""Edits: a file is a way to make an artifact from artifacts that is neither a merge nor a training.

Each has a `TABLE` (its settings), `VERSION`, `MAKES`, and one of

- `plan(table, inputs, family)`: a formula: what every tensor of the result is made of, without bytes or torch, and
  `compute(parameters, tensors)`: one tensor of it, in the worker (not needed where bytes only move);
- `run(order)`: anything else, in the worker;
- none of them, where all it does is to move components (`Takes(moves=…)`): then nothing runs.
"""
