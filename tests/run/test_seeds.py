"""Random numbers depend on seed, purpose and step, and on nothing else."""

from __future__ import annotations

import torch

from sdforge.run.seeds import generator


def test_a_generator_is_the_same_everywhere() -> None:
    """The numbers are sha256 of `sdforge.PURPOSE NUL SEED NUL STEP`, first 8 bytes, halved."""
    assert generator(1, "noise", 5).initial_seed() == 6939214202132375963
    drawn = torch.randint(0, 1000, (4,), generator=generator(1, "noise", 5)).tolist()
    assert drawn == [699, 869, 882, 680]


def test_seed_purpose_and_step_each_make_another() -> None:
    rows: list[tuple[int, str, int]] = [(1, "noise", 5), (2, "noise", 5), (1, "order", 5), (1, "noise", 6)]
    assert len({generator(*row).initial_seed() for row in rows}) == 4


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    torch.randn(4, generator=generator(1, "noise"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_step_can_be_drawn_without_those_before_it() -> None:
    in_turn = [torch.randn(2, generator=generator(1, "noise", step)) for step in range(5)]
    assert torch.equal(in_turn[4], torch.randn(2, generator=generator(1, "noise", 4)))
