"""Stable Diffusion 1.5 with LCM-LoRA's scheduler: it predicts epsilon, on the grid of 50 steps."""

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import build_tokenizer
from tests.families.cases import draw_weights


CALL = {"guidance_scale": 1.0}
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_parts(seed: int = 0, **unet_config) -> dict:
    """All parts but the scheduler, at 32 px (4 x 8 x 8 latents); `unet_config` overrides the UNet's."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
            **unet_config,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    draw_weights(text_encoder, unet, vae)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "unet": unet, "vae": vae}
    return parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def build() -> StableDiffusionPipeline:
    scheduler = LCMScheduler(**LEVELS, original_inference_steps=50, steps_offset=1)
    return StableDiffusionPipeline(**build_parts(), scheduler=scheduler)
