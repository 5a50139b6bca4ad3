"""What the tests need of each family: a tiny pipeline with random weights, and what diffusers alone does with it.

A case is a module of this folder, named in CASES, with

- `build()`: the pipeline, float32, in evaluation mode, with random weights that are not trivial: zero output layers are
  drawn anew (`draw_weights`), shift, scale, means and deviations are not the neutral ones, and prompts, timesteps and a
  random LoRA each move the model's output by some percent (else `scale_weights`); tokenizers.py builds tokenizers
  offline;
- `CALL`: how the plain pipeline is called at deployment, beside prompts, steps, size and generators;

and, where it is otherwise than below, `CALL_AT` (a number of steps -> what the call takes besides, for instance
`{2: {"sigmas": [1.0, 0.5]}, 4: ...}`), `STEPS`, `SIZES` (multiples of the family's `size_multiple`), `SCHEDULER_CONFIG`
(what replaces the pipeline's own values), `unpack(pipeline, latents, height, width)` (latents of the pipeline's loop as
[B, C, h, w]), `encode(pipeline, pixels)` (the arithmetic of diffusers' training script), `ETA` (what the pipeline is
called with, if it hands one to its scheduler), `FLAGS` (of the scripts), `IS_EXACT` (whether the trajectory is the
plain pipeline's bit for bit).
"""

from importlib import import_module
from types import SimpleNamespace

import torch


CASES = ["z_image", "flux2_klein", "flux_schnell", "flux_dev", "qwen_image", "krea2", "sd15", "sd21", "lcm", "sdxl",
         "sd3", "sd3_without_t5", "sana_sprint", "ernie_image", "auraflow"]  # fmt: skip

PROMPTS = ["red panda", "a sailboat vehicle beside the cactus plant"]  # of unlike length
DEFAULTS = {
    "CALL_AT": {},
    "STEPS": (2, 4),
    "SIZES": ((32, 32), (32, 64)),  # height and width, in pixels
    "ETA": None,
    "SCHEDULER_CONFIG": {},
    "IS_EXACT": False,
    "FLAGS": {},  # of the scripts, beside model, steps and resolution
    "unpack": lambda pipeline, latents, height, width: latents,
}


def encode_scaled(pipeline, pixels):
    """The latents of an AutoencoderKL, as in diffusers' training scripts."""
    latents, config = pipeline.vae.encode(pixels).latent_dist.mode(), pipeline.vae.config
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def find_case(name: str) -> SimpleNamespace:
    module = import_module(f"tests.families.cases.{name}")
    return SimpleNamespace(**{"name": name, "encode": encode_scaled, **DEFAULTS, **vars(module)})


def draw_weights(*modules: torch.nn.Module, std: float = 0.05) -> None:
    """Draws weights that are all zero or one anew, so that no layer is without effect."""
    for module in modules:
        module.eval()
        for parameter in module.parameters():
            if parameter.std(correction=0) == 0:
                parameter.data += std * torch.randn(parameter.shape)


def scale_weights(module: torch.nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data *= factor
