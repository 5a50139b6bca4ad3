"""The families of few-step models that can be tuned, by the pipeline class that model_index.json names."""

from pso_utils.families.base import Conditioning, Deployment, Family
from pso_utils.families.sdxl import SDXL


__all__ = ["FAMILIES", "Conditioning", "Deployment", "Family"]

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,  # the same parts
}
