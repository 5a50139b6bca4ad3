"""AuraFlow: static shift 1.73, every prompt padded to 256 tokens with zeros."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.families.cases import draw_weights, scale_weights
from tests.families.cases.tokenizers import build_t5_tokenizer


CALL = {"guidance_scale": 1.0}
CALL_AT = {2: {"sigmas": [1.0, 0.5]}, 4: {"sigmas": [1.0, 0.75, 0.5, 0.25]}}


def build() -> AuraFlowPipeline:
    torch.manual_seed(0)
    tokenizer = build_t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025,
    )
    draw_weights(transformer, text_encoder, vae)
    scale_weights(transformer, 3)  # else a few words among 256 tokens, and the LoRA, would be next to nothing
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
