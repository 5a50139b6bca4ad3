"""Stable Diffusion 2.1: it predicts v; under Euler's ancestral scheduler, with noise of its own at each step."""

from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

from tests.families.cases.sd15 import LEVELS, build_parts


CALL = {"guidance_scale": 0.0}


def build() -> StableDiffusionPipeline:
    parts = build_parts(seed=1, attention_head_dim=(2, 4), use_linear_projection=True)
    scheduler = EulerAncestralDiscreteScheduler(
        **LEVELS, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )
    return StableDiffusionPipeline(**parts, scheduler=scheduler)
