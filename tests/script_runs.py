"""What the tests of the two training scripts share: running one, killing it at an event, reading what it wrote."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


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


def assert_same_weights(folder: Path, other: Path):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_same_run(folder: Path, other: Path):
    """Bit for bit the same weights, and the same values at every step."""
    assert_same_weights(folder, other)
    assert metrics(folder) == metrics(other)


def assert_nearly_same_run(folder: Path, other: Path):
    """Within 1e-3 of the metrics and 2% of the weights' distance from zero, for runs that differ in rounding."""
    assert len(metrics(folder)) == len(metrics(other))
    for ours, theirs in zip(metrics(folder), metrics(other)):
        assert {name: abs(ours[name] - theirs[name]) <= 1e-3 + 1e-3 * abs(ours[name]) for name in theirs} == {
            name: True for name in ours
        }, (ours, theirs)
    ours, theirs = weights(folder), weights(other)
    assert all((ours[key] - theirs[key]).norm() <= 0.02 * ours[key].norm() for key in ours)


def without_result(folder: Path) -> Path:
    """For a new run in the folder of another one."""
    for name in ("pytorch_lora_weights.safetensors", f"{folder.name}.safetensors"):
        (folder / name).unlink()
    return folder


def error_line(captured: str) -> str:
    """The one line that a script ends with for what the user can mend."""
    (error,) = [line for line in captured.splitlines() if line.startswith("error:")]
    return error


# ---- Interruption ----


class Event(NamedTuple):
    """Where a run is killed: at a call of a library's public function.

    Attributes:
        function: `module:name`, or `module:Class.name`.
        count: at which of the calls that `step` and `path` are true of.
        step: only calls after metrics.jsonl has this optimizer step.
        path: only calls in whose arguments this text is.
        is_over: kill when the call has returned instead of before it.
    """

    function: str
    count: int = 1
    step: int = 0
    path: str = ""
    is_over: bool = False


# Runs in a process of its own, which forks one for each run: the libraries are imported once.
KILLED_RUNS = """
import json, os, signal, sys
from importlib import import_module
from pathlib import Path
import torch
torch.set_num_threads(1)

script, flags, folder = import_module(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
events = json.loads(sys.argv[4])

def kill_at(output_dir, function, count, step, path, is_over):
    module, names = function.split(":")
    *owners, name = names.split(".")
    owner = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    plain, calls, metrics = getattr(owner, name), [], Path(output_dir, "metrics.jsonl")

    def is_logged() -> bool:
        lines = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else []
        return any(line["step"] == step and "loss" in line for line in lines)

    def call(*args, **kwargs):
        if (step == 0 or is_logged()) and path in repr((args, kwargs)):
            calls.append(1)
        is_last = len(calls) == count
        if is_last and not is_over:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **kwargs)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)

def run(name, event=None, resume=()):
    pid = os.fork()
    if pid == 0:
        output_dir = f"{folder}/{name}"
        if event is not None:
            kill_at(output_dir, *event)
        script.main([*flags, "--output_dir", output_dir, *resume])
        os._exit(0)
    return os.waitpid(pid, 0)[1]

assert run("undisturbed") == 0
for name, event in events.items():
    assert run(name, event) == signal.SIGKILL, name
    assert run(name, resume=["--resume_from_checkpoint", "latest"]) == 0, name
"""


def run_killed_and_resumed(script: str, flags: list[str], folder: Path, events: dict[str, Event]):
    """Runs a script into `folder`/undisturbed, and for each event into `folder`/name with a SIGKILL there and then
    --resume_from_checkpoint latest."""
    subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, script, json.dumps(flags), str(folder), json.dumps(events)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=570,
    )


@contextmanager
def interrupted_at(monkeypatch, picture: str) -> Iterator[None]:
    """Within this, a run is interrupted where it would save the validation's `picture`."""
    save = Image.Image.save

    def interrupt(self, path, **settings):
        if picture in str(path):  # or a file object
            raise KeyboardInterrupt
        save(self, path, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", interrupt)
        yield


def two_processes(script: str, flags: list[str], *, python_path: Sequence[Path] = ()):
    """Runs a script on two CPU processes, for which accelerate wants to be told of --multi_gpu."""
    path = os.pathsep.join(map(str, [ROOT, *python_path]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [*command, str(ROOT / script), *flags],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


# Runs in a process of its own, which forks those of each run: the libraries are imported once.
LEARNT_RUNS = """
import json, os, socket, sys
from importlib import import_module
import torch
torch.set_num_threads(1)

from pso_utils.families import Family

script, runs = import_module(sys.argv[1]), json.loads(sys.argv[2])
add_lora = Family.add_lora

def add_learnt_lora(family, **settings):
    parameters, generator = add_lora(family, **settings), torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return parameters

Family.add_lora = add_learnt_lora
for flags, num_processes in runs:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(num_processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            if num_processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            script.main(flags)
            os._exit(0)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * num_processes
"""


def run_with_a_learnt_lora(script: str, runs: list[tuple[list[str], int]]):
    """Runs a script with each (flags, number of processes), from a LoRA that differs from the base from the start."""
    subprocess.run(
        [sys.executable, "-c", LEARNT_RUNS, script, json.dumps(runs)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


# ---- What a microbatch costs ----


def watch_moves(module: torch.nn.Module, name: str, moves: list[tuple[str, str]]):
    """Lists every move of `module` as (name, device). It starts on the meta device, as if that were the CPU beside an
    accelerator: there it cannot run, and moving it to the CPU brings its weights."""
    tensors = {part: (dict(part._parameters), dict(part._buffers)) for part in module.modules()}
    plain_to = module.to

    def to(device):
        moves.append((name, torch.device(device).type))
        if moves[-1][1] == "meta":
            return plain_to("meta")
        for part, (parameters, buffers) in tensors.items():
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        return module

    module.to = to
    plain_to("meta")


class HostSynchronizations(TorchDispatchMode):
    """Lists what makes the host wait for the accelerator, or copies from it or to it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.num_operations = 0
        self.functions = _DeviceMoves(self.found)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_operations += 1
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "masked_select", "unique"):
            self.found.append(str(function))
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            devices = {value.device for value in (*args, result) if isinstance(value, torch.Tensor)}
            if len(devices) > 1:
                self.found.append(f"{function} {devices}")
        return result

    def __enter__(self):
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.functions.__exit__(*exception)


class _DeviceMoves(TorchFunctionMode):
    """Where everything is on the CPU, a move to a device is no operation: this sees the call."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        targets = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, torch.device | str)]
        if name in ("cpu", "cuda", "numpy", "tolist", "item", "from_numpy", "as_tensor", "tensor", "__bool__"):
            self.found.append(name)
        if name == "to" and targets:
            self.found.append(f"to {targets[0]}")
        return function(*args, **kwargs)


class Interval(NamedTuple):
    """What runs between two backward calls: the project's own functions, `file:name`, and whether an optimizer step
    does. `functions` are those apart from data loading: `data_loading` is what stands in pso_utils/data, which reads
    records, their images or latents, and their prompts, and makes pairs of them; and what that calls."""

    functions: set[str]
    data_loading: set[str]
    has_step: bool


@contextmanager
def between_backward_calls(monkeypatch) -> Iterator[list[Interval]]:
    """Lists what runs between consecutive backward calls. Comprehensions, lambdas and generator expressions are part of
    the function that they stand in."""
    intervals: list[Interval] = []
    codes, data_codes, is_running, has_step = set(), set(), False, False
    data = str(ROOT / "pso_utils" / "data")

    def is_data_loading(frame) -> bool:
        while frame is not None and not frame.f_code.co_filename.startswith(data):
            frame = frame.f_back
        return frame is not None

    def trace(frame, event, argument):
        if event == "call" and is_running and frame.f_code not in codes:
            (data_codes if is_data_loading(frame) else codes).add(frame.f_code)

    def names(codes: set) -> Iterator[str]:
        for code in codes:
            path = Path(code.co_filename)
            if path.is_relative_to(ROOT) and not code.co_name.startswith("<"):
                path = path.relative_to(ROOT)
                if path.parts[0] == "pso_utils" or len(path.parts) == 1:
                    yield f"{path}:{code.co_qualname}:{code.co_firstlineno}"

    plain_backward, plain_clip = Accelerator.backward, Accelerator.clip_grad_norm_

    def backward(*args, **kwargs):
        nonlocal codes, data_codes, is_running, has_step
        was_running, is_running = is_running, False
        if was_running:
            intervals.append(Interval(set(names(codes)), set(names(data_codes)), has_step))
        plain_backward(*args, **kwargs)
        codes, data_codes, is_running, has_step = set(), set(), True, False

    def clip(*args, **kwargs):
        nonlocal has_step
        has_step = True
        return plain_clip(*args, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    sys.setprofile(trace)
    try:
        yield intervals
    finally:
        sys.setprofile(None)


def readme_flags(mark: str) -> list[str]:
    """The script's flags in the README's command behind `<!-- mark -->`."""
    command = (ROOT / "README.md").read_text().split(f"<!-- {mark} -->")[1].split("```")[1].replace("\\\n", " ")
    return shlex.split(re.split(r"train_pso_\w+\.py", command)[1])


@contextmanager
def around_microbatches(monkeypatch, script, make_context) -> Iterator[None]:
    """Runs each minibatch's microbatches, from `zero_grad` to `reduce_gradients`, in a context of their own."""
    zero, reduce, contexts = AcceleratedOptimizer.zero_grad, script.reduce_gradients, []

    def enter(*args, **kwargs):
        zero(*args, **kwargs)
        contexts.append(make_context())
        contexts[-1].__enter__()

    def leave(*args):
        contexts[-1].__exit__(None, None, None)
        return reduce(*args)

    with monkeypatch.context() as patch:
        patch.setattr(AcceleratedOptimizer, "zero_grad", enter)
        patch.setattr(script, "reduce_gradients", leave)
        yield
    assert contexts


@contextmanager
def cuda_synchronizations_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
