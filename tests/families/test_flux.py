"""FLUX.1's own: what guidance means in each of the two, how long prompts are, a distillation LoRA with its scale."""

import pytest
import torch
from family_inputs import generators, noise, one_line, randomize_lora

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.flux import Flux
from pso_utils.families.loading import ModelSource, load_pipeline
from tests.families.cases import PROMPTS, flux_dev, flux_schnell


SIZE = (32, 32)
DEPLOYMENT = Deployment(2, None, None, *SIZE)


def conditioning_of(family):
    return family.collate(family.encode_prompts(PROMPTS), *SIZE)


def test_guidance_is_an_input_of_dev_and_refused_for_schnell():
    assert Flux.checked_guidance({"guidance_embeds": True}, None) == 3.5
    assert Flux.checked_guidance({"guidance_embeds": True}, 2.0) == 2.0
    assert Flux.checked_guidance({"guidance_embeds": False}, None) == 0.0
    with pytest.raises(UserError, match="--guidance_scale 1.0: .* drop the flag") as info:
        Flux.checked_guidance({"guidance_embeds": False}, 1.0)
    one_line(info)


@pytest.mark.parametrize("module, guidance_scale, length", [(flux_schnell, 0.0, 256), (flux_dev, 3.5, 512)])
def test_the_card_calls_each_as_it_is_deployed(module, guidance_scale, length):
    call = Flux(module.build()).call_arguments(DEPLOYMENT)
    steps_and_size = {"num_inference_steps": 2, "height": 32, "width": 32}
    assert call == steps_and_size | {"guidance_scale": guidance_scale, "max_sequence_length": length}


def test_the_plain_pipeline_draws_the_same_when_called_as_the_card_says():
    pipeline = flux_dev.build()
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for guidance_scale, max_sequence_length in ((2.0, 64), (5.0, 64), (5.0, 128)):
        family = Flux(pipeline, guidance_scale=guidance_scale, max_sequence_length=max_sequence_length)
        drawn.append(family.generate(conditioning_of(family), generators(), DEPLOYMENT))
        call = family.call_arguments(DEPLOYMENT)
        latents = pipeline(prompt=PROMPTS, generator=generators(), output_type="latent", **call).images
        assert torch.equal(drawn[-1], flux_dev.unpack(pipeline, latents, *SIZE))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3 and (drawn[1] - drawn[2]).abs().max() > 1e-4


def test_prompts_that_are_cut_off_are_told_of_once(caplog):
    family = Flux(flux_dev.build(), max_sequence_length=32)
    for prompts in (PROMPTS, [80 * "panda ", 90 * "panda "], [100 * "panda "]):
        family.encode_prompts(prompts)
    (record,) = caplog.records
    assert record.getMessage().startswith("prompts are cut off after 32 tokens, the first one is: 'a sailboat")


def test_a_distillation_lora_is_fused_with_its_scale(tmp_path):
    flux_dev.build().save_pretrained(tmp_path / "pipeline")
    family = Flux(load_pipeline(ModelSource(str(tmp_path / "pipeline"))))
    family.add_lora(rank=2, seed=0)
    randomize_lora(family.denoiser)
    family.save_lora(tmp_path / "lora")
    latents, timesteps, conditioning = noise(2, 16, 4, 4), torch.tensor([1000.0, 300.0]), conditioning_of(family)
    outputs = {}
    with torch.no_grad():
        for scale in (1.0, 0.125):
            for layer in family.lora_layers:
                layer.set_scale("default", scale)
            outputs[scale] = family.predict(latents, timesteps, conditioning)
        source = ModelSource(
            str(tmp_path / "pipeline"), distillation_lora=str(tmp_path / "lora"), distillation_lora_scale=0.125
        )
        fused = Flux(load_pipeline(source)).predict(latents, timesteps, conditioning)
    torch.testing.assert_close(fused, outputs[0.125], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused, outputs[1.0], rtol=0.01)
