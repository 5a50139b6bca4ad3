"""What the tests of the two training scripts share: running one, and reading what it wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"images_per_second"}


def to_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_run(folder: Path, other: Path):
    """Bit for bit the same weights, and the same values at every step."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(folder) == metrics(other)


# Runs in a process of its own, which forks one for each run: the libraries are imported once.
KILLED_RUNS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from importlib import import_module

module, flags, folder = import_module(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
places = json.loads(sys.argv[4])  # name -> (module, function, at which of its calls)

def kill_at(owner, name, count):
    function, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, call)

def run(name, place=None, resume=()):
    pid = os.fork()
    if pid == 0:
        if place is not None:
            owner, function, count = places[place]
            kill_at(import_module(owner), function, count)
        module.main([*flags, "--output_dir", f"{folder}/{name}", *resume])
        os._exit(0)
    return os.waitpid(pid, 0)[1]

assert run("none") == 0
for place in places:
    assert run(place, place) == signal.SIGKILL, place
    assert run(place, resume=["--resume_from_checkpoint", "latest"]) == 0, place
"""


def run_killed_and_resumed(script: str, flags: list[str], folder: Path, places: dict[str, tuple[str, str, int]]):
    """Runs a script uninterrupted into `folder`/none, and for each place into `folder`/place with a SIGKILL there and
    then --resume_from_checkpoint latest. A place is (module, function, at which of its calls)."""
    subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, script, json.dumps(flags), str(folder), json.dumps(places)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=570,
    )


def two_processes(script: str, flags: list[str]):
    """Runs a script on two CPU processes, for which accelerate wants to be told of --multi_gpu."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [*command, str(ROOT / script), *flags],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
