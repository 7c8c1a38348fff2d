"""Previews: the same picture for the same wish, whatever it is drawn beside, with its parameters in the file."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdforge.edits.previews import run
from sdforge.edits.previews.draw import save_png
from sdforge.errors import ActionFailed
from sdforge.order import Order, Outcome
from sdforge.plan import Step
from sdforge.report.progress import JsonLines, Plain
from sdforge.run.sample import Wish
from sdforge.session import Session, open_session
from sdforge.store.entries import Result
from tests.families.workbench import Taken, keep

SETTINGS: dict[str, Any] = {
    "prompts": ["a red cat", "a house"],
    "seeds": [1, 7],
    "negative_prompt": "drawing",
    "steps": 2,
    "guidance": 5.0,
    "resolution": 0,
    "clip_skip": 0,
}


def drawn(work: Path, checkpoint: Taken, *beside: Taken, **settings: Any) -> Outcome:
    work.mkdir()
    inputs = {"checkpoint": [checkpoint.given()], "beside": [each.given() for each in beside]}
    how = {"device": "cpu", "threads": 1}
    return run(
        Order("", "", "previews", "edits", "sd15", SETTINGS | settings, str(work), inputs, how=how), lambda **_: None
    )


@pytest.fixture(scope="module")
def outcome(toy: Taken, other: Taken, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    work = tmp_path_factory.mktemp("previews") / "work"
    return work, drawn(work, toy, other)


def test_there_is_a_picture_for_every_prompt_seed_and_checkpoint(
    outcome: tuple[Path, Outcome], toy: Taken, other: Taken
) -> None:
    work, made = outcome
    columns = [each.artifact.digest[:16] for each in (toy, other)]
    assert set(made.files) == {f"{c}/{p}-{s}.png" for c in columns for p in (1, 2) for s in (1, 7)}
    assert len({sha for sha, _ in made.files.values()}) == 8
    for name, (sha, size) in made.files.items():
        data = (work / name).read_bytes()
        assert (sha, size) == (hashlib.sha256(data).hexdigest(), len(data))
        assert Image.open(work / name).size == (64, 64)


def test_a_picture_does_not_depend_on_what_it_is_drawn_beside(
    outcome: tuple[Path, Outcome], toy: Taken, tmp_path: Path
) -> None:
    work, _ = outcome
    alone = drawn(tmp_path / "alone", toy, prompts=["a red cat"], seeds=[7])
    (name,) = alone.files
    a, b = (torch.tensor(list(Image.open(folder / name).tobytes())) for folder in (work, tmp_path / "alone"))
    assert int((a - b).abs().max()) <= 1  # batches of another size may round elsewhere


def test_drawing_again_gives_the_same_files(
    outcome: tuple[Path, Outcome], toy: Taken, other: Taken, tmp_path: Path
) -> None:
    assert drawn(tmp_path / "again", toy, other).files == outcome[1].files


def test_drawing_leaves_the_global_generator_alone(toy: Taken, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    drawn(tmp_path / "x", toy, prompts=["a red cat"], seeds=[1])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        (
            Wish("cat", "x", 3, 12, 4.5, 64, 1),
            "cat\nNegative prompt: x\nSteps: 12, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 3, Size: 64x64, Clip skip: 2",
        ),
        (
            Wish("a cat", "", 3, 12, 7.0, 64),
            "a cat\nSteps: 12, Sampler: DPM++ 2M, CFG scale: 7, Seed: 3, Size: 64x64",
        ),
    ],
)
def test_a_png_says_how_it_was_drawn_as_a1111_writes_it(wish: Wish, text: str, tmp_path: Path) -> None:
    save_png(tmp_path / "x.png", torch.zeros(3, 64, 64), wish)
    picture = Image.open(tmp_path / "x.png")
    assert picture.info == {"parameters": text}


def test_a_png_says_its_own_size(tmp_path: Path) -> None:
    """A picture that was inverted is drawn again in its own shape."""
    save_png(tmp_path / "x.png", torch.zeros(3, 32, 96), Wish("a cat", "", 0, 2, 7.5, 64))
    assert Image.open(tmp_path / "x.png").info["parameters"].endswith("Size: 96x32")


def test_colours_beyond_the_range_are_cut(tmp_path: Path) -> None:
    pixels = torch.stack([torch.full((8, 8), value) for value in (-3.0, 0.0, 3.0)])
    save_png(tmp_path / "x.png", pixels, Wish("", "", 0, 1, 1, 8))
    assert Image.open(tmp_path / "x.png").getpixel((0, 0)) == (0, 128, 255)


class Louder:
    """A sidecar that takes part in every picture: what the U-Net is told is told twice as loud."""

    def attach(self, diffusion: Any, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Any:
        def louder(_: Any, inputs: Any) -> Any:
            return (inputs[0] * tensors["louder"] * facts["by"], *inputs[1:])

        hooks = [m.register_forward_pre_hook(louder) for n, m in diffusion.unet.named_modules() if n.endswith("to_k")]
        return lambda: [hook.remove() for hook in hooks]

    def attach_pipeline(self, pipeline: Any, tensors: Any, facts: Any) -> None: ...


NULL_TEXT = {"prompt": "a red cat", "guidance": 7.5, "steps": 2, "resolution": 64, "spacing": "leading"}


@pytest.fixture
def sidecars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Taken]:
    monkeypatch.setitem(sys.modules, "sdforge.sidecars.hypernetwork", Louder())  # type: ignore[arg-type]
    louder = {"hypernetwork": {"louder": torch.tensor(3.0)}}
    found = {"null_text": {"uncond": torch.ones(2, 77, 16), "start": torch.ones(1, 4, 8, 8)}}
    return [
        keep(tmp_path / "louder", louder, kind="hypernetwork", facts={"by": 2.0}),
        keep(tmp_path / "found", found, kind="null_text", facts=NULL_TEXT),
    ]


def drawn_with(work: Path, checkpoint: Taken, sidecars: list[Taken]) -> Outcome:
    work.mkdir()
    inputs = {"checkpoint": [checkpoint.given()], "sidecars": [each.given() for each in sidecars]}
    how = {"device": "cpu", "threads": 1}
    order = Order("", "", "previews", "edits", "sd15", SETTINGS | {"seeds": [1]}, str(work), inputs, how=how)
    return run(order, lambda **_: None)


def test_sidecars_take_part_in_a_column_of_their_own(
    toy: Taken, sidecars: list[Taken], outcome: tuple[Path, Outcome], tmp_path: Path
) -> None:
    louder = sidecars[0]
    made = drawn_with(tmp_path / "work", toy, [louder])
    column = toy.artifact.digest[:16]
    assert set(made.files) == {f"{column}{end}/{p}-1.png" for end in ("", "-with") for p in (1, 2)}
    for p in (1, 2):
        plain = made.files[f"{column}/{p}-1.png"]
        assert plain == outcome[1].files[f"{column}/{p}-1.png"]  # as it is drawn where there is none
        assert plain != made.files[f"{column}-with/{p}-1.png"]


def test_a_sidecar_with_pictures_of_its_own_adds_them_and_an_edit_for_every_prompt(
    toy: Taken, sidecars: list[Taken], tmp_path: Path
) -> None:
    cat = sidecars[1]
    made = drawn_with(tmp_path / "work", toy, [cat])
    column, own = toy.artifact.digest[:16], cat.artifact.digest[:16]
    expected = {f"{column}/{p}-1.png" for p in (1, 2)}  # what it leaves as it is is drawn once
    expected |= {f"{column}{end}/{own}-{p}.png" for end in ("", "-with") for p in (0, 1, 2)}
    assert set(made.files) == expected
    same = [made.files[f"{column}-with/{own}-{p}.png"] for p in (0, 1)]  # its own prompt is the first one too
    assert same[0][0] == same[1][0]
    text = Image.open(tmp_path / "work" / f"{column}-with/{own}-0.png").info["parameters"]
    assert text == "a red cat\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 64x64"


def test_several_sidecars_are_attached_together_and_taken_off_again(
    toy: Taken, sidecars: list[Taken], tmp_path: Path
) -> None:
    both = drawn_with(tmp_path / "both", toy, sidecars)
    alone = drawn_with(tmp_path / "alone", toy, sidecars[:1])
    assert {name: row for name, row in both.files.items() if name in alone.files} == alone.files


# -- a VAE that draws nothing, or would in fp16 ------------------------------------------------------------------------


def with_vae(work: Path, toy: Taken, **changes: Any) -> Taken:
    """Return the toy with all numbers of some tensors of its VAE (dots as two underscores) set to one."""
    vae = toy.tensors("vae")
    for name, value in changes.items():
        vae[name.replace("__", ".")] = torch.full_like(vae[name.replace("__", ".")], value)
    parts = {"unet": toy.tensors("unet"), "text_encoder": toy.tensors("text_encoder"), "vae": vae}
    return keep(work, parts, facts=toy.artifact.facts, words=toy.vocabulary)


ONE: dict[str, Any] = {"prompts": ["a red cat"], "seeds": [1], "steps": 1}


def test_activations_that_fp16_cannot_hold_are_told_with_the_layer_and_the_way_out(toy: Taken, tmp_path: Path) -> None:
    """65504 is the largest number of fp16; the picture itself is whole, as it is drawn in fp32."""
    loud = with_vae(tmp_path / "vae", toy, decoder__conv_in__weight=2000.0)
    made = drawn(tmp_path / "work", loud, **ONE)
    ((what, hint),) = made.record["warnings"]
    assert re.fullmatch(r"the VAE's decoder\.\S+ reaches .*, and fp16 ends at 65504: programs that .* black .*", what)
    assert "[swap.NAME]" in hint
    assert "[cast.NAME]" in hint
    assert made.record["vae_peak"][0] > 65504


def test_a_prompt_of_which_the_end_is_not_read_is_told(toy: Taken, tmp_path: Path) -> None:
    long = "red " * 76
    made = drawn(tmp_path / "work", with_vae(tmp_path / "vae", toy), **ONE | {"prompts": ["red", long]})
    ((what, hint),) = made.record["warnings"]
    assert what.startswith(f"the prompt {long[:60]!r}… is longer than the 75 tokens")
    assert "shorten it" in hint


def test_a_vae_that_is_kept_in_more_bits_or_is_quiet_is_not_warned_of(toy: Taken, tmp_path: Path) -> None:
    quiet = drawn(tmp_path / "quiet", with_vae(tmp_path / "a", toy), **ONE)
    assert 0 < quiet.record["vae_peak"][0] < 65504
    assert "warnings" not in quiet.record
    loud = with_vae(tmp_path / "b", toy, decoder__conv_in__weight=2000.0)
    vae = {name: tensor.float() for name, tensor in loud.tensors("vae").items()}
    parts = {"unet": toy.tensors("unet"), "text_encoder": toy.tensors("text_encoder"), "vae": vae}
    wide = keep(tmp_path / "c", parts, facts=toy.artifact.facts, words=toy.vocabulary)
    assert "warnings" not in drawn(tmp_path / "wide", wide, **ONE).record


def test_a_black_picture_stops(toy: Taken, tmp_path: Path) -> None:
    dark = with_vae(tmp_path / "vae", toy, decoder__conv_out__weight=0.0, decoder__conv_out__bias=-3.0)
    with pytest.raises(ActionFailed, match="'a red cat' is black all over") as caught:
        drawn(tmp_path / "work", dark, **ONE)
    assert "[swap.NAME] with `vae" in caught.value.hint


def test_a_picture_of_one_colour_stops_unless_it_is_wanted(toy: Taken, tmp_path: Path) -> None:
    grey = with_vae(tmp_path / "vae", toy, decoder__conv_out__weight=0.0, decoder__conv_out__bias=0.2)
    with pytest.raises(ActionFailed, match="'a red cat' is of one colour all over") as caught:
        drawn(tmp_path / "work", grey, **ONE)
    assert 'one_colour = "allow"' in caught.value.hint
    assert len(drawn(tmp_path / "wanted", grey, **ONE, one_colour="allow").files) == 1


def test_a_picture_that_is_no_picture_stops_with_the_layer_where_it_began(toy: Taken, tmp_path: Path) -> None:
    sick = with_vae(tmp_path / "vae", toy, decoder__mid_block__resnets__0__conv1__bias=float("nan"))
    with pytest.raises(ActionFailed, match=r"the VAE's decoder\.mid_block\.resnets\.0\.conv1 makes NaN or Inf"):
        drawn(tmp_path / "work", sick, **ONE)


def test_a_unet_that_draws_no_numbers_is_not_laid_at_the_vaes_door(toy: Taken, tmp_path: Path) -> None:
    unet = toy.tensors("unet")
    unet["conv_out.bias"] = torch.full_like(unet["conv_out.bias"], float("nan"))
    parts = {"unet": unet, "text_encoder": toy.tensors("text_encoder"), "vae": toy.tensors("vae")}
    sick = keep(tmp_path / "unet", parts, facts=toy.artifact.facts, words=toy.vocabulary)
    with pytest.raises(ActionFailed, match="what the U-Net draws for 'a red cat' holds NaN or Inf"):
        drawn(tmp_path / "work", sick, **ONE)


def test_a_build_says_what_a_result_warns_of(toy: Taken, toys: Path, tmp_path: Path) -> None:
    assert toy.artifact.kind == "checkpoint"
    shutil.copytree(toys / "toy", tmp_path / "toy")
    (tmp_path / "recipes").mkdir()
    recipe = 'family = "sd15"\n[preset]\ncheckpoint = "toy"\n[preset.previews]\nprompts = ["a cat"]\n'
    (tmp_path / "recipes" / "x.toml").write_text(recipe)
    (tmp_path / "forge.toml").write_text('[source.toy]\nfrom = "toy"\n')
    session = open_session(tmp_path)
    step = session.plan(session.resolve(["x"])).steps["x:preset.previews"]
    warned = {"warnings": [["something is loud", "make it quiet"]]}
    result = Result("key", "digest", "pictures", "sd15", record=warned)
    lines = io.StringIO()
    Plain(lines).finished(step, result, 1.0)
    assert "! something is loud\n      try   make it quiet\n" in lines.getvalue().replace("▲", "!")
    assert event_of(session, step, result)["warnings"] == [{"message": "something is loud", "hint": "make it quiet"}]
    assert "warnings" not in event_of(session, step, Result("key", "digest", "pictures", "sd15"))


def event_of(session: Session, step: Step, result: Result) -> dict[str, Any]:
    stream = io.StringIO()
    JsonLines(stream, session).finished(step, result, 1.0)
    found: dict[str, Any] = json.loads(stream.getvalue())
    return found
