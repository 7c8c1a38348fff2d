"""What a terminal shows while a build runs."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from sdforge.report.progress import Live, Plain


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def action(method: str, group: str, makes: str) -> Any:
    """Return a step with as much of it as is shown."""
    target = SimpleNamespace(signature=SimpleNamespace(name=method, group=group, makes=makes))
    kind = "formula" if group == "merges" else "content"
    return SimpleNamespace(id="words:cat", kind=kind, node=SimpleNamespace(target=target))


def test_names_and_messages_are_shown_as_they_are() -> None:
    screen = Terminal()
    view = Live(screen)
    step = action("lora", "trainings", "lora")
    view.started(step, "cpu")
    view.progress(step, {"note": "what [/run] says of :dog:"})
    view.progress(step, {"remark": "a remark"})
    view.view.refresh()
    view.close()
    said = screen.getvalue()
    assert "what [/run] says of :dog:" in said
    assert "words:cat: a remark" in said, "no picture of a cat"


@pytest.mark.parametrize(
    ("method", "group", "makes", "said"),
    [
        ("lora", "trainings", "lora", "step 3/7"),
        ("weighted_sum", "merges", "checkpoint", "tensor 3/7"),
        ("class_images", "trainings", "dataset", "picture 3/7"),
        ("extract", "edits", "lora", "part 3/7"),
    ],
)
def test_only_a_training_has_steps(method: str, group: str, makes: str, said: str) -> None:
    view = Plain(io.StringIO())
    assert view.pace(action(method, group, makes), {"step": 3, "steps": 7}) == said
