"""What mergekit, sd-mecha and published lists say of merges, a recipe says too, and computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.build.inline import Bench
from tests.imports.conftest import Importer

NEAR = 1.2e-3  # of fp16 numbers around 1: the last unit
MECHA = """\
version 0.1.0
model "alpha" model_config="sd1-ldm" merge_space="weight"
model "beta" model_config="sd1-ldm" merge_space="weight"
model "gamma" model_config="sd1-ldm" merge_space="weight"
"""
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


# -- what they say is computed ---------------------------------------------------------------------------------------


def ties(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Trim each difference to half, elect signs by the sum, and average what agrees, as mergekit describes it."""
    weighed = torch.stack([0.7 * trimmed(b - a), 0.4 * trimmed(c - a)])
    sign = torch.where(weighed.sum(0) >= 0, 1.0, -1.0)
    agree = (torch.sign(weighed) == sign) & (weighed != 0)
    below = (agree * torch.tensor([0.7, 0.4]).reshape(2, *[1] * a.dim())).sum(0)
    return a + 0.9 * (weighed * agree).sum(0) / torch.where(below == 0, 1.0, below)


def trimmed(delta: Tensor) -> Tensor:
    """Keep the larger half of the values; of equal ones the first."""
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[order[: max(1, delta.numel() // 2)]] = True
    return delta * kept.reshape(delta.shape)


def perpendicular(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    own, other = a - c, b - c
    return a + 0.5 * (other - own * (own * other).sum() / (own * own).sum().clamp_min(1e-30))


def trained(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    learned, apart = (b - c).abs(), (b - a).abs()
    return a + 0.5 * 1.8 * torch.nan_to_num(apart / (apart + learned)) * (b - c)


HALF = (
    "dict key=0.5\n"
    'literal &4 model_config="singleton-mecha" merge_space=null\n'
    'merge "convert_singleton" &5'
)  # lines 4, 5 and 6
SUM = """\
merge_method: linear
parameters: {normalize: false}
models:
- {model: alpha, parameters: {weight: 0.5}}
- {model: beta, parameters: {weight: 0.25}}
"""
TASKS = """\
merge_method: task_arithmetic
base_model: alpha
parameters: {lambda: 0.5}
models:
- model: alpha
- {model: beta, parameters: {weight: 0.6}}
- {model: gamma, parameters: {weight: 0.2}}
"""
TIES = """\
merge_method: ties
base_model: alpha
parameters: {density: 0.5, lambda: 0.9}
models:
- {model: beta, parameters: {weight: 0.7}}
- {model: gamma, parameters: {weight: 0.4}}
"""
CROOKED = (
    f'merge "subtract" &0 &2\n{HALF}\nmerge "subtract" &1 &2\nmerge "perpendicular_component" &3 &7\n'
    'merge "add_difference" &0 &8 &6'
)
TRAINED = f'merge "subtract" &1 &2\n{HALF}\nmerge "train_difference_mask" &0 &1 &2 &6\nmerge "add_difference" &0 &3 &7'
DIFFERENCE = f'merge "subtract" &1 &2\n{HALF}\nmerge "add_difference" &0 &3 &6\nmerge "fallback" &7 &0'
TWICE = 'merge "weighted_sum" &0 &1 0.5\nmerge "weighted_sum" &3 &2 alpha=0.5'
COMPUTED: dict[str, tuple[str, Formula]] = {
    "normal.yaml": (SUM.replace("false", "true"), lambda a, b, _: (2 * a + b) / 3),
    "tasks.yaml": (TASKS, lambda a, b, c: a + 0.5 * (0.6 * (b - a) + 0.2 * (c - a))),
    "ties.yaml": (TIES, ties),
    "difference.mecha": (MECHA + DIFFERENCE, lambda a, b, c: a + 0.5 * (b - c)),
    "trained.mecha": (MECHA + TRAINED, trained),
    "crooked.mecha": (MECHA + CROOKED, perpendicular),
    "twice.mecha": (MECHA + TWICE, lambda a, b, c: (a + b) / 4 + c / 2),
}
LEVELS = ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
WEIGHTS = {name: round(0.05 + 0.03 * i, 2) for i, name in enumerate(LEVELS)}
BLOCKS = {
    "text_encoder.text_model.final_layer_norm.weight": "BASE",
    "unet.conv_in.weight": "IN00",
    "unet.down_blocks.0.downsamplers.0.conv.weight": "IN03",
    "unet.mid_block.resnets.0.conv1.weight": "M00",
    "unet.up_blocks.3.resnets.2.conv1.weight": "OUT11",
    "unet.conv_out.weight": "OUT11",
    "vae.decoder.conv_in.weight": "BASE",
    "unet.time_embedding.linear_1.weight": "BASE",
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, three_bases: Path) -> Importer:
    """A project into which all of them were imported, built at once."""
    root = tmp_path_factory.mktemp("computed") / "project"
    shutil.copytree(three_bases, root)
    found = Importer(root, lambda: "")
    numbers = " ".join(f"{name}={value}" for name, value in WEIGHTS.items())
    blocks = f'dict {numbers}\nliteral &3 model_config="sd1-supermerger_blocks" merge_space=null\n'
    texts = {name: text for name, (text, _) in COMPUTED.items()}
    texts["blocks.mecha"] = f'{MECHA}{blocks}merge "weighted_sum" &0 &1 &4'
    for name, text in texts.items():
        found.run(name, text)
    Bench(root).build(*(f"{Path(name).stem}:{Path(name).stem}" for name in texts))
    return found


@pytest.mark.parametrize("name", COMPUTED)
def test_what_another_program_would_compute_the_recipe_computes(computed: Importer, name: str) -> None:
    found = computed.made(Path(name).stem)
    bases = [computed.base(each) for each in ("alpha", "beta", "gamma")]
    assert found.keys() == bases[0].keys()
    for tensor, value in found.items():
        expected = COMPUTED[name][1](*(base[tensor] for base in bases))
        assert torch.allclose(value, expected, rtol=1e-3, atol=NEAR), tensor


def test_weights_of_blocks_reach_the_blocks_that_sd_mecha_means(computed: Importer) -> None:
    found, a, b = computed.made("blocks"), computed.base("alpha"), computed.base("beta")
    for tensor, block in BLOCKS.items():
        expected = a[tensor] + WEIGHTS[block] * (b[tensor] - a[tensor])
        assert torch.allclose(found[tensor], expected, rtol=1e-3, atol=NEAR), tensor


# -- mergekit ----------------------------------------------------------------------------------------------------------


def test_every_key_of_a_configuration_is_taken_or_named(importer: Importer) -> None:
    said = importer.run(
        "mixed.yaml",
        "merge_method: dare_ties\nbase_model: alpha\nstrange: 1\nchat_template: auto\n"
        "parameters: {int8_mask: true, odd: 2, rescale: false, density: [{filter: attn, value: 0.3}, {value: 0.6}]}\n"
        "models:\n- {model: beta, parameters: {weight: 0.7}}\nout_dtype: bfloat16\ndtype: float32\n",
    )
    assert importer.values("mixed")["dare"]["mixed"] == {
        "base": "alpha",
        "checkpoints": ["beta"],
        "weights": [0.7],
        "density": 0.6,
        "rescale": False,
        "scale": 1.0,
        "normalize": False,
        "vote": "sum",
        "blocks": {"vae": [0.7]},
        "dtype": "bf16",
    }
    for word in ("strange", "chat_template", "int8_mask", "odd", "'attn'", "drawn otherwise", "dtype = float32"):
        assert word in said
        assert word in importer.recipe("mixed").partition("family")[0].replace("\n#  ", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: tie\nmodels: [{model: a}]", "did you mean 'ties'?"),
        ("merge_method: nuslerp\nmodels: [{model: a}]", "has no counterpart here"),
        ("merge_method: linear\nslices: [1]", "by layers (`slices`)"),
        ("merge_method: linear\nmodels: [{model: a+lora}]", "bakes a LoRA on the way"),
        ("merge_method: linear\nmodels: [{model: a}]", "gives no `weight` to a"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", "does not say `t`"),
        ("merge_method: ties\nmodels: [{model: b, parameters: {weight: 1}}]", "has no `base_model`"),
        ("merge_method: slerp\nparameters: {t: [0, 0.5, 1]}\nmodels: [{model: b}]", "from layer to layer"),
        ("merge_method: linear\nmodels: [", "is no YAML"),
        ("merge_method: linear\nmodels: &a [*a]", "can unfold without end"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: heavy}}]", "is not written as such files are"),
        (
            TIES.replace("weight: 0.7", "weight: 0.7, density: 0.1"),
            "different values of `density` (0.1 and 0.5)",
        ),
    ],
)
def test_what_cannot_be_said_in_a_recipe_is_refused_and_nothing_is_written(
    importer: Importer, text: str, words: str
) -> None:
    assert words in importer.run("mixed.yaml", text, code=2)
    assert list((importer.root / "recipes").iterdir()) == []


# -- sd-mecha ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "method", "word"),
    [
        (
            'merge "subtract" &1 &0\nmerge "ties_sum" &3 k=0.5 vote_sgn=true\nmerge "add_difference" &0 &4',
            "ties",
            "tie",
        ),
        (
            'merge "subtract" &1 &0\nmerge "subtract" &2 &0\nmerge "model_stock" &3 &4\nmerge "add_difference" &0 &5',
            "model_stock",
            "neighbours",
        ),
        (
            'merge "subtract" &1 &0\nmerge "ties_sum_with_dropout" &3 probability=0.9\nmerge "add_difference" &0 &4',
            "dare",
            "draws other numbers",
        ),
        (
            'merge "subtract" &1 &0\nmerge "ties_sum" &3 k=0.5 apply_median=true\nmerge "add_difference" &0 &4',
            "ties",
            "`apply_median` = True of ties_sum (line 6) is left out",
        ),
        (
            'merge "subtract" &1 &2\nmerge "add_difference" &0 &3 alpha=0.5 clamp_to_ab=true',
            "add_difference",
            "`clamp_to_ab` = True of add_difference (line 6) is left out",
        ),
        ('merge "slerp" &0 &1 0.3', "slerp", "mixes lengths"),
        ('merge "tensor_sum" &0 &1 width=0.5 offset=0.25', "tensor_sum", "rounded down"),
        ('merge "add_cosine_b" &0 &1 0.3', "cosine", ""),
        ('merge "clamp" &0 &1 &2 stiffness=0.0', "clamp", "VAE"),
        ('merge "geometric_median" &0 &1 &2', "geometric_median", "VAE"),
        ('merge "pick_component" &0 "vae"\nmerge "fallback" &3 &1', "swap", ""),
        ('merge "cast" &0 null "float32"', "cast", ""),
    ],
)
def test_what_a_method_does_otherwise_is_said(importer: Importer, merge: str, method: str, word: str) -> None:
    said = importer.run("other.mecha", MECHA + merge)
    assert method in importer.values("other")
    assert word in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version 0.2.0\n", "begins with 'version 0.2.0'"),
        (f'{MECHA}merge "rotate" &0 &1', "mixed.mecha:5: `rotate` of sd-mecha has no counterpart here"),
        (f'{MECHA}merge "weighted_sum" &0 &9 0.5', "mixed.mecha:5: &9 names no line before this one"),
        (MECHA, "its last line is no merge"),
        (f"{MECHA}merge", "is not written as such files are"),
        (f'{MECHA}merge "weighted_sum" &0', "is not written as such files are"),
        (f"{MECHA}run away", "there is no line 'run'"),
        (f'{MECHA}merge "weighted_sum" &0 &1 half', "'half' is neither a number"),
    ],
)
def test_a_recipe_of_sd_mecha_that_has_no_counterpart_is_refused(importer: Importer, text: str, words: str) -> None:
    assert words in importer.run("mixed.mecha", text, code=2)
    assert list((importer.root / "recipes").iterdir()) == []


def test_a_lora_that_sd_mecha_adds_is_baked(importer: Importer) -> None:
    lines = [*MECHA.splitlines()[:2], 'model "ink" model_config="sd1-kohya" merge_space="delta"']
    lines += ['merge "convert_sd1_kohya_to_original" &1', 'merge "add_difference" &0 &2 0.8']
    importer.run("baked.mecha", "\n".join(lines), code=2)  # the LoRA is not here
    assert importer.values("baked")["bake"]["baked"] == {"checkpoint": "alpha", "loras": {"ink": {"strength": 0.8}}}


# -- lists of block weights --------------------------------------------------------------------------------------------

ONES = ",".join(["0.5"] * 25)


def test_a_published_list_is_a_merge_of_two_checkpoints(importer: Importer) -> None:
    said = importer.run("lists.txt", f"A = alpha\nmodel B: beta\n# best\nSOFT_ONE\t0.25,{ONES}\n{ONES}\nand so on\n")
    merges = importer.values("lists")["weighted_sum"]
    assert merges["soft-one"] == {"checkpoints": ["alpha", "beta"], "weights": [1.0, 0.0], "mbw": [0.25] + [0.5] * 25}
    assert merges["lists"]["mbw"] == [0.5] * 25
    assert "line 6 is no list, and left out: and so on" in said
    assert "the text encoders are those of alpha" in said


def test_a_list_without_checkpoints_wants_them_named(importer: Importer) -> None:
    assert "--checkpoints A,B" in importer.run("lists.txt", f"0,{ONES}", code=2)
    importer.run("lists.txt", f"0,{ONES}", "--checkpoints", "alpha,beta", "--name", "listed")
    assert importer.values("listed")["weighted_sum"]["lists"]["checkpoints"] == ["alpha", "beta"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_recipe_is_never_overwritten_and_a_dry_run_writes_none(importer: Importer) -> None:
    text = "merge_method: linear\nmodels: [{model: alpha, parameters: {weight: 1}}]"
    assert 'family = "sd15"' in importer.run("mixed.yaml", text, "--dry-run")
    assert list((importer.root / "recipes").iterdir()) == []
    importer.run("mixed.yaml", text)
    assert "--name NAME" in importer.run("mixed.yaml", text, code=2)


def test_a_files_name_is_no_line_of_the_recipe(importer: Importer) -> None:
    importer.run('two\nlines = "1".mecha', f'{MECHA}merge "weighted_sum" &0 &1 0.5')
    assert "lines" not in importer.values("two-lines-1")


def test_what_is_no_file_of_a_known_kind_is_refused(importer: Importer) -> None:
    assert "is nothing that forge can import" in importer.run("notes.txt", "buy milk", code=2)
    # to look for a name and a number in it takes no time that grows with the cube of its length
    assert "is nothing that forge can import" in importer.run("digits.txt", f"a{'1' * 100_000}", code=2)
    assert "does not tell for which family" in importer.run(
        "far.yaml", "merge_method: linear\nmodels: [{model: org/far, parameters: {weight: 1}}]", code=2
    )


def test_a_repository_of_the_hub_and_a_file_elsewhere_are_named_as_sources(importer: Importer) -> None:
    text = (
        "merge_method: linear\nmodels:\n- {model: org/far, parameters: {weight: 1}}\n"
        "- {model: 'C:\\models\\Near Me.safetensors', parameters: {weight: 1}}\n"
    )
    said = importer.run("mixed.yaml", text, "--family", "sd15", code=2)
    sources = importer.values("mixed")["source"]
    assert sources == {"far": {"from": "hf://org/far"}, "near-me": {"from": "Near Me.safetensors"}}
    assert "list its folder in forge.local.toml" in said
