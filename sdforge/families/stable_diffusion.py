"""What the Stable Diffusion families share: a U-Net of levels, CLIP encoders, the KL autoencoder (Rombach et al. 2022).

A family states its topology as values; names, facts and configurations follow from them here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from sdforge.errors import UsageError
from sdforge.families import PREDICTIONS, Family, Name, is_count
from sdforge.families.naming import clip_names, clip_vision_names, open_clip_names, unet_names, vae_names
from sdforge.formats.tokenizer import END
from sdforge.identity import Json

UNET = "model.diffusion_model."
EMA = "model_ema."
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "model_ema.decay",
    "model_ema.num_updates",
    "denoiser.sigmas",
)
LATENT = 8  # pixels along the edge of what becomes one place in the latents
# what is said of a fact that is stated as what it cannot be, by the type of its neutral value
BELONGS = {int: "one whole number above 0", float: "a number above 0", str: "a word", bool: "true or false"}
CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut")
CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TABLE = "text_model.embeddings.token_embedding.weight"
# by which OpenAI's CLIP normalises pictures in 0 … 1, per channel
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TextEncoder:
    """One CLIP text model of a family.

    single: how its names begin in a single file; fused: whether those are OpenCLIP's; layers: at most.
    unused_layers: how many more its authors trained behind those, which nothing reads.
    projected: whether the vector behind the last token is used; heads, activation, padding: neutral facts.
    """

    component: str
    single: str
    layers: int
    heads: int
    activation: str
    padding: str = END
    fused: bool = False
    projected: bool = False
    unused_layers: int = 0

    @property
    def suffix(self) -> str:
        """How its facts and its tokenizer's folder end: nothing, or `_2`."""
        return self.component.removeprefix("text_encoder")

    def names(self) -> Iterable[Name]:
        if self.fused:
            return open_clip_names(self.component, self.single, self.layers, projection=self.projected)
        return clip_names(self.component, self.single, self.layers)


@dataclass(frozen=True)
class ImageEncoder:
    """The CLIP vision model of a family that draws from pictures; heads, activation: neutral facts."""

    single: str
    layers: int
    heads: int
    activation: str


# OpenCLIP ViT-H as Stable Diffusion 2 uses it: of 24 layers the last is left out (`layer: penultimate`), and prompts
# are filled with zeros, token 0 being `!`
VIT_H = TextEncoder(
    "text_encoder",
    "cond_stage_model.model.",
    layers=23,
    heads=16,
    activation="gelu",
    padding="!",
    fused=True,
    unused_layers=1,
)
VIT_H_UNUSED = {
    f"{VIT_H.single}transformer.resblocks.23.": "the text model's last layer, which is never used",
    f"{VIT_H.single}text_projection": "the text model's projection, which is never used",
}


def unused_projection(encoder: TextEncoder) -> dict[str, str]:
    """Say why the projection of a text encoder is read over, of which the hidden states are used; some save it."""
    why = "the text model's projection, which is never used"
    return {f"{clip}text_projection": why for clip in (encoder.single, encoder.single.removesuffix("transformer."))}


def unused_half(clip: str) -> dict[str, str]:
    """Say why the text half of an image encoder's CLIP is read over, whose names begin with `clip`."""
    parts = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    return {f"{clip}{part}": "the text half of the image encoder's CLIP, which is never used" for part in parts}


def neutral_facts(
    *,
    heads: Json,
    resolution: int,
    scaling: float,
    encoders: tuple[TextEncoder, ...],
    images: ImageEncoder | None = None,
) -> dict[str, Json]:
    """Return every fact of a family at its neutral value."""
    facts: dict[str, Json] = {
        "prediction": "epsilon",
        "zero_terminal_snr": False,
        "guidance_free": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "latent_scaling": scaling,
        "resolution": resolution,  # pixels
        "unet_heads": heads,  # a number, or one for each level
        "unet_groups": 32,
        "vae_groups": 32,
    }
    for each in encoders:
        facts |= {
            f"text_heads{each.suffix}": each.heads,
            f"text_activation{each.suffix}": each.activation,
            f"text_padding{each.suffix}": each.padding,
        }
    if encoders:
        facts["tokens"] = []  # what insert appended: [word, number of rows] in the order of the rows
    if images:
        facts |= {"image_heads": images.heads, "image_activation": images.activation}
    return facts


def fact_owners(neutral: dict[str, Json]) -> dict[str, str]:
    """Return fact → the part with which it moves; several text encoders move as one."""
    return {name: _owner(name) for name in neutral}


def _owner(fact: str) -> str:
    if fact.startswith(("text_", "tokens")):
        return "text_encoder"
    if fact.startswith("image_"):
        return "image_encoder"
    return "vae" if fact in ("latent_scaling", "vae_groups") else "unet"


class StableDiffusion(Family):
    """A family that is described by these values."""

    depths: ClassVar[tuple[int, ...]]  # transformer blocks at each level of the U-Net, 0: no attention
    linear: ClassVar[bool]  # whether what stands around those blocks are matrices, not 1×1 convolutions
    label: ClassVar[str]  # what diffusers calls the layers for a vector that concerns the whole picture
    encoders: ClassVar[tuple[TextEncoder, ...]]
    images: ClassVar[ImageEncoder | None]
    unused: ClassVar[dict[str, str]]  # how further tensors of a single file begin → why they are read over

    @property
    def down(self) -> list[str]:
        return ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in self.depths]

    @property
    def up(self) -> list[str]:
        return ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(self.depths)]

    # -- names -----------------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> tuple[Name, ...]:
        names = [*unet_names(self.depths, label=self.label)]
        for each in self.encoders:
            names += each.names()
        if self.images:
            names += clip_vision_names("image_encoder", self.images.single, self.images.layers)
        if "image_normalizer" in self.networks:
            names += [Name("image_normalizer", part, f"noise_augmentor.data_{part}") for part in ("mean", "std")]
        return (*names, *vae_names())

    def names(self) -> tuple[Name, ...]:
        return self._names

    def alias(self, name: str) -> str:
        # NovelAI's leak and its descendants leave `text_model.` out
        for each in self.encoders:
            if not each.fused and name.startswith(each.single) and not name.startswith(f"{each.single}text_model."):
                return f"{each.single}text_model.{name.removeprefix(each.single)}"
        return name

    def ignored(self, name: str) -> str:
        if name in SCHEDULE:
            return "tables of the noise schedule, which every program computes"
        if name.startswith(EMA):
            return "a second copy of the weights (EMA)"
        if name.endswith(".embeddings.position_ids"):
            return "position ids, which are 0 … 76"
        if name.endswith(".logit_scale"):
            return "CLIP's logit scale, which nothing is drawn with"
        return next((why for start, why in self.unused.items() if name.startswith(start)), "")

    # -- facts -----------------------------------------------------------------------------------------------------

    def tokenizers(self) -> dict[str, str]:
        return {f"tokenizer{each.suffix}": f"text_padding{each.suffix}" for each in self.encoders}

    def facts_of_shapes(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        projection = shapes.get("image_encoder", {}).get("visual_projection.weight", (0,))
        # OpenAI's own CLIP ViT-L/14 has another activation than the models of OpenCLIP
        return self.stated({"image_activation": "quick_gelu"} if projection[0] == 768 else {})

    def facts_of_folder(self, configs: dict[str, dict[str, Any]]) -> dict[str, Json]:
        self._refuse_others(configs)
        unet, vae, schedule = (configs.get(part, {}) for part in ("unet", "vae", "scheduler"))
        facts: dict[str, Json] = {
            "prediction": schedule.get("prediction_type", "epsilon"),
            "zero_terminal_snr": bool(schedule.get("rescale_betas_zero_snr", False)),
            "guidance_free": bool(schedule.get("guidance_free", False)),
            "beta_start": schedule.get("beta_start", 0.00085),
            "beta_end": schedule.get("beta_end", 0.012),
            "latent_scaling": vae.get("scaling_factor", 0.18215),
            "resolution": self._resolution(unet.get("sample_size")),
            "unet_heads": self._heads(unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)),
            "unet_groups": unet.get("norm_num_groups", 32),
            "vae_groups": vae.get("norm_num_groups", 32),
        }
        parts = [(each.component, f"text_{{}}{each.suffix}") for each in self.encoders]
        for part, fact in [*parts, *([("image_encoder", "image_{}")] if self.images else [])]:
            config, heads, activation = configs.get(part, {}), fact.format("heads"), fact.format("activation")
            facts[heads] = config.get("num_attention_heads", self.neutral[heads])
            facts[activation] = config.get("hidden_act", self.neutral[activation])
        if facts["prediction"] not in PREDICTIONS:
            raise UsageError(f"predicts {shown(facts['prediction'])}, which is neither epsilon nor v_prediction")
        if odd := self.odd_fact(facts):
            what = BELONGS[type(self.neutral[odd])]
            raise UsageError(f"states {odd.replace('_', ' ')} as {shown(facts[odd])} where {what} belongs")
        missing = {"unet", "vae"} - configs.keys()  # of which diffusers' defaults say nothing
        return self.stated({name: value for name, value in facts.items() if self.owners[name] not in missing})

    def _resolution(self, stated: Any) -> Json:
        """Return pixels for the edge of latents that a U-Net's configuration states: nothing is diffusers' default."""
        edge = 64 if stated is None else stated
        return edge * LATENT if type(edge) is int else edge

    def _refuse_others(self, configs: dict[str, dict[str, Any]]) -> None:
        unet = {
            "down_block_types": self.down,
            "up_block_types": self.up,
            "act_fn": "silu",
            "layers_per_block": 2,
            "class_embed_type": "projection" if self.label == "class_embedding" else None,
            "addition_embed_type": "text_time" if self.label == "add_embedding" else None,
            "in_channels": 4,
        }
        if max(self.depths) > 1:
            unet["transformer_layers_per_block"] = self._layers()
        self._expect(configs, "unet", unet)
        vae = {"latent_channels": 4, "layers_per_block": 2, "shift_factor": None, "latents_mean": None}
        self._expect(configs, "vae", vae)
        schedule = {"beta_schedule": "scaled_linear", "trained_betas": None, "num_train_timesteps": 1000}
        self._expect(configs, "scheduler", schedule)
        if "image_normalizer" in self.networks:
            noise = {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None, "num_train_timesteps": 1000}
            self._expect(configs, "image_noising_scheduler", noise)

    def _expect(self, configs: dict[str, dict[str, Any]], part: str, wanted: dict[str, Any]) -> None:
        config = configs.get(part, {})
        for key, value in wanted.items():
            if key in config and config[key] != value:
                stated = f"{key} = {shown(config[key])}, expected {value!r}"
                raise UsageError(f"is not {self.title}: {part} states {stated}")

    def _layers(self) -> list[int]:
        return [max(1, depth) for depth in self.depths]

    def _heads(self, stated: Any) -> Json:
        """Return heads as one number, or as one for each level where those differ."""
        heads = stated if isinstance(stated, list) else [stated] * len(self.depths)
        if len(heads) != len(self.depths) or not all(map(is_count, heads)):
            where = "whole numbers belong, one or one for each level"
            raise UsageError(f"states unet heads as {shown(stated)} where {where}")
        return heads if len(set(heads)) > 1 else heads[0]

    # -- configurations --------------------------------------------------------------------------------------------

    def configs(self, facts: dict[str, Json], shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        found: dict[str, Any] = {"scheduler": self._scheduler_config(facts)}
        if "unet" in shapes:
            found["unet"] = self._unet_config(facts, shapes)
        if "vae" in shapes:
            found["vae"] = self._vae_config(facts, shapes["vae"])
        for each in self.encoders:
            if each.component in shapes:
                found[each.component] = self._text_config(facts, shapes[each.component], each)
        if "image_encoder" in shapes:
            found["image_encoder"] = vision_config(
                shapes["image_encoder"], self.fact(facts, "image_heads"), self.fact(facts, "image_activation")
            )
            edge = found["image_encoder"]["image_size"]
            found["feature_extractor"] = {
                "crop_size": {"height": edge, "width": edge},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": list(IMAGE_MEAN),
                "image_processor_type": "CLIPImageProcessor",
                "image_std": list(IMAGE_STD),
                "resample": 3,  # bicubic
                "rescale_factor": 1 / 255,
                "size": {"shortest_edge": edge},
            }
        if "image_normalizer" in shapes:
            found["image_normalizer"] = {"embedding_dim": shapes["image_normalizer"]["mean"][1]}
            found["image_noising_scheduler"] = {
                "beta_schedule": "squaredcos_cap_v2",
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
            }
        return found

    def _unet_config(self, facts: dict[str, Json], shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        unet, levels = shapes["unet"], range(len(self.depths))
        config = {
            "act_fn": "silu",
            "attention_head_dim": self.fact(facts, "unet_heads"),  # diffusers' name for the number of heads
            "block_out_channels": [unet[f"down_blocks.{i}.resnets.1.conv2.weight"][0] for i in levels],
            "cross_attention_dim": unet[CROSS][1],
            "down_block_types": self.down,
            "in_channels": unet["conv_in.weight"][1],
            "layers_per_block": 2,
            "norm_num_groups": self.fact(facts, "unet_groups"),
            "out_channels": unet["conv_out.weight"][0],
            "sample_size": self.fact(facts, "resolution") // LATENT,
            "up_block_types": self.up,
        }
        if self.linear:
            config["use_linear_projection"] = True
        if max(self.depths) > 1:
            config["transformer_layers_per_block"] = self._layers()
        if self.label:
            config["projection_class_embeddings_input_dim"] = unet[f"{self.label}.linear_1.weight"][1]
        if self.label == "class_embedding":
            config["class_embed_type"] = "projection"
        if self.label == "add_embedding":
            pooled = shapes.get("text_encoder_2", {}).get("text_projection.weight", (1280,))[0]
            config["addition_embed_type"] = "text_time"
            # the six numbers of a picture's sizes share what the text leaves
            config["addition_time_embed_dim"] = (config["projection_class_embeddings_input_dim"] - pooled) // 6
        return config

    def _vae_config(self, facts: dict[str, Json], vae: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {
            "act_fn": "silu",
            "block_out_channels": [vae[f"encoder.down_blocks.{i}.resnets.1.conv2.weight"][0] for i in range(4)],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": self.fact(facts, "vae_groups"),
            "out_channels": 3,
            "sample_size": self.fact(facts, "resolution"),
            "scaling_factor": self.fact(facts, "latent_scaling"),
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }

    def _text_config(
        self, facts: dict[str, Json], text: dict[str, tuple[int, ...]], encoder: TextEncoder
    ) -> dict[str, Any]:
        table = text[TABLE]
        words = table[0] - sum(count for _, count in self.fact(facts, "tokens"))
        return {
            "attention_dropout": 0.0,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "hidden_act": self.fact(facts, f"text_activation{encoder.suffix}"),
            "hidden_size": table[1],
            "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"][0],
            "num_attention_heads": self.fact(facts, f"text_heads{encoder.suffix}"),
            "num_hidden_layers": sum(name.endswith(".layer_norm1.weight") for name in text),
            "pad_token_id": words - 1,
            "projection_dim": text.get("text_projection.weight", table[1:])[0],
            "vocab_size": table[0],
        }

    def _scheduler_config(self, facts: dict[str, Json]) -> dict[str, Any]:
        config = {
            "beta_end": self.fact(facts, "beta_end"),
            "beta_schedule": "scaled_linear",
            "beta_start": self.fact(facts, "beta_start"),
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": self.fact(facts, "prediction"),
            "rescale_betas_zero_snr": self.fact(facts, "zero_terminal_snr"),
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "trailing" if self.fact(facts, "zero_terminal_snr") else "leading",
        }
        if not self.guided(facts):
            config["guidance_free"] = True  # nobody else's key: diffusers reads over it
        return config

    def widths(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, part, name, axis in (
            ("channels", "unet", "conv_in.weight", 0),
            ("context", "unet", CROSS, 1),
            ("text", "text_encoder", TABLE, 1),
            ("text_2", "text_encoder_2", TABLE, 1),
            ("image", "image_encoder", "visual_projection.weight", 0),
        ):
            if name in shapes.get(part, {}):
                found[key] = shapes[part][name][axis]
        return found


def vision_config(vision: dict[str, tuple[int, ...]], heads: int, activation: str) -> dict[str, Any]:
    """Return the configuration of a CLIP vision model with these tensors (name → shape)."""
    width, _, patch, _ = vision["vision_model.embeddings.patch_embedding.weight"]
    places = vision["vision_model.embeddings.position_embedding.weight"][0] - 1
    return {
        "attention_dropout": 0.0,
        "hidden_act": activation,
        "hidden_size": width,
        "image_size": round(places**0.5) * patch,
        "intermediate_size": vision["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": sum(name.endswith(".layer_norm1.weight") for name in vision),
        "patch_size": patch,
        "projection_dim": vision["visual_projection.weight"][0],
    }


def stated_levels(unet: dict[str, Any]) -> int:
    """Return of how many levels a U-Net is by its configuration; 0 where that does not say."""
    blocks = unet.get("down_block_types")
    return len(blocks) if isinstance(blocks, list) else 0


def has_matrices(unet: dict[str, Any]) -> bool:
    """Say whether a U-Net is of a family that has matrices around its attention, by its configuration.

    Scripts write Stable Diffusion 2.x with convolutions of one pixel there, which are the same numbers: the width of
    what it is told tells the families apart.
    """
    context = unet.get("cross_attention_dim")
    return context == 1024 or (context != 768 and bool(unet.get("use_linear_projection")))


def shown(value: Any) -> str:
    """Return a value of a configuration for an error's sentence, however long it is."""
    return repr(value)[:60]


def channels(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return how many channels the U-Net of a single file takes: 4 unless it is told more than noisy latents."""
    return (*shapes.get(f"{UNET}input_blocks.0.0.weight", ()), 0, 0)[1]


def lone_unet(shapes: dict[str, tuple[int, ...]], *, linear: bool) -> bool:
    """Say whether a single file has such a U-Net and nothing that reads prompts or pictures, as ComfyUI keeps them.

    linear: whether what stands around its transformer blocks are matrices, not 1×1 convolutions.
    """
    middle = shapes.get(f"{UNET}middle_block.1.proj_in.weight", ())
    readers = ("cond_stage_model.", "conditioner.", "embedder.")
    return (len(middle) == 2) == linear and has_four_levels(shapes) and not any(n.startswith(readers) for n in shapes)


def has_four_levels(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Say whether a single file has the U-Net of Stable Diffusion 1 and 2: attention at all of four levels but one."""
    return (
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in shapes
        and f"{UNET}input_blocks.11.0.in_layers.2.weight" in shapes
        and channels(shapes) == 4
    )
