"""The LoRAs that are compared: found, held against the base before anything is loaded, and put on it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from pso_utils.errors import UserError, first_line
from pso_utils.families import Family
from pso_utils.families.base import quiet_libraries
from pso_utils.families.lora import lora_matrices, lora_metadata
from pso_utils.sources import WEIGHT_SUFFIXES, check_exists, fetch_file, split_source


ADAPTER = "evaluated"


class Model(NamedTuple):
    """The base, or with a `lora` the base with that on it: a file, `repo:file` or a hub id."""

    name: str
    lora: str | None = None
    scale: float = 1.0  # how strongly it is applied


def find_lora(text: str, *, scale: float = 1.0) -> Model:
    """Reads `NAME=PATH`; in a folder, takes the file that the training scripts write, or else its only one.

    Raises:
        UserError: it is not of this form, there is no such path, or several files are in it.
    """
    name, _, source = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name) or not source:
        raise UserError(f"--lora {text}: pass NAME=PATH, with a NAME of letters, digits, '.', '+' and '-'")
    location, filename = split_source(source)
    check_exists(location, f"--lora {name}")
    if filename is None and Path(location).is_dir():
        files = sorted(path.name for path in Path(location).iterdir() if path.suffix in WEIGHT_SUFFIXES)
        if not files:
            raise UserError(f"--lora {name}: {location} has no .safetensors or .bin file: pass a LoRA's folder")
        if len(files) > 1 and LORA_WEIGHT_NAME_SAFE not in files:
            raise UserError(
                f"--lora {name}: {location} has several LoRA files: pass one of them, {name}={Path(location, files[0])}"
                f" for instance (there are {', '.join(files)})"
            )
        filename = LORA_WEIGHT_NAME_SAFE if LORA_WEIGHT_NAME_SAFE in files else files[0]
    if Path(location).is_dir():
        source = str(Path(location, filename))
    return Model(name, source, scale)


def check_lora(text: str, source: str, *, family: type[Family], parts: dict, cache_dir: str | None = None) -> None:
    """Holds a LoRA's names and shapes against the base's `parts`: diffusers itself only warns of layers that it does
    not know. `text` is the flag's value, for messages.

    Raises:
        UserError: it cannot be read, was made for another architecture, or is damaged.
    """
    location, filename = split_source(source)
    config, layers, weights = parts[family.denoiser_name].config, {}, {}
    try:
        if filename is not None and filename.endswith(".safetensors"):
            lora_metadata(fetch_file(location, filename, cache_dir))
        state_dict = family.read_lora(location, filename, denoiser_config=config, cache_dir=cache_dir)
    except Exception as error:  # of the hub, the network, the file's format: each library has its own
        raise UserError(
            f"--lora {text} is no LoRA that can be read ({' '.join(str(error).split())[:300]}); pass NAME=PATH with a "
            "folder, a file, a hub id or repo:file"
        ) from error
    for part, model in parts.items():
        try:
            own = lora_matrices(part, model, state_dict)
        except ValueError as error:  # diffusers', for names of a text encoder that it does not know
            raise UserError(f"--lora {text} has names that are none of a LoRA's ({first_line(error)})") from error
        layers |= {f"{part}, {name}": matrices for name, matrices in own.items()}
        weights |= {f"{part}, {name}": getattr(module, "weight", None) for name, module in model.named_modules()}
    if not layers:
        first = f"its first name is {min(state_dict)}" if state_dict else "it is empty"
        raise UserError(
            f"--lora {text} has no weights for the base's architecture, {family.__name__} ({first}): pass a LoRA of "
            "this one, written by save_lora_weights or with Kohya's names"
        )
    other = f"--lora {text} is of another architecture"
    for layer, matrices in layers.items():
        weight, remedy = weights.get(layer), "pass the base model that it was trained on"
        shapes = {side: tuple(matrix.shape) for side, matrix in matrices.items()}
        if weight is None:
            raise UserError(f"{other}: the base has no such layer ({layer}); {remedy}")
        if shapes.keys() != {"A", "B"} or shapes["A"][0] != shapes["B"][1]:
            raise UserError(f"--lora {text} is damaged: it has no pair of matrices for {layer}; pass a whole one")
        if (shapes["B"][0], shapes["A"][1]) != tuple(weight.shape[:2]):
            made = f"{shapes['B']} and {shapes['A']} don't make the base's weight {tuple(weight.shape)}"
            raise UserError(f"{other}: its matrices {made} ({layer}); {remedy}")
        if not all(matrix.isfinite().all() for matrix in matrices.values()):
            raise UserError(f"--lora {text} has weights that are not finite ({layer}): its training diverged")


@contextmanager
def applied(pipeline: DiffusionPipeline, model: Model, *, cache_dir: str | None = None) -> Iterator[None]:
    """A context in which the pipeline has the model's LoRA, if it is not the base; after it none is left."""
    if model.lora is None:
        yield
        return
    location, filename = split_source(model.lora)
    try:
        with quiet_libraries():  # diffusers warns of every LoRA that leaves the text encoders as they are
            pipeline.load_lora_weights(location, weight_name=filename, adapter_name=ADAPTER, cache_dir=cache_dir)
    except Exception as error:  # of diffusers or peft, of any kind, for metadata that somebody made up
        raise UserError(f"--lora {model.name}={model.lora} does not load ({first_line(error)})") from error
    pipeline.set_adapters(ADAPTER, model.scale)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()
