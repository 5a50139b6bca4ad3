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
    distance: torch.Tensor  # [B] mean squared error to the closest of the prompt's own drawings
    artist: torch.Tensor  # [B] whose drawing that is, an index of ARTISTS
    sharpness: float  # ratio to the VAE's reconstructions of drawings, in the same mix of artists
    blurred: torch.Tensor  # [B] 0 or 1
    diversity: float | None  # mean pairwise distance of the samples of one class prompt; None for name prompts

    @property
    def shares(self) -> list[float]:
        """Share of the samples that are closest to each artist."""
        return [(self.artist == index).float().mean().item() for index in range(len(ARTISTS))]


class Yardstick:
    """The drawings and their reconstructions, against which samples are measured."""

    def __init__(self):
        self.drawings = load_drawings()
        self.pixels = self.drawings.pixels[:, : len(ARTISTS)]  # [concepts, artists, 3, 32, 32]
        vae = AutoencoderKL.from_pretrained(DEMO / "emoji-turbo", subfolder="vae").requires_grad_(False)
        batches = self.pixels.flatten(0, 1).split(128)
        decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in batches])
        self.reconstructions = decoded.clamp(-1, 1).unflatten(0, self.pixels.shape[:2])
        self.sharpness = sharpness(self.reconstructions)  # [concepts, artists]

    def concepts(self, count: int) -> torch.Tensor:
        """The concepts that `count` samples are drawn for: each in turn, `count` at the most different."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self.drawings), generator=generator).repeat(-(-count // len(self.drawings)))[:count]

    def prompts(self, kind: str, concepts: torch.Tensor) -> list[str]:
        captions = self.drawings.captions if kind == "name" else self.drawings.classes
        return [captions[concept] for concept in concepts.tolist()]

    def measure(self, pixels: torch.Tensor, kind: str, concepts: torch.Tensor) -> Measures:
        """Measures samples [B, 3, 32, 32] that were drawn for `prompts(kind, concepts)`."""
        closest, artists, distances = [], [], []
        for image, concept in zip(pixels, concepts.tolist()):
            described = [concept] if kind == "name" else self.drawings.of_class(self.drawings.classes[concept])
            errors = (self.pixels[described] - image).square().mean(dim=(2, 3, 4))  # [described, artists]
            flat = errors.flatten().argmin().item()
            closest.append(int(described[flat // len(ARTISTS)]))
            artists.append(flat % len(ARTISTS))
            distances.append(errors.min())
        closest, artist = torch.tensor(closest), torch.tensor(artists)
        own = sharpness(pixels)
        diversity = None
        if kind == "class":
            classes = np.array(self.drawings.classes)[concepts.numpy()]
            groups = [pixels[torch.from_numpy(classes == name)] for name in sorted(set(classes))]
            diversity = float(np.mean([mean_pairwise_distance(group) for group in groups if len(group) > 1]))
        return Measures(
            distance=torch.stack(distances),
            artist=artist,
            sharpness=(own.mean() / self.sharpness.mean(dim=0)[artist].mean()).item(),
            blurred=(own < BLURRED * self.sharpness[closest, artist]).float(),
            diversity=diversity,
        )
