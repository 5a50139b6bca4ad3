"""Writes a LoRA of this project for ComfyUI and others, as the training scripts do at their end.

For a run's --output_dir the file is NAME.safetensors in it, named after the folder; for its checkpoint-N,
NAME-N.safetensors beside the checkpoint. What the run's checkpoints tell of model and sampler goes into its metadata.
"""

import argparse
import re
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from pso_utils.errors import UserError
from pso_utils.families.loading import ModelInfo, empty_denoiser
from pso_utils.families.lora import lora_matrices, read_lora_settings
from pso_utils.families.lora_export import export_name
from pso_utils.run import arguments
from pso_utils.run.accelerator import one_line_errors
from pso_utils.run.checkpoints import flags_of_run
from pso_utils.run.export import export_run
from pso_utils.run.models import MODEL_SOURCES, check_model, deployment
from pso_utils.sources import read_weights


VALIDATION_FLAGS = ("validation_num_inference_steps", "validation_timesteps", "validation_eta")


def parse_args(argv=None) -> argparse.Namespace:
    parser = arguments.ArgumentParser(prog="python -m pso_utils.convert", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="A run's --output_dir, one of its checkpoints, or a LoRA file.")
    add("--base", help="The model that it was trained on: a hub id or a local diffusers folder. Default: the one that "
        "the run's checkpoints name.")  # fmt: skip
    add("--output", metavar="FILE.safetensors", help="Where to write it. Default: see above; for a LoRA file of another"
        " name than diffusers', beside it.")  # fmt: skip
    arguments.add_save_dtype_argument(add)
    return parser.parse_args(argv)


def find_lora(run: str) -> Path:
    """The LoRA as diffusers reads it; raises UserError where `run` has none."""
    path = Path(run).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{run} does not exist: pass a run's --output_dir, one of its checkpoints, or a LoRA file")
    if not (path / LORA_WEIGHT_NAME_SAFE).is_file():
        checkpoints = sorted(path.glob(f"checkpoint-*/{LORA_WEIGHT_NAME_SAFE}"), key=lambda lora: lora.stat().st_mtime)
        remedy = f"pass {checkpoints[-1].parent}" if checkpoints else "pass a run's --output_dir, or a LoRA file"
        raise UserError(f"{run} has no {LORA_WEIGHT_NAME_SAFE}: {remedy}")
    return path / LORA_WEIGHT_NAME_SAFE


def default_output(lora: Path) -> Path:
    folder = lora.resolve().parent
    if lora.name != LORA_WEIGHT_NAME_SAFE:
        return lora.with_name(f"{lora.stem}-converted.safetensors")
    if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):  # in which there is nothing but its own files
        run = folder.parent
        return run / f"{Path(export_name(run)).stem}-{match[1]}.safetensors"
    return folder / export_name(folder)


def run_settings(lora: Path, base: str | None) -> tuple[argparse.Namespace, bool]:
    """The flags of the run that the LoRA is of, and whether they are known: else they are the defaults.

    Raises:
        UserError: neither a checkpoint nor `base` tells the model.
    """
    flags = flags_of_run(lora.parent)
    if base is None and flags is None:
        raise UserError(f"no checkpoint beside {lora} says which model it is for: pass --base, a hub id or a folder")
    parser = arguments.ArgumentParser()
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    defaults = vars(parser.parse_args([f"--{MODEL_SOURCES[0]}", base or ""]))
    settings = defaults | dict.fromkeys(VALIDATION_FLAGS) | (flags or {})
    if base is not None:  # what went into it needs not be here any more
        settings |= dict.fromkeys(MODEL_SOURCES) | {MODEL_SOURCES[0]: base}
    return argparse.Namespace(**settings), flags is not None


def check_layers(lora: Path, info: ModelInfo) -> None:
    """Raises UserError unless the file is one LoRA of this model's denoiser and nothing else."""
    part, denoiser = info.family.denoiser_name, empty_denoiser(info.family, info.denoiser_config)
    read_lora_settings(str(lora), part=part, flag="")
    expected = {name: tuple(parameter.shape[:2]) for name, parameter in denoiser.named_parameters()}
    state_dict = read_weights(str(lora))
    layers = lora_matrices(part, denoiser, state_dict)
    if 2 * len(layers) != len(state_dict) or any(len(matrices) < 2 for matrices in layers.values()):
        raise UserError(f"{lora} has something else than the two matrices of each layer: pass the file of a run")
    for layer, matrices in layers.items():
        if (matrices["B"].shape[0], matrices["A"].shape[1]) != expected.get(f"{layer}.weight"):
            raise UserError(f"{lora} is no LoRA of this model ({layer}): pass the one that it was trained on as --base")


def convert(args: argparse.Namespace) -> Path:
    """Writes the file; returns where."""
    lora = find_lora(args.run)
    destination = Path(args.output).expanduser() if args.output else default_output(lora)
    if destination.suffix != ".safetensors" or destination.resolve() == lora.resolve():
        raise UserError(f"--output {args.output}: pass another file, whose name ends in .safetensors")
    settings, is_known = run_settings(lora, args.base)
    settings.save_dtype = args.save_dtype
    try:
        info = check_model(settings)
    except UserError as error:
        raise UserError(f"{error} (here as --base)") from error
    if info.family.lora_format is None:
        name = info.family.pipeline_class.__name__
        raise UserError(f"no tool but diffusers is known to read a LoRA of a {name}: pass another model's")
    check_layers(lora, info)
    how = deployment(settings, info) if is_known else None
    return export_run(settings, info, how, source=lora, destination=destination)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        print(f"{convert(args)} is written: put it into ComfyUI's models/loras, or where your tool looks for LoRAs")


if __name__ == "__main__":
    main()
