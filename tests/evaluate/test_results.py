"""The tables and files, from one process and from two."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from evaluation_runs import CLIP, PROMPTS, REWARDS, flags, pixels, run, untimed
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from demo.recipe.common import DEMO
from pso_utils.evaluate import __main__ as evaluate
from pso_utils.rewards import load_rewards, parse_rewards


pytestmark = pytest.mark.usefixtures("fresh_state")

ROOT = DEMO.parent


def test_the_table_is_that_of_the_scores_image_by_image(shared, tmp_path):
    rows = run(shared, tmp_path, "--lora", f"a={shared / 'a'}", "--images_per_prompt", 2, *REWARDS)
    lines = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(lines) == 2 * 2 * len(PROMPTS)
    by_model = {name: [line for line in lines if line["model"] == name] for name in ("base", "a")}
    for name, score in rows["a"]["scores"].items():
        tuned, base = (np.array([line[name] for line in by_model[model]]) for model in ("a", "base"))
        assert score["mean"] == pytest.approx(tuned.mean()) and score["difference"] == pytest.approx(
            (tuned - base).mean()
        )
    assert [line["seed"] for line in by_model["a"]] == [line["seed"] for line in by_model["base"]]

    line = by_model["a"][3]
    image = Image.open(tmp_path / line["file"])
    assert line["prompt"] == PROMPTS[1] == image.info["prompt"] and line["image_index"] == 1
    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPImageProcessorPil.from_pretrained(CLIP)
    tokens = load_rewards(parse_rewards(["clip"], [CLIP])).rewards[0].tokenizer
    inputs = tokens([line["prompt"]], return_tensors="pt") | processor([image], return_tensors="pt")
    with torch.no_grad():
        logit = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
    assert line["clip"] == pytest.approx(logit, abs=1e-5)
    table = (tmp_path / "results.md").read_text()
    assert (
        "| model | steps | clip | gain | wins | jpeg_incompressibility |" in table and "images/s | s/image |" in table
    )


def test_several_numbers_of_steps_and_timesteps_are_rows_and_pictures_of_their_own(shared, tmp_path):
    more = ["--lora", f"a={shared / 'a'}", "--max_prompts", 2]
    evaluate.main(flags(shared, tmp_path, *more, *REWARDS, "--num_inference_steps", 4, 1))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["model"], row["steps"]) for row in rows] == [("base", "1"), ("base", "4"), ("a", "1"), ("a", "4")]
    assert (tmp_path / "steps.png").is_file() and len(list((tmp_path / "grids").iterdir())) == 2
    evaluate.main(flags(shared, tmp_path, *more, *REWARDS, "--num_inference_steps", 4))  # nothing of the others is left
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["steps-4.png"]
    assert not (tmp_path / "steps.png").exists()
    evaluate.main(flags(shared, tmp_path / "own", *more, "--timesteps", 999, 749, 499, 249))  # no reward: pictures only
    assert (pixels(tmp_path / "own", "a", "999-749-499-249") == pixels(tmp_path, "a", 4)).all()
    assert (tmp_path / "own" / "report.html").is_file() and not (tmp_path / "own" / "steps.png").exists()


def test_two_processes_give_the_table_of_one(shared, tmp_path):
    """Batches are the same, so the images are the same bits; what is summed over processes is a number and zeros."""
    more = ["--lora", f"a={shared / 'a'}", "--batch_size", 2, "--reward_batch_size", 3, *REWARDS]
    run(shared, tmp_path / "one", *more)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command += ["-m", "pso_utils.evaluate", *flags(shared, tmp_path / "two", *more)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert (pixels(tmp_path / "two", "a") == pixels(tmp_path / "one", "a")).all()
    for ours, theirs in zip(untimed(tmp_path / "two"), untimed(tmp_path / "one")):
        for name, score in ours["scores"].items():
            assert score.pop("interval", []) == pytest.approx(theirs["scores"][name].pop("interval", []), abs=1e-6)
            assert score == pytest.approx(theirs["scores"][name], abs=1e-6)
