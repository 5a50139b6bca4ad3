"""Which flags a run that goes on from a checkpoint may change, which would make it another run, and whether it is
finished."""

import argparse
import hashlib
import json
from pathlib import Path

from pso_utils.data.readers import matching_files
from pso_utils.errors import UserError
from pso_utils.sources import split_source


SECRETS = ("hub_token",)

# What changes neither the pairs nor the updates, but for rounding: where things are kept, what is shown, how much is
# done at once. The number of processes is no flag, and may differ too.
MAY_DIFFER = frozenset(
    """
    output_dir resume_from_checkpoint cache_dir cache_latents cache_prompts logging_dir report_to
    push_to_hub hub_model_id hub_public
    checkpointing_steps checkpointing_minutes checkpoints_total_limit validation_steps validation_prompts
    num_validation_images early_stopping_patience dataloader_num_workers
    offload vae_batch_size reward_batch_size gradient_checkpointing
    enable_vae_tiling save_dtype max_tie_epochs
    """.split()
)
# References and the denoising objective's samples are drawn by the deployment; elsewhere it is what is validated.
DEPLOYMENT = ("validation_num_inference_steps", "validation_timesteps", "validation_eta")
LENGTH = ("max_train_steps", "num_train_epochs")  # may differ while the learning rate does not depend on it
CONSTANT_RATES = ("constant", "constant_with_warmup")

# Files and folders, which may have moved.
PATHS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "distilled_unet",
         "distilled_transformer", "distillation_lora", "lora_path", "prompts", "dataset_name", "train_data_dir",
         "instance_data_dir")  # fmt: skip


def content_of(path: str | None, *, output_dir: str) -> str | None:
    """A hash of a local file, or of the names and sizes of the files of a folder or pattern, without hidden ones and
    those of the run itself; None for what is not local."""
    if path is None:
        return None
    location, filename = split_source(str(path))
    root = Path(location, filename or "").expanduser()
    if root.is_file():
        with root.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if root.is_dir():
        own = Path(output_dir).resolve()
        files = [file for file in root.rglob("*") if not file.resolve().is_relative_to(own)]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    else:
        files, root = [Path(file) for file in matching_files(str(path))], root.parent
    found = sorted((str(file.relative_to(root)), file.stat().st_size) for file in files if file.is_file())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else None


def recorded_flags(args: argparse.Namespace) -> dict:
    """The flags in force, for a checkpoint's manifest: JSON, without secrets, with the content of local paths."""
    flags = {name: value for name, value in vars(args).items() if name not in SECRETS}
    content = {name: content_of(getattr(args, name, None), output_dir=args.output_dir) for name in PATHS}
    return json.loads(json.dumps({"flags": flags, "content": content}, default=str))


def changed_flags(current: dict, recorded: dict, checkpoint: Path) -> list[str]:
    """Holds a run's flags against those that the checkpoint was made with, both from `recorded_flags`.

    Returns:
        A line for each flag that differs and may.

    Raises:
        UserError: a flag differs that would make it another run; the message names it.
    """
    flags, earlier = current["flags"], recorded["flags"]
    if ("task" in flags) != ("task" in earlier):
        raise UserError(f"{checkpoint} is of the other training script: resume it there, or pass another --output_dir")
    lines = []
    for name in flags:
        if name not in earlier:
            continue
        value, before = flags[name], earlier[name]
        content, content_before = current["content"].get(name), recorded["content"].get(name)
        if value == before and content == content_before:
            continue
        if value == before:
            raise UserError(
                f"what is in --{name} {value} has changed since {checkpoint} was written: put back what was there, or"
                " train into another --output_dir"
            )
        has_moved = name in PATHS and content is not None and content == content_before
        is_length = name in LENGTH and flags["lr_scheduler"] in CONSTANT_RATES
        draws = flags.get("task", "preference") != "preference" or flags.get("objective") == "denoising"
        is_shown_only = name in DEPLOYMENT and not draws
        if not (name in MAY_DIFFER or has_moved or is_length or is_shown_only):
            raise UserError(
                f"{checkpoint} was trained with {_flag(name, before)}, this run asks for {_flag(name, value)}: resume "
                f"with {_flag(name, before)}, or train into another --output_dir"
            )
        if name not in ("resume_from_checkpoint", "output_dir"):
            lines.append(f"--{name}: {value} now, {before} when {checkpoint.name} was written")
    return sorted(lines)


FINISHED_NAME = "finished.json"


def mark_finished(args: argparse.Namespace, global_step: int) -> None:
    """Notes in `output_dir` that the result is there, and how long the run was."""
    length = {name: getattr(args, name) for name in LENGTH}
    Path(args.output_dir, FINISHED_NAME).write_text(json.dumps({"global_step": global_step, **length}))


def finished_length(output_dir) -> dict | None:
    """What `mark_finished` noted; None where the run is not finished."""
    try:
        length = json.loads(Path(output_dir, FINISHED_NAME).read_text())
        return {name: length[name] for name in ("global_step", *LENGTH)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_longer(args: argparse.Namespace, finished: dict) -> bool:
    """Whether the flags ask for more than a finished run has done; it may have ended before its last step."""
    if args.max_train_steps is not None:
        return args.max_train_steps > max(finished["global_step"], finished["max_train_steps"] or 0)
    return finished["max_train_steps"] is None and args.num_train_epochs > finished["num_train_epochs"]


def _flag(name: str, value) -> str:
    if value is None or value is False:
        return f"no --{name}"
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
