"""AuraFlow: a transformer that sees every prompt padded to one length, with zeros, and no mask."""

from collections.abc import Sequence

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Deployment, GuidanceScales, quiet_libraries
from pso_utils.families.flow import FlowFamily


class AuraFlow(FlowFamily):
    pipeline_class = AuraFlowPipeline
    denoiser_class = AuraFlowTransformer2DModel
    text_encoder_classes = {"text_encoder": (UMT5EncoderModel, UMT5Config)}
    guidance_scales = GuidanceScales(off=1.0, most=1.0)
    max_sequence_length = 256
    card_tags = ["aura-flow"]
    card_note = (
        "The `sigmas` are what this LoRA was trained on, and not diffusers' default, which shifts them twice, so that "
        "the last step starts from next to no noise."
    )
    lora_targets = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ]
    conditioning_keys = ("in_channels", "out_channels", "joint_attention_dim")
    upcasts_vae = True

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises UserError where the model has no position for some patch, or, worse, another patch's."""
        shape, side = super().latent_shape(height, width), int(self.denoiser.config.pos_embed_max_size**0.5)
        if max(shape[1:]) > side * self.latents_per_patch:
            longest = side * self.latents_per_patch * self.pipeline.vae_scale_factor
            raise UserError(f"--resolution {max(height, width)}: the model has positions for {longest} at most")
        return shape

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        self.warn_of_long_prompts(prompts, self.pipeline.tokenizer, self.max_sequence_length)
        with self._use(*self.text_encoders, offload=self.offload_text_encoders), quiet_libraries():
            prompt_embeds, *_ = self.pipeline.encode_prompt(
                list(prompts),
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

    def call_arguments(self, deployment: Deployment) -> dict:
        # without sigmas, the scheduler would make them from its own shifted ones, and shift them again
        return super().call_arguments(deployment) | {"sigmas": self.sigmas(deployment.num_inference_steps)}
