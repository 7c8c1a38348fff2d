"""AUTOMATIC1111's web UI, without its pages, on files that `forge install` has put into its folder."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from kit import Trial

TRIAL = Trial()
FLAGS = "--use-cpu all --no-half --precision full --skip-version-check --no-hashing --no-download-sd-model"
sys.argv[1:] = ["--data-dir", str(TRIAL.home), *FLAGS.split()]
CLIP = Path("openai/clip-vit-large-patch14")  # looked for below the folder in which it runs, before the network


def lay_clip() -> None:
    """Put the vocabulary and the text encoder's sizes where the program looks for them."""
    os.chdir(TRIAL.home)
    CLIP.mkdir(parents=True, exist_ok=True)
    folder = TRIAL.root / "out" / "plain" / "diffusers"
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(folder / "tokenizer" / name, CLIP / name)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"model_type": "clip_text_model", "vocab_size": len(json.loads((CLIP / "vocab.json").read_text()))}
    (CLIP / "config.json").write_text(json.dumps(config))
    (CLIP / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


lay_clip()
import pytorch_lightning  # noqa: E402, F401 -- before the program's modules, as its own start has it
from modules import timer  # noqa: E402

TIMED = timer  # its modules expect it to be there
from modules import import_hook, paths  # noqa: E402, F401, I001
import ldm.modules.encoders.modules  # noqa: E402, F401
from modules import shared_init  # noqa: E402

shared_init.initialize()
importlib.import_module("modules.sd_models")  # first of all, since they import each other in a circle
from modules import (  # noqa: E402
    extra_networks,
    prompt_parser,
    script_callbacks,
    sd_hijack,
    sd_hijack_optimizations,
    sd_models,
    sd_samplers,
    sd_unet,
    shared,
    shared_items,
)
from modules.hypernetworks import hypernetwork  # noqa: E402

sys.path.insert(0, str(TRIAL.program / "extensions-builtin" / "Lora"))
import extra_networks_lora  # noqa: E402
import lora_patches  # noqa: E402
import networks  # noqa: E402

PROMPT = "a drawing of mascot with red hair"


def start() -> None:
    """Do what the program does at its start, without pages and scripts."""
    sd_models.setup_model()
    sd_samplers.set_samplers()
    sd_models.list_models()
    script_callbacks.on_list_optimizers(sd_hijack_optimizations.list_optimizers)
    sd_hijack.list_optimizers()
    sd_unet.list_unets()
    shared_items.reload_hypernetworks()
    extra_networks.initialize()
    networks.originals = lora_patches.LoraPatches()
    networks.extra_network_lora = extra_networks_lora.ExtraNetworkLora()
    script_callbacks.on_model_loaded(networks.assign_network_names_to_compvis_modules)
    # what does not fit is told on the level of debugging
    logging.getLogger().setLevel(logging.DEBUG)
    TRIAL.said.setLevel(logging.DEBUG)
    TRIAL.said.addFilter(lambda record: str(record.msg).startswith("Network"))


def checkpoint(preset: str) -> Any:
    with TRIAL.row(f"{preset}.safetensors") as row:
        model = sd_models.load_model(sd_models.get_closet_checkpoint_match(preset))
        row["kind"] = Path(model.used_config).name
        found = TRIAL.reference
        size = 8 * found["latents"].shape[-1]
        said = prompt_parser.SdConditioning([PROMPT], width=size, height=size)
        given = model.get_learned_conditioning(said)
        context = given["crossattn"] if TRIAL.sdxl else given
        row["context"] = TRIAL.ratio(f"{preset}.context", context)
        noise = model.apply_model(found["latents"], found["timestep"].reshape(1).long(), given)
        row["noise"] = TRIAL.ratio(f"{preset}.noise", noise)
        if preset == "plain":
            row["picture"] = TRIAL.ratio("picture", model.first_stage_model.decode(found["latents"]))
            db = sd_hijack.model_hijack.embedding_db
            row["words"] = sorted(db.word_embeddings)
    return model


def embeddings(model: Any) -> None:
    """Read every form of the embedding as the program's own folder is read."""
    folder = TRIAL.root / "out" / "plain" / "embeddings"
    db = sd_hijack.model_hijack.embedding_db
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]):
        with TRIAL.row(f"embeddings/{file.name}") as row:
            db.word_embeddings.clear()
            db.load_from_file(str(file), file.name)
            (word,) = db.word_embeddings.values()
            found = word.vec if isinstance(word.vec, dict) else {"clip_l": word.vec}
            row["rows"] = TRIAL.rows_apart(found)
    db.load_textual_inversion_embeddings(force_reload=True)
    assert model is shared.sd_model


def hypernetworks() -> None:
    for name in shared.hypernetworks:
        with TRIAL.row(f"hypernetworks/{name}.pt") as row:
            found = hypernetwork.load_hypernetwork(name)
            layers = {
                (width, side): pair[i].linear for width, pair in found.layers.items() for i, side in enumerate("kv")
            }
            row["layers"] = TRIAL.layers_apart(name, layers)


def weights(model: Any) -> Any:
    """Return canonical name → the program's tensor, with the networks that are loaded."""
    state = model.state_dict()

    def theirs(name: str) -> torch.Tensor | None:
        single, part, count, turned = TRIAL.single[name]
        for place in (single, single.replace(".transformer.", ".wrapped.transformer."), wrapped(single)):
            if place in state:
                whole = state[place]
                whole = whole.T if turned else whole
                rows = whole.shape[0] // count
                return whole[part * rows : (part + 1) * rows]
        return None

    return theirs


def wrapped(single: str) -> str:
    """Return the name of a text encoder's tensor behind what the program puts around it."""
    start, dot, rest = single.partition(".")
    if start == "conditioner":
        number, _, rest = rest.removeprefix("embedders.").partition(".")
        return f"conditioner.embedders.{number}.wrapped.{rest}"
    return f"{start}.wrapped{dot}{rest}"


def loras(model: Any, preset: str, strength: float) -> None:
    networks.list_available_networks()
    for file in sorted((TRIAL.root / "loras" / preset).glob("*.safetensors")):
        if file.stem.endswith(".diffusers"):
            continue
        with TRIAL.row(f"loras/{file.name}") as row:
            networks.load_networks([file.stem], [strength], [strength])
            row["modules"] = len(networks.loaded_networks[0].modules)
            row["kind"] = networks.available_networks[file.stem].sd_version.name
            for module in model.modules():
                networks.network_apply_weights(module)
            row["failed layers"] = networks.extra_network_lora.errors.pop(file.stem, 0)
            row |= TRIAL.change(preset, TRIAL.loras[file.stem], weights(model))
            networks.load_networks([])
            for module in model.modules():
                networks.network_apply_weights(module)


@torch.no_grad()
def main() -> None:
    start()
    for preset in ("forms", "whole"):
        checkpoint(preset)
    model = checkpoint("plain")
    embeddings(model)
    hypernetworks()
    for preset, strength in (("whole", 0.8), ("forms", 1.0)):
        loras(model, preset, strength)
    TRIAL.end()


if __name__ == "__main__":
    main()
