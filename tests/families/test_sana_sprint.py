"""What is SANA-Sprint's own, against its pipeline."""

from functools import partial

import pytest
import torch
from family_inputs import generators, record_calls

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.sana_sprint import SanaSprint
from pso_utils.schedules import make_schedule
from tests.families.cases import PROMPTS, find_case


SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = find_case("sana_sprint").build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_own_schedule(pipeline, *settings, steps: int, **flags):
    vae_config = pipeline.vae.config
    arguments = SanaSprint.schedule_arguments(pipeline.scheduler, steps, vae_config=vae_config, **SIZE)
    return make_schedule(pipeline.scheduler, *settings, **flags, **arguments)


def draw(pipeline, family, steps: int):
    arguments = family.call_arguments(Deployment(steps, None, None, **SIZE))
    pipeline(prompt=list(PROMPTS), generator=generators(), output_type="latent", **arguments)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_angles_are_those_of_the_pipeline_at_any_number_of_steps(pipeline, steps):
    draw(pipeline, SanaSprint(pipeline), steps)
    schedule = make_own_schedule(pipeline, steps, steps=steps, stochastic=False)
    assert torch.equal(schedule.timesteps, pipeline.scheduler.timesteps[:-1])
    assert schedule.init_noise_sigma == 0.5


@pytest.mark.parametrize("guidance_scale", [None, 3.3])
def test_the_guidance_scale_is_the_models_input_as_the_pipeline_casts_it(guidance_scale):
    pipeline = find_case("sana_sprint").build().to(torch.bfloat16)
    family = SanaSprint(pipeline, guidance_scale=guidance_scale)
    drawn = record_calls(pipeline.transformer, partial(draw, pipeline, family, 2))
    conditioning = family.collate(family.encode_prompts(PROMPTS), **SIZE)
    latents, timesteps = torch.zeros(2, 8, 2, 3), torch.full((2,), 1.3)
    predicted = record_calls(pipeline.transformer, lambda: family.predict(latents, timesteps, conditioning))
    for name in ("guidance", "encoder_hidden_states", "encoder_attention_mask", "timestep"):
        own, pipelines = predicted[0][1][name], drawn[1][1][name]
        assert own.dtype == pipelines.dtype and torch.equal(own, pipelines)


def test_custom_timesteps_are_refused(pipeline):
    with pytest.raises(UserError, match="SCMScheduler takes no timesteps: pass num_inference_steps"):
        make_own_schedule(pipeline, None, [999, 499], steps=2)
