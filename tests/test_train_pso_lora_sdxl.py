"""The offline script end to end, on a tiny random SDXL pipeline."""

import json
import logging
import shutil
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
from script_runs import assert_same_run, metrics, run_killed_and_resumed, to_flags, two_processes, weights

import train_pso_lora_sdxl
from demo.tasks import to_png
from pso_utils import references, sdxl


pytestmark = pytest.mark.usefixtures("fresh_state")

CAPTIONS = ["red panda animal", "apple food", "grinning face", "cactus plant", "sailboat vehicle", "t-shirt clothes"]


def picture(index: int, red: bool) -> Image.Image:
    """A stripe at a place of its own, red or blue, on white, 40 x 32 px."""
    pixels = np.full((32, 40, 3), 255, np.uint8)
    pixels[:, 5 * index : 5 * index + 5] = (200, 20, 20) if red else (20, 20, 200)
    pixels[:, 5 * index] //= 2  # no picture is another one's mirror image
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """Six pairs in which red wins and a tie; the red ones as captioned images, and two of them as a concept's."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for index, caption in enumerate(CAPTIONS):
        first_is_red = index % 2 == 0
        images = [to_png(picture(index, red)) for red in (first_is_red, not first_is_red)]
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
def test_unet_calls_of_a_batch_of_two_pairs(flags, unet_calls, loss, calls):
    run(flags(loss=loss))
    assert unet_calls == calls * 4


def test_the_class_anchor_rides_in_the_same_unet_calls(flags, unet_calls):
    run(flags("concept", max_train_steps=1))
    assert unet_calls[-2:] == [(False, False, 6), (True, True, 6)]  # two targets, two references, and those once more
    run(flags("concept", max_train_steps=1, class_anchor=0))
    assert unet_calls[-2:] == [(False, False, 4), (True, True, 4)]


def test_the_diffusion_loss_draws_no_references(flags, unet_calls):
    folder = run(flags("style", loss="diffusion", max_train_steps=1))
    assert unet_calls == [(True, True, 2)] and not (folder / "references").exists()


# ---- What is computed ----


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "epsilon"},
        {"weighting": "x0"},
        {"weighting": "mdp"},
        {"scheduler": "euler_ancestral"},
        {"scheduler": "ddim", "eta": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_training_tells_targets_from_references(flags, changes):
    defaults = {"beta": 2000, "target_anchor": 0, "rank": 16, "learning_rate": 3e-3, "center_crop": True}
    changes = {"max_train_steps": 40, "train_batch_size": 6} | defaults | changes
    first, *_ = lines = metrics(run(flags(**changes)))
    assert first["pair_accuracy"] == 0.5 and first["target_gain"] == first["reference_gain"] == 0
    target_gain, reference_gain, pair_accuracy = (
        np.mean([line[name] for line in lines[-10:]]) for name in ("target_gain", "reference_gain", "pair_accuracy")
    )
    assert target_gain > reference_gain and pair_accuracy > 0.5


@pytest.mark.parametrize(
    "changes, weighting, beta",
    [
        ({}, "mdp", 30),
        ({"num_inference_steps": 1}, "x0", 10),
        ({"scheduler": "ddim", "eta": 0}, "x0", 10),
        ({"weighting": "epsilon"}, "epsilon", 200),
        ({"weighting": "epsilon", "beta": 7}, "epsilon", 7),
        ({"loss": "hinge"}, "epsilon", 5),
    ],
    ids=str,
)
def test_the_default_weighting_suits_the_schedule_and_the_default_beta_the_weighting(flags, changes, weighting, beta):
    card = (run(flags(max_train_steps=1, **changes)) / "README.md").read_text()
    assert f"| weighting | {weighting} |" in card and f"| beta | {float(beta)} |" in card


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


@pytest.mark.parametrize("changes, timestep", [({"num_inference_steps": 1}, 999), ({"timesteps": 399}, 399)])
def test_a_one_step_schedule_trains(flags, changes, timestep):
    folder = run(flags("style", log_gradient_shares=True, **changes))
    assert [line[f"gradient_share/{timestep}"] for line in metrics(folder)] == [1, 1, 1, 1]
    assert all(value.abs().sum() > 0 for value in weights(folder).values())


def test_the_diffusion_loss_and_the_hinge_lower_the_targets_error(flags, tmp_path):
    changes = {"max_train_steps": 40, "train_batch_size": 6, "center_crop": True, "learning_rate": 1e-2}
    for loss, name in (("diffusion", "loss"), ("hinge", "target_error")):
        lines = metrics(run(flags(loss=loss, output_dir=tmp_path / loss, **changes)))
        assert np.mean([line[name] for line in lines[-5:]]) < 0.9 * np.mean([line[name] for line in lines[:5]])


def test_the_update_does_not_depend_on_how_its_pairs_are_batched(flags, tmp_path):
    one = run(flags(output_dir=tmp_path / "one", train_batch_size=4))
    other = run(flags(output_dir=tmp_path / "other", train_batch_size=1, gradient_accumulation_steps=4))
    assert [line["pairs"] for line in metrics(one)] == [4, 2, 4, 2]  # six pairs: an epoch's last group is smaller
    for ours, theirs in zip(metrics(one), metrics(other)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_gradient_shares_add_up_and_leave_the_training_as_it_is(flags, tmp_path):
    plain = run(flags(output_dir=tmp_path / "plain", weighting="epsilon"))
    logged = run(flags(output_dir=tmp_path / "logged", weighting="epsilon", log_gradient_shares=True))
    for line in metrics(logged):
        assert sum(line[f"gradient_share/{t}"] for t in (999, 749, 499, 249)) == pytest.approx(1)
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(logged).items())


def test_the_diffusion_loss_has_no_gradient_shares_and_its_card_no_pso(flags):
    folder = run(flags(loss="diffusion", log_gradient_shares=True, max_train_steps=1))
    assert not any(name.startswith("gradient_share") for name in metrics(folder)[0])
    card = (folder / "README.md").read_text()
    assert "| method | plain diffusion loss |" in card and "| beta |" not in card


def test_gradient_shares_are_of_scaled_gradients(monkeypatch):
    """Those of fp16, whose smallest number is 6e-8."""
    accelerator, weight = Accelerator(cpu=True), torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**16))

    def step_loss(factors):
        return train_pso_lora_sdxl.StepLoss(weight.half().sum().float() * factors, torch.arange(2), {})

    batches = iter([(torch.tensor([1e-8, 3e-8]), 0)])
    _, shares = train_pso_lora_sdxl.accumulate_gradients(accelerator, [weight], step_loss, batches, 2, [], 2)
    assert shares == pytest.approx([0.25, 0.75], rel=0.01)


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
def test_references_are_refreshed_from_the_model_that_the_policy_names(flags, unet_calls, policy):
    changes = {"reference_policy": policy, "reference_refresh_steps": 2, "sample_batch_size": 6, "max_train_steps": 3}
    folder = run(flags("style", **changes))
    assert sorted(path.name for path in (folder / "references").iterdir()) == ["step-000000", "step-000002"]
    with_lora = [on for grad, on, size in unet_calls if size == 6]
    assert with_lora == [policy == "current"] * 8
    run(
        flags("style", **changes | {"output_dir": folder / "shorter", "max_train_steps": 2})
    )  # none after the last step
    assert [path.name for path in (folder / "shorter" / "references").iterdir()] == ["step-000000"]


def test_references_of_a_run_that_was_otherwise_trained_are_not_taken_over(flags, tmp_path):
    changes = {"reference_policy": "current", "reference_refresh_steps": 2, "max_train_steps": 3}
    for folder, rate in (("used", 1e-3), ("used", 1e-2), ("fresh", 1e-2)):
        run(flags("style", output_dir=tmp_path / folder, learning_rate=rate, **changes))
    assert_same_run(tmp_path / "used", tmp_path / "fresh")
    for path in (tmp_path / "fresh" / "references").rglob("*.png"):
        assert (tmp_path / "used" / path.relative_to(tmp_path / "fresh")).read_bytes() == path.read_bytes()


def test_references_are_those_of_their_targets_and_mirrored_with_them():
    drawn = torch.arange(6.0).view(6, 1, 1, 1) * 10 + torch.arange(4.0)  # the tens are the reference, the ones a column
    drawn = drawn.expand(6, 3, 4, 4)
    stand_in = SimpleNamespace(captions=["a"] * 6, pixels=lambda indices: drawn[indices])
    ids = [str(row) for row in range(10, 70, 10)]
    batch = SimpleNamespace(ids=ids[::-1], flipped=torch.tensor([True, False] * 3))
    places = {record_id: index for index, record_id in enumerate(ids)}

    args = SimpleNamespace(task="style", seed=0)
    pixels = train_pso_lora_sdxl.reference_pixels(args, stand_in, places, 0, batch)
    assert (pixels[:, 0, 0, 0] // 10).tolist() == [5, 4, 3, 2, 1, 0]
    assert (pixels[:, 0, 0, 0] % 10).tolist() == [3, 0] * 3

    args.task, drawn_numbers = "concept", set()
    for epoch in range(20):
        pixels = train_pso_lora_sdxl.reference_pixels(args, stand_in, places, epoch, batch)
        assert (pixels[:, 0, 0, 0] % 10).tolist() == [3, 0] * 3
        drawn_numbers |= set((pixels[:, 0, 0, 0] // 10).tolist())
    assert drawn_numbers == set(range(6))


def test_references_that_are_there_are_not_drawn_again(flags, unet_calls, tmp_path):
    folder = run(flags("concept", max_train_steps=1))
    (folder / "references" / "step-000000" / "000001.png").unlink()
    run(flags("concept", max_train_steps=1))
    sampled = [size for grad, _, size in unet_calls if not grad and size != 6]
    assert sampled == [3] * 4 + [1] * 4
    run(flags("concept", max_train_steps=1, class_prompt="grinning face"))  # other references
    assert [size for grad, _, size in unet_calls if not grad and size != 6][8:] == [3] * 4


# ---- Cache ----


def test_a_cache_encodes_each_image_once_and_trains_as_without_it(flags, tmp_path, monkeypatch):
    encoded, encode_images = [], sdxl.encode_images
    monkeypatch.setattr(
        "pso_utils.training.encode_images",
        lambda pipeline, pixels, *rest: (encoded.append(len(pixels)), encode_images(pipeline, pixels, *rest))[1],
    )
    changes = {"center_crop": True, "random_flip": True, "max_train_steps": 6}
    plain = run(flags("style", output_dir=tmp_path / "plain", **changes))
    encoded.clear()
    cached = run(flags("style", output_dir=tmp_path / "cached", cache_latents=True, **changes))
    assert sum(encoded) == 24  # six targets and six references, both ways round
    for ours, theirs in zip(metrics(plain), metrics(cached)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    encoded.clear()
    again = run(flags("style", output_dir=cached, cache_latents=True, **changes))
    assert not encoded and all(torch.equal(value, weights(cached)[key]) for key, value in weights(again).items())


def test_a_cached_run_refreshes_references_that_another_one_began(flags):
    """The class prompt is embedded before the text encoders go, though at first no reference is drawn."""
    run(flags("concept", max_train_steps=1))
    changes = {"cache_latents": True, "center_crop": True, "reference_refresh_steps": 2, "num_validation_images": 1}
    folder = run(flags("concept", validation_prompts=["grinning face"], **changes))
    assert len(list((folder / "references" / "step-000002").glob("*.png"))) == 3


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

    # Taken up where nothing is left to do, and after another run has had the folder `best`: the checkpoint has its own
    save_file({key: value + 1 for key, value in best.items()}, folder / "best" / "pytorch_lora_weights.safetensors")
    for steps in (1, 2):
        (tmp_path / "falling.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
        sys.modules.pop("falling")
        run(flags(**changes | {"resume_from_checkpoint": "checkpoint-1", "max_train_steps": steps}))
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


def test_captions_of_500_words_are_truncated_with_one_warning(flags, tasks, tmp_path, monkeypatch):
    folder = shutil.copytree(tasks / "style", tmp_path / "long")
    lines = [{"file_name": f"{index}.png", "text": " ".join([caption] * 250)} for index, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(sdxl._first_truncation, "warned", False)
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    assert len(metrics(run(flags("style", train_data_dir=folder)))) == 4
    (message,) = [text for text in records if "oken" in text]
    assert "truncated" in message and len(message) < 300


# ---- Interruption and processes ----


def test_a_stream_that_was_interrupted_sees_every_pair_once_an_epoch(flags, tasks, tmp_path, monkeypatch):
    """Of several shards, shuffled; the ids are those of the steps that the finished run consists of."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        shutil.copy(tasks / "pairs.parquet", tmp_path / "shards" / f"train-{shard:05d}-of-00003.parquet")
    seen, make_pairs = [], train_pso_lora_sdxl.make_pairs

    def record(*arguments):
        *_, epoch, batch = arguments
        seen.extend((epoch, record_id) for record_id in batch.ids)
        return make_pairs(*arguments)

    monkeypatch.setattr(train_pso_lora_sdxl, "make_pairs", record)
    changes = {"dataset_name": tmp_path / "shards", "streaming": True, "checkpointing_steps": 3, "train_batch_size": 4}
    whole = run(flags(output_dir=tmp_path / "whole", max_train_steps=10, **changes))  # 5 steps an epoch, the last of 2
    uninterrupted = seen.copy()
    assert Counter(uninterrupted) == {
        (epoch, f"{s}-{row}"): 1 for epoch in (0, 1) for s in range(3) for row in range(6)
    }
    assert [i for e, i in uninterrupted if e == 0] != [i for e, i in uninterrupted if e == 1]
    for steps, done in ((5, 12), (8, 18 + 4)):  # stopped two steps after a checkpoint, with `done` pairs behind it
        seen.clear()
        half = tmp_path / f"half-{steps}"
        run(flags(output_dir=half, max_train_steps=steps, **changes))
        assert len(seen) > done and seen == uninterrupted[: len(seen)]
        del seen[done:]
        run(flags(output_dir=half, max_train_steps=10, resume_from_checkpoint="latest", **changes))
        assert seen == uninterrupted
        assert_same_run(half, whole)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tiny_pipeline_dir, tasks, tmp_path):
    values = default_flags(tiny_pipeline_dir, None) | task_flags(tasks, "style")
    values |= {"max_train_steps": 8, "checkpointing_steps": 2, "validation_steps": 4, "num_validation_images": 1}
    values |= {"lr_scheduler": "cosine", "reference_policy": "current", "reference_refresh_steps": 5}
    places = {
        "references": ("pso_utils.references", "write_image", 4),
        "update": ("pso_utils.training", "optimizer_step", 6),
        "checkpoint": ("pso_utils.checkpoints", "_files", 2),
    }
    run_killed_and_resumed("train_pso_lora_sdxl", to_flags(values), tmp_path, places)
    assert [line["step"] for line in metrics(tmp_path / "none") if "loss" in line] == list(range(1, 9))
    for place in places:
        assert_same_run(tmp_path / place, tmp_path / "none")
        ours, theirs = tmp_path / place / "references", tmp_path / "none" / "references"
        for path in theirs.rglob("*.png"):
            assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes()


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
    for ours, theirs in zip(metrics(one), metrics(tmp_path / "two")):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    ours, theirs = weights(one), weights(tmp_path / "two")
    for key in ours:
        assert (ours[key] - theirs[key]).norm() <= 0.02 * ours[key].norm()


def test_bf16_trains(flags):
    folder = run(flags("concept", mixed_precision="bf16", gradient_checkpointing=True, max_train_steps=2))
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


# ---- Bad input ----

BAD_INPUT = {
    "no pairs": ("preference", {"dataset_name": None}, "--dataset_name"),
    "missing file": ("preference", {"dataset_name": "missing.parquet"}, "does not exist"),
    "another task's flag": ("preference", {"instance_prompt": "x"}, "--instance_prompt goes with --task concept"),
    "missing column": ("preference", {"caption_column": "words"}, "words"),
    "no folder": ("style", {"train_data_dir": "missing"}, "is not a folder"),
    "another task's column": ("concept", {"image_column": "x"}, "--image_column goes with --task style, not concept"),
    "another task's number": ("style", {"num_reference_images": 5}, "--num_reference_images goes with --task concept"),
    "current policy without refresh": ("style", {"reference_policy": "current"}, "--reference_refresh_steps"),
    "class anchor without PSO": (
        "concept",
        {"loss": "hinge", "class_anchor": 1},
        "--class_anchor goes with --loss",
    ),
    "no default beta": (
        "style",
        {"weighting": "epsilon"},
        "--weighting epsilon has no default --beta",
    ),
    "no class prompt": ("concept", {"class_prompt": None}, "--class_prompt"),
    "mdp with one step": ("preference", {"weighting": "mdp", "num_inference_steps": 1}, "--weighting mdp"),
    "mdp without noise": ("preference", {"weighting": "mdp", "scheduler": "ddim", "eta": 0}, "--weighting mdp"),
    "cache with random crops": ("preference", {"cache_latents": True}, "--center_crop"),
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
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1
    assert message in errors[0]


def test_a_broken_image_names_its_file_and_row(flags, tasks, tmp_path, capsys):
    folder = shutil.copytree(tasks / "style", tmp_path / "broken")
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run(flags("style", train_data_dir=folder, train_batch_size=6, max_train_steps=1))
    error = capsys.readouterr().err
    assert "2.png" in error and "row 2" in error and "--skip_broken_images" in error


def test_references_of_one_step_have_noise_of_their_own():
    class Settings:
        seed, captions = 3, ["a", "b"]

    seeds = {references.References._seed(Settings, step, index) for step in range(50) for index in range(2)}
    assert len(seeds) == 100
