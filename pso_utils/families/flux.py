"""FLUX.1: schnell, and dev with a distillation LoRA (Hyper-SD, Turbo)."""

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import PackedFamily, grid_positions, pack, unpack
from pso_utils.families.lora import ToolFormat


class Flux(PackedFamily):
    pipeline_class = FluxPipeline
    denoiser_class = FluxTransformer2DModel
    text_encoder_classes = {
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": (T5EncoderModel, T5Config),
    }
    guidance_scales = GuidanceScales(off=0.0, most=0.0, embedded=3.5)
    max_sequence_length = 512
    card_tags = ["flux"]
    lora_format = ToolFormat("flux-1-schnell", "flux1")
    lora_targets = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ]
    conditioning_keys = ("in_channels", "joint_attention_dim", "pooled_projection_dim")

    def __init__(self, pipeline: FluxPipeline, *, max_sequence_length: int | None = None, **settings):
        if max_sequence_length is None and not self.embeds_guidance(pipeline.transformer.config):
            max_sequence_length = 256  # schnell's: what pads a prompt is attended, so its number matters
        super().__init__(pipeline, max_sequence_length=max_sequence_length, **settings)

    @classmethod
    def embeds_guidance(cls, denoiser_config: dict) -> bool:
        return denoiser_config["guidance_embeds"]

    @classmethod
    def tool_format(cls, denoiser_config: dict) -> ToolFormat:
        name = "flux-1-dev" if cls.embeds_guidance(denoiser_config) else "flux-1-schnell"
        return cls.lora_format._replace(architecture=name)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        rows = zip(prompt_embeds, pooled_prompt_embeds)
        return [Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled) for embeds, pooled in rows]

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        # CLIP's tokenizer cuts at 77, but its part is the pooled embedding alone
        return self.pipeline.tokenizer_2, self.max_sequence_length

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        (height, width), dtype, device = latents.shape[2:], self.denoiser.dtype, latents.device
        prompt_embeds, guidance = conditioning["prompt_embeds"], None
        if self.embeds_guidance(self.denoiser.config):
            guidance = torch.full((len(latents),), self.guidance_scale, device=device)  # float32, as the pipeline's
        model_output = self.denoiser(
            pack(latents.to(dtype)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timesteps.to(dtype) / 1000,  # which the model multiplies again, in its own precision
            # (0, row, column); all zero for the text
            img_ids=pad(grid_positions(height // 2, width // 2, device), (1, 0)).to(dtype),
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(model_output.float(), height, width)

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return dict(conditioning)
