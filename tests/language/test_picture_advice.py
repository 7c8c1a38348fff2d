"""What `check` says of pictures and captions before anything is learned from them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdforge.artifact import Artifact
from sdforge.graph import Taken
from sdforge.picture_advice import Said, advise_pictures, advise_prompts
from sdforge.pictures import UnreadablePicture, opened
from sdforge.project import Project
from sdforge.sources import Sources
from sdforge.store import Store
from sdforge.tables import Dataset

ON = Artifact("checkpoint", "sd15", facts={"resolution": 128})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good picture with its caption."""
    found = tmp_path / "project" / "pictures"
    found.mkdir(parents=True)
    Image.new("RGB", (128, 96)).save(found / "good.png")
    (found / "good.txt").write_text("a hen")
    return found


def dataset(folder: Path, **stated: Any) -> Artifact:
    """Look at a folder as a new process does."""
    table = Dataset(path="pictures", **stated).model_dump()
    store = Store(folder.parent.parent / "cache")
    store.prepare()
    try:
        return Sources(Project(folder.parent, store.index), store).artifact(Taken("set", "dataset", table))
    finally:
        store.close()


def said(folder: Path, *, buckets: bool = True, captions: bool = True, **stated: Any) -> list[Said]:
    settings = SimpleNamespace(resolution=0, buckets=buckets)
    return list(advise_pictures("hens", dataset(folder, **stated), {"on": [ON]}, settings, captions=captions))


def add(folder: Path, name: str, size: tuple[int, int] = (128, 128), mode: str = "RGB", **wish: Any) -> None:
    """Add a picture and its caption."""
    Image.new(mode, size).save(folder / name, **wish)
    (folder / name).with_suffix(".txt").write_text("a hen")


def cut(folder: Path) -> None:
    (folder / "x.png").write_bytes((folder / "good.png").read_bytes()[:20])


def deep(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(folder / "x.png")


def boastful(folder: Path) -> None:
    """A header that speaks of 2³⁰ pixels, of which none is there."""
    data = bytearray((folder / "good.png").read_bytes())
    data[16:24] = (1 << 15).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (folder / "x.png").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / "x.png").write_bytes(b""), "it is none of a known form"),
        (lambda folder: (folder / "x.png").write_text("<html>"), "it is none of a known form"),
        (cut, ""),
        (deep, "it is grey in more than 8 bits; save it with 8"),
        (boastful, "32768 × 32768 pixels are more than 200,000,000"),
    ],
)
def test_a_picture_that_cannot_be_read_is_a_mistake_before_anything_runs(
    folder: Path, spoil: Callable[[Path], object], why: str
) -> None:
    spoil(folder)
    code, sentence, hint, warning = said(folder, caption="a hen")[0]
    assert (code, warning) == ("pictures", False)
    assert sentence.startswith(f"hens: {folder / 'x.png'} is no picture that can be read: ")
    assert sentence.endswith(why)
    assert hint == "take it away, or save it anew"


def test_what_pillow_says_of_a_damaged_avif_is_of_the_picture(folder: Path) -> None:
    failure = "Failed to decode image"
    with pytest.raises(UnreadablePicture, match=failure), opened(folder / "good.png"):
        raise RuntimeError(failure)  # other forms raise OSErrors


def test_of_many_broken_pictures_one_is_shown_and_the_others_counted(folder: Path) -> None:
    for name in ("x.png", "y.png", "z.jpg"):
        (folder / name).write_text("no pixels")
    (found,) = said(folder, caption="a hen")
    assert found[1].endswith("x.png is no picture that can be read: it is none of a known form; so it is with 2 more")


def test_animations_and_other_forms_are_passed_over_and_named(folder: Path) -> None:
    add(folder, "wave.gif")
    add(folder, "scan.TIF")
    assert said(folder) == [
        (
            "pictures",
            "2 pictures in `hens` are passed over: scan.TIF, wave.gif",
            "what is read ends in .png, .jpg, .jpeg, .webp, .avif",
            True,
        )
    ]


def test_pictures_much_smaller_than_what_is_trained_are_named(folder: Path) -> None:
    add(folder, "dot.png", (1, 1))
    add(folder, "half.png", (64, 64))  # enlarged twice, which is still fair
    ((_, sentence, _, warning),) = said(folder)
    assert sentence == "1 picture of `hens` is enlarged more than 2 times, to 128 × 128 pixels: dot.png"
    assert warning


def test_a_smaller_resolution_takes_smaller_pictures(folder: Path) -> None:
    add(folder, "small.png", (40, 40))
    settings = SimpleNamespace(resolution=64, buckets=True)
    assert not list(advise_pictures("hens", dataset(folder), {"on": [ON]}, settings, captions=True))


def test_pictures_of_which_most_is_cut_off_are_named(folder: Path) -> None:
    add(folder, "strip.png", (1200, 128))
    add(folder, "wide.png", (384, 128))
    assert [row[1] for row in said(folder)] == ["less than half is seen of 1 picture of `hens`: strip.png"]
    ((_, sentence, hint, _),) = said(folder, buckets=False)
    assert sentence == "less than half is seen of 2 pictures of `hens`: strip.png, wide.png"
    assert hint == "buckets = true keeps shapes up to 4 to 1"


def test_a_picture_lies_as_its_exif_says(folder: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    add(folder, "turned.jpg", (200, 100), exif=turned)
    sizes = dataset(folder).notes["sizes"].values()
    assert sorted(sizes) == [[100, 200], [128, 96]]


def test_pictures_without_captions_are_named_where_captions_are_read(folder: Path) -> None:
    (folder / "good.txt").unlink()
    ((code, sentence, _, warning),) = said(folder)
    assert (code, warning) == ("captions", True)
    assert sentence == "1 of 1 pictures of `hens` have no caption: good.png"
    assert not said(folder, captions=False)


def test_captions_longer_than_what_is_read_are_named(folder: Path) -> None:
    (folder / "good.txt").write_text("hen, " * 37 + "hen")  # 75 tokens: 38 words, 37 commas
    assert not said(folder)
    (folder / "good.txt").write_text("hen, " * 38)
    ((_, sentence, hint, _),) = said(folder)
    assert sentence == "the captions of 1 picture of `hens` have more than the 75 tokens that are read: good.png"
    assert hint == "what stands behind them teaches nothing"


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "LA", "P", "1"])
def test_colours_of_every_kind_are_taken(folder: Path, mode: str) -> None:
    add(folder, "x.jpg" if mode == "CMYK" else "x.png", mode=mode)
    assert not said(folder)


def test_prompts_of_which_the_end_is_not_read_are_named() -> None:
    table = SimpleNamespace(prompts=["a hen", "a hen, " * 30], negative_prompt="red " * 75, prompt="red " * 76)
    found = [(name, said[1]) for name, said in advise_prompts(table)]
    assert [name for name, _ in found] == ["prompt", "prompts"]
    assert not list(advise_prompts(SimpleNamespace(prompts=[1, 2], prompt=1)))  # as checks number them
    assert "more than the 75 tokens that are read: 'a hen, a hen" in found[1][1]


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("a (red:1.3) hen", "(red:1.3)"),
        ("a hen, (blurry, dark: .5)", "(blurry, dark: .5)"),
        ("a hen <lora:ink:0.8>", "<lora:ink:0.8>"),
        ("a hen (at dawn), ratio 4:3, <ink>", ""),
    ],
)
def test_weights_as_other_programs_write_them_are_remarked(prompt: str, weight: str) -> None:
    said = [each[1] for _, each in advise_prompts(SimpleNamespace(prompts=[prompt]))]
    assert said == ([f"{weight!r} is no weight here: prompts are read as they are written"] if weight else [])
