"""SDXL distilled for LCM's scheduler; `conftest.build_pipeline` with SDXL's scale of the VAE."""

from diffusers import StableDiffusionXLPipeline

from tests.conftest import build_pipeline
from tests.families.cases import draw_weights


CALL = {"guidance_scale": 0.0}


def build() -> StableDiffusionXLPipeline:
    pipeline = build_pipeline()
    pipeline.vae.register_to_config(scaling_factor=0.13025)
    draw_weights(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet, pipeline.vae)
    return pipeline
