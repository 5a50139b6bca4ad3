"""What the demo measures of images: closeness to the drawings, artists' shares, sharpness, diversity."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.recipe.common import ARTISTS, DEMO, load_drawings
from pso_utils.data.images import pixels_of
from pso_utils.evaluate.drawing import draw
from pso_utils.evaluate.fidelity import diversity, sharpness
from pso_utils.families import Deployment, vae
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.sdxl import SDXL
from pso_utils.rewards.statistics import standard_error


KINDS = ("name", "class")
BATCH = 110  # images that are drawn at once
BLURRED = 0.6  # a sample under this fraction of its closest drawing's sharpness counts as blurred


# ---- Drawing ----


def load_model(denoiser: Path | None = None, *, scheduler: str = "lcm") -> SDXL:
    """The demo's distilled model, or with the folder of another denoiser that in it."""
    source = ModelSource(
        str(DEMO / "emoji-turbo"),
        distilled_denoiser=None if denoiser is None else str(denoiser),
        scheduler=scheduler,
    )
    return SDXL(load_pipeline(source), vae_batch_size=BATCH)


@torch.no_grad()
def draw_prompts(family: SDXL, prompts: list[str], *, steps: int, seed: int) -> list[Image.Image]:
    """One image a prompt; image i starts from the noise of seed + i, whatever the model."""
    images, deployment = [], Deployment(steps, None, None, height=32, width=32)
    for start in range(0, len(prompts), BATCH):
        conditionings = family.encode_prompts(prompts[start : start + BATCH])
        seeds = range(seed + start, seed + start + len(conditionings))
        images += draw(family, conditionings, seeds, deployment=deployment)
    return images


def stack_pixels(images: list[Image.Image]) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1]."""
    return torch.stack([pixels_of(image) for image in images])


def grid(rows: list[list[Image.Image]], scale: int = 2) -> Image.Image:
    """Rows of equally large images as one picture."""
    width, height = (side * scale for side in rows[0][0].size)
    canvas = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (x * width, y * height))
    return canvas


def paired(tuned: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Gain of scores [B] over the base's on the same prompts and noise, each image counting for itself."""
    gain, error = (tuned - base).mean(), standard_error((tuned - base).numpy(), np.arange(len(tuned)))
    return {
        "gain": gain.item(),
        "standard_errors": gain.item() / error if error else 0.0,
        "base_deviations": (gain / base.std()).item(),
    }


# ---- Measuring ----


@dataclass
class SampleMeasures:
    styles: tuple[str, ...]  # those of the drawings that the samples are held against
    style_distances: torch.Tensor  # [B, styles] mean squared error to the closest of the prompt's drawings in each
    sharpness: float  # ratio to the VAE's reconstructions of drawings, in the same mix of styles
    blurred: torch.Tensor  # [B] 0 or 1
    diversity: float | None  # mean distance between the samples of one class prompt; None for name prompts

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


class DrawingBenchmark:
    """The drawings and their reconstructions, which samples of their prompts are measured against.

    Args:
        styles: the first of `STYLES`; the artists that the model was trained on, or the ink too.
    """

    def __init__(self, styles: tuple[str, ...] = ARTISTS):
        self.drawings, self.styles = load_drawings(), styles
        self.pixels = self.drawings.pixels[:, : len(styles)]  # [concepts, styles, 3, 32, 32]
        family = load_model()
        latents = family.encode_images(self.pixels.flatten(0, 1))
        with torch.no_grad():
            decoded = torch.cat(list(vae.decode(family.pipeline.vae, latents, batch_size=BATCH)))
        self.reconstructions = decoded.clamp(-1, 1).unflatten(0, self.pixels.shape[:2])
        self.sharpness = sharpness(self.reconstructions)  # [concepts, styles]

    def concepts(self, count: int) -> torch.Tensor:
        """The concepts that `count` samples are drawn for: each in turn, `count` at the most different."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self.drawings), generator=generator).repeat(-(-count // len(self.drawings)))[:count]

    def prompts(self, kind: str, concepts: torch.Tensor) -> list[str]:
        captions = self.drawings.captions if kind == "name" else self.drawings.classes
        return [captions[concept] for concept in concepts.tolist()]

    def measure(self, pixels: torch.Tensor, kind: str, concepts: torch.Tensor) -> SampleMeasures:
        """Measures samples [B, 3, 32, 32] that were drawn for `prompts(kind, concepts)`."""
        expected, distances = [], []
        for image, concept in zip(pixels, concepts.tolist()):
            described = [concept] if kind == "name" else self.drawings.of_class(self.drawings.classes[concept])
            errors = (self.pixels[described] - image).square().mean(dim=(2, 3, 4))  # [described, styles]
            distances.append(errors.amin(dim=0))
            expected.append(self.sharpness[described].flatten()[errors.argmin()])
        own, distances, by_class = sharpness(pixels), torch.stack(distances), None
        if kind == "class":
            classes = np.array(self.drawings.classes)[concepts.numpy()]
            groups = [pixels[torch.from_numpy(classes == name)] for name in sorted(set(classes))]
            by_class = float(np.mean([diversity(group).mean().item() for group in groups if len(group) > 1]))
        return SampleMeasures(
            styles=self.styles,
            style_distances=distances,
            sharpness=(own.mean() / self.sharpness.mean(dim=0)[distances.argmin(dim=1)].mean()).item(),
            blurred=(own < BLURRED * torch.stack(expected)).float(),
            diversity=by_class,
        )

    def figures(self, images: list[Image.Image], kind: str, concepts: torch.Tensor) -> dict[str, float | None]:
        """Means of what `measure` finds, and each style's share; with the ink, the distance to the ink drawings and the
        sharpness as a ratio to their reconstructions'."""
        pixels = stack_pixels(images)
        measures = self.measure(pixels, kind, concepts)
        figures = {"distance": measures.distance.mean().item(), "sharpness": measures.sharpness}
        figures |= {"blurred": measures.blurred.mean().item(), **measures.shares, "diversity": measures.diversity}
        if "ink" in self.styles:
            ink = self.styles.index("ink")
            figures["ink distance"] = measures.style_distances[:, ink].mean().item()
            figures["ink sharpness"] = (sharpness(pixels).mean() / self.sharpness[:, ink].mean()).item()
        return figures
