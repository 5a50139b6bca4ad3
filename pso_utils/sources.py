"""Where weights come from: a local file, `repo:file`, a folder or a hub id, as the flags name them."""

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pso_utils.errors import UserError, first_line


WEIGHT_SUFFIXES = (".safetensors", ".bin")
_STATE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".txt", ".model", ".jinja")  # weights, configurations, tokenizers
_HUB_FILES = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")  # one of which was downloaded


def split_source(source: str) -> tuple[str, str | None]:
    """Splits a local file, `repo:file`, a folder or a hub id into (folder or hub id, file name or None)."""
    path = Path(source).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    if path.is_dir():
        return str(path), None
    if ":" not in source:
        return source, None
    location, _, filename = source.rpartition(":")
    folder = Path(location).expanduser()
    return str(folder) if folder.is_dir() else location, filename


def check_exists(source: str, flag: str) -> None:
    """A path that is not there is an error; what may be a hub id (`name` or `user/name`) is left to the hub."""
    if Path(source).expanduser().exists():
        return
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) or source.endswith(WEIGHT_SUFFIXES):
        raise UserError(f"{flag}: {source} does not exist; pass a local path or a hub id")


def fetch_file(location: str, filename: str, cache_dir: str | None = None) -> str:
    """The local path of a file in a folder or a hub repository.

    Raises:
        UserError: there is none.
    """
    if Path(location).is_dir():
        path = Path(location, filename)
        if not path.is_file():
            raise UserError(f"{path} does not exist; pass one that does")
        return str(path)
    try:
        return hf_hub_download(location, filename, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{location}:{filename} is neither here nor on the hub: {first_line(error)}") from error


def source_state(source: str | None, *, revision: str | None = None, cache_dir: str | None = None):
    """What changes when a model's files do, as JSON: their names, sizes and times; of one of the hub its name and the
    commit that was downloaded, of which None is known before there is a configuration or LoRA of it."""
    if source is None:
        return None
    location, filename = split_source(source)
    path = Path(location, filename or "")
    if path.exists():
        files = [path] if filename else sorted(file for file in path.rglob("*") if file.suffix in _STATE_SUFFIXES)
        stats = [(file.relative_to(location).as_posix(), file.stat()) for file in files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if filename is not None:
        fetch_file(location, filename, cache_dir)
    for name in _HUB_FILES if filename is None else [filename]:
        cached = try_to_load_from_cache(location, name, cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str):  # .../snapshots/COMMIT/NAME
            return [source, Path(cached).parents[len(Path(name).parts) - 1].name]
    return [source, None]


def weight_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a .safetensors file, from its header alone.

    Raises:
        UserError: the header cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({first_line(error)})") from error


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a .bin with torch's `weights_only`, so that no code of it runs.

    Raises:
        UserError: it holds something else than tensors, or cannot be read.
    """
    if path.endswith(".safetensors"):
        weight_shapes(path)
        return load_file(path)
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged pickle torch's unpickler raises nearly anything, struct.error included
        raise UserError(f"{path} cannot be read as weights alone; pass a .safetensors or .bin state dict") from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f"{path} holds no state dict of tensors; pass a .safetensors or .bin state dict")
    return state_dict
