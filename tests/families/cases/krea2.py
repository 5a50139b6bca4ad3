"""Krea-2-Turbo: mu 1.15 at every size, guidance 0."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.families.cases import draw_weights
from tests.families.cases.qwen_image import build_vae, encode
from tests.families.cases.tokenizers import build_qwen_tokenizer


__all__ = ["CALL", "build", "encode", "unpack"]

CALL = {"guidance_scale": 0.0}


def unpack(pipeline, latents, height, width):
    return pipeline._unpack_latents(latents, height, width)[:, :, 0]


def build() -> Krea2Pipeline:
    torch.manual_seed(0)
    templates = Krea2Pipeline(*[None] * 5)
    template = templates.prompt_template_encode_prefix + templates.prompt_template_encode_suffix
    tokenizer = build_qwen_tokenizer(template=template)
    text_encoder = Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 5e6},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        )
    )
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    draw_weights(text_encoder, transformer)
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 3),
        is_distilled=True,
    )
