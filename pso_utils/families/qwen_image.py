"""Qwen-Image with Lightning's LoRA, which was distilled on levels of its own: four steps are at sigma 1, 0.9, 0.75, 0.5
at every size. Qwen's scheduler configuration has 1, 0.82, 0.53, 0.02 at 1024 px, so that Lightning's is needed:

--distillation_lora lightx2v/Qwen-Image-Lightning:FILE
--scheduler_config '{"base_shift": 1.0986122886681098, "max_shift": 1.0986122886681098, "shift_terminal": null}'
"""

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pso_utils.families.base import Conditioning, Deployment, GuidanceScales
from pso_utils.families.flow import PackedFamily, pack, ragged, unpack, without_padding
from pso_utils.families.lora import ToolFormat


class QwenImage(PackedFamily):
    pipeline_class = QwenImagePipeline
    denoiser_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    text_encoder_classes = {"text_encoder": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig)}
    guidance_scales = GuidanceScales(off=1.0, most=1.0)
    max_sequence_length = 512
    longest_sequence = 1024
    card_tags = ["qwen-image"]
    lora_format = ToolFormat("qwen-image", "qwen_image")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    conditioning_keys = ("in_channels", "joint_attention_dim")

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        conditionings = []
        for prompt in prompts:  # one at a time: the last bits of this encoder's output depend on its batch
            (prompt_embeds,), _ = self.pipeline.encode_prompt(
                prompt, device=self.device, max_sequence_length=self.max_sequence_length
            )
            conditionings.append(ragged(prompt_embeds))
        return conditionings

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prompt_embeds, prompt_mask = without_padding(conditioning)
        (height, width), dtype = latents.shape[-2:], self.denoiser.dtype
        model_output = self.denoiser(
            pack(latents.to(dtype)),
            timestep=timesteps.to(dtype) / 1000,
            encoder_hidden_states=prompt_embeds,
            encoder_hidden_states_mask=prompt_mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(model_output, height, width).float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {"prompt_embeds": conditioning["prompt_embeds"], "prompt_embeds_mask": conditioning["prompt_mask"]}

    def call_arguments(self, deployment: Deployment) -> dict:
        arguments = super().call_arguments(deployment)
        # its name here: `guidance_scale` is for models with a guidance embedding, of which this pipeline has none
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        return arguments
