"""SANA-Sprint: trigflow under SCM, embedded guidance."""

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model

from pso_utils.families.sana_sprint import DEFAULTS
from tests.conftest import CAPTIONS
from tests.families.cases import draw_weights
from tests.families.cases.tokenizers import build_gemma_tokenizer


CALL = {"use_resolution_binning": False}
CALL_AT = {4: {"intermediate_timesteps": None}}
SIZES = ((64, 64), (64, 96))


def encode(pipeline, pixels):
    """As in diffusers' train_dreambooth_lora_sana.py, in the units of the pipeline's loop."""
    return (
        pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor * pipeline.scheduler.config.sigma_data
    )


def build_vae() -> AutoencoderDC:
    """Of 32 px latents, with attention in its last blocks."""
    channels, blocks = (4, 4, 4, 4, 8, 8), ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
        decoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
        scaling_factor=0.41407,
    )


def build() -> SanaSprintPipeline:
    torch.manual_seed(0)
    tokenizer = build_gemma_tokenizer([*CAPTIONS, *DEFAULTS["complex_human_instruction"]])
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = build_vae()
    draw_weights(text_encoder, transformer, vae)
    return SanaSprintPipeline(
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
