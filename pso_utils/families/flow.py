"""What the families of flow-matching transformers share."""

from typing import ClassVar

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import PreTrainedTokenizerBase

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Deployment, Family


class FlowFamily(Family):
    """Transformers that take patches of 2 x 2 latents, and whose pipeline gives its scheduler evenly spaced sigmas,
    which that shifts; where it shifts by resolution, by mu."""

    denoiser_name = "transformer"
    latents_per_patch: ClassVar[int] = 2  # along a side
    passes_sigmas: ClassVar[bool] = False  # to the call, too, because the pipeline itself leaves them to its scheduler

    @classmethod
    def size_multiple(cls, vae_config: dict) -> int:
        # AutoencoderKLQwenImage lists its downsamplings; AutoencoderKL has one after each block but the last
        downsamplings = vae_config.get("temperal_downsample") or vae_config["block_out_channels"][1:]
        return cls.latents_per_patch * 2 ** len(downsamplings)

    @classmethod
    def most_patches(cls, denoiser_config: dict) -> int | None:
        """Along a side, for which the model has learned positions; None: it computes them."""
        return None

    @classmethod
    def check_size(cls, vae_config: dict, denoiser_config: dict, *, height: int, width: int) -> None:
        super().check_size(vae_config, denoiser_config, height=height, width=width)
        side, most_patches = max(height, width), cls.most_patches(denoiser_config)
        if most_patches is not None and side > most_patches * cls.size_multiple(vae_config):
            longest = most_patches * cls.size_multiple(vae_config)
            raise UserError(f"--resolution {side}: the model has no positions beyond {longest}: pass that or less")

    @classmethod
    def sigmas(cls, num_inference_steps: int) -> list[float]:
        """The unshifted sigmas, in the pipeline's own arithmetic: others differ in the last bits."""
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()

    @classmethod
    def shift(cls, scheduler: SchedulerMixin, num_inference_steps: int, *, num_patches: int) -> float:
        """mu, for images of so many patches."""
        config, names = scheduler.config, ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(num_patches, *(config[name] for name in names))

    @classmethod
    def schedule_arguments(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, *, vae_config: dict, height: int, width: int
    ) -> dict:
        multiple = cls.size_multiple(vae_config)
        num_patches = (height // multiple) * (width // multiple)
        mu = cls.shift(scheduler, num_inference_steps, num_patches=num_patches)
        return {"sigmas": cls.sigmas(num_inference_steps), "mu": mu}

    def call_arguments(self, deployment: Deployment) -> dict:
        arguments = super().call_arguments(deployment)
        if self.passes_sigmas:  # else the scheduler would make them from its own, shifted ones, and shift them again
            arguments["sigmas"] = self.sigmas(deployment.num_inference_steps)
        return arguments

    @property
    def card_note(self) -> str | None:
        if not self.passes_sigmas:
            return None
        return (
            "The `sigmas` are what this LoRA was trained on, and not diffusers' default, which shifts them twice, so "
            "that the last step starts from next to no noise."
        )


# ---- Prompts ----


def ragged(prompt_embeds: Tensor) -> Conditioning:
    """Of one prompt: its embeddings [S, ...], with the mask that tells them from what pads them in a batch."""
    mask = torch.ones(len(prompt_embeds), dtype=torch.bool, device=prompt_embeds.device)
    return Conditioning(prompt_embeds=prompt_embeds, prompt_mask=mask)


def unpadded_rows(conditioning: Conditioning) -> list[Tensor]:
    """A batch's embeddings, [S_i, ...] each, without what pads them."""
    lengths = conditioning["prompt_mask"].sum(dim=1).tolist()
    return [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths)]


def without_padding(conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
    """A batch's embeddings [B, S, ...], cut to its longest prompt, and its mask [B, S]: None where all are as long."""
    prompt_embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_mask"]
    lengths = mask.sum(dim=1).tolist()
    longest = max(lengths)
    return prompt_embeds[:, :longest], mask[:, :longest] if min(lengths) < longest else None


def chat_length(tokenizer: PreTrainedTokenizerBase, **settings) -> int:
    """Tokens that its chat template adds to a prompt."""
    empty = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True, **settings)
    return len(tokenizer(text)["input_ids"])


# ---- Packed latents ----


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] as a sequence of patches [B, h w / 4, 4 C] (diffusers' `_pack_latents`), contiguous as there: in
    bfloat16 the bits of a product depend on it."""
    return to_sequence(pixel_unshuffle(latents, 2)).contiguous()


def unpack(sequence: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    return pixel_shuffle(from_sequence(sequence, height // 2, width // 2), 2)


def to_sequence(latents: Tensor) -> Tensor:
    """[B, C, h, w] as [B, h w, C]."""
    return latents.flatten(2).transpose(1, 2)


def from_sequence(sequence: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_sequence`."""
    return sequence.transpose(1, 2).unflatten(2, (height, width))


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each patch of such a sequence, [height width, 2]."""
    return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))


class PackedFamily(FlowFamily):
    """Of these, the ones whose pipeline's loop holds packed latents."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels // 4, height // factor, width // factor

    def unpack(self, latents: Tensor, deployment: Deployment) -> Tensor:
        _, height, width = self.latent_shape(deployment.height, deployment.width)
        return unpack(latents, height, width)
