"""What the tests of the evaluation share: running it on the demo's model, and reading what it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.recipe.common import DEMO
from pso_utils.evaluate import __main__ as evaluate


TURBO, CLIP = str(DEMO / "emoji-turbo"), str(DEMO / "emoji-clip")
PROMPTS = ["red panda animal", "octopus animal", "vehicle", "grinning face", "sailboat vehicle", "cactus plant"]
REWARDS = ["--reward", "clip", "--reward_model", CLIP, "--reward", "jpeg_incompressibility"]


def flags(shared, output_dir, *more) -> list[str]:
    given = ["--pretrained_model_name_or_path", TURBO, "--resolution", "32", "--num_inference_steps", "2"]
    prompts = [] if "--dataset_name" in more or "--prompts" in more else ["--prompts", str(shared / "prompts.txt")]
    return [*given, "--output_dir", str(output_dir), *prompts, *map(str, more)]


def run(shared, output_dir, *more) -> dict:
    """Runs the evaluation; returns model -> its row of results.json, of the last number of steps."""
    evaluate.main(flags(shared, output_dir, *more))
    rows = json.loads((Path(output_dir) / "results.json").read_text())["rows"]
    return {row["model"]: row for row in rows}


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


def untimed(output_dir) -> list[dict]:
    """The rows of results.json without the times."""
    results = json.loads((Path(output_dir) / "results.json").read_text())
    for row in results["rows"]:
        del row["seconds_per_image"], row["images_per_second"]
    return results["rows"]


def pixels(output_dir, model, steps=2) -> np.ndarray:
    files = sorted(Path(output_dir, "images", model, f"steps-{steps}").glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])
