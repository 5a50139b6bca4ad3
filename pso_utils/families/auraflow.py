"""AuraFlow, of which no few-step checkpoint is known; for those that one distils oneself."""

import math

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import FlowFamily
from pso_utils.families.lora import ToolFormat


class AuraFlow(FlowFamily):
    """Prompts are padded to one length, with zeros that the model attends."""

    pipeline_class = AuraFlowPipeline
    denoiser_class = AuraFlowTransformer2DModel
    text_encoder_classes = {"text_encoder": (UMT5EncoderModel, UMT5Config)}
    guidance_scales = GuidanceScales(off=1.0, most=1.0)
    max_sequence_length = 256
    card_tags = ["aura-flow"]
    lora_format = ToolFormat("auraflow", "auraflow")
    lora_targets = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ]
    conditioning_keys = ("in_channels", "out_channels", "joint_attention_dim")
    passes_sigmas = True
    upcasts_vae = True

    @classmethod
    def most_patches(cls, denoiser_config: dict) -> int:
        # those of the whole square; beyond them the model would take another patch's
        return math.isqrt(denoiser_config["pos_embed_max_size"])

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return [Conditioning(prompt_embeds=row) for row in prompt_embeds]

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.denoiser.dtype
        model_output = self.denoiser(
            latents.to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=(timesteps / 1000).to(dtype),
            return_dict=False,
        )[0]
        return model_output.float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        prompt_embeds = conditioning["prompt_embeds"]
        # the pipeline asks for a mask, and its model takes none
        return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": torch.ones_like(prompt_embeds[..., 0])}
