"""FLUX.2-klein: the shift depends on size and steps, guidance is off."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.families.cases import draw_weights, scale_weights
from tests.families.cases.tokenizers import build_qwen_tokenizer


CALL = {"guidance_scale": 1.0}
IS_EXACT = True


def build_vae(seed: int = 1) -> AutoencoderKLFlux2:
    """4 channels, 16 in a patch of 2 x 2, with batch norm statistics and an eps that show."""
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        batch_norm_eps=0.01,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def build() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,  # the pipeline takes the states after 9, 18 and 27
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    draw_weights(text_encoder, transformer)
    scale_weights(transformer, 2)  # else a few words among 512 tokens would be next to nothing
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


def unpack(pipeline, latents, height, width):
    height, width = height // 16, width // 16
    positions = pipeline._prepare_latent_ids(torch.empty(len(latents), 1, height, width))
    return pipeline._unpack_latents_with_ids(latents, positions, height, width)


def encode(pipeline, pixels):
    latents, vae = pipeline._patchify_latents(pipeline.vae.encode(pixels).latent_dist.mode()), pipeline.vae
    mean, variance = (statistic.view(1, -1, 1, 1) for statistic in (vae.bn.running_mean, vae.bn.running_var))
    return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
