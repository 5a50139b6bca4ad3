"""Stable Diffusion 1.5 and 2.1: SD-Turbo, LCM-LoRA, Hyper-SD15; and LCM's own models, LCM_Dreamshaper."""

from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

from pso_utils.families.lora import ToolFormat
from pso_utils.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    pipeline_class = StableDiffusionPipeline
    unused_parts = ("safety_checker", "feature_extractor", "image_encoder")
    card_tags = ["stable-diffusion"]
    scheduler_values = {"steps_offset": 1, "clip_sample": False}
    lora_format = ToolFormat("stable-diffusion-v1", "sd_v1", is_kohya=True)

    @classmethod
    def tool_format(cls, denoiser_config: dict) -> ToolFormat:
        if denoiser_config["cross_attention_dim"] == 768:  # CLIP ViT-L's; 2.1 takes OpenCLIP ViT-H's 1024
            return cls.lora_format
        return ToolFormat("stable-diffusion-v2-512", "sd_v2", is_kohya=True)


class LatentConsistency(UNetFamily):
    """A UNet that takes the guidance scale as an input, of the pipeline that is made for it."""

    pipeline_class = LatentConsistencyModelPipeline
    unused_parts = StableDiffusion.unused_parts
    guidance_scales = UNetFamily.guidance_scales._replace(embedded=8.5)
    card_tags = ["stable-diffusion", "lcm"]
    lora_format = StableDiffusion.lora_format
    conditioning_keys = (*UNetFamily.conditioning_keys, "time_cond_proj_dim")
    only_scheduler = LCMScheduler
