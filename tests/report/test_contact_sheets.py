"""Sheets of pictures: what is written on them can be read, and pictures keep their shapes."""

from __future__ import annotations

import io
import unicodedata

import pytest
from PIL import Image

from sdforge.report.lettering import NONE, font, readable, wrapped
from sdforge.report.sheet import GROUND, LEFT, TOP, sample_sheet

PROMPTS = (
    ("a red cat, <toy>", "a red cat, <toy>"),
    ("Mädchen – café", "Madchen - cafe"),
    ("Кошка и щука", "Koshka i shchuka"),
    ("Ελλάδα ×2", "Ellada x2"),
    ("ネコ がっこう 고양이", "neko gatukou goyangi"),
    ("ｗｉｄｅ ½", "wide 1⁄2"),
    ("猫 🐈", "\\u732b \\U0001f408"),
    ("a cat\nand a dog", "a cat and a dog"),
    ("a\u200bb\u0301", "ab"),
)


@pytest.mark.parametrize(("prompt", "written"), PROMPTS)
def test_what_the_font_lacks_is_spelled_with_what_it_has(prompt: str, written: str) -> None:
    assert readable(prompt) == written


def test_every_letter_is_drawn_once_it_is_spelled() -> None:
    """No box stands for any of them; of what is not assigned the numbers are written."""
    none = bytes(font(16).getmask(NONE))
    letters = [*map(chr, range(0x3100)), "漢", "한", "\ufb01", "\ufffd", "\U0001f408", "\U000e0001"]
    written = {letter for each in letters if unicodedata.category(each) != "Cs" for letter in readable(each)}
    assert [letter for letter in written if bytes(font(16).getmask(letter)) == none] == []


@pytest.mark.parametrize("text", ["a red cat on a mat " * 3, "MASTERPIECE, BEST QUALITY", "W" * 40, "漢" * 9])
def test_lines_are_no_wider_than_there_is_room(text: str) -> None:
    """Else the pictures beside them would cover their ends."""
    lines = wrapped(text, 13, 30, 200)
    assert all(font(13).getlength(line) <= 200 and len(line) <= 30 for line in lines)
    assert "".join(lines).replace(" ", "") == readable(text).replace(" ", "")


def picture(width: int, height: int) -> bytes:
    image = Image.new("RGB", (width, height), "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sheet(prompt: str, data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(sample_sheet([[1, prompt, "x"]], lambda _: data))).convert("RGB")


@pytest.mark.parametrize("prompt", [prompt for prompt, _ in PROMPTS])
def test_a_sheet_of_any_prompt_is_that_of_its_spelling(prompt: str) -> None:
    data = picture(128, 128)
    assert sheet(prompt, data).tobytes() == sheet(readable(prompt), data).tobytes()


def test_a_picture_that_is_no_square_keeps_its_shape() -> None:
    drawn = sheet("a cat", picture(256, 128)).crop((LEFT, TOP, LEFT + 256, TOP + 256))
    assert {drawn.getpixel((x, y)) for x in (0, 255) for y in (66, 128, 190)} == {(255, 0, 0)}
    assert {drawn.getpixel((x, y)) for x in (0, 128, 255) for y in (0, 60, 195, 255)} == {GROUND}
