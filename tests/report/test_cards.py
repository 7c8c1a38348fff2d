"""What is published with a preset: the hub's model card, Civitai's description and fields."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from sdforge.chronicle import Did
from sdforge.report.card import card, civitai_description, civitai_fields, code, fenced, mermaid, plain
from sdforge.report.story import Made, Source, Story
from tests.report.conftest import HOSTILE, Parsed, everything

DRAWN = Made("toy:preset.previews", "preset.previews", "previews", Did("k", "d", "built"), [], 1.0, 1)


@pytest.fixture
def published(story: Story) -> Story:
    """A preset with previews, one base of which is from the hub."""
    hub = Source("flat", "checkpoint", "hf://org/flat-base@0123/x.safetensors", "ab" * 32, 1, "cc-by-nc-4.0")
    return replace(story, sources=[hub, *story.sources[1:]], made=[*story.made, DRAWN])


def test_the_hub_reads_what_stands_before_the_card(published: Story) -> None:
    data = ModelCard(card(published)).data
    assert data.base_model == ["org/flat-base"]
    assert data.base_model_relation == "merge"
    assert data.license == "cc0-1.0"
    assert {"merge", "lora", "sd15", "text-to-image"} <= set(data.tags or [])
    assert data.instance_prompt == "toyword"
    assert data.widget == [{"text": "a drawing", "output": {"url": "previews/1-1-toy.png"}}]


def test_a_licence_that_the_hub_does_not_know_is_other_there(published: Story) -> None:
    data = ModelCard(card(replace(published, settings=published.settings | {"licence": "NoobAI"}))).data
    assert (data.license, data.license_name) == ("other", "NoobAI")


def test_whatever_people_wrote_the_front_matter_is_read(published: Story) -> None:
    settings = published.settings | {"trigger": [HOSTILE], "licence": HOSTILE}
    drawn_with = published.drawn_with | {"prompts": [f"---\n{HOSTILE}"]}
    found = ModelCard(card(replace(published, settings=settings, drawn_with=drawn_with)))
    assert found.data.instance_prompt == HOSTILE
    assert found.data.widget[0]["text"] == f"---\n{HOSTILE}"
    assert "<script>" not in found.text.replace(f"`{HOSTILE.split('`')[0]}", "").partition("## How to use")[0]


def test_it_says_how_to_use_it_and_how_it_was_made(published: Story) -> None:
    text = card(published)
    assert "Trigger words: `toyword`" in text
    assert "Clip skip: 1 in diffusers, 2 in A1111" in text
    assert "Negative prompt: `blurry`" in text
    assert "CDCDCDCDCD" in text
    assert "0123456789AB" in text
    assert mermaid(published) in text
    assert published.last.recipe.strip() in text
    assert 'sdforge.load_preset("toy")' in text


def test_a_preset_that_was_not_checked_says_so(published: Story) -> None:
    assert "\n`forge build --locked toy` makes the same again." in card(published)
    unchecked = replace(published, preset=published.preset | {"checks": {"state": "skipped"}})
    assert "Its checks were skipped: `forge build --locked --no-checks toy`" in card(unchecked)


def test_every_input_of_the_graph_has_an_arrow(published: Story) -> None:
    assert mermaid(published).count("-->") == sum(len(each.inputs) for each in published.made)


def test_words_of_people_cannot_leave_their_place_in_markdown() -> None:
    assert plain("a | b\n# <i> [x](y) `z`") == r"a \| b # &lt;i&gt; \[x\]\(y\) \`z\`"
    assert code("a`b") == "`` a`b ``"
    assert code("a|b") == r"`a\|b`"
    assert fenced("```\nx", "toml").startswith("````toml\n```")


def test_civitais_description_has_no_elements_but_ours(published: Story) -> None:
    hostile = replace(
        published,
        about=HOSTILE,
        settings=published.settings | {"trigger": [HOSTILE]},
        made=[replace(each, name=HOSTILE) for each in published.made],
    )
    tags = {each.tag for each in everything(Parsed(civitai_description(hostile)).root)}
    assert tags - {""} == {"p", "code", "h3", "ul", "li", "strong"}


def test_civitais_fields_are_one_a_line(published: Story) -> None:
    lines = civitai_fields(replace(published, title="a\nb")).splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert found["Name"] == "a b"
    assert found["Type"] == "Checkpoint, merge"
    assert found["Base model"] == "SD 1.5"
    assert found["Trigger words"] == "toyword"
    assert found["Clip skip"] == "2"
    assert found["AutoV2 of toy.safetensors"] == "CDCDCDCDCD"
    unsaid = [replace(source, licence="") for source in published.sources[:1]]
    assert "flat: not stated\n" in civitai_fields(replace(published, sources=unsaid))


def test_the_example_of_the_card_is_python(published: Story) -> None:
    drawn_with = published.drawn_with | {"prompts": [HOSTILE]}
    text = card(replace(published, drawn_with=drawn_with))
    block = text.partition("python\n")[2].partition("\n```")[0]
    compile(block, "card", "exec")
    assert json.dumps("toy") in block
