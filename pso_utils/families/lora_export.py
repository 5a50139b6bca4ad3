"""The LoRA as other tools read it: Kohya's scripts, ComfyUI, and all that take their files."""

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.families.lora import ToolFormat, file_mode, read_lora_settings
from pso_utils.sources import read_weights


SAVE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_SAVE_DTYPE = "fp16"


def export_name(output_dir) -> str:
    """The file's name, after the run's folder.

    `load_lora_weights(output_dir)` takes, of several files, one whose name ends in diffusers' own: so none of ours may.
    """
    name = f"{Path(output_dir).resolve().name}.safetensors"
    return name.replace(LORA_WEIGHT_NAME_SAFE, "lora.safetensors") if name.endswith(LORA_WEIGHT_NAME_SAFE) else name


def tool_state_dict(
    state_dict: dict[str, Tensor], tool_format: ToolFormat, *, rank: int, lora_alpha: float
) -> dict[str, Tensor]:
    """Names and matrices, float32, of a LoRA that `save_lora` wrote, whose names begin with the denoiser's.

    With Kohya's names each layer has its alpha, and what is added is alpha / rank times the product of its matrices, as
    here. With diffusers' names alpha / rank is multiplied into B instead: diffusers takes no alpha for some families.
    """
    if tool_format.is_kohya:
        weights = convert_state_dict_to_kohya(state_dict)
        # the converter writes the rank
        alphas = {key: torch.tensor(float(lora_alpha)) for key in weights if key.endswith(".alpha")}
        return weights | alphas
    weights = {}
    for key, value in state_dict.items():
        prefix, layer, matrix = re.fullmatch(r"(\w+)\.(.+)\.(lora_[AB]\.weight)", key).groups()
        if layer in tool_format.renamed:
            prefix, layer = "diffusion_model", tool_format.renamed[layer]
        weights[f"{prefix}.{layer}.{matrix}"] = value * (lora_alpha / rank) if matrix[5] == "B" else value
    return weights


def export_lora(
    source, destination, tool_format: ToolFormat, *, part: str, save_dtype: str, details: Mapping[str, object]
) -> None:
    """Writes the LoRA of `part` of the pipeline in the file `source`, which `save_lora` wrote, for other tools.

    Args:
        save_dtype: one of `SAVE_DTYPES`.
        details: metadata beside names, rank, alpha and date; what is None is left out.

    Raises:
        UserError: `source` is no such LoRA, its values exceed `save_dtype`, or `destination` cannot be written.
    """
    source, destination = Path(source), Path(destination)
    rank, lora_alpha, _ = read_lora_settings(str(source), part=part, flag="")
    weights = tool_state_dict(read_weights(str(source)), tool_format, rank=rank, lora_alpha=lora_alpha)
    weights = {key: value.to(SAVE_DTYPES[save_dtype]).contiguous() for key, value in weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{source} has values beyond those of {save_dtype}: pass --save_dtype bf16 or fp32")
    written = datetime.fromtimestamp(int(source.stat().st_mtime), UTC)  # the same whenever it is converted
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": lora_alpha if tool_format.is_kohya else rank,  # as the file is: else alpha is in its B
        "ss_base_model_version": tool_format.base_version,
        "ss_output_name": destination.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{tool_format.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": destination.stem,
        "modelspec.date": written.isoformat(timespec="seconds").removesuffix("+00:00"),
        **details,
    }
    metadata = {key: str(value) for key, value in metadata.items() if value is not None}
    partial = destination.with_name(f".{destination.name}.partial")  # a file that was there stands if this fails
    try:
        save_file(weights, partial, metadata=metadata)
        partial.chmod(file_mode())
        os.replace(partial, destination)
    except (SafetensorError, OSError) as error:  # a full disk, for instance
        partial.unlink(missing_ok=True)
        raise UserError(f"{destination} cannot be written ({first_line(error)}); make room there") from error
