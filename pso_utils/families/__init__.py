"""The families of few-step models that can be tuned, by the pipeline class that model_index.json names."""

import re
from importlib import import_module

from pso_utils.errors import UserError
from pso_utils.families.base import Conditioning, Deployment, Family


__all__ = ["FAMILIES", "Conditioning", "Deployment", "Family", "find_family"]

# Module and class in this folder; imported when they are needed, for each brings its pipeline's libraries along.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion:LatentConsistency",
    "StableDiffusionXLPipeline": "sdxl:SDXL",
    "StableDiffusionXLImg2ImgPipeline": "sdxl:SDXL",  # the same parts
    "ZImagePipeline": "z_image:ZImage",
    "Flux2KleinPipeline": "flux2_klein:Flux2Klein",
    "FluxPipeline": "flux:Flux",
    "SanaSprintPipeline": "sana_sprint:SanaSprint",
    "ErnieImagePipeline": "ernie_image:ErnieImage",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "Krea2Pipeline": "krea2:Krea2",
    "AuraFlowPipeline": "auraflow:AuraFlow",
}

_FLOW_MAP = "it predicts the average velocity between two times (a flow map), from which no step's density follows"
_NO_LORA = "diffusers cannot load a LoRA into this pipeline"
REFUSED: dict[str, str] = {
    "ChromaPipeline": "it has no few-step checkpoint, and under gradient checkpointing its model is another function",
    "Flux3DistilledModularPipeline": _FLOW_MAP,
    "HunyuanImagePipeline": _FLOW_MAP,
    "PixArtAlphaPipeline": _NO_LORA,
    "PixArtSigmaPipeline": _NO_LORA,
    "LongCatImagePipeline": _NO_LORA,
    "OvisImagePipeline": _NO_LORA,
    "DreamLitePipeline": _NO_LORA,
    "DreamLiteMobilePipeline": _NO_LORA,
    "PRXPipeline": _NO_LORA,
}
_VIDEO = re.compile("Video|Wan|LTX|Mochi|Allegro|Latte|SkyReels|Animate|T2V|I2V")


def find_family(pipeline_class: str | None, name: str) -> type[Family]:
    """The adapter for pipelines of `pipeline_class`; `name` is the model's, for messages.

    Raises:
        UserError: there is none.
    """
    if pipeline_class in FAMILIES:
        module, family = FAMILIES[pipeline_class].split(":")
        return getattr(import_module(f"pso_utils.families.{module}"), family)
    flag = f"--pretrained_model_name_or_path: {name} is a {pipeline_class}"
    reason = REFUSED.get(pipeline_class)
    if reason is None and _VIDEO.search(pipeline_class or ""):
        reason = "it draws videos"
    if reason is not None:
        raise UserError(f"{flag}, which cannot be tuned here: {reason}; pass one of {', '.join(FAMILIES)}")
    raise UserError(f"{flag}; pass one of {', '.join(FAMILIES)}")
