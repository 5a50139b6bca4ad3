"""What is ERNIE-Image's own, against its pipeline."""

import numpy as np
import pytest
import torch
from family_inputs import generators

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.ernie_image import ErnieImage
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.schedules import make_schedule
from tests.families.cases import PROMPTS, find_case


SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = find_case("ernie_image").build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps: int = 2) -> np.ndarray:
    arguments = ErnieImage(pipeline).call_arguments(Deployment(steps, None, None, **SIZE))
    return pipeline(prompt=list(PROMPTS), generator=generators(), output_type="np", **arguments).images


def test_prompts_are_not_rewritten(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(ModelSource(str(tmp_path)))
    assert pipeline.pe is not None and loaded.pe is None and loaded.pe_tokenizer is None
    calls, generate = [], pipeline.pe.generate
    pipeline.pe.generate = lambda **settings: calls.append(settings) or generate(**settings)
    assert np.array_equal(draw(pipeline), draw(loaded)) and not calls


@pytest.mark.parametrize("steps", [3, 7, 8])
def test_the_levels_are_the_pipelines_bits(pipeline, steps):
    draw(pipeline, steps)
    arguments = ErnieImage.schedule_arguments(pipeline.scheduler, steps, vae_config=pipeline.vae.config, **SIZE)
    schedule = make_schedule(pipeline.scheduler, steps, stochastic=False, **arguments)
    assert torch.equal(schedule.timesteps, pipeline.scheduler.timesteps)
    assert torch.equal(schedule.columns.sigma, pipeline.scheduler.sigmas[:-1])


def test_classifier_free_guidance_is_refused(pipeline):
    assert ErnieImage.checked_guidance(pipeline.transformer.config, None) == 1.0
    with pytest.raises(UserError, match="--guidance_scale 4.0: the model takes no guidance embedding"):
        ErnieImage.checked_guidance(pipeline.transformer.config, 4.0)
