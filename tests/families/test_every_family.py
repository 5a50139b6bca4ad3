"""Each family's adapter against diffusers' own pipeline, on a tiny one with random weights."""

from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pso_utils.errors import UserError
from pso_utils.families import FAMILIES, Conditioning, Deployment
from pso_utils.families.flow import FlowFamily
from pso_utils.families.loading import ModelSource, empty_parts, load_pipeline, read_model_info
from pso_utils.mdp import sample_trajectory
from pso_utils.schedules import make_schedule
from tests.families.cases import CASES, PROMPTS, find_case
from tests.families.family_inputs import generators, randomize_lora


TOLERANCE = 1e-5  # relative to the largest value
VISIBLE = 0.01  # likewise, of what must move the model's output


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A family's case, with the folder of its tiny pipeline."""
    case = find_case(request.param)
    case.folder = tmp_path_factory.mktemp(request.param)
    case.build().save_pretrained(case.folder)
    case.source = ModelSource(str(case.folder), scheduler_config=case.SCHEDULER_CONFIG)
    case.info = read_model_info(case.source)
    case.loaded = load_pipeline(case.source)
    case.plain = load_plain(case)
    return case


@pytest.fixture
def family(case):
    return case.info.family(deepcopy(case.loaded))


def schedule_of(case, steps: int, height: int, width: int, **settings):
    size = {"vae_config": case.info.vae_config, "height": height, "width": width}
    arguments = case.info.family.schedule_arguments(case.info.scheduler, steps, **size)
    return make_schedule(case.info.scheduler, steps, **settings, **arguments)


def load_plain(case, dtype: torch.dtype = torch.float32):
    """What diffusers alone makes of the folder."""
    pipeline = case.info.family.pipeline_class.from_pretrained(
        case.folder, dtype=dtype, **dict.fromkeys(case.info.absent_parts)
    )
    config = {**pipeline.scheduler.config, **case.SCHEDULER_CONFIG}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def plain(case, **config):
    """A copy of it, as it was loaded; `config` replaces values of its scheduler's."""
    pipeline = deepcopy(case.plain)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **config)
    return pipeline


def draw(case, pipeline, steps: int, height: int, width: int, **settings):
    """What the plain pipeline draws of PROMPTS, called as at deployment."""
    size = {"height": height, "width": width}
    settings = {"prompt": list(PROMPTS), "num_inference_steps": steps, "output_type": "np"} | size | settings
    settings |= case.CALL | case.CALL_AT.get(steps, {})
    return pipeline(generator=generators(len(PROMPTS)), **settings).images


@contextmanager
def recorded_steps(case, pipeline, height: int, width: int):
    """The latents [B, C, h, w] before the first step and after each, and the noise of each, of what is drawn within."""
    latents, noises, step, randn_like = [], [], pipeline.scheduler.step, torch.randn_like
    module = __import__(type(pipeline.scheduler).__module__, fromlist=["randn_tensor"])
    randn_tensor = getattr(module, "randn_tensor", None)
    unpack = partial(case.unpack, pipeline, height=height, width=width)

    def record_step(model_output, timestep, sample, *args, **kwargs):
        if not latents:
            latents.append(unpack(sample))
        result = step(model_output, timestep, sample, *args, **kwargs)
        latents.append(unpack(result[0]))
        return result

    def recorded(function):
        def record(*args, **kwargs):
            noises.append(function(*args, **kwargs))
            return noises[-1]

        return record

    pipeline.scheduler.step = record_step
    torch.randn_like = recorded(randn_like)
    if randn_tensor is not None:
        module.randn_tensor = recorded(randn_tensor)
    try:
        yield latents, noises
    finally:
        torch.randn_like = randn_like
        if randn_tensor is not None:
            module.randn_tensor = randn_tensor
    noises[:] = [unpack(noise) for noise in noises]


def first_noise(family, height: int, width: int) -> torch.Tensor:
    """What the pipeline draws from the generators before the first step."""
    shape = family.latent_shape(height, width)
    return torch.stack([torch.randn((1, *shape), generator=generator)[0] for generator in generators()])


def conditioning_of(family, height: int, width: int, prompts=PROMPTS) -> Conditioning:
    return family.collate(family.encode_prompts(prompts), height, width)


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = TOLERANCE):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def runs(case):
    """(steps, height, width): both numbers of steps, both sizes."""
    return [(steps, *size) for steps, size in zip(case.STEPS, case.SIZES)]


# ---- The case ----


def test_the_case_is_not_trivial(case, family):
    """Else what follows would not tell a wrong prompt, timestep or LoRA from the right one."""
    steps, height, width = runs(case)[0]
    start, end = schedule_of(case, steps, height, width, stochastic=False).at(torch.tensor([0, steps - 1])).timesteps
    latents = first_noise(family, height, width)[:1]

    def predict(prompt: str, timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return family.predict(latents, timestep[None], conditioning_of(family, height, width, [prompt]))

    output = predict(PROMPTS[0], start)
    others = {"another prompt": predict(PROMPTS[1], start), "another timestep": predict(PROMPTS[0], end)}
    family.add_lora(rank=2, seed=0)
    randomize_lora(family.denoiser)
    others["a LoRA"] = predict(PROMPTS[0], start)
    for what, other in others.items():
        change = float((other - output).abs().max() / output.abs().max())
        assert change > VISIBLE, f"{what} moves the output by {change:.2%} alone: draw stronger weights in the case"


# ---- Prompts ----


def test_prompts_are_encoded_without_a_graph(case, family):
    for encoder in family.text_encoders:
        encoder.requires_grad_()
    for conditioning in family.encode_prompts(PROMPTS):
        assert not any(tensor.requires_grad for tensor in conditioning.values())


def test_prompts_that_are_cut_off_are_told_of(case, family, caplog):
    """At the limit the last word counts, and at twice the limit no more."""
    tokenizer, limit = family._prompt_limit()

    def prompt(words: int) -> str:
        return " ".join(["panda"] * words)

    def num_tokens(words: int) -> int:
        return len(tokenizer(prompt(words))["input_ids"])

    def differ(words: int) -> bool:
        """Whether the last of so many words counts."""
        one, other = (row["prompt_embeds"] for row in family.encode_prompts([prompt(words), prompt(words - 1)]))
        return one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-5)

    fitting = 10 + (limit - num_tokens(10)) // (num_tokens(11) - num_tokens(10))
    assert differ(fitting) and not caplog.records
    assert not differ(2 * limit)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"prompts are cut off after {limit} tokens")


# ---- Sampling ----


def test_the_trajectory_is_the_plain_pipelines(case, family):
    """With the noise that the pipeline draws: none under Euler, its own under LCM and SCM."""
    for steps, height, width in runs(case):
        pipeline = plain(case)
        with recorded_steps(case, pipeline, height, width) as (expected, step_noise):
            draw(case, pipeline, steps, height, width)
        start = first_noise(family, height, width)
        noise = torch.stack([start, *step_noise, *[torch.zeros_like(start)] * (steps - len(step_noise))], dim=1)
        schedule = schedule_of(case, steps, height, width, stochastic=False)
        denoise = partial(family.predict, conditioning=conditioning_of(family, height, width))
        with torch.no_grad():
            trajectory = sample_trajectory(schedule, denoise, noise)
        assert trajectory.shape[1] == len(expected) == steps + 1
        assert trajectory.std() > 0.1 and trajectory[0].ne(trajectory[1]).any()
        for latents, own in zip(expected, trajectory.unbind(1)):
            assert_close(own, latents.float(), 0 if case.IS_EXACT else TOLERANCE)


def test_the_stochastic_trajectory_is_the_schedulers_own(case, family):
    if "stochastic_sampling" not in case.info.scheduler.config:
        pytest.skip("the scheduler is stochastic as it is, or not at all")
    steps, height, width = runs(case)[1]
    pipeline = plain(case, stochastic_sampling=True)
    with recorded_steps(case, pipeline, height, width) as (expected, step_noise):
        draw(case, pipeline, steps, height, width)
    assert len(step_noise) == steps
    noise = torch.stack([first_noise(family, height, width), *step_noise], dim=1)
    schedule = schedule_of(case, steps, height, width, eta=1.0)
    denoise = partial(family.predict, conditioning=conditioning_of(family, height, width))
    with torch.no_grad():
        trajectory = sample_trajectory(schedule, denoise, noise)
    for latents, own in zip(expected, trajectory.unbind(1)):
        assert_close(own, latents.float())


def test_generate_draws_what_the_plain_pipeline_draws(case, family):
    for steps, height, width in runs(case):
        deployment = Deployment(steps, None, case.ETA, height, width)
        latents = family.generate(conditioning_of(family, height, width), generators(), deployment)
        assert latents.shape == (2, *family.latent_shape(height, width)) and latents.dtype == torch.float32
        images = np.stack([np.asarray(image) for image in family.decode_latents(latents)])
        expected = draw(case, plain(case), steps, height, width)
        assert images.std() > 1
        assert np.abs(images - 255 * expected).max() <= 0.51  # rounded


def test_rows_at_unlike_steps_and_padded_prompts_are_as_alone(case, family):
    steps, height, width = runs(case)[1]
    schedule = schedule_of(case, steps, height, width, stochastic=False)
    latents, at = first_noise(family, height, width), schedule.at(torch.tensor([0, steps - 1]))
    with torch.no_grad():
        both = family.predict(latents, at.timesteps, conditioning_of(family, height, width))
        for row, prompt in enumerate(PROMPTS):
            conditioning = conditioning_of(family, height, width, [prompt])
            alone = family.predict(latents[row : row + 1], at.timesteps[row : row + 1], conditioning)
            assert_close(both[row : row + 1], alone)


def test_in_bfloat16_the_model_is_called_as_the_pipeline_calls_it(case):
    """Each step alone: most pipelines round their latents to bfloat16 after every step, and training does not. With the
    same embeddings where the pipeline's own have other last bits, or other padding."""
    steps, height, width = runs(case)[0]
    family = case.info.family(load_pipeline(case.source, weight_dtype=torch.bfloat16))
    pipeline, calls = load_plain(case, torch.bfloat16), []
    step = pipeline.scheduler.step

    def record_step(model_output, timestep, sample, *args, **kwargs):
        calls.append((model_output, sample))
        return step(model_output, timestep, sample, *args, **kwargs)

    conditioning = conditioning_of(family, height, width)
    given = {} if case.IS_EXACT else {"prompt": None, **family.pipeline_inputs(conditioning)}
    pipeline.scheduler.step = record_step
    draw(case, pipeline, steps, height, width, **given)
    unpack = partial(case.unpack, pipeline, height=height, width=width)
    schedule = schedule_of(case, steps, height, width, stochastic=False)
    assert len(calls) == steps
    for index, (model_output, sample) in enumerate(calls):
        at = schedule.at(torch.full((len(PROMPTS),), index))
        latents = at.columns.input_scale * unpack(sample).float()
        with torch.no_grad():
            assert torch.equal(family.predict(latents, at.timesteps, conditioning), unpack(model_output).float())


def test_a_batch_of_conditionings_can_be_indexed_repeated_and_joined(case, family):
    height, width = case.SIZES[0]
    batch = conditioning_of(family, height, width)
    alike = conditioning_of(family, height, width, [PROMPTS[1], PROMPTS[0]])
    for name, tensor in batch.rows(torch.tensor([1, 0])).items():
        assert torch.equal(tensor, alike[name])
    for tensor in batch.repeat_interleave(2).values():
        assert torch.equal(tensor[1], tensor[0]) and len(tensor) == 4


# ---- Images ----


def test_images_are_decoded_as_the_pipeline_decodes_them(case, family):
    steps, height, width = runs(case)[0]
    pipeline, decoded = plain(case), []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **settings: decoded.append(latents) or decode(latents, **settings)
    with recorded_steps(case, pipeline, height, width) as (latents, _):
        images = draw(case, pipeline, steps, height, width)
    own = np.stack([np.asarray(image) for image in family.decode_latents(latents[-1])])
    assert np.abs(own - 255 * images).max() <= 0.51
    given = []
    decode_own = family.pipeline.vae.decode
    family.pipeline.vae.decode = lambda latents, **settings: given.append(latents) or decode_own(latents, **settings)
    family.vae_batch_size = len(PROMPTS)
    family.decode_latents(latents[-1])
    assert_close(given[0], decoded[0], 1e-6)


def test_images_are_encoded_as_diffusers_own_training_script_does(case, family):
    height, width = case.SIZES[1]
    pixels = torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    assert latents.shape == (2, *family.latent_shape(height, width)) and latents.dtype == torch.float32
    with torch.no_grad():
        assert_close(latents, case.encode(plain(case), pixels))
    # what the VAE is given again is what it gave, and the scale is not a neutral one
    given, decode = [], family.pipeline.vae.decode
    family.pipeline.vae.decode = lambda latents, **settings: given.append(latents) or decode(latents, **settings)
    family.vae_batch_size = 2
    family.decode_latents(latents)
    with torch.no_grad():
        encoded = family.pipeline.vae.encode(pixels if given[0].ndim == 4 else pixels.unsqueeze(2))
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    assert_close(given[0], raw, 1e-6)
    assert latents.numel() == raw.numel() and not torch.allclose(latents.flatten(), raw.flatten(), rtol=0.01)


# ---- LoRA ----


def model_outputs(case, family, denoiser=None) -> torch.Tensor:
    steps, height, width = runs(case)[0]
    schedule = schedule_of(case, steps, height, width, stochastic=False)
    at = schedule.at(torch.tensor([0, steps - 1]))
    with torch.no_grad():
        return family.predict(first_noise(family, height, width), at.timesteps, conditioning_of(family, height, width))


def test_a_saved_lora_draws_in_the_pipeline_what_training_drew(case, family, tmp_path):
    steps, height, width = runs(case)[0]
    base = model_outputs(case, family)
    family.add_lora(rank=2, lora_alpha=3.0, seed=0)
    assert torch.equal(model_outputs(case, family), base)  # it starts as the identity
    randomize_lora(family.denoiser)
    trained = model_outputs(case, family)
    assert not torch.allclose(trained, base, rtol=0.01)
    with family.without_lora():
        assert torch.equal(model_outputs(case, family), base)
    family.save_lora(tmp_path)
    latents = family.generate(
        conditioning_of(family, height, width), generators(), Deployment(steps, None, case.ETA, height, width)
    )
    images = np.stack([np.asarray(image) for image in family.decode_latents(latents)])
    pipeline = plain(case)
    without = draw(case, pipeline, steps, height, width)
    pipeline.load_lora_weights(tmp_path)
    assert np.abs(images - 255 * draw(case, pipeline, steps, height, width)).max() <= 1
    assert np.abs(images - 255 * without).max() > 2


def test_the_base_of_a_distillation_lora_has_it_fused(case, family, tmp_path):
    family.add_lora(rank=2, seed=3)
    randomize_lora(family.denoiser)
    distilled = model_outputs(case, family)
    family.save_lora(tmp_path)
    source = ModelSource(str(case.folder), distillation_lora=str(tmp_path))
    fused = case.info.family(load_pipeline(source))
    base = model_outputs(case, fused)
    assert_close(base, distilled)
    fused.add_lora(rank=2, seed=4)
    randomize_lora(fused.denoiser, seed=5)
    assert not torch.allclose(model_outputs(case, fused), base, rtol=0.01)
    with fused.without_lora():
        assert torch.equal(model_outputs(case, fused), base)


def test_gradient_checkpointing_gives_the_same_gradients(case, family):
    steps, height, width = runs(case)[0]
    schedule = schedule_of(case, steps, height, width, stochastic=False)
    at, conditioning = schedule.at(torch.tensor([0, steps - 1])), conditioning_of(family, height, width)
    parameters = family.add_lora(rank=2, seed=0)
    randomize_lora(family.denoiser)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            family.denoiser.enable_gradient_checkpointing()
        output = family.predict(first_noise(family, height, width), at.timesteps, conditioning)
        gradients.append(torch.autograd.grad((output**2).mean(), parameters, allow_unused=True))
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients[0]) > 0
    for plain_gradient, checkpointed in zip(*gradients):
        assert (plain_gradient is None) == (checkpointed is None)
        if plain_gradient is not None:
            assert_close(checkpointed, plain_gradient)


# ---- What the files tell ----


def test_the_family_is_found_by_its_pipeline_class(case):
    family_class = case.info.family
    assert family_class.pipeline_class.__name__ in FAMILIES
    assert family_class.denoiser_name in ("unet", "transformer") and family_class.lora_targets
    assert family_class.conditioning_keys and family_class.text_encoder_classes and family_class.card_tags
    assert set(family_class.conditioning_keys) <= case.info.denoiser_config.keys()


def test_empty_parts_have_the_shapes_of_the_loaded_ones(case):
    for name, part in empty_parts(case.source, case.info).items():
        shapes = {key: value.shape for key, value in part.state_dict().items()}
        assert shapes == {key: value.shape for key, value in getattr(case.loaded, name).state_dict().items()}


def test_a_flow_schedule_is_not_shifted_twice(case):
    if type(case.info.scheduler) is not FlowMatchEulerDiscreteScheduler:
        pytest.skip("the scheduler has no shift")
    for steps, height, width in runs(case):
        schedule = schedule_of(case, steps, height, width, stochastic=False)
        assert schedule.columns.sigma[-1] > 0.05, "the last step starts from next to no noise: see base.py"


def test_sizes_that_the_packing_does_not_divide_are_refused(case):
    family, height, width = case.info.family, *case.SIZES[0]
    multiple, configs = family.size_multiple(case.info.vae_config), (case.info.vae_config, case.info.denoiser_config)
    family.check_size(*configs, height=multiple, width=2 * multiple)
    with pytest.raises(UserError, match="is not a multiple of"):
        family.check_size(*configs, height=multiple, width=multiple + 1)
    # nor does diffusers draw them: it raises, or rounds
    height += multiple // 2
    try:
        images = draw(case, plain(case), case.STEPS[0], height, width)
    except ValueError as error:
        assert "divisible" in str(error)
    else:
        assert images.shape[1] % multiple == 0


def test_sizes_beyond_learned_positions_are_refused(case, family):
    most = family.most_patches(case.info.denoiser_config) if isinstance(family, FlowFamily) else None
    if most is None:
        pytest.skip("positions are computed")
    multiple, configs = family.size_multiple(case.info.vae_config), (case.info.vae_config, case.info.denoiser_config)
    conditioning, longest = conditioning_of(family, 32, 32, PROMPTS[:1]), most * multiple

    def predict(side: int):
        with torch.no_grad():
            family.predict(torch.zeros(1, *family.latent_shape(side, side)), torch.tensor([500.0]), conditioning)

    family.check_size(*configs, height=longest, width=longest)
    predict(longest)
    with pytest.raises(UserError, match=f"--resolution {longest + multiple}: .* no positions beyond {longest}: pass"):
        family.check_size(*configs, height=multiple, width=longest + multiple)
    with pytest.raises((ValueError, IndexError)):
        predict(longest + multiple)
