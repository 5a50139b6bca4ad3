"""Devices, processes and precision; how a program ends."""

import contextlib
import logging
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from tqdm.auto import tqdm

from pso_utils.errors import UserError, first_line
from pso_utils.run.interruption import Interrupted, is_first_process, signals
from pso_utils.run.lock import locked


WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REWARD_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# How long a process waits for another one in a collective call: NCCL's own default, also for gloo, whose 30 minutes of
# silence would help nobody. Encoding to a cache and an evaluation may keep one process busy longer than the others.
PROCESS_TIMEOUT = timedelta(minutes=10)

at_end = contextlib.ExitStack()  # what is left to do when the running program ends, well or not


class NothingToDo(Exception):
    """What was asked for is there. Its message is one line."""


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Ends the program with `error: ...` on one line and exit code 2 for what the user can mend: a `UserError`, or the
    accelerator out of memory; with a line and 143 or 130 for a signal, and 0 where there is nothing to do. Every other
    exception keeps its traceback. `script` is the running program's file."""
    try:
        with signals.handled(), at_end:
            yield
    except NothingToDo as error:
        if is_first_process():
            _print(str(error))
    except Interrupted as error:
        if is_first_process():
            _print(str(error))
        raise SystemExit(error.exit_code) from error
    except UserError as error:
        _end(error, str(error))
    except torch.OutOfMemoryError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = [
            frame.f_code.co_name
            for frame in frames
            if frame.f_globals.get("__name__", "").startswith("pso_utils") or frame.f_code.co_filename == script
        ]
        _end(
            error,
            f"out of memory in {ours[-1] if ours else 'a library'}: make the batch sizes smaller, or pass"
            " --gradient_checkpointing, --offload, --enable_vae_tiling, --mixed_precision bf16 or fp16"
            f" ({error})",
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
        if any(module.startswith("torch.distributed") for module in modules):
            _print(
                f"process {os.environ.get('RANK', 0)} waited for another one that has ended, or gave no sign for"
                f" {PROCESS_TIMEOUT.total_seconds() / 60:g} minutes: see its message, and go on with"
                " --resume_from_checkpoint latest"
            )
        raise


def _end(error: BaseException, message: str):
    _print(f"error: {message}")
    raise SystemExit(2) from error


def _print(message: str):
    for bar in sorted(tqdm._instances, key=lambda bar: -abs(bar.pos)):  # tqdm has no public list of its open bars
        bar.close()  # the inner ones first, so that the message has a line of its own
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def mixed_precision(args) -> str:
    """That of --mixed_precision, else of accelerate's configuration."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check_launcher(num_processes: int) -> None:
    """Raises UserError where a launcher started more processes than accelerate sees: each would train alone, as the
    first, into one folder. (SLURM_NTASKS is set in plain sbatch scripts, too, and says nothing.)"""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        started = int(os.environ.get(name) or 1)
        if started > num_processes:
            raise UserError(
                f"{name} says that {started} processes run, but accelerate sees {num_processes}: start them by"
                " `accelerate launch` (on CPUs with ACCELERATE_USE_CPU=1 and --multi_gpu), or one alone"
            )
    if num_processes == 1 and int(os.environ.get("SLURM_PROCID") or 0) > 0:
        raise UserError(
            f"this is SLURM's task {os.environ['SLURM_PROCID']}, and accelerate sees one process: start one task a node"
            " that runs `accelerate launch`"
        )


def on_main_process(accelerator: Accelerator, write: Callable[[], None]) -> None:
    """Calls `write` on the main process; all processes call this, and where it fails all of them stop, or the others
    would wait for the main one in their next collective call.

    Raises:
        UserError: the main process's, or that there was one.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            write()
        except (UserError, OSError) as error:
            problem = error
    has_failed = torch.tensor(float(problem is not None), device=accelerator.device)
    if accelerator.reduce(has_failed, "sum") == 0:
        return
    if isinstance(problem, UserError):
        raise problem
    raise UserError(first_line(problem) if problem else "the main process stopped, see its message") from problem


def check_shared_folder(accelerator: Accelerator, folder: str) -> None:
    """Raises UserError unless all processes see in `folder` what the main one writes there, as references, caches and
    checkpoints need it; all of them call this."""
    if accelerator.num_processes == 1:
        return
    (name,) = broadcast_object_list([f".seen-by-all-{uuid.uuid4().hex}"])  # the main process's
    token = Path(folder, name)
    on_main_process(accelerator, token.touch)
    num_blind = int(accelerator.reduce(torch.tensor(float(not token.exists()), device=accelerator.device), "sum"))
    if accelerator.is_main_process:
        token.unlink(missing_ok=True)
    if num_blind:
        raise UserError(
            f"--output_dir {folder}: {num_blind} of {accelerator.num_processes} processes do not see what the main one"
            " writes there: pass a folder on a file system that all nodes share"
        )


def make_accelerator(args) -> Accelerator:
    """The accelerator, with output folder, logging, seeds and TF32 set up. The folder is this program's to its end.

    Raises:
        UserError: fp16 without a GPU, a distributed set-up other than plain data parallel, a folder that nodes do not
            share, or another run in it.
    """
    precision = mixed_precision(args)
    if precision not in WEIGHT_DTYPES:
        raise UserError(f"mixed precision {precision} is not supported: pass --mixed_precision no, bf16 or fp16")
    for launcher in ["DEEPSPEED", "FSDP", "MEGATRON_LM"]:
        if os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate is configured for {launcher}, which is not supported: run `accelerate config` and choose"
                " one process or multi-GPU without it"
            )
    process_group = InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)
    if precision == "fp16" and PartialState(**process_group.to_kwargs()).device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: on a CPU pass --mixed_precision bf16 or no")
    accelerator = Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[process_group],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    distributed = accelerator.distributed_type.value
    if distributed != "NO" and not distributed.startswith("MULTI_"):
        raise UserError(f"accelerate's {distributed} is not supported: use one process or plain multi-GPU")
    check_launcher(accelerator.num_processes)
    # accelerate would divide the loss by the accumulation steps of its own config; the scripts weigh their own losses.
    accelerator.gradient_accumulation_steps = 1

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    check_shared_folder(accelerator, args.output_dir)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pso_utils").setLevel(logging.INFO)
    if accelerator.is_main_process:
        processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
        logging.getLogger(__name__).info(f"{processes} on {accelerator.device.type}, mixed precision {precision}")
    on_main_process(accelerator, lambda: at_end.enter_context(locked(args.output_dir)))
    if not accelerator.is_local_main_process:
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator
