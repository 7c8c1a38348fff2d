"""Pictures: buckets, order, captions and latents are functions of content and seed."""

from __future__ import annotations

import dataclasses
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdforge.errors import ActionFailed
from sdforge.families.sd15.load import load
from sdforge.order import Given
from sdforge.run import likeness
from sdforge.run.derived import Derived
from sdforge.run.images import STEP, Latents, Order, Picture, assign, bucket_sizes, plan_pictures, read_pixels, split
from sdforge.run.seeds import generator
from tests.families.workbench import Taken

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def some(sizes: dict[tuple[int, int], int]) -> list[Picture]:
    return [
        Picture(f"{w}x{h}-{i}.png", f"{w}x{h}-{i}", f"caption {i}", (w, h))
        for (w, h), count in sizes.items()
        for i in range(count)
    ]


@PROPERTY
@given(st.integers(1, 32))
def test_buckets_are_multiples_of_64_of_at_most_the_area(times: int) -> None:
    resolution = STEP * times
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert all(w % STEP == h % STEP == 0 and 0 < w * h <= resolution**2 for w, h in sizes)
    assert all((h, w) in sizes for w, h in sizes)
    assert max(max(size) for size in sizes) <= 2 * resolution


def test_the_buckets_of_512() -> None:
    assert {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448)} <= set(bucket_sizes(512))
    assert bucket_sizes(64) == [(64, 64)]


@PROPERTY
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_where_its_aspect_is_nearest(width: int, height: int) -> None:
    sizes = bucket_sizes(512)
    chosen = assign((width, height), sizes)
    ratio = width / height
    assert all(abs(chosen[0] / chosen[1] - ratio) <= abs(w / h - ratio) for w, h in sizes)


@PROPERTY
@given(
    st.dictionaries(st.sampled_from([(64, 64), (64, 128), (128, 64)]), st.integers(1, 7), min_size=1),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_picture_has_its_turn_equally_often(sizes: dict[tuple[int, int], int], batch: int, seed: int) -> None:
    """Those of a shape that hardly any other has, too, though a batch is full of them."""
    pictures = some(sizes)
    order = Order(pictures, batch, seed, flip=False, dropout=0.0)
    seen = Counter(p.sha256 for step in range(3 * len(pictures)) for p in order.at(step).pictures)
    assert seen == {p.sha256: 3 * batch for p in pictures}


@PROPERTY
@given(st.dictionaries(st.sampled_from([(64, 64 * n) for n in range(1, 6)]), st.integers(1, 9), min_size=1))
def test_a_lap_is_a_round_of_all_pictures(sizes: dict[tuple[int, int], int]) -> None:
    """Nowhere on the way a bucket is ahead of its share, or behind it, by more than a lap and a batch."""
    pictures = some(sizes)
    order, seen = Order(pictures, 4, 0, flip=False, dropout=0.0), Counter[tuple[int, int]]()
    for step in range(4 * len(pictures)):
        seen.update(p.size for p in order.at(step).pictures)
        for size, count in sizes.items():
            assert abs(seen[size] - 4 * (step + 1) * count / len(pictures)) <= 2 * count + 4 * len(sizes)


def test_a_batch_is_of_one_bucket_and_full() -> None:
    order = Order(some({(64, 64): 5, (64, 128): 1}), 4, 0, flip=False, dropout=0.0)
    for step in range(20):
        chosen = order.at(step)
        assert len(chosen.pictures) == 4
        assert len({p.size for p in chosen.pictures}) == 1


def test_any_step_can_be_asked_for_on_its_own() -> None:
    pictures = some({(64, 64): 5, (64, 128): 3})
    whole, late = (Order(pictures, 2, 7, flip=True, dropout=0.3) for _ in range(2))
    steps = [whole.at(step) for step in range(30)]
    assert late.at(29) == steps[29]
    assert late.at(3) == steps[3]


def test_what_is_drawn_for_a_lap_and_a_round_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation of a hundred thousand pictures at every step would take longer than some steps."""
    drawn: list[str] = []

    def noted(seed: int, purpose: str, step: int = 0) -> torch.Generator:
        drawn.append(purpose)
        return generator(seed, purpose, step)

    monkeypatch.setattr("sdforge.run.images.generator", noted)
    order = Order(some({(64, 64): 40, (64, 128): 40}), 4, 7, flip=False, dropout=0.0)
    for step in range(20):
        order.at(step)
    assert sorted(set(drawn) - {"captions"}) == ["buckets", "order 64x128", "order 64x64"]
    assert all(drawn.count(purpose) == 1 for purpose in set(drawn) - {"captions"})


def test_another_seed_is_another_order() -> None:
    pictures = some({(64, 64): 9})
    one, two = (Order(pictures, 9, seed, flip=False, dropout=0.0).at(0).pictures for seed in (1, 2))
    assert one != two
    assert set(one) == set(two)


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 0, 0), (1.0, 800, 800), (0.25, 150, 250)])
def test_captions_are_dropped_in_their_share(dropout: float, least: int, most: int) -> None:
    order = Order(some({(64, 64): 8}), 8, 0, flip=False, dropout=dropout)
    dropped = sum(caption == "" for step in range(100) for caption in order.at(step).captions)
    assert least <= dropped <= most


def test_pictures_are_mirrored_half_of_the_time_where_that_is_asked_for() -> None:
    pictures = some({(64, 64): 8})
    never, half = (Order(pictures, 8, 0, flip=flip, dropout=0.0) for flip in (False, True))
    assert not any(any(never.at(step).flips) for step in range(20))
    assert 320 <= sum(sum(half.at(step).flips) for step in range(100)) <= 480


def test_dropout_and_mirrors_do_not_move_the_order() -> None:
    pictures = some({(64, 64): 8})
    plain, other = (Order(pictures, 2, 0, flip=flip, dropout=d) for flip, d in ((False, 0.0), (True, 0.5)))
    assert [plain.at(s).pictures for s in range(9)] == [other.at(s).pictures for s in range(9)]


def test_a_renamed_picture_changes_nothing(drawings: Path, pictures: Given, tmp_path: Path) -> None:
    moved = []
    for i, (path, sha, caption, repeats) in enumerate(pictures.pictures):
        place = tmp_path / f"{9 - i}.png"
        place.write_bytes(Path(path).read_bytes())
        moved.append([str(place), sha, caption, repeats])
    assert drawings.is_dir()
    plans = [plan_pictures(rows, 64, buckets=True) for rows in (pictures.pictures, moved[::-1])]
    assert [dataclasses.replace(p, path="") for p in plans[0]] == [dataclasses.replace(p, path="") for p in plans[1]]


def test_a_picture_is_there_as_often_as_it_is_repeated(pictures: Given) -> None:
    rows = [[*row[:3], 1 + i] for i, row in enumerate(pictures.pictures)]
    counts = Counter(p.sha256 for p in plan_pictures(rows, 64, buckets=False))
    assert counts == {row[1]: row[3] for row in rows}


def test_held_out_pictures_are_chosen_by_content(pictures: Given) -> None:
    one = dataclasses.replace(pictures, held_out=1)
    turned = dataclasses.replace(one, pictures=one.pictures[::-1])
    learned, held = split(one)
    assert split(turned) == (learned, held)
    assert len(held) == 1
    assert sorted([*learned, *held]) == sorted(pictures.pictures)


def saved(path: Path, image: Image.Image, **options: object) -> Picture:
    image.save(path, **options)  # type: ignore[arg-type]
    return Picture(str(path), "x", "", (64, 64))


def test_pixels_are_between_minus_one_and_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (0, 128, 255))
    pixels = read_pixels(saved(tmp_path / "x.png", image), flip=False)
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


def test_a_mirrored_picture_is_mirrored(tmp_path: Path) -> None:
    values = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = saved(tmp_path / "x.png", Image.fromarray(values))
    assert torch.equal(read_pixels(picture, flip=True), read_pixels(picture, flip=False).flip(3))


def test_transparent_is_white(tmp_path: Path) -> None:
    picture = saved(tmp_path / "x.png", Image.new("RGBA", (64, 64), (0, 0, 0, 0)))
    assert bool((read_pixels(picture, flip=False) == 1).all())


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (7, 8, 9)), ("L", 7), ("1", 0), ("P", 0)])
def test_a_colour_that_a_png_calls_transparent_is_white(mode: str, colour: Any, tmp_path: Path) -> None:
    picture = saved(tmp_path / "x.png", Image.new(mode, (64, 64), colour), transparency=colour)
    assert bool((read_pixels(picture, flip=False) == 1).all())
    assert float(likeness.read(picture.path).min()) == 1  # a picture that is compared is looked at in the same way


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_every_kind_of_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    picture = saved(tmp_path / f"x.{suffix}", Image.new(mode, (64, 64)))
    assert read_pixels(picture, flip=False).shape == (1, 3, 64, 64)


def test_grey_of_16_bits_is_refused_rather_than_made_white(tmp_path: Path) -> None:
    picture = saved(tmp_path / "x.png", Image.fromarray(np.full((64, 64), 30_000, dtype=np.uint16)))
    with pytest.raises(ActionFailed, match="grey in more than 8 bits; save it with 8"):
        read_pixels(picture, flip=False)


def test_a_photo_that_was_taken_upright_stands_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (128, 64), "black")
    image.paste("white", (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right
    image.save(tmp_path / "x.png", exif=exif)
    (picture,) = plan_pictures([[str(tmp_path / "x.png"), "x", "", 1]], 128, buckets=True)
    assert picture.size[0] < picture.size[1]
    pixels = read_pixels(picture, flip=False)
    assert float(pixels[..., : picture.size[1] // 4, :].mean()) > 0.9
    assert float(pixels[..., -picture.size[1] // 4 :, :].mean()) < -0.9


@pytest.mark.parametrize(("kind", "value"), [(3, b"\x09\0\0\0"), (3, b"\0\0\0\0"), (2, b"6\0\0\0"), (1, b"\x06\0\0\0")])
def test_an_orientation_that_is_none_turns_nothing(kind: int, value: bytes, tmp_path: Path) -> None:
    """A number beyond 8, or a text or bytes where a number belongs: Pillow turns nothing then."""
    count = 1 if kind == 3 else 2
    entry = struct.pack("<HHHI", 1, 0x0112, kind, count) + value + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry
    Image.new("RGB", (100, 60)).save(tmp_path / "x.jpg", exif=exif)
    (picture,) = plan_pictures([[str(tmp_path / "x.jpg"), "x", "", 1]], 128, buckets=True)
    assert (picture.original, picture.size) == ((100, 60), (128, 128))


def test_a_wide_picture_is_cut_and_not_squeezed(tmp_path: Path) -> None:
    image = Image.new("RGB", (256, 64), "black")
    image.paste("white", (96, 0, 160, 64))
    assert bool((read_pixels(saved(tmp_path / "x.png", image), flip=False)[..., 8:-8] > 0.9).all())


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ActionFailed, match=r"x\.png is no picture"):
        plan_pictures([[str(path), "x", "", 1]], 64, buckets=True)


def test_a_picture_that_breaks_off_is_named(tmp_path: Path) -> None:
    values = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = saved(tmp_path / "x.png", Image.fromarray(values))
    data = Path(picture.path).read_bytes()
    Path(picture.path).write_bytes(data[: len(data) // 2])
    with pytest.raises(ActionFailed, match=r"x\.png is no picture"):
        read_pixels(picture, flip=False)


def test_latents_are_kept_under_what_they_are_made_from(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    (first, second, _) = plan_pictures(pictures.pictures, 64, buckets=True)
    derived = Derived(str(tmp_path))
    latents = Latents(diffusion, toy.given(), derived)
    made = latents.of(first, flip=False)
    assert made.shape == (1, 4, 8, 8)
    assert torch.equal(made, diffusion.encode_picture(read_pixels(first, flip=False)))
    latents.of(first, flip=True)
    latents.of(second, flip=False)
    latents.of(dataclasses.replace(first, size=(128, 64)), flip=False)
    assert derived.made == {"latents": 4}
    again = Derived(str(tmp_path))
    renamed = dataclasses.replace(first, caption="another")
    assert torch.equal(Latents(diffusion, toy.given(), again).of(renamed, flip=False), made)
    assert again.reused == {"latents": 1}


def test_another_vae_or_scaling_is_another_latent(toy: Taken, other: Taken, pictures: Given, tmp_path: Path) -> None:
    diffusion = load(toy.given(), torch.device("cpu"), torch.float32)
    picture = plan_pictures(pictures.pictures, 64, buckets=True)[0]
    scaled = dataclasses.replace(toy.given(), facts=toy.artifact.facts | {"latent_scaling": 0.3})
    unrelated = dataclasses.replace(toy.given(), facts=toy.artifact.facts | {"prediction": "v_prediction"})
    derived = Derived(str(tmp_path))
    for checkpoint in (toy.given(), other.given(), scaled, unrelated):
        Latents(diffusion, checkpoint, derived).of(picture, flip=False)
    assert derived.made == {"latents": 3}
    assert derived.reused == {"latents": 1}


def test_latents_that_memory_does_not_hold_are_read_again(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdforge.run.derived.MOST", 1)
    derived = Derived(str(tmp_path))
    latents = Latents(load(toy.given(), torch.device("cpu"), torch.float32), toy.given(), derived)
    one, other = plan_pictures(pictures.pictures, 64, buckets=True)[:2]
    found = [latents.of(picture, flip=False) for picture in (one, other, one, one)]
    assert (derived.made, derived.reused) == ({"latents": 2}, {"latents": 1})
    assert torch.equal(found[0], found[2])
