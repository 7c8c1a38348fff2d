"""The Python API: plans and builds as values, shown by notebooks, told to a callback, and silent otherwise."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from types import ModuleType

import pytest

import sdforge
from sdforge.errors import CheckFailed, RecipeError, UsageError
from sdforge.notebook import Progress
from tests.build.inline import Bench

PRESET = """
[weighted_sum.soft]
checkpoints = ["base", "ink"]
weights = [0.5, 0.5]
[preset]
checkpoint = "soft"
licence = "CC0-1.0 & <others>"
[preset.previews]
prompts = ["a cat"]
seeds = [1]
steps = 1
"""


class Sound(HTMLParser):
    """Reads HTML, and notices what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attributes))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("sdforge.commands.LocalExecutor", lambda _: bench)
    return bench


def test_a_plan_and_a_build_are_values_that_a_notebook_shows(here: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    here.recipe(PRESET)
    before = sdforge.plan("r", project=here.root)
    first = before.to_do[0]
    assert first[:3] == ("r:soft", "weighted_sum", "build")
    assert first.reason == "it has never been made here"
    assert repr(before) == "<plan: 3 of 3 targets to do>"
    assert "it has never been made here" in Sound(before._repr_html_()).text
    told: list[Progress] = []
    built = sdforge.build("r", project=here.root, device="cpu", progress=told.append)
    assert built.built == ("r:soft", "r:preset.previews", "r:preset.export")
    assert built.folders == (here.root / "out" / "r",)
    assert {path.name for path in built.pictures} >= {"1-1-r.png", "1-1-base.png"}
    assert all(path.is_file() for path in built.pictures)
    assert {event.state for event in told if event.target == "r:preset.previews"} == {"running", "progress", "built"}
    shown = Sound(built._repr_html_())
    assert "CC0-1.0 & <others>" in shown.text
    assert str(shown.pictures[0]["alt"]).startswith("previews of r")
    assert str(shown.pictures[0]["src"]).startswith("data:image/png;base64,")
    assert sdforge.plan("r", project=here.root).to_do == ()
    assert capsys.readouterr().out == ""


def test_failures_are_raised_with_what_they_say(here: Bench) -> None:
    with pytest.raises(UsageError, match="no recipe and no target 'anime'"):
        sdforge.plan("anime", project=here.root)
    here.recipe("[lora.x]\non = 'base'\nranc = 3")
    with pytest.raises(RecipeError) as caught:
        sdforge.plan("r", project=here.root)
    assert {problem.place.line for problem in caught.value.problems if problem.place} == {2, 4}
    here.recipe(PRESET + '[checks.likeness.x]\nto = "photo"\n[source.photo]\nfrom = "drawings/0.png"')
    with pytest.raises(CheckFailed, match="prompt 1, seed 1: SSIM"):
        sdforge.build("r", project=here.root, device="cpu")
    assert sdforge.build("r", project=here.root, checks=False).checks == {"r": {"state": "skipped", "results": []}}


def test_the_functions_stay_what_they_are_when_the_modules_of_their_names_are_imported() -> None:
    for name in ("plan", "build"):
        assert isinstance(sys.modules[f"sdforge.{name}"], ModuleType)
        assert callable(getattr(sdforge, name))


def test_importing_sdforge_is_light_and_planning_loads_no_torch(here: Bench) -> None:
    here.recipe(PRESET)
    code = f"""
import sys, sdforge
before = {{m.partition(".")[0] for m in sys.modules}}
sdforge.plan("r", project={str(here.root)!r})
print(bool(before & {{"pydantic", "numpy", "torch"}}), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False False\n"
