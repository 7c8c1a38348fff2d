"""Words that other programs have for what recipes call otherwise: how a mistake is answered with ours.

Of kohya's scripts, diffusers' examples, the usual web UIs, mergers, and engines of clusters. Nothing here is accepted
in a recipe.
"""

from __future__ import annotations

from collections.abc import Collection

# a setting elsewhere → ours; the first of several that the table at hand has
SETTINGS = {
    "base": ("on", "checkpoint"),
    "base_model": ("on", "checkpoint", "base"),
    "cfg": ("guidance",),
    "cfg_scale": ("guidance",),
    "conv_dim": ("conv_rank",),
    "cpus_per_task": ("cpus",),
    "data": ("dataset",),
    "dim": ("rank",),
    "embeddings": ("insert",),
    "file": ("from", "path"),
    "gpus_per_node": ("gpus",),
    "gres": ("gpus",),
    "guidance_scale": ("guidance",),
    "height": ("resolution",),
    "initializer_token": ("init",),
    "instance_prompt": ("prompt",),
    "license": ("licence",),
    "loras": ("bake",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("schedule",),
    "lr_warmup_steps": ("warmup",),
    "max_train_steps": ("steps",),
    "mem": ("memory",),
    "mem_gb": ("memory",),
    "model": ("on", "checkpoint"),
    "models": ("checkpoints",),
    "name": ("title",),
    "negative": ("negative_prompt",),
    "network_alpha": ("alpha",),
    "network_dim": ("rank",),
    "num_cpus": ("cpus",),
    "num_gpus": ("gpus",),
    "num_inference_steps": ("steps",),
    "num_repeats": ("repeats",),
    "num_vectors": ("vectors",),
    "path": ("from",),
    "placeholder_token": ("token",),
    "prompt": ("prompts",),
    "queue": ("partition",),
    "ratio": ("weight", "weights"),
    "save_precision": ("dtype",),
    "size": ("resolution",),
    "text_encoder_lr": ("text_learning_rate",),
    "textual_inversions": ("insert",),
    "time": ("minutes",),
    "timeout_min": ("minutes",),
    "train_batch_size": ("batch",),
    "unet_lr": ("learning_rate",),
    "url": ("from",),
    "walltime": ("minutes",),
    "width": ("resolution",),
}

EPOCHS = "`steps` counts updates: epochs × pictures × repeats ÷ `batch`"
SAMPLER = "previews are all drawn by DPM++ 2M, so that they can be compared"
OUTPUT = "files lie in out/RECIPE/; `title` is what people read"
# a setting elsewhere that has no counterpart of its own → how the same is had
SENTENCES = {
    "epochs": EPOCHS,
    "max_train_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "output_dir": OUTPUT,
    "output_name": OUTPUT,
    "sampler": SAMPLER,
    "sampler_name": SAMPLER,
    "scheduler": SAMPLER,
    "vae": 'another VAE is a target: [swap.NAME] with `checkpoint` and `vae`; then checkpoint = "NAME"',
}

# a value elsewhere → ours
VALUES = {
    "bfloat16": "bf16",
    "ckpt": "checkpoint",
    "embedding": "embeddings",
    "float": "fp32",
    "float16": "fp16",
    "float32": "fp32",
    "full": "fp32",
    "half": "fp16",
    "lora": "loras",
    "safetensors": "checkpoint",
    "single_file": "checkpoint",
    "textual_inversion": "embeddings",
}


def our_setting(word: str, known: Collection[str]) -> str:
    """Return what to write instead of a setting that a table does not have, or nothing."""
    ours = next((name for name in SETTINGS.get(word.lower(), ()) if name in known), "")
    return f"here it is `{ours}`" if ours else SENTENCES.get(word.lower(), "")


def our_value(word: str, known: Collection[str]) -> str:
    """Return the value that is called `word` elsewhere, where it is one of the known ones, or nothing."""
    ours = VALUES.get(word.lower(), "")
    return ours if ours in known else ""
