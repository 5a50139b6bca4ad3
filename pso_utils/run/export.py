"""A run's LoRA for the tools that read other names than diffusers': in `output_dir`, named after it."""

import argparse
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from pso_utils.families import Deployment
from pso_utils.families.loading import ModelInfo
from pso_utils.families.lora_export import DEFAULT_SAVE_DTYPE, export_lora, export_name
from pso_utils.run.comfyui import comfy_settings
from pso_utils.run.models import base_model_name


def export_run(
    args: argparse.Namespace, info: ModelInfo, deployment: Deployment | None, *, source=None, destination=None
) -> Path | None:
    """Writes it; returns where, or None for a family whose LoRA no other tool is known to read.

    Args:
        args: the model's flags, and save_dtype; of a run its own.
        deployment: None: the metadata does not say how to draw with it.
        source: the LoRA as pipelines load it. Default: the one in `output_dir`.
        destination: Default: in `output_dir`, named after it.

    Raises:
        UserError: it cannot be read or written.
    """
    tool_format = info.family.tool_format(info.denoiser_config)
    if tool_format is None:
        return None
    source = source or Path(args.output_dir, LORA_WEIGHT_NAME_SAFE)
    destination = destination or Path(args.output_dir, export_name(args.output_dir))
    details = {
        "ss_sd_model_name": base_model_name(args),
        "modelspec.trigger_phrase": getattr(args, "instance_prompt", None),
    }
    if deployment is not None:
        hint = comfy_settings(info, deployment, guidance_scale=args.guidance_scale).shown()
        if deployment.eta is not None:
            hint["eta"] = deployment.eta
        details["modelspec.resolution"] = f"{deployment.width}x{deployment.height}"
        details["modelspec.usage_hint"] = ", ".join(f"{name} {value}" for name, value in hint.items())
    export_lora(
        source,
        destination,
        tool_format,
        part=info.family.denoiser_name,
        save_dtype=args.save_dtype or DEFAULT_SAVE_DTYPE,
        details=details,
    )
    return destination
