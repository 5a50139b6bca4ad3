"""FLUX.1-schnell: evenly spaced sigmas without shift, no guidance, prompts of 256 tokens."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.conftest import build_tokenizer
from tests.families.cases import draw_weights
from tests.families.cases.tokenizers import build_t5_tokenizer
from tests.families.cases.z_image import build_vae


CALL = {"guidance_scale": 0.0, "max_sequence_length": 256}
IS_EXACT = True


def build_flux(scheduler: FlowMatchEulerDiscreteScheduler, *, guidance_embeds: bool) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = build_tokenizer(), build_t5_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    draw_weights(text_encoder, text_encoder_2, transformer)
    return FluxPipeline(
        scheduler=scheduler,
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def build() -> FluxPipeline:
    return build_flux(FlowMatchEulerDiscreteScheduler(shift=1.0), guidance_embeds=False)


def unpack(pipeline, latents, height, width):
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
