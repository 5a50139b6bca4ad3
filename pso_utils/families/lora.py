"""The LoRA that is trained: added to a denoiser, turned off for the base, written for pipelines."""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.sources import check_exists, fetch_file, read_weights, split_source


class ToolFormat(NamedTuple):
    """How other tools call a family, and the layers of its LoRA: see lora_export.py."""

    architecture: str  # in ModelSpec, without the "/lora"
    base_version: str  # Kohya's `ss_base_model_version`
    # Kohya's names and an alpha for each layer; else diffusers' own names, which ComfyUI reads for transformers
    is_kohya: bool = False
    # Layers that ComfyUI does not know by diffusers' name: that -> the one in its own model
    renamed: Mapping[str, str] = {}


def check_lora_targets(denoiser: ModelMixin, target_modules: Sequence[str], default: Sequence[str]) -> None:
    """Raises UserError unless each target names a module of the denoiser, which may be empty (on the meta device)."""
    names = [name for name, _ in denoiser.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"--lora_target_modules: the model has no module {target}; use for instance {' '.join(default)}"
            )


def add_lora(
    denoiser: ModelMixin,
    *,
    rank: int,
    target_modules: Sequence[str],
    lora_alpha: float | None = None,
    seed: int | None = None,
) -> list[torch.nn.Parameter]:
    """Adds a float32 LoRA that starts as the identity (A gaussian, B zero) and returns its parameters.

    `lora_alpha` defaults to `rank`. With a `seed` the start depends on nothing else, and the global generator is left
    as it was.

    Raises:
        UserError: a target names no module of the denoiser, or a module that takes no LoRA.
    """
    check_lora_targets(denoiser, target_modules, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(target_modules),
    )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # the CPU's alone: peft makes the matrices there
        try:
            denoiser.add_adapter(config)
        except ValueError as error:
            raise UserError(f"--lora_target_modules {' '.join(target_modules)}: {first_line(error)}") from error
    cast_training_params(denoiser, dtype=torch.float32)
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def lora_layers(denoiser: ModelMixin) -> list[BaseTunerLayer]:
    """The layers that have a LoRA."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def disabled(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Runs the denoiser as the base, without the LoRA of its `layers`.

    Sets the private attribute behind peft's read-only `disable_adapters`, and nothing else: peft's own
    `enable_adapters` also walks all parameters, and changes which require a gradient, at every switch. `vars`, because
    `torch.nn.Module.__setattr__` takes 1 ms for SDXL's layers.
    """
    for layer in layers:
        vars(layer)["_disable_adapters"] = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer)["_disable_adapters"] = False


def save_lora(pipeline_class: type[DiffusionPipeline], part: str, denoiser: ModelMixin, folder) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata, as
    `pipeline.load_lora_weights(folder)` reads it; `part` is the denoiser's name in the pipeline.

    Raises:
        UserError: it is not finite, or cannot be written; a file that was there stands as it did.
    """
    state_dict = get_peft_model_state_dict(denoiser)
    # a tenth of the time of isfinite of each value; aminmax passes a NaN on
    if not all(end.isfinite() for value in state_dict.values() for end in value.aminmax()):
        raise UserError(f"the LoRA is not finite, so it is not written to {folder}: lower --learning_rate or --beta")
    metadata = _collate_lora_metadata({part: denoiser})  # without it a LoRA loads with alpha = rank
    for values in metadata.values():
        values.update({key: sorted(value) for key, value in values.items() if isinstance(value, set)})
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)  # where a file is, diffusers would log and write nothing
        pipeline_class.save_lora_weights(folder, **{f"{part}_lora_layers": state_dict}, **metadata)
        Path(folder, LORA_WEIGHT_NAME_SAFE).chmod(file_mode())  # safetensors lets the owner alone read it
    except (SafetensorError, OSError) as error:  # a full disk, for instance
        raise UserError(f"the LoRA cannot be written to {folder} ({first_line(error)}); make room there") from error


def file_mode() -> int:
    """The permissions of a new file, by the umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def lora_file(source: str, cache_dir: str | None = None) -> str:
    """The local file of a LoRA: `source` is a folder, a file, a hub id or `repo:file`."""
    location, filename = split_source(source)
    check_exists(location, "--lora_path")
    return fetch_file(location, filename or LORA_WEIGHT_NAME_SAFE, cache_dir)


def lora_metadata(path: str) -> dict:
    """What a .safetensors file says of its LoRA beside the matrices: rank, alpha, layers. Empty where it says nothing.

    Raises:
        UserError: it cannot be read, or claims a rank above its matrices', for which peft would make room.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no LoRA that can be read ({first_line(error)})") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is no LoRA that can be read (its metadata are no JSON object)")
    largest = max((min(shape[:2]) for shape in shapes if len(shape) >= 2), default=0)
    for key, value in metadata.items():
        ranks = [value] if key.endswith(".r") else []
        if key.endswith(".rank_pattern") and isinstance(value, dict):
            ranks = value.values()
        for rank in ranks:
            if not isinstance(rank, int) or rank > largest:
                raise UserError(f"{path} claims rank {rank}, its matrices have {largest} at most; pass another file")
    return metadata


def read_lora_settings(path: str, *, part: str, flag: str = "--lora_path ") -> tuple[int, float, list[str]]:
    """Rank, alpha and target modules of the LoRA of `part` of the pipeline, from the metadata in its file; `flag` is
    what named it, for messages.

    Raises:
        UserError: it cannot be read, or its metadata is not that of one LoRA of `part` alone.
    """
    remedy = "pass one written by this project's scripts, or by diffusers' save_lora_weights with its metadata"
    try:
        settings = lora_metadata(path)
    except UserError as error:
        raise UserError(f"{flag}{error}: {remedy}") from error
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
    if not own or len(own) < len(settings) or own.get("rank_pattern") or own.get("alpha_pattern"):
        raise UserError(f"{flag}{path} does not say rank, alpha and layers of one LoRA of the {part}: {remedy}")
    rank, alpha, targets = own.get("r"), own.get("lora_alpha"), own.get("target_modules")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not isinstance(targets, list):
        raise UserError(f"{flag}{path} has a rank, alpha or layers of another kind: {remedy}")
    return rank, alpha, targets


def load_lora(denoiser: ModelMixin, part: str, path) -> None:
    """Reads the LoRA that `save_lora` wrote to the folder or file `path` into the denoiser's own of the same rank and
    targets.

    Raises:
        UserError: it cannot be read, or does not fit; nothing is changed.
    """
    path = Path(path)
    state_dict = read_weights(str(path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path))
    state_dict = {key.removeprefix(f"{part}."): value for key, value in state_dict.items()}
    expected = {key: value.shape for key, value in get_peft_model_state_dict(denoiser).items()}
    if {key: value.shape for key, value in state_dict.items()} != expected:
        raise UserError(f"{path} holds a LoRA of another model; pass the base model that it was trained on")
    set_peft_model_state_dict(denoiser, state_dict)


def checksum(denoiser: ModelMixin) -> int:
    """Of the LoRA's bits: processes that train the same one have the same."""
    value = 0
    for tensor in get_peft_model_state_dict(denoiser).values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def lora_matrices(part: str, model: torch.nn.Module, state_dict: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> its matrices "A" and "B", of `part` of the pipeline, which is `model`. `state_dict` is that of
    `Family.read_lora`, whose names come in several spellings."""
    own = {key.removeprefix(f"{part}."): value for key, value in state_dict.items() if key.startswith(f"{part}.")}
    if isinstance(model, ModelMixin):
        own = convert_unet_state_dict_to_peft(own)
    elif own:
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        if not hasattr(model, "text_model"):  # transformers 5 has one level less
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in own.items():
        if match := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key):
            layers.setdefault(match[1], {})[match[2]] = value
    return layers
