"""How the U-Nets and VAEs of latent diffusion are named: diffusers' way and the single file's, block by block.

One description of a topology gives both. The mapping is mechanical (checked against diffusers' own converter, and
frozen in `tests/families/*.names`): level i, layer j of the way down is `input_blocks.{3i+j+1}`, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from sdforge.families import Name

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION_BIASED = ("to_out.0",)
ATTENTION_BARE = ("to_q", "to_k", "to_v")


def unet_names(depths: tuple[int, ...], *, layers: int = 2, label: str = "") -> Iterator[Name]:
    """Names of a U-Net with one level per entry of `depths`: transformer blocks at that level (0: no attention).

    label: what diffusers calls the two layers (`label_emb` in a single file) that take a vector for the whole picture.
    """
    single = "model.diffusion_model."

    def both(
        canonical: str, ldm: str, block: str, parts: str = "weight bias", optional: bool = False
    ) -> Iterator[Name]:
        for part in parts.split():
            yield Name("unet", f"{canonical}.{part}", f"{single}{ldm}.{part}", block, optional)

    def resnet(canonical: str, ldm: str, block: str) -> Iterator[Name]:
        for ours, theirs in RESNET.items():
            yield from both(f"{canonical}.{ours}", f"{ldm}.{theirs}", block, optional=ours == "conv_shortcut")

    def transformer(canonical: str, ldm: str, block: str, depth: int) -> Iterator[Name]:
        for part in ("norm", "proj_in", "proj_out"):
            yield from both(f"{canonical}.{part}", f"{ldm}.{part}", block)
        for i in range(depth):
            inner = f".transformer_blocks.{i}."
            for attention in ("attn1", "attn2"):
                for name in ATTENTION_BARE:
                    part = f"{inner}{attention}.{name}"
                    yield from both(canonical + part, ldm + part, block, "weight")
                for name in ATTENTION_BIASED:
                    part = f"{inner}{attention}.{name}"
                    yield from both(canonical + part, ldm + part, block)
            for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
                yield from both(canonical + inner + name, ldm + inner + name, block)

    levels = len(depths)
    yield from both("time_embedding.linear_1", "time_embed.0", "time")
    yield from both("time_embedding.linear_2", "time_embed.2", "time")
    if label:
        yield from both(f"{label}.linear_1", "label_emb.0.0", "label")
        yield from both(f"{label}.linear_2", "label_emb.0.2", "label")
    yield from both("conv_in", "input_blocks.0.0", "in00")
    for i, depth in enumerate(depths):
        for j in range(layers):
            n = (layers + 1) * i + j + 1
            yield from resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", f"in{n:02}")
            if depth:
                yield from transformer(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", f"in{n:02}", depth)
        if i < levels - 1:
            n = (layers + 1) * (i + 1)
            yield from both(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op", f"in{n:02}")
    yield from resnet("mid_block.resnets.0", "middle_block.0", "mid")
    yield from transformer("mid_block.attentions.0", "middle_block.1", "mid", max(depths))
    yield from resnet("mid_block.resnets.1", "middle_block.2", "mid")
    for i, depth in enumerate(reversed(depths)):
        for j in range(layers + 1):
            n = (layers + 1) * i + j
            yield from resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", f"out{n:02}")
            if depth:
                yield from transformer(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", f"out{n:02}", depth)
        if i < levels - 1:
            n = (layers + 1) * i + layers
            place = f"output_blocks.{n}.{2 if depth else 1}.conv"
            yield from both(f"up_blocks.{i}.upsamplers.0.conv", place, f"out{n:02}")
    yield from both("conv_norm_out", "out.0", "out")
    yield from both("conv_out", "out.2", "out")


def vae_names(levels: int = 4, layers: int = 2) -> Iterator[Name]:
    """Names of the KL autoencoder that the Stable Diffusion families share."""
    single = "first_stage_model."

    def both(canonical: str, ldm: str, optional: bool = False, conv: bool = False) -> Iterator[Name]:
        for part in ("weight", "bias"):
            conv_ = conv and part == "weight"
            yield Name("vae", f"{canonical}.{part}", f"{single}{ldm}.{part}", "", optional, conv_)

    def resnet(canonical: str, ldm: str) -> Iterator[Name]:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            yield from both(f"{canonical}.{part}", f"{ldm}.{part}")
        yield from both(f"{canonical}.conv_shortcut", f"{ldm}.nin_shortcut", optional=True)

    for half in ("encoder", "decoder"):
        yield from both(f"{half}.conv_in", f"{half}.conv_in")
        for i in range(2):
            yield from resnet(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}")
        for ours, theirs in VAE_ATTENTION.items():
            place = f"{half}.mid.attn_1.{theirs}"
            yield from both(f"{half}.mid_block.attentions.0.{ours}", place, conv=ours != "group_norm")
        yield from both(f"{half}.conv_norm_out", f"{half}.norm_out")
        yield from both(f"{half}.conv_out", f"{half}.conv_out")
    for i in range(levels):
        for j in range(layers):
            yield from resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        for j in range(layers + 1):
            yield from resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{levels - 1 - i}.block.{j}")
        if i < levels - 1:
            yield from both(f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv")
            place = f"decoder.up.{levels - 1 - i}.upsample.conv"
            yield from both(f"decoder.up_blocks.{i}.upsamplers.0.conv", place)
    yield from both("quant_conv", "quant_conv")
    yield from both("post_quant_conv", "post_quant_conv")


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ATTENTION_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def clip_names(component: str, single: str, layers: int) -> Iterator[Name]:
    """Names of a CLIP text model of up to `layers` layers, as transformers 4 writes them (with `text_model.`).

    All layers but the first are optional: narrow copies have fewer, and some families leave the last one out.
    """

    def both(name: str, parts: str = "weight bias", optional: bool = False) -> Iterator[Name]:
        for part in parts.split():
            yield Name(component, f"{name}.{part}", f"{single}{name}.{part}", "", optional)

    yield from both("text_model.embeddings.token_embedding", "weight")
    yield from both("text_model.embeddings.position_embedding", "weight")
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}."
        for part in ("k_proj", "out_proj", "q_proj", "v_proj"):
            yield from both(f"{layer}self_attn.{part}", optional=i > 0)
        for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
            yield from both(layer + part, optional=i > 0)
    yield from both("text_model.final_layer_norm")


# transformers' names → those of OpenCLIP's (and OpenAI's own) blocks
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip_layers(component: str, canonical: str, single: str, layers: int) -> Iterator[Name]:
    """Names of a CLIP transformer's layers; OpenCLIP keeps queries, keys and values in one tensor, in this order."""
    for i in range(layers):
        ours, theirs, optional = f"{canonical}{i}.", f"{single}{i}.", i > 0
        for part in ("weight", "bias"):
            for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
                fused = f"{theirs}attn.in_proj_{part}"
                yield Name(component, f"{ours}self_attn.{name}.{part}", fused, "", optional, share=(place, 3))
            for name, other in OPEN_CLIP.items():
                yield Name(component, f"{ours}{name}.{part}", f"{theirs}{other}.{part}", "", optional)


def open_clip_names(component: str, single: str, layers: int, *, projection: bool) -> Iterator[Name]:
    """Names of an OpenCLIP text model of up to `layers` layers, canonically as transformers 4 writes CLIP's.

    projection: whether the matrix behind the last token is used; OpenCLIP multiplies by it from the right.
    """
    model = "text_model."
    yield Name(component, f"{model}embeddings.token_embedding.weight", f"{single}token_embedding.weight")
    yield Name(component, f"{model}embeddings.position_embedding.weight", f"{single}positional_embedding")
    yield from _open_clip_layers(component, f"{model}encoder.layers.", f"{single}transformer.resblocks.", layers)
    for part in ("weight", "bias"):
        yield Name(component, f"{model}final_layer_norm.{part}", f"{single}ln_final.{part}")
    if projection:
        yield Name(component, "text_projection.weight", f"{single}text_projection", turned=True)


def clip_vision_names(component: str, single: str, layers: int) -> Iterator[Name]:
    """Names of a CLIP vision model with its projection, in a single file as OpenAI and OpenCLIP write it."""
    model = "vision_model."
    yield Name(component, f"{model}embeddings.class_embedding", f"{single}class_embedding")
    yield Name(component, f"{model}embeddings.patch_embedding.weight", f"{single}conv1.weight")
    yield Name(component, f"{model}embeddings.position_embedding.weight", f"{single}positional_embedding")
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for part in ("weight", "bias"):
            yield Name(component, f"{model}{ours}.{part}", f"{single}{theirs}.{part}")
    yield from _open_clip_layers(component, f"{model}encoder.layers.", f"{single}transformer.resblocks.", layers)
    yield Name(component, "visual_projection.weight", f"{single}proj", turned=True)


LAYER = re.compile(r"(.*\.layers\.)(\d+)\.")


def lacking(names: Iterable[Name], here: Collection[str]) -> list[str]:
    """Return the canonical names that a component lacks, sorted; here: those that it has.

    What is optional is there whole or not at all: a layer with all before it, a shortcut with weight and bias.
    """
    deepest: dict[str, int] = {}
    for found in filter(None, map(LAYER.match, here)):
        deepest[found[1]] = max(deepest.get(found[1], 0), int(found[2]))
    modules = {name.rpartition(".")[0] for name in here}

    def belongs(name: Name) -> bool:
        layer = LAYER.match(name.canonical)
        if layer:
            return int(layer[2]) <= deepest.get(layer[1], 0)
        return not name.optional or name.canonical.rpartition(".")[0] in modules

    return sorted(name.canonical for name in names if name.canonical not in here and belongs(name))
