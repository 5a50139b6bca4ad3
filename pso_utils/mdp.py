"""The few-step sampler as a Markov decision process, and the forward process at the noise levels of its steps: pure
functions of a schedule's columns.

State (c, t_n, x_n), action x_{n-1}, policy p(x_{n-1} | x_n, c) = Normal(mean_n, std_n^2 I). `steps` are `Schedule.at`
the step index of each sample; latents are [B, C, h, w].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pso_utils.errors import UserError
from pso_utils.schedules import Schedule, Steps


# ---- The transition ----


class Transition(NamedTuple):
    """Normal(mean, std^2 I) over the next latents [B, C, h, w], with std [B, 1, 1, 1] (0 where the scheduler adds no
    noise)."""

    mean: Tensor
    std: Tensor


def predict(steps: Steps, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted clean latents x0 = f(x_t, t, c) and the predicted noise eps [B, C, h, w], float32, whatever the
    model predicts; both are linear in `sample` and `model_output` [B, C, h, w].

    x0 is diffusers' `pred_original_sample`, clipped where the scheduler clips (which leaves eps as it was), and without
    LCM's boundary scalings.
    """
    schedule, columns = steps.schedule, steps.columns
    sample, output, alpha, sigma = sample.float(), model_output.float(), columns.alpha, columns.sigma
    if schedule.prediction_type == "epsilon":
        x0, eps = (sample - sigma * output) / alpha, output
    elif schedule.prediction_type == "sample":
        x0, eps = output, (sample - alpha * output) / sigma
    elif schedule.prediction_type == "v_prediction":
        # of a variance preserving process; that of the Euler family's x_t = x0 + sigma eps is input_scale x_t
        alpha, sigma, scaled = alpha * columns.input_scale, sigma * columns.input_scale, sample * columns.input_scale
        x0, eps = alpha * scaled - sigma * output, alpha * output + sigma * scaled
    elif schedule.prediction_type == "flow":
        x0, eps = sample - sigma * output, sample + alpha * output
    else:  # trigflow: sigma = sigma_data sin t
        sine = sigma / schedule.sigma_data
        x0, eps = alpha * sample - sine * output, (sine * sample + alpha * output) / schedule.sigma_data
    if schedule.clip_range is not None:
        x0 = x0.clamp(-schedule.clip_range, schedule.clip_range)
    return x0, eps


def transition(steps: Steps, model_output: Tensor, sample: Tensor) -> Transition:
    """The scheduler's transition from `sample` [B, C, h, w], of which the model made `model_output` [B, C, h, w]:
    mean = alpha' x0 + k eps, in float32, without a host synchronisation. The gradient flows through both tensors."""
    schedule, columns = steps.schedule, steps.columns
    if schedule.prediction_type == "flow" and schedule.eta == 0:
        # the same, in the order of operations of FlowMatchEulerDiscreteScheduler.step, whose bits these are
        return Transition(sample.float() + (columns.next_sigma - columns.sigma) * model_output.float(), columns.std)
    x0, eps = predict(steps, model_output, sample)
    x0 = columns.c_out * x0 + columns.c_skip * sample
    return Transition(columns.next_alpha * x0 + columns.eps_gain * eps, columns.std)


def log_prob(steps: Steps, model_output: Tensor, sample: Tensor, next_sample: Tensor) -> Tensor:
    """log p(next_sample | sample) [B], float32, of the transition of `model_output`; all [B, C, h, w].

    Averaged over the latent dimensions, not summed: the convention that PSO's beta = 50 presumes. The std must be
    positive: not for a last step.
    """
    mean, std = transition(steps, model_output, sample)
    log_density = -((next_sample.float() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


@torch.no_grad()
def sample_trajectory(
    schedule: Schedule,
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Runs the schedule and keeps every latent; without gradient.

    Args:
        denoise: (model_input [B, C, h, w] float32, timesteps [B]) -> model_output [B, C, h, w].
        noise: [B, N + 1, C, h, w], standard normal: [:, 0] starts, [:, n + 1] is step n's draw (multiplied by a std of
            0 where the scheduler draws none). From the same draws the pipeline computes the same latents.
        progress: called after every step, for instance a tqdm bar's `update`.

    Returns:
        latents [B, N + 1, C, h, w], float32: [:, 0] is the start, [:, n + 1] the sample after step n.
    """
    noise = noise.to(schedule.timesteps.device, torch.float32)
    latents = noise[:, 0] * schedule.init_noise_sigma
    trajectory = [latents]
    for step in range(schedule.num_steps):
        steps = schedule.at(torch.full((len(noise),), step, device=noise.device))
        model_output = denoise(steps.columns.input_scale * latents, steps.timesteps)
        mean, std = transition(steps, model_output, latents)
        latents = mean + std * noise[:, step + 1]
        trajectory.append(latents)
        progress()
    return torch.stack(trajectory, dim=1)


# ---- The forward process ----


def add_noise(steps: Steps, original_sample: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps: the scheduler's `add_noise` (or `scale_noise`) of the clean latents `original_sample`
    and standard normal `noise`, both [B, C, h, w]; float32, before `input_scale`."""
    return steps.columns.alpha * original_sample.float() + steps.columns.sigma * noise.float()


class Weighting(NamedTuple):
    """The weight of the squared error of x0: (schedule) -> [N], float32. With `needs_density` it exists only where the
    transition has a std above 0, and never for the last step (by position); `is_flow`: for flow matching alone."""

    weight: Callable[[Schedule], Tensor]
    needs_density: bool = False
    is_flow: bool = False


WEIGHTINGS: dict[str, Weighting] = {
    # the squared error of the predicted noise
    "epsilon": Weighting(lambda schedule: (schedule.columns.alpha / schedule.columns.sigma) ** 2),
    # the squared error of the clean latents themselves
    "x0": Weighting(lambda schedule: torch.ones_like(schedule.columns.alpha)),
    # the squared error of flow matching's velocity eps - x0
    "velocity": Weighting(lambda schedule: 1 / schedule.columns.sigma**2, is_flow=True),
    # the KL divergence of the model's transition from the one towards the data
    "mdp": Weighting(lambda schedule: schedule.columns.gain**2 / (2 * schedule.columns.std**2), needs_density=True),
}


def forward_weights(schedule: Schedule, weighting: str) -> Tensor:
    """w [M], float32, of the M steps, from the first, that `weighting` may draw: all, or all but the last.

    Raises:
        UserError: an unknown `weighting`, or one that needs flow matching, or a density where a step has none, or there
            is no such step.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"unknown weighting {weighting!r}: pass one of {', '.join(WEIGHTINGS)} (--weighting)")
    weight, needs_density, is_flow = WEIGHTINGS[weighting]
    if is_flow and schedule.prediction_type != "flow":
        name = schedule.scheduler_name
        raise UserError(f"--weighting {weighting} is for flow matching, and {name} is none: pass x0 or epsilon")
    if not needs_density:
        return weight(schedule)
    remedy = "pass --weighting epsilon or x0"
    num_weighted = schedule.num_steps - 1
    if num_weighted < 1:
        raise UserError(f"--weighting {weighting} needs a step before the last: {remedy}, or at least 2 steps")
    std = schedule.columns.std[:num_weighted].tolist()
    silent = [timestep for timestep, value in zip(schedule.timesteps.tolist(), std) if value <= 0]
    if silent:
        other = "an eta above 0 (--eta)" if schedule.eta == 0 else "timesteps that end above 0"
        raise UserError(
            f"--weighting {weighting} needs noise after every step but the last, and {schedule.scheduler_name} adds"
            f" none after timestep {silent[0]}: {remedy}, or {other}"
        )
    return weight(schedule)[:num_weighted]


class DiffusionInputs(NamedTuple):
    """What the plain diffusion loss mean((model(model_input, timesteps) - target)^2) takes: model_input and target
    [B, C, h, w], float32; timesteps [B], in the schedule's dtype."""

    model_input: Tensor
    timesteps: Tensor
    target: Tensor


def diffusion_inputs(schedule: Schedule, original_sample: Tensor, noise: Tensor, timesteps: Tensor) -> DiffusionInputs:
    """The inputs of the plain diffusion loss at the training timesteps number `timesteps` [B], long (of all, not only
    the schedule's), for clean latents and standard normal noise [B, C, h, w]. The target is what the model predicts:
    the noise, the velocity alpha eps - sigma x0, the clean latents, or flow matching's velocity eps - x0. The Euler
    family's input (x0 + s eps) / sqrt(s^2 + 1), s = sigma / alpha, is the variance-preserving alpha x0 + sigma eps.

    Raises:
        UserError: the scheduler has no training timesteps (SCM).
    """
    if schedule.train_alpha is None:
        raise UserError(f"{schedule.scheduler_name} has no plain diffusion loss here: pass another --loss")
    original_sample, noise = original_sample.float(), noise.float()
    alpha = schedule.train_alpha[timesteps, None, None, None]
    sigma = schedule.train_sigma[timesteps, None, None, None]
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * original_sample, "sample": original_sample}
    targets["flow"] = noise - original_sample
    return DiffusionInputs(
        model_input=alpha * original_sample + sigma * noise,
        timesteps=schedule.train_timesteps[timesteps],
        target=targets[schedule.prediction_type],
    )
