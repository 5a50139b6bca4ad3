"""SDXL's adapter against diffusers' own pipeline."""

import logging

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from family_inputs import PROMPTS, SIZE, batch, draw, generators, one_line, plain_pipeline, record_calls

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.sdxl import SDXL
from tests.conftest import build_pipeline


WIDE = {"height": 32, "width": 64}
OTHERS = ["grinning face", "sailboat vehicle", "a cactus plant in t-shirt clothes", "", "apple"]


@pytest.fixture(scope="module")
def guided_pipeline_dir(tmp_path_factory) -> str:
    """A pipeline whose UNet takes a guidance embedding."""
    folder = tmp_path_factory.mktemp("guided-sdxl")
    build_pipeline(seed=2, time_cond_proj_dim=16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["plain", "guided"])
def any_pipeline_dir(request, tiny_pipeline_dir, guided_pipeline_dir) -> str:
    return tiny_pipeline_dir if request.param == "plain" else guided_pipeline_dir


# ---- The model ----


@pytest.mark.parametrize(
    "size, scheduler, weight_dtype",
    [
        (SIZE, "lcm", torch.float32),
        (WIDE, "euler_ancestral", torch.float32),  # scales latents, and its timesteps are floats
        (WIDE, "lcm", torch.bfloat16),
    ],
)
def test_predict_gives_the_pipelines_model_output_bit_for_bit(any_pipeline_dir, size, scheduler, weight_dtype):
    pipeline = load_pipeline(ModelSource(any_pipeline_dir, scheduler=scheduler), weight_dtype=weight_dtype)
    family = SDXL(pipeline)
    calls = record_calls(pipeline.unet, lambda: draw(pipeline, guidance_scale=family.guidance_scale, **size))
    assert len(calls) == 2
    conditioning = batch(family, **size)
    for (model_input, timestep), _, output in calls:
        with torch.no_grad():
            predicted = family.predict(model_input.float(), timestep.repeat(2), conditioning)
        assert predicted.dtype == torch.float32 and predicted.shape == (2, *family.latent_shape(**size))
        assert torch.equal(predicted, output.float())


def test_predict_at_unlike_timesteps_gives_each_row_its_own_bits(any_pipeline_dir):
    pipeline = load_pipeline(ModelSource(any_pipeline_dir))
    family = SDXL(pipeline)
    calls = record_calls(pipeline.unet, lambda: draw(pipeline, guidance_scale=family.guidance_scale))
    ((first, early), _, early_output), ((second, late), _, late_output) = calls
    assert early != late
    latents, timesteps = torch.stack([first[0], second[1]]), torch.stack([early, late])
    with torch.no_grad():
        predicted = family.predict(latents, timesteps, batch(family))
    assert torch.equal(predicted, torch.stack([early_output[0], late_output[1]]))


# ---- Prompts ----


def test_prompts_are_encoded_as_the_pipeline_encodes_them(family, pipeline):
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    rows = family.encode_prompts(PROMPTS)
    assert [set(row) for row in rows] == [{"prompt_embeds", "pooled_prompt_embeds"}] * 2
    for row, embeds, pooled in zip(rows, prompt_embeds, pooled_prompt_embeds):
        assert torch.equal(row["prompt_embeds"], embeds) and torch.equal(row["pooled_prompt_embeds"], pooled)
        assert not any(tensor.requires_grad for tensor in row.values())
    assert not torch.equal(rows[0]["prompt_embeds"], rows[1]["prompt_embeds"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_a_prompt_in_batches_of_one_size_has_the_same_bits_wherever_it_stands(family, batch_size):
    batches = []
    for position in range(batch_size):
        for shift in range(2):
            others = [OTHERS[(position + shift + index) % len(OTHERS)] for index in range(batch_size - 1)]
            batches.append((position, [*others[:position], PROMPTS[0], *others[position:]]))
    batches.append((batch_size - 1, [PROMPTS[0]] * batch_size))  # as a batch is filled up
    rows = [family.encode_prompts(prompts)[position] for position, prompts in batches]
    for row in rows[1:]:
        assert all(torch.equal(row[name], rows[0][name]) for name in rows[0])


class Records(logging.Handler):
    """The messages of loggers that don't propagate, too."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_prompts_that_are_too_long_are_warned_of_once_and_shortly(family, pipeline, caplog):
    long_prompts = [" ".join([word] * 500) for word in ("panda", "apple", "cactus\n")]
    records, libraries = Records(), [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(records)
    try:
        for prompts in ([PROMPTS[0], *long_prompts], long_prompts, PROMPTS):
            family.encode_prompts(prompts)
        assert records.messages == []
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("prompts are cut off after 24 tokens, the first one is: 'panda panda ")
        assert len(message) < 200 and "\n" not in message
        pipeline.encode_prompt(long_prompts, do_classifier_free_guidance=False)
        assert len(records.messages) > 1  # what would be said without us
    finally:
        for library in libraries:
            library.removeHandler(records)


def test_prompts_that_fit_exactly_are_not_warned_of(family, caplog):
    limit = family.pipeline.tokenizer.model_max_length - 2  # start and end
    fitting = " ".join(["panda"] * limit)
    family.encode_prompts([fitting])
    assert caplog.records == []
    family.encode_prompts([f"{fitting} panda"])
    assert len(caplog.records) == 1


# ---- Conditioning ----


def test_a_batch_holds_what_the_pipeline_gives_the_unet(any_pipeline_dir):
    pipeline = load_pipeline(ModelSource(any_pipeline_dir))
    family = SDXL(pipeline)
    ((_, kwargs, _),) = record_calls(
        pipeline.unet, lambda: draw(pipeline, guidance_scale=family.guidance_scale, num_inference_steps=1, **WIDE)
    )
    conditioning = batch(family, **WIDE)
    expected = {
        "prompt_embeds": kwargs["encoder_hidden_states"],
        "pooled_prompt_embeds": kwargs["added_cond_kwargs"]["text_embeds"],
        "add_time_ids": kwargs["added_cond_kwargs"]["time_ids"],
    }
    if kwargs["timestep_cond"] is not None:
        expected["timestep_cond"] = kwargs["timestep_cond"]
    assert conditioning.keys() == expected.keys()
    assert ("timestep_cond" in conditioning) == (pipeline.unet.config.time_cond_proj_dim is not None)
    for name, tensor in expected.items():
        assert conditioning[name].dtype == tensor.dtype and torch.equal(conditioning[name], tensor)


def test_time_ids_are_of_uncropped_images_unless_told_otherwise(family):
    conditioning = batch(family, **WIDE)
    assert conditioning["add_time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    sizes, corners = torch.tensor([[300, 200], [33, 77]]), torch.tensor([[0, 5], [1, 0]])
    rows = family.encode_prompts(PROMPTS)
    given = family.collate(rows, **WIDE, original_sizes=sizes, crop_top_lefts=corners)
    assert given["add_time_ids"].tolist() == [[300, 200, 0, 5, 32, 64], [33, 77, 1, 0, 32, 64]]
    one_given = family.collate(rows, **WIDE, original_sizes=sizes)
    assert one_given["add_time_ids"].tolist() == [[300, 200, 0, 0, 32, 64], [33, 77, 0, 0, 32, 64]]
    assert given["add_time_ids"].dtype == conditioning["prompt_embeds"].dtype


def test_guidance_scale_is_an_input_of_a_unet_that_takes_one(guided_pipeline_dir):
    pipeline = load_pipeline(ModelSource(guided_pipeline_dir))
    families = {scale: SDXL(pipeline, guidance_scale=scale) for scale in (None, 8.0, 3.0)}
    assert [family.guidance_scale for family in families.values()] == [8.0, 8.0, 3.0]
    embeddings = {scale: batch(family)["timestep_cond"] for scale, family in families.items()}
    assert all(embedding.shape == (2, 16) for embedding in embeddings.values())
    assert torch.equal(embeddings[None], embeddings[8.0]) and not torch.equal(embeddings[3.0], embeddings[8.0])


def test_guidance_without_a_guidance_embedding_is_an_error(pipeline):
    assert SDXL(pipeline).guidance_scale == 0
    for scale in (0.0, 0.5, 1.0):
        assert SDXL.checked_guidance({"time_cond_proj_dim": None}, scale) == scale
    assert SDXL.checked_guidance({}, None) == 0
    for make in (lambda: SDXL.checked_guidance({}, 7.5), lambda: SDXL(pipeline, guidance_scale=7.5)):
        with pytest.raises(UserError, match="--guidance_scale 7.5: .* drop the flag") as info:
            make()
        one_line(info)


# ---- Images ----


@pytest.mark.parametrize(
    "scheduler, size, settings",
    [
        (None, SIZE, {"num_inference_steps": 3}),
        ("lcm", WIDE, {"timesteps": [999, 499, 249]}),
        ("euler", SIZE, {"num_inference_steps": 2}),
        ("euler_ancestral", WIDE, {"num_inference_steps": 2}),
        ("tcd", WIDE, {"num_inference_steps": 2, "eta": 0.3}),
        ("ddim", SIZE, {"num_inference_steps": 2, "eta": 1.0}),
    ],
)
def test_generate_draws_what_the_plain_pipeline_draws_bit_for_bit(any_pipeline_dir, size, scheduler, settings):
    family = SDXL(load_pipeline(ModelSource(any_pipeline_dir, scheduler=scheduler)))
    plain = plain_pipeline(any_pipeline_dir)
    if scheduler is not None:
        plain.scheduler = family.pipeline.scheduler
    expected = draw(plain, output_type="latent", guidance_scale=family.guidance_scale, **settings, **size)
    settings = {"num_inference_steps": None, "timesteps": None, "eta": None} | settings
    latents = family.generate(batch(family, **size), generators(), Deployment(**settings, **size))
    assert latents.dtype == torch.float32 and latents.shape == (2, *family.latent_shape(**size))
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_drawn_latents_are_generated_from_their_seeds_in_batches(family, batch_size):
    deployment, seeds = Deployment(2, None, None, **SIZE), [3, 5, 3]
    conditioning = family.collate(family.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]]), **SIZE)
    latents = family.draw_latents(conditioning, seeds, deployment=deployment, batch_size=batch_size)
    for start in range(0, 3, batch_size):
        rows = slice(start, start + batch_size)
        seeded = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        assert torch.equal(latents[rows], family.generate(conditioning.rows(rows), seeded, deployment))
    torch.testing.assert_close(latents[0], latents[2], rtol=0, atol=1e-3)  # batches of other sizes round differently
    assert not torch.allclose(latents[0], latents[1], rtol=0, atol=1e-1)


def test_generate_runs_the_lora_that_is_trained(family):
    deployment, conditioning = Deployment(2, None, None, **SIZE), batch(family)
    base = family.generate(conditioning, generators(), deployment)
    for parameter in family.add_lora(rank=2):
        torch.nn.init.constant_(parameter, 0.1)
    tuned = family.generate(conditioning, generators(), deployment)
    assert not torch.equal(tuned, base) and not tuned.requires_grad
    with family.without_lora():
        assert torch.equal(family.generate(conditioning, generators(), deployment), base)


def test_latent_shape_is_the_pipelines(family):
    assert family.latent_shape(32, 32) == (4, 8, 8)
    assert family.latent_shape(64, 32) == (4, 16, 8)
    assert draw(family.pipeline, output_type="latent", **WIDE).shape == (2, *family.latent_shape(**WIDE))


# ---- Parts ----


def test_parts_that_do_not_belong_together_are_one_clear_error(tiny_pipeline_dir, tmp_path):
    AutoencoderKL.from_config({"latent_channels": 16, "norm_num_groups": 8}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an? AutoencoderKL of 16 channels; pass an AutoencoderKL of 4") as info:
        load_pipeline(ModelSource(tiny_pipeline_dir, vae=str(tmp_path)))
    one_line(info)
    pipeline = load_pipeline(ModelSource(tiny_pipeline_dir))
    pipeline.vae = AutoencoderKL.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="UNet takes 4 channels .* VAE makes 16 channels; pass parts that") as info:
        SDXL(pipeline)
    one_line(info)


def test_family_is_of_the_pipelines_class(family, pipeline):
    assert isinstance(pipeline, StableDiffusionXLPipeline) and family.pipeline_class is StableDiffusionXLPipeline
    assert family.denoiser is pipeline.unet and family.text_encoders == [pipeline.text_encoder, pipeline.text_encoder_2]
    assert family.schedule_arguments(pipeline.scheduler, 4, vae_config={}, height=32, width=32) == {}
