"""Z-Image-Turbo."""

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import FlowFamily, chat_length, ragged, unpadded_rows
from pso_utils.families.lora import ToolFormat


class ZImage(FlowFamily):
    pipeline_class = ZImagePipeline
    denoiser_class = ZImageTransformer2DModel
    text_encoder_classes = {"text_encoder": (Qwen3Model, Qwen3Config)}
    guidance_scales = GuidanceScales(off=0.0, most=0.0)
    max_sequence_length = 512
    card_tags = ["z-image"]
    lora_format = ToolFormat("z-image", "z_image")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = ("in_channels", "cap_feat_dim")

    @classmethod
    def sigmas(cls, num_inference_steps: int) -> list[float]:
        return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [ragged(row) for row in prompt_embeds]

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        tokenizer = self.pipeline.tokenizer
        return tokenizer, self.max_sequence_length - chat_length(tokenizer, enable_thinking=True)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # one frame [C, 1, h, w] each; the model's time runs from 0 to 1, and its output is x0 - eps
        frames = latents.to(self.denoiser.dtype).unsqueeze(2).unbind()
        times, prompt_embeds = (1000 - timesteps) / 1000, unpadded_rows(conditioning)
        outputs = self.denoiser(list(frames), times, prompt_embeds, return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {"prompt_embeds": unpadded_rows(conditioning)}
