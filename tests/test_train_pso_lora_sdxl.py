"""The offline script end to end, on a tiny random SDXL pipeline."""

import io
import json
import logging
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import (
    ROOT,
    Event,
    HostSynchronizations,
    around_microbatches,
    assert_nearly_same_run,
    assert_same_run,
    between_backward_calls,
    cuda_synchronizations_are_errors,
    error_line,
    interrupted_at,
    metrics,
    readme_flags,
    run_killed_and_resumed,
    to_flags,
    two_processes,
    watch_moves,
    weights,
    without_result,
)

import train_pso_lora_sdxl
from pso_utils.data import minibatches
from pso_utils.data.pairs import load_preference_pairs
from pso_utils.errors import UserError
from pso_utils.families import Family
from pso_utils.families.denoising import predict_pairs
from pso_utils.families.sdxl import SDXL
from pso_utils.losses import denoising_error
from pso_utils.rewards import Rewards
from pso_utils.run import models
from tests.conftest import build_pipeline


pytestmark = pytest.mark.usefixtures("fresh_state")

CAPTIONS = ["red panda animal", "apple food", "grinning face", "cactus plant", "sailboat vehicle", "t-shirt clothes"]


def picture(index: int, red: bool) -> Image.Image:
    """A stripe at a place of its own, red or blue, on white, 40 x 32 px."""
    pixels = np.full((32, 40, 3), 255, np.uint8)
    pixels[:, 5 * index : 5 * index + 5] = (200, 20, 20) if red else (20, 20, 200)
    pixels[:, 5 * index] //= 2  # no picture is another one's mirror image
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """Six pairs in which red wins and a tie; the red ones as captioned images, and two of them as a concept's."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for index, caption in enumerate(CAPTIONS):
        first_is_red = index % 2 == 0
        images = [png(picture(index, red)) for red in (first_is_red, not first_is_red)]
        rows.append({"jpg_0": images[0], "jpg_1": images[1], "label_0": float(first_is_red), "caption": caption})
    rows.append(rows[0] | {"label_0": 0.5})
    Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    for name, count in (("style", 6), ("concept", 2)):
        (folder / name).mkdir()
        for index in range(count):
            picture(index, red=True).save(folder / name / f"{index}.png")
    lines = [{"file_name": f"{index}.png", "text": caption} for index, caption in enumerate(CAPTIONS)]
    (folder / "style" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def task_flags(tasks: Path, task: str) -> dict:
    return {
        "preference": {"task": "preference", "dataset_name": tasks / "pairs.parquet"},
        "style": {"task": "style", "train_data_dir": tasks / "style"},
        "concept": {
            "task": "concept",
            "instance_data_dir": tasks / "concept",
            "instance_prompt": "sks apple food",
            "class_prompt": "apple food",
            "num_reference_images": 3,
        },
    }[task]


def default_flags(pipeline_dir, output_dir) -> dict:
    return {
        "pretrained_model_name_or_path": pipeline_dir,
        "resolution": 32,
        "output_dir": output_dir,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "num_validation_images": 0,
        "report_to": "none",
    }


@pytest.fixture
def flags(tiny_pipeline_dir, tasks, tmp_path):
    """A function from a task and changes to flags: four steps of two pairs, unless changed."""

    def build(task: str = "preference", **changes) -> list[str]:
        return to_flags(default_flags(tiny_pipeline_dir, tmp_path / "out") | task_flags(tasks, task) | changes)

    return build


def run(flags: list[str]) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_pso_lora_sdxl.main(flags)
    return Path(flags[flags.index("--output_dir") + 1])


# ---- Cost ----


@pytest.mark.parametrize(
    "loss, calls",
    [
        ("sigmoid", [(False, False, 4), (True, True, 4)]),
        ("hinge", [(True, True, 4)]),
        ("diffusion", [(True, True, 2)]),
    ],
)
def test_calls_of_the_model_for_a_microbatch_of_two_pairs_which_make_the_host_wait_for_nothing(
    flags, denoiser_calls, monkeypatch, loss, calls
):
    mode = HostSynchronizations()
    with around_microbatches(monkeypatch, train_pso_lora_sdxl, lambda: mode):
        run(flags(loss=loss, max_train_steps=2))
    assert denoiser_calls == calls * 2
    assert mode.found == [] and mode.num_operations > 500


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose synchronizations CUDA itself reports")
@pytest.mark.parametrize("loss", train_pso_lora_sdxl.LOSSES)
def test_the_update_does_not_synchronize_with_the_gpu(flags, monkeypatch, loss):
    with around_microbatches(monkeypatch, train_pso_lora_sdxl, cuda_synchronizations_are_errors):
        run(flags("concept", loss=loss, max_train_steps=2))


def test_the_class_anchor_rides_in_the_same_calls_of_the_model(flags, tmp_path, denoiser_calls):
    run(flags("concept", max_train_steps=1))
    assert denoiser_calls[-2:] == [(False, False, 6), (True, True, 6)]  # two targets, two references, and those again
    run(flags("concept", max_train_steps=1, class_anchor=0, output_dir=tmp_path / "other"))
    assert denoiser_calls[-2:] == [(False, False, 4), (True, True, 4)]


def test_the_diffusion_loss_draws_no_references_and_its_card_has_no_pso(flags, denoiser_calls):
    folder = run(flags("style", loss="diffusion", max_train_steps=1))
    assert denoiser_calls == [(True, True, 2)] and not (folder / "references").exists()
    card = (folder / "README.md").read_text()
    assert "| method | plain diffusion loss |" in card and "| beta |" not in card and "| weighting |" not in card


def test_few_functions_run_between_two_microbatches_of_the_readmes_command(
    tiny_pipeline_dir, tasks, tmp_path, monkeypatch
):
    """There, a microbatch is an optimizer step: its update, the step's bookkeeping and the next one's reading, which is
    not counted. A checkpoint is every sixth step's."""
    changes = {"pretrained_model_name_or_path": tiny_pipeline_dir, "dataset_name": tasks / "pairs.parquet"}
    changes |= {"output_dir": tmp_path / "out", "max_train_steps": 5, "checkpointing_steps": 6}
    changes |= {"train_batch_size": 4, "num_validation_images": 1}  # two steps an epoch
    with between_backward_calls(monkeypatch) as intervals:
        run([*readme_flags("preference"), *to_flags(changes)])
    functions, data_loading = (set().union(*sets) for sets in list(zip(*intervals))[:2])
    print(f"{len(functions)} functions:", *sorted(functions), sep="\n  ")
    print(f"{len(data_loading)} of data loading, not counted:", *sorted(data_loading), sep="\n  ")
    assert all(interval.has_step for interval in intervals) and len(intervals) == 4
    assert 8 <= len(functions) <= 19 and len(data_loading) <= 40


def test_what_is_offloaded_moves_at_most_once_a_minibatch(flags, tmp_path, monkeypatch):
    load_family, backward, moves = models.load_family, Accelerator.backward, []

    def load_and_watch(*args):
        family = load_family(*args)
        for name in (*family.text_encoder_classes, "vae"):
            watch_moves(getattr(family.pipeline, name), name, moves)
        return family

    monkeypatch.setattr(models, "load_family", load_and_watch)
    monkeypatch.setattr(Accelerator, "backward", lambda *args: (moves.append("backward"), backward(*args))[1])
    changes = {"offload": True, "train_batch_size": 1, "gradient_accumulation_steps": 4, "max_train_steps": 2}
    changes |= {"checkpointing_steps": 9}
    run(flags(**changes))
    there = [(name, "cpu") for name in ("text_encoder", "text_encoder_2", "vae")]
    back = [(name, "meta") for name in ("text_encoder", "text_encoder_2", "vae")]
    first, second = moves[: moves.index("backward")], moves[moves.index("backward") + 4 : -2]
    assert sorted(first) == sorted(there + back) and moves[len(first) : len(first) + 4] == ["backward"] * 4
    assert sorted(second) == sorted(there + back) and moves[-2:] == ["backward"] * 2
    moves.clear()
    changes |= {"sample_batch_size": 2, "output_dir": tmp_path / "style"}
    run(flags("style", **changes))  # three batches of references, and what they need
    before = [move for move in moves[: moves.index("backward")] if move != "backward"]
    assert before.count(("text_encoder", "cpu")) == 1
    rest = "".join("|" if move == "backward" else "v" * (move == ("vae", "cpu")) for move in moves)
    assert re.fullmatch(r"vv\|{4}v\|{2}", rest)


def test_a_cached_runs_rewards_stay_where_they_are(flags, monkeypatch):
    moves, to = [], Rewards.to
    monkeypatch.setattr(Rewards, "to", lambda self, device: (moves.append(str(device)), to(self, device))[1])
    changes = {"cache_latents": True, "center_crop": True, "num_validation_images": 1, "validation_steps": 1}
    run(flags(reward="jpeg_compressibility", max_train_steps=2, **changes))
    assert len(moves) == 1  # when they are loaded


# ---- What is computed ----


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "epsilon", "scheduler": "euler_ancestral"},
        {"weighting": "x0", "scheduler": "ddim", "eta": 0},
        {"weighting": "mdp"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_training_tells_targets_from_references(flags, changes):
    defaults = {"beta": 2000, "target_anchor": 0, "rank": 16, "learning_rate": 3e-3, "center_crop": True}
    changes = {"max_train_steps": 30, "train_batch_size": 6} | defaults | changes
    first, *_ = lines = metrics(run(flags(**changes)))
    assert first["pair_accuracy"] == 0.5 and first["target_gain"] == first["reference_gain"] == 0
    target_gain, reference_gain, pair_accuracy = (
        np.mean([line[name] for line in lines[-10:]]) for name in ("target_gain", "reference_gain", "pair_accuracy")
    )
    assert target_gain > reference_gain and pair_accuracy > 0.5


@pytest.mark.parametrize(
    "task, changes, expected",
    [
        ("preference", {}, {"weighting": "mdp", "beta": 30, "target_anchor": 60, "reference_weight": 1}),
        ("preference", {"num_inference_steps": 1}, {"weighting": "x0", "beta": 10, "target_anchor": 10}),
        ("preference", {"scheduler": "ddim", "eta": 0}, {"weighting": "x0", "beta": 10}),
        ("preference", {"weighting": "epsilon"}, {"beta": 200, "target_anchor": 200, "class_anchor": 0}),
        ("preference", {"weighting": "epsilon", "beta": 7}, {"beta": 7, "target_anchor": 200}),
        ("preference", {"loss": "hinge"}, {"weighting": "epsilon", "beta": 5, "reference_weight": 0.5}),
        ("style", {}, {"weighting": "x0", "beta": 2, "reference_weight": 0.05, "class_anchor": 0}),
        ("style", {"weighting": "mdp", "beta": 1}, {"target_anchor": 0, "reference_weight": 1}),
        ("concept", {}, {"weighting": "x0", "beta": 2, "reference_weight": 0.2, "class_anchor": 10}),
        ("concept", {"weighting": "mdp", "beta": 1}, {"class_anchor": 10, "target_anchor": 0}),
        ("concept", {"class_anchor": 0}, {"class_anchor": 0}),
        ("style", {"loss": "diffusion"}, {"weighting": None, "beta": None}),
    ],
    ids=str,
)
def test_the_default_weighting_suits_the_schedule_and_the_other_defaults_the_weighting(flags, task, changes, expected):
    args = train_pso_lora_sdxl.parse_args(flags(task, **changes))
    info = models.check_model(args)
    schedule = models.training_schedule(args, info, stochastic=False)
    train_pso_lora_sdxl.set_loss_defaults(args, schedule)
    assert {flag: getattr(args, flag) for flag in expected} == expected


def test_the_settings_in_force_are_logged_and_in_the_card(flags, caplog):
    folder = run(flags("style", max_train_steps=1, resolution=32))
    settings = {"weighting": "x0", "beta": 2.0, "target_anchor": 2.0, "reference_weight": 0.05}
    assert "loss sigmoid" + "".join(f", {name} {value}" for name, value in settings.items()) + "\n" in caplog.text
    card = (folder / "README.md").read_text()
    assert all(f"| {name} | {value} |" in card for name, value in settings.items()) and "class_anchor" not in card


def test_the_class_anchor_holds_the_class_prompt(flags, tmp_path):
    """How far the class prompt's predictions are from those without LoRA, after the same training."""
    changes = {"max_train_steps": 40, "learning_rate": 3e-3, "rank": 16, "center_crop": True}
    drifts = []
    for anchor in (1e-6, 100):
        first, *_, last = metrics(
            run(flags("concept", output_dir=tmp_path / str(anchor), class_anchor=anchor, **changes))
        )
        assert first["class_drift"] == 0 and last["target_gain"] > 0
        drifts.append(last["class_drift"])
    assert drifts[1] < 0.2 * drifts[0]


@pytest.mark.parametrize("changes, timesteps", [({"num_inference_steps": 1}, [999]), ({"timesteps": 399}, [399])])
def test_a_one_step_schedule_trains(flags, changes, timesteps):
    folder = run(flags("style", max_train_steps=2, **changes))
    assert f"| trained timesteps | {timesteps} |" in (folder / "README.md").read_text()
    assert all(value.abs().sum() > 0 for value in weights(folder).values())


def test_the_diffusion_loss_and_the_hinge_lower_the_targets_error(flags, tmp_path):
    changes = {"max_train_steps": 30, "train_batch_size": 6, "center_crop": True, "learning_rate": 1e-2}
    for loss, name in (("diffusion", "loss"), ("hinge", "target_error")):
        lines = metrics(run(flags(loss=loss, output_dir=tmp_path / loss, **changes)))
        assert np.mean([line[name] for line in lines[-5:]]) < 0.9 * np.mean([line[name] for line in lines[:5]])


def test_the_update_does_not_depend_on_how_its_pairs_are_batched(flags, tmp_path):
    one = run(flags(output_dir=tmp_path / "one", train_batch_size=4))
    other = run(flags(output_dir=tmp_path / "other", train_batch_size=1, gradient_accumulation_steps=4))
    assert [line["pairs"] for line in metrics(one)] == [4, 2, 4, 2]  # six pairs: an epoch's last minibatch is smaller
    for ours, theirs in zip(metrics(one), metrics(other)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_repulsion_is_the_references_part_of_the_margin_of_the_last_steps():
    window = train_pso_lora_sdxl.REPULSION_WINDOW

    def last(gains: list[list[float]], reference_weight: float | None = None) -> dict[str, float]:
        """What is logged after steps of these gains of targets and references."""
        args, state = (
            SimpleNamespace(task="style", reference_weight=reference_weight),
            train_pso_lora_sdxl.OfflineState(),
        )
        for target_gain, reference_gain in gains:
            sums = {"target_gain": target_gain, "reference_gain": reference_gain}
            values = train_pso_lora_sdxl.watch_repulsion(args, state, sums)
        return values

    assert last([[3.0, -1.0]] * window) == {"repulsion": pytest.approx(0.25)}
    assert last([[3.0, -1.0]] * window, 0.5) == {"repulsion": pytest.approx(0.5 / 3.5)}
    assert last([[-1.0, -3.0]] * window) == {"repulsion": pytest.approx(1.5)}  # the targets' errors grew, too
    assert last([[9.0, 9.0], *[[3.0, -1.0]] * window]) == {"repulsion": pytest.approx(0.25)}  # the first is forgotten
    assert last([[3.0, -1.0]] * (window - 1)) == {}  # not enough steps yet
    assert last([[1.0, 1.0]] * window) == {}  # no margin


def test_a_run_that_pushes_the_losers_away_is_warned_of_once(flags, caplog, monkeypatch):
    monkeypatch.setattr(train_pso_lora_sdxl, "REPULSION_WINDOW", 2)
    monkeypatch.setattr(train_pso_lora_sdxl, "REPULSION_LIMIT", -1e9)  # any margin is above
    lines = metrics(run(flags(max_train_steps=8, learning_rate=1e-2, rank=16)))
    logged = [line["step"] for line in lines if "repulsion" in line]
    assert logged and logged[0] > 1
    assert sum("repulsion is" in record.message for record in caplog.records) == 1


def ipo(family, schedule, weights, pairs, args):
    """IPO (arXiv 2310.12036) on the errors of the clean latents, against the base."""
    step_index = (pairs.uniform * len(weights)).long()
    with torch.no_grad(), family.without_lora():
        base = predict_pairs(family, schedule, pairs, step_index)
    predicted = predict_pairs(family, schedule, pairs, step_index)
    errors = [denoising_error(pairs.latents, x0, weights[step_index]) for x0 in (base, predicted)]
    target_gain, reference_gain = errors[0] - errors[1]
    margin = target_gain - reference_gain
    return (margin - 1 / (2 * args.beta)) ** 2, {"margin": margin.detach()}


def test_a_loss_of_ones_own_is_one_entry(flags, monkeypatch):
    losses, entry = train_pso_lora_sdxl.LOSSES, train_pso_lora_sdxl.Loss
    settings = {"flags": ["beta"], "defaults": {}}
    monkeypatch.setitem(losses, "ipo", entry(ipo, metrics=["margin"], **settings))
    folder = run(flags(loss="ipo", beta=5, learning_rate=1e-2, max_train_steps=3))
    lines = metrics(folder)
    assert all({"loss", "margin"} <= line.keys() for line in lines) and lines[0]["loss"] == pytest.approx(0.01)
    assert "| loss | ipo |" in (folder / "README.md").read_text()
    monkeypatch.setitem(losses, "ipo", entry(ipo, metrics=["accuracy"], **settings))
    with pytest.raises(ValueError, match=r"--loss ipo returns \['margin'\], its entry has \['accuracy'\]"):
        run(flags(loss="ipo", beta=5, output_dir=folder / "other"))


# ---- Tasks ----


@pytest.mark.parametrize("task", ["preference", "style", "concept"])
def test_each_task_ends_with_a_lora_that_pipelines_load(flags, tiny_pipeline_dir, task):
    prompt = "apple food"
    folder = run(flags(task, num_validation_images=1, validation_prompts=[prompt], learning_rate=1e-2))
    drawn = np.asarray(Image.open(folder / "validation" / "step-000004.png"))[1::3, 1::3]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(folder)
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 32, "width": 32, "output_type": "np"}
    image = pipeline(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert np.abs(image * 255 - drawn).max() <= 1
    assert (folder / "before_after.png").is_file() and "offline PSO" in (folder / "README.md").read_text()


def write_layouts(folder: Path) -> dict[str, dict]:
    """Each layout of the README's "Your data", and its flags."""
    for name in ("style", "pairs/winner", "pairs/loser", "concept"):
        (folder / name).mkdir(parents=True)
    for index, caption in enumerate(CAPTIONS):
        for name in ("style", "pairs/winner", "pairs/loser"):
            picture(index, red="loser" not in name).save(folder / name / f"{index}.png")
        for name in ("style", "pairs/winner"):
            (folder / name / f"{index}.txt").write_text(caption)
    shutil.copytree(folder / "pairs", folder / "listed")
    lines = [
        {"winner": f"winner/{index}.png", "loser": f"loser/{index}.png", "caption": caption}
        for index, caption in enumerate(CAPTIONS)
    ]
    (folder / "listed" / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    picture(0, red=True).save(folder / "concept" / "0.png")
    picture(1, red=True).save(folder / "concept" / "1.png")
    (folder / "concept" / "1.txt").write_text("sks apple food, from behind")
    prompts = {"instance_prompt": "sks apple food", "class_prompt": "apple food", "num_reference_images": 2}
    return {
        "captions beside the images": {"task": "style", "train_data_dir": folder / "style"},
        "folders of winners and losers": {"task": "preference", "train_data_dir": folder / "pairs"},
        "a list of pairs": {"task": "preference", "train_data_dir": folder / "listed"},
        "images of a concept": {"task": "concept", "instance_data_dir": folder / "concept"} | prompts,
    }


def test_every_layout_of_a_folder_trains_as_the_same_data_do_otherwise(tiny_pipeline_dir, tasks, tmp_path):
    runs = {}
    for name, changes in write_layouts(tmp_path / "data").items():
        changes |= {"center_crop": True, "cache_latents": True, "output_dir": tmp_path / name}
        runs[name] = run(to_flags(default_flags(tiny_pipeline_dir, None) | changes))
    # records have the same order and ids as in the metadata file, and as the two lists have of each other
    style = task_flags(tasks, "style") | {"center_crop": True, "cache_latents": True, "output_dir": tmp_path / "other"}
    assert_same_run(runs["captions beside the images"], run(to_flags(default_flags(tiny_pipeline_dir, None) | style)))
    assert_same_run(runs["folders of winners and losers"], runs["a list of pairs"])
    assert weights(runs["images of a concept"])


def test_what_the_crop_to_a_square_cuts_off_is_told(flags, tmp_path, caplog):
    (tmp_path / "wide").mkdir()
    for index, width in enumerate([32, 42, 43, 80]):
        Image.new("RGB", (width, 32)).save(tmp_path / "wide" / f"{index}.png")
    run(flags("style", train_data_dir=tmp_path / "wide", instance_prompt="a fox", max_train_steps=1))
    assert "2 of 4 images lose more than 25% of their area to the crop to a square" in caplog.text


def test_references_are_the_pipelines_own_samples_of_the_captions(flags, tiny_pipeline_dir):
    folder = run(flags("style", max_train_steps=1))
    drawn = folder / "references" / "step-000000"
    lines = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == CAPTIONS
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 32, "width": 32, "output_type": "np"}
    image = pipeline(CAPTIONS[1], generator=torch.Generator().manual_seed(1_000_004), **settings).images[0]
    assert np.abs(image * 255 - np.asarray(Image.open(drawn / lines[1]["file_name"]))).max() <= 1


@pytest.mark.parametrize("policy", ["initial", "current"])
def test_references_are_refreshed_from_the_model_that_the_policy_names(flags, denoiser_calls, policy):
    changes = {"reference_policy": policy, "reference_refresh_steps": 2, "sample_batch_size": 6, "max_train_steps": 4}
    folder = run(flags("style", **changes))
    # none after the last step
    assert sorted(path.name for path in (folder / "references").iterdir()) == ["step-000000", "step-000002"]
    with_lora = [on for grad, on, size in denoiser_calls if size == 6]
    assert with_lora == [policy == "current"] * 8


def test_references_of_a_run_that_was_otherwise_trained_are_not_taken_over(flags, tmp_path):
    changes = {"reference_policy": "current", "reference_refresh_steps": 2, "max_train_steps": 3}
    changes |= {"checkpointing_steps": 9}  # none, or a new run would be refused in the folder
    without_result(run(flags("style", output_dir=tmp_path / "used", learning_rate=1e-3, **changes)))
    for folder in ("used", "fresh"):
        run(flags("style", output_dir=tmp_path / folder, learning_rate=1e-2, **changes))
    assert_same_run(tmp_path / "used", tmp_path / "fresh")
    for path in (tmp_path / "fresh" / "references").rglob("*.png"):
        assert (tmp_path / "used" / path.relative_to(tmp_path / "fresh")).read_bytes() == path.read_bytes()


# ---- Cache ----


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """What happens in which order: images that are opened, and microbatches that are encoded or trained on."""
    events, open_image, backward = [], Image.open, Accelerator.backward
    encode_images, encode_prompts = Family.encode_images, SDXL.encode_prompts

    def encode(self, pixels):
        events.extend(["encode"] * len(pixels))
        return encode_images(self, pixels)

    def encode_text(self, prompts):
        events.append("encode prompts")
        return encode_prompts(self, prompts)

    monkeypatch.setattr(Image, "open", lambda *args, **kw: (events.append("open"), open_image(*args, **kw))[1])
    monkeypatch.setattr(Family, "encode_images", encode)
    monkeypatch.setattr(SDXL, "encode_prompts", encode_text)
    monkeypatch.setattr(Accelerator, "backward", lambda *args: (events.append("backward"), backward(*args))[1])
    return events


def test_a_cache_encodes_each_image_once_and_trains_bit_for_bit_as_without_it(flags, tmp_path, opened):
    changes = {"center_crop": True, "random_flip": True, "max_train_steps": 6, "checkpointing_steps": 9}  # two epochs
    plain = run(flags("style", output_dir=tmp_path / "plain", **changes))
    opened.clear()
    changes["cache_prompts"] = True
    cached = run(flags("style", output_dir=tmp_path / "cached", cache_latents=True, **changes))
    assert_same_run(plain, cached)
    assert opened.count("encode") == 24  # six targets and six references, both ways round
    assert set(opened[opened.index("backward") :]) == {"backward"}
    opened.clear()
    without_result(cached)
    assert_same_run(run(flags("style", output_dir=cached, cache_latents=True, **changes)), plain)
    assert opened[:6] == ["open"] * 6 and set(opened[6:]) == {"backward"}  # the six files' headers, before the model


def test_a_cached_run_refreshes_references_that_another_one_began(flags):
    """The class prompt is embedded before the text encoders go, though at first no reference is drawn."""
    without_result(run(flags("concept", max_train_steps=1)))  # which ends before a checkpoint
    changes = {"cache_latents": True, "center_crop": True, "reference_refresh_steps": 2, "num_validation_images": 1}
    changes["cache_prompts"] = True
    folder = run(flags("concept", validation_prompts=["grinning face"], **changes))
    assert len(list((folder / "references" / "step-000002").glob("*.png"))) == 3


def test_references_are_cached_anew_at_each_refresh(flags, tmp_path, opened):
    changes = {"reference_policy": "current", "reference_refresh_steps": 2, "center_crop": True, "random_flip": True}
    changes |= {"checkpointing_steps": 9}
    plain = run(flags("style", output_dir=tmp_path / "plain", learning_rate=1e-2, **changes))
    opened.clear()
    cached = run(flags("style", output_dir=tmp_path / "cached", learning_rate=1e-2, cache_latents=True, **changes))
    assert_same_run(plain, cached)
    assert opened.count("encode") == 12 + 2 * 12  # targets, and references twice, both ways round
    assert opened.count("open") == 6 + 12 + 2 * 12  # the targets' headers first
    # With other references, the caches of both steps are not taken over
    without_result(cached)
    assert_same_run(run(flags("style", output_dir=cached, learning_rate=1e-3, cache_latents=True, **changes)),
                    run(flags("style", output_dir=tmp_path / "other", learning_rate=1e-3, **changes)))  # fmt: skip


def test_a_base_that_is_saved_anew_has_its_own_references_and_caches(flags, tmp_path):
    """Under the same name, with files of the same sizes."""
    changes = {"pretrained_model_name_or_path": tmp_path / "base", "cache_latents": True, "center_crop": True}
    changes |= {"max_train_steps": 1, "cache_prompts": True}
    build_pipeline(seed=0).save_pretrained(tmp_path / "base")
    first = run(flags("style", output_dir=tmp_path / "first", **changes))
    for folder in ("references", "cache"):
        shutil.copytree(first / folder, tmp_path / "used" / folder)
    build_pipeline(seed=1).save_pretrained(tmp_path / "base")
    for folder in ("used", "fresh"):
        run(flags("style", output_dir=tmp_path / folder, **changes))
    assert_same_run(tmp_path / "used", tmp_path / "fresh")
    for path in (tmp_path / "fresh" / "references").rglob("*.png"):
        assert (tmp_path / "used" / path.relative_to(tmp_path / "fresh")).read_bytes() == path.read_bytes()


# ---- Early stopping ----


def test_early_stopping_keeps_the_best_lora(flags, tmp_path, monkeypatch):
    (tmp_path / "falling.py").write_text(
        "rewards = [0.0, 2.0, 1.0, 1.0, 1.0]\ndef score(images, prompts):\n    return [rewards.pop(0)] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"reward": "falling:score", "early_stopping_patience": 2, "validation_steps": 1, "checkpointing_steps": 1}
    changes |= {"max_train_steps": 20, "num_validation_images": 1, "validation_prompts": ["apple food"]}
    folder = run(flags(**changes))
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3]
    best = load_file(folder / "checkpoint-1" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, weights(folder)[key]) for key, value in best.items())

    # Taken up before the validation of step 2, and after another run has had the folder `best`: the checkpoint has its
    # own
    save_file({key: value + 1 for key, value in best.items()}, folder / "best" / "pytorch_lora_weights.safetensors")
    for steps in (2, 3):
        (tmp_path / "falling.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
        sys.modules.pop("falling")
        run(flags(**changes | {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": steps}))
        assert all(torch.equal(value, weights(folder)[key]) for key, value in best.items())


# ---- Data ----


def test_a_stream_trains_on_the_same_pairs(flags, tmp_path, caplog):
    table = metrics(run(flags(output_dir=tmp_path / "table", max_train_steps=3)))
    assert "1 ties are left out, 6 pairs are kept" in caplog.text
    stream = metrics(run(flags(output_dir=tmp_path / "stream", max_train_steps=3, streaming=True)))
    assert "1 ties were left out in the latest pass" in caplog.text
    assert [line["pairs"] for line in stream] == [line["pairs"] for line in table] == [2, 2, 2]


def test_broken_images_are_counted_and_left_out(flags, tasks, tmp_path):
    folder = shutil.copytree(tasks / "style", tmp_path / "broken")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    changes = {"train_data_dir": folder, "skip_broken_images": True, "train_batch_size": 6, "max_train_steps": 1}
    (line,) = metrics(run(flags("style", **changes)))
    assert (line["pairs"], line["broken"]) == (5, 1)


def test_passes_are_counted_and_so_are_the_broken_pairs_of_steps_without_any(flags, tasks, tmp_path):
    rows = Dataset.from_parquet(str(tasks / "pairs.parquet"))
    rows = [row | ({"jpg_1": b"broken"} if index % 2 else {}) for index, row in enumerate(rows)]
    Dataset.from_list(rows).to_parquet(tmp_path / "half.parquet")
    changes = {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 1, "skip_broken_images": True}
    lines = metrics(run(flags(dataset_name=tmp_path / "half.parquet", **changes)))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["broken"] for line in lines] == sorted(line["broken"] for line in lines) and lines[-1]["broken"] >= 3


def test_captions_of_500_words_are_truncated_with_one_warning(flags, tasks, tmp_path, caplog):
    folder = shutil.copytree(tasks / "style", tmp_path / "long")
    lines = [{"file_name": f"{index}.png", "text": " ".join([caption] * 250)} for index, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(handler)
    try:
        assert len(metrics(run(flags("style", train_data_dir=folder)))) == 4
    finally:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(handler)
    (message,) = [text for text in [*records, *caplog.messages] if "oken" in text]
    assert "cut off after" in message and len(message) < 300


# ---- Interruption and processes ----


def test_a_stream_that_was_interrupted_sees_every_pair_once_an_epoch(flags, tasks, tmp_path, monkeypatch):
    """Of several shards, shuffled; the ids are those of the steps that the finished run consists of."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        shutil.copy(tasks / "pairs.parquet", tmp_path / "shards" / f"train-{shard:05d}-of-00003.parquet")
    seen, draw_noise = [], minibatches.draw_noise

    def record(record_ids, shape, *, seed, epoch):
        seen.extend((epoch, record_id) for record_id in record_ids)
        return draw_noise(record_ids, shape, seed=seed, epoch=epoch)

    monkeypatch.setattr(minibatches, "draw_noise", record)
    changes = {"dataset_name": tmp_path / "shards", "streaming": True, "checkpointing_steps": 3, "train_batch_size": 4}
    whole = run(flags(output_dir=tmp_path / "whole", max_train_steps=10, **changes))  # 5 steps an epoch, the last of 2
    undisturbed = seen.copy()
    assert Counter(undisturbed) == {(epoch, f"{s}-{row}"): 1 for epoch in (0, 1) for s in range(3) for row in range(6)}
    assert [i for e, i in undisturbed if e == 0] != [i for e, i in undisturbed if e == 1]
    for steps, done in ((5, 12), (8, 18 + 4)):  # stopped two steps after a checkpoint, with `done` pairs behind it
        seen.clear()
        half = tmp_path / f"half-{steps}"
        run(flags(output_dir=half, max_train_steps=steps, **changes))
        assert len(seen) > done and seen == undisturbed[: len(seen)]
        del seen[done:]
        run(flags(output_dir=half, max_train_steps=10, resume_from_checkpoint="latest", **changes))
        assert seen == undisturbed
        assert_same_run(half, whole)


def test_an_epoch_of_a_stream_goes_on_with_as_many_processes(tasks):
    stream = load_preference_pairs(str(tasks / "pairs.parquet"), streaming=True)
    table = load_preference_pairs(str(tasks / "pairs.parquet"))
    state = train_pso_lora_sdxl.OfflineState(position=4, num_processes=2)
    train_pso_lora_sdxl.check_stream_position(stream, state, 2)
    with pytest.raises(UserError, match="this epoch was begun by 2 processes, .* resume with 2"):
        train_pso_lora_sdxl.check_stream_position(stream, state, 3)
    train_pso_lora_sdxl.check_stream_position(table, state, 3)
    state.position = 0
    train_pso_lora_sdxl.check_stream_position(stream, state, 1)
    assert state.num_processes == 1


def test_a_signal_to_all_processes_ends_at_the_step_with_a_checkpoint(flags, tmp_path, monkeypatch, capfd):
    """The workers that read the images leave it to the run."""
    changes = {"max_train_steps": 5, "checkpointing_steps": 100, "dataloader_num_workers": 1}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    backward, calls = Accelerator.backward, []

    def interrupt(self, loss):
        calls.append(1)
        if len(calls) == 4:  # in the second epoch's first step
            workers = multiprocessing.active_children()
            assert len(workers) == 1
            for pid in (workers[0].pid, os.getpid()):
                os.kill(pid, signal.SIGTERM)
        backward(self, loss)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Accelerator, "backward", interrupt)
        run(flags(**changes))
    assert stop.value.code == 143 and len(calls) == 4
    assert "stopped by SIGTERM: " in capfd.readouterr().err.splitlines()[-1]
    folder = run(flags(resume_from_checkpoint="latest", **changes))
    assert (folder / "checkpoint-4").is_dir()
    assert_same_run(folder, whole)


def test_a_checkpoint_is_written_before_the_validation_of_its_step_which_a_resumed_run_makes_up_for(
    flags, tmp_path, monkeypatch
):
    changes = {"checkpointing_steps": 2, "validation_steps": 2, "num_validation_images": 1, "max_train_steps": 3}
    changes |= {"validation_prompts": ["apple food"]}
    picture = tmp_path / "out" / "validation" / "step-000002.png"
    with interrupted_at(monkeypatch, picture.name):
        run(flags(**changes))
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").is_file() and not picture.exists()
    run(flags(resume_from_checkpoint="latest", **changes))
    assert picture.exists() and [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tiny_pipeline_dir, tasks, tmp_path):
    values = default_flags(tiny_pipeline_dir, None) | task_flags(tasks, "style")
    values |= {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 4, "num_validation_images": 1}
    values |= {"lr_scheduler": "cosine", "reference_policy": "current", "reference_refresh_steps": 5}
    values |= {"cache_latents": True, "center_crop": True, "random_flip": True}
    events = {
        "while the 4th reference is drawn": Event("PIL.Image:Image.save", 4, path="references/step-000000"),
        "while the 5th latent is cached": Event("os:replace", 5, path="cache/latents"),
        "after optimizer step 5": Event("accelerate:Accelerator.backward", step=5),
        "while checkpoint 4 is written": Event("os:fsync", 2, step=4),
        "between checkpoint 4 and its validation": Event("PIL.Image:Image.save", path="validation/step-000004"),
    }
    run_killed_and_resumed("train_pso_lora_sdxl", to_flags(values), tmp_path, events)
    undisturbed = tmp_path / "undisturbed"
    assert [line["step"] for line in metrics(undisturbed) if "loss" in line] == list(range(1, 7))
    for event in events:
        assert_same_run(tmp_path / event, undisturbed)
        for folder in ("references", "cache"):
            theirs = {path for path in (undisturbed / folder).rglob("*") if path.is_file()}
            assert len(theirs) >= 12
            for path in theirs:
                assert (tmp_path / event / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()


def test_8bit_adam_and_streaming_resume_bit_for_bit(flags, tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"use_8bit_adam": True, "rank": 64, "streaming": True, "checkpointing_steps": 2}
    whole = run(flags(output_dir=tmp_path / "whole", **changes))
    half = run(flags(output_dir=tmp_path / "half", **changes | {"max_train_steps": 3}))
    run(flags(output_dir=half, resume_from_checkpoint="latest", **changes))
    assert_same_run(half, whole)


@pytest.mark.slow
def test_two_processes_train_on_what_one_would(tiny_pipeline_dir, tasks, tmp_path):
    values = default_flags(tiny_pipeline_dir, tmp_path / "two") | task_flags(tasks, "style")
    values |= {"num_validation_images": 1, "adam_epsilon": 1e-4}
    two_processes("train_pso_lora_sdxl.py", to_flags(values | {"train_batch_size": 2}))
    one = run(to_flags(values | {"output_dir": tmp_path / "one", "train_batch_size": 4}))
    assert [line["pairs"] for line in metrics(one)] == [4, 2, 4, 2]
    assert_nearly_same_run(one, tmp_path / "two")


def test_a_copy_of_the_script_runs_alone(tiny_pipeline_dir, tasks, tmp_path, monkeypatch):
    copy = shutil.copy(ROOT / "train_pso_lora_sdxl.py", tmp_path / "my_training.py")
    values = default_flags(tiny_pipeline_dir, tmp_path / "out") | task_flags(tasks, "preference")
    monkeypatch.setattr(sys, "argv", [copy.name, *to_flags(values | {"max_train_steps": 1, "loss": "diffusion"})])
    monkeypatch.chdir(tmp_path)
    for name in ("train_pso_lora_sdxl", "train_pso_online", "demo", "tests"):
        monkeypatch.setitem(sys.modules, name, None)  # what lies beside the original cannot be imported
    runpy.run_path(str(copy), run_name="__main__")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_bf16_trains(flags):
    folder = run(flags("concept", mixed_precision="bf16", gradient_checkpointing=True, max_train_steps=2))
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


# ---- Bad input ----

BAD_INPUT = {
    "no pairs": ("preference", {"dataset_name": None}, "--dataset_name"),
    "missing file": ("preference", {"dataset_name": "missing.parquet"}, "does not exist"),
    "another task's flag": ("preference", {"class_prompt": "x"}, "--class_prompt goes with --task concept"),
    "a prompt for a data set": ("preference", {"instance_prompt": "x"}, "--instance_prompt is for a folder's images"),
    "a folder and a data set": ("preference", {"train_data_dir": "."}, "pass either --dataset_name NAME or"),
    "a column of a folder": (
        "preference",
        {"dataset_name": None, "train_data_dir": ".", "winner_column": "a", "loser_column": "b"},
        "--winner_column is for --dataset_name",
    ),
    "missing column": ("preference", {"caption_column": "words"}, "words"),
    "no folder": ("style", {"train_data_dir": "missing"}, "is not a folder"),
    "another task's column": ("concept", {"image_column": "x"}, "--image_column goes with --task style, not concept"),
    "another task's number": ("style", {"num_reference_images": 5}, "--num_reference_images goes with --task concept"),
    "current policy without refresh": ("style", {"reference_policy": "current"}, "--reference_refresh_steps"),
    "class anchor without PSO": (
        "concept",
        {"loss": "hinge", "class_anchor": 1},
        "--class_anchor goes with --loss sigmoid, not hinge: drop it",
    ),
    "no default beta": (
        "style",
        {"weighting": "epsilon"},
        "--weighting epsilon has no default --beta",
    ),
    "beta of the diffusion loss": (
        "preference",
        {"loss": "diffusion", "beta": 1},
        "--beta goes with --loss sigmoid or hinge, not diffusion: drop it",
    ),
    "weighting of the diffusion loss": ("style", {"loss": "diffusion", "weighting": "x0"}, "--weighting goes with"),
    "the hinge's flag": ("preference", {"prior_loss_weight": 1}, "--prior_loss_weight goes with --loss hinge, not"),
    "PSO's flag": ("preference", {"loss": "hinge", "target_anchor": 1}, "--target_anchor goes with --loss sigmoid"),
    "a flag that is gone": ("preference", {"log_gradient_shares": True}, "--log_gradient_shares"),
    "no class prompt": ("concept", {"class_prompt": None}, "--class_prompt"),
    "mdp with one step": ("preference", {"weighting": "mdp", "num_inference_steps": 1}, "--weighting mdp"),
    "mdp without noise": ("preference", {"weighting": "mdp", "scheduler": "ddim", "eta": 0}, "--weighting mdp"),
    "cache with random crops": ("preference", {"cache_latents": True}, "--center_crop"),
    "reward model without reward": ("preference", {"reward_model": "x"}, "--reward_model does nothing"),
    "warm-up of a constant rate": ("preference", {"lr_warmup_steps": 5}, "constant_with_warmup"),
    "shuffle buffer of a table": ("preference", {"shuffle_buffer_size": 5}, "without --streaming"),
    "two validation schedules": (
        "style",
        {"validation_timesteps": [999, 499], "validation_num_inference_steps": 2},
        "pass one",
    ),
    "stream without an end": ("preference", {"streaming": True, "max_train_steps": None}, "--max_train_steps"),
    "early stopping without reward": ("preference", {"early_stopping_patience": 1}, "--reward"),
    "unknown loss": ("preference", {"loss": "mse"}, "--loss"),
    "resolution": ("preference", {"resolution": 36}, "not a multiple of 8"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_that_says_what_to_do(flags, capsys, name):
    task, changes, message = BAD_INPUT[name]
    with pytest.raises(SystemExit) as stop:
        run(flags(task, **changes))
    assert stop.value.code == 2 and message in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("content", [b"no image", png(picture(2, red=True))[:-30]], ids=["at once", "while training"])
def test_a_broken_image_names_its_file(flags, tasks, tmp_path, capsys, content):
    """By its header before a model is loaded; what is cut off later is met when it is read."""
    folder = shutil.copytree(tasks / "style", tmp_path / "broken")
    (folder / "2.png").write_bytes(content)
    with pytest.raises(SystemExit):
        run(flags("style", train_data_dir=folder, train_batch_size=6, max_train_steps=1))
    error = error_line(capsys.readouterr().err)
    assert "2.png" in error and "--skip_broken_images" in error


def test_an_unexpected_error_keeps_its_traceback(flags, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("not of what a user can mend")

    monkeypatch.setattr(train_pso_lora_sdxl, "watch_repulsion", fail)
    with pytest.raises(ValueError, match="not of what a user can mend"):
        run(flags())
