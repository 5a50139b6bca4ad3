"""JPEG size, as in DDPO (arXiv 2305.13301)."""

import io

import torch
from PIL import Image

from pso_utils.rewards.registry import Reward, register_reward


JPEG_QUALITY = 95  # as in DDPO


def jpeg_size(image: Image.Image) -> float:
    """Size of the RGB image as a JPEG, in kB (1,000 bytes)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return len(buffer.getvalue()) / 1000


@register_reward("jpeg_compressibility")
def jpeg_compressibility(model: None, cache_dir: str | None) -> Reward:
    """Minus the JPEG's size in kB: prefers plain images."""
    return lambda images, prompts: -torch.tensor([jpeg_size(image) for image in images])


@register_reward("jpeg_incompressibility")
def jpeg_incompressibility(model: None, cache_dir: str | None) -> Reward:
    """The JPEG's size in kB: prefers images full of detail."""
    return lambda images, prompts: torch.tensor([jpeg_size(image) for image in images])
