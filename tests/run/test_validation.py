"""Validation's scores and pictures; the scripts' tests hold that it draws what the pipeline draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from pso_utils.rewards import Rewards, RewardSpec
from pso_utils.run.grids import before_and_after, image_grid, shorten
from pso_utils.run.validation import summarize_scores


def rewards(**weights: float) -> Rewards:
    return Rewards([lambda images, prompts: 0] * len(weights), [RewardSpec(*item, None) for item in weights.items()])


def test_a_validations_standard_error_is_over_prompts_as_in_the_evaluation():
    scores = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)  # rewards, prompts, images of each
    rows = torch.from_numpy(scores).flatten(1)
    values = summarize_scores(rewards(one=1.0, two=-0.5), rows, 4)
    for name, expected in {"one": scores[0], "two": scores[1], "reward": scores[0] - 0.5 * scores[1]}.items():
        assert values[f"validation/{name}_mean"] == pytest.approx(expected.mean(), abs=1e-6)
        error = stats.sem(expected.mean(axis=1))
        assert values[f"validation/{name}_standard_error"] == pytest.approx(error, rel=1e-5)
    # of one prompt over its images, and of one image there is none; of one reward there is no name
    one_prompt = summarize_scores(rewards(one=1.0), rows[:1, :4], 4)
    assert one_prompt["validation/reward_standard_error"] == pytest.approx(stats.sem(scores[0, 0]), rel=1e-5)
    assert summarize_scores(rewards(one=1.0), rows[:1, :1], 1).keys() == {"validation/reward_mean"}


def test_grids_are_enlarged_without_blur_and_prompts_are_shortened():
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue", "red")]
    grid = np.asarray(image_grid(images, 2))
    assert grid.shape == (2 * 96 + 2, 2 * 96 + 2, 3)  # enlarged by 3, a gap of 2 pixels
    assert (grid[:96, 98:] == (0, 255, 0)).all() and (grid[98:, :96] == (0, 0, 255)).all()
    picture = before_and_after(images, images, ["fox " * 5_000, ""], 2)
    assert picture.width > 2 * grid.shape[1] and picture.height > grid.shape[0]
    measured = []
    font = type("Font", (), {"getlength": lambda self, text: measured.append(text) or 8.0 * len(text)})()
    assert shorten("fox\n" * 5_000, 80, font) == "fox fox f…"
    assert len(measured) < 100
