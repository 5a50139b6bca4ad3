"""Z-Image-Turbo."""

from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import FlowFamily, ragged


class ZImage(FlowFamily):
    pipeline_class = ZImagePipeline
    denoiser_class = ZImageTransformer2DModel
    text_encoder_classes = {"text_encoder": (Qwen3Model, Qwen3Config)}
    guidance_scales = GuidanceScales(off=0.0, most=0.0)
    max_sequence_length = 512
    card_tags = ["z-image"]
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = ("in_channels", "cap_feat_dim")

    @classmethod
    def sigmas(cls, num_inference_steps: int) -> list[float]:
        return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        with self._use(*self.text_encoders, offload=self.offload_text_encoders):
            prompt_embeds, _ = self.pipeline.encode_prompt(
                list(prompts),  # which is overwritten
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return [ragged(row) for row in prompt_embeds]

    def _ragged(self, conditioning: Conditioning) -> list[Tensor]:
        """The prompts' embeddings [S_i, D], without what pads them."""
        lengths = conditioning["prompt_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths)]

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # one frame [C, 1, h, w] each; the model's time runs from 0 to 1, and its output is x0 - eps
        frames = latents.to(self.denoiser.dtype).unsqueeze(2).unbind()
        outputs = self.denoiser(list(frames), (1000 - timesteps) / 1000, self._ragged(conditioning), return_dict=False)[
            0
        ]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {"prompt_embeds": self._ragged(conditioning)}
