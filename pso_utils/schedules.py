"""The few-step schedule as tables: what diffusers' schedulers compute at each of their N steps, as columns of numbers.

With (alpha, sigma) the noise level of a step, (alpha', sigma') that of the next, x0 and eps the model's predictions,
every transition here is

    Normal(alpha' x0 + k eps, std^2),    k^2 + std^2 = sigma'^2

so a scheduler is a function that fills the columns from a private copy of the pipeline's scheduler (one that a pipeline
runs carries state, `begin_index`). To add one, write that function under `@fills_tables(SchedulerClass)`, and name the
class in `SCHEDULERS` if `convert_scheduler` is to make it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from pso_utils.errors import UserError


# What `convert_scheduler` makes, by the names of --scheduler.
SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "lcm": LCMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "tcd": TCDScheduler,
    "ddim": DDIMScheduler,
}

# Config entries under which the tables would not be the scheduler's, with the only value that is supported.
PLAIN_CONFIG = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "scale_factors": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "thresholding": False,
}


# ---- The tables ----


class Columns(NamedTuple):
    """The numbers of a step: [N] each, for a schedule's N steps, or [B, 1, 1, 1] for the steps of B samples."""

    alpha: Tensor  # the noise level, x_t = alpha x0 + sigma eps
    sigma: Tensor
    next_alpha: Tensor  # the level that the transition leads to
    next_sigma: Tensor
    std: Tensor  # of the noise that the transition adds
    eps_gain: Tensor  # k: how much of the predicted noise is in the mean
    gain: Tensor  # c = d mean / d x0: x0 moves the mean through eps too; where the scheduler clips, within the limits
    input_scale: Tensor  # the model is given input_scale * x_t
    c_skip: Tensor  # LCM's boundary scalings, c_out x0 + c_skip x_t in place of x0; elsewhere 0 and 1
    c_out: Tensor


class Steps(NamedTuple):
    """The steps that B samples are at."""

    schedule: "Schedule"
    timesteps: Tensor  # [B], as handed to the model
    columns: Columns  # [B, 1, 1, 1] each


@dataclass(frozen=True, eq=False)
class Schedule:
    """N steps of a scheduler; made by `make_schedule`.

    Attributes:
        scheduler_name: the scheduler's class, for messages.
        prediction_type: one of the scheduler's `Tables.prediction_types`.
        timesteps: [N], descending, as handed to the model (floats for the Euler, flow and SCM schedulers).
        table: [columns, N], float32: the rows are `Columns`.
        eta: the noise of DDIM, TCD and FlowMatchEuler in [0, 1]; None for the other schedulers.
        init_noise_sigma: the standard deviation of the starting latents.
        sigma_data: the latents' standard deviation that a trigflow model presumes; 1 for all others.
        clip_range: predicted clean latents are clamped to +-clip_range; None: they are not.
        train_timesteps, train_alpha, train_sigma: [T], all training timesteps, ascending, as handed to the model, and
            their levels, for the plain diffusion loss; None where the scheduler has none (SCM).
    """

    scheduler_name: str
    prediction_type: str
    timesteps: Tensor
    table: Tensor
    eta: float | None
    init_noise_sigma: float
    sigma_data: float
    clip_range: float | None
    train_timesteps: Tensor | None
    train_alpha: Tensor | None
    train_sigma: Tensor | None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def columns(self) -> Columns:
        """The columns of all steps, [N] each."""
        return Columns(*self.table)

    def at(self, step_index: Tensor) -> Steps:
        """The steps `step_index` [B] (long, on the schedule's device; 0 is the first step)."""
        columns = Columns(*self.table[:, step_index, None, None, None])
        return Steps(self, self.timesteps[step_index], columns)


class Tables(NamedTuple):
    """How a scheduler class becomes a `Schedule`.

    fill: (scheduler after `set_timesteps`, eta) -> its columns by name, [N] each, float64. `next_sigma` and `gain`
        follow from the others; input_scale is 1, c_skip 0 and c_out 1 unless given.
    prediction_types: what its models may predict; `mdp.predict` has the formulas.
    default_eta: the eta in force where none is given; None for a scheduler that takes none. Pipelines pass their own
        default, 0, instead: hand this eta to them at deployment.
    """

    fill: Callable[[SchedulerMixin, float | None], dict[str, Tensor]]
    prediction_types: Sequence[str] = ("epsilon", "v_prediction", "sample")
    default_eta: float | None = None


TABLES: dict[type[SchedulerMixin], Tables] = {}


def fills_tables(scheduler_class: type[SchedulerMixin], **settings) -> Callable:
    """Decorator that registers the function which fills the tables of `scheduler_class`; `settings` are `Tables`'."""

    def decorator(fill):
        TABLES[scheduler_class] = Tables(fill, **settings)
        return fill

    return decorator


def _vp_levels(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a variance preserving process."""
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


@fills_tables(LCMScheduler)
def _(scheduler, eta):
    """LCMScheduler.step: multistep consistency, fresh noise on the predicted clean latents."""
    alphas_cumprod, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps
    alpha, sigma = _vp_levels(alphas_cumprod[timesteps])
    next_alpha, std = _vp_levels(torch.cat([alphas_cumprod[timesteps[1:]], torch.ones(1, dtype=torch.float64)]))
    sigma_data = 0.5  # a constant in LCMScheduler.get_scalings_for_boundary_condition_discrete
    scaled = timesteps.double() * scheduler.config.timestep_scaling
    return {
        "alpha": alpha,
        "sigma": sigma,
        "next_alpha": next_alpha,
        "std": std,
        "eps_gain": torch.zeros_like(std),
        "c_skip": sigma_data**2 / (scaled**2 + sigma_data**2),
        "c_out": scaled / (scaled**2 + sigma_data**2).sqrt(),
    }


@fills_tables(TCDScheduler, default_eta=0.3)
def _(scheduler, eta):
    """TCDScheduler.step: to s = floor((1 - eta) t') by DDIM's rule, then up to t' with fresh noise."""
    alphas_cumprod, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps
    alpha, sigma = _vp_levels(alphas_cumprod[timesteps])
    next_timesteps = torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])])
    at_s = alphas_cumprod[torch.floor((1 - eta) * next_timesteps).long()]
    alpha_s, sigma_s = _vp_levels(at_s)
    ratio = alphas_cumprod[next_timesteps] / at_s  # 1 after the last step, where t' = s = 0: no noise is added
    return {
        "alpha": alpha,
        "sigma": sigma,
        "next_alpha": ratio.sqrt() * alpha_s,
        "std": (1 - ratio).sqrt(),
        "eps_gain": ratio.sqrt() * sigma_s,
    }


@fills_tables(DDIMScheduler, default_eta=1.0)
def _(scheduler, eta):
    """DDIMScheduler.step: equations 12 and 16 of arXiv 2010.02502. The previous level is t - 1000 // N, which is not
    always the next timestep; below 0 it is final_alpha_cumprod, and then the std is 0 or tiny."""
    alphas_cumprod, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps
    at, previous = alphas_cumprod[timesteps], timesteps - scheduler.config.num_train_timesteps // len(timesteps)
    at_previous = torch.where(
        previous >= 0, alphas_cumprod[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double()
    )
    std = eta * ((1 - at_previous) / (1 - at) * (1 - at / at_previous)).sqrt()
    alpha, sigma = _vp_levels(at)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "next_alpha": at_previous.sqrt(),
        "std": std,
        "eps_gain": (1 - at_previous - std**2).clamp(min=0).sqrt(),
    }


@fills_tables(EulerDiscreteScheduler)
@fills_tables(EulerAncestralDiscreteScheduler, prediction_types=["epsilon", "v_prediction"])
def _(scheduler, eta):
    """EulerAncestralDiscreteScheduler.step, in sigma space. EulerDiscreteScheduler has no density: it is trained as its
    ancestral counterpart over its own sigmas."""
    sigma, next_sigma = scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double()
    return {
        "alpha": torch.ones_like(sigma),
        "sigma": sigma,
        "next_alpha": torch.ones_like(sigma),
        "std": (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2).sqrt(),
        "eps_gain": next_sigma**2 / sigma,  # sigma_down
        "input_scale": 1 / (sigma**2 + 1).sqrt(),
    }


@fills_tables(FlowMatchEulerDiscreteScheduler, prediction_types=["flow"], default_eta=1.0)
def _(scheduler, eta):
    """Coefficient-preserving sampling (arXiv 2509.05952): at eta 0 FlowMatchEulerDiscreteScheduler.step, at eta 1 the
    same under its `stochastic_sampling`."""
    sigma, next_sigma = scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double()
    return {
        "alpha": 1 - sigma,
        "sigma": sigma,
        "next_alpha": 1 - next_sigma,
        "std": next_sigma * math.sin(eta * math.pi / 2),
        "eps_gain": next_sigma * math.cos(eta * math.pi / 2),
    }


@fills_tables(FlowMatchLCMScheduler, prediction_types=["flow"])
def _(scheduler, eta):
    """FlowMatchLCMScheduler.step: fresh noise on the predicted clean latents."""
    return TABLES[FlowMatchEulerDiscreteScheduler].fill(scheduler, 1.0)


@fills_tables(SCMScheduler, prediction_types=["trigflow"])
def _(scheduler, eta):
    """SCMScheduler.step, of SANA-Sprint; its N + 1 timesteps are angles, the first a hair above pi / 2."""
    angle, next_angle = scheduler.timesteps[:-1].double(), scheduler.timesteps[1:].double()
    return {
        "alpha": angle.cos(),
        "sigma": scheduler.config.sigma_data * angle.sin(),
        "next_alpha": next_angle.cos(),
        "std": scheduler.config.sigma_data * next_angle.sin(),
        "eps_gain": torch.zeros_like(angle),
    }


# ---- Making a schedule ----


def make_schedule(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    *,
    eta: float | None = None,
    stochastic: bool = True,
    device: str | torch.device = "cpu",
    **arguments,
) -> Schedule:
    """The schedule that `scheduler` runs with these settings, after checking that it has tables here.

    Args:
        scheduler: of a class in `TABLES`; it is not changed, and may have been run by a pipeline.
        num_inference_steps, timesteps: one of them; custom timesteps descend, and only LCM, TCD and Euler take them.
        eta: for DDIM, TCD and FlowMatchEuler, else None. Default: `Tables.default_eta`; FlowMatchEuler's is 0, its
            Euler step, where `stochastic` is False, unless its config has `stochastic_sampling`.
        stochastic: for online training: every transition but the last has a density, so N >= 2 and eta > 0. False is
            for deployment and offline training: N may be 1 and eta 0.
        arguments: what else the family's pipeline passes to `set_timesteps` (sigmas, mu, ...).

    Raises:
        UserError: everything outside the support matrix.
    """
    scheduler_class, name = type(scheduler), type(scheduler).__name__
    if scheduler_class not in TABLES:
        raise UserError(f"{name} has no transition here: convert it to one of {', '.join(SCHEDULERS)} (--scheduler)")
    config = _own_config(scheduler, scheduler_class)
    for key, plain in PLAIN_CONFIG.items():
        if (config.get(key) or plain) != plain:
            others = [other for other, value in SCHEDULERS.items() if key not in signature(value).parameters]
            raise UserError(
                f"{name} with {key}={config[key]!r} has no transition here: set {key} to {plain!r} in the pipeline's "
                f"scheduler_config.json{_or_convert(scheduler_class, others)}"
            )
    _check_steps(scheduler_class, config, num_inference_steps, timesteps)
    prediction_type = _prediction_type(scheduler_class, config)
    eta = _check_eta(scheduler_class, config, eta, stochastic=stochastic)

    scheduler = scheduler_class(**config)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps), **arguments)
    else:
        scheduler.set_timesteps(num_inference_steps, **arguments)
    num_steps = len(timesteps) if num_inference_steps is None else num_inference_steps
    _check_timesteps(scheduler, num_steps)
    columns = TABLES[scheduler_class].fill(scheduler, eta)
    one = torch.ones_like(columns["std"])
    columns = {"input_scale": one, "c_skip": 0 * one, "c_out": one} | columns
    columns["next_sigma"] = (columns["std"] ** 2 + columns["eps_gain"] ** 2).sqrt()
    noise_gain = columns["eps_gain"] * columns["alpha"] / columns["sigma"]  # in float64, for the two may nearly cancel
    columns["gain"] = columns["next_alpha"] * columns["c_out"] - noise_gain
    levels = _training_levels(scheduler, config, arguments)
    sigma_data = config.get("sigma_data", 1.0)
    init_noise_sigma = sigma_data if prediction_type == "trigflow" else getattr(scheduler, "init_noise_sigma", 1.0)
    schedule = Schedule(
        scheduler_name=name,
        prediction_type=prediction_type,
        timesteps=scheduler.timesteps[:num_steps].to(device),
        table=torch.stack([columns[column] for column in Columns._fields]).float().to(device),
        eta=eta,
        init_noise_sigma=float(init_noise_sigma),
        sigma_data=sigma_data,
        # TCD has a clip_sample in its config and never reads it
        clip_range=config["clip_sample_range"] if config.get("clip_sample") and name != "TCDScheduler" else None,
        **{name: None if level is None else level.to(device) for name, level in levels.items()},
    )
    _check_tables(schedule, stochastic=stochastic)
    return schedule


def _training_levels(scheduler: SchedulerMixin, config: dict, arguments: dict) -> dict[str, Tensor | None]:
    """`Schedule`'s train_timesteps, train_alpha and train_sigma."""
    count, timesteps, alpha, sigma = config["num_train_timesteps"], None, None, None
    if _is_flow(type(scheduler)):
        # shifted as the deployed ones are, but all the way down
        levels = type(scheduler)(**{**config, "shift_terminal": None})
        levels.set_timesteps(**{**arguments, "sigmas": [1 - n / count for n in range(count)]})
        timesteps, sigma = levels.timesteps.flip(0), levels.sigmas[:-1].flip(0)
        alpha = 1 - sigma
    elif hasattr(scheduler, "alphas_cumprod"):
        alpha, sigma = (level.float() for level in _vp_levels(scheduler.alphas_cumprod.double()))
        timesteps = torch.arange(count).to(scheduler.timesteps.dtype)
    return {"train_timesteps": timesteps, "train_alpha": alpha, "train_sigma": sigma}


def pipelines_pass_eta(scheduler: SchedulerMixin) -> bool:
    """Whether pipelines hand their `eta` to this scheduler (diffusers' `prepare_extra_step_kwargs`)."""
    return "eta" in signature(type(scheduler).step).parameters


def draws_global_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the noise of its steps comes from torch's global generator: flow pipelines hand it none of their own."""
    return type(scheduler) is FlowMatchLCMScheduler or bool(scheduler.config.get("stochastic_sampling"))


def _own_config(scheduler: SchedulerMixin, scheduler_class: type[SchedulerMixin]) -> dict:
    """The config values in force, as far as `scheduler_class` takes them. `from_config` would instead drop every value
    that is `scheduler`'s default in favour of the other class's default: a plain LCMScheduler() has other betas than
    the EulerDiscreteScheduler made from it."""
    parameters = signature(scheduler_class).parameters
    return {name: value for name, value in scheduler.config.items() if name in parameters}


def _is_flow(scheduler_class) -> bool:
    return "flow" in TABLES[scheduler_class].prediction_types


def _or_convert(scheduler_class, names: list[str]) -> str:
    """The end of an error's remedy; empty where no conversion helps, which is for diffusion models' schedulers only."""
    is_convertible = scheduler_class in SCHEDULERS.values()
    return f", or convert to {', '.join(names)} (--scheduler)" if names and is_convertible else ""


def _prediction_type(scheduler_class, config) -> str:
    known = TABLES[scheduler_class].prediction_types
    prediction_type = config.get("prediction_type", known[0])  # flow matching's schedulers have one, and no entry
    if prediction_type not in known:
        others = [key for key, value in SCHEDULERS.items() if prediction_type in TABLES[value].prediction_types]
        raise UserError(
            f"{scheduler_class.__name__} has no prediction_type {prediction_type!r}: use a model that predicts "
            f"{' or '.join(known)}{_or_convert(scheduler_class, others)}"
        )
    return prediction_type


def _check_steps(scheduler_class, config, num_inference_steps, timesteps):
    name, last = scheduler_class.__name__, config["num_train_timesteps"] - 1
    if (num_inference_steps is None) == (timesteps is None):
        raise UserError("pass either num_inference_steps or timesteps, and not both")
    if num_inference_steps is not None:
        limit = config.get("original_inference_steps", last + 1)
        if not 1 <= num_inference_steps <= limit:
            remedy = ", or raise --original_inference_steps" if limit <= last else ""
            raise UserError(f"{name} runs 1 to {limit} steps, not {num_inference_steps}: pass one of these{remedy}")
        return
    takers = [key for key, value in SCHEDULERS.items() if "timesteps" in signature(value.set_timesteps).parameters]
    if scheduler_class not in [SCHEDULERS[key] for key in takers]:
        remedy = _or_convert(scheduler_class, takers)
        raise UserError(f"{name} takes no timesteps: pass num_inference_steps{remedy}")
    in_range = all(0 <= timestep <= last for timestep in timesteps)
    if not timesteps or not in_range or any(a <= b for a, b in zip(timesteps, timesteps[1:])):
        raise UserError(f"timesteps {list(timesteps)} must descend within {last} to 0: pass e.g. 999 749 499 249")


def _check_eta(scheduler_class, config, eta, *, stochastic: bool) -> float | None:
    name, default = scheduler_class.__name__, TABLES[scheduler_class].default_eta
    if default is None:
        if eta is not None:
            takers = ", ".join(taker.__name__ for taker, tables in TABLES.items() if tables.default_eta is not None)
            raise UserError(f"{name} takes no eta: drop it (only {takers} take one)")
        return None
    if scheduler_class is FlowMatchEulerDiscreteScheduler and not (stochastic or config["stochastic_sampling"]):
        default = 0.0
    eta = default if eta is None else eta
    if stochastic and eta == 0:
        raise UserError(f"{name} with eta 0 has no density to train on: pass an eta in (0, 1], by default {default}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is out of range: pass an eta in (0, 1], by default {default} for {name}")
    return eta


def _check_timesteps(scheduler: SchedulerMixin, num_steps: int):
    timesteps, name = scheduler.timesteps.tolist(), type(scheduler).__name__
    # numpy.arange overshoots: trailing spacing for 61, 103, 121, ... steps has one too many, at -1. Leading spacing
    # with an offset starts at 1000 for 1000 steps. Flow matching's first timestep is 1000, which some values of shift
    # round up. SCM has one timestep more than steps.
    num_train_timesteps = scheduler.config.num_train_timesteps
    highest = num_train_timesteps + 1e-3 if _is_flow(type(scheduler)) else num_train_timesteps - 1
    in_range = all(0 <= timestep <= highest for timestep in timesteps)
    num_timesteps = num_steps + 1 if type(scheduler) is SCMScheduler else num_steps
    if not in_range or not len(set(timesteps)) == len(timesteps) == num_timesteps:
        raise UserError(f"diffusers' {name} has no usable timesteps for {num_steps} steps: pass another number")


def _check_tables(schedule: Schedule, *, stochastic: bool):
    name, timesteps, columns = schedule.scheduler_name, schedule.timesteps.tolist(), schedule.columns
    if stochastic and schedule.num_steps < 2:
        raise UserError("a one-step schedule has no stochastic transition to train on: pass at least 2 steps")

    finite = schedule.table.isfinite().all(dim=0)
    if schedule.prediction_type == "epsilon":
        finite &= columns.alpha > 0  # x0 = (x - sigma eps) / alpha
    if not finite.all():
        raise UserError(
            f"{name} is not finite at timestep {timesteps[finite.tolist().index(False)]}: under rescale_betas_zero_snr,"
            " use a model that predicts v_prediction or sample, or lower timesteps"
        )
    silent = [timestep for timestep, std in zip(timesteps[:-1], columns.std.tolist()) if std <= 0]
    if stochastic and silent:
        raise UserError(
            f"{name} adds no noise after timestep {silent[0]}, so there is no density to train on: pass timesteps that"
            " end above 0" + ("" if schedule.eta is None else ", or a larger eta")
        )


# ---- Conversion ----


def convert_scheduler(
    scheduler: SchedulerMixin,
    name: str | None = None,
    *,
    timestep_spacing: str | None = None,
    original_inference_steps: int | None = None,
) -> SchedulerMixin:
    """A new scheduler for a distilled model, with the noise levels and the prediction type of `scheduler`.

    Args:
        name: a key of `SCHEDULERS`, or None to keep the class and the config. A conversion, also one to the class that
            the pipeline has already, sets `timestep_spacing` to "trailing", `clip_sample` to False and
            `original_inference_steps` to all training timesteps: four steps are 999, 749, 499, 249 in every class.
        timestep_spacing: "trailing", "leading" or "linspace" instead of what that gives.
        original_inference_steps: of LCM and TCD: the grid that the model was distilled on, 50 for LCM's own models and
            LCM-LoRA (four steps are 999, 759, 499, 259 then).

    Raises:
        UserError: an unknown name, a scheduler without the alphas_cumprod of a diffusion model, a timestep_spacing that
            is unknown, or one of the last two that the class does not read.
    """
    if name is not None and name not in SCHEDULERS:
        raise UserError(f"unknown scheduler {name!r}: pass one of {', '.join(SCHEDULERS)}")
    scheduler_class = type(scheduler) if name is None else SCHEDULERS[name]
    parameters = signature(scheduler_class).parameters
    config = _own_config(scheduler, scheduler_class)

    if name is not None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} has no alphas_cumprod to convert: --scheduler is for pipelines whose model"
                " was trained by diffusion (epsilon, v_prediction or sample), not by flow matching: drop it"
            )
        few_step = {"timestep_spacing": "trailing", "clip_sample": False}
        few_step["original_inference_steps"] = scheduler.config.num_train_timesteps
        config.update({key: value for key, value in few_step.items() if key in parameters})

    if original_inference_steps is not None:
        if "original_inference_steps" not in parameters:
            raise UserError(
                f"original_inference_steps has no effect on {scheduler_class.__name__}: drop it, or convert to lcm or"
                " tcd (--scheduler)"
            )
        most = scheduler.config.num_train_timesteps
        if not 1 <= original_inference_steps <= most:
            raise UserError(f"original_inference_steps {original_inference_steps} is out of range: pass 1 to {most}")
        config["original_inference_steps"] = original_inference_steps
    if timestep_spacing is not None:
        if timestep_spacing not in ("trailing", "leading", "linspace"):
            raise UserError(f"unknown timestep_spacing {timestep_spacing!r}: pass trailing, leading or linspace")
        # LCM and TCD have a timestep_spacing in their config and never read it.
        if "timestep_spacing" not in parameters or "original_inference_steps" in parameters:
            remedy = ": drop it"
            if "original_inference_steps" in parameters:
                remedy = ", which takes its timesteps from original_inference_steps: drop it, or pass timesteps"
            raise UserError(f"timestep_spacing has no effect on {scheduler_class.__name__}{remedy}")
        config["timestep_spacing"] = timestep_spacing
    return scheduler_class(**config)
