"""The deployment in ComfyUI's terms: which of its samplers and schedulers draw as the pipeline's scheduler does."""

import math
from typing import NamedTuple

from pso_utils.families import Deployment
from pso_utils.families.loading import ModelInfo


SAMPLERS: dict[str, tuple[str, str]] = {  # scheduler -> sampler at eta 0, or without one, and at eta 1
    "LCMScheduler": ("lcm", "lcm"),
    "TCDScheduler": ("ddim", "lcm"),
    "DDIMScheduler": ("ddim", "euler_ancestral"),
    "EulerDiscreteScheduler": ("euler", "euler"),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "euler_ancestral"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "lcm"),
    "FlowMatchLCMScheduler": ("lcm", "lcm"),
}
SPACINGS = {"trailing": "sgm_uniform", "linspace": "normal", "leading": "ddim_uniform"}  # timestep_spacing -> scheduler


class ComfySettings(NamedTuple):
    """Of KSampler, and of the nodes before it."""

    sampler: str | None  # None: ComfyUI itself has none that draws the same
    scheduler: str | None  # likewise
    steps: int
    cfg: float
    guidance: float | None  # of FluxGuidance; None: not an input of the model
    shift: float | None  # of ModelSamplingAuraFlow or ModelSamplingSD3, s in s sigma / (1 + (s - 1) sigma); None: none

    def shown(self) -> dict[str, object]:
        """What there is to set, by name."""
        return {
            **{name: value or "none of its own" for name, value in zip(("sampler", "scheduler"), self)},
            "steps": self.steps,
            "CFG": self.cfg,
            **{name: value for name, value in zip(("guidance", "shift"), self[4:]) if value is not None},
        }


def comfy_settings(info: ModelInfo, deployment: Deployment, *, guidance_scale: float | None) -> ComfySettings:
    """What draws in ComfyUI as `deployment` does; `guidance_scale` is the flag's."""
    family, scheduler, config = info.family, info.scheduler, info.scheduler.config
    samplers = SAMPLERS.get(type(scheduler).__name__, (None, None))
    eta = 1 if config.get("stochastic_sampling") else deployment.eta or 0
    guidance = None
    if family.embeds_guidance(info.denoiser_config):
        guidance = family.checked_guidance(info.denoiser_config, guidance_scale)
    settings = ComfySettings(
        # TCD's and DDIM's other etas are no step of its samplers
        sampler={0: samplers[0], 1: samplers[1]}.get(eta),
        scheduler=None,
        steps=deployment.num_inference_steps or len(deployment.timesteps),
        cfg=1.0,
        guidance=guidance,
        shift=None,
    )
    if deployment.timesteps or config.get("shift_terminal"):  # levels that none of its schedulers makes
        return settings
    named = next((name for name in ("karras", "exponential", "beta") if config.get(f"use_{name}_sigmas")), None)
    if "shift" not in config:
        # LCM and TCD have a timestep_spacing in their config and never read it
        spacing = "trailing" if "original_inference_steps" in config else config["timestep_spacing"]
        return settings._replace(scheduler=named or SPACINGS[spacing])
    shift = config["shift"]
    if config["use_dynamic_shifting"]:
        size = {"vae_config": info.vae_config, "height": deployment.height, "width": deployment.width}
        mu = family.schedule_arguments(scheduler, settings.steps, **size)["mu"]
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    return settings._replace(scheduler=named or "simple", shift=round(shift, 3))
