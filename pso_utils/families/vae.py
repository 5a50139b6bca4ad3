"""Images to latents and back, by the class of the VAE."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage, ModelMixin
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pso_utils.errors import UserError


def encode(vae: ModelMixin, pixels: Tensor, *, batch_size: int, batch_norm_eps: float | None = None) -> Tensor:
    """Latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1], `batch_size` at a time: the posterior's mode.
    `batch_norm_eps` is AutoencoderKLFlux2's; None: its configuration's.

    Raises:
        UserError: a latent is not finite.
    """
    pixels = pixels.to(device=vae.device, dtype=vae.dtype)
    latents = torch.cat([_encode(vae, part) for part in pixels.split(batch_size)]).float()
    if not torch.isfinite(latents).all():
        raise UserError(
            f"encoded images are not finite: the VAE overflows in {str(vae.dtype).removeprefix('torch.')}: use "
            "--mixed_precision bf16 or no, or a VAE with force_upcast"
        )
    if isinstance(vae, AutoencoderKLFlux2):
        mean, std = _batch_norm(vae, latents, batch_norm_eps)
        return (latents - mean) / std
    mean, std = _mean_and_std(vae, latents)
    return (latents - mean) * _scaling_factor(vae) / std


def decode(
    vae: ModelMixin, latents: Tensor, *, batch_size: int, batch_norm_eps: float | None = None
) -> Iterator[Tensor]:
    """Images [b, 3, H, W] in [-1, 1] of latents [B, C, h, w], `batch_size` at a time; the inverse of `encode`.

    Raises:
        UserError: an image is not finite.
    """
    latents = latents.to(device=vae.device, dtype=vae.dtype)
    # in the pipelines' order of operations, for the same bits
    if isinstance(vae, AutoencoderKLFlux2):
        mean, std = _batch_norm(vae, latents, batch_norm_eps)
        latents = pixel_shuffle(latents * std + mean, 2)
    elif isinstance(vae, AutoencoderKLQwenImage):
        mean, std = _mean_and_std(vae, latents)
        latents = latents / (1.0 / std) + mean
    else:
        mean, std = _mean_and_std(vae, latents)
        latents = latents * std / _scaling_factor(vae) + mean
    for part in latents.split(batch_size):
        pixels = _decode(vae, part)
        if not torch.isfinite(pixels).all():
            if not torch.isfinite(part).all():
                reason = "the latents are not finite: lower --learning_rate, or use --mixed_precision bf16 or no"
            else:
                reason = (
                    f"the VAE overflows in {str(vae.dtype).removeprefix('torch.')}: use --mixed_precision bf16, or "
                    "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, or a VAE with force_upcast"
                )
            raise UserError(f"decoded images are not finite: {reason}")
        yield pixels


# ---- What a VAE makes of images, before it is scaled ----


def _encode(vae: ModelMixin, pixels: Tensor) -> Tensor:
    if isinstance(vae, AutoencoderDC):
        return vae.encode(pixels).latent
    if isinstance(vae, AutoencoderKLQwenImage):  # of videos; an image is one frame
        return vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    latents = vae.encode(pixels).latent_dist.mode()
    # diffusers' `_patchify_latents`: the four pixels of a patch are neighbouring channels
    return pixel_unshuffle(latents, 2) if isinstance(vae, AutoencoderKLFlux2) else latents


def _decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    if isinstance(vae, AutoencoderKLQwenImage):
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)
    return vae.decode(latents, return_dict=False)[0]


# ---- How it is scaled ----


def _scaling_factor(vae: ModelMixin) -> float:
    return getattr(vae.config, "scaling_factor", 1.0)


def _mean_and_std(vae: ModelMixin, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Those of the VAE's latents, which the pipeline's are without: (latents - mean) * scaling_factor / std."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
    return mean, std


def _batch_norm(vae: AutoencoderKLFlux2, latents: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, 4 C, 1, 1] of patchified latents, the statistics of the VAE's batch norm."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
    variance = vae.bn.running_var.view(1, -1, 1, 1)
    return mean, torch.sqrt(variance + (vae.config.batch_norm_eps if eps is None else eps)).to(latents)
