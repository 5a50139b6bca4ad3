"""ERNIE-Image-Turbo: static shift 3, guidance 1, without its prompt enhancer."""

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Ministral3Config, Ministral3ForCausalLM, Mistral3Config, Mistral3Model, PixtralVisionConfig

from tests.families.cases import draw_weights
from tests.families.cases.flux2_klein import build_vae
from tests.families.cases.tokenizers import build_mistral_tokenizer


CALL = {"guidance_scale": 1.0, "use_pe": False}
IS_EXACT = True


def encode(pipeline, pixels):
    """As in diffusers' train_dreambooth_lora_flux2_klein.py, with the pipeline's own eps."""
    latents = pipeline._patchify_latents(pipeline.vae.encode(pixels).latent_dist.mode())
    mean, variance = (value.view(1, -1, 1, 1) for value in (pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var))
    return (latents - mean) / torch.sqrt(variance + 1e-5)


def build() -> ErnieImagePipeline:
    torch.manual_seed(0)
    tokenizer = build_mistral_tokenizer()
    text_config = Ministral3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision_config = PixtralVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    text_encoder = Mistral3Model(Mistral3Config(text_config=text_config, vision_config=vision_config))
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(8, 4, 4),
    )
    enhancer = Ministral3ForCausalLM(text_config)
    draw_weights(text_encoder, transformer, enhancer)
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        pe=enhancer,
        pe_tokenizer=build_mistral_tokenizer(),
    )
