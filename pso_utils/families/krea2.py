"""Krea-2-Turbo."""

from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLModel

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, GuidanceScales
from pso_utils.families.flow import PackedFamily, pack, ragged, unpack, without_padding
from pso_utils.families.lora import ToolFormat


class Krea2(PackedFamily):
    pipeline_class = Krea2Pipeline
    denoiser_class = Krea2Transformer2DModel
    vae_class = AutoencoderKLQwenImage
    text_encoder_classes = {"text_encoder": (Qwen3VLModel, Qwen3VLConfig)}
    guidance_scales = GuidanceScales(off=0.0, most=0.0)
    max_sequence_length = 512
    card_tags = ["krea-2"]
    lora_format = ToolFormat("krea-2", "krea2")
    lora_targets = [  # those of diffusers' own script; the layers of attention are the text fusion's, too
        "img_in",
        "final_layer.linear",
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "to_gate",
        "ff.up",
        "ff.down",
        "text_fusion.projector",
        "txt_in.linear_1",
        "txt_in.linear_2",
        "time_embed.linear_1",
        "time_embed.linear_2",
        "time_mod_proj",
    ]
    conditioning_keys = ("in_channels", "text_hidden_dim", "num_text_layers")

    @classmethod
    def check_pipeline(cls, model_index: dict) -> None:
        if not model_index.get("is_distilled"):
            raise UserError(
                "--pretrained_model_name_or_path: a Krea 2 whose model_index.json does not set is_distilled to true is"
                " the base model, which takes many steps and guidance; pass Krea-2-Turbo"
            )

    @classmethod
    def shift(cls, scheduler: SchedulerMixin, num_inference_steps: int, *, num_patches: int) -> float:
        return 1.15  # of the distilled model, at every size

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        prompt_embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        # The pipeline pads in the middle. What pads is masked everywhere, and all tokens of the text have the same
        # position in the model, so what is left is the same prompt in a tenth of the memory.
        return [ragged(row[valid]) for row, valid in zip(prompt_embeds, mask)]

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        # the template's end is within the maximum, its beginning is not
        suffix = self.pipeline.prompt_template_encode_num_suffix_tokens
        return self.pipeline.tokenizer, self.max_sequence_length - suffix

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prompt_embeds, prompt_mask = without_padding(conditioning)
        (height, width), dtype = latents.shape[-2:], self.denoiser.dtype
        position_ids = self.pipeline.prepare_position_ids(
            prompt_embeds.shape[1], height // 2, width // 2, latents.device
        )
        model_output = self.denoiser(
            pack(latents.to(dtype)),
            encoder_hidden_states=prompt_embeds,
            timestep=(timesteps / 1000).to(dtype),
            position_ids=position_ids,
            encoder_attention_mask=prompt_mask,
            return_dict=False,
        )[0]
        return unpack(model_output, height, width).float()

    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        return {"prompt_embeds": conditioning["prompt_embeds"], "prompt_embeds_mask": conditioning["prompt_mask"]}
