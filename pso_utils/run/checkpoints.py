"""Checkpoints that are complete or absent, and run no code when they are read.

A checkpoint is `output_dir/checkpoint-{global_step}`: the LoRA as pipelines load it, a file with the state of the
optimizer, the learning rate and the run (no random generators: every draw is keyed), and a manifest with the size and
the SHA-256 of each file. It is written under another name and renamed when all of it is on the disk.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.families import Family
from pso_utils.families.loading import ModelInfo
from pso_utils.families.lora import checksum, load_lora
from pso_utils.families.lora_export import export_name
from pso_utils.run.accelerator import NothingToDo, at_end, mixed_precision, on_main_process
from pso_utils.run.interruption import Interrupted, signals
from pso_utils.run.optimizer import initialize_grad_scaler
from pso_utils.run.resumption import changed_flags, finished_length, is_longer, recorded_flags
from pso_utils.sources import weight_shapes


logger = logging.getLogger(__name__)  # not accelerate's, which is of no use before there is an accelerator

MANIFEST_NAME = "manifest.json"
STATE_NAME = "training_state.pt"
_OWN_NAMES = (LORA_WEIGHT_NAME_SAFE, STATE_NAME, MANIFEST_NAME)  # the manifest goes last, it tells that all are ours
_PARTIAL_SUFFIX, _REPLACED_SUFFIX = ".partial", ".replaced"


# ---- What a checkpoint holds ----


@dataclass
class TrainingState:
    """What a checkpoint keeps beside LoRA, optimizer and learning rate. Draws are keyed by it, so no generator is."""

    epoch: int = 0  # the next outer epoch
    global_step: int = 0  # optimizer steps done
    tie_epochs: int = 0  # epochs of nothing but ties in a row
    validated_step: int = -1  # the last step at which validation images were drawn
    average: dict | None = None  # --use_ema: that of the LoRA

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        """Raises UserError for a state of other names."""
        if not isinstance(state, dict) or state.keys() != asdict(self).keys():
            raise UserError("the checkpoint is of the other training script, or of another version: pass another one")
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
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} holds no LoRA of this project; resume from another checkpoint") from error
    if stored != (rank, lora_alpha, set(target_modules)):
        raise UserError(
            f"{checkpoint} holds a LoRA of rank {stored[0]}, alpha {stored[1]} on {' '.join(sorted(stored[2]))}, this "
            f"run asks for rank {rank}, alpha {lora_alpha} on {' '.join(sorted(target_modules))}; resume with the "
            "checkpoint's own, or train into another --output_dir"
        )


def read_state(checkpoint) -> dict:
    """The states of `optimizer`, `lr_scheduler`, `scaler` (None without fp16) and `run`, on the CPU. Nothing in the
    file is run: torch reads it as weights alone.

    Raises:
        UserError: the file cannot be read so, or holds something else.
    """
    path = Path(checkpoint, STATE_NAME)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["optimizer"]["state"].values()
        return {name: state[name] for name in ("optimizer", "lr_scheduler", "scaler", "run")}
    except Exception as error:  # on a damaged pickle torch's unpickler raises nearly anything, struct.error included
        raise UserError(
            f"{path} is no state that a run of this version wrote ({type(error).__name__}): resume from another"
            " checkpoint"
        ) from error


def check_checkpoint_optimizer(checkpoint, *, use_8bit_adam: bool, mixed_precision: str) -> None:
    """Raises UserError unless the checkpoint's optimizer state is what a run with these flags loads.

    A run in fp16 needs the state of a gradient scaler; one in another precision passes it over.
    """
    state = read_state(checkpoint)
    states = state["optimizer"]["state"]
    eight_bit = not any("exp_avg" in values for values in states.values())  # torch's name for it, not bitsandbytes'
    if states and eight_bit != use_8bit_adam:
        what, remedy = ("an 8-bit", "pass") if eight_bit else ("a 32-bit", "drop")
        raise UserError(f"{checkpoint} holds {what} optimizer's state: {remedy} --use_8bit_adam to resume from it")
    if mixed_precision == "fp16" and state["scaler"] is None:
        raise UserError(
            f"{checkpoint} holds no fp16 run's gradient scale: pass --mixed_precision no or bf16 to resume from it"
        )


# ---- Writing and finding checkpoints ----


class Checkpoints:
    """Writes and reads the checkpoints of a run, all of whose processes call its methods. At most
    --checkpoints_total_limit stand after one was written, and that one always does.

    Args:
        args: the flags, which the manifest records.
        max_train_steps: of the whole run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        state: TrainingState,
        optimizer,
        lr_scheduler,
        *,
        args: argparse.Namespace,
        max_train_steps: int,
    ):
        self.accelerator, self.family, self.state, self.args = accelerator, family, state, args
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.interval = args.checkpointing_steps or min(max(max_train_steps // 10, 1), 500)
        self._saved_at = time.monotonic()
        self._first_step = 0  # of this process
        self._kept_step: int | None = None
        self._kept: tuple[list[Tensor], io.BytesIO] | None = None  # LoRA and states at that step
        # once, and by the process that writes: it reads what the flags name
        self._recorded = recorded_flags(args) if accelerator.is_main_process else None

    def is_due(self, first_step: int) -> bool:
        """Whether one is due, by the steps since `first_step` or by the main process's clock."""
        by_clock = time.monotonic() - self._saved_at >= 60 * self.args.checkpointing_minutes
        by_clock = torch.tensor(float(by_clock and self.accelerator.is_main_process), device=self.accelerator.device)
        by_steps = self.state.global_step // self.interval > first_step // self.interval
        return by_steps or bool(self.accelerator.reduce(by_clock, "sum") > 0)

    def save(self) -> Path:
        """Writes `output_dir/checkpoint-{global_step}`, all or nothing.

        Raises:
            UserError: it cannot be written, or the LoRA is not finite or not the same on all processes; the checkpoints
                before it stand as they did.
        """
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            self._check_processes_agree()
            on_main_process(self.accelerator, lambda: self._write(checkpoint))
        except UserError as error:
            raise UserError(
                f"{checkpoint} is not written: {str(error).rstrip('.')}; {latest_line(self.args.output_dir)}"
            ) from error
        self._saved_at = time.monotonic()
        return checkpoint

    def _check_processes_agree(self):
        if self.accelerator.num_processes == 1:
            return
        own = torch.tensor([checksum(self.family.denoiser)], device=self.accelerator.device)
        if len(self.accelerator.gather(own).unique()) > 1:
            raise UserError("the LoRA is not the same on all processes: run on GPUs of one kind")

    def keep(self):
        """Copies LoRA, optimizer and state to the CPU, on every process, for a checkpoint is of what they agree on:
        what a signal writes from now on. For a loop whose state is complete now, and then not for many steps."""
        self._kept_step, states = self.state.global_step, io.BytesIO()
        torch.save(self._states(), states)
        self._kept = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()], states

    def stop_if_interrupted(self):
        """Ends the run, with a checkpoint of what was kept or else of now, if a signal has come to any process. All
        processes call it where they are at the same step.

        Raises:
            Interrupted: says which checkpoint.
            UserError: as `save`.
        """
        number = signals.agreed(self.accelerator)
        if number == 0:
            return
        step = self.state.global_step if self._kept_step is None else self._kept_step
        if step == 0:
            raise Interrupted(number, ": nothing is learnt yet")
        if self._kept is not None:
            parameters, states = self._kept
            with torch.no_grad():
                for parameter, kept in zip(self._parameters(), parameters):
                    parameter.copy_(kept)
            states.seek(0)
            self._load_states(torch.load(states, map_location="cpu", weights_only=True))
        outcome = f": {self.save()} is written, go on from it by --resume_from_checkpoint latest"
        self.accelerator.end_training()
        raise Interrupted(number, outcome)

    def _parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.family.denoiser.parameters() if parameter.requires_grad]

    def _states(self) -> dict:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "run": self.state.state_dict(),
        }

    def _load_states(self, states: dict):
        self.state.load_state_dict(states["run"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.lr_scheduler.load_state_dict(states["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(states["scaler"])

    def _write(self, checkpoint: Path):
        """All or nothing, on the main process."""
        partial = checkpoint.with_name(checkpoint.name + _PARTIAL_SUFFIX)
        replaced = checkpoint.with_name(checkpoint.name + _REPLACED_SUFFIX)
        shutil.rmtree(partial, ignore_errors=True)
        _remove_own_files(replaced)
        try:
            self._write_files(partial)
        except RuntimeError as error:  # torch.save's, for a full disk
            raise UserError(f"{first_line(error)}; make room there") from error
        if checkpoint.exists():  # of a run before this one, or damaged
            os.replace(checkpoint, replaced)
        os.replace(partial, checkpoint)
        _sync(checkpoint.parent)
        _rotate(checkpoint, self.args.checkpoints_total_limit)

    def _write_files(self, folder: Path):
        folder.mkdir(parents=True)
        state, lora = folder / STATE_NAME, folder / LORA_WEIGHT_NAME_SAFE
        # a file is hashed and synced at the same time, the first, which is the larger one, while the second is written
        with ThreadPoolExecutor() as pool:
            torch.save(self._states(), state)
            jobs = [pool.submit(_sha256, state), pool.submit(_sync, state)]
            self.family.save_lora(folder)
            jobs += [pool.submit(_sha256, lora), pool.submit(_sync, lora)]
        state_hash, _, lora_hash, _ = (job.result() for job in jobs)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": digest}
            for path, digest in ((state, state_hash), (lora, lora_hash))
        }
        # which of two was written later does not depend on the clock
        counter = 1 + max((_counter(path) for path in _checkpoints(self.args.output_dir)), default=0)
        manifest = {"global_step": self.state.global_step, "counter": counter, "files": files}
        manifest |= self._recorded
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))
        _sync(folder / MANIFEST_NAME)
        _sync(folder)

    def load(self, checkpoint: Path | None):
        """Goes on from a checkpoint; None: a new run.

        Raises:
            UserError: it does not fit.
        """
        if checkpoint is not None:
            if self.accelerator.is_main_process:
                logger.info(f"resuming from {checkpoint}")
                for line in changed_flags(self._recorded, _manifest(checkpoint), checkpoint):
                    logger.info(line)
            config = self.family.denoiser.peft_config["default"]
            settings = {"lora_alpha": config.lora_alpha, "target_modules": config.target_modules}
            check_checkpoint_lora(checkpoint, self.family.denoiser_name, rank=config.r, **settings)
            states = read_state(checkpoint)
            load_lora(self.family.denoiser, self.family.denoiser_name, checkpoint)
            try:
                self._load_states(states)
            except UserError:
                raise
            except Exception as error:  # torch's, of any kind, for a state that somebody made up
                raise UserError(
                    f"{checkpoint} holds no state of this optimizer ({first_line(error)}); resume from another one"
                ) from error
        initialize_grad_scaler(self.accelerator)
        self._first_step = self.state.global_step
        at_end.push(self._rescue)

    def _rescue(self, kind, error: BaseException | None, traceback):
        """Writes the LoRA, if it is finite, where an exception ends the run: to output_dir, or else to the temporary
        folder. For an error of one process, which the others wait for, that one writes."""
        has_learnt = self.state.global_step > self._first_step
        is_ours = self.accelerator.is_main_process or not isinstance(error, UserError)  # those are raised by all
        if not (isinstance(error, Exception) and has_learnt and is_ours):
            return
        problems = []
        for make_folder in (lambda: self.args.output_dir, lambda: tempfile.mkdtemp(prefix="pso-lora-")):
            try:
                folder = make_folder()
                self.family.save_lora(folder)
            except Exception as problem:  # of any kind: the run's own error is what is to be seen
                problems.append(first_line(problem))
            else:
                logger.warning(f"an error ends the run; its LoRA of step {self.state.global_step} is in {folder}")
                return
        logger.warning(f"an error ends the run, and its LoRA is not saved: {'; '.join(problems)}")


def _sync(path: Path):
    """Waits until a file, or a folder's list of files, is on the disk: a rename may otherwise outlive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    for leftover in newest.parent.glob("checkpoint-*"):  # of a run that was killed while it wrote
        if re.fullmatch(rf"checkpoint-\d+({_PARTIAL_SUFFIX}|{_REPLACED_SUFFIX})", leftover.name) and leftover.is_dir():
            _remove_own_files(leftover)
    if total_limit is not None:
        # damaged ones go first, then the oldest
        others = [path for path in _checkpoints(newest.parent) if path != newest and _is_own(path)]
        others.sort(key=lambda path: (_damage(path, is_quick=True) is None, _counter(path), _step(path)))
        for path in others[: max(len(others) + 1 - total_limit, 0)]:
            _remove_own_files(path)


def _is_own(checkpoint: Path) -> bool:
    """Whether this project wrote it, damaged or not; another trainer's has the same name, and a LoRA."""
    return not checkpoint.is_symlink() and any((checkpoint / name).is_file() for name in (MANIFEST_NAME, STATE_NAME))


def _remove_own_files(folder: Path) -> None:
    """Removes the folder with what a checkpoint consists of; with anything else in it, it stays with that."""
    for name in _OWN_NAMES if _is_own(folder) else ():
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def _counter(checkpoint: Path) -> int:
    return (_manifest(checkpoint) or {}).get("counter", 0)


def _manifest(checkpoint: Path) -> dict | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        is_ours = all(
            isinstance(file, dict) and {"size", "sha256"} <= file.keys() for file in manifest["files"].values()
        )
        is_ours = is_ours and {STATE_NAME, LORA_WEIGHT_NAME_SAFE} <= manifest["files"].keys()
        is_ours = is_ours and isinstance(manifest["counter"], int)
        return manifest if is_ours and manifest["flags"].keys() and manifest["content"].keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def flags_of_run(folder) -> dict | None:
    """The flags of the run that wrote the checkpoint `folder`, or the newest one in it; None where there is none."""
    manifests = [_manifest(path) for path in (Path(folder), *_checkpoints(folder))]
    newest = max(filter(None, manifests), key=lambda manifest: manifest["counter"], default=None)
    return newest and newest["flags"]


def _damage(checkpoint: Path, *, is_quick: bool = False) -> str | None:
    """What is wrong with a checkpoint; None if it is whole. With `is_quick`, only files that were changed after the
    manifest was written are hashed."""
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing, damaged or of another version"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['size']}"
        is_untouched = path.stat().st_mtime_ns <= (checkpoint / MANIFEST_NAME).stat().st_mtime_ns
        if not (is_quick and is_untouched) and _sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def latest_line(output_dir) -> str:
    """What there is to go on with, for the end of an error's line."""
    latest = find_checkpoint(output_dir, "latest")
    if latest is None:
        return "there is no checkpoint before it"
    return f"the latest checkpoint is {latest.name}, go on from it by --resume_from_checkpoint latest"


def checkpoint_to_resume(args: argparse.Namespace, info: ModelInfo, lora_targets: Sequence[str]) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, checked against the flags; None for a new run.

    Raises:
        UserError: it is missing, damaged or of another LoRA, optimizer or run, or a new run would write over an earlier
            one's.
        NothingToDo: the run is finished, and these flags ask for no more steps.
    """
    has_result = Path(args.output_dir, LORA_WEIGHT_NAME_SAFE).is_file()
    finished = finished_length(args.output_dir) if has_result else None
    if args.resume_from_checkpoint is not None and finished is not None and not is_longer(args, finished):
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        if checkpoint is not None:
            changed_flags(recorded_flags(args), _manifest(checkpoint), checkpoint)
        raise NothingToDo(
            f"the run in {args.output_dir} is finished, after {finished['global_step']} steps: pass a larger"
            " --max_train_steps to go on with it, or another --output_dir for a new one"
        )
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
        settings = {"rank": args.rank, "lora_alpha": lora_alpha, "target_modules": lora_targets}
        check_checkpoint_lora(checkpoint, info.family.denoiser_name, **settings)
        precision = mixed_precision(args)
        check_checkpoint_optimizer(checkpoint, use_8bit_adam=args.use_8bit_adam, mixed_precision=precision)
        changed_flags(recorded_flags(args), _manifest(checkpoint), checkpoint)  # logged when there is a log
    elif finished is not None:
        raise UserError(
            f"--output_dir {args.output_dir} has the result of a finished run of {finished['global_step']} steps: pass"
            " another one, delete the LoRA and the checkpoints there, or go on from one of these by"
            " --resume_from_checkpoint latest and a larger --max_train_steps"
        )
    elif args.resume_from_checkpoint is None and (
        has_result or any(Path(args.output_dir).glob("checkpoint-*[0-9]/manifest.json"))
    ):
        raise UserError(
            f"--output_dir {args.output_dir} has an earlier run's LoRA or checkpoints: pass another one, delete these,"
            " or go on with that run by --resume_from_checkpoint latest"
        )
    elif (
        checkpoint is None
        and not has_result
        and (export := Path(args.output_dir, export_name(args.output_dir))).exists()
    ):
        raise UserError(
            f"--output_dir {args.output_dir} has a file {export.name}, which the run would write over: move it, or pass"
            " another --output_dir"
        )
    return checkpoint


def find_checkpoint(output_dir, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from: "latest", or a name in `output_dir`, or a path; None to start anew.

    "latest" is the whole checkpoint that was written last. Half-written and damaged ones are passed over with a
    warning; if there is no whole one the answer is None.

    Raises:
        UserError: the checkpoint that was named does not exist or is not whole.
    """
    if resume_from_checkpoint is None:
        return None
    checkpoints = _checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        # written last, not the highest step: a run that was taken up at an earlier step leaves later ones behind
        for path in sorted(checkpoints, key=lambda path: (_counter(path) or math.inf, _step(path)), reverse=True):
            damage = _damage(path)
            if damage is None:
                try:  # whoever plants a file may write a manifest to it
                    read_state(path)
                    weight_shapes(str(path / LORA_WEIGHT_NAME_SAFE))
                    return path
                except UserError as error:
                    damage = str(error)
            logger.warning(f"{path} is not whole ({damage}); it is passed over")
        return None
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
        raise UserError(f'--resume_from_checkpoint: {path} is not whole ({damage}); pass another one or "latest"')
    return path
