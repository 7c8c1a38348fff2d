"""What is done for speed changes how numbers are rounded, not what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.train import by_hand, ours
from benchmarks.train_full_size import FULL, Shape, measure
from sdforge.families.sd15.load import load
from sdforge.order import Given
from sdforge.run import speed
from sdforge.run.speed import compile_blocks, lay_out, shrink, tune
from tests.families.toys import XL
from tests.families.workbench import UNET, Taken
from tests.run.order import order, train
from tests.trainings.test_training_contract import batch

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda")


def test_the_loop_has_the_losses_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """To the bit, on the demo's base; `benchmarks/train.py` compares their time too."""
    plain, _ = by_hand(3, "cpu")
    assert ours(tmp_path / "work", 3, "cpu")[0] == plain


def test_on_a_cpu_nothing_is_done(toy: Taken) -> None:
    diffusion = load(toy.given(), CPU, torch.bfloat16)
    before = {name: p.dtype for name, p in diffusion.unet.named_parameters()}
    assert tune(diffusion, set(), steps=10_000, shapes=1, static=True) == []
    assert {name: p.dtype for name, p in diffusion.unet.named_parameters()} == before


def test_another_layout_of_memory_gives_the_same_numbers(toy: Taken) -> None:
    diffusion, one = load(toy.given(), CPU, torch.float32), batch()
    with torch.no_grad():
        text = diffusion.encode_text(one.captions)
        before = diffusion.predict(one.noisy_BCHW, one.timesteps_B, text)
        lay_out(diffusion.unet)
        after = diffusion.predict(one.noisy_BCHW, one.timesteps_B, text)
    assert torch.allclose(before, after, atol=1e-5)


def test_frozen_matrices_are_kept_small_and_norms_and_what_is_trained_are_not(toy: Taken) -> None:
    diffusion, one = load(toy.given(), CPU, torch.bfloat16), batch()
    trained = nn.Parameter(next(m for m in diffusion.unet.modules() if isinstance(m, nn.Linear)).weight.data)
    next(m for m in diffusion.unet.modules() if isinstance(m, nn.Linear)).weight = trained
    with torch.no_grad():
        text = diffusion.encode_text(one.captions)
        before = diffusion.predict(one.noisy_BCHW, one.timesteps_B, text)
        shrink([diffusion.unet], {trained}, torch.bfloat16)
        after = diffusion.predict(one.noisy_BCHW, one.timesteps_B, text)
    kinds = {type(m): {p.dtype for p in m.parameters(recurse=False)} for m in diffusion.unet.modules()}
    assert trained.dtype == torch.float32
    assert kinds[nn.Conv2d] == {torch.bfloat16}
    assert kinds[nn.GroupNorm] == kinds[nn.LayerNorm] == {torch.float32}
    assert float((before - after).abs().max()) < 0.02 * float(before.abs().max())


def attended(device: str, on: Taken) -> set[str]:
    """Return the operations of attention that a prediction and its gradient run through."""
    diffusion, one = load(on.given(), torch.device(device), torch.float32), batch()
    noisy, timesteps = one.noisy_BCHW.to(device).requires_grad_(), one.timesteps_B.to(device)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        diffusion.predict(noisy, timesteps, diffusion.encode_text(one.captions)).sum().backward()
    return {event.key for event in seen.key_averages() if "attention" in event.key}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_networks_attend_by_one_kernel(device: str, toy: Taken) -> None:
    """Not by two products with the whole matrix of attention between them, there and back."""
    found = attended(device, toy)
    assert "aten::scaled_dot_product_attention" in found
    assert "aten::_scaled_dot_product_attention_math" not in found
    assert any(name.startswith("aten::_scaled_dot_product") and name.endswith("_backward") for name in found)


def test_full_size_is_that_of_the_networks_in_the_world() -> None:
    """Millions of parameters of the U-Nets, as methods-weights §0.3 has counted them."""
    with torch.device("meta"):
        counted = [sum(p.numel() for p in UNet2DConditionModel(**shape.unet).parameters()) for shape in FULL.values()]
    assert [round(count / 1e6, 1) for count in counted] == [859.5, 2567.5]


def test_the_benchmark_of_full_size_runs_on_small_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Of every family that it measures; what it measures is on a CUDA device."""
    small = {name: SMALL[shape.family](shape) for name, shape in FULL.items()}
    measure(CPU, {}, {}, small, steps=2)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| SD")]
    assert [row.split("|")[1].strip() for row in rows] == list(FULL)
    assert all(float(row.split("|")[3]) > 0 for row in rows)


def _text(width: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return sizes | {"num_hidden_layers": 1, "num_attention_heads": 2}


def _small_sd15(shape: Shape) -> Shape:
    return shape._replace(unet=UNET, texts=(_text(16),), edge=64, batches=(1,))


def _small_sdxl(shape: Shape) -> Shape:
    unet = XL | {"projection_class_embeddings_input_dim": 24 + 6 * 8}
    return shape._replace(unet=unet, texts=(_text(16), _text(24)), edge=64, batches=(1,))


SMALL = {"sd15": _small_sd15, "sdxl": _small_sdxl}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "textual_inversion"])
def test_a_training_runs_on_cuda_and_learns_what_it_learns_on_a_cpu(
    name: str, toy: Taken, pictures: Given, tmp_path: Path
) -> None:
    losses = [
        train(order(tmp_path / device, name, toy, pictures, steps=5, how={"device": device})).record["losses"]
        for device in ("cpu", "cuda")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.gpu
def test_a_tuned_training_resumes_to_the_same_bits_on_cuda(toy: Taken, pictures: Given, tmp_path: Path) -> None:
    from tests.run.test_loop_options import same_after_a_stop

    same_after_a_stop(tmp_path, 3, "lora", toy, pictures, steps=6, precision="bf16", how={"device": "cuda"})


@pytest.mark.gpu
def test_compiled_blocks_predict_what_plain_ones_do(toy: Taken) -> None:
    diffusion, one = load(toy.given(), torch.device("cuda"), torch.float32), batch()
    noisy, timesteps = one.noisy_BCHW.cuda(), one.timesteps_B.cuda()
    with torch.no_grad():
        text = diffusion.encode_text(one.captions)
        before = diffusion.predict(noisy, timesteps, text)
        compile_blocks(diffusion.unet, graphs=False)
        assert torch.allclose(before, diffusion.predict(noisy, timesteps, text), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "textual_inversion", "fine_tune"])
def test_a_training_from_cuda_graphs_learns_what_it_learns_on_a_cpu(
    name: str, toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "LONG", 1)
    wanted = {
        device: order(tmp_path / device, name, toy, pictures, steps=6, how={"device": device}) for device in DEVICES
    }
    found = {device: train(each) for device, each in wanted.items()}
    assert speed.GRAPHS in found["cuda"].fingerprint["tuned"]
    assert found["cpu"].record["losses"] == pytest.approx(found["cuda"].record["losses"], rel=0.02)


@pytest.mark.gpu
def test_a_training_from_cuda_graphs_resumes_to_the_same_bits(
    toy: Taken, pictures: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.run.test_loop_options import same_after_a_stop

    monkeypatch.setattr(speed, "LONG", 1)
    same_after_a_stop(tmp_path, 3, "lora", toy, pictures, steps=6, precision="bf16", how={"device": "cuda"})


# -- what is compiled, and when from graphs; nothing is compiled here --------------------------------------------------


class Compiled(nn.Module):
    """A network that notes how it was compiled."""

    wishes: dict[str, object]

    def compile_repeated_blocks(self, **wishes: object) -> None:
        self.wishes = wishes


@pytest.mark.parametrize(
    ("steps", "shapes", "static", "mode"),
    [(300, 1, True, "reduce-overhead"), (300, 2, True, "default"), (300, 1, False, "default"), (299, 1, True, None)],
)
def test_graphs_are_recorded_where_every_step_has_the_same_shapes(
    steps: int, shapes: int, static: bool, mode: str | None
) -> None:
    network = Compiled()
    done = speed.compiled(network, steps=steps, shapes=shapes, static=static)
    assert getattr(network, "wishes", {}).get("mode") == mode
    assert (speed.GRAPHS in done) == (mode == "reduce-overhead")


def test_a_step_says_that_it_begins_only_where_there_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    speed.begin_step(["tf32", "compiled"])
    assert begun == []
    speed.begin_step(["compiled", speed.GRAPHS])
    assert begun == [1]
