"""kohya's scripts on a preset's files: their own U-Net and LoRA modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from kit import Trial

TRIAL = Trial()

from library import model_util, sdxl_model_util  # noqa: E402
from networks.lora import create_network_from_weights  # noqa: E402

OUT = TRIAL.root / "out"


def load(preset: str) -> tuple[list[Any], Any, Any]:
    """Return text encoders, U-Net and VAE."""
    path = str(OUT / preset / f"{preset}.safetensors")
    if TRIAL.sdxl:
        one, two, vae, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint("sdxl_base_v1-0", path, "cpu")
        return [one, two], unet.float(), vae
    text, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, path)
    return [text], unet.float(), vae.float()


def noise(unet: Any) -> torch.Tensor:
    found = TRIAL.reference
    steps = found["timestep"].reshape(1)
    if not TRIAL.sdxl:
        return unet(found["latents"], steps, found["plain.context"]).sample
    from library import sdxl_train_util

    size = torch.tensor([[8.0 * found["latents"].shape[-1]] * 2])
    vector = sdxl_train_util.get_size_embeddings(size, torch.zeros(1, 2), size, "cpu")
    return unet(found["latents"], steps, found["plain.context"], torch.cat([found["plain.pooled"], vector], 1))


@torch.no_grad()
def main() -> None:
    with TRIAL.row("plain.safetensors") as row:
        _, unet, vae = load("plain")
        row["noise"] = TRIAL.ratio("plain.noise", noise(unet))
        row["picture"] = TRIAL.ratio("picture", vae.decode(TRIAL.reference["latents"]).sample)

    for preset, strength in (("whole", 0.8), ("forms", 1.0)):
        for file in sorted((TRIAL.root / "loras" / preset).glob("*.safetensors")):
            if file.stem in ("whole", "lora"):
                lora(file, preset, strength)
    TRIAL.end()


def lora(file: Path, preset: str, strength: float) -> None:
    with TRIAL.row(f"loras/{file.name}") as row:
        texts, unet, vae = load("plain")
        weights = load_file(file)
        given = texts if TRIAL.sdxl else texts[0]
        network, _ = create_network_from_weights(strength, None, vae, given, unet, weights, for_inference=True)
        modules = {each.lora_name for each in network.text_encoder_loras + network.unet_loras}
        row["left"] = sorted({name.partition(".")[0] for name in weights} - modules)
        network.merge_to(given, unet, weights, torch.float32, "cpu")
        states = dict(
            zip(("text_encoder", "text_encoder_2"), (dict(each.state_dict()) for each in texts), strict=False)
        )
        unet_state = unet.state_dict()

        def theirs(name: str) -> torch.Tensor | None:
            component, _, path = name.partition(".")
            if component == "unet":
                return unet_state.get(
                    TRIAL.single[name][0].removeprefix("model.diffusion_model.") if TRIAL.sdxl else path
                )
            return states[component].get(path, states[component].get(path.removeprefix("text_model.")))

        row |= TRIAL.change(preset, TRIAL.loras[file.stem], theirs)


if __name__ == "__main__":
    main()
