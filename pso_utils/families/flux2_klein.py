"""FLUX.2-klein, the distilled 4B and 9B."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel, SchedulerMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Deployment, GuidanceScales
from pso_utils.families.flow import FlowFamily, chat_length, from_sequence, grid_positions, to_sequence
from pso_utils.families.lora import ToolFormat


class Flux2Klein(FlowFamily):
    """Its latents are the VAE's in patches of 2 x 2, [B, 128, H / 16, W / 16]."""

    pipeline_class = Flux2KleinPipeline
    denoiser_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_encoder_classes = {"text_encoder": (Qwen3ForCausalLM, Qwen3Config)}
    guidance_scales = GuidanceScales(off=1.0, most=1.0)
    max_sequence_length = 512
    card_tags = ["flux2-klein"]
    lora_format = ToolFormat(
        "flux-2-klein",
        "flux2_klein",
        renamed={
            "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
            "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
            "single_stream_modulation.linear": "single_stream_modulation.lin",
            "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        },
    )
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]
    conditioning_keys = ("in_channels", "joint_attention_dim")

    @classmethod
    def check_pipeline(cls, model_index: dict) -> None:
        if model_index.get("is_distilled") is not True:
            raise UserError(
                "--pretrained_model_name_or_path: this FLUX.2-klein is no few-step model (is_distilled is not true in "
                "its model_index.json); pass FLUX.2-klein-4B or -9B, not their base"
            )

    @classmethod
    def default_lora_targets(cls, denoiser_config: dict) -> list[str]:
        # by their whole names: `attn.to_out` alone is also a container in the other blocks, which takes no LoRA
        blocks = range(denoiser_config["num_single_layers"])
        return [*cls.lora_targets, *(f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.size_multiple(self.pipeline.vae.config)
        return self.denoiser.config.in_channels, height // multiple, width // multiple

    @classmethod
    def shift(cls, scheduler: SchedulerMixin, num_inference_steps: int, *, num_patches: int) -> float:
        return compute_empirical_mu(num_patches, num_inference_steps)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return [Conditioning(prompt_embeds=row) for row in prompt_embeds]

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        tokenizer = self.pipeline.tokenizer
        return tokenizer, self.max_sequence_length - chat_length(tokenizer, enable_thinking=False)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        (height, width), dtype, device = latents.shape[2:], self.denoiser.dtype, latents.device
        prompt_embeds = conditioning["prompt_embeds"]
        model_output = self.denoiser(
            to_sequence(latents.to(dtype)),
            encoder_hidden_states=prompt_embeds,
            timestep=timesteps.to(dtype) / 1000,  # which the model multiplies again, in its own precision
            # (time, row, column, index in the text)
            img_ids=pad(grid_positions(height, width, device), (1, 1)),
            txt_ids=pad(torch.arange(prompt_embeds.shape[1], device=device).unsqueeze(1), (3, 0)),
            return_dict=False,
        )[0]
        return from_sequence(model_output.float(), height, width)

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return dict(conditioning)

    @torch.no_grad()
    def generate(self, conditioning: Conditioning, generators: list[torch.Generator], deployment: Deployment) -> Tensor:
        # the loop's latents, for those that the pipeline returns are the VAE's
        steps = []

        def keep(pipeline, step, timestep, tensors):
            steps[:] = [tensors["latents"]]
            return {}

        inputs = self.pipeline_inputs(conditioning) | self.call_arguments(deployment)
        self._drawer(**inputs, generator=generators, output_type="latent", callback_on_step_end=keep)
        _, height, width = self.latent_shape(deployment.height, deployment.width)
        return from_sequence(steps[-1], height, width).float()
