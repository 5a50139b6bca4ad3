"""SANA-Sprint: trigflow, trained on the sampler that is deployed (SCMScheduler)."""

import math
from inspect import signature

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from pso_utils.families.base import Conditioning, Deployment, Family, GuidanceScales


# What the pipeline's call does unless told otherwise is part of the deployment.
DEFAULTS = {name: parameter.default for name, parameter in signature(SanaSprintPipeline.__call__).parameters.items()}


class SanaSprint(Family):
    """Latents are those of the pipeline's loop, sigma_data times the VAE's scaled ones."""

    pipeline_class = SanaSprintPipeline
    denoiser_class = SanaTransformer2DModel
    denoiser_name = "transformer"
    vae_class = AutoencoderDC
    text_encoder_classes = {"text_encoder": (Gemma2Model, Gemma2Config)}
    guidance_scales = GuidanceScales(off=1.0, most=1.0, embedded=DEFAULTS["guidance_scale"])
    max_sequence_length = DEFAULTS["max_sequence_length"]
    card_tags = ["sana", "sana-sprint"]
    lora_targets = ["to_q", "to_k", "to_v"]
    conditioning_keys = ("in_channels", "caption_channels", "guidance_embeds", "guidance_embeds_scale")

    @property
    def _sigma_data(self) -> float:
        return self.pipeline.scheduler.config.sigma_data

    @classmethod
    def embeds_guidance(cls, denoiser_config: dict) -> bool:
        return True  # the pipeline hands it to every model

    @classmethod
    def size_multiple(cls, vae_config: dict) -> int:
        return math.lcm(32, 2 ** (len(vae_config["encoder_block_out_channels"]) - 1))  # 32: what the pipeline asks for

    @classmethod
    def _intermediate_timesteps(cls, num_inference_steps: int) -> float | None:
        """Of two steps the second's angle; other numbers of steps must go without."""
        return DEFAULTS["intermediate_timesteps"] if num_inference_steps == 2 else None

    @classmethod
    def schedule_arguments(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, *, vae_config: dict, height: int, width: int
    ) -> dict:
        return {
            "max_timesteps": DEFAULTS["max_timesteps"],
            "intermediate_timesteps": cls._intermediate_timesteps(num_inference_steps),
        }

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, prompt_attention_mask = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=DEFAULTS["complex_human_instruction"],
        )
        return [
            Conditioning(prompt_embeds=embeds, prompt_attention_mask=mask)
            for embeds, mask in zip(prompt_embeds, prompt_attention_mask)
        ]

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prompt_embeds, dtype = conditioning["prompt_embeds"], self.denoiser.dtype
        guidance = torch.full((len(latents),), self.guidance_scale, device=latents.device).to(prompt_embeds.dtype)
        # from trigflow's angle to the time of the flow model that SANA was, and its input and output from there
        time = torch.sin(timesteps) / (torch.cos(timesteps) + torch.sin(timesteps))
        at = time.view(-1, 1, 1, 1)
        norm = torch.sqrt(at**2 + (1 - at) ** 2)
        model_input = latents / self._sigma_data * norm
        velocity = self.denoiser(
            model_input.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            guidance=guidance * self.denoiser.config.guidance_embeds_scale,
            timestep=time,
            return_dict=False,
        )[0]
        model_output = ((1 - 2 * at) * model_input + (1 - 2 * at + 2 * at**2) * velocity) / norm
        return model_output.float() * self._sigma_data

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return dict(conditioning)

    def call_arguments(self, deployment: Deployment) -> dict:
        return super().call_arguments(deployment) | {
            "intermediate_timesteps": self._intermediate_timesteps(deployment.num_inference_steps),
            "use_resolution_binning": False,  # the size as it is, not the nearest of a list
        }

    def unpack(self, latents: Tensor, deployment: Deployment) -> Tensor:
        return latents * self._sigma_data

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels) * self._sigma_data

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        return super().decode_latents(latents / self._sigma_data)
