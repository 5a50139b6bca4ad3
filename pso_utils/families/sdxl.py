"""Stable Diffusion XL: SDXL-Turbo, DMD2, LCM, Lightning, Hyper-SD."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from pso_utils.families.base import Conditioning
from pso_utils.families.lora import ToolFormat
from pso_utils.families.unet import UNetFamily


class SDXL(UNetFamily):
    pipeline_class = StableDiffusionXLPipeline
    text_encoder_classes = {
        **UNetFamily.text_encoder_classes,
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig),
    }
    card_tags = ["stable-diffusion-xl"]
    lora_format = ToolFormat("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", is_kohya=True)
    conditioning_keys = (
        *UNetFamily.conditioning_keys,
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    upcasts_vae = True
    addition_embed_type = "text_time"
    prompt_inputs = ("prompt_embeds", "pooled_prompt_embeds")
    added_conditions = {"text_embeds": "pooled_prompt_embeds", "time_ids": "add_time_ids"}

    def __init__(self, pipeline: StableDiffusionXLPipeline, **settings):
        super().__init__(pipeline, **settings)
        if pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)

    def collate(
        self,
        conditionings: Sequence[Conditioning],
        height: int,
        width: int,
        *,
        original_sizes: Tensor | None = None,
        crop_top_lefts: Tensor | None = None,
    ) -> Conditioning:
        batch = super().collate(conditionings, height, width)
        like, count = batch["prompt_embeds"], len(conditionings)
        size = torch.tensor([height, width]).expand(count, 2)
        original_sizes = size if original_sizes is None else original_sizes
        crop_top_lefts = torch.zeros_like(size) if crop_top_lefts is None else crop_top_lefts
        batch["add_time_ids"] = torch.cat([original_sizes, crop_top_lefts, size], dim=1).to(like.device, like.dtype)
        return batch
