"""InvokeAI's recognition and loading of files that `forge install` has put into its folder."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from kit import Trial

TRIAL = Trial()
os.environ["INVOKEAI_ROOT"] = str(TRIAL.home)

from invokeai.backend.model_manager.configs.factory import ModelConfigFactory  # noqa: E402
from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader  # noqa: E402
from invokeai.backend.model_manager.load.model_loaders.stable_diffusion import (  # noqa: E402
    StableDiffusionDiffusersModel,
)
from invokeai.backend.model_manager.taxonomy import SubModelType  # noqa: E402
from invokeai.backend.model_patcher import ModelPatcher  # noqa: E402
from invokeai.backend.patches.layer_patcher import LayerPatcher  # noqa: E402
from invokeai.backend.textual_inversion import TextualInversionModelRaw  # noqa: E402

HOME = TRIAL.home / "autoimport"
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def recognised(path: Path) -> Any:
    """Return what InvokeAI takes a file or folder for."""
    found = ModelConfigFactory.from_model_on_disk(path, allow_unknown=False)
    if found.config is None:
        raise ValueError(f"not recognised: {path.name}")
    return found.config


class Loader(StableDiffusionDiffusersModel):
    """The program's loader without its cache, in fp32."""

    def __init__(self) -> None:
        self._torch_dtype = torch.float32

    def _apply_fp8_layerwise_casting(self, model: Any, *_: Any) -> Any:
        return model


class Adapters(LoRALoader):
    def __init__(self, base: Any) -> None:
        self._model_base, self._torch_dtype = base, torch.float32


def folder_parts(config: Any) -> dict[str, Any]:
    loader, parts = Loader(), {}
    for name in PARTS:
        if (Path(config.path) / name).is_dir():
            parts[name] = loader._load_model(config, SubModelType(name))
    return parts


def words(parts: dict[str, Any], file: Path, prompt: str) -> torch.Tensor:
    """Return what a prompt with an embedding's word becomes in the first text encoder."""
    raw = TextualInversionModelRaw.from_checkpoint(file)
    given = [(file.stem, raw)]
    with ModelPatcher.apply_ti(parts["tokenizer"], parts["text_encoder"], given) as (tokenizer, manager):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = manager.expand_textual_inversion_token_ids_if_necessary(ids)
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = [start, *ids, *[end] * (76 - len(ids))]
        return parts["text_encoder"](torch.tensor([ids]), output_hidden_states=True)


def embeddings(parts: dict[str, Any]) -> None:
    for file in sorted((HOME / "embedding").iterdir()):
        with TRIAL.row(f"embeddings/{file.name}") as row:
            row["kind"] = type(recognised(file)).__name__
            found = words(parts, file, f"a drawing of <{file.stem}> with red hair")
            context = found.hidden_states[-2] if TRIAL.sdxl else found.last_hidden_state
            ours = TRIAL.reference["plain.context"][..., : context.shape[-1]]
            row["context"] = float((context - ours).norm() / ours.norm())


def patched(parts: dict[str, Any], lora: Any, strength: float) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for part, prefix in PREFIXES.items():
        if part in parts:
            if part == "text_encoder" and TRIAL.sdxl:
                prefix = "lora_te1_"
            given = LayerPatcher.apply_smart_model_patches(
                parts[part], [(lora, strength)], prefix, torch.float32, force_direct_patching=True
            )
            stack.enter_context(given)
    return stack


def loras(parts: dict[str, Any], preset: str, strength: float) -> None:
    own = {path.name for path in (TRIAL.root / "loras" / preset).glob("*.safetensors")}

    def theirs(name: str) -> torch.Tensor | None:
        component, _, path = name.partition(".")
        state = dict(parts[component].named_parameters())
        return state.get(path, state.get(path.removeprefix("text_model.")))

    for file in sorted((HOME / "lora").glob("*.safetensors")):
        if file.name not in own:
            continue
        with TRIAL.row(f"loras/{file.name}") as row:
            config = recognised(file)
            row["kind"] = type(config).__name__
            lora = Adapters(config.base)._load_model(config)
            with patched(parts, lora, strength):
                row |= TRIAL.change(preset, TRIAL.loras[file.stem], theirs)


@torch.no_grad()
def main() -> None:
    parts: dict[str, Any] = {}
    for preset in ("plain", "forms", "whole"):
        with TRIAL.row(f"{preset}.safetensors") as row:
            row["kind"] = type(recognised(HOME / "main" / f"{preset}.safetensors")).__name__
    with TRIAL.row("diffusers/") as row:
        config = recognised(TRIAL.root / "out" / "plain" / "diffusers")
        row["kind"] = type(config).__name__
        parts = folder_parts(config)
        # the folder's own word, not InvokeAI's
        row["noise"] = TRIAL.ratio("plain.noise", noise(parts))
        row["picture"] = TRIAL.ratio("picture", parts["vae"].decode(TRIAL.reference["latents"]).sample)
    embeddings(parts)
    for preset, strength in (("whole", 0.8), ("forms", 1.0)):
        loras(parts, preset, strength)
    TRIAL.end()


def noise(parts: dict[str, Any]) -> torch.Tensor:
    more = {}
    if TRIAL.sdxl:
        size = 8.0 * TRIAL.reference["latents"].shape[-1]
        sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]])
        more = {"added_cond_kwargs": {"text_embeds": TRIAL.reference["plain.pooled"], "time_ids": sizes}}
    context, steps = TRIAL.reference["plain.context"], TRIAL.reference["timestep"]
    return parts["unet"](TRIAL.reference["latents"], steps, encoder_hidden_states=context, **more).sample


if __name__ == "__main__":
    main()
