"""Checkpoints: bit for bit, complete or absent."""

import copy
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.optimization import get_scheduler

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.errors import UserError
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.lora import checksum
from pso_utils.families.lora_export import export_lora
from pso_utils.families.sdxl import SDXL
from pso_utils.run.checkpoints import Checkpoints, TrainingState, check_checkpoint_lora, find_checkpoint, read_state
from pso_utils.run.result import save_lora
from pso_utils.run.resumption import changed_flags, recorded_flags
from tests.families.family_inputs import draw


pytestmark = pytest.mark.usefixtures("fresh_state")


def flags(output_dir, **changes) -> SimpleNamespace:
    """What `Checkpoints` reads of a run's flags, and some that it records."""
    values = {"output_dir": str(output_dir), "checkpointing_steps": None, "checkpointing_minutes": 30.0}
    values |= {"checkpoints_total_limit": 3, "lr_scheduler": "linear", "learning_rate": 1e-2, "hub_token": "hf_secret"}
    return SimpleNamespace(**values | changes)


class Run:
    """What a training script makes: the bare denoiser, its LoRA's optimizer, a learning rate schedule, checkpoints."""

    def __init__(
        self,
        pipeline_dir,
        output_dir,
        *,
        rank=4,
        lora_alpha=8,
        target_modules=("to_q", "to_v"),
        seed=0,
        optimizer=torch.optim.AdamW,
        **changes,
    ):
        self.accelerator = Accelerator()
        self.family = SDXL(load_pipeline(ModelSource(pipeline_dir)))
        settings = {"rank": rank, "lora_alpha": lora_alpha, "target_modules": target_modules, "seed": seed}
        self.parameters = self.family.add_lora(**settings)
        self.accelerator.prepare_model(self.family.denoiser, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer(self.parameters, lr=1e-2))
        self.lr_scheduler = get_scheduler("linear", self.optimizer, num_warmup_steps=0, num_training_steps=100)
        self.training_state = TrainingState()
        self.checkpoints = Checkpoints(
            self.accelerator,
            self.family,
            self.training_state,
            self.optimizer,
            self.lr_scheduler,
            args=flags(output_dir, **changes),
            max_train_steps=100,
        )

    def save(self, step):
        self.training_state.global_step = step
        return self.checkpoints.save()

    def step(self):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 1.0 + self.lr_scheduler.last_epoch)
        self.optimizer.step()
        self.lr_scheduler.step()

    def state(self):
        return copy.deepcopy(
            [
                self.parameters,
                self.optimizer.state_dict()["state"],
                self.lr_scheduler.state_dict(),
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
    run, states = Run(tiny_pipeline_dir, output_dir), {}
    for step in range(1, 5):
        run.step()
        if step % 2 == 0:
            assert run.save(step) == output_dir / f"checkpoint-{step}"
            states[step] = run.state()
    return output_dir, states


@pytest.fixture
def output_dir(saved, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_processes_with_different_loras_write_no_checkpoint(tiny_pipeline_dir, tmp_path, monkeypatch):
    run = Run(tiny_pipeline_dir, tmp_path)
    run.step()
    first = run.save(1)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    other = {"change": 0.0}

    def gather(own):  # the other process has the same LoRA, but for the change
        run.parameters[0].data[0, 0] += other["change"]
        return torch.cat([own, torch.tensor([checksum(run.family.denoiser)])])

    monkeypatch.setattr(run.accelerator, "gather", gather)
    assert run.save(2).is_dir()
    other["change"] = 1e-6
    with pytest.raises(
        UserError, match="checkpoint-3 is not written: the LoRA is not the same on all processes.* latest"
    ):
        run.save(3)
    assert first.is_dir() and not (tmp_path / "checkpoint-3").exists()


def test_resumed_run_continues_bit_for_bit(tiny_pipeline_dir, saved):
    output_dir, states = saved
    run = Run(tiny_pipeline_dir, output_dir, seed=1)
    run.checkpoints.load(find_checkpoint(output_dir, "checkpoint-2"))
    assert_equal(run.state(), states[2])
    assert run.training_state.global_step == 2
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    assert all(parameter.requires_grad for parameter in run.parameters)
    for _ in range(2):
        run.step()
    assert_equal(run.state(), states[4])


def test_checkpoint_holds_the_lora_as_pipelines_load_it_and_not_the_denoiser(tiny_pipeline_dir, saved):
    checkpoint = find_checkpoint(saved[0], "latest")
    assert {path.name for path in checkpoint.iterdir()} == {
        "manifest.json",
        "pytorch_lora_weights.safetensors",
        "training_state.pt",
    }
    assert "hf_secret" not in (checkpoint / "manifest.json").read_text()
    run = Run(tiny_pipeline_dir, saved[0])
    run.checkpoints.load(checkpoint)
    fresh = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir, add_watermarker=False)
    fresh.load_lora_weights(str(checkpoint))
    assert np.array_equal(draw(fresh), draw(run.family.pipeline))


def test_eight_bit_optimizer_state_survives(tiny_pipeline_dir, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"rank": 64, "lora_alpha": 64, "optimizer": bitsandbytes.optim.AdamW8bit}
    run = Run(tiny_pipeline_dir, tmp_path, **options)
    run.step()
    run.save(1)
    state = run.state()
    assert any(values["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for values in state[1].values())
    resumed = Run(tiny_pipeline_dir, tmp_path, seed=1, **options)
    resumed.checkpoints.load(find_checkpoint(tmp_path, "latest"))
    assert_equal(resumed.state(), state)
    for each in (run, resumed):
        each.step()
    assert_equal(resumed.state(), run.state())


@pytest.mark.parametrize("options", [{"rank": 2}, {"lora_alpha": 4}, {"target_modules": ("to_q", "to_k")}])
def test_checkpoint_of_another_lora_is_refused_before_anything_changes(tiny_pipeline_dir, saved, options):
    checkpoint = find_checkpoint(saved[0], "latest")
    run = Run(tiny_pipeline_dir, saved[0], **options)
    before = run.state()
    with pytest.raises(UserError, match="holds a LoRA of rank 4, alpha 8 on to_q to_v, this run asks for") as error:
        run.checkpoints.load(checkpoint)
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


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def write_manifest(checkpoint, **changes):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plant(checkpoint, name="training_state.pt"):
    """A file that runs code for whoever unpickles it, with a manifest to it."""
    torch.save({"optimizer": Evil(checkpoint.parent / "planted")}, checkpoint / name)
    content = (checkpoint / name).read_bytes()
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(checkpoint, files=files | {name: entry})


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: (checkpoint / "training_state.pt").unlink(),
        lambda checkpoint: truncate(checkpoint / "pytorch_lora_weights.safetensors"),
        lambda checkpoint: flip_a_bit(checkpoint / "pytorch_lora_weights.safetensors"),
        lambda checkpoint: flip_a_bit(checkpoint / "training_state.pt"),
        lambda checkpoint: zero(checkpoint / "pytorch_lora_weights.safetensors"),
        lambda checkpoint: zero(checkpoint / "training_state.pt"),
        lambda checkpoint: (checkpoint / "manifest.json").unlink(),
        lambda checkpoint: truncate(checkpoint / "manifest.json"),
        lambda checkpoint: (checkpoint / "manifest.json").write_text("[]"),
        lambda checkpoint: write_manifest(checkpoint, counter="last"),
        lambda checkpoint: write_manifest(checkpoint, files={}),
        # of the version before: sizes alone
        lambda checkpoint: write_manifest(checkpoint, files={"pytorch_lora_weights.safetensors": 3}, flags=None),
    ],
)
def test_half_written_or_damaged_newest_checkpoint_is_passed_over_with_a_warning(output_dir, spoil, caplog):
    spoil(output_dir / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(output_dir, "latest").name == "checkpoint-2"
    assert "checkpoint-4 is not whole" in caplog.text
    with pytest.raises(UserError, match="checkpoint-4 is not whole"):
        find_checkpoint(output_dir, "checkpoint-4")
    spoil(output_dir / "checkpoint-2")
    assert find_checkpoint(output_dir, "latest") is None


@pytest.mark.parametrize("is_signed", [True, False], ids=["with a manifest to it", "alone"])
def test_a_planted_pickle_does_not_run_and_the_checkpoint_before_it_is_used(
    tiny_pipeline_dir, output_dir, saved, caplog, is_signed
):
    manifest = (output_dir / "checkpoint-4" / "manifest.json").read_text()
    plant(output_dir / "checkpoint-4")
    if not is_signed:
        (output_dir / "checkpoint-4" / "manifest.json").write_text(manifest)
    latest = find_checkpoint(output_dir, "latest")
    assert latest.name == "checkpoint-2" and len(caplog.records) == 1 and "passed over" in caplog.text
    run = Run(tiny_pipeline_dir, output_dir, seed=1)
    run.checkpoints.load(latest)
    assert_equal(run.state(), saved[1][2])
    with pytest.raises(UserError, match="resume from another checkpoint") as error:
        read_state(output_dir / "checkpoint-4")
    assert "\n" not in str(error.value) and not (output_dir / "planted").exists()


@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin", "pytorch_lora_weights.bin", "scaler.pt"])
def test_a_planted_pickle_of_another_name_is_not_read(tiny_pipeline_dir, output_dir, saved, name):
    plant(output_dir / "checkpoint-4", name)
    run = Run(tiny_pipeline_dir, output_dir, seed=1)
    run.checkpoints.load(find_checkpoint(output_dir, "latest"))
    assert_equal(run.state(), saved[1][4])
    assert not (output_dir / "planted").exists()


def test_a_planted_pickle_in_place_of_the_lora_is_passed_over_or_one_line(tiny_pipeline_dir, output_dir, caplog):
    plant(output_dir / "checkpoint-4", "pytorch_lora_weights.safetensors")
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-2" and "passed over" in caplog.text
    run = Run(tiny_pipeline_dir, output_dir)
    with pytest.raises(UserError, match="holds no LoRA of this project") as error:
        run.checkpoints.load(find_checkpoint(output_dir, "checkpoint-4"))
    assert "\n" not in str(error.value) and not (output_dir / "planted").exists()


def test_the_clock_does_not_decide_which_checkpoint_is_the_latest(output_dir):
    for step, year in ((2, 2090), (4, 1980)):
        for path in [*(output_dir / f"checkpoint-{step}").iterdir(), output_dir / f"checkpoint-{step}"]:
            os.utime(path, times=((year - 1970) * 31_557_600,) * 2)
    write_manifest(output_dir / "checkpoint-2", time=4e9)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"


def test_a_run_killed_while_it_writes_leaves_no_checkpoint(tiny_pipeline_dir, output_dir, monkeypatch):
    run = Run(tiny_pipeline_dir, output_dir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        run.save(6)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    run.save(6)
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tiny_pipeline_dir, output_dir, monkeypatch):
    """A rename may otherwise outlive what it names."""
    run = Run(tiny_pipeline_dir, output_dir)
    events, fsync, replace = [], os.fsync, os.replace

    def record_sync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(output_dir).as_posix())
        fsync(handle)

    def record_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint = run.save(6)
    assert events[events.index("rename") + 1 :] == ["."]
    partial = "checkpoint-6.partial"
    expected = {partial, *(f"{partial}/{path.name}" for path in checkpoint.iterdir())}
    assert len(expected) == 4 and set(events[: events.index("rename")]) == expected


@pytest.mark.parametrize("size", [100, 20_000], ids=["the LoRA", "the optimizer"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_as_they_were(tiny_pipeline_dir, output_dir, size):
    run = Run(tiny_pipeline_dir, output_dir, checkpoints_total_limit=1)
    run.step()
    before = names(output_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(
            UserError, match="checkpoint-6 is not written: .* latest checkpoint is checkpoint-4"
        ) as error:
            run.save(6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path for path in names(output_dir) if not path.endswith(".partial")] == before
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    run.save(6)
    assert names(output_dir) == ["checkpoint-6"]


def test_checkpoint_of_the_same_step_is_replaced(tiny_pipeline_dir, output_dir):
    (output_dir / "checkpoint-4" / "manifest.json").unlink()
    run = Run(tiny_pipeline_dir, output_dir)
    run.save(4)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def names(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def test_rotation_keeps_the_newest_and_removes_damaged_ones_first(tiny_pipeline_dir, output_dir):
    run = Run(tiny_pipeline_dir, output_dir, checkpoints_total_limit=2)
    flip_a_bit(output_dir / "checkpoint-4" / "training_state.pt")
    run.save(6)
    assert names(output_dir) == ["checkpoint-2", "checkpoint-6"]
    run.save(10)
    assert names(output_dir) == ["checkpoint-10", "checkpoint-6"]


def test_rotation_removes_what_it_wrote_and_nothing_else(tiny_pipeline_dir, output_dir, tmp_path):
    another = output_dir / "checkpoint-3"  # of another trainer, with a LoRA of the same name
    another.mkdir()
    shutil.copy(output_dir / "checkpoint-2" / "pytorch_lora_weights.safetensors", another)
    elsewhere = Path(shutil.copytree(output_dir / "checkpoint-2", tmp_path / "elsewhere"))
    (output_dir / "checkpoint-1").symlink_to(elsewhere)
    for step in (2, 4):
        (output_dir / f"checkpoint-{step}" / "notes.txt").write_text("mine")
    run = Run(tiny_pipeline_dir, output_dir, checkpoints_total_limit=1)
    for step in (3, 4, 6):  # the other trainer's and the one with notes are in the way
        run.save(step)
    found = {str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file()}
    kept = {"checkpoint-2/notes.txt", "checkpoint-4.replaced/notes.txt"}
    kept |= {"checkpoint-3.replaced/pytorch_lora_weights.safetensors"}
    assert found == kept | {f"checkpoint-6/{path.name}" for path in elsewhere.iterdir()}
    assert len(list(elsewhere.iterdir())) == 3


def test_rotation_leaves_folders_and_files_of_like_names(tiny_pipeline_dir, tmp_path):
    run = Run(tiny_pipeline_dir, tmp_path, checkpoints_total_limit=1)
    (tmp_path / "checkpoint-best.partial").mkdir()
    (tmp_path / "checkpoint-best.partial" / "mine.txt").write_text("mine")
    (tmp_path / "checkpoint-9.partial").write_text("a file")
    (tmp_path / "checkpoint-2.partial").mkdir()  # of a run that was killed
    (tmp_path / "checkpoint-2.partial" / "training_state.pt").write_text("half")
    run.save(4)
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-best.partial", "checkpoint-9.partial"}
    assert (tmp_path / "checkpoint-best.partial" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint-2.partial").exists()


def test_rotation_keeps_three_by_default(tiny_pipeline_dir, output_dir):
    script_flags = ["--pretrained_model_name_or_path", "model", "--reward", "clip"]
    limit = train_pso_online.parse_args(script_flags).checkpoints_total_limit
    run = Run(tiny_pipeline_dir, output_dir, checkpoints_total_limit=limit)
    for step in (6, 8):
        run.save(step)
    assert names(output_dir) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_the_checkpoint_just_written_stays_and_is_the_latest_even_if_an_older_run_went_further(
    tiny_pipeline_dir, output_dir
):
    run = Run(tiny_pipeline_dir, output_dir)
    run.save(3)
    assert find_checkpoint(output_dir, "latest").name == "checkpoint-3"
    Run(tiny_pipeline_dir, output_dir, checkpoints_total_limit=1).save(1)
    assert names(output_dir) == ["checkpoint-1"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_lora_that_is_not_finite_is_no_checkpoint_and_the_latest_one_is_named(
    tiny_pipeline_dir, output_dir, tmp_path, value
):
    run = Run(tiny_pipeline_dir, output_dir)
    run.family.save_lora(output_dir)
    before = {path: path.read_bytes() for path in output_dir.glob("*.safetensors")}
    with torch.no_grad():
        run.parameters[3].view(-1)[5] = value
    with pytest.raises(UserError, match="the LoRA is not finite.*the latest checkpoint is checkpoint-4") as error:
        run.save(6)
    assert "\n" not in str(error.value) and find_checkpoint(output_dir, "latest").name == "checkpoint-4"
    with pytest.raises(UserError, match="the LoRA is not finite.*the latest checkpoint is checkpoint-4"):
        save_lora(flags(output_dir), run.accelerator, run.family, info=None, deployment=None)
    with pytest.raises(UserError, match="the LoRA is not finite.*no checkpoint"):
        save_lora(flags(tmp_path / "new"), run.accelerator, run.family, info=None, deployment=None)
    assert len(before) == 1 and all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_get_their_mode_from_the_umask(tiny_pipeline_dir, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        run = Run(tiny_pipeline_dir, tmp_path)
        checkpoint = run.save(1)
        run.family.save_lora(tmp_path)
        settings = {"part": "unet", "save_dtype": "fp16", "details": {}}
        export_lora(checkpoint / LORA_WEIGHT_NAME_SAFE, tmp_path / "tool.safetensors", SDXL.lora_format, **settings)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    files = [*checkpoint.iterdir(), *tmp_path.glob("*.safetensors")]
    assert len(files) == 5 and {path.stat().st_mode & 0o777 for path in files} == {mode}


# ---- When one is due ----


@pytest.mark.parametrize("max_train_steps, interval", [(3, 1), (22, 2), (1_000, 100), (10_000, 500)])
def test_checkpoints_are_due_every_tenth_of_the_run_and_at_most_500_steps(tmp_path, max_train_steps, interval):
    state = TrainingState()
    parts = (Accelerator(), None, state, None, None)
    checkpoints = Checkpoints(*parts, args=flags(tmp_path), max_train_steps=max_train_steps)
    due = []
    for state.global_step in range(1, 2 * interval + 1):
        if checkpoints.is_due(state.global_step - 1):
            due.append(state.global_step)
    assert due == [interval, 2 * interval]
    assert Checkpoints(*parts, args=flags(tmp_path, checkpointing_steps=7), max_train_steps=99).interval == 7


@pytest.mark.parametrize(
    "script, required", [(train_pso_online, ["--reward", "clip"]), (train_pso_lora_sdxl, ["--task", "preference"])]
)
def test_checkpoints_are_due_after_half_an_hour_by_default(script, required):
    args = script.parse_args(["--pretrained_model_name_or_path", "model", *required])
    assert args.checkpointing_minutes == 30 and args.checkpointing_steps is None


def test_checkpoints_are_due_by_the_clock_since_the_last_one(tiny_pipeline_dir, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = Run(tiny_pipeline_dir, tmp_path, checkpointing_steps=1000, checkpointing_minutes=10)
    run.training_state.global_step = 1
    now[0] += 599
    assert not run.checkpoints.is_due(0)
    now[0] += 1
    assert run.checkpoints.is_due(0)
    run.save(1)
    assert not run.checkpoints.is_due(0)


# ---- Which flags may differ ----


def change(args, folder, **changes) -> list[str]:
    """The lines of a resumed run whose flags differ from the recorded ones."""
    recorded = recorded_flags(args)
    return changed_flags(recorded_flags(SimpleNamespace(**vars(args) | changes)), recorded, folder / "checkpoint-4")


def online(folder, **changes) -> SimpleNamespace:
    (folder / "prompts.txt").write_text("a fox\n")
    script_flags = ["--pretrained_model_name_or_path", "a/model", "--reward", "clip", "--seed", "3"]
    script_flags += ["--prompts", str(folder / "prompts.txt"), "--output_dir", str(folder / "out")]
    return SimpleNamespace(**vars(train_pso_online.parse_args(script_flags)) | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 1e-3}, "was trained with --learning_rate 1e-05, this run asks for --learning_rate 0.001"),
        ({"seed": 4}, "resume with --seed 3, or train into another --output_dir"),
        ({"beta": 9.0}, "no --beta"),
        ({"reward": ["pickscore", "clip=0.5"]}, "this run asks for --reward pickscore clip=0.5"),
        ({"reward_dtype": "bf16"}, "--reward_dtype"),
        ({"scale_lr": True}, "was trained with no --scale_lr, this run asks for --scale_lr"),
        ({"timesteps": [999, 499]}, "was trained with no --timesteps, this run asks for --timesteps 999 499"),
        ({"pretrained_model_name_or_path": "another/model"}, "--pretrained_model_name_or_path a/model"),
        ({"lr_scheduler": "cosine"}, "--lr_scheduler constant"),
        ({"task": "style"}, "of the other training script"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_flag_that_makes_it_another_run_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        change(online(tmp_path), tmp_path, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_length_may_differ_where_the_learning_rate_does_not_depend_on_it(tmp_path):
    assert change(online(tmp_path, max_train_steps=5), tmp_path, max_train_steps=9) == [
        "--max_train_steps: 9 now, 5 when checkpoint-4 was written"
    ]
    with pytest.raises(UserError, match="--max_train_steps 5"):
        change(online(tmp_path, max_train_steps=5, lr_scheduler="cosine"), tmp_path, max_train_steps=9)
    args = online(tmp_path, lr_scheduler="constant_with_warmup", num_train_epochs=2)
    assert len(change(args, tmp_path, num_train_epochs=3)) == 1


def test_what_changes_no_update_may_differ_and_is_listed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    args = online(tmp_path)
    shutil.copy(tmp_path / "prompts.txt", tmp_path / "elsewhere" / "mine.txt")
    changes = {"output_dir": tmp_path / "moved", "num_validation_images": 0, "prompts": tmp_path / "elsewhere/mine.txt"}
    changes |= {"validation_num_inference_steps": 8, "hub_token": "another", "resume_from_checkpoint": "latest"}
    lines = change(args, tmp_path, **changes)
    assert [line.split(":")[0] for line in lines] == [
        "--num_validation_images",
        "--prompts",
        "--validation_num_inference_steps",
    ]
    assert "another" not in json.dumps(recorded_flags(SimpleNamespace(**vars(args) | changes)))


MAY_DIFFER = {
    "checkpointing_steps": 7,
    "checkpointing_minutes": 5.0,
    "checkpoints_total_limit": 9,
    "validation_steps": 7,
    "validation_prompts": ["a cat"],
    "num_validation_images": 1,
    "report_to": "wandb",
    "logging_dir": "curves",
    "push_to_hub": True,
    "hub_model_id": "me/mine",
    "hub_public": True,
    "dataloader_num_workers": 3,
    "offload": True,
    "vae_batch_size": 4,
    "reward_batch_size": 4,
}


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_intervals_validation_trackers_hub_workers_offload_and_batch_sizes_may_differ(tmp_path, name):
    (line,) = change(online(tmp_path), tmp_path, **{name: MAY_DIFFER[name]})
    assert line.startswith(f"--{name}: {MAY_DIFFER[name]} now, ")


@pytest.mark.parametrize("task", ["preference", "style", "concept"])
def test_the_deployment_may_differ_where_no_reference_is_drawn_by_it(tmp_path, task):
    args = online(tmp_path, task=task)
    if task == "preference":
        assert len(change(args, tmp_path, validation_num_inference_steps=8)) == 1
    else:
        with pytest.raises(UserError, match="with no --validation_num_inference_steps"):
            change(args, tmp_path, validation_num_inference_steps=8)


def test_a_state_of_another_optimizer_is_one_line(tiny_pipeline_dir, output_dir):
    checkpoint = output_dir / "checkpoint-4"
    torch.save(
        read_state(checkpoint) | {"optimizer": {"state": {}, "param_groups": []}}, checkpoint / "training_state.pt"
    )
    with pytest.raises(UserError, match="holds no state of this optimizer") as error:
        Run(tiny_pipeline_dir, output_dir).checkpoints.load(checkpoint)
    assert "\n" not in str(error.value)


def test_data_that_changed_are_another_run_wherever_they_are(tmp_path):
    args = online(tmp_path)
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "0.png").write_text("0")
    args = SimpleNamespace(**vars(args) | {"dataset_name": str(folder), "distilled_unet": f"{folder}:unet.bin"})
    (folder / "unet.bin").write_text("weights")
    recorded = recorded_flags(args)

    def check():
        return changed_flags(recorded_flags(args), recorded, tmp_path / "checkpoint-4")

    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("of a tool")
    assert check() == []
    (folder / "below" / "1.png").write_text("1")
    with pytest.raises(UserError, match="what is in --dataset_name .* has changed since"):
        check()
    (folder / "below" / "1.png").unlink()
    (folder / "unet.bin").write_text("another")
    with pytest.raises(UserError, match="what is in --distilled_unet .* has changed since"):
        check()
    (folder / "unet.bin").write_text("weights")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="what is in --prompts .* has changed since"):
        check()
    args.prompts = str(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="this run asks for --prompts"):
        check()


def test_a_pattern_of_files_is_told_apart_by_what_it_matches(tmp_path):
    for name in ("0.parquet", "1.parquet"):
        (tmp_path / name).write_text(name)
    args = online(tmp_path, dataset_name=str(tmp_path / "*.parquet"))
    recorded = recorded_flags(args)
    assert recorded["content"]["dataset_name"] and recorded["content"]["pretrained_model_name_or_path"] is None
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(UserError, match="--dataset_name"):
        changed_flags(recorded_flags(args), recorded, tmp_path / "checkpoint-4")


# ---- Several processes ----


TWO_PROCESSES = """
import sys
import time
from pathlib import Path
import torch
from test_checkpoints import Run
from pso_utils.errors import UserError
from pso_utils.run.checkpoints import find_checkpoint
from pso_utils.run.interruption import signals

run = Run(sys.argv[1], sys.argv[2], checkpoints_total_limit=1, checkpointing_minutes=10)
rank = run.accelerator.process_index
assert run.accelerator.num_processes == 2
run.step()
run.save(1)
run.save(2)
run.accelerator.wait_for_everyone()
other = Run(sys.argv[1], sys.argv[2], seed=1)
other.checkpoints.load(find_checkpoint(sys.argv[2], "latest"))
assert other.training_state.global_step == 2
assert all(torch.equal(one, two) for one, two in zip(run.parameters, other.parameters))

monotonic = time.monotonic  # the main process's clock decides
for late, is_due in ((0, True), (1, False)):
    time.monotonic = lambda: monotonic() + 700 * (rank == late)
    assert run.checkpoints.is_due(2) == is_due
time.monotonic = monotonic

Path(sys.argv[2], "checkpoint-3.partial").write_text("")  # a file: no folder can be made there
try:
    run.save(3)
except UserError as error:
    message = str(error)
assert ("main process stopped" in message) == (rank == 1), message
assert "the latest checkpoint is checkpoint-2" in message
run.accelerator.wait_for_everyone()

for sender in (0, 1):  # a signal to either process is known to both
    signals.received = 15 * (rank == sender)
    assert signals.agreed(run.accelerator) == 15
run.accelerator.end_training()
"""


def test_two_processes_write_one_checkpoint_and_agree_when_one_is_due_or_fails(tiny_pipeline_dir, tmp_path):
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
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-3.partial"]
