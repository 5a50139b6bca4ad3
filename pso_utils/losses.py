"""The PSO losses as pure functions: online of log-ratios, offline of denoising errors.

Each returns the loss of every pair [B], differentiable and not reduced, and its diagnostics by name, [B] each, without
gradient; both are float32, whatever the inputs' dtype. A ValueError says which setting is out of range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


# An offline pair is reported as saturated where the sigmoid leaves less than this fraction of the gradient.
SATURATION = 0.1

Metrics = dict[str, Tensor]

# The names of each loss's metrics, for a process that has no pairs of its own and adds zeros.
ONLINE_METRICS = (
    "loss",
    "pair_accuracy",
    "target_log_ratio",
    "reference_log_ratio",
    "target_clipped_low",
    "target_clipped_high",
    "reference_clipped_low",
    "reference_clipped_high",
)
OFFLINE_METRICS = ("loss", "target_gain", "reference_gain", "pair_accuracy", "saturated", "anchored")
# What beta and target_anchor are unless given, by weighting, for pairs of two images of one prompt (demo/README.md has
# what was tried). A beta is right where beta times the difference of gains that a fully learnt pair shows is some 3 to
# 15: with more, the loss saturates before the samples change.
PAIR_SETTINGS = {
    "mdp": {"beta": 30.0, "target_anchor": 60.0},
    "x0": {"beta": 10.0, "target_anchor": 10.0},
    "epsilon": {"beta": 200.0, "target_anchor": 200.0},
}
HINGE_METRICS = ("loss", "target_error", "reference_error", "pair_accuracy", "active")


def online_pso_loss(
    target_log_ratio: Tensor, reference_log_ratio: Tensor, *, beta: float, clip_range: float
) -> tuple[Tensor, Metrics]:
    r"""Online PSO loss of one transition of each pair.

        r      = log p_theta(x_{n-1} | x_n, c) - log p_base(x_{n-1} | x_n, c)
        r_clip = log clamp(exp(r), 1 - clip_range, 1 + clip_range)
        loss   = -log sigmoid(beta * (r_clip(target) - r_clip(reference)))

    The clamp stops the gradient on both sides (PPO's would stop it on the far side only). A ratio that lies exactly on
    a bound still has its gradient.

    Args:
        target_log_ratio: `[B]`, r of the preferred samples.
        reference_log_ratio: `[B]`, r of the samples that they were preferred to.
        beta: strength of the preference, in units of 1 / log-ratio; the larger, the sooner a pair saturates.
        clip_range: half-width of the interval of ratios that have a gradient, between 0 and 1.

    Returns:
        the loss, and `loss`; `pair_accuracy`, 1 where the target's log-ratio is the larger, 0 where the reference's is,
        0.5 where they are equal (as before the first update), before the clamp; `target_log_ratio` and
        `reference_log_ratio`; `{target,reference}_clipped_{low,high}`, 1 where the clamp changed the ratio, and so
        stopped that sample's gradient.
    """
    if not (0 < beta < math.inf and 0 < clip_range < 1):
        raise ValueError(f"beta must be above 0 and clip_range between 0 and 1, not {beta} and {clip_range}")
    target_log_ratio, reference_log_ratio = torch.stack([target_log_ratio, reference_log_ratio]).float()
    # clamp(r, log(1 - eps), log(1 + eps)) is log clamp(exp(r), 1 - eps, 1 + eps) without the overflow of exp (whose
    # gradient would be 0 * inf) and without the rounding of exp and log, 6e-8, which beta would magnify.
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    target_clipped, reference_clipped = target_log_ratio.clamp(low, high), reference_log_ratio.clamp(low, high)
    loss = -F.logsigmoid(beta * (target_clipped - reference_clipped))
    with torch.no_grad():
        return loss, {
            "loss": loss.detach(),
            "pair_accuracy": (1 + torch.sign(target_log_ratio - reference_log_ratio)) / 2,
            "target_log_ratio": target_log_ratio.detach(),
            "reference_log_ratio": reference_log_ratio.detach(),
            "target_clipped_low": (target_log_ratio < target_clipped).float(),
            "target_clipped_high": (target_log_ratio > target_clipped).float(),
            "reference_clipped_low": (reference_log_ratio < reference_clipped).float(),
            "reference_clipped_high": (reference_log_ratio > reference_clipped).float(),
        }


def denoising_error(original_sample: Tensor, pred_original_sample: Tensor, weight: Tensor) -> Tensor:
    r"""d(x0) = w(t) * mean over C, h, w of (x0 - f(x_t, t, c))^2: `[..., B]`, in float32 whatever the inputs' dtype.

    Args:
        original_sample, pred_original_sample: `[..., B, C, h, w]`, the clean latents x0 and the predicted ones f.
        weight: `[B]`, w(t), as from `mdp.forward_weights`.

    Raises:
        ValueError: the latents differ in shape, or `weight` is not `[B]`.
    """
    shape = original_sample.shape
    if pred_original_sample.shape != shape or weight.shape != shape[-4:-3]:
        raise ValueError(
            "latents must be two tensors of one shape [..., B, C, h, w] and weight a vector [B], not "
            f"{list(shape)}, {list(pred_original_sample.shape)} and {list(weight.shape)}"
        )
    squared_error = (original_sample.float() - pred_original_sample.float()) ** 2
    return weight.float() * squared_error.flatten(-3).mean(-1)


def offline_pso_loss(
    target_gain: Tensor,
    reference_gain: Tensor,
    *,
    beta: float,
    target_anchor: float = 0.0,
    reference_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    r"""Offline PSO loss of one noise level of each pair.

        gain = d_base(x0) - d_theta(x0)
        margin = beta * (gain(target) - reference_weight * gain(reference))
        loss = -log sigmoid(margin) + target_anchor * relu(-gain(target))

    Diffusion-DPO (arXiv 2311.12908) is the case of errors in epsilon space at uniform timesteps, with beta half of its
    own. The target anchor keeps the target's own error from growing while the difference of the gains does.

    Args:
        target_gain: `[B]`, by how much the model's error on the preferred samples is below the base's.
        reference_gain: `[B]`, the same of the samples that they were preferred to.
        beta: strength of the preference, in units of 1 / error; the larger, the sooner a pair saturates.
        target_anchor: weight of the anchor, in the same units; 0 is none, beta / 2 a strong one.
        reference_weight: the reference's weight in the difference; 1 is PSO. Less attracts more than it repels, which
            stays on the data where targets and references are easy to tell apart: a target's error can fall to 0 and
            no further, while a reference's can grow without end, in any direction.

    Returns:
        the loss, and `loss`; `target_gain` and `reference_gain`; `pair_accuracy`, 1 where the target gained more, 0
        where the reference did, 0.5 where they are equal (as before the first update); `saturated`, 1 where
        sigmoid(-margin), the factor that the sigmoid leaves of the gradient, is below `SATURATION`; `anchored`, 1 where
        the target anchor is active: its weight is above 0 and the target's error has grown.
    """
    if not (0 < beta < math.inf and 0 <= target_anchor < math.inf and 0 <= reference_weight < math.inf):
        raise ValueError(
            "beta must be above 0, target_anchor and reference_weight at least 0, not "
            f"{beta}, {target_anchor} and {reference_weight}"
        )
    target_gain, reference_gain = torch.stack([target_gain, reference_gain]).float()
    margin = beta * (target_gain - reference_weight * reference_gain)
    loss = -F.logsigmoid(margin) + target_anchor * F.relu(-target_gain)
    with torch.no_grad():
        return loss, {
            "loss": loss.detach(),
            "target_gain": target_gain.detach(),
            "reference_gain": reference_gain.detach(),
            "pair_accuracy": (1 + torch.sign(target_gain - reference_gain)) / 2,
            "saturated": (torch.sigmoid(-margin) < SATURATION).float(),
            "anchored": (target_anchor * target_gain < 0).float(),
        }


def hinge_pso_loss(
    target_error: Tensor,
    reference_error: Tensor,
    *,
    beta: float,
    reference_weight: float,
    prior_loss_weight: float,
) -> tuple[Tensor, Metrics]:
    r"""The base-free hinge of concept customization.

        loss = relu(1 - beta * (reference_weight * d(reference) - d(target))) + prior_loss_weight * d(reference)

    While the hinge is active, the gradient raises the reference's error only if beta * reference_weight is above
    prior_loss_weight; where they are equal, it is plain regression onto the target.

    Args:
        target_error: `[B]`, d_theta of the target samples.
        reference_error: `[B]`, d_theta of the reference samples.
        beta: strength of the hinge, in units of 1 / error.
        reference_weight: the reference's weight in the hinge.
        prior_loss_weight: weight of the regression onto the reference samples, in units of 1 / error.

    Returns:
        the loss, and `loss`; `target_error` and `reference_error`; `pair_accuracy`, 1 where the target's error is the
        smaller, 0 where the reference's is, 0.5 where they are equal; `active`, 1 where the hinge is above 0, and so
        has a gradient.
    """
    if not (0 < beta < math.inf and 0 <= reference_weight < math.inf and 0 <= prior_loss_weight < math.inf):
        raise ValueError(
            "beta must be above 0, reference_weight and prior_loss_weight at least 0, not "
            f"{beta}, {reference_weight} and {prior_loss_weight}"
        )
    target_error, reference_error = torch.stack([target_error, reference_error]).float()
    hinge = F.relu(1 - beta * (reference_weight * reference_error - target_error))
    loss = hinge + prior_loss_weight * reference_error
    with torch.no_grad():
        return loss, {
            "loss": loss.detach(),
            "target_error": target_error.detach(),
            "reference_error": reference_error.detach(),
            "pair_accuracy": (1 + torch.sign(reference_error - target_error)) / 2,
            "active": (hinge > 0).float(),
        }
