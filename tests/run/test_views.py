"""Pictures shown smaller or closer: what is drawn, where it lies, what is said of it and what counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdforge.run.images import Picture
from sdforge.run.seeds import generator
from sdforge.run.views import View, draw_view, mask_of, pixels_of

WHOLE = (128, 96)


def views(count: int = 600) -> list[View]:
    return [draw_view(WHOLE, generator(0, "views", i)) for i in range(count)]


@pytest.fixture
def red(tmp_path: Path) -> Picture:
    """A red picture whose left half is blue."""
    pixels = np.zeros((192, 256, 3), np.uint8)
    pixels[:, :128, 2], pixels[:, 128:, 0] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    return Picture(str(tmp_path / "red.png"), "r", "a toy", WHOLE, (256, 192))


def test_two_of_three_views_are_smaller_and_the_rest_closer() -> None:
    drawn = views()
    small = [view for view in drawn if view.size[0] <= WHOLE[0]]
    assert len(small) / len(drawn) == pytest.approx(2 / 3, abs=0.06)
    assert {view.size[0] for view in small} >= {48, 80, 120}
    assert min(view.size[0] for view in small) >= 40
    closer = [view for view in drawn if view.size[0] > WHOLE[0]]
    assert all(1.15 < view.size[0] / WHOLE[0] < 1.45 for view in closer)


def test_words_say_what_is_far_and_what_is_close() -> None:
    for view in views():
        scale = view.size[0] / WHOLE[0]
        if scale > 1:
            assert view.caption("a toy") in ("zoomed in a toy", "close up a toy")
        elif scale < 0.55:
            assert view.caption("a toy") in ("a far away a toy", "very small a toy")
        elif scale > 0.65:
            assert view.caption("a toy") == "a toy"
        assert view.caption("") == ""


def test_everything_lies_on_places_of_the_latents_and_within_the_picture() -> None:
    for view in views():
        assert all(n % 8 == 0 for n in (*view.size, *view.corner))
        for edge, whole, corner in zip(view.size, WHOLE, view.corner, strict=True):
            assert 0 <= corner <= edge - whole if edge > whole else edge - whole <= corner <= 0


def test_a_smaller_picture_lies_on_grey_and_only_what_sees_no_grey_counts(red: Picture) -> None:
    view = View((64, 48), (-32, -8))
    pixels = pixels_of(red, view, flip=False)
    assert pixels.shape == (1, 3, 96, 128)
    inside = pixels[0, :, 8:56, 32:96]
    assert bool((inside[2, :, :30] > 0.9).all())
    assert bool((inside[0, :, -30:] > 0.9).all())
    outside = pixels.clone()
    outside[0, :, 8:56, 32:96] = 0
    assert not outside.any()
    mask = mask_of(red, view, flip=False)
    assert mask.shape == (1, 1, 12, 16)
    expected = torch.zeros(1, 1, 12, 16)
    expected[0, 0, 2:6, 5:11] = 1
    assert torch.equal(mask, expected)


def test_the_edge_of_the_picture_itself_counts_where_no_ground_is_beyond_it(red: Picture) -> None:
    assert bool((mask_of(red, View(WHOLE, (0, 0)), flip=False) == 1).all())
    corner = mask_of(red, View((64, 48), (0, 0)), flip=False)
    assert corner[0, 0, 0, 0] == 1
    assert corner[0, 0, 5, 7] == 0


def test_a_closer_picture_fills_everything_and_is_cut_where_the_corner_says(red: Picture) -> None:
    view = View((176, 128), (48, 32))
    pixels = pixels_of(red, view, flip=False)
    assert pixels.shape == (1, 3, 96, 128)
    assert float(pixels[0, 2, 50, 37]) > 0.9  # blue up to 88 − 48
    assert float(pixels[0, 0, 50, 43]) > 0.9
    assert bool((mask_of(red, view, flip=False) == 1).all())


def test_a_mirrored_view_shows_the_mirrored_picture_in_the_same_place(red: Picture) -> None:
    view = View((64, 48), (-32, -8))
    there, back = (pixels_of(red, view, flip=flip)[0, :, 8:56, 32:96] for flip in (False, True))
    assert torch.equal(there, back.flip(2))


def test_a_mask_of_the_pictures_own_is_scaled_with_it(red: Picture, tmp_path: Path) -> None:
    white = np.zeros((192, 256), np.uint8)
    white[:, 128:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    masked = Picture(red.path, "r", "a toy", WHOLE, (256, 192), str(tmp_path / "mask.png"))
    mask = mask_of(masked, View((64, 48), (-32, -8)), flip=False)
    assert float(mask[0, 0, 3, 6]) == 0
    assert float(mask[0, 0, 3, 9]) == 1
    assert float(mask_of(masked, View((64, 48), (-32, -8)), flip=True)[0, 0, 3, 6]) == 1
