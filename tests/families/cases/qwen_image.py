"""Qwen-Image with Qwen's own scheduler configuration, deployed with Lightning's: shift 3 at every size."""

import json
import math

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.families.cases import draw_weights
from tests.families.cases.tokenizers import build_qwen_tokenizer


CALL = {"true_cfg_scale": 1.0}
QWEN_CONFIG = {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
SCHEDULER_CONFIG = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
FLAGS = {"scheduler_config": json.dumps(SCHEDULER_CONFIG)}


def unpack(pipeline, latents, height, width):
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)[:, :, 0]


def encode(pipeline, pixels):
    """As in diffusers' training scripts of Qwen-Image and Krea 2: the image is a video of one frame."""
    latents, config = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode(), pipeline.vae.config
    mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
    return ((latents - mean) * (1.0 / std))[:, :, 0]


def build_vae(seed: int = 1) -> AutoencoderKLQwenImage:
    """Of 4 x 8 x 8 latents at 32 px."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.76, 0.11, 1.55, -0.29],
        latents_std=[2.82, 1.45, 0.61, 1.92],
    )
    return vae.eval()


def build() -> QwenImagePipeline:
    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer(template=QwenImagePipeline(*[None] * 5).prompt_template_encode)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    draw_weights(text_encoder, transformer)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_CONFIG),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
