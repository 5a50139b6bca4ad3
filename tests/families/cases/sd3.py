"""SD3.5-medium-turbo: static shift 3, guidance 0, some layers with a second attention; with all three text encoders."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.conftest import build_tokenizer
from tests.families.cases import draw_weights
from tests.families.cases.tokenizers import build_t5_tokenizer


CALL = {"guidance_scale": 0.0}
CALL_AT = {2: {"sigmas": [1.0, 0.5]}, 4: {"sigmas": [1.0, 0.75, 0.5, 0.25]}}
IS_EXACT = True


def build_parts(seed: int = 0, **transformer_config) -> dict:
    """All parts but the third text encoder and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder, text_encoder_2 = (CLIPTextModelWithProjection(CLIPTextConfig(**text_config)) for _ in range(2))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        **transformer_config,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    draw_weights(text_encoder, text_encoder_2, transformer, vae)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": build_tokenizer(),
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def build() -> StableDiffusion3Pipeline:
    parts, tokenizer = build_parts(dual_attention_layers=(0,)), build_t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=40,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    draw_weights(text_encoder)
    return StableDiffusion3Pipeline(**parts, text_encoder_3=text_encoder, tokenizer_3=tokenizer)
