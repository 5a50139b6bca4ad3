"""Fidelity: how close samples are to a subject's pictures, or to the images that come with the prompts."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


# ---- To a subject: the measures of DreamBooth (arXiv 2208.12242), as rewards ----


class VisionImages:
    """The image embeddings [B, D], float32, of a vision model of transformers, such as DINO: the class token of a
    transformer's last layer, or what a convolutional network pools. `model` is a hub id or a folder."""

    def __init__(self, model: str, *, cache_dir: str | None = None):
        from transformers import AutoImageProcessor, AutoModel  # takes seconds

        # Pillow's processors: torchvision is not needed, and scores don't depend on whether it is there
        self.image_processor = AutoImageProcessor.from_pretrained(model, cache_dir=cache_dir, backend="pil")
        self.model = AutoModel.from_pretrained(model, cache_dir=cache_dir).float().eval().requires_grad_(False)

    def to(self, device=None, dtype=None) -> "VisionImages":
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values.to(self.model.device, self.model.dtype))
        hidden = output.last_hidden_state
        return (hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)).float()


class ReferenceSimilarity:
    """A reward: the mean cosine of an image's embedding with those of the reference images, RGB, of any size.
    `embedder` has `embed_images(images) -> [B, D]` and `.to`."""

    def __init__(self, embedder, references: Sequence[Image.Image]):
        self.embedder, self.references = embedder, references
        self._directions = None

    def to(self, device=None, dtype=None) -> "ReferenceSimilarity":
        self.embedder.to(device=device, dtype=dtype)
        return self

    def _embed(self, images: list[Image.Image]) -> Tensor:
        return F.normalize(self.embedder.embed_images(images), dim=-1)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        if self._directions is None:  # one by one: a few images of unlike sizes
            self._directions = torch.cat([self._embed([image]) for image in self.references])
        return (self._embed(images) @ self._directions.T).mean(dim=1)


# ---- To the data: images [..., 3, H, W] with pixels in [-1, 1] ----

DATA_MEASURES = {"data distance": False, "diversity": True, "sharpness": True}  # whether higher is better


def sharpness(pixels: Tensor) -> Tensor:
    """Mean absolute Laplacian of each image, [..., 3, H, W] to [...]."""
    centre = 4 * pixels[..., 1:-1, 1:-1]
    neighbours = pixels[..., :-2, 1:-1] + pixels[..., 2:, 1:-1] + pixels[..., 1:-1, :-2] + pixels[..., 1:-1, 2:]
    return (centre - neighbours).abs().mean(dim=(-3, -2, -1))


def squared_distances(samples: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Mean squared error [D, B] of each of the others, [3, H, W], to each sample, [B, 3, H, W]."""
    return torch.stack([(samples - other).square().mean(dim=(1, 2, 3)) for other in others])


def closest_distance(samples: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Mean squared error [B] of each sample to the closest of the others."""
    return squared_distances(samples, others).amin(dim=0)


def diversity(samples: Tensor) -> Tensor:
    """Mean squared error [B] of each sample to the other samples; NaN where there is none."""
    return squared_distances(samples, samples).sum(dim=0) / (len(samples) - 1 or torch.nan)


def data_fidelity(samples: Tensor, data: Iterable[Tensor], *, data_sharpness: float) -> dict[str, Tensor]:
    """`DATA_MEASURES`, [B] each, of the samples [B, 3, H, W] of one prompt, whose own images are `data`. Sharpness is a
    ratio to that of the VAE's reconstructions of the data: below 1 is blur that the VAE does not make."""
    return {
        "data distance": closest_distance(samples, data),
        "diversity": diversity(samples),
        "sharpness": sharpness(samples) / data_sharpness,
    }
