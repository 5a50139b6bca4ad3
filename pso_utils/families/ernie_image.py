"""ERNIE-Image-Turbo."""

import torch
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel, SchedulerMixin
from torch import Tensor
from transformers import Mistral3Config, Mistral3Model

from pso_utils.families.base import Conditioning, Deployment, GuidanceScales
from pso_utils.families.flow import FlowFamily, ragged, unpadded_rows
from pso_utils.families.lora import ToolFormat


class ErnieImage(FlowFamily):
    """Latents are the VAE's in patches, as in the pipeline's loop: 128 channels."""

    pipeline_class = ErnieImagePipeline
    denoiser_class = ErnieImageTransformer2DModel
    vae_class = AutoencoderKLFlux2
    text_encoder_classes = {"text_encoder": (Mistral3Model, Mistral3Config)}
    unused_parts = ("pe", "pe_tokenizer")  # which rewrite prompts at random
    guidance_scales = GuidanceScales(off=1.0, most=1.0)
    card_tags = ["ernie-image"]
    lora_format = ToolFormat("ernie-image", "ernie_image")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = ("in_channels", "text_in_dim")
    batch_norm_eps = 1e-5  # the pipeline's own, whatever the VAE's configuration says

    @classmethod
    def schedule_arguments(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, *, vae_config: dict, height: int, width: int
    ) -> dict:
        return {"sigmas": torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()}  # and no mu

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        return [ragged(row) for row in self.pipeline.encode_prompt(prompts, self.device)]

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.denoiser.dtype
        model_output = self.denoiser(
            latents.to(dtype),
            timesteps.to(dtype),
            text_bth=conditioning["prompt_embeds"].to(dtype),
            text_lens=conditioning["prompt_mask"].sum(dim=1),
            return_dict=False,
        )[0]
        return model_output.float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {"prompt_embeds": unpadded_rows(conditioning)}

    def call_arguments(self, deployment: Deployment) -> dict:
        return super().call_arguments(deployment) | {"use_pe": False}
