"""What is particular to Stable Diffusion 1.5, 2.1 and LCM's own models; the rest is in test_every_family.py."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from family_inputs import PROMPTS, SIZE, batch, draw, generators, one_line, record_calls

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.loading import ModelSource, load_pipeline, read_model_info
from pso_utils.families.stable_diffusion import LatentConsistency, StableDiffusion
from pso_utils.mdp import sample_trajectory
from pso_utils.schedules import make_schedule
from tests.families.cases import lcm, sd15


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """SD-Turbo's kind: Euler's scheduler with trailing spacing."""
    folder, pipeline = tmp_path_factory.mktemp("sd-turbo"), sd15.build()
    pipeline.scheduler = EulerDiscreteScheduler(**sd15.LEVELS, timestep_spacing="trailing", steps_offset=1)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lcm_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lcm")
    lcm.build().save_pretrained(folder)
    return str(folder)


def plain(pipeline_class, folder, **parts):
    parts = dict.fromkeys(StableDiffusion.unused_parts) | parts
    pipeline = pipeline_class.from_pretrained(folder, requires_safety_checker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- Sampling ----


def test_sd_turbo_is_trained_under_its_ancestral_scheduler_and_deployed_under_its_own(folder):
    family, steps = StableDiffusion(load_pipeline(ModelSource(folder))), 3
    own = family.pipeline.scheduler
    latents = family.generate(batch(family), generators(), Deployment(steps, None, None, **SIZE))
    pipeline = plain(StableDiffusionPipeline, folder)
    assert torch.equal(latents, draw(pipeline, num_inference_steps=steps, output_type="latent"))

    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    expected, start = draw(pipeline, num_inference_steps=steps, output_type="latent"), generators()
    noise = torch.stack([torch.randn((steps + 1, *latents.shape[1:]), generator=one) for one in start])
    with torch.no_grad():
        denoise = partial(family.predict, conditioning=batch(family))
        trajectory = sample_trajectory(make_schedule(own, steps), denoise, noise)
    assert (trajectory[:, -1] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.allclose(expected, latents, rtol=0.1)


def test_what_the_pipeline_sets_in_its_scheduler_is_trained(folder, tmp_path):
    """It makes `steps_offset` 1 and `clip_sample` False, whatever the file says."""
    values = {"timestep_spacing": "leading", "steps_offset": 0, "clip_sample": True}
    pipeline = plain(StableDiffusionPipeline, folder)
    pipeline.scheduler = DDIMScheduler(**sd15.LEVELS, **values)
    pipeline.save_pretrained(tmp_path)
    expected = plain(StableDiffusionPipeline, tmp_path)
    images = draw(expected, num_inference_steps=3)
    source = ModelSource(str(tmp_path))
    schedule = make_schedule(read_model_info(source).scheduler, 3)
    assert schedule.timesteps.tolist() == expected.scheduler.timesteps.tolist() == [667, 334, 1]
    assert schedule.clip_range is None
    assert np.array_equal(draw(load_pipeline(source), num_inference_steps=3), images)
    with pytest.raises(UserError, match="--scheduler_config: .* sets clip_sample to False: drop it") as info:
        read_model_info(ModelSource(str(tmp_path), scheduler_config={"clip_sample": True}))
    one_line(info)


# ---- Settings ----


def test_lcms_own_models_take_their_guidance_scale(lcm_folder):
    info = read_model_info(ModelSource(lcm_folder))
    assert info.family is LatentConsistency and info.scheduler.config.original_inference_steps == 50
    assert read_model_info(ModelSource(lcm_folder, scheduler="lcm")).scheduler.config.original_inference_steps == 50
    pipeline = load_pipeline(ModelSource(lcm_folder))
    assert LatentConsistency(pipeline, guidance_scale=3.0).guidance_scale == 3.0
    family = LatentConsistency(pipeline)
    arguments = family.call_arguments(Deployment(4, None, None, 32, 64))
    assert arguments == {"num_inference_steps": 4, "guidance_scale": 8.5, "height": 32, "width": 64}
    ((_, kwargs, _),) = record_calls(
        pipeline.unet, lambda: pipeline(PROMPTS, num_inference_steps=1, output_type="latent", **SIZE)
    )
    assert torch.equal(batch(family)["timestep_cond"], kwargs["timestep_cond"])


@pytest.mark.parametrize("name", ["euler", "tcd", "ddim"])
def test_another_scheduler_for_lcms_pipeline_is_one_clear_error(lcm_folder, name):
    with pytest.raises(UserError, match="LatentConsistencyModelPipeline runs LCMScheduler alone, not .*: drop") as info:
        read_model_info(ModelSource(lcm_folder, scheduler=name))
    one_line(info)


def test_classifier_free_guidance_is_refused():
    assert StableDiffusion.checked_guidance({}, None) == 0 and StableDiffusion.checked_guidance({}, 1.0) == 1
    with pytest.raises(UserError, match="--guidance_scale 7.5: .* drop the flag") as info:
        StableDiffusion.checked_guidance({}, 7.5)
    one_line(info)


def test_a_unet_without_guidance_embedding_is_no_lcm_of_its_own(folder, lcm_folder):
    with pytest.raises(UserError, match="its time_cond_proj_dim is None, the base model's is 16") as info:
        read_model_info(ModelSource(lcm_folder, distilled_denoiser=f"{folder}/unet"))
    one_line(info)


def test_sdxl_parts_are_one_clear_error(folder, tiny_pipeline_dir):
    pipeline = load_pipeline(ModelSource(folder))
    pipeline.unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(UserError, match="not a text-to-image StableDiffusionPipeline: .* pass parts that") as info:
        StableDiffusion(pipeline)
    one_line(info)


# ---- VAE ----


def test_the_vae_keeps_its_dtype(folder):
    """This pipeline does not heed `force_upcast`, which its VAE's configuration has by default."""
    pipeline = load_pipeline(ModelSource(folder), weight_dtype=torch.bfloat16)
    assert pipeline.vae.config.force_upcast
    family = StableDiffusion(pipeline)
    expected, latents = draw(pipeline, output_type="pil"), draw(pipeline, output_type="latent")
    family.vae_batch_size = 2
    assert all(map(np.array_equal, family.decode_latents(latents), expected))
    assert pipeline.vae.dtype == torch.bfloat16
