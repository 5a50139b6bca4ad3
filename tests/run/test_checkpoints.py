"""Checkpoints: bit for bit, complete or absent."""

import copy
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler

from pso_utils.errors import UserError
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.sdxl import SDXL
from pso_utils.run.checkpoints import (
    check_checkpoint_lora,
    find_checkpoint,
    register_lora_hooks,
    save_checkpoint,
)
from tests.families.family_inputs import draw


pytestmark = pytest.mark.usefixtures("fresh_state")


class Run:
    """What a training script hands to accelerate: the bare denoiser, its LoRA's optimizer, a learning rate schedule."""

    def __init__(self, pipeline_dir, rank=4, lora_alpha=8, target_modules=("to_q", "to_v"), seed=0, optimizer=None):
        self.accelerator = Accelerator()
        self.family = SDXL(load_pipeline(ModelSource(pipeline_dir)))
        settings = {"rank": rank, "lora_alpha": lora_alpha, "target_modules": target_modules, "seed": seed}
        self.parameters = self.family.add_lora(**settings)
        self.accelerator.prepare_model(self.family.denoiser, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer((optimizer or torch.optim.AdamW)(self.parameters, lr=1e-2))
        self.lr_scheduler = self.accelerator.prepare_scheduler(
            get_scheduler("linear", self.optimizer, num_warmup_steps=0, num_training_steps=100)
        )
        register_lora_hooks(self.accelerator, self.family)

    def step(self):
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape)
        self.optimizer.step()
        self.lr_scheduler.step()

    def state(self):
        return copy.deepcopy(
            [
                self.parameters,
                self.optimizer.state_dict()["state"],
                self.lr_scheduler.state_dict(),
                torch.get_rng_state(),
            ]
        )


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.fixture(scope="module")
def saved(tiny_pipeline_dir, tmp_path_factory):
    """An output_dir with checkpoints at steps 2 and 4, and the state of the run at each."""
    output_dir = tmp_path_factory.mktemp("run")
    run, states = Run(tiny_pipeline_dir), {}
    for step in range(1, 5):
        run.step()
        if step % 2 == 0:
            assert save_checkpoint(run.accelerator, output_dir, step) == output_dir / f"checkpoint-{step}"
            states[step] = run.state()
    return output_dir, states


@pytest.fixture
def output_dir(saved, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_resumed_run_continues_bit_for_bit(tiny_pipeline_dir, saved):
    output_dir, states = saved
    run = Run(tiny_pipeline_dir, seed=1)
    run.accelerator.load_state(str(find_checkpoint(output_dir, "checkpoint-2")))
    assert_equal(run.state(), states[2])
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    assert all(parameter.requires_grad for parameter in run.parameters)
    for _ in range(2):
        run.step()
    assert_equal(run.state(), states[4])


def test_checkpoint_holds_the_lora_as_pipelines_load_it_and_not_the_denoiser(tiny_pipeline_dir, saved):
    checkpoint = find_checkpoint(saved[0], "latest")
    assert {path.name for path in checkpoint.iterdir()} == {
        "manifest.json",
        "optimizer.bin",
        "pytorch_lora_weights.safetensors",
        "random_states_0.pkl",
        "scheduler.bin",
    }
    run = Run(tiny_pipeline_dir)
    run.accelerator.load_state(str(checkpoint))
    fresh = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir, add_watermarker=False)
    fresh.load_lora_weights(str(checkpoint))
    assert np.array_equal(draw(fresh), draw(run.family.pipeline))


def test_eight_bit_optimizer_state_survives(tiny_pipeline_dir, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"rank": 64, "lora_alpha": 64, "optimizer": bitsandbytes.optim.AdamW8bit}
    run = Run(tiny_pipeline_dir, **options)
    run.step()
    save_checkpoint(run.accelerator, tmp_path, 1)
    state = run.state()
    assert any(values["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for values in state[1].values())
    resumed = Run(tiny_pipeline_dir, seed=1, **options)
    resumed.accelerator.load_state(str(find_checkpoint(tmp_path, "latest")))
    assert_equal(resumed.state(), state)
    for each in (run, resumed):
        torch.manual_seed(0)
        each.step()
    assert_equal(resumed.state(), run.state())


@pytest.mark.parametrize("options", [{"rank": 2}, {"lora_alpha": 4}, {"target_modules": ("to_q", "to_k")}])
def test_checkpoint_of_another_lora_is_refused_before_anything_changes(tiny_pipeline_dir, saved, options):
    checkpoint = find_checkpoint(saved[0], "latest")
    run = Run(tiny_pipeline_dir, **options)
    before = run.state()
    with pytest.raises(UserError, match="holds a LoRA of rank 4, alpha 8 on to_q to_v, this run asks for") as error:
        run.accelerator.load_state(str(checkpoint))
    assert "\n" not in str(error.value)
    assert_equal(run.state(), before)
    asked = {"rank": 4, "lora_alpha": 8, "target_modules": ["to_v", "to_q"]}
    check_checkpoint_lora(checkpoint, "unet", **asked)
    with pytest.raises(UserError, match="this run asks for"):
        check_checkpoint_lora(checkpoint, "unet", **{**asked, **options})


def test_newest_checkpoint_is_found(saved):
    output_dir, _ = saved
    assert find_checkpoint(output_dir, None) is None
    assert find_checkpoint(output_dir / "nowhere", "latest") is None
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    assert find_checkpoint(output_dir, "checkpoint-2").name == "checkpoint-2"
    assert find_checkpoint("elsewhere", str(output_dir / "checkpoint-2")) == output_dir / "checkpoint-2"
    with pytest.raises(UserError, match="has: checkpoint-2, checkpoint-4"):
        find_checkpoint(output_dir, "checkpoint-3")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: (checkpoint / "optimizer.bin").unlink(),
        lambda checkpoint: truncate(checkpoint / "pytorch_lora_weights.safetensors"),
        lambda checkpoint: (checkpoint / "manifest.json").unlink(),
        lambda checkpoint: truncate(checkpoint / "manifest.json"),
    ],
)
def test_half_written_newest_checkpoint_is_passed_over_with_a_warning(output_dir, spoil, caplog):
    spoil(output_dir / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(output_dir, "latest").name == "checkpoint-2"
    assert "checkpoint-4 is incomplete" in caplog.text
    with pytest.raises(UserError, match="checkpoint-4 is incomplete"):
        find_checkpoint(output_dir, "checkpoint-4")
    spoil(output_dir / "checkpoint-2")
    assert find_checkpoint(output_dir, "latest") is None


def test_a_run_killed_while_it_writes_leaves_no_checkpoint(tiny_pipeline_dir, output_dir, monkeypatch):
    run = Run(tiny_pipeline_dir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        save_checkpoint(run.accelerator, output_dir, 6)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    save_checkpoint(run.accelerator, output_dir, 6)
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("size", [100, 20_000], ids=["the LoRA", "the optimizer"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_as_they_were(tiny_pipeline_dir, output_dir, size):
    run = Run(tiny_pipeline_dir)
    run.step()
    before = names(output_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(UserError, match="checkpoint-6 cannot be written .*: the checkpoints before it") as error:
            save_checkpoint(run.accelerator, output_dir, 6, total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path for path in names(output_dir) if not path.endswith(".partial")] == before
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    save_checkpoint(run.accelerator, output_dir, 6, total_limit=1)
    assert names(output_dir) == ["checkpoint-6"]


def test_checkpoint_of_the_same_step_is_replaced(tiny_pipeline_dir, output_dir):
    (output_dir / "checkpoint-4" / "manifest.json").unlink()
    run = Run(tiny_pipeline_dir)
    save_checkpoint(run.accelerator, output_dir, 4)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def names(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def test_rotation_keeps_the_newest_and_removes_damaged_ones_first(tiny_pipeline_dir, output_dir):
    run = Run(tiny_pipeline_dir)
    (output_dir / "checkpoint-4" / "optimizer.bin").unlink()
    save_checkpoint(run.accelerator, output_dir, 6, total_limit=2)
    assert names(output_dir) == ["checkpoint-2", "checkpoint-6"]
    save_checkpoint(run.accelerator, output_dir, 10, total_limit=2)
    assert names(output_dir) == ["checkpoint-10", "checkpoint-6"]


def test_the_checkpoint_just_written_stays_and_is_the_latest_even_if_an_older_run_went_further(
    tiny_pipeline_dir, output_dir
):
    run = Run(tiny_pipeline_dir)
    save_checkpoint(run.accelerator, output_dir, 3)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-3"
    save_checkpoint(run.accelerator, output_dir, 1, total_limit=1)
    assert names(output_dir) == ["checkpoint-1"]


TWO_PROCESSES = """
import sys
import torch
from test_checkpoints import Run
from pso_utils.run.checkpoints import find_checkpoint, save_checkpoint

run = Run(sys.argv[1])
assert run.accelerator.num_processes == 2
torch.manual_seed(run.accelerator.process_index)
save_checkpoint(run.accelerator, sys.argv[2], 1, total_limit=1)
expected = torch.randn(3)
save_checkpoint(run.accelerator, sys.argv[2], 2, total_limit=1)
torch.manual_seed(run.accelerator.process_index)
run.accelerator.load_state(str(find_checkpoint(sys.argv[2], "latest")))
assert not torch.equal(torch.randn(3), expected)
torch.manual_seed(9)
save_checkpoint(run.accelerator, sys.argv[2], 1)
run.accelerator.load_state(str(find_checkpoint(sys.argv[2], "checkpoint-1")))
run.accelerator.wait_for_everyone()
run.accelerator.end_training()
"""


def test_two_processes_write_one_checkpoint_with_each_ones_random_state(tiny_pipeline_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, tiny_pipeline_dir, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = find_checkpoint(tmp_path / "out", "latest")
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= files.keys()
