"""What the demo measures of images: closeness to the drawings, artists' shares, sharpness, diversity."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from demo.recipe.common import ARTISTS, DEMO, load_drawings


KINDS = ("name", "class")
BLURRED = 0.6  # a sample under this fraction of its closest drawing's sharpness counts as blurred


def to_pixels(images) -> torch.Tensor:
    """PIL images to [B, 3, H, W] in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def sharpness(pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute Laplacian of each image, [..., 3, H, W] to [...]."""
    centre = 4 * pixels[..., 1:-1, 1:-1]
    neighbours = pixels[..., :-2, 1:-1] + pixels[..., 2:, 1:-1] + pixels[..., 1:-1, :-2] + pixels[..., 1:-1, 2:]
    return (centre - neighbours).abs().mean(dim=(-3, -2, -1))


def mean_pairwise_distance(pixels: torch.Tensor) -> float:
    """Mean squared error between two different images of the batch [B, 3, H, W], over all pairs."""
    flat = pixels.flatten(1)
    distances = torch.cdist(flat, flat).square() / flat.shape[1]
    return (distances.sum() / (len(flat) * (len(flat) - 1))).item()


@dataclass
class Measures:
    styles: tuple[str, ...]  # those of the drawings that the samples are held against
    style_distances: torch.Tensor  # [B, styles] mean squared error to the closest of the prompt's drawings in each
    sharpness: float  # ratio to the VAE's reconstructions of drawings, in the same mix of styles
    blurred: torch.Tensor  # [B] 0 or 1
    diversity: float | None  # mean pairwise distance of the samples of one class prompt; None for name prompts

    @property
    def distance(self) -> torch.Tensor:
        """[B] mean squared error to the closest of the prompt's own drawings."""
        return self.style_distances.amin(dim=1)

    @property
    def closest(self) -> torch.Tensor:
        """[B] whose drawing that is, an index of `styles`."""
        return self.style_distances.argmin(dim=1)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the samples that are closest to each style."""
        return {style: (self.closest == index).float().mean().item() for index, style in enumerate(self.styles)}


class Yardstick:
    """The drawings and their reconstructions, against which samples are measured.

    Args:
        styles: the first of `STYLES`; the artists that the model was trained on, or the ink too.
    """

    def __init__(self, styles: tuple[str, ...] = ARTISTS):
        self.drawings, self.styles = load_drawings(), styles
        self.pixels = self.drawings.pixels[:, : len(styles)]  # [concepts, styles, 3, 32, 32]
        vae = AutoencoderKL.from_pretrained(DEMO / "emoji-turbo", subfolder="vae").requires_grad_(False)
        batches = self.pixels.flatten(0, 1).split(128)
        decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in batches])
        self.reconstructions = decoded.clamp(-1, 1).unflatten(0, self.pixels.shape[:2])
        self.sharpness = sharpness(self.reconstructions)  # [concepts, styles]

    def concepts(self, count: int) -> torch.Tensor:
        """The concepts that `count` samples are drawn for: each in turn, `count` at the most different."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self.drawings), generator=generator).repeat(-(-count // len(self.drawings)))[:count]

    def prompts(self, kind: str, concepts: torch.Tensor) -> list[str]:
        captions = self.drawings.captions if kind == "name" else self.drawings.classes
        return [captions[concept] for concept in concepts.tolist()]

    def ratio_to(self, pixels: torch.Tensor, style: str) -> float:
        """Sharpness of samples [B, 3, 32, 32] as a ratio to that of one style's reconstructions."""
        return (sharpness(pixels).mean() / self.sharpness[:, self.styles.index(style)].mean()).item()

    def measure(self, pixels: torch.Tensor, kind: str, concepts: torch.Tensor) -> Measures:
        """Measures samples [B, 3, 32, 32] that were drawn for `prompts(kind, concepts)`."""
        expected, distances = [], []
        for image, concept in zip(pixels, concepts.tolist()):
            described = [concept] if kind == "name" else self.drawings.of_class(self.drawings.classes[concept])
            errors = (self.pixels[described] - image).square().mean(dim=(2, 3, 4))  # [described, styles]
            distances.append(errors.amin(dim=0))
            expected.append(self.sharpness[described].flatten()[errors.argmin()])
        own, distances = sharpness(pixels), torch.stack(distances)
        diversity = None
        if kind == "class":
            classes = np.array(self.drawings.classes)[concepts.numpy()]
            groups = [pixels[torch.from_numpy(classes == name)] for name in sorted(set(classes))]
            diversity = float(np.mean([mean_pairwise_distance(group) for group in groups if len(group) > 1]))
        return Measures(
            styles=self.styles,
            style_distances=distances,
            sharpness=(own.mean() / self.sharpness.mean(dim=0)[distances.argmin(dim=1)].mean()).item(),
            blurred=(own < BLURRED * torch.stack(expected)).float(),
            diversity=diversity,
        )
