"""Stable Diffusion 1.5 and 2.1: SD-Turbo, LCM-LoRA, Hyper-SD15; and LCM's own models, LCM_Dreamshaper."""

from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

from pso_utils.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    pipeline_class = StableDiffusionPipeline
    unused_parts = ("safety_checker", "feature_extractor", "image_encoder")
    card_tags = ["stable-diffusion"]
    scheduler_values = {"steps_offset": 1, "clip_sample": False}


class LatentConsistency(UNetFamily):
    """A UNet that takes the guidance scale as an input, of the pipeline that is made for it."""

    pipeline_class = LatentConsistencyModelPipeline
    unused_parts = StableDiffusion.unused_parts
    guidance_scales = UNetFamily.guidance_scales._replace(embedded=8.5)
    card_tags = ["stable-diffusion", "lcm"]
    conditioning_keys = (*UNetFamily.conditioning_keys, "time_cond_proj_dim")
    only_scheduler = LCMScheduler
