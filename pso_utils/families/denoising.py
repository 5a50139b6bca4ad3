"""Pairs of clean latents at a schedule's noise levels, and by how much the LoRA brings the model closer to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from pso_utils.families.base import Conditioning, Family
from pso_utils.losses import denoising_error
from pso_utils.mdp import add_noise, predict
from pso_utils.schedules import Schedule


class NoisedPairs(NamedTuple):
    """b pairs at one noise level each, on the accelerator, as k rows of b: the targets, their references (k = 2) and,
    with a class prompt, the references once more, with that prompt (k = 3); or the targets alone (k = 1)."""

    latents: Tensor  # [k, b, C, h, w], clean
    noise: Tensor  # [b, C, h, w], shared by a pair
    uniform: Tensor  # [b], in [0, 1): which noise level
    conditioning: Conditioning  # of k * b


def predict_pairs(family: Family, schedule: Schedule, pairs: NoisedPairs, step_index: Tensor) -> Tensor:
    """Predicted clean latents [k, b, C, h, w] of the pairs at the steps `step_index` [b], by one call of the model."""
    rows = len(pairs.latents)
    steps = schedule.at(step_index.repeat(rows))
    sample = add_noise(steps, pairs.latents.flatten(0, 1), pairs.noise.repeat(rows, 1, 1, 1))
    model_output = family.predict(steps.columns.input_scale * sample, steps.timesteps, pairs.conditioning)
    return predict(steps, model_output, sample)[0].unflatten(0, (rows, -1))


def pair_gains(family: Family, schedule: Schedule, weights: Tensor, pairs: NoisedPairs) -> tuple[Tensor, Tensor]:
    """Gains and drift [k, b] of the pairs, by one call of the model without gradient and LoRA, and one with both.

        gain = d_base(x0) - d_theta(x0), the denoising errors at a noise level
        drift = the error between the two predictions themselves

    Args:
        weights: [M], of the error at each of the schedule's first M steps, among which `pairs.uniform` chooses.
    """
    step_index = (pairs.uniform * len(weights)).long()
    weight = weights[step_index]
    with torch.no_grad(), family.without_lora():
        base_predicted = predict_pairs(family, schedule, pairs, step_index)
    predicted = predict_pairs(family, schedule, pairs, step_index)
    base_error = denoising_error(pairs.latents, base_predicted, weight)
    gains = base_error - denoising_error(pairs.latents, predicted, weight)
    return gains, denoising_error(base_predicted, predicted, weight)
