"""Stable Diffusion 3.5: large-turbo and medium-turbo, without classifier-free guidance."""

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import FlowFamily
from pso_utils.families.lora import ToolFormat


class StableDiffusion3(FlowFamily):
    """A pipeline without the third text encoder has zeros in place of its embeddings, which are attended, too."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    text_encoder_classes = {
        "text_encoder": (CLIPTextModelWithProjection, CLIPTextConfig),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig),
        "text_encoder_3": (T5EncoderModel, T5Config),
    }
    guidance_scales = GuidanceScales(off=0.0, most=1.0)
    max_sequence_length = 256
    card_tags = ["sd3", "sd3-diffusers"]
    lora_format = ToolFormat("stable-diffusion-3", "sd3")
    lora_targets = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ]
    conditioning_keys = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
    passes_sigmas = True

    @classmethod
    def most_patches(cls, denoiser_config: dict) -> int:
        return denoiser_config["pos_embed_max_size"]

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        rows = zip(prompt_embeds, pooled_prompt_embeds)
        return [Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled) for embeds, pooled in rows]

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        if self.pipeline.text_encoder_3 is None:
            return self.pipeline.tokenizer, self.pipeline.tokenizer_max_length
        return self.pipeline.tokenizer_3, self.max_sequence_length

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        model_output = self.denoiser(
            hidden_states=latents.to(self.denoiser.dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return model_output.float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return dict(conditioning)
