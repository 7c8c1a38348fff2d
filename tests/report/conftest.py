"""A preset's story with whatever people may write in it, and pages taken apart."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from PIL import Image

from sdforge.chronicle import Chapter, Did
from sdforge.report.markup import VOID
from sdforge.report.page import page
from sdforge.report.story import Column, Made, Row, Source, Story, Training

HOSTILE = """<script>alert(1)</script> "><img src=x onerror=alert(2)> & </style></title> ' ` | [x](javascript:1) \x07"""
EXPORT = "toy:preset.export"


def picture(seed: int, edge: int = 96) -> bytes:
    """A picture of noise, which compresses as badly as any."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (edge, edge), random.Random(seed).randbytes(3 * edge * edge)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def story() -> Story:
    """A preset of two bases with a trained LoRA, built for the second time."""
    did = {"toy:soft": Did("k1", "d1", "reused"), "toy:style": Did("k2", "d2", "built", "`rank` 2 → 4")}
    did |= {EXPORT: Did("k3", "d3", "built", "`style` changed")}
    last = Chapter(1_800_000_000.0, 'family = "sd15"\n[lora.style]\nrank = 4  # more\n', did)
    before = replace(last, made=1_700_000_000.0, recipe='family = "sd15"\n[lora.style]\nrank = 2  # more\n')
    bases = [Source(name, "checkpoint", f"{name}.safetensors", "ab" * 32, 10**9, "") for name in ("flat", "ink")]
    made = [
        Made("toy:soft", "soft", "weighted_sum", did["toy:soft"], ["flat", "ink"], 2.0, 10**9),
        Made("toy:style", "style", "lora", did["toy:style"], ["toy:soft"], 90.0, 10**6),
        Made(EXPORT, "preset.export", "export", did[EXPORT], ["toy:soft", "toy:style"], 1.0, 10**9),
    ]
    preset = {
        "preset": "toy",
        "family": "sd15",
        "licence": "CC0-1.0",
        "words": [],
        "sampler": {"name": "DPM++ 2M", "steps": 20, "guidance": 7.0, "resolution": 512},
        "files": [
            {
                "path": "toy.safetensors",
                "kind": "checkpoint",
                "sha256": "cd" * 32,
                "bytes": 10**9,
                "autov2": "CDCDCDCDCD",
                "autov3": "0123456789AB",
            }
        ],
    }
    settings = {"title": "toy", "description": "", "licence": "CC0-1.0", "negative_prompt": "blurry", "clip_skip": 1}
    return Story(
        name="toy",
        title="toy",
        about="Drawings",
        family="Stable Diffusion 1.x",
        dtype="fp16",
        prediction="epsilon",
        preset=preset,
        settings=settings | {"trigger": ["toyword"]},
        last=last,
        before=before,
        lost=False,
        sources=bases,
        made=made,
        trainings=[Training("style", "lora", 20, 90.0, [1 / (i + 1) for i in range(20)], [], None, "", [])],
        columns=[Column("flat", "base"), Column("build before", "previous"), Column("toy", "preset")],
        rows=[Row("a drawing", seed, "", [f"{seed}-{column}" for column in range(3)]) for seed in (1, 2)],
        drawn_with={"prompts": ["a drawing"], "seeds": [1, 2], "steps": 20, "guidance": 7.0, "clip_skip": 1}
        | {"negative_prompt": "blurry"},
        asked=[],
        against=[],
        seconds=93.0,
        disk=(2 * 10**9, 10**9),
        machine={"device": "cpu"},
    )


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    inside: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Element]:
        """Every element of a tag below this one."""
        own = [self] if self.tag == tag else []
        return own + [found for each in self.inside for found in each.all(tag)]

    def words(self) -> str:
        return self.text + " ".join(each.words() for each in self.inside)


class Parsed(HTMLParser):
    """A page as a tree. Every element that is begun must be ended, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open[-1].inside.append(Element(tag, dict(attrs)))
        self.open.append(self.open[-1].inside[-1])

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in VOID
        self.open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag.lower()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def parsed(story: Story, out: Path = Path("out")) -> Element:
    """Return the page of a story, its pictures being noise, each its own."""
    return Parsed(page(story, lambda name: picture(crc32(name.encode())), out)).root


def everything(root: Element) -> list[Element]:
    return [root, *(found for each in root.inside for found in everything(each))]
