"""Checkpoints that are complete or absent, and the run's metrics beside them.

A checkpoint is `output_dir/checkpoint-{global_step}`: the LoRA as pipelines load it, accelerate's state of optimizer,
learning rate and random generators, and a manifest with the size of every file. It is written under another name and
renamed when the manifest is in it.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .sdxl import first_line, save_lora


logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.jsonl"
_PARTIAL_SUFFIX = ".partial"


# The LoRA in a checkpoint --------------------------------------------------------------------------------------------


def check_checkpoint_lora(checkpoint, rank: int, lora_alpha: float, target_modules: Sequence[str]) -> None:
    """Raises ValueError unless the checkpoint's LoRA is of this rank, alpha and these target modules; reads the file's
    header only, so it can be asked before a model is loaded."""
    path = Path(checkpoint, LORA_WEIGHT_NAME_SAFE)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} holds no LoRA of this project; resume from another checkpoint") from error
    stored = (config["unet.r"], config["unet.lora_alpha"], set(config["unet.target_modules"]))
    if stored != (rank, lora_alpha, set(target_modules)):
        raise ValueError(
            f"{checkpoint} holds a LoRA of rank {stored[0]}, alpha {stored[1]} on {' '.join(sorted(stored[2]))}, this "
            f"run asks for rank {rank}, alpha {lora_alpha} on {' '.join(sorted(target_modules))}; resume with the "
            "checkpoint's own, or train into another --output_dir"
        )


def check_checkpoint_optimizer(checkpoint, use_8bit_adam: bool, mixed_precision: str) -> None:
    """Raises ValueError unless the checkpoint's optimizer state is what a run with these flags loads.

    A run in fp16 needs the state of a gradient scaler; one in another precision passes it over.
    """
    path = Path(checkpoint, f"{OPTIMIZER_NAME}.bin")
    states = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state"]
    eight_bit = not any("exp_avg" in state for state in states.values())  # torch's name for it, not bitsandbytes'
    if states and eight_bit != use_8bit_adam:
        what, remedy = ("an 8-bit", "pass") if eight_bit else ("a 32-bit", "drop")
        raise ValueError(f"{checkpoint} holds {what} optimizer's state: {remedy} --use_8bit_adam to resume from it")
    if mixed_precision == "fp16" and not Path(checkpoint, SCALER_NAME).is_file():
        raise ValueError(
            f"{checkpoint} holds no fp16 run's gradient scale: pass --mixed_precision no or bf16 to resume from it"
        )


def load_lora(unet, folder) -> None:
    """Reads the LoRA that `save_lora` wrote to `folder` into the UNet's own.

    Raises:
        ValueError: it does not fit; nothing is changed.
    """
    config = unet.peft_config["default"]
    check_checkpoint_lora(folder, config.r, config.lora_alpha, config.target_modules)
    state_dict = load_file(Path(folder, LORA_WEIGHT_NAME_SAFE))
    state_dict = {key.removeprefix("unet."): value for key, value in state_dict.items()}
    expected = {key: value.shape for key, value in get_peft_model_state_dict(unet).items()}
    if {key: value.shape for key, value in state_dict.items()} != expected:
        raise ValueError(f"{folder} holds a LoRA of another UNet; resume with the base model that it was trained on")
    set_peft_model_state_dict(unet, state_dict)


def register_lora_hooks(accelerator: Accelerator, unet) -> None:
    """Makes `save_state` write the LoRA of `unet` instead of the whole UNet, and `load_state` read it back in float32.

    `load_state` raises ValueError for a LoRA that does not fit, before it has changed anything.
    """

    def save_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            save_lora(unet, output_dir)
        weights.clear()

    def load_hook(models, input_dir):
        load_lora(unet, input_dir)
        models.clear()

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


# Writing and finding checkpoints -------------------------------------------------------------------------------------


def save_checkpoint(accelerator: Accelerator, output_dir, global_step: int, total_limit: int | None = None) -> Path:
    """Writes `output_dir/checkpoint-{global_step}`, all or nothing; every process must call it.

    Afterwards at most `total_limit` checkpoints stand (None: all); the one just written always stays, so there is
    never none that is complete.

    Raises:
        OSError: it cannot be written; the checkpoints before it stand as they did.
    """
    checkpoint = Path(output_dir, f"checkpoint-{global_step}")
    partial = Path(output_dir, checkpoint.name + _PARTIAL_SUFFIX)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's, for a full disk too
        raise OSError(
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


def find_checkpoint(output_dir, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from: "latest", or a name in `output_dir`, or a path; None to start anew.

    "latest" is the complete checkpoint that was written last. Half-written ones are passed over with a warning; if
    there is no complete one the answer is None.

    Raises:
        ValueError: the checkpoint that was named does not exist or is half-written.
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
        raise ValueError(
            f"--resume_from_checkpoint: {resume_from_checkpoint} does not exist; {output_dir} has: {names}; pass one "
            'of these or "latest"'
        )
    damage = _damage(path)
    if damage is not None:
        raise ValueError(f'--resume_from_checkpoint: {path} is incomplete ({damage}); pass another one or "latest"')
    return path


# Metrics -------------------------------------------------------------------------------------------------------------


class MetricsLog:
    """`output_dir/metrics.jsonl`: one line of JSON for each `append`. For the main process alone."""

    def __init__(self, output_dir):
        self.path = Path(output_dir, METRICS_NAME)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line; numbers that are not finite are written as null, as JSON has no others."""
        line = {"step": step}
        for name, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict]:
        """The lines so far; one that was cut off when the run was killed is left out."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, so that a resumed run logs no step twice."""
        kept = [line for line in self.read() if line["step"] <= step]
        partial = self.path.with_name(METRICS_NAME + _PARTIAL_SUFFIX)
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)
