"""What the families of Stable Diffusion's UNet share."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Family, GuidanceScales


class UNetFamily(Family):
    """UNets trained by diffusion, some of which take the guidance scale as an input."""

    denoiser_class = UNet2DConditionModel
    denoiser_name = "unet"
    text_encoder_classes = {"text_encoder": (CLIPTextModel, CLIPTextConfig)}
    guidance_scales = GuidanceScales(off=0.0, most=1.0, embedded=8.0)  # 8.0: what the model cards of LCM use
    card_dtype = "float16"
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type")
    addition_embed_type: ClassVar[str | None] = None  # of the UNet's configuration
    prompt_inputs: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # of the pipeline's call, as its encode_prompt gives
    added_conditions: ClassVar[dict[str, str]] = {}  # the model's added_cond_kwargs, and where they are

    def __init__(self, pipeline: DiffusionPipeline, **settings):
        super().__init__(pipeline, **settings)
        config, channels = self.denoiser.config, pipeline.vae.config.latent_channels
        if config.addition_embed_type != self.addition_embed_type or config.in_channels != channels:
            raise UserError(
                f"this is not a text-to-image {self.pipeline_class.__name__}: its UNet takes {config.in_channels} "
                f"channels and has the addition_embed_type {config.addition_embed_type}, its VAE makes {channels} "
                "channels; pass parts that belong together"
            )

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

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        embeds = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        own = [tensor.to(self.device) for tensor in embeds[::2]]  # each is followed by the negative prompts'
        return [Conditioning(zip(self.prompt_inputs, row)) for row in zip(*own)]

    def collate(
        self, conditionings: Sequence[Conditioning], height: int, width: int, **sizes: Tensor | None
    ) -> Conditioning:
        batch = super().collate(conditionings, height, width, **sizes)
        embedding_dim = self.denoiser.config.time_cond_proj_dim
        if embedding_dim is not None:
            like = batch["prompt_embeds"]
            scale = torch.full((len(conditionings),), self.guidance_scale - 1.0)
            embedding = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=embedding_dim)
            batch["timestep_cond"] = embedding.to(like.device, like.dtype)
        return batch

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        model_output = self.denoiser(
            latents.to(self.denoiser.dtype),
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep_cond=conditioning.get("timestep_cond"),
            added_cond_kwargs={name: conditioning[key] for name, key in self.added_conditions.items()},
            return_dict=False,
        )[0]
        return model_output.float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {name: conditioning[name] for name in self.prompt_inputs}

    @classmethod
    def read_lora(
        cls, location: str, filename: str | None, *, denoiser_config: FrozenDict, cache_dir: str | None = None
    ) -> dict[str, Tensor]:
        # the configuration tells how the blocks are called that Kohya's names count
        state_dict, _ = cls.pipeline_class.lora_state_dict(
            location, weight_name=filename, unet_config=denoiser_config, cache_dir=cache_dir
        )
        return state_dict
