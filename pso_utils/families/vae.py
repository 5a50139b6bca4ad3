"""Images to latents and back, by the class of the VAE."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pso_utils.errors import UserError


def _prepare(vae: AutoencoderKL, tensor: Tensor) -> Tensor:
    """`tensor` where and in the precision in which the VAE runs: float32 where its config says `force_upcast` (it gives
    NaN in fp16), else its own."""
    if vae.config.force_upcast and vae.dtype != torch.float32:
        vae.to(torch.float32)
    return tensor.to(device=vae.device, dtype=vae.dtype)


def _mean_and_std(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Those of the VAE's latents, which the pipeline's are without: (latents - mean) * scaling_factor / std."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
    return mean, std


def encode(vae: AutoencoderKL, pixels: Tensor, *, batch_size: int) -> Tensor:
    """Latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1], `batch_size` at a time: the posterior's mode.

    Raises:
        UserError: a latent is not finite.
    """
    pixels = _prepare(vae, pixels)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(batch_size)]).float()
    if not torch.isfinite(latents).all():
        raise UserError(
            f"encoded images are not finite: the VAE overflows in {str(vae.dtype).removeprefix('torch.')}: use "
            "--mixed_precision bf16 or no, or a VAE with force_upcast"
        )
    mean, std = _mean_and_std(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / std


def decode(vae: AutoencoderKL, latents: Tensor, *, batch_size: int) -> Iterator[Tensor]:
    """Images [b, 3, H, W] in [-1, 1] of latents [B, C, h, w], `batch_size` at a time.

    Raises:
        UserError: an image is not finite.
    """
    latents = _prepare(vae, latents)
    mean, std = _mean_and_std(vae, latents)
    latents = latents * std / vae.config.scaling_factor + mean  # in the pipeline's order, for the same bits
    for part in latents.split(batch_size):
        pixels = vae.decode(part, return_dict=False)[0]
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
