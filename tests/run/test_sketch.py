"""Sketches: the distance of two updates without their bytes."""

from __future__ import annotations

import base64
import struct

import pytest
import torch
from torch import Tensor

from sdforge.lock import Pin
from sdforge.lockfile import distance
from sdforge.run.sketch import LINES, sketch

Update = list[tuple[str, Tensor, Tensor | None]]


def update(seed: int, layers: int = 24, rank: int = 4, prefix: str = "") -> Update:
    draw = torch.Generator().manual_seed(seed)
    return [
        (f"{prefix}layer{i}", torch.randn(12, rank, generator=draw), torch.randn(rank, 20, generator=draw))
        for i in range(layers)
    ]


def lines(text: str) -> Tensor:
    return torch.tensor(struct.unpack(f"<{LINES}f", base64.b64decode(text)), dtype=torch.float64)


def whole(rows: Update) -> Update:
    return [(name, left @ right, None) for name, left, right in rows if right is not None]


def test_factors_and_their_product_have_one_sketch() -> None:
    rows = update(0)
    (a, norm_a), (b, norm_b) = sketch(rows), sketch(whole(rows))
    assert torch.allclose(lines(a), lines(b), atol=1e-4)
    assert abs(norm_a / norm_b - 1) < 1e-6


def test_the_norm_is_that_of_the_update() -> None:
    rows = update(0)
    exact = sum(float((left @ right).double().square().sum()) for _, left, right in rows if right is not None)
    assert abs(sketch(rows)[1] - exact**0.5) < 1e-4


def test_the_order_of_the_layers_is_no_matter() -> None:
    rows = update(0)
    assert sketch(rows) == sketch(rows[::-1])


def test_a_sketch_is_256_bytes_and_the_same_everywhere() -> None:
    rows: Update = [("a", torch.arange(6.0).reshape(2, 3), None), ("b", torch.ones(2, 1), torch.ones(1, 2))]
    text, norm = sketch(rows)
    assert len(base64.b64decode(text)) == 256
    assert lines(text)[:6].tolist() == [-9, -9, -15, 19, -15, 9]
    assert norm == (55 + 4) ** 0.5


def test_the_same_update_is_at_no_distance() -> None:
    rows = update(0)
    text, norm = sketch(rows)
    assert distance(Pin("", "", sketch=text, norm=norm), {"sketch": sketch(rows)[0]}) == 0


def test_a_distance_is_estimated_within_its_standard_error() -> None:
    """An eleventh: over 40 pairs the root of the mean square stays below a sixth, the worst below two fifths."""
    errors = []
    for i in range(40):
        a, b = update(2 * i, prefix=f"{i} "), update(2 * i + 1, prefix=f"{i} ")
        (text, norm), (other, _) = sketch(a), sketch(b)
        pairs = zip(whole(a), whole(b), strict=True)
        exact = sum(float((x - y).double().square().sum()) for (_, x, _), (_, y, _) in pairs) ** 0.5 / norm
        found = distance(Pin("", "", sketch=text, norm=norm), {"sketch": other})
        assert found is not None
        errors.append(found / exact - 1)
    assert (sum(e * e for e in errors) / len(errors)) ** 0.5 < 1 / 6
    assert max(map(abs, errors)) < 0.4


def test_a_small_change_of_a_large_update_is_seen() -> None:
    a = update(0)
    b = [(name, left, right + 1e-3 if right is not None else None) for name, left, right in a]
    (text, norm), (other, _) = sketch(a), sketch(b)
    found = distance(Pin("", "", sketch=text, norm=norm), {"sketch": other})
    assert found is not None
    assert 1e-4 < found < 1e-2


@pytest.mark.parametrize("sketched", ["no sketch", "AAAA", ""])
def test_what_is_no_sketch_tells_no_distance(sketched: str) -> None:
    text, norm = sketch(update(0))
    assert distance(Pin("", "", sketch=sketched, norm=norm), {"sketch": text}) is None
