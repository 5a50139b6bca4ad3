"""The online script end to end, on a tiny random SDXL pipeline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from script_runs import ROOT, assert_same_run, metrics, run_killed_and_resumed, to_flags, two_processes, weights

import train_pso_online
from pso_utils import arguments, rewards, training, validation


pytestmark = pytest.mark.usefixtures("fresh_state")

PROMPTS = ["red panda animal", "apple food", "grinning face", "cactus plant", "sailboat vehicle"]

# Scores of the mean red of an image; None of the prompts "apple food" differs, so its pairs are ties.
OWN_REWARD = """
import numpy as np
import torch
from accelerate import PartialState

def score(images, prompts):
    open(f"{__file__}.world-{PartialState().num_processes}", "a").close()
    return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])

def ties(images, prompts):
    return score(images, prompts) * torch.tensor([prompt != "apple food" for prompt in prompts])

def all_ties(images, prompts):
    return torch.zeros(len(images))

calls = []

def ties_later(images, prompts):
    calls.append(1)
    return score(images, prompts) * (len(calls) == 1)  # an epoch's images are one batch

def raises(images, prompts):
    raise RuntimeError("no network")

def nan(images, prompts):
    return torch.full((len(images),), float("nan"))

def wrong_shape(images, prompts):
    return torch.zeros(len(images), 1)
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with prompts and the user's own rewards."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "own_reward.py").write_text(OWN_REWARD)
    return folder


@pytest.fixture
def flags(tiny_pipeline_dir, workspace, tmp_path, monkeypatch):
    """A function from changes to flags: two epochs of four pairs, two optimizer steps each, unless changed."""
    monkeypatch.chdir(workspace)

    def build(**changes) -> list[str]:
        return to_flags(default_flags(tiny_pipeline_dir, workspace, tmp_path / "out") | changes)

    return build


def default_flags(pipeline_dir, workspace, output_dir) -> dict:
    return {
        "pretrained_model_name_or_path": pipeline_dir,
        "prompts": workspace / "prompts.txt",
        "reward": "jpeg_compressibility",
        "resolution": 32,
        "output_dir": output_dir,
        "max_train_steps": 4,
        "sample_batches_per_epoch": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "num_validation_images": 0,
        "report_to": "none",
    }


def run(flags: list[str]) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_pso_online.main(flags)
    return Path(flags[flags.index("--output_dir") + 1])


# ---- Cost ----


def test_each_batch_of_pairs_and_step_costs_one_unet_call_with_gradient_and_one_without(flags, unet_calls):
    run(flags(max_train_steps=2))
    assert unet_calls == [(False, True, 4)] * 8 + [(False, False, 4)] * 6 + [(True, True, 4)] * 6


def test_the_reference_is_computed_once_for_several_inner_epochs(flags, unet_calls):
    run(flags(max_train_steps=6, num_inner_epochs=3, train_timesteps=2))
    assert unet_calls == [(False, True, 4)] * 8 + [(False, False, 4)] * 4 + [(True, True, 4)] * 12


def test_ties_cost_no_unet_call_and_stop_the_run_after_some_epochs(flags, unet_calls, capsys):
    with pytest.raises(SystemExit) as stop:
        run(flags(reward="own_reward:all_ties", max_tie_epochs=2))
    assert stop.value.code == 2
    assert unet_calls == [(False, True, 4)] * 16
    assert "nothing but ties" in capsys.readouterr().err


def test_a_run_that_ties_stop_keeps_what_it_has_learned(flags):
    folder = run(flags(max_train_steps=2))
    with pytest.raises(SystemExit):
        run(flags(reward="own_reward:ties_later", max_tie_epochs=1))
    saved = weights(folder / "checkpoint-2")
    assert all(value.abs().sum() > 0 for value in saved.values())


def test_partial_groups_step_with_their_own_count(flags, unet_calls):
    folder = run(flags(reward="own_reward:ties", num_train_epochs=1, max_train_steps=None))
    assert metrics(folder)[0]["ties"] == 1  # of the four prompts of the epoch, so three pairs: groups of two and one
    assert [batch for grad, _, batch in unet_calls if grad] == [4] * 3 + [2] * 3
    assert [line["step"] for line in metrics(folder)] == [1, 2]


def test_a_batch_clipped_on_all_sides_costs_no_backward_pass(flags, monkeypatch):
    backward, count = Accelerator.backward, []
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (count.append(1), backward(self, loss)))
    folder = run(flags(max_train_steps=2, num_inner_epochs=2, train_batch_size=4, clip_range=1e-9))
    first, second = metrics(folder)
    assert len(count) == 3  # the first step's; the update then took every ratio out of the range
    assert first["grad_norm"] > 0 and second["grad_norm"] == 0
    assert second["target_clipped_low"] + second["target_clipped_high"] == pytest.approx(1)
    assert second["reference_clipped_low"] + second["reference_clipped_high"] == pytest.approx(1)


# ---- What is computed ----


def test_the_update_does_not_depend_on_how_its_pairs_are_batched(flags, tmp_path):
    one = run(flags(output_dir=tmp_path / "one", train_batch_size=4, max_train_steps=2))
    other = run(
        flags(
            output_dir=tmp_path / "other",
            train_batch_size=1,
            gradient_accumulation_steps=4,
            sample_batch_size=1,
            sample_batches_per_epoch=4,
            max_train_steps=2,
        )
    )
    for ours, theirs in zip(metrics(one), metrics(other)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_training_tells_targets_from_references(flags):
    folder = run(flags(reward="own_reward:score", max_train_steps=4, num_inner_epochs=4, train_batch_size=4, rank=16))
    first, *_, last = metrics(folder)
    assert first["pair_accuracy"] == 0.5 and first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["pair_accuracy"] > 0.8 and last["loss"] < first["loss"]
    assert last["target_log_ratio"] > last["reference_log_ratio"]


def test_trained_steps_are_distinct_stochastic_and_keyed_by_slot():
    steps = train_pso_online.draw_step_index(0, 3, range(200), 5, 2)
    assert steps.min() == 0 and steps.max() == 3  # the last of five steps, 4, has no density
    assert (steps[:, 0] < steps[:, 1]).all()
    assert torch.equal(steps[50:60], train_pso_online.draw_step_index(0, 3, range(50, 60), 5, 2))


def test_saved_lora_in_a_fresh_pipeline_draws_what_training_drew_last(flags, tiny_pipeline_dir):
    folder = run(flags(num_validation_images=2, validation_prompts=["apple food"], output_kohya_format=True))
    drawn = np.asarray(Image.open(folder / "validation" / "step-000004.png"))[1::3, :]
    drawn = [drawn[:, start : start + 96][:, 1::3] for start in (0, 98)]  # enlarged by 3, a gap of 2 pixels

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 32, "width": 32, "output_type": "np"}

    def draw():
        return [
            pipeline("apple food", generator=torch.Generator().manual_seed(seed), **settings).images[0]
            for seed in (0, 1)
        ]

    before = draw()
    pipeline.load_lora_weights(folder)
    for image, base, expected in zip(draw(), before, drawn):
        assert np.abs(image * 255 - expected).max() <= 1  # rounding to eight bits, and batches of one for two
        assert np.abs(base * 255 - expected).max() > 8
    assert Image.open(folder / "before_after.png").width > 2 * 2 * 96
    assert "num_inference_steps=4" in (folder / "README.md").read_text()
    assert (folder / "pytorch_lora_weights_kohya.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "euler_ancestral"},
        {"scheduler": "euler", "timesteps": [999, 749, 499, 249]},
        {"scheduler": "tcd", "train_timesteps": 1},
        {"scheduler": "ddim", "validation_eta": 0.0},
        {"timesteps": [999, 749, 499, 249], "validation_num_inference_steps": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_schedulers_and_deployment_settings_train_and_validate(flags, changes):
    changes |= {"max_train_steps": 1, "num_validation_images": 1, "validation_prompts": ["apple food"]}
    folder = run(flags(**changes))
    assert [line["step"] for line in metrics(folder)] == [0, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"offload": True, "gradient_checkpointing": True, "enable_vae_slicing": True, "enable_vae_tiling": True},
        {"mixed_precision": "bf16", "num_validation_images": 1},
        {"reward": "jpeg_compressibility", "reward_combination": "pareto", "samples_per_prompt": 3, "scale_lr": True},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "report_to": "tensorboard", "max_train_samples": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_train(flags, changes):
    folder = run(flags(**changes | {"max_train_steps": 2}))
    assert metrics(folder)[-1]["step"] == 2
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


# ---- Interruption ----


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tiny_pipeline_dir, workspace, tmp_path):
    values = default_flags(tiny_pipeline_dir, workspace, None) | {
        "max_train_steps": 7,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_images": 1,
        "lr_scheduler": "cosine",
        "report_to": "tensorboard",
    }
    places = {
        "sampling": ("train_pso_online", "sample_latents", 6),
        "update": ("pso_utils.training", "optimizer_step", 4),
        "checkpoint": ("pso_utils.checkpoints", "_files", 2),  # its files are written, its manifest is not
    }
    run_killed_and_resumed("train_pso_online", to_flags(values), tmp_path, places)
    uninterrupted = tmp_path / "none"
    steps = [line["step"] for line in metrics(uninterrupted) if "loss" in line]
    assert steps == list(range(1, 8))
    assert [line["step"] for line in metrics(uninterrupted) if "loss" not in line] == [0, 4, 7]
    for place in places:
        assert_same_run(tmp_path / place, uninterrupted)
        assert tensorboard_steps(tmp_path / place) == steps
    assert not list(tmp_path.glob("*/*.partial"))

    # A half-written newest checkpoint: the one before it is used.
    half = shutil.copytree(uninterrupted, tmp_path / "half")
    newest = sorted(half.glob("checkpoint-*"))[-1]
    assert newest.name == "checkpoint-6"
    os.truncate(newest / "optimizer.bin", 100)
    run(to_flags(values | {"output_dir": half, "resume_from_checkpoint": "latest"}))
    assert_same_run(half, uninterrupted)


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "pso_online"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_8bit_adam_trains_and_resumes_bit_for_bit(flags, tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"use_8bit_adam": True, "rank": 64, "checkpointing_steps": 2}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    half = run(flags(output_dir=tmp_path / "half", **changes | {"max_train_steps": 2}))
    state = torch.load(half / "checkpoint-2" / "optimizer.bin", weights_only=False)["state"][0]
    state |= state.pop("__bnb_optimizer_quant_state__", {})
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    run(flags(output_dir=half, resume_from_checkpoint="latest", **changes))
    assert_same_run(half, whole)


def test_a_new_run_does_not_write_over_the_checkpoints_of_an_earlier_one(flags, capsys):
    folder = run(flags(max_train_steps=2, checkpointing_steps=1))
    with pytest.raises(SystemExit):
        run(flags(max_train_steps=2, checkpointing_steps=1))
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert (folder / "checkpoint-2").is_dir()


def test_resuming_from_the_latest_of_only_damaged_checkpoints_starts_anew(flags):
    folder = run(flags(max_train_steps=2, checkpointing_steps=2))
    whole = weights(folder)
    (folder / "checkpoint-2" / "optimizer.bin").unlink()
    run(flags(max_train_steps=2, checkpointing_steps=2, resume_from_checkpoint="latest"))
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())
    assert [line["step"] for line in metrics(folder)] == [1, 2]


# ---- Processes and places ----


@pytest.mark.slow
def test_two_processes_train_on_what_one_would(tiny_pipeline_dir, workspace, tmp_path, monkeypatch):
    """Within 1e-3 of the loss and 2% of the weights' distance: the batches of a UNet call differ, so rounding does."""
    monkeypatch.chdir(workspace)
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "two") | {"reward": "own_reward:ties"}
    values |= {"num_validation_images": 1, "num_train_epochs": 2, "max_train_steps": None, "adam_epsilon": 1e-4}
    # Two batches of one prompt and groups of 2 x 1 pairs on two processes; one process has twice the batch.
    half = to_flags(values | {"sample_batch_size": 1, "train_batch_size": 1})
    two_processes("train_pso_online.py", half)
    assert (workspace / "own_reward.py.world-2").exists()
    one = run(to_flags(values | {"output_dir": tmp_path / "one"}))
    assert len(metrics(one)) == len(metrics(tmp_path / "two"))
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two")):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    ours, theirs = weights(one), weights(tmp_path / "two")
    for key in ours:
        assert (ours[key] - theirs[key]).norm() <= 0.02 * ours[key].norm()


def test_a_copy_of_the_script_runs_elsewhere_with_a_reward_beside_it(tiny_pipeline_dir, workspace, tmp_path):
    script = Path(shutil.copy(ROOT / "train_pso_online.py", tmp_path / "my_training.py"))
    shutil.copy(workspace / "own_reward.py", tmp_path / "my_reward.py")
    (tmp_path / "elsewhere").mkdir()
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "out") | {"reward": "my_reward:score"}
    result = subprocess.run(
        [sys.executable, str(script), *to_flags(values | {"max_train_steps": 1, "num_validation_images": 1})],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    # Libraries may warn on import; nothing that names our files or what we call may.
    ours = [line for line in result.stderr.splitlines() if "pso" in line.lower() or "my_training" in line]
    assert not [line for line in ours if "warn" in line.lower()]


def test_offloaded_rewards_move_to_the_device_once_an_epoch(flags, monkeypatch):
    moves, to = [], rewards.Rewards.to
    monkeypatch.setattr(rewards.Rewards, "to", lambda self, device: (moves.append(str(device)), to(self, device))[1])
    run(flags(offload=True, max_train_steps=4))  # two epochs of two batches
    assert len(moves) == 1 + 2 * 2  # to the CPU when they are loaded; in each epoch there and back


def test_long_prompts_of_several_lines_are_drawn_and_trained_on(flags, tmp_path):
    prompts = ["fox " * 5_000, "a fox\nin two lines\u2028or three"]
    (tmp_path / "long.json").write_text(json.dumps(prompts))
    folder = run(flags(prompts=tmp_path / "long.json", max_train_steps=1, num_validation_images=1))
    assert (folder / "before_after.png").is_file() and "fox" in (folder / "README.md").read_text()
    measured = []
    font = type("Font", (), {"getlength": lambda self, text: measured.append(text) or 8.0 * len(text)})()
    assert validation.shorten(prompts[0], 80, font) == "fox fox f…"
    assert len(measured) < 100


def test_push_to_hub_uploads_the_result_without_checkpoints(flags, monkeypatch):
    calls = {}
    monkeypatch.setattr(training, "create_repo", lambda name, **_: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(training, "upload_folder", lambda **values: calls.update(values))
    run(flags(max_train_steps=1, push_to_hub=True, hub_model_id="panda"))
    assert calls["repo_id"] == "me/panda" and "checkpoint-*" in calls["ignore_patterns"]


# ---- Bad input ----


def write_other_unet(folder: Path) -> Path:
    from conftest import build_pipeline

    path = folder / "other_unet.safetensors"
    save_file(build_pipeline(block_out_channels=(32, 32)).unet.state_dict(), path)
    return path


def write_pickle(folder: Path) -> Path:
    path = folder / "evil.bin"
    torch.save({"function": os.system}, path)
    return path


def write_file(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("")
    return path


def new(folder: Path) -> Path:
    return folder / "new"


BAD_INPUT = {
    "no prompts file": ({"prompts": "missing.txt"}, "missing.txt is not a file"),
    "no prompts": ({"prompts": write_file}, "no prompts in it"),
    "no source of prompts": ({"prompts": None}, "--prompts FILE or --dataset_name"),
    "two sources of prompts": ({"dataset_name": "x"}, "--prompts FILE or --dataset_name"),
    "unknown reward": ({"reward": "jpg_compressibility"}, "unknown reward"),
    "unknown reward module": ({"reward": "no_such_module:score"}, "no_such_module"),
    "reward that raises": ({"reward": "own_reward:raises"}, "no network"),
    "reward that is NaN": ({"reward": "own_reward:nan"}, "nan"),
    "reward of another shape": ({"reward": "own_reward:wrong_shape"}, "shape"),
    "unknown scheduler": ({"scheduler": "dpm"}, "--scheduler"),
    "timesteps for euler ancestral": ({"scheduler": "euler_ancestral", "timesteps": [999, 499]}, "takes no"),
    "deterministic": ({"scheduler": "ddim", "eta": 0.0}, "eta 0"),
    "eta without use": ({"eta": 0.5}, "takes no eta"),
    "one step": ({"num_inference_steps": 1}, "one-step schedule"),
    "resolution": ({"resolution": 36}, "--resolution 36 is not a multiple of 8: pass 32 or 40"),
    "too many trained steps": ({"train_timesteps": 4}, "--train_timesteps 4"),
    "output_dir is a file": ({"output_dir": write_file}, "is a file"),
    "guidance": ({"guidance_scale": 5.0}, "--guidance_scale 5.0"),
    "distilled UNet of another architecture": ({"distilled_unet": write_other_unet}, "other_unet.safetensors"),
    "a pickle that is no weights": ({"distilled_unet": write_pickle}, "weights"),
    "no pipeline": ({"pretrained_model_name_or_path": write_file}, "model_index.json"),
    "no such pipeline": ({"pretrained_model_name_or_path": "./nowhere"}, "does not exist"),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-99"}, "checkpoint-99 does not exist"),
    "another rank": ({"rank": 8, "resume_from_checkpoint": "latest"}, "rank 4"),
    "fp16 on a CPU": ({"mixed_precision": "fp16", "resume_from_checkpoint": None, "output_dir": new}, "needs a GPU"),
    "fp16 after another precision": ({"mixed_precision": "fp16"}, "pass --mixed_precision no or bf16"),
    "8-bit Adam after Adam": ({"use_8bit_adam": True}, "drop --use_8bit_adam"),
    "seed": ({"seed": 2**32}, "--seed"),
    "infinite learning rate": ({"learning_rate": "inf"}, "--learning_rate"),
    "beta1": ({"adam_beta1": 1}, "--adam_beta1"),
    "end of the learning rate schedule": ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "--learning_rate"),
    "variant": ({"variant": "fp16"}, "drop --variant"),
    "name on the hub": ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "--hub_model_id"),
    "xformers without a GPU": ({"enable_xformers_memory_efficient_attention": True}, "drop the flag"),
    "no batch": ({"train_batch_size": 0}, "--train_batch_size"),
    "one sample": ({"samples_per_prompt": 1}, "--samples_per_prompt"),
    "LoRA target": ({"lora_target_modules": ["nonsense"]}, "nonsense"),
    "validation steps": ({"validation_timesteps": [100, 200]}, "descend"),
}


@pytest.fixture(scope="session")
def earlier_run(tiny_pipeline_dir, workspace, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "out"
    changes = {"output_dir": folder, "max_train_steps": 2, "checkpointing_steps": 2}
    return run(to_flags(default_flags(tiny_pipeline_dir, workspace, folder) | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are fine on a GPU")
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_that_says_what_to_do(flags, earlier_run, tmp_path, capsys, name):
    changes, message = BAD_INPUT[name]
    changes = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
    folder = shutil.copytree(earlier_run, tmp_path / "out")
    files = {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}
    with pytest.raises(SystemExit) as stop:
        run(flags(**{"resume_from_checkpoint": "latest", "max_train_steps": 4} | changes))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1
    assert message in errors[0]
    assert files and all(path.read_bytes() == content for path, content in files.items())


def test_missing_packages_and_launchers_are_named(flags, monkeypatch, capsys):
    find_spec = arguments.importlib.util.find_spec
    absent = {"bitsandbytes", "wandb"}
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    for changes, message in [
        ({"use_8bit_adam": True}, "pip install bitsandbytes"),
        ({"report_to": "wandb"}, "pip install wandb"),
    ]:
        with pytest.raises(SystemExit):
            run(flags(**changes))
        assert message in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit):
        run(flags())
    assert "DEEPSPEED" in capsys.readouterr().err


def test_flags_that_cannot_work_are_refused_before_a_model_is_loaded(flags, earlier_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_models", lambda *args: pytest.fail("the model is loaded"))
    monkeypatch.setattr(training, "make_accelerator", lambda *args: pytest.fail("the accelerator is set up"))
    for changes in [
        {"lora_target_modules": ["to_q", "nonsense"]},
        {"output_dir": earlier_run, "resume_from_checkpoint": "latest", "use_8bit_adam": True},
        {"output_dir": earlier_run, "resume_from_checkpoint": "latest", "mixed_precision": "fp16"},
    ]:
        with pytest.raises(SystemExit) as stop:
            run(flags(**changes))
        assert stop.value.code == 2
    monkeypatch.setattr(os, "access", lambda folder, mode: str(folder) != str(tmp_path))
    with pytest.raises(SystemExit):
        run(flags(output_dir=tmp_path / "not" / "there"))


def test_an_upload_that_fails_says_how_to_make_up_for_it(flags, monkeypatch, capsys):
    def fail(**values):
        raise RuntimeError("connection lost\nin the middle")

    monkeypatch.setattr(training, "create_repo", lambda name, **_: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(training, "upload_folder", fail)
    with pytest.raises(SystemExit):
        run(flags(max_train_steps=1, push_to_hub=True, hub_model_id="panda"))
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    folder = Path(flags()[flags().index("--output_dir") + 1])
    assert "connection lost" in error and f"hf upload me/panda {folder} --exclude 'checkpoint-*'" in error
    assert (folder / "pytorch_lora_weights.safetensors").is_file() and (folder / "README.md").is_file()


def test_an_unexpected_error_keeps_its_traceback(flags, monkeypatch):
    def fail(*args):
        raise ValueError("not of this project's code")

    monkeypatch.setattr(train_pso_online, "choose_pairs", fail)
    with pytest.raises(ValueError, match="not of this project"):
        run(flags())


def test_a_distilled_unet_file_replaces_the_pipelines_unet(flags, tiny_pipeline_dir, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir, subfolder="unet")
    save_file({key: value * 0.5 for key, value in unet.state_dict().items()}, tmp_path / "unet.safetensors")
    plain = run(flags(output_dir=tmp_path / "plain", max_train_steps=1))
    distilled = run(
        flags(output_dir=tmp_path / "other", max_train_steps=1, distilled_unet=tmp_path / "unet.safetensors")
    )
    assert metrics(plain)[0]["reward_mean"] != metrics(distilled)[0]["reward_mean"]
