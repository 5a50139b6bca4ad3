"""The online PSO loss as a pure function of log-ratios."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OnlinePSOLoss(NamedTuple):
    """Loss of each pair and its diagnostics. All are `[B]` and, but for `has_gradient`, float32.

    Attributes:
        loss: differentiable, not reduced.
        pair_accuracy: 1 where the target's log-ratio is the larger, 0 where the reference's is, 0.5 where they are
            equal (as before the first update). Log-ratios before the clamp.
        target_clipped_low, target_clipped_high, reference_clipped_low, reference_clipped_high: 1 where the clamp
            changed the ratio, and so stopped that sample's gradient.
        has_gradient: bool, `False` exactly where both samples are clipped: such a pair needs no backward pass.
    """

    loss: Tensor
    pair_accuracy: Tensor
    target_clipped_low: Tensor
    target_clipped_high: Tensor
    reference_clipped_low: Tensor
    reference_clipped_high: Tensor
    has_gradient: Tensor


def online_pso_loss(
    target_log_ratio: Tensor, reference_log_ratio: Tensor, beta: float, clip_range: float
) -> OnlinePSOLoss:
    r"""Online PSO loss of one transition of each pair, in float32 whatever the inputs' dtype.

        r      = log p_theta(x_{n-1} | x_n, c) - log p_ref(x_{n-1} | x_n, c)
        r_clip = log clamp(exp(r), 1 - clip_range, 1 + clip_range)
        loss   = -log sigmoid(beta * (r_clip(target) - r_clip(reference)))

    The clamp stops the gradient on both sides (PPO's would stop it on the far side only). A ratio that lies exactly on
    a bound still has its gradient.

    Args:
        target_log_ratio: `[B]`, r of the preferred samples.
        reference_log_ratio: `[B]`, r of the samples that they were preferred to.
        beta: strength of the preference, in units of 1 / log-ratio; the larger, the sooner a pair saturates.
        clip_range: half-width of the interval of ratios that have a gradient, between 0 and 1.

    Raises:
        ValueError: the log-ratios are not two vectors of one length, or `beta` or `clip_range` is out of range.
    """
    if target_log_ratio.ndim != 1 or target_log_ratio.shape != reference_log_ratio.shape:
        raise ValueError(
            "log-ratios must be two vectors of one length [B], not "
            f"{list(target_log_ratio.shape)} and {list(reference_log_ratio.shape)}"
        )
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive number, not {beta}")
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must lie between 0 and 1, not {clip_range}")

    target_log_ratio, reference_log_ratio = target_log_ratio.float(), reference_log_ratio.float()
    # clamp(r, log(1 - eps), log(1 + eps)) is log clamp(exp(r), 1 - eps, 1 + eps) without the overflow of exp (whose
    # gradient would be 0 * inf) and without the rounding of exp and log, 6e-8, which beta would magnify.
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    target_clipped, reference_clipped = target_log_ratio.clamp(low, high), reference_log_ratio.clamp(low, high)
    loss = -F.logsigmoid(beta * (target_clipped - reference_clipped))

    with torch.no_grad():
        target_low, target_high = target_log_ratio < target_clipped, target_log_ratio > target_clipped
        reference_low, reference_high = (
            reference_log_ratio < reference_clipped,
            reference_log_ratio > reference_clipped,
        )
        return OnlinePSOLoss(
            loss=loss,
            pair_accuracy=(1 + torch.sign(target_log_ratio - reference_log_ratio)) / 2,
            target_clipped_low=target_low.float(),
            target_clipped_high=target_high.float(),
            reference_clipped_low=reference_low.float(),
            reference_clipped_high=reference_high.float(),
            has_gradient=~((target_low | target_high) & (reference_low | reference_high)),
        )
