"""ComfyUI's settings: its schedulers' noise levels, written out from comfy/samplers.py, are those of the deployment."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)

from pso_utils.families import Deployment, find_family
from pso_utils.families.loading import ModelInfo
from pso_utils.run.comfyui import comfy_settings


SDXL, FLUX, QWEN, KLEIN, Z_IMAGE = (
    find_family(f"{name}Pipeline", name) for name in ("StableDiffusionXL", "Flux", "QwenImage", "Flux2Klein", "ZImage")
)
VAE = {"block_out_channels": (1, 1, 1, 1), "temperal_downsample": (False, True, True)}
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def settings_of(scheduler, family=SDXL, *, steps=4, timesteps=None, eta=None, guidance_scale=None, **denoiser_config):
    info = ModelInfo(family, {"guidance_embeds": False} | denoiser_config, VAE, scheduler, ())
    deployment = Deployment(steps, timesteps, eta, 1024, 512)
    return comfy_settings(info, deployment, guidance_scale=guidance_scale)


def vp_sigmas(name: str, steps: int) -> torch.Tensor:
    """Of a diffusion model, by ComfyUI's scheduler `name`, without the last one, 0."""
    alphas_cumprod = LCMScheduler(**VP).alphas_cumprod.double()
    table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    if name == "ddim_uniform":
        return table[1 :: len(table) // steps].flip(0)
    timesteps = torch.linspace(999, 0, steps) if name == "normal" else torch.linspace(999, 0, steps + 1)[:-1]
    low = timesteps.long()
    weight = timesteps.double() - low
    return ((1 - weight) * table[low].log() + weight * table[(low + 1).clamp(max=999)].log()).exp()


def flow_sigmas(shift: float, steps: int) -> torch.Tensor:
    """Of flow matching with that shift, by ComfyUI's `simple`, likewise."""
    times = torch.arange(1, 1001) / 1000
    table = shift * times / (1 + (shift - 1) * times)
    return torch.stack([table[-(1 + int(step * 1000 / steps))] for step in range(steps)])


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_the_levels_of_a_diffusion_model_are_the_deployments(scheduler_class, spacing, steps):
    scheduler = scheduler_class(**VP, timestep_spacing=spacing, steps_offset=1)
    settings = settings_of(scheduler, steps=steps)
    scheduler.set_timesteps(steps)
    expected = scheduler.sigmas[:-1].double()
    # trailing's timesteps are whole ones, 749 for 749.25
    assert torch.allclose(vp_sigmas(settings.scheduler, steps), expected, rtol=5e-3)
    assert (settings.steps, settings.cfg, settings.shift) == (steps, 1.0, None)


@pytest.mark.parametrize(
    "family, config",
    [
        (Z_IMAGE, {"shift": 3.0}),
        (FLUX, {"shift": 1.0}),
        (FLUX, {"shift": 3.0, "use_dynamic_shifting": True}),
        (KLEIN, {"shift": 3.0, "use_dynamic_shifting": True}),
        (QWEN, {"use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3)}),
        (QWEN, {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 2.0, "max_shift": 2.5}),
    ],
)
def test_the_levels_of_flow_matching_are_the_deployments(family, config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    settings = settings_of(scheduler, family)
    arguments = family.schedule_arguments(scheduler, 4, vae_config=VAE, height=1024, width=512)
    scheduler.set_timesteps(**{"num_inference_steps": 4, **arguments})
    assert settings[:2] == ("euler", "simple")
    assert torch.allclose(flow_sigmas(settings.shift, 4), scheduler.sigmas[:-1], atol=2e-3)


@pytest.mark.parametrize(
    "scheduler, eta, sampler",
    [
        (LCMScheduler(**VP), None, "lcm"),
        (EulerDiscreteScheduler(**VP), None, "euler"),
        (EulerAncestralDiscreteScheduler(**VP), None, "euler_ancestral"),
        (DDIMScheduler(**VP), 0.0, "ddim"),
        (DDIMScheduler(**VP), 1.0, "euler_ancestral"),
        (DDIMScheduler(**VP), 0.5, None),
        (TCDScheduler(**VP), 0.0, "ddim"),
        (TCDScheduler(**VP), 0.3, None),
        (TCDScheduler(**VP), 1.0, "lcm"),
        (FlowMatchEulerDiscreteScheduler(), None, "euler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), None, "lcm"),
        (FlowMatchLCMScheduler(), None, "lcm"),
    ],
)
def test_the_sampler_draws_the_same_noise_or_there_is_none(scheduler, eta, sampler):
    family = FLUX if "shift" in scheduler.config else SDXL
    settings = settings_of(scheduler, family, eta=eta)
    assert settings.sampler == sampler
    assert settings.shown()["sampler"] == (sampler or "none of its own")


def test_levels_of_their_own_have_no_scheduler():
    assert settings_of(LCMScheduler(**VP), steps=None, timesteps=[999, 500])[1:3] == (None, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    assert settings_of(scheduler, QWEN)[1] is None
    assert settings_of(SCMScheduler(), SDXL, timesteps=[1]).sampler is None


def test_guidance_is_set_for_models_with_an_embedding_of_it():
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert settings_of(scheduler, FLUX).guidance is None
    assert settings_of(scheduler, FLUX, guidance_embeds=True).guidance == 3.5
    settings = settings_of(scheduler, FLUX, guidance_embeds=True, guidance_scale=2.0)
    assert settings.shown() == {
        "sampler": "euler",
        "scheduler": "simple",
        "steps": 4,
        "CFG": 1.0,
        "guidance": 2.0,
        "shift": 1.0,
    }
