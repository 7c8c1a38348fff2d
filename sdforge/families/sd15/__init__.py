"""Stable Diffusion 1.x: a U-Net of four levels, one CLIP text encoder, the KL autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar, final

from sdforge.errors import UsageError
from sdforge.families import Family, Name
from sdforge.families.naming import clip_names, unet_names, vae_names
from sdforge.identity import Json

DEPTHS = (1, 1, 1, 0)
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
TEXT = "cond_stage_model.transformer."
LAYERS = 12  # of the text encoder, at most
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
)


@final
class StableDiffusion1(Family):
    """Names, facts and configurations of SD 1.x."""

    name = "sd15"
    version = 1
    title = "Stable Diffusion 1.x"
    pipeline = "StableDiffusionPipeline"
    architecture = "stable-diffusion-v1"
    kohya_version = "sd_v1"
    kohya_prefix: ClassVar = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    convolutions = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out")
    networks = ("unet", "text_encoder", "vae")
    neutral: ClassVar = {
        "prediction": "epsilon",
        "zero_terminal_snr": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "latent_scaling": 0.18215,
        "resolution": 512,  # pixels
        "unet_heads": 8,
        "unet_groups": 32,
        "vae_groups": 32,
        "text_heads": 12,
        "text_activation": "quick_gelu",
        "tokens": [],  # what insert appended: [word, number of rows] in the order of the rows
    }
    owners: ClassVar = {
        "prediction": "unet",
        "zero_terminal_snr": "unet",
        "beta_start": "unet",
        "beta_end": "unet",
        "resolution": "unet",
        "unet_heads": "unet",
        "unet_groups": "unet",
        "text_heads": "text_encoder",
        "text_activation": "text_encoder",
        "tokens": "text_encoder",
        "latent_scaling": "vae",
        "vae_groups": "vae",
    }

    @cached_property
    def _names(self) -> tuple[Name, ...]:
        return (*unet_names(DEPTHS), *clip_names("text_encoder", TEXT, LAYERS), *vae_names())

    def names(self) -> tuple[Name, ...]:
        return self._names

    def owns(self, names: Iterable[str], shapes: dict[str, tuple[int, ...]]) -> bool:
        found = set(names)
        return (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in found
            and "model.diffusion_model.input_blocks.11.0.in_layers.2.weight" in found
            and any(name.startswith(TEXT) for name in found)
            and shapes["model.diffusion_model.input_blocks.0.0.weight"][1:2] == (4,)
        )

    def owns_folder(self, configs: dict[str, dict[str, Any]]) -> bool:
        unet = configs.get("unet", {})
        return "text_encoder_2" not in configs and bool(unet) and not unet.get("use_linear_projection")

    def alias(self, name: str) -> str:
        # NovelAI's leak and its descendants leave `text_model.` out
        if name.startswith(TEXT) and not name.startswith(f"{TEXT}text_model."):
            return f"{TEXT}text_model.{name.removeprefix(TEXT)}"
        return name

    def ignored(self, name: str) -> str:
        if name in SCHEDULE:
            return "tables of the noise schedule, which every program computes"
        if name.startswith(EMA):
            return "a second copy of the weights (EMA)"
        if name.endswith("text_model.embeddings.position_ids"):
            return "position ids, which are 0 … 76"
        return ""

    def facts_of_folder(self, configs: dict[str, dict[str, Any]]) -> dict[str, Json]:
        unet, vae, text = (configs.get(part, {}) for part in ("unet", "vae", "text_encoder"))
        schedule = configs.get("scheduler", {})
        _expect(
            unet,
            "unet",
            {
                "down_block_types": list(DOWN),
                "up_block_types": list(UP),
                "act_fn": "silu",
                "layers_per_block": 2,
                "class_embed_type": None,
                "in_channels": 4,
            },
        )
        _expect(vae, "vae", {"latent_channels": 4, "layers_per_block": 2, "shift_factor": None})
        _expect(
            schedule,
            "scheduler",
            {"beta_schedule": "scaled_linear", "trained_betas": None, "num_train_timesteps": 1000},
        )
        levels = len(vae.get("block_out_channels", DOWN))
        facts: dict[str, Json] = {
            "prediction": schedule.get("prediction_type", "epsilon"),
            "zero_terminal_snr": bool(schedule.get("rescale_betas_zero_snr", False)),
            "beta_start": schedule.get("beta_start", 0.00085),
            "beta_end": schedule.get("beta_end", 0.012),
            "latent_scaling": vae.get("scaling_factor", 0.18215),
            "resolution": unet.get("sample_size", 64) * 2 ** (levels - 1),
            "unet_heads": unet.get("num_attention_heads") or unet.get("attention_head_dim", 8),
            "unet_groups": unet.get("norm_num_groups", 32),
            "vae_groups": vae.get("norm_num_groups", 32),
            "text_heads": text.get("num_attention_heads", 12),
            "text_activation": text.get("hidden_act", "quick_gelu"),
        }
        if facts["prediction"] not in ("epsilon", "v_prediction"):
            raise UsageError(f"predicts {facts['prediction']!r}, which is neither epsilon nor v_prediction")
        for name in ("unet_heads", "unet_groups", "vae_groups", "text_heads", "resolution"):
            if not isinstance(facts[name], int) or isinstance(facts[name], bool):
                raise UsageError(f"states {name.replace('_', ' ')} as {facts[name]!r} where one whole number belongs")
        return self.stated(facts)

    def configs(self, facts: dict[str, Json], shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Any]:
        unet, vae, text = shapes["unet"], shapes["vae"], shapes["text_encoder"]
        table = text["text_model.embeddings.token_embedding.weight"]
        layers = sum(name.endswith(".layer_norm1.weight") for name in text)
        words = table[0] - sum(count for _, count in self.fact(facts, "tokens"))
        return {
            "unet": {
                "act_fn": "silu",
                "attention_head_dim": self.fact(facts, "unet_heads"),  # diffusers' name for the number of heads
                "block_out_channels": [unet[f"down_blocks.{i}.resnets.1.conv2.weight"][0] for i in range(4)],
                "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
                "down_block_types": list(DOWN),
                "in_channels": unet["conv_in.weight"][1],
                "layers_per_block": 2,
                "norm_num_groups": self.fact(facts, "unet_groups"),
                "out_channels": unet["conv_out.weight"][0],
                "sample_size": self.fact(facts, "resolution") // 8,
                "up_block_types": list(UP),
            },
            "vae": {
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
            },
            "text_encoder": {
                "attention_dropout": 0.0,
                "bos_token_id": words - 2,
                "eos_token_id": words - 1,
                "hidden_act": self.fact(facts, "text_activation"),
                "hidden_size": table[1],
                "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"][0],
                "layer_norm_eps": 1e-05,
                "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"][0],
                "num_attention_heads": self.fact(facts, "text_heads"),
                "num_hidden_layers": layers,
                "pad_token_id": words - 1,
                "projection_dim": table[1],
                "vocab_size": table[0],
            },
            "scheduler": {
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
            },
        }

    def widths(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Json]:
        unet, text = shapes.get("unet", {}), shapes.get("text_encoder", {})
        found: dict[str, Json] = {}
        for key, table, name, axis in (
            ("channels", unet, "conv_in.weight", 0),
            ("context", unet, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
            ("text", text, "text_model.embeddings.token_embedding.weight", 1),
        ):
            if name in table:
                found[key] = table[name][axis]
        return found


def _expect(config: dict[str, Any], part: str, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise UsageError(f"is not Stable Diffusion 1.x: {part} states {key} = {config[key]!r}, expected {value!r}")


FAMILY = StableDiffusion1()
