"""Checkpoints of all families as sources of a project: planned without torch, a wrong pair refused in one line."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sdforge.advice import advice
from sdforge.cli import main
from sdforge.errors import RecipeError
from sdforge.housekeeping import clean
from sdforge.ref import Ref
from sdforge.run.tensors import load
from sdforge.session import Session, open_session
from tests.families.loras import LINEAR, NARROW, random_lora, write_kohya
from tests.families.toys import write_family
from tests.families.workbench import same_bytes, take, vocabulary, write_toy
from tests.formats.conftest import export
from tests.toys import write_drawings

PROJECTION = "text_projection.weight"  # an OpenCLIP file holds it transposed


@pytest.fixture
def root(toys: Path, tmp_path: Path) -> Path:
    """A project with a single file of SDXL, another one without a word of its own, and a folder of 1.x."""
    taken = take(write_family(toys / "sdxl", "sdxl"))
    file = export(tmp_path / "written", taken, ["checkpoint"], {}) / "checkpoint.safetensors"
    file.rename(tmp_path / "large.safetensors")
    shutil.copytree(write_toy(toys / "toy", seed=1), tmp_path / "small")
    shutil.copytree(toys / "sdxl" / "tokenizer", tmp_path / "words")
    sources = {"large": "large.safetensors", "small": "small", "words": "words"}
    lines = [f'[source.{name}]\nfrom = "{place}"\n' for name, place in sources.items()]
    (tmp_path / "forge.toml").write_text("".join(lines))
    (tmp_path / "recipes").mkdir()
    return tmp_path


def planned(root: Path, text: str) -> Session:
    (root / "recipes" / "r.toml").write_text(f'family = "sdxl"\n{text}')
    session = open_session(root)
    session.plan(session.resolve(["r:made"]))
    return session


MERGE = '[weighted_sum.made]\ncheckpoints = ["large", "{other}"]\nweights = [0.5, 0.5]\n'


def test_a_wrong_pair_is_refused_by_the_plan(root: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(root, MERGE.format(other="small"))
    (problem,) = caught.value.problems  # that its widths are others follows from it
    assert problem.message == "`small` is for Stable Diffusion 1.x, and the recipe is for Stable Diffusion XL"
    assert problem.hint == 'take one for Stable Diffusion XL, or family = "sd15" at the top of the recipe'


def test_a_part_of_another_familys_checkpoint_is_one_mistake(root: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(root, '[swap.made]\ncheckpoint = "large"\nvae = "small"\n')
    assert [problem.code for problem in caught.value.problems] == ["family"]


def test_a_transposed_matrix_is_kept_in_the_store_and_stays_there(root: Path, toys: Path) -> None:
    session = planned(root, MERGE.format(other="large"))
    artifact = session.planner().steps["r:made"].inputs[0][1]
    assert artifact is not None
    tensor = next(t for t in session.store.table(artifact.components["text_encoder_2"]) if t.name == PROJECTION)
    expected = take(toys / "sdxl").tensors("text_encoder_2")[PROJECTION]
    for _ in range(2):
        assert tensor.spot is not None
        path = session.store.find(tensor.spot.file)
        assert path == session.store.object(tensor.sha256)
        assert path is not None
        found = load(Ref(tensor.name, tensor.dtype, tensor.shape, str(path), tensor.spot.offset, tensor.xxh3))
        assert same_bytes(found, expected)
        clean(session, argparse.Namespace(dry_run=False, trained=True, json=False))


def test_a_tokenizers_folder_gives_a_single_file_its_words(root: Path) -> None:
    session = planned(root, '[swap.made]\ncheckpoint = "large"\ntokenizer = "words"\n')
    artifact = session.planner().steps["r:made"].artifact
    assert artifact is not None
    assert session.store.vocabulary(artifact.components["tokenizer"]) == vocabulary()
    assert set(artifact.components) == {"unet", "text_encoder", "text_encoder_2", "vae", "tokenizer"}


WORDLESS = """family = "image_variations"

[lora.line]
on = "shown"
dataset = "drawings"

[null_text_inversion.again]
on = "shown"
image = "photo"
prompt = "a house"

[class_images.houses]
on = "shown"
prompt = "a house"

[clip_inversion.found]
on = "shown"
dataset = "drawings"

[preset]
checkpoint = "shown"
sidecars = ["found"]

[preset.previews]
prompts = ["a house"]
"""


def test_words_to_a_base_that_is_shown_pictures_are_refused_in_the_plan(root: Path, toys: Path) -> None:
    shutil.copytree(write_family(toys / "image_variations", "image_variations"), root / "shown")
    write_drawings(root / "drawings")
    with (root / "forge.toml").open("a") as file:
        file.write('[source.shown]\nfrom = "shown"\n[source.photo]\nfrom = "drawings/0.png"\n')
        file.write('[dataset.drawings]\npath = "drawings"\ntrigger = "cat"\n')
    (root / "recipes" / "r.toml").write_text(WORDLESS)
    session = open_session(root)
    session.open_recipes(["r"])
    found = advice(session, session.plan(list(session.graph.nodes)))
    said = [(p.place.line, p.message.partition("Stable")[0]) for p in found if p.place and not p.warning]
    assert said == [
        (4, "what learns from captions cannot be trained on `shown`: "),
        (8, "null-text inversion cannot be trained on `shown`: "),
        (13, "`shown` is shown pictures and understands no words ("),
        (21, "`shown` is shown pictures and understands no words ("),
    ]
    silent = WORDLESS[WORDLESS.index("[clip") :].replace('"a house"', '""')
    (root / "recipes" / "r.toml").write_text(f'family = "image_variations"\n{silent}')
    session = open_session(root)
    session.open_recipes(["r"])
    assert advice(session, session.plan(list(session.graph.nodes))) == []


def test_a_lora_of_the_family_beneath_fits_a_base_that_is_shown_pictures(root: Path, toys: Path) -> None:
    shutil.copytree(write_family(toys / "image_variations", "image_variations"), root / "shown")
    lora = random_lora(take(root / "small"), (LINEAR, NARROW))
    write_kohya(root / "line.safetensors", lora)
    with (root / "forge.toml").open("a") as file:
        file.write('[source.shown]\nfrom = "shown"\n[source.line]\nfrom = "line.safetensors"\n')
    bake = '[bake.made]\ncheckpoint = "shown"\nloras.line = { strength = 0.5 }\n'
    (root / "recipes" / "r.toml").write_text(f'family = "image_variations"\n{bake}')
    session = open_session(root)
    session.plan(session.resolve(["r:made"]))
    assert {artifact.family for _, artifact in session.planner().steps["r:made"].inputs if artifact} == {
        "image_variations",
        "sd15",
    }
    with pytest.raises(RecipeError, match="the recipe is for Stable Diffusion XL"):
        planned(root, bake.replace("shown", "large"))


def test_what_is_assumed_of_a_base_is_said_and_how_to_say_otherwise(
    root: Path, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in the tensors of Stable Diffusion 2 tells ε from v."""
    written = export(root / "two", take(write_family(toys / "sd2", "sd2")), ["checkpoint"], {})
    tensors = load_file(written / "checkpoint.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "v_pred"}, root / "bare.safetensors")
    targets = [f'[cast.{name}]\ncheckpoint = "bare"\ndtype = "{name}"\n' for name in ("fp32", "bf16")]
    recipe = "".join(['family = "sd2"\n', *targets])
    (root / "recipes" / "r.toml").write_text(recipe)

    def said(statement: str) -> tuple[str, str]:
        (root / "forge.toml").write_text(f'[source.bare]\nfrom = "bare.safetensors"\n{statement}\n')
        capsys.readouterr()
        assert main(["-C", str(root), "check"]) == 0
        checked = capsys.readouterr().err
        assert main(["-C", str(root), "plan", "r:fp32"]) == 0
        return checked, capsys.readouterr().out

    checked, planned_ = said("")
    assert checked.count("`bare`: prediction is taken to be epsilon, since nothing in the file says otherwise") == 1
    assert '"v_prediction"' in checked
    assert "note: `bare`: prediction is taken to be epsilon" in planned_
    for statement in ('prediction = "epsilon"', 'prediction = "v_prediction"'):
        checked, planned_ = said(statement)
        assert "prediction is taken" not in checked + planned_


def test_a_source_states_that_a_base_was_distilled_without_guidance(root: Path) -> None:
    session = planned(root, '[cast.made]\ncheckpoint = "large"\ndtype = "fp32"\n')
    assert session.planner().steps["r:made"].artifact.facts.get("guidance_free") is None  # type: ignore[union-attr]
    text = (root / "forge.toml").read_text()
    (root / "forge.toml").write_text(
        text.replace('"large.safetensors"\n', '"large.safetensors"\nguidance_free = true\n')
    )
    session = planned(root, '[cast.made]\ncheckpoint = "large"\ndtype = "fp32"\n')
    assert session.planner().steps["r:made"].artifact.facts["guidance_free"] is True  # type: ignore[union-attr]
