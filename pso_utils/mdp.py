"""The few-step sampler as a Markov decision process: the Gaussian transitions of diffusers' schedulers, and the
forward process at the noise levels of their steps.

State (c, t_n, x_n), action x_{n-1}, policy p(x_{n-1} | x_n, c) = Normal(mean_n, std_n^2 I), as pure functions of a
`Schedule`: a private copy of the pipeline's scheduler, since one that a pipeline runs carries state (`begin_index`).
The arithmetic follows each scheduler's `step` operation by operation: on CPU in float32, a trajectory is bit for bit
the pipeline's.

To add a scheduler, name it in `SCHEDULERS` and register one function with `_transition`. (Where they apply: register
one with `_scale_model_input` too if the UNet's input is scaled, with `_noise_levels` and `_predict` if it is not
variance preserving, with `_clip` if `step` ignores clip_sample; enter `DEFAULT_ETA` if `step` takes an eta.)
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from inspect import signature
from typing import NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor


SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "lcm": LCMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "tcd": TCDScheduler,
    "ddim": DDIMScheduler,
}

# The schedulers whose `step` takes an eta, with the value used when none is given: DDPM's own noise for DDIM, TCD's
# default. Pipelines pass their own default, 0, instead: hand this eta to them at deployment.
DEFAULT_ETA: dict[type[SchedulerMixin], float] = {DDIMScheduler: 1.0, TCDScheduler: 0.3}

# Config entries under which the transitions below would not be the scheduler's, with the only value that is supported.
PLAIN_CONFIG = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "thresholding": False,
}


def _own_config(scheduler: SchedulerMixin, scheduler_class: type[SchedulerMixin]) -> dict:
    """The config values in force, as far as `scheduler_class` takes them. `from_config` would instead drop every value
    that is `scheduler`'s default in favour of the other class's default: a plain LCMScheduler() has other betas than
    the EulerDiscreteScheduler made from it."""
    parameters = signature(scheduler_class).parameters
    return {name: value for name, value in scheduler.config.items() if name in parameters}


def convert_scheduler(
    scheduler: SchedulerMixin, name: str | None = None, timestep_spacing: str | None = None
) -> SchedulerMixin:
    """A new scheduler for a distilled model, with the noise levels and the prediction type of `scheduler`.

    `name` is a key of `SCHEDULERS`, or None to keep the class and the config. A conversion, also one to the class that
    the pipeline has already, sets `timestep_spacing` to "trailing", `clip_sample` to False and
    `original_inference_steps` to all training timesteps: four steps are 999, 749, 499, 249 in every class.
    `timestep_spacing` ("trailing", "leading" or "linspace") overrides what that gives.

    Raises ValueError for an unknown name, a scheduler without the alphas_cumprod of a diffusion model, and a
    timestep_spacing that is unknown or that the class does not read.
    """
    if name is not None and name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: pass one of {', '.join(SCHEDULERS)}")
    scheduler_class = type(scheduler) if name is None else SCHEDULERS[name]
    parameters = signature(scheduler_class).parameters
    config = _own_config(scheduler, scheduler_class)

    if name is not None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod to convert: PSO needs a pipeline whose model was "
                "trained by diffusion (epsilon, v_prediction or sample), not by flow matching or EDM"
            )
        few_step = {"timestep_spacing": "trailing", "clip_sample": False}
        few_step["original_inference_steps"] = scheduler.config.num_train_timesteps
        config.update({key: value for key, value in few_step.items() if key in parameters})

    if timestep_spacing is not None:
        if timestep_spacing not in ("trailing", "leading", "linspace"):
            raise ValueError(f"unknown timestep_spacing {timestep_spacing!r}: pass trailing, leading or linspace")
        # LCM and TCD have a timestep_spacing in their config and never read it.
        if "timestep_spacing" not in parameters or "original_inference_steps" in parameters:
            raise ValueError(
                f"timestep_spacing has no effect on {scheduler_class.__name__}, which takes its timesteps from "
                "original_inference_steps: drop it, or pass timesteps"
            )
        config["timestep_spacing"] = timestep_spacing
    return scheduler_class(**config)


@dataclass(frozen=True, eq=False)
class Schedule:
    """N steps of a scheduler; made by `make_schedule`.

    Attributes:
        scheduler: a private copy on which only `set_timesteps` was called; its tensors are on the schedule's device.
        timesteps: [N], descending, as handed to the UNet (the Euler family's are floats).
        eta: the noise of DDIM and TCD in [0, 1]; None for the other schedulers.
        init_noise_sigma: the standard deviation of the starting latents.
    """

    scheduler: SchedulerMixin
    timesteps: Tensor
    eta: float | None
    init_noise_sigma: float | Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def make_schedule(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None = None,
    timesteps: list[int] | None = None,
    eta: float | None = None,
    device: str | torch.device = "cpu",
    stochastic: bool = True,
) -> Schedule:
    """The schedule that `scheduler` runs with these settings, after checking that it has a transition here.

    Args:
        scheduler: of a class in `SCHEDULERS`; it is not changed, and may have been run by a pipeline.
        num_inference_steps, timesteps: one of them; custom timesteps descend, and only LCM, TCD and Euler take them.
        eta: for DDIM and TCD, else None; by default `DEFAULT_ETA`.
        stochastic: for online training: every transition but the last has a density, so N >= 2 and eta > 0. False is
            for deployment and offline training: N may be 1 and eta 0.

    Raises ValueError, in one line that says what to pass instead, for everything outside the support matrix.
    """
    scheduler_class, name = type(scheduler), type(scheduler).__name__
    if scheduler_class not in SCHEDULERS.values():
        raise ValueError(f"{name} has no transition here: convert it to one of {', '.join(SCHEDULERS)} (--scheduler)")
    config = _own_config(scheduler, scheduler_class)
    for key, plain in PLAIN_CONFIG.items():
        if (config.get(key) or plain) != plain:
            raise ValueError(
                f"{name} with {key}={config[key]!r} has no transition here: set {key} to {plain!r} in the pipeline's "
                "scheduler_config.json, or convert to another scheduler (--scheduler)"
            )
    _check_steps(scheduler_class, config, num_inference_steps, timesteps)
    eta = _check_eta(scheduler_class, eta, stochastic)

    scheduler = scheduler_class(**config)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps), device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    for attribute in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, getattr(scheduler, attribute).to(device))
    schedule = Schedule(scheduler, scheduler.timesteps, eta, scheduler.init_noise_sigma)
    _check_transitions(schedule, len(timesteps) if num_inference_steps is None else num_inference_steps, stochastic)
    return schedule


class Transition(NamedTuple):
    """Normal(mean, std^2 I) over the next latents [B, C, H, W], with std [B, 1, 1, 1] (0 where the scheduler adds no
    noise), and the model's predicted clean latents pred_original_sample [B, C, H, W]."""

    mean: Tensor
    std: Tensor
    pred_original_sample: Tensor


def scale_model_input(schedule: Schedule, sample: Tensor, step_index: Tensor) -> Tensor:
    """What the UNet is given for the latents `sample` [B, C, H, W] at steps `step_index` [B] (long, 0 is the first):
    x / sqrt(sigma^2 + 1) for the Euler family, the latents themselves for the others."""
    return _scale_model_input(schedule.scheduler, sample, step_index)


def transition(schedule: Schedule, model_output: Tensor, sample: Tensor, step_index: Tensor) -> Transition:
    """The scheduler's transition from `sample` [B, C, H, W], computed in float32, without a host synchronisation.

    `model_output` [B, C, H, W] is the UNet's at timesteps `schedule.timesteps[step_index]`; every sample has its own
    step index ([B], long, 0 is the first step). The gradient flows through both tensors.
    """
    return _transition(schedule.scheduler, schedule, model_output.float(), sample.float(), step_index)


def noise_levels(schedule: Schedule, step_index: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of x_t = alpha x0 + sigma eps at steps `step_index` [B] (long, 0 is the first); each [B],
    float32: sqrt(alphas_cumprod[t]) and sqrt(1 - alphas_cumprod[t]), or for the Euler family 1 and sigmas[n]."""
    return _noise_levels(schedule.scheduler, schedule, step_index)


def add_noise(schedule: Schedule, original_sample: Tensor, noise: Tensor, step_index: Tensor) -> Tensor:
    """The scheduler's `add_noise`: the latents [B, C, H, W] at steps `step_index` [B] of the clean latents
    `original_sample` and standard normal `noise` (both [B, C, H, W]), float32. To be scaled by `scale_model_input`."""
    alpha, sigma = (_per_sample(level, original_sample) for level in noise_levels(schedule, step_index))
    return alpha * original_sample.float() + sigma * noise.float()


def predict_original_sample(schedule: Schedule, model_output: Tensor, sample: Tensor, step_index: Tensor) -> Tensor:
    """The predicted clean latents f(x_t, t, c) [B, C, H, W], float32, whatever the UNet predicts; arguments as in
    `transition`. diffusers' `pred_original_sample`, clipped where the scheduler clips; LCM's is without the boundary
    scalings (`transition` returns it with them)."""
    return _predict(schedule.scheduler, schedule, model_output.float(), sample.float(), step_index)[0]


def mean_gain(schedule: Schedule, step_index: Tensor) -> Tensor:
    """c_n = d mean_n / d x0 of the transitions at steps `step_index` [B]; [B], float32. The predicted clean latents x0
    move the mean through the predicted noise too; where the scheduler clips, this is the gain within the limits."""
    return _response(schedule, step_index)[0]


def transition_std(schedule: Schedule, step_index: Tensor) -> Tensor:
    """std_n of the transitions at steps `step_index` [B]; [B], float32."""
    return _response(schedule, step_index)[1]


def _response(schedule, step_index) -> tuple[Tensor, Tensor]:
    """d mean / d x0 and std, each [B]. Both mean and x0 are linear in (sample, model output), so that at sample 0 the
    ratio is the derivative. The output is too small for any clipping; a power of two, it costs no precision."""
    sample = torch.zeros(len(step_index), 1, device=step_index.device)
    model_output = torch.full_like(sample, 2.0**-30)
    mean, std, _ = transition(schedule, model_output, sample, step_index)
    return (mean / predict_original_sample(schedule, model_output, sample, step_index)).flatten(), std.flatten()


class Weighting(NamedTuple):
    """The weight of the squared error of x0: (schedule, step_index [B]) -> [B], float32. With `needs_density` it exists
    only where the transition has a std above 0, and never for the last step (by position)."""

    weight: Callable[[Schedule, Tensor], Tensor]
    needs_density: bool = False


def _epsilon_weight(schedule, step_index):
    """(alpha / sigma)^2: the squared error of the predicted noise."""
    alpha, sigma = noise_levels(schedule, step_index)
    return (alpha / sigma) ** 2


def _x0_weight(schedule, step_index):
    return torch.ones_like(step_index, dtype=torch.float32)


def _mdp_weight(schedule, step_index):
    """c_n^2 / (2 std_n^2): the KL divergence of the model's transition from the one towards the data."""
    gain, std = _response(schedule, step_index)
    return gain**2 / (2 * std**2)


WEIGHTINGS: dict[str, Weighting] = {
    "epsilon": Weighting(_epsilon_weight),
    "x0": Weighting(_x0_weight),
    "mdp": Weighting(_mdp_weight, needs_density=True),
}


def forward_weight(schedule: Schedule, step_index: Tensor, weighting: str) -> Tensor:
    """w(t) [B], float32, at steps `step_index` [B] below `num_weighted_steps`; `weighting` is a key of `WEIGHTINGS`."""
    return WEIGHTINGS[weighting].weight(schedule, step_index)


def num_weighted_steps(schedule: Schedule, weighting: str) -> int:
    """How many of the schedule's steps, from the first, `weighting` may draw: all, or all but the last."""
    return schedule.num_steps - WEIGHTINGS[weighting].needs_density


@torch.no_grad()
def check_weighting(schedule: Schedule, weighting: str):
    """Raises ValueError, in one line that says what to pass instead, for an unknown `weighting` and for one that needs
    a density where a step below `num_weighted_steps` has none, or there is no such step."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: pass one of {', '.join(WEIGHTINGS)} (--weighting)")
    if not WEIGHTINGS[weighting].needs_density:
        return
    remedy = "pass --weighting " + " or ".join(key for key, value in WEIGHTINGS.items() if not value.needs_density)
    steps = num_weighted_steps(schedule, weighting)
    if steps < 1:
        raise ValueError(f"--weighting {weighting} needs a step before the last: {remedy}, or at least 2 steps")
    std = transition_std(schedule, torch.arange(steps, device=schedule.timesteps.device)).tolist()
    silent = [timestep for timestep, value in zip(schedule.timesteps.tolist(), std) if value <= 0]
    if silent:
        name = type(schedule.scheduler).__name__
        other = "an eta above 0 (--eta)" if schedule.eta == 0 else "timesteps that end above 0"
        raise ValueError(
            f"--weighting {weighting} needs noise after every step but the last, and {name} adds none after timestep "
            f"{silent[0]}: {remedy}, or {other}"
        )


class DiffusionInputs(NamedTuple):
    """What the plain diffusion loss mean((UNet(model_input, timesteps) - target)^2) takes: model_input and target
    [B, C, H, W], float32; timesteps [B], in the schedule's dtype."""

    model_input: Tensor
    timesteps: Tensor
    target: Tensor


def diffusion_inputs(schedule: Schedule, original_sample: Tensor, noise: Tensor, timesteps: Tensor) -> DiffusionInputs:
    """The inputs of the plain diffusion loss at `timesteps` [B], long, of all training timesteps (not only the
    schedule's), for clean latents and standard normal noise [B, C, H, W]. The target is what the model predicts: the
    noise, the velocity alpha eps - sigma x0, or the clean latents. The Euler family's input, (x0 + s eps) /
    sqrt(s^2 + 1) with s = sigma / alpha, is the variance-preserving one, alpha x0 + sigma eps."""
    scheduler, original_sample, noise = schedule.scheduler, original_sample.float(), noise.float()
    alpha_prod = _per_sample(scheduler.alphas_cumprod[timesteps], original_sample)
    alpha, sigma = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * original_sample, "sample": original_sample}
    return DiffusionInputs(
        model_input=alpha * original_sample + sigma * noise,
        timesteps=timesteps.to(schedule.timesteps.dtype),
        target=targets[scheduler.config.prediction_type],  # make_schedule has refused every other type
    )


@singledispatch
def _scale_model_input(scheduler, sample, step_index):
    return sample


@_scale_model_input.register(EulerDiscreteScheduler)
@_scale_model_input.register(EulerAncestralDiscreteScheduler)
def _(scheduler, sample, step_index):
    return sample / ((_per_sample(scheduler.sigmas[step_index], sample) ** 2 + 1) ** 0.5)


@singledispatch
def _transition(scheduler, schedule, model_output, sample, step_index) -> Transition:
    raise ValueError(f"{type(scheduler).__name__} has no transition here: use one of {', '.join(SCHEDULERS)}")


@_transition.register(LCMScheduler)
def _(scheduler, schedule, model_output, sample, step_index):
    """LCMScheduler.step: multistep consistency. The prediction is `denoised`, with the boundary scalings."""
    is_last = _per_sample(step_index == schedule.num_steps - 1, sample)
    timestep = schedule.timesteps[step_index]
    prev_timestep = schedule.timesteps[(step_index + 1).clamp(max=schedule.num_steps - 1)]
    alpha_prod_prev = _per_sample(scheduler.alphas_cumprod[prev_timestep], sample)

    sigma_data = 0.5  # a constant in LCMScheduler.get_scalings_for_boundary_condition_discrete
    scaled_timestep = _per_sample(timestep * scheduler.config.timestep_scaling, sample)
    c_skip = sigma_data**2 / (scaled_timestep**2 + sigma_data**2)
    c_out = scaled_timestep / (scaled_timestep**2 + sigma_data**2) ** 0.5

    pred_original_sample, _ = _predict(scheduler, schedule, model_output, sample, step_index)
    denoised = c_out * pred_original_sample + c_skip * sample
    mean = torch.where(is_last, 1.0, alpha_prod_prev.sqrt()) * denoised
    std = torch.where(is_last, 0.0, (1 - alpha_prod_prev).sqrt())
    return Transition(mean, std, denoised)


@_transition.register(TCDScheduler)
def _(scheduler, schedule, model_output, sample, step_index):
    """TCDScheduler.step: to s = floor((1 - eta) t_{n-1}) by DDIM's rule, then up to t_{n-1} with fresh noise."""
    is_last = _per_sample(step_index == schedule.num_steps - 1, sample)
    next_timesteps = torch.cat([schedule.timesteps[1:], torch.zeros_like(schedule.timesteps[:1])])
    prev_timestep = next_timesteps[step_index]
    timestep_s = torch.floor((1 - schedule.eta) * prev_timestep).to(torch.long)
    alpha_prod_s = _per_sample(scheduler.alphas_cumprod[timestep_s], sample)
    alpha_ratio = _per_sample(scheduler.alphas_cumprod[prev_timestep], sample) / alpha_prod_s

    pred_original_sample, pred_epsilon = _predict(scheduler, schedule, model_output, sample, step_index)
    pred_noised_sample = alpha_prod_s.sqrt() * pred_original_sample + (1 - alpha_prod_s).sqrt() * pred_epsilon
    mean = torch.where(is_last, 1.0, alpha_ratio.sqrt()) * pred_noised_sample
    std = torch.where(is_last, 0.0, (1 - alpha_ratio).sqrt())
    return Transition(mean, std, pred_original_sample)


@_transition.register(DDIMScheduler)
def _(scheduler, schedule, model_output, sample, step_index):
    """DDIMScheduler.step: equations 12 and 16 of arXiv 2010.02502. The previous level is t - 1000 // N, which is not
    always the next timestep; below 0 it is final_alpha_cumprod, and then the std is 0 or tiny."""
    timestep = schedule.timesteps[step_index]
    prev_timestep = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas_cumprod_prev = scheduler.alphas_cumprod[prev_timestep.clamp(min=0)]
    alphas_cumprod_prev = torch.where(prev_timestep >= 0, alphas_cumprod_prev, scheduler.final_alpha_cumprod)
    alpha_prod_prev = _per_sample(alphas_cumprod_prev, sample)
    alpha_prod = _per_sample(scheduler.alphas_cumprod[timestep], sample)

    pred_original_sample, pred_epsilon = _predict(scheduler, schedule, model_output, sample, step_index)
    variance = ((1 - alpha_prod_prev) / (1 - alpha_prod)) * (1 - alpha_prod / alpha_prod_prev)
    std = schedule.eta * variance**0.5
    pred_sample_direction = (1 - alpha_prod_prev - std**2) ** 0.5 * pred_epsilon
    mean = alpha_prod_prev**0.5 * pred_original_sample + pred_sample_direction
    return Transition(mean, std, pred_original_sample)


@_transition.register(EulerDiscreteScheduler)
@_transition.register(EulerAncestralDiscreteScheduler)
def _(scheduler, schedule, model_output, sample, step_index):
    """EulerAncestralDiscreteScheduler.step, in sigma space. EulerDiscreteScheduler is deterministic: it is sampled as
    its ancestral counterpart over its own sigmas."""
    sigma = _per_sample(scheduler.sigmas[step_index], sample)
    sigma_to = _per_sample(scheduler.sigmas[step_index + 1], sample)
    pred_original_sample, derivative = _predict(scheduler, schedule, model_output, sample, step_index)
    sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
    sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
    return Transition(sample + derivative * (sigma_down - sigma), sigma_up, pred_original_sample)


def _per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """[B] to [B, 1, ...], to broadcast against `sample`."""
    return values.view(-1, *[1] * (sample.ndim - 1))


@singledispatch
def _noise_levels(scheduler, schedule, step_index) -> tuple[Tensor, Tensor]:
    alpha_prod = scheduler.alphas_cumprod[schedule.timesteps[step_index]]
    return alpha_prod.sqrt(), (1 - alpha_prod).sqrt()


@_noise_levels.register(EulerDiscreteScheduler)
@_noise_levels.register(EulerAncestralDiscreteScheduler)
def _(scheduler, schedule, step_index):
    sigma = scheduler.sigmas[step_index]
    return torch.ones_like(sigma), sigma


@singledispatch
def _predict(scheduler, schedule, model_output, sample, step_index) -> tuple[Tensor, Tensor]:
    """Predicted clean latents and noise of a variance-preserving scheduler, as in DDIMScheduler.step: clipping leaves
    the noise as it was."""
    alpha, sigma = (_per_sample(level, sample) for level in _noise_levels(scheduler, schedule, step_index))
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return _clip(scheduler, (sample - sigma * model_output) / alpha), model_output
    if prediction_type == "v_prediction":
        pred_epsilon = alpha * model_output + sigma * sample
        return _clip(scheduler, alpha * sample - sigma * model_output), pred_epsilon
    if prediction_type == "sample":
        return _clip(scheduler, model_output), (sample - alpha * model_output) / sigma
    raise _unknown_prediction_type(scheduler)


@_predict.register(EulerDiscreteScheduler)
@_predict.register(EulerAncestralDiscreteScheduler)
def _(scheduler, schedule, model_output, sample, step_index):
    """As in EulerDiscreteScheduler.step. The predicted noise is its `derivative`."""
    prediction_type = scheduler.config.prediction_type
    sigma = _per_sample(scheduler.sigmas[step_index], sample)
    if prediction_type == "epsilon":
        pred_original_sample = sample - sigma * model_output
    elif prediction_type == "v_prediction":
        pred_original_sample = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))
    elif prediction_type == "sample" and isinstance(scheduler, EulerDiscreteScheduler):
        pred_original_sample = model_output
    else:
        raise _unknown_prediction_type(scheduler)
    return pred_original_sample, (sample - pred_original_sample) / sigma


@singledispatch
def _clip(scheduler, pred_original_sample):
    limit = scheduler.config.clip_sample_range
    return pred_original_sample.clamp(-limit, limit) if scheduler.config.clip_sample else pred_original_sample


@_clip.register(TCDScheduler)
def _(scheduler, pred_original_sample):
    return pred_original_sample  # TCD has a clip_sample in its config and never reads it


def _unknown_prediction_type(scheduler):
    return ValueError(
        f"{type(scheduler).__name__} has no prediction_type {scheduler.config.prediction_type!r}: use a model that "
        "predicts epsilon or v_prediction or, if it predicts sample, convert to lcm, tcd, ddim or euler (--scheduler)"
    )


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log Normal(value; mean, std^2) [B], float32, averaged over the latent dimensions (not summed): the convention
    that PSO's beta = 50 presumes. `value` and `mean` [B, ...]; `std` broadcasts to them and must be positive."""
    value, mean, std = value.float(), mean.float(), std.float()
    log_density = -((value - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


@torch.no_grad()
def sample_trajectory(
    schedule: Schedule,
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Runs the schedule and keeps every latent; without gradient.

    Args:
        denoise: (model_input [B, C, H, W] float32, timesteps [B]) -> model_output [B, C, H, W].
        noise: [B, N + 1, C, H, W], standard normal: [:, 0] starts, [:, n + 1] is step n's draw (multiplied by a std of
            0 where the scheduler draws none). From the same draws the pipeline computes the same latents.
        progress: called after every step, for instance a tqdm bar's `update`.

    Returns latents [B, N + 1, C, H, W], float32: [:, 0] is the start, [:, n + 1] the sample after step n.
    """
    noise = noise.to(schedule.timesteps.device, torch.float32)
    latents = noise[:, 0] * schedule.init_noise_sigma
    trajectory = [latents]
    for step in range(schedule.num_steps):
        step_index = torch.full((len(noise),), step, device=noise.device)
        model_input = scale_model_input(schedule, latents, step_index)
        model_output = denoise(model_input, schedule.timesteps[step_index])
        mean, std, _ = transition(schedule, model_output, latents, step_index)
        latents = mean + std * noise[:, step + 1]
        trajectory.append(latents)
        if progress is not None:
            progress()
    return torch.stack(trajectory, dim=1)


def keyed_noise(keys: Sequence[tuple[int, ...]], shape: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise [len(keys), *shape], float32, each entry a function of its own key alone, such as (seed,
    epoch, prompt, sample): the same whatever the batch, the number of processes or the device. Drawn on the CPU from
    one generator per key, seeded by the key's SHA-256 (of which torch's CPU generator uses 32 bits)."""
    noise = []
    for key in keys:
        digest = hashlib.sha256(",".join(str(int(part)) for part in key).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        noise.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(noise).to(device)


def _check_steps(scheduler_class, config, num_inference_steps, timesteps):
    name, last = scheduler_class.__name__, config["num_train_timesteps"] - 1
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError("pass either num_inference_steps or timesteps, and not both")
    if num_inference_steps is not None:
        limit = config.get("original_inference_steps", last + 1)
        if not 1 <= num_inference_steps <= limit:
            remedy = ", or convert it (--scheduler), which raises original_inference_steps" if limit <= last else ""
            raise ValueError(f"{name} runs 1 to {limit} steps, not {num_inference_steps}: pass one of these{remedy}")
        return
    takers = [key for key, value in SCHEDULERS.items() if "timesteps" in signature(value.set_timesteps).parameters]
    if scheduler_class not in [SCHEDULERS[key] for key in takers]:
        raise ValueError(
            f"{name} takes no timesteps: pass num_inference_steps, or convert to {', '.join(takers)} (--scheduler)"
        )
    in_range = all(0 <= timestep <= last for timestep in timesteps)
    if not timesteps or not in_range or any(a <= b for a, b in zip(timesteps, timesteps[1:])):
        raise ValueError(f"timesteps {list(timesteps)} must descend within {last} to 0: pass e.g. 999 749 499 249")


def _check_eta(scheduler_class, eta, stochastic):
    name, default = scheduler_class.__name__, DEFAULT_ETA.get(scheduler_class)
    if default is None:
        if eta is not None:
            takers = ", ".join(taker.__name__ for taker in DEFAULT_ETA)
            raise ValueError(f"{name} takes no eta: drop it (only {takers} take one)")
        return None
    eta = default if eta is None else eta
    if stochastic and eta == 0:
        raise ValueError(f"{name} with eta 0 has no density to train on: pass an eta in (0, 1], by default {default}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is out of range: pass an eta in (0, 1], by default {default} for {name}")
    return eta


@torch.no_grad()
def _check_transitions(schedule, num_steps, stochastic):
    """Runs every transition once, on zeros, which checks the prediction type too."""
    scheduler, timesteps = schedule.scheduler, schedule.timesteps.tolist()
    name = type(scheduler).__name__
    # numpy.arange overshoots: trailing spacing for 61, 103, 121, ... steps has one too many, at -1. Leading spacing
    # with an offset starts at 1000 for 1000 steps.
    in_range = all(0 <= timestep < scheduler.config.num_train_timesteps for timestep in timesteps)
    if not in_range or not len(set(timesteps)) == len(timesteps) == num_steps:
        raise ValueError(f"diffusers' {name} has no usable timesteps for {num_steps} steps: pass another number")
    if stochastic and num_steps < 2:
        raise ValueError("a one-step schedule has no stochastic transition to train on: pass at least 2 steps")

    zeros = torch.zeros(num_steps, 1, 1, 1, device=schedule.timesteps.device)
    mean, std, _ = transition(schedule, zeros, zeros, torch.arange(num_steps, device=zeros.device))
    finite = (mean + std).isfinite().flatten().tolist()
    if not all(finite):
        raise ValueError(
            f"{name} is not finite at timestep {timesteps[finite.index(False)]}: under rescale_betas_zero_snr, use a "
            "model that predicts v_prediction or sample, or lower timesteps"
        )
    silent = [timestep for timestep, value in zip(timesteps[:-1], std.flatten().tolist()) if value <= 0]
    if stochastic and silent:
        raise ValueError(
            f"{name} adds no noise after timestep {silent[0]}, so there is no density to train on: pass timesteps that"
            " end above 0" + ("" if schedule.eta is None else ", or a larger eta")
        )
