"""What every training in the folder promises, whatever it trains."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdforge.artifact import KINDS
from sdforge.errors import ActionFailed
from sdforge.families import family, family_names
from sdforge.method import method, method_groups, module_of
from sdforge.order import Given
from sdforge.run.adapter import Adapter, Batch
from sdforge.run.diffusion import Diffusion
from sdforge.run.images import Picture, plan_pictures
from sdforge.run.tensors import DTYPES
from sdforge.settings import Table
from sdforge.trainings import Training
from tests.families.toys import write_family
from tests.families.workbench import Taken, digest, take
from tests.run.order import SEED, dataset, order, settings, shown, train
from tests.toys import write_drawings

TRAININGS = sorted(name for name, group in method_groups().items() if group == "trainings")
OWN = [name for name in TRAININGS if hasattr(module_of("trainings", name), "run")]  # they do without the loop
DRAWN = ("lora", "textual_inversion")  # whose parameters start from random numbers
EACH = pytest.mark.parametrize("name", TRAININGS)
LOOPED = pytest.mark.parametrize("name", sorted({*TRAININGS} - {*OWN}))
CAPTIONS = ["a red <toy> cat", "a house"]
RATES = {"loha": 0.01}  # products of four factors move faster than the factors


@pytest.fixture
def on(name: str, toy: Taken, toys: Path) -> Taken:
    """The checkpoint that a training wants."""
    return take(write_family(toys / "unclip", "unclip")) if shown(name) else toy


def loaded(on: Taken) -> Diffusion:
    load = importlib.import_module(f"sdforge.families.{on.artifact.family}.load").load
    found: Diffusion = load(on.given(), torch.device("cpu"), torch.float32)
    return found


def begun(name: str, on: Taken, **changes: Any) -> tuple[Diffusion, Adapter]:
    diffusion = loaded(on)
    table: type[Training] = module_of("trainings", name).TABLE
    adapter = module_of("trainings", f"{name}.adapter").begin(
        table.model_construct(**settings(name, **changes)), diffusion
    )
    if shown(name):  # it begins at what it is shown
        folder = next(iter(on.files.values())).parents[1] / "shown"
        write_drawings(folder)
        given = dataset(folder)
        adapter.prepare(order(folder, name, on, given), plan_pictures(given.pictures, 64, buckets=False))
    return diffusion, adapter


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What is loaded once for all tests that only look at it."""
    return {}


@pytest.fixture
def base(on: Taken, kept: dict[str, Any]) -> Diffusion:
    """The checkpoint by itself, which nobody changes."""
    found: Diffusion = kept.get(on.artifact.family) or loaded(on)
    kept[on.artifact.family] = found
    return found


@pytest.fixture
def beginning(name: str, on: Taken, kept: dict[str, Any]) -> tuple[Diffusion, Adapter]:
    """A training that has begun, in which nobody learns."""
    found: tuple[Diffusion, Adapter] = kept.get(name) or begun(name, on)
    kept[name] = found
    return found


def parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {name: parameter for group in adapter.groups() for name, parameter in group.parameters.items()}


def batch(captions: list[str] = CAPTIONS) -> Batch:
    """Latents of 16 × 16: three halvings leave 2 × 2, and attention to a single place would have no gradient."""
    draw = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(2, 4, 16, 16, generator=draw) for _ in range(2))
    pictures = [Picture("", caption, caption, (128, 128), original=(128, 128)) for caption in captions]
    return Batch(noisy, target, torch.tensor([200, 700]), captions, pictures=pictures)


def said(diffusion: Diffusion, adapter: Adapter, captions: list[str] = CAPTIONS) -> Tensor:
    condition = adapter.condition(batch(captions), diffusion.encode_text(captions))
    return adapter.predict(batch(captions), condition)


def test_the_trainings_that_recipes_rely_on_are_found_in_the_folder() -> None:
    assert {"dreambooth", "fine_tune", "lora", "textual_inversion"} <= set(TRAININGS)


@EACH
def test_a_training_states_what_it_makes_and_where_it_is_from(name: str) -> None:
    found = method(name)
    assert found.makes in KINDS
    assert found.version >= 1
    assert issubclass(found.table, Table if name in OWN else Training)
    assert "http" in (inspect.getdoc(module_of("trainings", name)) or "")
    assert found.signature.kind == "content"
    assert found.signature.seeded or name in OWN
    assert found.signature.pinned
    assert set(found.signature.roles) >= ({"on"} if name in OWN else {"on", "dataset"})


@EACH
def test_a_training_names_no_family(name: str) -> None:
    folder = Path(str(module_of("trainings", name).__file__)).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert not any(family in text for family in family_names())


@LOOPED
def test_a_training_begins_where_the_checkpoint_stands(
    name: str, base: Diffusion, beginning: tuple[Diffusion, Adapter]
) -> None:
    """Captions without a new word say what they said, to the bit."""
    plain = ["a red cat", "a house"]
    diffusion, adapter = beginning
    one = batch(plain)
    with torch.no_grad():
        told = base.encode_text(plain)
        if shown(name):
            told = base.imagine(parameters(adapter)["image_embeds"].expand(2, -1))
        before = base.predict(one.noisy_BCHW, one.timesteps_B, told)
        assert torch.equal(said(diffusion, adapter, plain), before)


@LOOPED
def test_only_what_is_declared_trainable_moves(name: str, on: Taken) -> None:
    diffusion, adapter = begun(name, on)
    declared = parameters(adapter)
    networks = {"unet": diffusion.unet, "vae": diffusion.vae, **diffusion.text_encoders}
    everything = {
        f"{n}.{p}": t for n, network in networks.items() for p, t in network.state_dict(keep_vars=True).items()
    }
    frozen = {n: digest(t) for n, t in everything.items() if not any(t is p for p in declared.values())}
    start = {n: digest(p) for n, p in declared.items()}
    optimizer = torch.optim.AdamW(declared.values(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        loss = (said(diffusion, adapter) - batch().target_BCHW).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(t.grad is None for n, t in everything.items() if n in frozen)
        optimizer.step()
    assert {n: digest(everything[n]) for n in frozen} == frozen
    assert all(digest(p) != start[n] for n, p in declared.items())
    assert len(frozen) >= 280  # VAE and text encoder at the least


@LOOPED
def test_what_is_trained_is_fp32_and_finite(beginning: tuple[Diffusion, Adapter]) -> None:
    _, adapter = beginning
    assert parameters(adapter)
    assert {p.dtype for p in parameters(adapter).values()} == {torch.float32}
    assert all(p.requires_grad and bool(torch.isfinite(p).all()) for p in parameters(adapter).values())


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"conv_rank": 2, "text_encoder": True, "dora": True},
    "loha": {"conv_rank": 2},
    "lokr": {"rank": 1, "factor": 2, "conv_rank": 1},
    "hypernetwork": {"attention": "all", "layer_norm": True},
    "custom_diffusion": {"freeze": "attention", "vectors": 3},
}


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in TRAININGS if name not in OWN), *VARIANTS.items()]
)
def test_a_plan_knows_how_many_numbers_a_training_learns(
    name: str, changes: dict[str, Any], on: Taken, beginning: tuple[Diffusion, Adapter]
) -> None:
    _, adapter = begun(name, on, **changes) if changes else beginning
    shapes = {part: {n: tuple(t.shape) for n, t in on.tensors(part).items()} for part in on.tables}
    table = module_of("trainings", name).TABLE.model_construct(**settings(name, **changes))
    numbers = sum(p.numel() for p in parameters(adapter).values())
    assert table.learns(family(on.artifact.family), shapes) == (numbers, "fp32")


@LOOPED
def test_the_start_depends_on_the_seed_alone(name: str, on: Taken, beginning: tuple[Diffusion, Adapter]) -> None:
    state = torch.random.get_rng_state()
    starts = [{n: digest(p) for n, p in parameters(beginning[1]).items()}]
    for seed in (SEED, SEED + 1) if name in DRAWN else (SEED,):
        torch.manual_seed(seed + 100)
        _, adapter = begun(name, on, seed=seed)
        starts.append({n: digest(p) for n, p in parameters(adapter).items()})
    torch.random.set_rng_state(state)
    assert starts[0] == starts[1]
    assert starts[1] != starts[-1] or name not in DRAWN


@LOOPED
def test_it_learns_what_its_parameters_can_say(name: str, on: Taken) -> None:
    """The target is what the network says with other values of the same parameters: a loss near zero exists."""
    diffusion, adapter = begun(name, on)
    own = list(parameters(adapter).values())
    # weights of all layers are moved less than those of a few factors or rows
    far, rate = (0.3, 0.03) if sum(p.numel() for p in own) < 30_000 else (0.02, 0.002)
    draw = torch.Generator().manual_seed(1)
    start = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in own:
            p.add_(far * torch.randn(p.shape, generator=draw))
        target = said(diffusion, adapter)
        for p, value in zip(own, start, strict=True):
            p.copy_(value)
    optimizer, losses = torch.optim.Adam(own, lr=RATES.get(name, rate)), []
    for _ in range(25):
        loss = (said(diffusion, adapter) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if losses[-1] < 0.3 * losses[0]:
            return
    pytest.fail(f"{losses[-1]} is no third of {losses[0]}")


@LOOPED
def test_what_is_saved_is_of_the_declared_type_and_names_its_update(
    name: str, on: Taken, pictures: Given, tmp_path: Path
) -> None:
    dtype = {"fp16": "fp32", "fp32": "fp16"}[module_of("trainings", name).TABLE.model_fields["dtype"].default]
    outcome = train(order(tmp_path, name, on, pictures, dtype=dtype, steps=1))
    for rows in outcome.components.values():
        assert {DTYPES[row[1]] for row in rows} == {{"fp16": torch.float16, "fp32": torch.float32}[dtype]}
        assert rows == sorted(rows)
    assert outcome.grade == "B"
    assert outcome.record["steps"] == len(outcome.record["losses"]) == 1
    assert outcome.record["norm"] > 0
    assert len(outcome.record["sketch"]) == 344  # base64 of 256 bytes


@LOOPED
def test_a_loss_that_is_no_number_stops_the_training(name: str, on: Taken, pictures: Given, tmp_path: Path) -> None:
    wild = order(
        tmp_path, name, on, pictures, learning_rate=1e30, clip=0.0, steps=20, schedule="constant", dtype="fp32"
    )
    with pytest.raises(ActionFailed, match=r"(NaN|nan|inf|Inf)") as caught:
        train(wild)
    assert caught.value.exit_code == 1
    assert 'precision = "fp32"' not in caught.value.hint  # which it has already


@LOOPED
def test_what_a_training_asks_of_text_is_what_it_says(beginning: tuple[Diffusion, Adapter]) -> None:
    """Where the text is said to be frozen, what captions say is encoded once: no gradient may be lost by that."""
    diffusion, adapter = beginning
    text = diffusion.encode_text(CAPTIONS)
    assert text.hidden_BLD.requires_grad == (not adapter.text_is_frozen)
