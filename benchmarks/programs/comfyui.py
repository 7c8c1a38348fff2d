"""ComfyUI's nodes on files that `forge install` has put into its folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from kit import Trial

TRIAL = Trial()
sys.argv[1:] = ["--cpu", "--force-fp32", "--fp32-text-enc", "--fp32-vae", "--base-directory", str(TRIAL.home)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
from comfy.diffusers_load import load_diffusers  # noqa: E402
from comfy.sd1_clip import load_embed  # noqa: E402
from comfy_extras.nodes_hypernetwork import HypernetworkLoader  # noqa: E402

DIFFUSERS = ".diffusers"  # behind the names of files as diffusers writes them
PROMPT = "a drawing of embedding:{} with red hair"


def noise(model: Any, context: torch.Tensor, **more: Any) -> torch.Tensor:
    """Return what noise a model sees in the reference's latents."""
    sigma = TRIAL.reference["sigma"].reshape(1)
    x = TRIAL.reference["latents"] * (sigma**2 + 1) ** 0.5
    comfy.model_management.load_models_gpu([model])
    clean = model.model.apply_model(x, sigma, c_crossattn=context, **more)
    return (x - clean) / sigma


def encode(clip: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    ((context, more),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    return context, more["pooled_output"]


def checkpoint(preset: str) -> tuple[Any, Any]:
    """Load a preset's single file, say a prompt with its word, and look at latents."""
    with TRIAL.row(f"{preset}.safetensors") as row:
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(f"{preset}.safetensors")
        row["kind"] = type(model.model.model_config).__name__
        context, pooled = encode(clip, PROMPT.format("mascot"))
        row["context"] = TRIAL.ratio(f"{preset}.context", context)
        more: dict[str, Any] = {}
        if TRIAL.sdxl:
            row["pooled"] = TRIAL.ratio(f"{preset}.pooled", pooled)
            size = 8 * TRIAL.reference["latents"].shape[-1]
            stated = {"width": size, "height": size, "pooled_output": pooled, "noise": TRIAL.reference["latents"]}
            more = {"y": model.model.encode_adm(**stated, device="cpu")}
        row["noise"] = TRIAL.ratio(f"{preset}.noise", noise(model, context, **more))
        if preset == "plain":
            picture = vae.first_stage_model.float().decode(TRIAL.reference["latents"])
            row["picture"] = TRIAL.ratio("picture", picture)
    return model, clip


def folders() -> None:
    """Load diffusers folders, with a word in the table and without, as the node for such folders does."""
    for preset in ("bare", "plain"):
        with TRIAL.row(f"{preset}/diffusers/") as row:
            model, *_ = load_diffusers(str(TRIAL.root / "out" / preset / "diffusers"))
            row["kind"] = type(model.model.model_config).__name__
            row["noise"] = TRIAL.ratio("plain.noise", noise(model, TRIAL.reference["plain.context"]))


def embeddings() -> None:
    """Read every form of the embedding as a prompt's words do."""
    folder = TRIAL.root / "out" / "plain" / "embeddings"
    sizes = {"clip_l": 768, "clip_g": 1280} if TRIAL.sdxl else {"clip_l": 768}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]):
        with TRIAL.row(f"embeddings/{file.name}") as row:
            found = {
                key: load_embed(file.name, [str(folder)], size, key)
                for key, size in sizes.items()
                if TRIAL.holds(file.name, key)
            }
            row["rows"] = TRIAL.rows_apart(found)


def weights(model: Any, clip: Any) -> Any:
    """Return canonical name → the program's tensor, everything applied."""
    comfy.model_management.load_models_gpu([model, clip.patcher], force_patch_weights=True)
    unet, texts = model.model.diffusion_model.state_dict(), clip.cond_stage_model.state_dict()
    encoders = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}

    def theirs(name: str) -> torch.Tensor | None:
        component, _, path = name.partition(".")
        if component == "unet":
            return unet.get(TRIAL.single[name][0].removeprefix("model.diffusion_model."))
        return texts.get(encoders[component] + path)

    return theirs


def diffusers_lora() -> None:
    """Load the LoRA as diffusers writes it."""
    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint("plain.safetensors")
    name = f"whole{DIFFUSERS}.safetensors"
    with TRIAL.row(f"loras/{name}") as row:
        model, clip = nodes.LoraLoader().load_lora(model, clip, name, 0.8, 0.8)
        row |= TRIAL.change("whole", TRIAL.loras["whole"], weights(model, clip))


def loras(preset: str, strength: float) -> None:
    """Load all LoRAs of a preset one after the other, and compare the weights with what was baked."""
    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint("plain.safetensors")
    found = []
    own = {path.stem for path in (TRIAL.root / "loras" / preset).glob("*.safetensors")}
    for name in folder_paths.get_filename_list("loras"):
        if Path(name).stem not in own or DIFFUSERS in name:
            continue
        with TRIAL.row(f"loras/{name}") as row:
            model, clip = nodes.LoraLoader().load_lora(model, clip, name, strength, strength)
            found.append(row)
    before = len(TRIAL.said.lines)
    theirs = weights(model, clip)
    late = TRIAL.said.lines[before:]  # of what fails only where it is added to a weight
    for row in found:
        names = TRIAL.loras[Path(row["what"]).stem]
        row |= TRIAL.change(preset, names, theirs)
        places = [TRIAL.single[name][0].removeprefix("model.") for name in names]
        row["said"] += [line for line in late if any(place in line for place in places)]
        print(row, flush=True)


def hypernetworks(model: Any, context: torch.Tensor) -> None:
    """Load hypernetworks; what all of them make of latents is compared where each is read as it is."""
    for name in folder_paths.get_filename_list("hypernetworks"):
        with TRIAL.row(f"hypernetworks/{name}") as row:
            (model,) = HypernetworkLoader().load_hypernetwork(model, name, 1.0)
            patch = model.model_options["transformer_options"]["patches"]["attn2_patch"][-1]
            row["layers"] = TRIAL.layers_apart(
                Path(name).stem,
                {(width, side): pair[i] for width, pair in patch.hypernet.items() for i, side in enumerate("kv")},
            )
    with TRIAL.row("both hypernetworks") as row:
        options = model.model_options["transformer_options"]
        row["noise"] = TRIAL.ratio("moods.noise", noise(model, context, transformer_options=options))


@torch.no_grad()
def main() -> None:
    model, clip = checkpoint("plain")
    if not TRIAL.sdxl:
        hypernetworks(model, encode(clip, PROMPT.format("mascot"))[0])
    embeddings()
    folders()
    for preset in ("forms", "whole"):
        checkpoint(preset)
    for preset, strength in (("whole", 0.8), ("forms", 1.0)):
        loras(preset, strength)
    diffusers_lora()
    TRIAL.end()


if __name__ == "__main__":
    main()
