"""LCM's own Stable Diffusion 1.5, LCM_Dreamshaper: the guidance scale is an input of the UNet."""

from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from tests.families.cases.sd15 import LEVELS, build_parts


CALL = {}  # its own guidance scale, 8.5


def build() -> LatentConsistencyModelPipeline:
    return LatentConsistencyModelPipeline(
        **build_parts(seed=2, time_cond_proj_dim=16),
        scheduler=LCMScheduler(**LEVELS, original_inference_steps=50),
    )
