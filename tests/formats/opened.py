"""Opens exports in whatever diffusers and transformers it runs with: `python opened.py JOBS.json`.

A job has "pipeline" (a class), "folder" and "out" (paths), and "file", "lora" and "embedding" (paths, or empty).
What the networks say to fixed inputs is written to `out`, so that two versions can be compared.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

PROMPT = "a red cat, <ink> über 7!"


def said(pipeline: Any) -> dict[str, torch.Tensor]:
    """What the networks of a pipeline say to fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    config, found = pipeline.unet.config, {}
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    context = torch.randn(1, 77, config.cross_attention_dim, generator=draw)
    more: dict[str, Any] = {}
    if config.class_embed_type == "projection":
        more["class_labels"] = torch.randn(1, config.projection_class_embeddings_input_dim, generator=draw)
    if config.addition_embed_type == "text_time":
        times = 6 * config.addition_time_embed_dim
        pooled = torch.randn(1, config.projection_class_embeddings_input_dim - times, generator=draw)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0)[None]}
    found["unet"] = pipeline.unet(latents, 500, encoder_hidden_states=context, **more).sample
    found["vae"] = pipeline.vae.decode(latents).sample
    for suffix in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            prompt = pipeline.maybe_convert_prompt(PROMPT, tokenizer)
            ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
            found[f"ids{suffix}"] = ids
            found[f"text{suffix}"] = encoder(ids, output_hidden_states=True).hidden_states[-2]
    if getattr(pipeline, "image_encoder", None) is not None:
        edge = pipeline.image_encoder.config.image_size
        found["image"] = pipeline.image_encoder(torch.rand(1, 3, edge, edge, generator=draw)).image_embeds
    return found


def opened(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    kind = getattr(diffusers, job["pipeline"])
    plain = {"local_files_only": True, "torch_dtype": torch.float32}  # the one's default is what files have
    pipeline = kind.from_pretrained(job["folder"], **plain)
    found = {f"folder.{name}": tensor for name, tensor in said(pipeline).items()}
    if job["file"]:
        single = kind.from_single_file(job["file"], config=job["folder"], **plain)
        found |= {f"file.{name}": tensor for name, tensor in said(single).items()}
    if job["embedding"]:
        pipeline.load_textual_inversion(job["embedding"], token="<ink>")
        found |= {f"embedding.{name}": tensor for name, tensor in said(pipeline).items()}
    if job["lora"]:
        pipeline.load_lora_weights(str(Path(job["lora"]).parent), weight_name=Path(job["lora"]).name)
        found |= {f"lora.{name}": tensor for name, tensor in said(pipeline).items()}
    return found


def main() -> None:
    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(handler)
    warnings.simplefilter("ignore")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        words.clear()
        with torch.no_grad():
            found = opened(job)
        initialized = [word for word in words if "newly initialized" in word and not job["lora"]]
        assert not initialized, initialized
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["out"])


if __name__ == "__main__":
    main()
