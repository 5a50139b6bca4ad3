"""Checkpoints that are complete or absent.

A checkpoint is `output_dir/checkpoint-{global_step}`: the LoRA as pipelines load it, accelerate's state of optimizer,
learning rate and random generators, and a manifest with the size of every file. It is written under another name and
renamed when the manifest is in it.
"""

import argparse
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open

from pso_utils.errors import UserError, first_line
from pso_utils.families import Family
from pso_utils.families.loading import ModelInfo
from pso_utils.families.lora import load_lora
from pso_utils.run.accelerator import mixed_precision
from pso_utils.run.optimizer import initialize_grad_scaler


logger = logging.getLogger(__name__)  # not accelerate's, which is of no use before there is an accelerator

MANIFEST_NAME = "manifest.json"
_PARTIAL_SUFFIX = ".partial"


# ---- What a checkpoint holds ----


@dataclass
class TrainingState:
    """What a checkpoint keeps beside LoRA, optimizer and learning rate. Draws are keyed by it, so no generator is."""

    epoch: int = 0  # the next outer epoch
    global_step: int = 0  # optimizer steps done
    tie_epochs: int = 0  # epochs of nothing but ties in a row
    validated_step: int = -1  # the last step at which validation images were drawn

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        self.__dict__.update(state)


def check_checkpoint_lora(
    checkpoint, part: str, *, rank: int, lora_alpha: float, target_modules: Sequence[str]
) -> None:
    """Raises UserError unless the checkpoint's LoRA, of the denoiser called `part` in the pipeline, is of this rank,
    alpha and these target modules; reads the file's header only, so it can be asked before a model is loaded."""
    path = Path(checkpoint, LORA_WEIGHT_NAME_SAFE)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        stored = config[f"{part}.r"], config[f"{part}.lora_alpha"], set(config[f"{part}.target_modules"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} holds no LoRA of this project; resume from another checkpoint") from error
    if stored != (rank, lora_alpha, set(target_modules)):
        raise UserError(
            f"{checkpoint} holds a LoRA of rank {stored[0]}, alpha {stored[1]} on {' '.join(sorted(stored[2]))}, this "
            f"run asks for rank {rank}, alpha {lora_alpha} on {' '.join(sorted(target_modules))}; resume with the "
            "checkpoint's own, or train into another --output_dir"
        )


def check_checkpoint_optimizer(checkpoint, *, use_8bit_adam: bool, mixed_precision: str) -> None:
    """Raises UserError unless the checkpoint's optimizer state is what a run with these flags loads.

    A run in fp16 needs the state of a gradient scaler; one in another precision passes it over.
    """
    path = Path(checkpoint, f"{OPTIMIZER_NAME}.bin")
    states = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state"]
    eight_bit = not any("exp_avg" in state for state in states.values())  # torch's name for it, not bitsandbytes'
    if states and eight_bit != use_8bit_adam:
        what, remedy = ("an 8-bit", "pass") if eight_bit else ("a 32-bit", "drop")
        raise UserError(f"{checkpoint} holds {what} optimizer's state: {remedy} --use_8bit_adam to resume from it")
    if mixed_precision == "fp16" and not Path(checkpoint, SCALER_NAME).is_file():
        raise UserError(
            f"{checkpoint} holds no fp16 run's gradient scale: pass --mixed_precision no or bf16 to resume from it"
        )


def register_lora_hooks(accelerator: Accelerator, family: Family) -> None:
    """Makes `save_state` write the LoRA of the family's denoiser instead of the whole denoiser, and `load_state` read
    it back in float32.

    `load_state` raises UserError for a LoRA that does not fit, before it has changed anything.
    """

    def save_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            family.save_lora(output_dir)
        weights.clear()

    def load_hook(models, input_dir):
        config = family.denoiser.peft_config["default"]
        settings = {"lora_alpha": config.lora_alpha, "target_modules": config.target_modules}
        check_checkpoint_lora(input_dir, family.denoiser_name, rank=config.r, **settings)
        load_lora(family.denoiser, family.denoiser_name, input_dir)
        models.clear()

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


# ---- Writing and finding checkpoints ----


def save_checkpoint(accelerator: Accelerator, output_dir, global_step: int, total_limit: int | None = None) -> Path:
    """Writes `output_dir/checkpoint-{global_step}`, all or nothing; every process must call it.

    Afterwards at most `total_limit` checkpoints stand (None: all); the one just written always stays, so there is
    never none that is complete.

    Raises:
        UserError: it cannot be written; the checkpoints before it stand as they did.
    """
    checkpoint = Path(output_dir, f"checkpoint-{global_step}")
    partial = Path(output_dir, checkpoint.name + _PARTIAL_SUFFIX)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: torch.save's, for a full disk too
        raise UserError(
            f"{checkpoint} cannot be written ({first_line(error)}); make room on the disk and pass "
            "--resume_from_checkpoint latest: the checkpoints before it are whole"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
        manifest = {"global_step": global_step, "time_ns": time.time_ns(), "files": files}
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))
        if checkpoint.exists():  # of a run before this one, or damaged
            os.replace(checkpoint, checkpoint.with_name(f"{checkpoint.name}-replaced{_PARTIAL_SUFFIX}"))
        os.replace(partial, checkpoint)
        _rotate(checkpoint, total_limit)
    accelerator.wait_for_everyone()
    return checkpoint


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _checkpoints(output_dir) -> list[Path]:
    """Every folder `checkpoint-N`, complete or not, by step."""
    if not Path(output_dir).is_dir():
        return []
    folders = [
        path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(folders, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _rotate(newest: Path, total_limit: int | None) -> None:
    for leftover in newest.parent.glob(f"checkpoint-*{_PARTIAL_SUFFIX}"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    if total_limit is not None:
        # damaged ones go first, then the oldest
        others = [path for path in _checkpoints(newest.parent) if path != newest]
        others.sort(key=lambda path: (_damage(path) is None, _step(path)))
        for path in others[: max(len(others) + 1 - total_limit, 0)]:
            shutil.rmtree(path)


def _manifest(checkpoint: Path) -> dict | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _damage(checkpoint: Path) -> str | None:
    """What is missing in a half-written checkpoint; None if it is complete."""
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or damaged"
    for name, size in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def checkpoint_to_resume(args: argparse.Namespace, info: ModelInfo, lora_targets: Sequence[str]) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, checked against the flags; None for a new run.

    Raises:
        UserError: it is missing, incomplete or of another LoRA or optimizer, or a new run would write over an earlier
            one's.
    """
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
        settings = {"rank": args.rank, "lora_alpha": lora_alpha, "target_modules": lora_targets}
        check_checkpoint_lora(checkpoint, info.family.denoiser_name, **settings)
        precision = mixed_precision(args)
        check_checkpoint_optimizer(checkpoint, use_8bit_adam=args.use_8bit_adam, mixed_precision=precision)
    elif args.resume_from_checkpoint is None and any(Path(args.output_dir).glob("checkpoint-*[0-9]/manifest.json")):
        raise UserError(
            f"--output_dir {args.output_dir} has the checkpoints of an earlier run: pass --resume_from_checkpoint"
            " latest to go on with it, or another --output_dir"
        )
    return checkpoint


def find_checkpoint(output_dir, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from: "latest", or a name in `output_dir`, or a path; None to start anew.

    "latest" is the complete checkpoint that was written last. Half-written ones are passed over with a warning; if
    there is no complete one the answer is None.

    Raises:
        UserError: the checkpoint that was named does not exist or is half-written.
    """
    if resume_from_checkpoint is None:
        return None
    checkpoints = _checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        complete = []
        for path in checkpoints:
            damage = _damage(path)
            if damage is None:
                complete.append(path)
            else:
                logger.warning(f"{path} is incomplete ({damage}); it is passed over")
        # written last, not the highest step: a run that was taken up at an earlier step leaves later ones behind
        return max(complete, key=lambda path: (_manifest(path).get("time_ns", 0), _step(path)), default=None)
    candidates = [Path(output_dir, resume_from_checkpoint), Path(resume_from_checkpoint).expanduser()]
    path = next((path for path in candidates if path.is_dir()), None)
    if path is None:
        names = ", ".join(path.name for path in checkpoints) or "none"
        raise UserError(
            f"--resume_from_checkpoint: {resume_from_checkpoint} does not exist; {output_dir} has: {names}; pass one "
            'of these or "latest"'
        )
    damage = _damage(path)
    if damage is not None:
        raise UserError(f'--resume_from_checkpoint: {path} is incomplete ({damage}); pass another one or "latest"')
    return path


def resume(accelerator: Accelerator, state: TrainingState, checkpoint: Path | None) -> None:
    """Loads the checkpoint, if there is one, into everything that is registered, `state` included."""
    accelerator.register_for_checkpointing(state)
    if checkpoint is not None:
        if accelerator.is_main_process:
            logger.info(f"resuming from {checkpoint}")
        accelerator.load_state(str(checkpoint))
    initialize_grad_scaler(accelerator)
