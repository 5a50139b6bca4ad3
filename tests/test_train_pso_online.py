"""The online script end to end, on a tiny random SDXL pipeline."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from script_runs import (
    ROOT,
    Event,
    HostSynchronizations,
    around_microbatches,
    assert_nearly_same_run,
    assert_same_run,
    assert_same_weights,
    between_backward_calls,
    cuda_synchronizations_are_errors,
    error_line,
    interrupted_at,
    metrics,
    readme_flags,
    run_killed_and_resumed,
    run_with_a_learnt_lora,
    to_flags,
    two_processes,
    watch_moves,
    weights,
)

import train_pso_online
from pso_utils.errors import UserError
from pso_utils.families import Family
from pso_utils.rewards import Rewards
from pso_utils.run import hub, models, result
from pso_utils.run.accelerator import check_launcher
from tests.conftest import build_pipeline


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
    return score(images, prompts) * (len(calls) <= 2)  # an epoch is two batches

def raises(images, prompts):
    raise RuntimeError("no network")

validations = []

def fails_in_validations(images, prompts):
    if prompts[0] == "validated animal":
        validations.append(1)
        if len(validations) > 1:
            raise RuntimeError("the scorer is out of order")
    return score(images, prompts)

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


def test_each_microbatch_and_step_costs_one_call_of_the_model_with_gradient_and_one_without(flags, denoiser_calls):
    run(flags(max_train_steps=2))
    assert denoiser_calls == [(False, True, 4)] * 8 + [(False, False, 4)] * 6 + [(True, True, 4)] * 6


def test_the_base_is_computed_once_for_several_inner_epochs(flags, denoiser_calls):
    run(flags(max_train_steps=6, num_inner_epochs=3, train_timesteps=2))
    assert denoiser_calls == [(False, True, 4)] * 8 + [(False, False, 4)] * 4 + [(True, True, 4)] * 12


def test_ties_cost_no_call_of_the_model_and_stop_the_run_after_some_epochs(flags, denoiser_calls, capsys):
    with pytest.raises(SystemExit) as stop:
        run(flags(reward="own_reward:all_ties", max_tie_epochs=2))
    assert stop.value.code == 2
    assert denoiser_calls == [(False, True, 4)] * 16
    assert "nothing but ties" in error_line(capsys.readouterr().err)


def test_a_run_that_ties_stop_keeps_what_it_has_learned(flags, tmp_path):
    with pytest.raises(SystemExit):
        run(flags(reward="own_reward:ties_later", max_tie_epochs=1))
    saved = weights(tmp_path / "out" / "checkpoint-2")
    assert all(value.abs().sum() > 0 for value in saved.values())


def test_a_smaller_minibatch_steps_with_its_own_count(flags, denoiser_calls):
    folder = run(flags(reward="own_reward:ties", num_train_epochs=1, max_train_steps=None))
    assert metrics(folder)[0]["ties"] == 1  # of the epoch's four prompts, so three pairs: minibatches of two and one
    assert [batch for grad, _, batch in denoiser_calls if grad] == [4] * 3 + [2] * 3
    assert [line["step"] for line in metrics(folder)] == [1, 2]


def test_a_minibatch_clipped_on_all_sides_has_no_gradient(flags):
    first, second = metrics(run(flags(max_train_steps=2, num_inner_epochs=2, train_batch_size=4, clip_range=1e-9)))
    assert first["grad_norm"] > 0 and second["grad_norm"] == 0  # the update took every ratio out of the range
    assert second["target_clipped_low"] + second["target_clipped_high"] == pytest.approx(1)
    assert second["reference_clipped_low"] + second["reference_clipped_high"] == pytest.approx(1)


def test_what_is_offloaded_moves_once_an_epoch(flags, monkeypatch):
    """Two epochs of two batches."""
    load_family, to, moves = models.load_family, Rewards.to, []

    def load_and_watch(*args):
        family = load_family(*args)
        for name in (*family.text_encoder_classes, "vae"):
            watch_moves(getattr(family.pipeline, name), name, moves)
        return family

    monkeypatch.setattr(models, "load_family", load_and_watch)
    monkeypatch.setattr(
        Rewards, "to", lambda self, device: (moves.append(("rewards", str(device))), to(self, device))[1]
    )
    run(flags(offload=True, gradient_checkpointing=True, enable_vae_tiling=True))
    assert [name for name, device in moves if device == "cpu"].count("vae") == 2
    assert [name for name, device in moves if device == "cpu"].count("text_encoder") == 2  # a prompt is new in each
    assert [name for name, _ in moves].count("rewards") == 1 + 2 * 2  # when they are loaded, then there and back


def test_host_synchronizations_are_noticed():
    mode = HostSynchronizations()
    with mode:
        tensor = torch.zeros(3)
        tensor[1].item(), torch.tensor(1.0), bool(tensor[0]), tensor.to("cpu"), tensor.tolist(), tensor.nonzero()
        tensor.to(torch.float64), tensor[torch.zeros(2).long()], tensor.sum() / 3  # these are none
    assert len([name for name in mode.found if "_local_scalar_dense" in name]) >= 2
    for name in ("aten.lift_fresh", "to cpu", "tolist", "aten.nonzero"):
        assert any(found.startswith(name) for found in mode.found), name
    assert not any("_to_copy" in name or "index" in name for name in mode.found)


def test_the_update_does_not_make_the_host_wait(flags, monkeypatch):
    mode = HostSynchronizations()
    with around_microbatches(monkeypatch, train_pso_online, lambda: mode):
        run(flags(max_train_steps=2, gradient_checkpointing=True))
    assert mode.found == [] and mode.num_operations > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose synchronizations CUDA itself reports")
def test_the_update_does_not_synchronize_with_the_gpu(flags, monkeypatch):
    with around_microbatches(monkeypatch, train_pso_online, cuda_synchronizations_are_errors):
        run(flags(max_train_steps=2))


def test_few_functions_run_between_two_microbatches_of_the_readmes_command(tiny_pipeline_dir, tmp_path, monkeypatch):
    """There, a minibatch is one microbatch, at each of three trained steps."""
    changes = {"pretrained_model_name_or_path": tiny_pipeline_dir, "reward": "jpeg_compressibility"}
    changes |= {"output_dir": tmp_path / "out", "max_train_steps": 2, "num_validation_images": 0}
    changes |= {"sample_batch_size": 2, "sample_batches_per_epoch": 2, "samples_per_prompt": 2}
    with between_backward_calls(monkeypatch) as intervals:
        run([*readme_flags("demo"), *to_flags(changes)])
    intervals = [interval.functions for interval in intervals if not interval.has_step]
    functions = set().union(*intervals)
    print(f"{len(functions)} functions:", *sorted(functions), sep="\n  ")
    assert len(intervals) == 4
    assert 4 <= len(functions) <= 8


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


def test_trained_steps_are_distinct_stochastic_and_keyed_by_the_prompt():
    keys = [(0, 3, prompt_index) for prompt_index in range(200)]
    steps = train_pso_online.draw_step_index(keys, num_steps=5, num_trained=2)
    assert steps.min() == 0 and steps.max() == 3  # the last of five steps, 4, has no density
    assert (steps[:, 0] < steps[:, 1]).all()
    assert torch.equal(steps[50:60], train_pso_online.draw_step_index(keys[50:60], num_steps=5, num_trained=2))


@pytest.mark.parametrize("num_pairs", [[7, 7], [7, 2], [0, 3], [4, 4, 1], [0]])
def test_an_inner_epochs_minibatches_have_each_process_s_pairs_once_and_a_common_count(num_pairs):
    drawn = [
        list(train_pso_online.draw_minibatches(3, 0, inner_epoch, num_pairs, rank=rank, per_rank=3))
        for inner_epoch in range(2)
        for rank in range(len(num_pairs))
    ]
    for minibatches, total in zip(drawn, num_pairs * 2):
        assert sorted(torch.cat([torch.empty(0), *(minibatch.index for minibatch in minibatches)])) == list(
            range(total)
        )
    for inner_epoch in (drawn[: len(num_pairs)], drawn[len(num_pairs) :]):
        for minibatches in zip(*inner_epoch, strict=True):  # as many on each process, though some are empty
            assert {minibatch.count for minibatch in minibatches} == {sum(len(m.index) for m in minibatches)}
            assert max(len(minibatch.index) for minibatch in minibatches) <= 3
    if num_pairs == [7, 7]:
        orders = [torch.cat([minibatch.index for minibatch in minibatches]).tolist() for minibatches in drawn]
        assert orders[0] != orders[2]  # each inner epoch has an order of its own


@pytest.mark.parametrize("use_ema", [None, True])
def test_saved_lora_in_a_fresh_pipeline_draws_what_training_drew_last(flags, tiny_pipeline_dir, use_ema):
    changes = {"num_validation_images": 2, "validation_prompts": ["apple food"]}
    folder = run(flags(**changes, use_ema=use_ema))
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
    assert (folder / f"{folder.name}.safetensors").is_file()


@pytest.mark.parametrize(
    "changes, timesteps",
    [
        ({"scheduler": "euler", "timesteps": [999, 749, 499, 249]}, [999.0, 749.0, 499.0, 249.0]),
        ({"scheduler": "tcd", "train_timesteps": 1, "validation_num_inference_steps": 2}, [999, 749, 499, 249]),
        ({"scheduler": "ddim", "validation_eta": 0.0}, [999, 749, 499, 249]),
        ({"scheduler": "lcm", "original_inference_steps": 50}, [999, 759, 499, 259]),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) if isinstance(changes, dict) else "",
)
def test_schedulers_and_deployment_settings_train_and_validate(flags, changes, timesteps):
    changes |= {"max_train_steps": 1, "num_validation_images": 1, "validation_prompts": ["apple food"]}
    folder = run(flags(**changes))
    assert [line["step"] for line in metrics(folder)] == [0, 1, 1]
    assert f"| trained timesteps | {timesteps} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "num_validation_images": 1, "gradient_checkpointing": True},
        {"reward_combination": "pareto", "samples_per_prompt": 3, "scale_lr": True, "reward_dtype": "bf16"},
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
        "validation_prompts": ["apple food"],
    }
    events = {
        # an epoch has 2 steps and samples by 8 calls of the model
        "sampling of epoch 1": Event("diffusers:UNet2DConditionModel.forward", 6, step=2),
        "after optimizer step 5": Event("accelerate:Accelerator.backward", step=5),
        "while checkpoint 4 is written": Event("os:fsync", 2, step=4),
        "between checkpoint 4 and its validation": Event("PIL.Image:Image.save", path="step-000004"),
        "after the validation of checkpoint 4": Event("PIL.Image:Image.save", path="step-000004", is_over=True),
    }
    run_killed_and_resumed("train_pso_online", to_flags(values), tmp_path, events)
    undisturbed = tmp_path / "undisturbed"
    steps = [line["step"] for line in metrics(undisturbed) if "loss" in line]
    assert steps == list(range(1, 8))
    assert [line["step"] for line in metrics(undisturbed) if "loss" not in line] == [0, 4, 7]
    for event in events:
        assert_same_run(tmp_path / event, undisturbed)
        assert tensorboard_steps(tmp_path / event) == steps
    assert not list(tmp_path.glob("*/*.partial"))

    # A half-written newest checkpoint: the one before it is used.
    half = shutil.copytree(undisturbed, tmp_path / "half")
    newest = sorted(half.glob("checkpoint-*"))[-1]
    assert newest.name == "checkpoint-6"
    os.truncate(newest / "training_state.pt", 100)
    (half / "finished.json").unlink()
    run(to_flags(values | {"output_dir": half, "resume_from_checkpoint": "latest"}))
    assert_same_run(half, undisturbed)


def test_a_checkpoint_is_written_before_the_validation_of_its_step(flags, tmp_path, monkeypatch):
    """A run killed in between makes up for the validation when it is resumed, and logs it once."""
    changes = {"checkpointing_steps": 2, "validation_steps": 2, "num_validation_images": 1}
    changes |= {"validation_prompts": ["apple food"]}
    whole, half = run(flags(output_dir=tmp_path / "whole", **changes)), tmp_path / "half"
    picture = Path("validation", "step-000002.png")
    with interrupted_at(monkeypatch, picture.name):
        run(flags(output_dir=half, **changes))
    assert (half / "checkpoint-2" / "manifest.json").is_file() and not (half / picture).exists()
    run(flags(output_dir=half, resume_from_checkpoint="latest", **changes))
    assert_same_run(half, whole)
    assert [line["step"] for line in metrics(half) if "loss" not in line] == [0, 2, 4]
    assert (half / picture).read_bytes() == (whole / picture).read_bytes()


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "pso_online"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_8bit_adam_trains_and_resumes_bit_for_bit(flags, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    changes = {"use_8bit_adam": True, "rank": 64, "checkpointing_steps": 2}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    half = run(flags(output_dir=tmp_path / "half", **changes | {"max_train_steps": 2}))
    state = torch.load(half / "checkpoint-2" / "training_state.pt", weights_only=True)["optimizer"]["state"][0]
    state |= state.pop("__bnb_optimizer_quant_state__", {})
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    run(flags(output_dir=half, resume_from_checkpoint="latest", **changes))
    assert_same_run(half, whole)
    assert f"resuming from {half / 'checkpoint-2'}" in caplog.text
    assert f"the LoRA and its model card are in {half}" in caplog.text


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_is_written_over_an_earlier_run(flags, capsys, caplog):
    """A finished run, one without its checkpoints, one that is not finished; a resume with nothing left to do."""
    changes = {"max_train_steps": 2, "checkpointing_steps": 2}
    folder = run(flags(**changes))
    before = files(folder)
    assert (folder / "checkpoint-2").is_dir() and not (folder / "run.lock").exists()
    run(flags(resume_from_checkpoint="latest", **changes))
    lines = capsys.readouterr().err.splitlines()
    assert "is finished, after 2 steps: pass a larger --max_train_steps" in lines[-1]
    for left in ("finished", "checkpoint-2", "finished.json"):
        with pytest.raises(SystemExit) as stop:
            run(flags(**changes))
        assert stop.value.code == 2
        error = error_line(capsys.readouterr().err)
        assert "pass another one, delete the" in error and "go on" in error and "_checkpoint latest" in error
        assert files(folder) == before
        if left == "finished":
            shutil.rmtree(folder / "checkpoint-2")
        else:
            (folder / "finished.json").unlink(missing_ok=True)
        before = files(folder)


def test_a_longer_run_does_not_begin_anew_over_a_result_whose_checkpoints_are_gone(flags, capsys):
    folder = run(flags(max_train_steps=2, checkpointing_steps=2))
    shutil.rmtree(folder / "checkpoint-2")
    before = files(folder)
    with pytest.raises(SystemExit) as stop:
        run(flags(max_train_steps=4, resume_from_checkpoint="latest"))
    assert stop.value.code == 2 and files(folder) == before
    assert "has the result of a finished run of 2 steps: pass another one" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "number, exit_code, event",
    [
        (signal.SIGTERM, 143, ("Accelerator.backward", 8)),  # 2 steps an epoch, of 3 calls each: in epoch 1's first
        (signal.SIGINT, 130, ("Family.decode_latents", 4)),  # 2 calls an epoch: after sampling
    ],
)
def test_a_signal_within_an_epoch_writes_its_start(flags, tmp_path, monkeypatch, capfd, number, exit_code, event):
    changes = {"max_train_steps": 6, "checkpointing_steps": 100, "lr_scheduler": "cosine"}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_at(patch, event, number)
        run(flags(**changes))
    assert stop.value.code == exit_code
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"stopped by {number.name}: \S*checkpoint-2 is written, go on from it by .* latest", line)
    folder = run(flags(resume_from_checkpoint="latest", **changes))
    assert_same_run(folder, whole)


def signal_at(patch, event: tuple[str, int], number: signal.Signals):
    """Sends a signal to this process at a call of a function."""
    (owner, name), count = event[0].split("."), event[1]
    owner = {"Accelerator": Accelerator, "Family": Family}[owner]
    plain, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(number)
        return plain(*args, **kwargs)

    patch.setattr(owner, name, call)


def test_a_signal_before_anything_is_learnt_ends_the_run_and_leaves_the_folder_free(flags, monkeypatch, capfd):
    for event in (("Family.decode_latents", 1), ("Accelerator.backward", 4)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            signal_at(patch, event, signal.SIGHUP)
            run(flags())
        assert stop.value.code == 143
        assert capfd.readouterr().err.splitlines()[-1].startswith("stopped by SIGHUP")
    folder = run(flags())
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]


def test_a_signal_while_sampling_does_not_wait_for_the_rest_of_the_epoch(flags, monkeypatch):
    plain, calls = train_pso_online.sample, []

    def sample(*args, **settings):
        calls.append(1)
        if len(calls) == 3:  # the first of two batches of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return plain(*args, **settings)

    monkeypatch.setattr(train_pso_online, "sample", sample)
    with pytest.raises(SystemExit) as stop:
        run(flags())
    assert stop.value.code == 143 and len(calls) == 3


@pytest.mark.parametrize("is_folder_gone", [False, True])
def test_a_run_that_an_exception_ends_leaves_its_lora(flags, tmp_path, monkeypatch, caplog, is_folder_gone):
    def fail(*args):
        shutil.rmtree(tmp_path / "out")
        if is_folder_gone:
            (tmp_path / "out").write_text("a file: no folder can be made there")
        raise RuntimeError("the reward's server is down")

    with pytest.raises(RuntimeError, match="the reward's server is down"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        score, calls = train_pso_online.score_samples, []
        fail_later = lambda *args: (calls.append(1), fail() if len(calls) > 2 else score(*args))[1]  # noqa: E731
        monkeypatch.setattr(train_pso_online, "score_samples", fail_later)
        run(flags(checkpointing_steps=100))
    (line,) = [record.message for record in caplog.records if "LoRA of step 2 is in" in record.message]
    folder = Path(line.split(" is in ")[1])
    assert folder.parent == tmp_path and (folder == tmp_path / "out") != is_folder_gone
    assert all(value.abs().sum() > 0 for value in weights(folder).values())


def test_a_run_that_cannot_write_a_checkpoint_leaves_its_lora(flags, tmp_path, monkeypatch, capsys):
    replace = os.replace

    def fail(source, target):
        if Path(target).name.startswith("checkpoint-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SystemExit) as stop:
        run(flags(checkpointing_steps=2))
    assert stop.value.code == 2
    error = error_line(capsys.readouterr().err)
    assert "checkpoint-2 is not written: " in error and "No space left" in error and "no checkpoint before" in error
    assert all(value.abs().sum() > 0 for value in weights(tmp_path / "out").values())


def test_a_resumed_run_lists_what_differs_and_goes_on_for_longer(flags, tmp_path, caplog):
    whole = run(flags(output_dir=tmp_path / "whole", checkpointing_steps=2))
    half = run(flags(output_dir=tmp_path / "half", max_train_steps=2, checkpointing_steps=2))
    moved = half.rename(tmp_path / "moved")
    shutil.copy("prompts.txt", tmp_path / "prompts.txt")
    run(flags(output_dir=moved, prompts=tmp_path / "prompts.txt", resume_from_checkpoint="latest"))
    assert_same_run(moved, whole)
    assert "--max_train_steps: 4 now, 2 when checkpoint-2 was written" in caplog.text
    assert "--checkpointing_steps: None now, 2 when" in caplog.text
    assert f"--prompts: {tmp_path / 'prompts.txt'} now" in caplog.text


def test_a_lora_that_is_not_finite_is_no_result_and_the_latest_checkpoint_is_named(flags, monkeypatch, capsys):
    def spoil(self, folder, **settings):
        if Path(folder).name == "out":
            with torch.no_grad():
                next(p for p in self.denoiser.parameters() if p.requires_grad).fill_(float("nan"))
        save(self, folder, **settings)

    folder = run(flags(checkpointing_steps=2))
    before = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    save = Family.save_lora
    monkeypatch.setattr(Family, "save_lora", spoil)
    with pytest.raises(SystemExit):
        run(flags(checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest"))
    error = error_line(capsys.readouterr().err)
    assert "the LoRA is not finite" in error and "the latest checkpoint is checkpoint-6" in error
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_resuming_from_the_latest_of_only_damaged_checkpoints_starts_anew(flags, tmp_path, caplog):
    whole = run(flags(max_train_steps=2, checkpointing_steps=2))
    folder = shutil.copytree(whole, tmp_path / "damaged")
    (folder / "checkpoint-2" / "training_state.pt").unlink()
    (folder / "finished.json").unlink()
    run(flags(output_dir=folder, max_train_steps=2, checkpointing_steps=2, resume_from_checkpoint="latest"))
    assert_same_run(folder, whole)
    assert "checkpoint-2 is not whole (training_state.pt is missing)" in caplog.text


def test_validations_that_fail_later_are_warnings_and_the_run_has_its_lora_and_card(flags, caplog):
    changes = {"reward": "own_reward:fails_in_validations", "validation_prompts": ["validated animal"]}
    folder = run(flags(**changes, num_validation_images=1, validation_steps=2, report_to="tensorboard"))
    assert weights(folder) and "before_after" not in (folder / "README.md").read_text()
    assert (folder / "finished.json").exists() and not (folder / "before_after.png").exists()
    assert [line["step"] for line in metrics(folder) if "validation/reward_mean" in line] == [0]
    warnings = [record for record in caplog.records if record.levelname == "WARNING" and record.exc_info]
    assert [record.message.partition(":")[0] for record in warnings] == [
        "the validation at step 2 failed, the run goes on",
        "the validation at step 4 failed, the run goes on",
        "before_after.png cannot be drawn",
    ]
    assert all("the scorer is out of order" in record.message for record in warnings)


def test_the_first_validation_is_an_error_if_it_fails(flags):
    with pytest.raises(RuntimeError, match="no network"):
        run(flags(reward="own_reward:raises", num_validation_images=1))


# ---- Processes and places ----


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["transition", "denoising"])
def test_two_processes_train_on_what_one_would(tiny_pipeline_dir, workspace, tmp_path, monkeypatch, objective):
    """Where an epoch is one minibatch, for each process permutes its own pairs; but for rounding, since the batches of
    a call of the model differ. Ties leave the processes unlike numbers of pairs."""
    monkeypatch.chdir(workspace)
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "two") | {"reward": "own_reward:ties"}
    values |= {"num_validation_images": 1, "num_train_epochs": 2, "num_inner_epochs": 2, "max_train_steps": None}
    values |= {"adam_epsilon": 1e-4, "objective": objective}
    # Each process samples two batches of one prompt, and has up to two pairs; one process has them all.
    two = {"sample_batch_size": 1, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    two_processes("train_pso_online.py", to_flags(values | two))
    assert (workspace / "own_reward.py.world-2").exists()
    one = run(to_flags(values | {"output_dir": tmp_path / "one", "train_batch_size": 4}))
    assert [line.get("ties") for line in metrics(one) if "loss" in line] == [1, None, 0, None]
    assert_nearly_same_run(one, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_with_several_minibatches_have_the_mean_loss_of_one(
    tiny_pipeline_dir, workspace, tmp_path, monkeypatch
):
    """Each permutes its own pairs, so the minibatches hold others than one process's; with a learning rate that changes
    nothing, all of an epoch's together have the same mean. A tie leaves the processes 4 and 3 pairs."""
    monkeypatch.chdir(workspace)
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "two") | {"reward": "own_reward:ties"}
    values |= {"sample_batch_size": 4, "sample_batches_per_epoch": 1, "train_batch_size": 1}
    values |= {"max_train_steps": 4, "learning_rate": 1e-12}
    one = {"sample_batch_size": 8, "train_batch_size": 2, "output_dir": tmp_path / "one"}
    run_with_a_learnt_lora("train_pso_online", [(to_flags(values), 2), (to_flags(values | one), 1)])
    losses = np.array([[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")])
    assert abs(losses[0] - losses[1]).max() > 0.01
    one, two = losses @ [2, 2, 2, 1] / 7  # the pairs of each minibatch, on all processes
    assert one == pytest.approx(two, rel=1e-4) and abs(one - np.log(2)) > 0.01


def test_a_copy_of_the_script_runs_elsewhere_with_a_reward_beside_it(tiny_pipeline_dir, workspace, tmp_path):
    copy = shutil.copy(ROOT / "train_pso_online.py", tmp_path / "my_training.py")
    shutil.copy(workspace / "own_reward.py", tmp_path / "my_reward.py")
    (tmp_path / "elsewhere").mkdir()
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "out") | {"reward": "my_reward:score"}
    result = subprocess.run(
        [sys.executable, str(copy), *to_flags(values | {"max_train_steps": 1, "num_validation_images": 1})],
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


def test_long_prompts_of_several_lines_are_drawn_and_trained_on(flags, tmp_path):
    prompts = ["fox " * 5_000, "a fox\nin two lines\u2028or three"]
    (tmp_path / "long.json").write_text(json.dumps(prompts))
    folder = run(flags(prompts=tmp_path / "long.json", max_train_steps=1, num_validation_images=1))
    assert (folder / "before_after.png").is_file() and "fox" in (folder / "README.md").read_text()


@pytest.fixture
def repository(monkeypatch) -> dict:
    """The hub's answers; what was asked of it and uploaded, by name."""
    asked = {"is_private": True}

    def create(name, **values):
        asked.update(values)
        return type("Repo", (), {"repo_id": f"me/{name}"})

    def commit(repo_id, operations, **values):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        asked.update(values | {"repo_id": repo_id, "files": files})

    monkeypatch.setattr(hub, "create_repo", create)
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: type("Info", (), {"private": asked["is_private"]}))
    monkeypatch.setattr(hub, "create_commit", commit)
    return asked


PLANTED = """
.env id_rsa cache/0.safetensors references/step-000000/0.png best/pytorch_lora_weights.safetensors logs/README.md
validation/x.txt validation/sub/y.png validation/step-000009/z.png validation/private.png checkpoint-7/README.md
before_after.png.bak other/pytorch_lora_weights.safetensors before_after.jpg
""".split()


@pytest.mark.parametrize("is_here", [False, True], ids=["a folder", "the current folder"])
def test_what_leaves_the_machine_is_the_result_file_by_file(
    flags, repository, tiny_pipeline_dir, tmp_path, monkeypatch, capfd, caplog, is_here
):
    folder = tmp_path / "out"
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("the user's own")
    (folder / "validation" / "step-000008.png").symlink_to(folder / "id_rsa")
    if is_here:
        monkeypatch.chdir(folder)
    changes = {"num_validation_images": 1, "checkpointing_steps": 1, "hub_token": "hf_S3"}
    changes |= {"output_dir": "." if is_here else folder, "report_to": "tensorboard", "max_train_steps": 3}
    run(flags(push_to_hub=True, hub_model_id="panda", **changes))
    assert (folder / "checkpoint-2").is_dir() and (folder / "logs" / "pso_online").is_dir()
    assert repository["repo_id"] == "me/panda" and repository["private"] is True and repository["token"] == "hf_S3"
    assert set(repository["files"]) == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "out.safetensors",
        "before_after.png",
        "validation/step-000000.png",
        "validation/step-000003.png",
    }
    # neither paths nor the token leave it, and the token is written nowhere
    for content in repository["files"].values():
        assert not any(
            str(path).encode() in content for path in (tmp_path, Path(tiny_pipeline_dir).parent, Path.home())
        )
    assert f"from_pretrained('{Path(tiny_pipeline_dir).name}'" in repository["files"]["README.md"].decode()
    for path in folder.rglob("*"):
        assert not path.is_file() or b"hf_S3" not in path.read_bytes(), path
    output = capfd.readouterr()
    assert "hf_S3" not in output.out + output.err + caplog.text


def test_a_public_repository_is_uploaded_to_only_where_that_is_asked_for(flags, repository):
    repository["is_private"] = False
    accelerator = type("Accelerator", (), {"is_main_process": True})
    for changes, is_refused in (({}, True), ({"hub_public": True}, False)):
        args = train_pso_online.parse_args(flags(push_to_hub=True, hub_model_id="panda", **changes))
        if is_refused:
            with pytest.raises(UserError, match="me/panda is public: pass --hub_public"):
                hub.create_hub_repository(accelerator, args)
        else:
            assert hub.create_hub_repository(accelerator, args) == "me/panda" and repository["private"] is False


def test_an_upload_that_fails_says_how_to_make_up_for_it_without_the_token(flags, repository, tmp_path, monkeypatch):
    def fail(*args, **values):
        raise RuntimeError("connection lost with hf_given and hf_environment\nin the middle")

    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setattr(hub, "create_commit", fail)
    monkeypatch.setattr(hub, "create_repo", fail)
    changes = {"push_to_hub": True, "hub_model_id": "panda", "hub_token": " hf_given\n"}
    args = train_pso_online.parse_args(flags(**changes))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("")
    accelerator = type("Accelerator", (), {"is_main_process": True})
    for call in (lambda: hub.push_result("me/panda", args), lambda: hub.create_hub_repository(accelerator, args)):
        with pytest.raises(UserError) as error:
            call()
        assert "connection lost with *** and ***" in str(error.value) and "\n" not in str(error.value)
        assert error.value.__suppress_context__ and error.value.__cause__ is None
        if "hf upload" in str(error.value):
            assert f"hf upload me/panda {args.output_dir} . --include README.md" in str(error.value)


# ---- Bad input ----


def write_other_unet(folder: Path) -> Path:
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


def write_prompts(folder: Path) -> Path:
    path = folder / "others.txt"
    path.write_text("a cat\n")
    return path


def new(folder: Path) -> Path:
    return folder / "new"


NEW_RUN = {"resume_from_checkpoint": None, "output_dir": new}

BAD_INPUT = {
    "no prompts file": ({"prompts": "missing.txt"}, "missing.txt is not a file"),
    "no prompts": ({"prompts": write_file}, "no prompts in it"),
    "no source of prompts": ({"prompts": None}, "--prompts FILE or --dataset_name"),
    "two sources of prompts": ({"dataset_name": "x"}, "--prompts FILE or --dataset_name"),
    "unknown reward": ({"reward": "jpg_compressibility"}, "unknown reward"),
    "unknown reward module": ({"reward": "no_such_module:score"}, "no_such_module"),
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
    "a pickle that is no weights": ({"distilled_unet": write_pickle} | NEW_RUN, "weights"),
    "no pipeline": ({"pretrained_model_name_or_path": write_file}, "model_index.json"),
    "no such pipeline": ({"pretrained_model_name_or_path": "./nowhere"}, "does not exist"),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-99"}, "checkpoint-99 does not exist"),
    "another rank": ({"rank": 8, "resume_from_checkpoint": "latest"}, "rank 4"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"} | NEW_RUN, "needs a GPU"),
    "fp16 after another precision": ({"mixed_precision": "fp16"}, "pass --mixed_precision no or bf16"),
    "8-bit Adam after Adam": ({"use_8bit_adam": True}, "drop --use_8bit_adam"),
    "seed": ({"seed": 2**32}, "--seed"),
    "infinite learning rate": ({"learning_rate": "inf"}, "--learning_rate"),
    "beta1": ({"adam_beta1": 1}, "--adam_beta1"),
    "end of the learning rate schedule": (
        {"lr_scheduler": "polynomial", "learning_rate": 1e-8} | NEW_RUN,
        "--learning_rate",
    ),
    "variant": ({"variant": "fp16"} | NEW_RUN, "drop --variant"),
    "name on the hub": ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "--hub_model_id"),
    "a token that wandb records": ({"report_to": "wandb", "hub_token": "hf_secret"}, "set HF_TOKEN"),
    "resumed with another learning rate": ({"learning_rate": 1e-3}, "--learning_rate 0.01"),
    "resumed with another seed": ({"seed": 1}, "--seed 0"),
    "resumed with another reward": ({"reward": "own_reward:score"}, "--reward jpeg_compressibility"),
    "resumed with other prompts": ({"prompts": write_prompts}, "--prompts"),
    "resumed with another beta": ({"beta": 9}, "--beta 50"),
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
    error = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and message in error and "hf_secret" not in error
    assert files and all(path.read_bytes() == content for path, content in files.items())


def test_a_launcher_that_is_not_supported_is_named(flags, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit):
        run(flags())
    assert "DEEPSPEED" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE says that 2 processes run, but accelerate sees 1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS says that 4 processes run"),
        ({"SLURM_PROCID": "3"}, "this is SLURM's task 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_processes_that_accelerate_does_not_see_are_one_line(
    flags, monkeypatch, tmp_path, capsys, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        run(flags())
    assert stop.value.code == 2 and message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_what_a_launcher_sets_for_one_process_is_fine(flags, monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "WORLD_SIZE": "",
    }.items():
        monkeypatch.setenv(name, value)
    check_launcher(1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launcher(2)


@pytest.mark.slow
def test_accelerate_launch_starts_one_process(tiny_pipeline_dir, workspace, tmp_path):
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "one") | {"max_train_steps": 1}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", str(ROOT / "train_pso_online.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *to_flags(values)], check=True, env=environment, timeout=300)
    assert [line["step"] for line in metrics(tmp_path / "one")] == [1]


def test_flags_that_cannot_work_are_refused_before_a_model_is_loaded(flags, earlier_run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_family", lambda *args: pytest.fail("the model is loaded"))
    monkeypatch.setattr(train_pso_online, "make_accelerator", lambda *args: pytest.fail("the accelerator is set up"))
    for changes in [
        {"lora_target_modules": ["to_q", "nonsense"]},
        {"output_dir": earlier_run, "resume_from_checkpoint": "latest", "use_8bit_adam": True},
        {"output_dir": earlier_run, "resume_from_checkpoint": "latest", "mixed_precision": "fp16"},
    ]:
        with pytest.raises(SystemExit) as stop:
            run(flags(**changes))
        assert stop.value.code == 2


def test_an_unexpected_error_keeps_its_traceback(flags, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("not of what a user can mend")

    monkeypatch.setattr(train_pso_online, "select_pairs", fail)
    with pytest.raises(ValueError, match="not of what a user can mend"):
        run(flags())
    assert "error:" not in capsys.readouterr().err


def test_a_users_reward_that_raises_keeps_its_traceback(flags):
    with pytest.raises(RuntimeError, match="no network") as info:
        run(flags(reward="own_reward:raises"))
    assert "reward 'own_reward:raises' raised this" in info.value.__notes__[0]
    assert info.traceback[-1].name == "raises"


def test_a_distilled_unet_file_replaces_the_pipelines_unet(flags, tiny_pipeline_dir, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_dir, subfolder="unet")
    save_file({key: value * 0.5 for key, value in unet.state_dict().items()}, tmp_path / "unet.safetensors")
    plain = run(flags(output_dir=tmp_path / "plain", max_train_steps=1))
    distilled = run(
        flags(output_dir=tmp_path / "other", max_train_steps=1, distilled_unet=tmp_path / "unet.safetensors")
    )
    assert metrics(plain)[0]["reward_mean"] != metrics(distilled)[0]["reward_mean"]


# ---- Prompts on disk ----


def test_prompts_are_encoded_once_and_the_text_encoders_go(flags, tmp_path, monkeypatch):
    plain = run(flags(output_dir=tmp_path / "plain"))
    freed, free = [], Family.free_text_encoders
    monkeypatch.setattr(Family, "free_text_encoders", lambda self: (free(self), freed.append(self.text_encoders)))
    cached = run(flags(output_dir=tmp_path / "cached", cache_prompts=True))
    assert_same_run(plain, cached)
    assert freed == [[]]
    assert len(list((cached / "cache" / "prompts").rglob("*.safetensors"))) == len(PROMPTS)


# ---- The objective by denoising errors ----


DENOISING = {"objective": "denoising", "num_inner_epochs": 2}


def test_denoising_is_the_offline_loss_of_the_sampled_images(flags, monkeypatch):
    """The first loss and gradient, computed anew from diffusers' own scheduler and the bare UNet."""
    recorded, gains, step = {}, train_pso_online.pair_gains, train_pso_online.optimizer_step

    def record(family, schedule, weights, pairs):
        recorded.setdefault("call", (family, schedule, weights, pairs))
        return gains(family, schedule, weights, pairs)

    def record_step(accelerator, optimizer, lr_scheduler, parameters, **settings):
        recorded["gradients"] = [parameter.grad.clone() for parameter in parameters]
        recorded["before"] = [parameter.detach().clone() for parameter in parameters]
        return step(accelerator, optimizer, lr_scheduler, parameters, **settings)

    monkeypatch.setattr(train_pso_online, "pair_gains", record)
    monkeypatch.setattr(train_pso_online, "optimizer_step", record_step)
    folder = run(flags(**DENOISING, train_batch_size=4, max_train_steps=1, beta=20.0, target_anchor=7.0))
    family, schedule, _, pairs = recorded["call"]
    parameters = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
    for parameter, value in zip(parameters, recorded["before"]):
        parameter.data.copy_(value)

    timesteps = schedule.timesteps[(pairs.uniform * schedule.num_steps).long()].long().repeat(2)
    scheduler = LCMScheduler.from_config(family.pipeline.scheduler.config)
    latents = pairs.latents.flatten(0, 1)
    noisy = scheduler.add_noise(latents, pairs.noise.repeat(2, 1, 1, 1), timesteps)
    alphas = scheduler.alphas_cumprod[timesteps, None, None, None]

    def errors():
        output = family.predict(noisy, timesteps, pairs.conditioning)
        predicted = (noisy - (1 - alphas).sqrt() * output) / alphas.sqrt()
        return ((predicted - latents) ** 2).flatten(1).mean(1).view(2, -1)

    with torch.no_grad(), family.without_lora():
        base = errors()
    target, reference = base - errors()
    loss = (-torch.nn.functional.logsigmoid(20.0 * (target - reference)) + 7.0 * torch.relu(-target)).mean()
    assert metrics(folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, parameters)
    assert any(gradient.any() for gradient in gradients)
    for own, gradient in zip(recorded["gradients"], gradients):
        assert (own - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9


def test_denoising_samples_are_what_the_deployed_pipeline_draws(flags, monkeypatch):
    """By Euler, which has no density, and at one step."""
    drawn, generate = [], Family.generate
    monkeypatch.setattr(Family, "generate", lambda self, *args: drawn.append(args[2]) or generate(self, *args))
    changes = DENOISING | {"scheduler": "euler", "num_inference_steps": 1, "num_validation_images": 0}
    folder = run(flags(**changes, max_train_steps=2))
    assert {deployment.num_inference_steps for deployment in drawn} == {1}
    first, second = metrics(folder)
    assert first["base_distance"] == 0 < second["base_distance"]
    assert "| objective | denoising |" in (folder / "README.md").read_text()


def test_denoising_draws_new_levels_in_every_inner_epoch(flags, monkeypatch):
    seen, gains = [], train_pso_online.pair_gains
    monkeypatch.setattr(train_pso_online, "pair_gains", lambda *args: seen.append(args[3].noise) or gains(*args))
    run(flags(**DENOISING, train_batch_size=4, max_train_steps=2))
    first, second = seen
    assert first.shape == second.shape and not any(torch.equal(one, other) for one in first for other in second)


def test_denoising_resumes_to_the_same_bits(flags, tmp_path):
    changes = DENOISING | {"max_train_steps": 8, "checkpointing_steps": 4}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    shutil.copytree(whole / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = run(flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="latest", **changes))
    assert_same_weights(whole, resumed)
    assert [line for line in metrics(whole) if line["step"] > 4] == [
        line for line in metrics(resumed) if line["step"] > 4
    ]


def test_the_result_with_ema_is_the_average_of_the_steps_also_resumed(flags, tmp_path):
    """By diffusers' rule: average_n = average + (1 - decay_n) (lora_n - average), decay_n = n / (9 + n), n from 0."""
    changes = {"use_ema": True, "max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
    # an epoch is one optimizer step, so that there is a checkpoint of each
    changes |= {"train_batch_size": 16, "sample_batches_per_epoch": 1, "checkpointing_steps": 1}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    steps = [weights(whole / f"checkpoint-{step}") for step in range(1, 8)] + [weights(whole / "not_averaged")]
    average = steps[0]
    for number, lora in enumerate(steps[1:], start=1):
        decay = (1 + number) / (10 + number)
        average = {key: decay * average[key] + (1 - decay) * lora[key] for key in lora}
    result = weights(whole)
    assert all(torch.allclose(result[key], average[key], rtol=1e-5, atol=1e-8) for key in result)
    assert any(not torch.equal(result[key], steps[-1][key]) for key in result)

    shutil.copytree(whole / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = run(flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="latest", **changes))
    assert_same_weights(whole, resumed)
    assert_same_weights(whole / "not_averaged", resumed / "not_averaged")


def test_an_upload_that_fails_leaves_the_average_as_the_result(flags, repository, tmp_path, monkeypatch):
    """The run ends with an error then, which also saves a LoRA."""
    changes = {"use_ema": True, "push_to_hub": True, "hub_model_id": "panda"}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))

    def fail(*args, **values):
        raise RuntimeError("connection lost")

    monkeypatch.setattr(hub, "create_commit", fail)
    with pytest.raises(SystemExit):
        run(flags(output_dir=tmp_path / "failed", **changes))
    assert_same_weights(whole, tmp_path / "failed")
    assert any(not torch.equal(value, weights(whole / "not_averaged")[key]) for key, value in weights(whole).items())


def test_a_file_for_other_tools_that_cannot_be_written_is_a_warning(flags, tmp_path, caplog, monkeypatch):
    def fail(*args, **values):
        raise UserError("no room")

    monkeypatch.setattr(result, "export_run", fail)
    folder = run(flags(max_train_steps=2))
    assert weights(folder) and (folder / "finished.json").exists() and not (folder / "out.safetensors").exists()
    assert "there is no LoRA for other tools: no room; python -m pso_utils.convert makes it up" in caplog.text


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_users_file_is_not_written_over_by_the_lora_for_other_tools(flags, tmp_path, capsys, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        run(flags(resume_from_checkpoint=resume))
    assert "has a file out.safetensors, which the run would write over: move it" in error_line(capsys.readouterr().err)
    assert (tmp_path / "out" / "out.safetensors").read_text() == "mine"


@pytest.mark.parametrize("changes", [{"offload": True}, {"mixed_precision": "bf16"}], ids=str)
def test_denoising_runs_with(flags, changes):
    folder = run(flags(**DENOISING, **changes, max_train_steps=2))
    assert all(np.isfinite(line["loss"]) for line in metrics(folder) if "loss" in line)


def test_denoising_ends_with_nothing_but_ties(flags, capsys):
    with pytest.raises(SystemExit):
        run(flags(**DENOISING, reward="own_reward:all_ties", max_tie_epochs=2))
    assert "2 epochs in a row had nothing but ties" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weighting": "x0"}, "--weighting goes with --objective denoising, not transition: drop it"),
        (DENOISING | {"clip_range": 0.2}, "--clip_range goes with --objective transition, not denoising: drop it"),
        (DENOISING | {"train_timesteps": 1}, "--train_timesteps goes with --objective transition"),
        (DENOISING | {"weighting": "velocity"}, "--weighting velocity is for flow matching, and LCMScheduler is none"),
        (
            DENOISING | {"weighting": "mdp", "num_inference_steps": 1},
            "--weighting mdp needs a step before the last: pass --weighting epsilon or x0, or at least 2 steps",
        ),
    ],
    ids=str,
)
def test_flags_of_another_objective_are_refused(flags, capsys, changes, message):
    with pytest.raises(SystemExit):
        run(flags(**changes))
    assert error_line(capsys.readouterr().err).startswith(f"error: {message}")


def test_denoising_goes_on_with_the_deployment_that_drew_its_samples(flags, tmp_path, capsys):
    changes = DENOISING | {"max_train_steps": 4, "checkpointing_steps": 4, "num_validation_images": 0}
    folder = run(flags(**changes))
    changes |= {"max_train_steps": 8, "resume_from_checkpoint": "latest", "output_dir": folder}
    with pytest.raises(SystemExit):
        run(flags(**changes, validation_num_inference_steps=2))
    assert "this run asks for --validation_num_inference_steps 2" in error_line(capsys.readouterr().err)


SIGNALLED = """
import os, signal
import torch
from accelerate import PartialState

calls = []

def score(images, prompts):
    calls.append(1)
    if len(calls) == 3 and PartialState().process_index == 1:  # the second epoch's; it is read after that's first step
        os.kill(os.getpid(), signal.SIGTERM)
    return torch.rand(len(images), generator=torch.Generator().manual_seed(len(calls)))
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_writes_the_epochs_start(tiny_pipeline_dir, workspace, tmp_path):
    """Both have moved on since: what is written is what both had."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    values = default_flags(tiny_pipeline_dir, workspace, tmp_path / "out")
    values |= {"reward": "signalled:score", "max_train_steps": 8, "num_validation_images": 0}
    values["checkpointing_steps"] = 100  # none but the signal's
    with pytest.raises(subprocess.CalledProcessError):
        two_processes("train_pso_online.py", to_flags(values), python_path=[tmp_path])
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
