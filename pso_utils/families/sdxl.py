"""Stable Diffusion XL: SDXL-Turbo, DMD2, LCM, Lightning, Hyper-SD."""

import logging
import math
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Family, GuidanceScales, quiet_libraries


logger = logging.getLogger(__name__)


class SDXL(Family):
    pipeline_class = StableDiffusionXLPipeline
    denoiser_class = UNet2DConditionModel
    denoiser_name = "unet"
    text_encoder_classes = {
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig),
    }
    guidance_scales = GuidanceScales(off=0.0, most=1.0, embedded=8.0)  # 8.0: what SDXL-LCM's model card uses
    card_tags = ["stable-diffusion-xl"]
    card_dtype = "float16"
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    upcasts_vae = True
    has_kohya_format = True

    def __init__(self, pipeline: StableDiffusionXLPipeline, **settings):
        super().__init__(pipeline, **settings)
        config, channels = self.denoiser.config, pipeline.vae.config.latent_channels
        if config.addition_embed_type != "text_time" or config.in_channels != channels:
            raise UserError(
                f"this is not a text-to-image SDXL: its UNet takes {config.in_channels} channels and "
                f"{config.addition_embed_type} embeddings, its VAE makes {channels} channels; pass parts that belong "
                "together"
            )
        if pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        self._warned_of_long_prompts = False

    @classmethod
    def embeds_guidance(cls, denoiser_config: dict) -> bool:
        return denoiser_config.get("time_cond_proj_dim") is not None

    @classmethod
    def size_multiple(cls, vae_config: dict) -> int:
        return math.lcm(8, 2 ** (len(vae_config["block_out_channels"]) - 1))  # 8: what the pipeline itself asks for

    @classmethod
    def original_inference_steps(cls, denoiser_config: dict) -> int | None:
        # a guidance embedding is the mark of LCM's own models, which were distilled on the 50-step grid
        return 50 if cls.embeds_guidance(denoiser_config) else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        self._warn_of_long_prompts(prompts)
        with self._use(*self.text_encoders, offload=self.offload_text_encoders), quiet_libraries():
            prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.device, do_classifier_free_guidance=False
            )
        rows = zip(prompt_embeds, pooled_prompt_embeds.to(self.device))
        return [Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled) for embeds, pooled in rows]

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        """Once: diffusers would warn of every prompt and text encoder, with all that was cut off."""
        if self._warned_of_long_prompts:
            return
        limit = self.pipeline.tokenizer.model_max_length
        for prompt, tokens in zip(prompts, self.pipeline.tokenizer(list(prompts), verbose=False)["input_ids"]):
            if len(tokens) > limit:
                self._warned_of_long_prompts = True
                logger.warning(f"prompts are cut off after {limit} tokens, the first one is: {prompt[:80]!r} ...")
                return

    def collate(
        self,
        conditionings: Sequence[Conditioning],
        height: int,
        width: int,
        *,
        original_sizes: Tensor | None = None,
        crop_top_lefts: Tensor | None = None,
    ) -> Conditioning:
        batch = Conditioning.stack(conditionings).to(self.device)
        like, count = batch["prompt_embeds"], len(conditionings)
        size = torch.tensor([height, width]).expand(count, 2)
        original_sizes = size if original_sizes is None else original_sizes
        crop_top_lefts = torch.zeros_like(size) if crop_top_lefts is None else crop_top_lefts
        batch["add_time_ids"] = torch.cat([original_sizes, crop_top_lefts, size], dim=1).to(like.device, like.dtype)
        embedding_dim = self.denoiser.config.time_cond_proj_dim
        if embedding_dim is not None:
            scale = torch.full((count,), self.guidance_scale - 1.0)
            embedding = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=embedding_dim)
            batch["timestep_cond"] = embedding.to(like.device, like.dtype)
        return batch

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        model_output = self.denoiser(
            latents.to(self.denoiser.dtype),
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep_cond=conditioning.get("timestep_cond"),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": conditioning["add_time_ids"],
            },
            return_dict=False,
        )[0]
        return model_output.float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {name: conditioning[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}

    @classmethod
    def read_lora(
        cls, location: str, filename: str | None, *, denoiser_config: FrozenDict, cache_dir: str | None = None
    ) -> dict[str, Tensor]:
        # the configuration tells how the blocks are called that Kohya's names count
        state_dict, _ = cls.pipeline_class.lora_state_dict(
            location, weight_name=filename, unet_config=denoiser_config, cache_dir=cache_dir
        )
        return state_dict
