"""Qwen-Image with Lightning's LoRA: its scheduler configuration, its prompts, its call."""

import pytest
import torch

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.loading import ModelSource, read_model_info
from pso_utils.families.qwen_image import QwenImage
from tests.families.cases import PROMPTS
from tests.families.cases.qwen_image import SCHEDULER_CONFIG, build
from tests.families.family_inputs import SIZE, deployed_schedule, generators, one_line, sample_deployed


@pytest.fixture(scope="module")
def pipeline():
    return build()


@pytest.fixture
def family(pipeline):
    return QwenImage(pipeline)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("qwen_image")
    pipeline.save_pretrained(folder)
    return str(folder)


def test_lightnings_levels_replace_qwens_own(folder):
    info = read_model_info(ModelSource(folder, scheduler_config=SCHEDULER_CONFIG))
    for side in (32, 1024):
        assert deployed_schedule(info, 4, side).columns.sigma.tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    own = deployed_schedule(read_model_info(ModelSource(folder)), 4, 1024)
    assert own.columns.sigma[-1].item() == pytest.approx(0.02)  # Qwen's terminal, on which Lightning was not distilled


def test_the_trajectory_is_the_pipelines_bit_for_bit_on_the_same_embeddings(family, folder):
    """Those of a prompt differ in the last bits, for the encoder's depend on the batch."""
    schedule = deployed_schedule(read_model_info(ModelSource(folder)), 3)
    for prompts in (PROMPTS, PROMPTS[:1] * 2):  # with a mask, and without
        conditioning = family.collate(family.encode_prompts(prompts), **SIZE)
        expected = family.generate(conditioning, generators(), Deployment(3, None, None, **SIZE))
        assert torch.equal(sample_deployed(family, schedule, conditioning), expected)


def test_a_prompts_embeddings_do_not_depend_on_its_batch(family):
    for prompt, row in zip(PROMPTS, family.encode_prompts(PROMPTS)):
        (alone,) = family.encode_prompts([prompt])
        assert torch.equal(row["prompt_embeds"], alone["prompt_embeds"])
        num_tokens = len(family.pipeline.tokenizer(prompt)["input_ids"])
        assert len(row["prompt_embeds"]) == num_tokens + 5  # the template's end


def test_a_prompt_is_as_long_as_told_in_training_and_at_deployment(pipeline):
    family, prompt = QwenImage(pipeline, max_sequence_length=600), "red panda " * 300
    conditioning = family.collate(family.encode_prompts([prompt]), **SIZE)
    assert conditioning["prompt_mask"].shape == (1, 600)
    pipeline.set_progress_bar_config(disable=True)
    plain = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "max_sequence_length": 600, "output_type": "latent"}
    expected = pipeline(prompt, generator=generators(1), **plain, **SIZE).images
    deployment = Deployment(2, None, None, **SIZE)
    latents = family.generate(conditioning, generators(1), deployment)
    torch.testing.assert_close(latents, family.unpack(expected, deployment))


def test_it_is_called_without_classifier_free_guidance(family):
    arguments = family.call_arguments(Deployment(4, None, None, **SIZE))
    settings = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "max_sequence_length": 512}
    assert arguments == settings | SIZE
    with pytest.raises(UserError, match="--guidance_scale 4.0: .* drop the flag") as info:
        QwenImage.checked_guidance(family.denoiser.config, 4.0)
    one_line(info)
