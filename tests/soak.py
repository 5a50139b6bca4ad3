"""Ends runs at random moments, damages checkpoints, fills the disk; each run is then resumed and held against an
undisturbed one, bit for bit. `python -m tests.soak --seed 0` prints a line for each; it ends with 1 if one failed.

The libraries are imported once: each process of a run is a fork of this one.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.evaluate import __main__ as evaluate
from pso_utils.run import accelerator
from pso_utils.run.checkpoints import find_checkpoint
from tests.conftest import CAPTIONS, build_pipeline
from tests.script_runs import assert_same_run, metrics, to_flags


EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
INTERVAL = 3  # steps between two checkpoints
PATIENCE = 300.0  # seconds for a run


# ---- Runs ----


class Program(NamedTuple):
    name: str
    main: Callable[[list[str]], None]
    flags: dict
    num_processes: int
    undisturbed: Path


def make_programs(folder: Path) -> list[Program]:
    """Both scripts and the evaluation, by one process and by two."""
    build_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    (folder / "images").mkdir()
    for index in range(len(CAPTIONS)):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[:, 5 * index : 5 * index + 5] = (200, 20, 20)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": text}) for index, text in enumerate(CAPTIONS)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    prompts = {"prompts": folder / "prompts.txt", "reward": "jpeg_compressibility"}
    model = {"pretrained_model_name_or_path": folder / "model", "resolution": 32}
    training = {"rank": 4, "learning_rate": 1e-2, "lr_scheduler": "cosine", "report_to": "none", "max_train_steps": 9}
    training |= {"checkpointing_steps": INTERVAL, "validation_steps": 4, "num_validation_images": 1}
    training |= {"validation_prompts": CAPTIONS[:1]}
    programs = {
        "online": (train_pso_online.main, model | prompts | training | {"sample_batches_per_epoch": 2}),
        "offline": (
            train_pso_lora_sdxl.main,
            model | training | {"task": "style", "train_data_dir": folder / "images", "train_batch_size": 1}
            | {"cache_latents": True, "center_crop": True, "reference_policy": "current", "reference_refresh_steps": 4},
        ),
        "evaluate": (
            evaluate.main,
            model | prompts | {"lora": f"a={folder / 'online-1'}", "num_inference_steps": 2, "batch_size": 2},
        ),
    }  # fmt: skip
    # by two processes, online has the other objective, and an average
    changes = {("online", 2): {"objective": "denoising", "num_inner_epochs": 2, "use_ema": True}}
    return [
        Program(
            name,
            main,
            values | changes.get((name, num_processes), {}),
            num_processes,
            folder / f"{name}-{num_processes}",
        )
        for num_processes in (1, 2)
        for name, (main, values) in programs.items()
    ]


class Run:
    """The processes of a program that runs, each a fork; their output is in the file `log`."""

    def __init__(self, program: Program, output_dir: Path, *more: str, is_slow: bool = False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.program, self.output_dir, self.log = program, output_dir, output_dir.with_suffix(".log")
        self.started = time.monotonic()
        self.pids, self.codes = [], {}
        for rank in range(program.num_processes):
            pid = os.fork()
            if pid == 0:
                self._become(rank, port, *more, is_slow=is_slow)
            self.pids.append(pid)

    def _become(self, rank: int, port: int, *more: str, is_slow: bool):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this program is in the background
        tqdm.set_lock(threading.RLock())  # its own is shared by forks, and one that is killed may hold it
        os.environ["ACCELERATE_USE_CPU"] = "1"
        if self.program.num_processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
        # a pipe to a writer of its own: a full disk lets nothing be written to a file
        log = os.popen(f"cat >> '{self.log}'", "w")
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        if is_slow:  # so that a checkpoint takes long enough to be met
            fsync = os.fsync
            os.fsync = lambda handle: (time.sleep(0.05), fsync(handle))
        code = 1
        try:
            self.program.main([*to_flags(self.program.flags), "--output_dir", str(self.output_dir), *more])
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Whether all processes have ended; one that waits for ever is an error."""
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.started > PATIENCE:
            self.signal(signal.SIGKILL, self.pids)
            raise AssertionError("a process waits for ever")
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = math.inf, until: Callable[[], bool] = lambda: False):
        """Returns when all have ended, after some seconds, or when `until` is true."""
        moment = time.monotonic() + seconds
        while not (self.poll() or time.monotonic() > moment or until()):
            time.sleep(0.005)

    def signal(self, number: int, pids: list[int]):
        for pid in set(pids) - self.codes.keys():
            os.kill(pid, number)


def complete(program: Program, output_dir: Path):
    """Runs a program to its end, going on with what is there."""
    resume = () if program.name == "evaluate" else ("--resume_from_checkpoint", "latest")
    run = Run(program, output_dir, *resume)
    run.wait()
    assert set(run.codes.values()) == {0}, run.codes


def assert_same(program: Program, output_dir: Path):
    if program.name != "evaluate":
        return assert_same_run(output_dir, program.undisturbed)
    ours, theirs = ({path.relative_to(folder): np.asarray(Image.open(path)) for path in folder.rglob("images/**/*.png")}
                    for folder in (output_dir, program.undisturbed))  # fmt: skip
    assert len(ours) == 2 * len(CAPTIONS) and ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    scores = [[row["scores"] for row in json.loads((folder / "results.json").read_text())["rows"]]
              for folder in (output_dir, program.undisturbed)]  # fmt: skip
    assert scores[0] == scores[1]


# ---- Trials: each prepares `output_dir` and returns what it did; then the run is completed and compared ----


def undisturbed_seconds(program: Program) -> float:
    if not program.undisturbed.exists():
        start = time.monotonic()
        complete(program, program.undisturbed)
        (program.undisturbed / "seconds").write_text(str(time.monotonic() - start))
    return float((program.undisturbed / "seconds").read_text())


def kill(program: Program, output_dir: Path, rng: random.Random, *, at_checkpoint: bool) -> str:
    number = rng.choice(list(EXIT_CODES))
    run = Run(program, output_dir, is_slow=at_checkpoint)
    if at_checkpoint:
        count = rng.randint(1, 2)  # which of them
        for earlier in reversed(range(count)):
            run.wait(until=lambda: any(output_dir.glob("checkpoint-*.partial")))
            run.wait(math.inf if earlier else rng.uniform(0, 0.25), lambda: not any(output_dir.glob("*.partial")))
        where = f"while checkpoint {count} was written"
    else:
        moment = rng.uniform(0, undisturbed_seconds(program))
        run.wait(moment)
        where = f"after {moment:.2f} s"
    step = last_step(output_dir)
    # a batch system signals all processes; a fault kills one
    pids = run.pids if number != signal.SIGKILL else rng.sample(run.pids, rng.randint(1, len(run.pids)))
    if run.poll():  # too late, on a machine that is busy now and then
        shutil.rmtree(output_dir)
        return kill(program, output_dir, rng, at_checkpoint=at_checkpoint)
    alive = set(pids) - run.codes.keys()
    run.signal(number, pids)
    run.wait()
    assert all(run.codes[pid] == EXIT_CODES[number] for pid in alive), run.codes
    line = f"{number.name} to {len(pids)} of {len(run.pids)} {where}, exit codes {[*run.codes.values()]}"
    return line if program.name == "evaluate" else f"{line}, at step {step}, {lost_steps(output_dir)} steps lost"


def stall(program: Program, output_dir: Path, rng: random.Random) -> str:
    """One of two processes stops without an end; the other one gives it up."""
    run = Run(program, output_dir)
    run.wait(until=lambda: last_step(output_dir) > 4)
    stopped, other = rng.sample(run.pids, 2)
    run.signal(signal.SIGSTOP, [stopped])
    run.wait(until=lambda: other in run.codes)
    run.signal(signal.SIGKILL, [stopped])
    run.wait()
    assert run.codes[other] == 1 and "waited for another one" in run.log.read_text(), run.codes
    return f"SIGSTOP to 1 of 2, {lost_steps(output_dir)} steps lost"


def corrupt(program: Program, output_dir: Path, rng: random.Random) -> str:
    """Damages a file of the newest checkpoint of a run that did not finish."""
    undisturbed_seconds(program)
    shutil.copytree(program.undisturbed, output_dir)
    for name in ("finished.json", "pytorch_lora_weights.safetensors"):
        (output_dir / name).unlink()
    checkpoint = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    path = rng.choice(sorted(checkpoint.iterdir()))
    content = bytearray(path.read_bytes())
    damage = rng.choice(["a bit flipped", "cut off", "zeros", "gone"])
    if damage == "a bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "cut off":
        del content[rng.randrange(len(content)) :]
    elif damage == "zeros":
        content = bytes(len(content))
    path.unlink()
    if damage != "gone":
        path.write_bytes(content)
    return f"{checkpoint.name}/{path.name}: {damage}"


def fill_disk(program: Program, output_dir: Path, rng: random.Random) -> str:
    """From a moment on no byte can be written to any file."""
    run = Run(program, output_dir)
    moment = rng.uniform(0, undisturbed_seconds(program))
    run.wait(moment)
    if run.poll():
        shutil.rmtree(output_dir)
        return fill_disk(program, output_dir, rng)
    for pid in set(run.pids) - run.codes.keys():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    run.wait()
    return f"full after {moment:.2f} s, {lost_steps(output_dir)} steps lost, exit codes {[*run.codes.values()]}"


def last_step(output_dir: Path) -> int:
    lines = metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines), default=0)


def lost_steps(output_dir: Path) -> int:
    """Optimizer steps since the latest checkpoint: at most those between two."""
    if (output_dir / "finished.json").exists():
        return 0
    checkpoint = find_checkpoint(output_dir, "latest")
    lost = last_step(output_dir) - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    assert lost <= INTERVAL + 1, f"{lost} steps since {checkpoint}"  # online one is due within an epoch of two steps
    return lost


# ---- All of them ----


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stalls", type=int, default=2)
    parser.add_argument("--corruptions", type=int, default=10)
    parser.add_argument("--full_disks", type=int, default=10)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    accelerator.PROCESS_TIMEOUT = timedelta(seconds=20)
    rng, failures = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="pso-soak-") as folder:
        programs = make_programs(Path(folder))
        undisturbed_seconds(programs[0])  # its LoRA is the evaluation's
        training = [program for program in programs if program.name != "evaluate"]
        at_checkpoint = round(0.3 * args.kills)
        trials = [(training[n % 4], kill, {"at_checkpoint": True}) for n in range(at_checkpoint)]
        trials += [(programs[n % 6], kill, {"at_checkpoint": False}) for n in range(1, args.kills - at_checkpoint + 1)]
        trials += [(training[2 + n % 2], stall, {}) for n in range(args.stalls)]
        trials += [(training[n % 4], corrupt, {}) for n in range(args.corruptions)]
        trials += [(training[n % 4], fill_disk, {}) for n in range(args.full_disks)]
        for number, (program, trial, options) in enumerate(trials):
            output_dir = Path(folder, f"trial-{number}")
            line = f"{number:2d} {program.name}, {program.num_processes} processes"
            try:
                line += ": " + trial(program, output_dir, rng, **options)
                undisturbed_seconds(program)
                complete(program, output_dir)
                assert_same(program, output_dir)
                line += ": resumed, the same bits"
                shutil.rmtree(output_dir)
            except AssertionError as error:
                failures += 1
                line += f": FAILED, {error}\n" + output_dir.with_suffix(".log").read_text()
            print(line, flush=True)
    print(f"{len(trials) - failures} of {len(trials)} trials ended in the undisturbed run's bits (seed {args.seed})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
