"""Every family, on toys that diffusers wrote: it says what diffusers' own pipelines say, draws, and is written back."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdforge.errors import UsageError
from sdforge.families import family
from sdforge.file_layout import ALIGN
from sdforge.formats.tokenizer import END
from sdforge.run.adapter import Batch
from sdforge.run.diffusion import Conditioning, Diffusion, TokenTable, text_model
from sdforge.run.images import Picture
from sdforge.run.sample import Wish, sample
from tests.families.toys import TOYS, write_family
from tests.families.workbench import Taken, take
from tests.formats.conftest import export

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "drawing of a house, über " + "red " * 90]
BYTES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def ours(each: Taken) -> Diffusion:
    return load(each)


@pytest.fixture(scope="module")
def stock(each: Taken, toys: Path) -> Any:
    name = each.artifact.family
    return pipeline(toys / ("toy" if name == "sd15" else name), name)


@pytest.fixture(scope="module")
def written(each: Taken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("written"), each, ["checkpoint", "diffusers"], {})


def load(taken: Taken, **changes: Any) -> Diffusion:
    loaded = importlib.import_module(f"sdforge.families.{taken.artifact.family}.load").load
    found: Diffusion = loaded(dataclasses.replace(taken.given(), **changes), CPU, torch.float32)
    return found


def pipeline(folder: Path, name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, family(name).pipeline)
    return kind.from_pretrained(folder, dtype=torch.float32)


def pictures() -> Tensor:
    return BYTES / 127.5 - 1


def told(diffusion: Diffusion) -> Conditioning:
    """What two prompts, or two pictures, say."""
    if diffusion.family.image_embeddings:
        return diffusion.imagine(diffusion.encode_image(pictures()), PROMPTS if diffusion.text_encoders else None)
    return diffusion.encode_text(PROMPTS)


def stock_told(stock: Any, name: str) -> tuple[Tensor, dict[str, Any]]:
    """What diffusers' pipelines pass to their U-Net for the same."""
    if name == "image_variations":
        pixels = stock.feature_extractor(list(BYTES), return_tensors="pt")
        return stock._encode_image(pixels.pixel_values, CPU, 1, False), {}
    if name == "sdxl":
        hidden, _, pooled, _ = stock.encode_prompt(PROMPTS, device=CPU, do_classifier_free_guidance=False)
        ids = stock._get_add_time_ids((64, 64), (0, 0), (64, 64), dtype=torch.float32, text_encoder_projection_dim=20)
        return hidden, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.repeat(2, 1)}}
    hidden, _ = stock.encode_prompt(PROMPTS, CPU, 1, False)
    if name != "unclip":
        return hidden, {}
    pixels = stock.feature_extractor(list(BYTES), return_tensors="pt")
    embeds = stock.image_encoder(pixels.pixel_values).image_embeds
    noised = stock.noise_image_embeddings(embeds, 0, noise=torch.zeros_like(embeds))
    return hidden, {"class_labels": noised}


@torch.no_grad()
def test_it_predicts_what_diffusers_own_pipeline_predicts(each: Taken, ours: Diffusion, stock: Any) -> None:
    latents, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
    hidden, more = stock_told(stock, each.artifact.family)
    theirs = stock.unet(latents, steps, encoder_hidden_states=hidden, **more).sample
    condition = told(ours)
    assert torch.allclose(condition.hidden_BLD, hidden, **CLOSE)
    assert torch.allclose(ours.predict(latents, steps, condition), theirs, **CLOSE)
    other = ours.predict(latents, steps, condition.take([1, 0]))
    assert not torch.allclose(other, theirs, atol=1e-3)


@torch.no_grad()
def test_each_row_of_a_batch_is_said_for_itself(ours: Diffusion) -> None:
    both = told(ours)
    again = Conditioning.stack([both.take([0]), both.take([1])])
    assert torch.equal(both.hidden_BLD, again.hidden_BLD)
    assert {name: value.shape for name, value in again.added.items()} == {n: v.shape for n, v in both.added.items()}


def test_it_draws_and_guidance_changes_what(ours: Diffusion) -> None:
    prompt = PROMPTS[0] if ours.text_encoders else ""
    images = ours.encode_image(pictures()).detach() if ours.family.image_embeddings else None
    drawn = []
    for guidance in (1.0, 4.0):
        wishes = [Wish(prompt, "", seed, 2, guidance, 64) for seed in (1, 2)]
        drawn.append(sample(ours, wishes, images))
    assert drawn[0].shape == (2, 3, 64, 64)
    assert all(bool(torch.isfinite(picture).all()) for picture in drawn)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-4)
    alone = sample(ours, [Wish(prompt, "", 2, 2, 4.0, 64)], None if images is None else images[1:])
    assert torch.allclose(alone[0], drawn[1][1], atol=1e-4)


def test_a_base_without_guidance_is_drawn_without(each: Taken) -> None:
    diffusion = load(each, facts=each.artifact.facts | {"guidance_free": True})
    images = torch.ones(1, 12) if diffusion.family.image_embeddings else None
    one, four = (sample(diffusion, [Wish("", "", 1, 1, guidance, 64)], images) for guidance in (1.0, 4.0))
    assert torch.equal(one, four)


def identities(taken: Taken) -> dict[str, str]:
    return {name: component.identity for name, component in taken.artifact.components.items()}


def test_its_file_and_its_folder_are_read_as_what_was_written(each: Taken, written: Path) -> None:
    for path in (written / "checkpoint.safetensors", written / "diffusers"):
        again = take(path)
        assert (again.artifact.family, again.artifact.facts) == (each.artifact.family, each.artifact.facts)
        assert identities(again) == identities(each)


@torch.no_grad()
def test_diffusers_opens_the_written_folder(each: Taken, ours: Diffusion, written: Path) -> None:
    theirs = pipeline(written / "diffusers", each.artifact.family)
    networks = {"unet": ours.unet, "vae": ours.vae, **ours.text_encoders}
    if ours.image_encoder:
        networks["image_encoder"] = ours.image_encoder
    for name, network in networks.items():
        expected, found = network.state_dict(), getattr(theirs, name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
    hidden, _ = stock_told(theirs, each.artifact.family)
    assert torch.allclose(told(ours).hidden_BLD, hidden, **CLOSE)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_diffusers_opens_the_written_file(each: Taken, written: Path, stock: Any) -> None:
    kind = type(stock)
    if not hasattr(kind, "from_single_file"):
        pytest.skip("diffusers opens no single file of this family; its converters of names are tested beside")
    theirs = kind.from_single_file(
        str(written / "checkpoint.safetensors"),
        config=str(written / "diffusers"),
        dtype=torch.float32,
        local_files_only=True,
    )
    parts = [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if part in each.tables]
    for part in parts:
        expected = getattr(stock, part).state_dict()
        found = {key.removeprefix("text_model."): t for key, t in getattr(theirs, part).state_dict().items()}
        assert all(torch.equal(found[key.removeprefix("text_model.")], tensor) for key, tensor in expected.items())


def test_learned_rows_reach_what_the_unet_is_told(each: Taken) -> None:
    diffusion = load(each)
    tables = diffusion.token_tables()
    assert list(tables) == list(diffusion.family.text_encoders)
    if not tables:
        with pytest.raises(UsageError, match="understands no words"):
            diffusion.words.add("<toy>", 2)
        return
    diffusion.words.add("<toy>", 2)
    for table in tables.values():
        assert isinstance(table, TokenTable)
        table.rows = torch.nn.Parameter(
            torch.randn(2, table.weight.shape[1], generator=torch.Generator().manual_seed(2))
        )
    condition = diffusion.encode_text(["a <toy> cat"])
    told_of = sum(value.square().sum() for value in (condition.hidden_BLD, *condition.added.values()))
    told_of.backward()  # type: ignore[union-attr]
    for table in tables.values():
        assert table.rows is not None
        assert table.rows.grad is not None
        assert bool((table.rows.grad != 0).any(1).all())
        assert table.weight.grad is None


def test_what_a_family_does_not_take_is_refused(ours: Diffusion) -> None:
    if not ours.family.image_embeddings:
        with pytest.raises(UsageError, match="draws from words"):
            ours.imagine(torch.zeros(1, 12))
        with pytest.raises(UsageError, match="draws from words"):
            ours.encode_image(pictures())
    if not ours.family.text_encoders:
        with pytest.raises(UsageError, match="understands no words"):
            ours.encode_text(["a cat"])


@pytest.mark.parametrize("name", TOYS)
def test_a_training_needs_no_image_encoder(name: str, toys: Path) -> None:
    """Trainings are given U-Net, text encoders, VAE and tokenizer."""
    taken = take(write_family(toys / ("toy" if name == "sd15" else name), name))
    given = taken.given()
    parts = {part: refs for part, refs in given.components.items() if not part.startswith("image_")}
    diffusion = load(taken, components=parts)
    assert bool(torch.isfinite(diffusion.encode_text([""]).hidden_BLD).all())
    if diffusion.family.image_embeddings:
        with pytest.raises(UsageError, match="no image encoder"):
            diffusion.encode_image(pictures())


def test_the_written_file_has_the_names_of_its_trade(each: Taken, written: Path) -> None:
    found = load_file(written / "checkpoint.safetensors")
    telltale = {
        "sd15": ("cond_stage_model.transformer.text_model.final_layer_norm.bias", (16,)),
        "sd2": ("cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight", (48, 16)),
        "sdxl": ("conditioner.embedders.1.model.text_projection", (24, 20)),
        "unclip": ("embedder.model.visual.proj", (16, 12)),
        "image_variations": ("cond_stage_model.model.visual.transformer.resblocks.0.attn.in_proj_bias", (48,)),
    }
    name, shape = telltale[each.artifact.family]
    assert found[name].shape == shape


def test_data_of_written_files_begin_where_both_their_sums_are_made_at_once(written: Path) -> None:
    found = sorted(written.rglob("*.safetensors"))
    assert len(found) > 3
    assert {(8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGN for path in found} == {0}


@torch.no_grad()
def test_a_text_encoder_pools_at_the_true_end_whatever_was_appended(each: Taken) -> None:
    """transformers takes the largest number for the end where a configuration states 2, as many do."""
    end = each.vocabulary["vocab"][END] if each.vocabulary else 0
    for encoder in load(each).text_encoders.values():
        assert text_model(encoder).eos_token_id == end


@pytest.fixture(scope="module")
def large(toys: Path) -> Diffusion:
    return load(take(write_family(toys / "sdxl", "sdxl")))


@torch.no_grad()
def test_a_pictures_sizes_are_told_height_first(large: Diffusion) -> None:
    condition = large.encode_text(["a red cat"])
    assert condition.added["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    sized = large.sized(condition, [((640, 480), (8, 16), (512, 384))])
    assert sized.added["time_ids"].tolist() == [[480, 640, 16, 8, 384, 512]]
    assert torch.equal(sized.added["text_embeds"], condition.added["text_embeds"])


@torch.no_grad()
def test_an_empty_negative_prompt_is_zeros_to_a_large_base(large: Diffusion) -> None:
    both = large.encode_negative(["", "a house"])
    for value in (both.hidden_BLD, both.added["text_embeds"]):
        assert not value[0].any()
        assert value[1].any()
    assert torch.equal(both.hidden_BLD[1:], large.encode_text(["a house"]).hidden_BLD)


@torch.no_grad()
def test_a_dropped_caption_is_zeros_to_a_large_base_and_a_picture_without_one_is_not(large: Diffusion) -> None:
    """As its own training drops them; what its sampler guides away from is what such steps teach."""
    pictures = [Picture("", str(i), caption, (64, 64)) for i, caption in enumerate(("a cat", "", "a cat"))]
    nothing = torch.zeros(3)
    one = Batch(nothing, nothing, nothing, ["", "", "a cat"], pictures=pictures)
    assert one.dropped == [True, False, False]
    text = large.encode_text(one.captions)
    told = large.silenced(text, one.dropped)
    for key in ("hidden_BLD", "text_embeds"):
        before, after = (getattr(c, key) if key == "hidden_BLD" else c.added[key] for c in (text, told))
        assert not after[0].any()
        assert torch.equal(after[1:], before[1:])
    assert torch.equal(told.added["time_ids"], text.added["time_ids"])


@torch.no_grad()
def test_clip_skip_leaves_out_layers_before_the_penultimate_one(large: Diffusion, toys: Path) -> None:
    hidden, *_ = pipeline(toys / "sdxl", "sdxl").encode_prompt(
        PROMPTS[0], device=CPU, do_classifier_free_guidance=False, clip_skip=1
    )
    assert torch.allclose(large.encode_text(PROMPTS[:1], clip_skip=1).hidden_BLD, hidden, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 500, 999])
def test_noise_is_added_to_an_embedding_as_diffusers_adds_it(level: int, toys: Path) -> None:
    folder = write_family(toys / "unclip", "unclip")
    draw = torch.Generator().manual_seed(3)
    images, noise = (torch.randn(2, 12, generator=draw) for _ in range(2))
    theirs = pipeline(folder, "unclip").noise_image_embeddings(images, level, noise=noise)
    ours = load(take(folder)).imagine(images, level=level, noise_BD=noise).added["class_labels"]
    assert torch.allclose(ours, theirs, **CLOSE)


def test_pictures_of_any_size_are_squeezed_to_the_encoders_square(toys: Path) -> None:
    """Without antialiasing for image variations, with it for unCLIP: as their U-Nets were trained."""
    wide = torch.rand(1, 3, 48, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, antialias in (("unclip", True), ("image_variations", False)):
        diffusion = load(take(write_family(toys / name, name)))
        square = torch.nn.functional.interpolate(wide, (32, 32), mode="bicubic", antialias=antialias)
        assert torch.allclose(diffusion.encode_image(wide), diffusion.encode_image(square), **CLOSE)


@pytest.mark.parametrize("name", [name for name in TOYS if name != "image_variations"])
def test_a_file_without_words_says_where_to_take_them(name: str, toys: Path) -> None:
    taken = take(write_family(toys / ("toy" if name == "sd15" else name), name))
    with pytest.raises(UsageError, match="has no tokenizer") as caught:
        load(taken, vocabulary={})
    assert "[swap.NAME]" in caught.value.hint
