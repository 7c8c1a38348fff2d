"""The report: one page that opens from the disk, whatever people wrote, in any browser, on paper."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from sdforge.chronicle import Did
from sdforge.report.curves import MOST, loss_drawing
from sdforge.report.graph_drawing import ACROSS, HEIGHT, WIDTH, Box, _Layout
from sdforge.report.markup import element, text
from sdforge.report.page import POLICY, page
from sdforge.report.pictures import BUDGET, STEPS, Pictures
from sdforge.report.story import Column, Row, Story, Training, changed_lines
from tests.report.conftest import HOSTILE, Parsed, everything, parsed, picture


def hostile(story: Story) -> Story:
    """The same with every word of a person being one that would break a page that lets it."""
    row = Row(HOSTILE, 1, "", story.rows[0].cells)
    words = {"title": HOSTILE, "description": HOSTILE, "licence": HOSTILE, "negative_prompt": HOSTILE}
    return replace(
        story,
        name="toy",
        title=HOSTILE,
        about=HOSTILE,
        settings=story.settings | words | {"trigger": [HOSTILE]},
        last=replace(story.last, recipe=f"# {HOSTILE}\n[{HOSTILE}]\n"),
        sources=[replace(each, where=HOSTILE, licence=HOSTILE, id=HOSTILE) for each in story.sources],
        made=[replace(each, name=HOSTILE, did=Did("k", HOSTILE, "built", HOSTILE)) for each in story.made],
        trainings=[Training(HOSTILE, "lora", 2, 1.0, [1.0, 0.5], [], None, HOSTILE, [(1, HOSTILE, "sample")])],
        columns=[Column(HOSTILE, column.role) for column in story.columns],
        rows=[row],
        drawn_with=story.drawn_with | {"negative_prompt": HOSTILE, "prompts": [HOSTILE]},
        against=[HOSTILE],
        asked=[HOSTILE],
    )


@pytest.fixture(params=["plain", "hostile"])
def told(request: pytest.FixtureRequest, story: Story) -> Story:
    return hostile(story) if request.param == "hostile" else story


def test_a_page_holds_nothing_that_runs_and_asks_for_nothing(told: Story) -> None:
    for each in everything(parsed(told)):
        assert each.tag not in ("script", "iframe", "object", "embed", "link", "form", "base")
        assert not [name for name in each.attributes if name.startswith("on") or name == "style"]
        assert str(each.attributes.get("href", "#")).startswith("#")
        assert str(each.attributes.get("src", "data:image/webp;base64,")).startswith("data:image/webp;base64,")


def test_its_policy_forbids_all_but_its_own_style_and_pictures(story: Story) -> None:
    (policy,) = (each for each in parsed(story).all("meta") if "http-equiv" in each.attributes)
    assert policy.attributes["content"] == POLICY
    assert "default-src 'none'" in POLICY


def test_what_people_wrote_is_shown_as_they_wrote_it(story: Story) -> None:
    root, shown = parsed(hostile(story)), HOSTILE.replace("\x07", "�")
    assert [each.text for each in root.all("h1")] == [shown]
    assert shown in [each.text for each in root.all("th")]
    assert f"{shown}: {shown}, seed 1" in [each.attributes["alt"] for each in root.all("img")]


def test_every_picture_says_what_it_shows_and_how_large_it_is(story: Story) -> None:
    pictures = parsed(story).all("img")
    assert len(pictures) >= 6
    assert all(each.attributes["alt"] and each.attributes["width"] for each in pictures)
    assert {"flat: a drawing, seed 1", "build before: a drawing, seed 2", "toy: a drawing, seed 1"} <= {
        str(each.attributes["alt"]) for each in pictures
    }


def test_the_graph_tells_its_states_in_words(story: Story) -> None:
    graph = next(each for each in parsed(story).all("svg") if each.attributes["class"] == "graph")
    boxes = [[text.text for text in each.all("text")] for each in graph.all("g") if "transform" in each.attributes]
    assert ["soft", "weighted_sum", "reused"] in boxes
    assert ["style", "lora", "built"] in boxes
    assert "style: lora, built, from soft" in graph.all("desc")[0].text


def test_why_something_was_built_stands_beside_it(story: Story) -> None:
    rows = [each.words() for each in parsed(story).all("tr")]
    assert any("style" in row and "rank" in row and "2 → 4" in row for row in rows)


def test_it_says_how_much_was_built(story: Story) -> None:
    one, *_ = (did for did in story.last.steps.values() if did.state == "built")
    for steps, said in (
        ({"a": one}, "all of it built"),
        ({"a": one, "b": replace(one, state="reused")}, "1 of 2 targets"),
    ):
        assert said in parsed(replace(story, last=replace(story.last, steps=steps))).words()


def test_lines_of_the_recipe_that_changed_are_marked(story: Story) -> None:
    root = parsed(story)
    assert ["rank = 2" in each.words() for each in root.all("del")] == [True]
    assert ["rank = 4" in each.words() for each in root.all("ins")] == [True]
    assert changed_lines("a\nb", "b\nc") == [("-", "a"), ("=", "b"), ("+", "c")]


def test_the_first_build_says_that_there_is_no_earlier_one(story: Story) -> None:
    words = parsed(replace(story, before=None)).words()
    assert "There is no earlier build to compare with yet." in words
    assert "The first build." in words


def test_a_licence_that_an_input_contradicts_stands_at_the_top(story: Story) -> None:
    reason = "`ink` is under CC-BY-NC-4.0: it forbids commercial use, and CC0-1.0 allows it"
    header = parsed(replace(story, against=[reason])).all("header")[0]
    assert [each.words() for each in header.all("span") if each.attributes.get("class") == "warning"]


def test_what_its_checks_said_stands_in_it(story: Story) -> None:
    result = {"check": "alike", "kind": "likeness", "state": "passed", "says": "ssim 0.91 <of 0.8>"}
    passed = parsed(replace(story, preset=story.preset | {"checks": {"state": "passed", "results": [result]}}))
    assert any("alike" in each.words() and "ssim 0.91 <of 0.8>" in each.words() for each in passed.all("tr"))
    skipped = parsed(replace(story, preset=story.preset | {"checks": {"state": "skipped", "results": []}}))
    assert "without its checks" in skipped.words()


def test_24_pictures_of_real_size_stay_below_two_megabytes(story: Story) -> None:
    noise = [picture(i, 256) for i in range(2)]  # noise: no real picture compresses as badly
    rows = [Row("a drawing", seed, "", [f"{seed}-{i}" for i in range(3)]) for seed in range(8)]
    text = page(replace(story, rows=rows), lambda name: noise[int(name[-1]) % 2], Path())
    assert text.count("<img ") >= 24
    assert len(text.encode()) < 2_000_000


def test_pictures_keep_their_size_where_there_is_room() -> None:
    few = Pictures(["a"], lambda _: picture(0, 64))
    assert few.size("a") == (64, 64)
    one = len(few.small["a"][0])
    assert one < BUDGET
    assert STEPS[0][0] == max(edge for edge, _ in STEPS)


def test_a_picture_that_is_lost_leaves_its_place_empty(story: Story) -> None:
    root = Parsed(page(story, lambda name: picture(1) if name == "1-2" else b"", Path())).root
    assert [each.text for each in root.all("span") if each.attributes.get("class") == "none"] == ["not drawn"] * 5


def test_equal_stories_are_equal_pages(story: Story) -> None:
    def once() -> str:
        return page(story, lambda name: picture(len(name)), Path())

    assert once() == once()


def test_grids_of_its_sweeps_are_shown(story: Story, tmp_path: Path) -> None:
    sweep = tmp_path / "toy@pastel"
    sweep.mkdir()
    (sweep / "grid.png").write_bytes(picture(1))
    axes = [{"key": "bake.style", "values": [0.4, 0.8]}, {"key": "<seed>", "values": [1]}]
    (sweep / "preset.json").write_text(json.dumps({"grid": {"file": "grid.png", "axes": axes}}))
    root = parsed(story, tmp_path / "toy")
    assert [each.text for each in root.all("figcaption")] == ["bake.style = 0.4, 0.8 × <seed> = 1"]
    assert not parsed(story, tmp_path / "other").all("figure")


@pytest.mark.parametrize("about", ["{", "[1]", '{"grid": {}}', '{"grid": {"axes": []}}'])
def test_what_lies_in_a_grids_place_and_is_none_is_left_out(story: Story, tmp_path: Path, about: str) -> None:
    sweep = tmp_path / "toy@share"
    sweep.mkdir()
    (sweep / "preset.json").write_text(about)
    (sweep / "grid.png").write_bytes(b"no picture")
    assert not parsed(story, tmp_path / "toy").all("figure")


# -- drawings ----------------------------------------------------------------------------------------------------------


def test_arrows_run_under_no_box() -> None:
    chain = [Box(f"b{i}", f"b{i}", "", "built", "built", (f"b{i - 1}",) if i else ()) for i in range(4)]
    chain[3] = replace(chain[3], inputs=("b2", "b0", "b1"))
    layout = _Layout(chain)
    lanes = [each for standing in layout.standing for each in standing if isinstance(each, tuple)]
    assert sorted(lanes) == [("b0", 1), ("b0", 2), ("b1", 2)]
    for start, x in lanes:
        boxes = [layout.corner(box.id) for box in chain if layout.column[box.id] == x]
        assert all(not top < layout.middle[start, x] < top + HEIGHT for _, top in boxes)


def test_a_box_stands_right_of_all_that_it_is_made_from() -> None:
    boxes = [Box("a", "a", "", "source", ""), Box("b", "b", "", "source", "")]
    boxes += [Box("c", "c", "", "built", "built", ("a",)), Box("d", "d", "", "built", "built", ("b", "c"))]
    layout = _Layout(boxes)
    assert layout.column == {"a": 0, "b": 1, "c": 1, "d": 2}
    assert layout.width == 3 * WIDTH + 2 * ACROSS


def test_the_recommended_step_is_marked_where_it_is() -> None:
    losses = [1 / (i + 1) for i in range(100)]
    drawn = Parsed(loss_drawing(losses, [(20, 0.5), (60, 0.3), (100, 0.4)], 60, "Loss of style")).root
    (line,) = (each for each in drawn.all("line") if each.attributes.get("class") == "best")
    circles = [float(str(each.attributes["cx"])) for each in drawn.all("circle")]
    assert float(str(line.attributes["x1"])) == circles[1]
    assert "step 60 is recommended" in [each.text for each in drawn.all("text")]
    assert "on held-out pictures 0.5000 to 0.4000; step 60 is recommended" in drawn.all("desc")[0].text


def test_no_step_is_recommended_where_none_did_better_than_the_checkpoint(story: Story) -> None:
    worse = [replace(each, validation=[(0, 0.1), (5, 0.2)], recommended=None) for each in story.trainings]
    for told in parsed(replace(story, trainings=worse)).all("article"):
        assert "On held-out pictures no step did better than the checkpoint itself." in [p.text for p in told.all("p")]
        assert not [each for each in told.all("line") if each.attributes.get("class") == "best"]


def test_a_training_whose_losses_are_lost_is_told_without_them(story: Story) -> None:
    lost = [replace(each, losses=[], steps=0) for each in story.trainings]
    told = parsed(replace(story, trainings=lost)).all("article")
    assert len(told) == len(lost) > 0
    assert all("Its losses are not in the cache any more." in each.words() for each in told)
    assert not [each for article in told for each in article.all("svg")]


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5], [float(i) for i in range(5000)], [1e-9, 2e-9]])
def test_curves_of_any_length_and_range_stay_within_the_drawing(losses: list[float]) -> None:
    drawn = Parsed(loss_drawing(losses, [], None, "Loss")).root
    for line in drawn.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in str(line.attributes["points"]).split()]
        assert 1 <= len(points) <= MOST
        assert all(0 <= x <= 720 and 0 <= y <= 230 for x, y in points)


def test_markup_escapes_all_that_is_not_markup() -> None:
    made = element("p", "<b>", element("b", "&"), title='"', hidden=True, class_=None)
    assert made == '<p title="&quot;" hidden>&lt;b&gt;<b>&amp;</b></p>'
    assert text("a\x00b") == "a�b"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_chromium_shows_it_without_a_complaint(story: Story, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(hostile(story), lambda name: picture(crc32(name.encode())), tmp_path), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'chromium'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("<section") == 6
    assert done.stdout.count("<script") == 0
    assert "CONSOLE" not in done.stderr
