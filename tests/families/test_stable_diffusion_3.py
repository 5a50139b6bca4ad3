"""What is particular to Stable Diffusion 3.5; the rest is in test_every_family.py."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from family_inputs import PROMPTS, SIZE, batch, one_line

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.loading import ModelSource, empty_parts, load_pipeline, read_model_info
from pso_utils.families.stable_diffusion_3 import StableDiffusion3
from pso_utils.run.model_card import save_model_card
from pso_utils.schedules import make_schedule
from tests.families.cases import sd3, sd3_without_t5


DEPLOYMENT = Deployment(4, None, None, **SIZE)


@pytest.fixture(scope="module")
def family():
    return StableDiffusion3(sd3.build())


@pytest.fixture(scope="module")
def folder_without_t5(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sd3-without-t5")
    sd3_without_t5.build().save_pretrained(folder)
    return str(folder)


def test_the_sigmas_are_shifted_once_where_diffusers_own_are_shifted_twice(family):
    scheduler = family.pipeline.scheduler
    arguments = family.schedule_arguments(scheduler, 4, vae_config=family.pipeline.vae.config, height=32, width=32)
    schedule = make_schedule(scheduler, 4, stochastic=False, **arguments)
    torch.testing.assert_close(schedule.columns.sigma, torch.tensor([1, 0.9, 0.75, 0.5]))
    expected = {"num_inference_steps": 4, "sigmas": arguments["sigmas"], "guidance_scale": 0.0}
    assert family.call_arguments(DEPLOYMENT) == expected | SIZE | {"max_sequence_length": 256}
    family.pipeline.set_progress_bar_config(disable=True)
    family.pipeline(PROMPTS, num_inference_steps=4, guidance_scale=0.0, output_type="latent", **SIZE)
    assert 0.008 < float(family.pipeline.scheduler.sigmas[3]) < 0.01


def test_classifier_free_guidance_is_refused():
    assert StableDiffusion3.checked_guidance({}, 1.0) == 1
    with pytest.raises(UserError, match="--guidance_scale 1.5: .* drop the flag") as info:
        StableDiffusion3.checked_guidance({}, 1.5)
    one_line(info)


def test_prompts_have_clips_length_and_t5s(family, caplog):
    shorter = StableDiffusion3(family.pipeline, max_sequence_length=64)
    assert batch(family)["prompt_embeds"].shape == (2, 24 + 256, 40)
    assert batch(shorter)["prompt_embeds"].shape == (2, 24 + 64, 40)
    assert shorter.call_arguments(DEPLOYMENT)["max_sequence_length"] == 64
    assert caplog.records == []
    shorter.encode_prompts(["panda " * 100])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("prompts are cut off after 64 tokens")


def test_a_pipeline_that_was_saved_without_t5_is_loaded_without_it(folder_without_t5, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="text_encoder_3"):
        StableDiffusion3Pipeline.from_pretrained(folder_without_t5)
    source = ModelSource(folder_without_t5)
    assert set(empty_parts(source, read_model_info(source))) == {"transformer", "text_encoder", "text_encoder_2"}
    family = StableDiffusion3(load_pipeline(source))
    assert len(family.text_encoders) == 2
    assert batch(family)["prompt_embeds"][:, 24:].eq(0).all()

    family.add_lora(rank=2)
    family.save_lora(tmp_path)
    family.free_text_encoders()
    monkeypatch.setattr("pso_utils.run.model_card.model_source", lambda args: source)
    card = save_model_card(type("Arguments", (), {"output_dir": tmp_path}), family, DEPLOYMENT, prompt="panda")
    assert "text_encoder_3=None, tokenizer_3=None, dtype" in card.read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]," in card.read_text() and family.card_note in card.read_text()
