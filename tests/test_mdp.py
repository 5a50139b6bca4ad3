"""The MDP against diffusers: its pipeline, its schedulers' `step`, and closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from pso_utils.mdp import (
    DEFAULT_ETA,
    SCHEDULERS,
    WEIGHTINGS,
    Schedule,
    add_noise,
    check_weighting,
    convert_scheduler,
    diffusion_inputs,
    forward_weight,
    gaussian_log_prob,
    keyed_noise,
    make_schedule,
    mean_gain,
    noise_levels,
    num_weighted_steps,
    predict_original_sample,
    sample_trajectory,
    scale_model_input,
    transition,
    transition_std,
)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# SDXL-base's scheduler/scheduler_config.json
SDXL_BASE = {
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TRAILING = {"timestep_spacing": "trailing"}
ALL_TIMESTEPS = {"original_inference_steps": 1000}
CLIPPED = {"clip_sample": True, "clip_sample_range": 0.5}

# (class, prediction type, further config, arguments of make_schedule)
MATRIX = [
    (scheduler_class, prediction_type, config, {"num_inference_steps": 4})
    for scheduler_class, config in [
        (LCMScheduler, ALL_TIMESTEPS),
        (EulerAncestralDiscreteScheduler, TRAILING),
        (TCDScheduler, ALL_TIMESTEPS),
        (DDIMScheduler, {**TRAILING, "clip_sample": False}),
        (EulerDiscreteScheduler, TRAILING),
    ]
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if (scheduler_class, prediction_type) != (EulerAncestralDiscreteScheduler, "sample")
]
# Euler's transition exists in diffusers only where its ancestral counterpart takes the prediction type; the rest is
# tested against the closed form.
IN_DIFFUSERS = [case for case in MATRIX if case[:2] != (EulerDiscreteScheduler, "sample")]
CUSTOM = {"timesteps": [999, 820, 410, 30]}
VARIANTS = [
    (LCMScheduler, "epsilon", {}, {"num_inference_steps": 4}),
    (LCMScheduler, "epsilon", {}, CUSTOM),
    (LCMScheduler, "epsilon", {**CLIPPED, **ALL_TIMESTEPS}, {"num_inference_steps": 3}),
    (LCMScheduler, "v_prediction", {"timestep_scaling": 0.003, **CLIPPED}, {"num_inference_steps": 5}),
    (LCMScheduler, "v_prediction", {"rescale_betas_zero_snr": True}, {"timesteps": [999, 500, 0]}),
    (EulerAncestralDiscreteScheduler, "epsilon", {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    (EulerAncestralDiscreteScheduler, "v_prediction", {"timestep_spacing": "linspace"}, {"num_inference_steps": 7}),
    (EulerAncestralDiscreteScheduler, "v_prediction", {"rescale_betas_zero_snr": True, **TRAILING}, {}),
    (EulerDiscreteScheduler, "epsilon", {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    (TCDScheduler, "epsilon", {}, {"num_inference_steps": 5, "eta": 1.0}),
    (TCDScheduler, "sample", CLIPPED, {"num_inference_steps": 3, "eta": 0.7}),
    (TCDScheduler, "epsilon", {}, {**CUSTOM, "eta": 0.05}),
    (TCDScheduler, "v_prediction", {"rescale_betas_zero_snr": True}, {}),
    (DDIMScheduler, "epsilon", {**CLIPPED, **TRAILING}, {"num_inference_steps": 6}),
    (DDIMScheduler, "sample", {**CLIPPED, "set_alpha_to_one": False, "steps_offset": 1}, {"eta": 0.5}),
    (DDIMScheduler, "v_prediction", {"rescale_betas_zero_snr": True, "clip_sample": False, **TRAILING}, {}),
    (DDIMScheduler, "epsilon", {"timestep_spacing": "linspace", "clip_sample": False}, {"num_inference_steps": 7}),
]
DEPLOYED = [
    (LCMScheduler, "epsilon", ALL_TIMESTEPS, {"num_inference_steps": 1, "stochastic": False}),
    (EulerAncestralDiscreteScheduler, "epsilon", TRAILING, {"num_inference_steps": 1, "stochastic": False}),
    (TCDScheduler, "epsilon", {}, {"eta": 0.0, "stochastic": False}),
    (DDIMScheduler, "epsilon", {**TRAILING, "clip_sample": False}, {"eta": 0.0, "stochastic": False}),
    (DDIMScheduler, "sample", TRAILING, {"num_inference_steps": 1, "stochastic": False}),
]
# Every step count, with every eta where there is one: what offline training takes.
OFFLINE = [
    (scheduler_class, prediction_type, config, {"num_inference_steps": steps, "stochastic": False, **eta})
    for scheduler_class, prediction_type, config, _ in MATRIX
    for steps in (1, 2, 4, 8)
    for eta in ([{"eta": 0.0}, {"eta": 0.4}, {"eta": 1.0}] if scheduler_class in DEFAULT_ETA else [{}])
]
# For what does not depend on eta.
FORWARD = [case for case in OFFLINE if not case[3].get("eta")] + VARIANTS


def name_case(value):
    if isinstance(value, type):
        return value.__name__
    return ",".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else value


def build(scheduler_class, prediction_type="epsilon", config=None, settings=None) -> tuple:
    """The scheduler and its schedule (of 4 steps unless `settings` say otherwise)."""
    scheduler = scheduler_class(**{**BETAS, "prediction_type": prediction_type, **(config or {})})
    return scheduler, make_schedule(scheduler, **with_steps(settings or {}))


def with_steps(settings: dict) -> dict:
    return settings if "timesteps" in settings else {"num_inference_steps": 4, **settings}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def fresh(scheduler, settings: dict):
    """A scheduler like `scheduler` that nothing has run, with its timesteps set."""
    scheduler = type(scheduler).from_config(scheduler.config)
    steps = {key: value for key, value in with_steps(settings).items() if key in ("timesteps", "num_inference_steps")}
    scheduler.set_timesteps(**steps)
    return scheduler


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def perfect_output(schedule, clean, noise, step_index):
    """What a model that knows the clean latents returns."""
    alpha_prod = column(schedule.scheduler.alphas_cumprod[schedule.timesteps[step_index].long()])
    velocity = alpha_prod.sqrt() * noise - (1 - alpha_prod).sqrt() * clean
    outputs = {"epsilon": noise, "v_prediction": velocity, "sample": clean}
    return outputs[schedule.scheduler.config.prediction_type]


def closed_forms(schedule) -> dict[str, torch.Tensor]:
    """The method page's figures of every step, each [N], in float64: alpha and sigma of the forward process, gain (c_n)
    and std of the transition."""
    scheduler, eta, last = schedule.scheduler, schedule.eta, schedule.num_steps - 1
    rows = []
    for step in range(schedule.num_steps):
        if hasattr(scheduler, "sigmas"):
            s, s_next = scheduler.sigmas[step : step + 2].double().tolist()
            rows.append((1.0, s, 1 - s_next**2 / s**2, math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)))
            continue
        level = scheduler.alphas_cumprod.double().tolist()
        t, t_next = int(schedule.timesteps[step]), int(schedule.timesteps[min(step + 1, last)])
        alpha, sigma = math.sqrt(level[t]), math.sqrt(1 - level[t])
        if isinstance(scheduler, LCMScheduler):
            gain, std = (1.0, 0.0) if step == last else (math.sqrt(level[t_next]), math.sqrt(1 - level[t_next]))
        elif isinstance(scheduler, TCDScheduler):
            t_next = 0 if step == last else t_next
            at_s = level[math.floor((1 - eta) * t_next)]
            ratio = 1.0 if step == last else level[t_next] / at_s
            gain = math.sqrt(ratio) * (math.sqrt(at_s) - math.sqrt(1 - at_s) * alpha / sigma)
            std = math.sqrt(1 - ratio)
        else:
            previous = t - 1000 // schedule.num_steps
            previous = level[previous] if previous >= 0 else float(scheduler.final_alpha_cumprod)
            std = eta * math.sqrt((1 - previous) / (1 - level[t]) * (1 - level[t] / previous))
            gain = math.sqrt(previous) - math.sqrt(1 - previous - std**2) * alpha / sigma
        rows.append((alpha, sigma, gain, std))
    return dict(zip(("alpha", "sigma", "gain", "std"), torch.tensor(rows, dtype=torch.float64).T))


def ancestral(scheduler):
    """What samples: for EulerDiscreteScheduler, its ancestral counterpart."""
    if isinstance(scheduler, EulerDiscreteScheduler):
        return EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    return scheduler


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def conditions(pipeline) -> dict:
    """Arguments of the UNet for a batch of two."""
    generator = torch.Generator().manual_seed(7)
    add_time_ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 128)
    return {
        "encoder_hidden_states": torch.randn(2, 24, 128, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 128, generator=generator),
            "time_ids": add_time_ids.repeat(2, 1),
        },
    }


def run_pipeline(pipeline, conditions, scheduler, schedule, settings) -> torch.Tensor:
    """The pipeline's latents after every step [B, N, C, H, W], from generators 0 and 1."""
    latents = []
    pipeline.scheduler = scheduler
    output = pipeline(
        prompt_embeds=conditions["encoder_hidden_states"],
        pooled_prompt_embeds=conditions["added_cond_kwargs"]["text_embeds"],
        guidance_scale=0.0,
        generator=generators(2),
        eta=schedule.eta or 0.0,
        output_type="latent",
        height=32,
        width=32,
        callback_on_step_end=lambda pipeline, step, timestep, kwargs: latents.append(kwargs["latents"]) or {},
        **{key: value for key, value in with_steps(settings).items() if key in ("timesteps", "num_inference_steps")},
    )
    assert torch.equal(output.images, latents[-1])
    return torch.stack(latents, dim=1)


def same_draws(num_steps: int) -> torch.Tensor:
    """The draws of generators 0 and 1, in the pipeline's order [2, N + 1, 4, 8, 8]."""
    draws = [[torch.randn(1, 4, 8, 8, generator=g) for _ in range(num_steps + 1)] for g in generators(2)]
    return torch.stack([torch.cat(draw) for draw in draws])


def make_denoise(pipeline, conditions):
    return lambda model_input, timesteps: pipeline.unet(model_input, timesteps, **conditions).sample


@pytest.mark.parametrize(
    "scheduler_class, prediction_type, config, settings", IN_DIFFUSERS + VARIANTS + DEPLOYED, ids=name_case
)
def test_trajectory_is_the_pipelines_bit_for_bit(
    pipeline, conditions, scheduler_class, prediction_type, config, settings
):
    scheduler, schedule = build(scheduler_class, prediction_type, config, settings)
    expected = run_pipeline(pipeline, conditions, ancestral(scheduler), schedule, settings)
    latents = sample_trajectory(schedule, make_denoise(pipeline, conditions), same_draws(schedule.num_steps))
    assert latents.dtype == torch.float32 and latents.shape == (2, schedule.num_steps + 1, 4, 8, 8)
    assert expected.isfinite().all() and not torch.equal(expected[0], expected[1])
    assert torch.equal(latents[:, 1:], expected)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", IN_DIFFUSERS + VARIANTS, ids=name_case)
def test_transition_is_the_schedulers_step(scheduler_class, prediction_type, config, settings):
    """In one batch, each sample at its own step, in no order."""
    scheduler, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.randperm(schedule.num_steps, generator=torch.Generator().manual_seed(1))
    model_output, sample = torch.randn(2, schedule.num_steps, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    model_input = scale_model_input(schedule, sample, step_index)
    mean, std, _ = transition(schedule, model_output, sample, step_index)
    assert std.shape == (schedule.num_steps, 1, 1, 1)
    assert (std[step_index < schedule.num_steps - 1] > 0).all()

    for row, step in enumerate(step_index.tolist()):
        stepper = fresh(ancestral(scheduler), settings)
        timestep, current = stepper.timesteps[step], sample[row : row + 1]
        assert torch.equal(schedule.timesteps[step], timestep)
        assert torch.equal(model_input[row : row + 1], stepper.scale_model_input(current, timestep))
        eta = {} if schedule.eta is None else {"eta": schedule.eta}
        arguments = (model_output[row : row + 1], timestep, current)
        expected = stepper.step(*arguments, **eta, generator=generators(1)[0], return_dict=False)[0]
        noise = torch.randn(1, 4, 8, 8, generator=generators(1)[0])
        assert torch.equal(mean[row : row + 1] + std[row : row + 1] * noise, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_and_pipeline_leave_each_other_alone(pipeline, conditions, name):
    """A scheduler that a pipeline has run gives the same schedule, and is not changed by it. (The Euler family's own
    add_noise then ignores its timesteps.)"""
    scheduler = convert_scheduler(LCMScheduler(**BETAS), name)
    schedule = make_schedule(scheduler, 4)
    denoise, noise = make_denoise(pipeline, conditions), same_draws(4)
    before = sample_trajectory(schedule, denoise, noise)
    forward = draw(4, seed=1), draw(4, seed=2), torch.tensor([3, 1, 0, 2])
    noisy = add_noise(schedule, *forward)
    assert torch.equal(noisy, fresh(scheduler, {}).add_noise(*forward[:2], schedule.timesteps[forward[2]]))
    run_pipeline(pipeline, conditions, scheduler, schedule, {"num_inference_steps": 3})
    state = dict(vars(scheduler))
    again = make_schedule(scheduler, 4)
    assert torch.equal(sample_trajectory(again, denoise, noise), before)
    assert torch.equal(sample_trajectory(schedule, denoise, noise), before)
    assert torch.equal(add_noise(again, *forward), noisy) and torch.equal(add_noise(schedule, *forward), noisy)
    assert all(vars(scheduler)[key] is value for key, value in state.items())
    assert len(scheduler.timesteps) == 3


@pytest.mark.parametrize("prediction_type", ("epsilon", "v_prediction", "sample"))
@pytest.mark.parametrize(
    "config, steps",
    [
        (TRAILING, {"num_inference_steps": 4}),
        ({"timestep_spacing": "leading", "steps_offset": 1}, {"timesteps": [999, 749, 499, 249]}),
        ({"final_sigmas_type": "sigma_min", **TRAILING}, {"num_inference_steps": 5}),
    ],
    ids=name_case,
)
def test_euler_is_the_ancestral_closed_form_over_its_own_sigmas(prediction_type, config, steps):
    """In float64, from the noise levels of the betas alone, as the method page has it."""
    _, schedule = build(EulerDiscreteScheduler, prediction_type, config, steps)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    final = levels[0] if "final_sigmas_type" in config else 0.0
    sigmas = torch.tensor([*levels[schedule.timesteps.long().numpy()], final])
    start = math.sqrt(sigmas[0] ** 2 + 1) if config["timestep_spacing"] == "leading" else float(sigmas[0])
    assert float(schedule.init_noise_sigma) == pytest.approx(start, rel=1e-5)

    draws = torch.randn(2, schedule.num_steps, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    s, s_next = sigmas[:-1, None, None, None], sigmas[1:, None, None, None]
    model_output, x = draws[0].double(), draws[1].double() * s
    if prediction_type == "epsilon":
        x0 = x - s * model_output
    elif prediction_type == "v_prediction":  # z = x / sqrt(s^2 + 1) is variance preserving, and x0 = alpha z - sigma v
        x0 = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * model_output
    else:
        x0 = model_output
    s_up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
    s_down = (s_next**2 - s_up**2).sqrt()

    step_index = torch.arange(schedule.num_steps)
    assert torch.allclose(
        scale_model_input(schedule, x.float(), step_index).double(), x / (s**2 + 1).sqrt(), rtol=1e-5, atol=1e-5
    )
    result = transition(schedule, model_output.float(), x.float(), step_index)
    assert torch.allclose(result.pred_original_sample.double(), x0, rtol=1e-5, atol=1e-4)
    assert torch.allclose(result.mean.double(), x + (x - x0) / s * (s_down - s), rtol=1e-5, atol=1e-4)
    assert torch.allclose(result.std.double(), s_up, rtol=1e-4)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", MATRIX, ids=name_case)
def test_prediction_recovers_the_clean_latents(scheduler_class, prediction_type, config, settings):
    """A model that knows x0 predicts x0, and then both prediction types have the same transition."""
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.arange(schedule.num_steps)
    clean, noise = torch.randn(2, schedule.num_steps, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    alpha_prod = column(schedule.scheduler.alphas_cumprod[schedule.timesteps.long()])
    sample = alpha_prod.sqrt() * clean + (1 - alpha_prod).sqrt() * noise
    if hasattr(schedule.scheduler, "sigmas"):
        sample = sample / alpha_prod.sqrt()
    model_output = perfect_output(schedule, clean, noise, step_index)
    mean, _, pred_original_sample = transition(schedule, model_output, sample, step_index)
    assert torch.allclose(pred_original_sample, clean, atol=1e-3)

    _, reference = build(scheduler_class, "epsilon", config, settings)
    assert torch.allclose(mean, transition(reference, noise, sample, step_index).mean, atol=1e-3)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", MATRIX, ids=name_case)
def test_last_transition_adds_no_noise(scheduler_class, prediction_type, config, settings):
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    ones = torch.ones(1, 4, 8, 8)
    assert transition(schedule, ones, ones, torch.tensor([schedule.num_steps - 1])).std.item() == 0


def test_ddim_without_alpha_one_has_a_tiny_last_std():
    _, schedule = build(DDIMScheduler, config={**TRAILING, "set_alpha_to_one": False})
    ones = torch.ones(1, 4, 8, 8)
    assert 0 < transition(schedule, ones, ones, torch.tensor([3])).std.item() < 0.03


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", MATRIX, ids=name_case)
def test_transition_is_float32_and_never_waits_for_the_device(scheduler_class, prediction_type, config, settings):
    """Fake tensors have no values: any read of one on the host raises."""
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        scheduler = type(schedule.scheduler).__new__(type(schedule.scheduler))
        for key, value in vars(schedule.scheduler).items():
            vars(scheduler)[key] = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        fake = Schedule(scheduler, mode.from_tensor(schedule.timesteps), schedule.eta, 1.0)
        sample, step_index = torch.randn(3, 4, 8, 8), torch.randint(0, 4, (3,))
        model_input = scale_model_input(fake, sample, step_index)
        result = transition(fake, model_input.half(), sample, step_index)
        log_prob = gaussian_log_prob(sample, result.mean, result.std)
        forward = [
            *noise_levels(fake, step_index),
            *(forward_weight(fake, step_index, weighting) for weighting in WEIGHTINGS),
            add_noise(fake, sample.half(), sample.half(), step_index),
            predict_original_sample(fake, model_input.half(), sample.half(), step_index),
            *diffusion_inputs(fake, sample.half(), sample.half(), step_index)[::2],
        ]
    assert {tensor.dtype for tensor in (*result, log_prob, *forward)} == {torch.float32}
    assert log_prob.shape == (3,)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", MATRIX, ids=name_case)
def test_log_prob_is_the_mean_of_the_normals(scheduler_class, prediction_type, config, settings):
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    model_output, sample, noise = torch.randn(3, 5, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    model_output.requires_grad_()
    mean, std, _ = transition(schedule, model_output, sample, torch.tensor([0, 2, 1, 2, 0]))
    value = (mean + std * noise).detach()
    log_prob = gaussian_log_prob(value, mean, std)
    expected = torch.distributions.Normal(mean.double(), std.double()).log_prob(value.double()).mean(dim=(1, 2, 3))
    assert log_prob.shape == (5,) and torch.allclose(log_prob.double(), expected, atol=1e-5)
    gradient = torch.autograd.grad(log_prob.sum(), model_output, retain_graph=True)[0]
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), model_output)[0], rtol=1e-4, atol=1e-6)


def test_log_prob_of_half_precision_is_float32():
    log_prob = gaussian_log_prob(torch.ones(2, 3).half(), torch.zeros(2, 3).half(), torch.ones(2, 1).half())
    assert log_prob.dtype == torch.float32
    assert torch.allclose(log_prob, torch.full((2,), -0.5 - 0.5 * math.log(2 * math.pi)))


def test_sampling_reports_every_step_and_keeps_no_graph():
    _, schedule = build(LCMScheduler)
    weight, calls = torch.ones((), requires_grad=True), []
    latents = sample_trajectory(
        schedule, lambda x, timesteps: weight * x, torch.randn(1, 5, 4, 8, 8), lambda: calls.append(1)
    )
    assert len(calls) == 4 and not latents.requires_grad


# The forward process


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", FORWARD, ids=name_case)
def test_noise_is_added_as_by_a_fresh_scheduler(scheduler_class, prediction_type, config, settings):
    """In one batch, each sample at its own step, in no order; also from a scheduler that has been run."""
    scheduler, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.randperm(schedule.num_steps, generator=torch.Generator().manual_seed(1))
    clean, noise = draw(2, schedule.num_steps)
    unused = fresh(scheduler, settings)
    timesteps = unused.timesteps[step_index]
    expected = unused.add_noise(clean, noise, timesteps)
    assert torch.equal(add_noise(schedule, clean, noise, step_index), expected)

    ones, zeros = torch.ones(2, schedule.num_steps, 1) * torch.tensor([1.0, 0.0])[:, None, None]
    alpha, sigma = noise_levels(schedule, step_index)
    assert torch.equal(alpha, unused.add_noise(ones, zeros, timesteps)[:, 0])
    assert torch.equal(sigma, unused.add_noise(zeros, ones, timesteps)[:, 0])

    scheduler.set_timesteps(7)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(2)
    scheduler.step(noise[:1], scheduler.timesteps[2], clean[:1], return_dict=False)
    again = make_schedule(scheduler, **with_steps(settings))
    assert torch.equal(add_noise(again, clean, noise, step_index), expected)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", FORWARD, ids=name_case)
def test_predicted_clean_latents_are_diffusers(scheduler_class, prediction_type, config, settings):
    """Those that `step` returns (LCM's after undoing the boundary scalings); for TCD, which returns none, DDIM's."""
    scheduler, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.randperm(schedule.num_steps, generator=torch.Generator().manual_seed(1))
    model_output, sample = draw(2, schedule.num_steps, seed=2)
    computed = predict_original_sample(schedule, model_output, sample, step_index)
    for row, step in enumerate(step_index.tolist()):
        stepper = fresh(scheduler, settings)
        timestep, current = stepper.timesteps[step], sample[row : row + 1]
        if scheduler_class is TCDScheduler:
            stepper = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
            stepper.set_timesteps(1)
        output = stepper.step(model_output[row : row + 1], timestep, current)
        if scheduler_class is LCMScheduler:
            c_skip, c_out = stepper.get_scalings_for_boundary_condition_discrete(timestep)
            if c_out > 0:  # at timestep 0 the prediction does not count
                expected = (output.denoised - c_skip * current) / c_out
                assert torch.allclose(computed[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(computed[row : row + 1], output.pred_original_sample)


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", OFFLINE + VARIANTS, ids=name_case)
def test_mean_gain_is_autograds_derivative(scheduler_class, prediction_type, config, settings):
    """Of the mean with respect to the predicted clean latents, wherever they are within the limits of clipping."""
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.randperm(schedule.num_steps, generator=torch.Generator().manual_seed(1))
    model_output, sample = draw(2, schedule.num_steps, seed=3) * 1e-3
    model_output.requires_grad_()
    mean, std, _ = transition(schedule, model_output, sample, step_index)
    pred_original_sample = predict_original_sample(schedule, model_output, sample, step_index)
    derivatives = [torch.autograd.grad(value.sum(), model_output)[0] for value in (mean, pred_original_sample)]
    expected = derivatives[0] / derivatives[1]
    assert torch.allclose(column(mean_gain(schedule, step_index)).expand_as(expected), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(transition_std(schedule, step_index), std.flatten())


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", OFFLINE, ids=name_case)
def test_gain_and_weightings_are_the_closed_forms(scheduler_class, prediction_type, config, settings):
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    expected = closed_forms(schedule)
    step_index = torch.arange(schedule.num_steps)
    computed = dict(zip(("alpha", "sigma"), noise_levels(schedule, step_index)))
    computed |= {"gain": mean_gain(schedule, step_index), "std": transition_std(schedule, step_index)}
    for name, value in computed.items():
        assert value.shape == (schedule.num_steps,) and value.dtype == torch.float32
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name

    weights = {
        "epsilon": (expected["alpha"] / expected["sigma"]) ** 2,
        "x0": torch.ones(schedule.num_steps, dtype=torch.float64),
        "mdp": expected["gain"] ** 2 / (2 * expected["std"] ** 2),
    }
    assert weights.keys() == WEIGHTINGS.keys()
    for name, weight in weights.items():
        steps = num_weighted_steps(schedule, name)
        assert steps == schedule.num_steps - (name == "mdp")
        if name != "mdp" or schedule.eta != 0:
            computed = forward_weight(schedule, step_index[:steps], name)
            assert torch.allclose(computed.double(), weight[:steps], rtol=1e-4), name


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", OFFLINE, ids=name_case)
def test_mdp_weighting_is_the_kl_between_the_transitions(scheduler_class, prediction_type, config, settings):
    """From the transition towards the data to the model's, averaged over dimensions; undefined without a density."""
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    if schedule.num_steps == 1 or schedule.eta == 0:
        with pytest.raises(ValueError, match="--weighting mdp needs .*pass --weighting epsilon or x0, or "):
            check_weighting(schedule, "mdp")
        return
    check_weighting(schedule, "mdp")
    step_index = torch.randperm(num_weighted_steps(schedule, "mdp"), generator=torch.Generator().manual_seed(1))
    clean, noise, error = draw(3, len(step_index), seed=4)
    sample = add_noise(schedule, clean, noise, step_index)
    data_output = perfect_output(schedule, clean, noise, step_index)
    model_output = data_output + 0.3 * error
    data, model = (transition(schedule, output, sample, step_index) for output in (data_output, model_output))
    data, model = (torch.distributions.Normal(mean.double(), std.double()) for mean, std, _ in (data, model))
    divergence = torch.distributions.kl_divergence(data, model).mean(dim=(1, 2, 3))
    squared_error = (clean - predict_original_sample(schedule, model_output, sample, step_index)) ** 2
    computed = forward_weight(schedule, step_index, "mdp") * squared_error.mean(dim=(1, 2, 3))
    assert torch.allclose(computed.double(), divergence, rtol=1e-4)


@pytest.mark.parametrize(
    "scheduler_class, settings, weighting, message",
    [
        (LCMScheduler, {"num_inference_steps": 1}, "mdp", "needs a step before the last.*or at least 2 steps"),
        (DDIMScheduler, {"eta": 0.0}, "mdp", r"DDIMScheduler adds none after timestep 750.*an eta above 0 \(--eta\)"),
        (TCDScheduler, {"timesteps": [999, 499, 0]}, "mdp", "after timestep 499.*or timesteps that end above 0"),
        (LCMScheduler, {}, "snr", r"unknown weighting 'snr': pass one of epsilon, x0, mdp \(--weighting\)"),
    ],
    ids=name_case,
)
def test_what_has_no_weight_is_a_clear_error(scheduler_class, settings, weighting, message):
    _, schedule = build(scheduler_class, settings={**settings, "stochastic": False})
    with pytest.raises(ValueError, match=message) as error:
        check_weighting(schedule, weighting)
    assert "\n" not in str(error.value)
    check_weighting(schedule, "epsilon")
    check_weighting(schedule, "x0")


@pytest.mark.parametrize("scheduler_class, prediction_type, config, settings", MATRIX, ids=name_case)
def test_diffusion_inputs_are_those_of_ddpm_training(scheduler_class, prediction_type, config, settings):
    """At every training timestep; at the schedule's own, what its steps give the UNet."""
    scheduler, schedule = build(scheduler_class, prediction_type, config, settings)
    timesteps = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:32]
    timesteps[:4] = torch.tensor([0, 999, 500, 1])
    clean, noise = draw(2, 32, seed=5)
    model_input, unet_timesteps, target = diffusion_inputs(schedule, clean, noise, timesteps)
    ddpm = DDPMScheduler(**BETAS)
    assert torch.allclose(model_input, ddpm.add_noise(clean, noise, timesteps), atol=1e-5)
    assert unet_timesteps.tolist() == timesteps.tolist()
    assert unet_timesteps.dtype == fresh(scheduler, settings).timesteps.dtype
    targets = {"epsilon": noise, "v_prediction": ddpm.get_velocity(clean, noise, timesteps), "sample": clean}
    assert torch.allclose(target, targets[prediction_type], atol=1e-5)

    step_index = torch.arange(4)
    clean, noise = clean[:4], noise[:4]
    sample = add_noise(schedule, clean, noise, step_index)
    model_input, _, target = diffusion_inputs(schedule, clean, noise, schedule.timesteps.long())
    assert torch.allclose(model_input, scale_model_input(schedule, sample, step_index), atol=1e-5)
    assert torch.allclose(predict_original_sample(schedule, target, sample, step_index), clean, atol=1e-4)


# Conversions

TRAILING_STEPS = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    5: [999, 799, 599, 399, 199],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
SOURCES = {
    "sdxl_lcm": lambda: LCMScheduler(**BETAS, original_inference_steps=50),
    "sdxl_base": lambda: EulerDiscreteScheduler(**SDXL_BASE),
    "sdxl_turbo": lambda: EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "tcd": lambda: TCDScheduler(**BETAS),
    "ddim": lambda: DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False),
    "v_prediction": lambda: DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=False, timestep_spacing="linspace"),
    "all_defaults": lambda: LCMScheduler(),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_conversions_run_the_distilled_timesteps(name, source):
    scheduler = SOURCES[source]()
    converted = convert_scheduler(scheduler, name)
    assert type(converted) is SCHEDULERS[name]
    assert torch.equal(converted.alphas_cumprod, scheduler.alphas_cumprod)
    assert converted.config.prediction_type == scheduler.config.prediction_type
    assert not converted.config.get("clip_sample")
    for steps, expected in TRAILING_STEPS.items():
        schedule = make_schedule(converted, steps, stochastic=False)
        assert schedule.timesteps.tolist() == expected
        assert schedule.scheduler.alphas_cumprod.equal(scheduler.alphas_cumprod)


def test_conversion_survives_a_round_trip_through_the_disk(tmp_path):
    converted = convert_scheduler(LCMScheduler(), "euler")
    converted.save_pretrained(tmp_path)
    loaded = EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, converted.alphas_cumprod)
    assert make_schedule(loaded, 4).timesteps.tolist() == TRAILING_STEPS[4]


def test_without_a_name_the_schedule_stays_the_pipelines_own():
    scheduler = EulerDiscreteScheduler(**SDXL_BASE)
    kept = convert_scheduler(scheduler)
    assert type(kept) is EulerDiscreteScheduler and kept is not scheduler
    assert make_schedule(kept, 4).timesteps.tolist() == [751, 501, 251, 1]
    assert make_schedule(convert_scheduler(LCMScheduler(**BETAS)), 4).timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize(
    "spacing, expected",
    [("trailing", [999, 749, 499, 249]), ("leading", [751, 501, 251, 1]), ("linspace", [999, 666, 333, 0])],
)
@pytest.mark.parametrize("name", (None, "euler", "euler_ancestral", "ddim"))
def test_timestep_spacing_overrides(name, spacing, expected):
    schedule = make_schedule(convert_scheduler(EulerDiscreteScheduler(**SDXL_BASE), name, spacing), 4)
    assert schedule.timesteps.tolist() == expected


@pytest.mark.parametrize(
    "scheduler, name, spacing, message",
    [
        (LCMScheduler(), "dpm", None, "unknown scheduler 'dpm': pass one of lcm, euler_ancestral, euler, tcd, ddim"),
        (DDIMScheduler(), None, "karras", "unknown timestep_spacing 'karras': pass trailing, leading or linspace"),
        (DDIMScheduler(), "lcm", "trailing", "no effect on LCMScheduler.*drop it, or pass timesteps"),
        (TCDScheduler(), None, "trailing", "no effect on TCDScheduler.*drop it, or pass timesteps"),
        (FlowMatchEulerDiscreteScheduler(), "lcm", None, "FlowMatchEulerDiscreteScheduler.*needs a pipeline"),
    ],
)
def test_conversion_errors(scheduler, name, spacing, message):
    with pytest.raises(ValueError, match=message) as error:
        convert_scheduler(scheduler, name, spacing)
    assert "\n" not in str(error.value)


# The support matrix

ZERO_SNR = {"rescale_betas_zero_snr": True, **TRAILING}


@pytest.mark.parametrize(
    "scheduler_class, config, settings, message",
    [
        (DPMSolverMultistepScheduler, {}, {}, "convert it to one of lcm, euler_ancestral, euler, tcd, ddim"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, {}, "set use_karras_sigmas to False"),
        (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, {}, "set use_exponential_sigmas to False"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, {}, "set interpolation_type to 'linear'"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, {}, "set timestep_type to 'discrete'"),
        (DDIMScheduler, {"thresholding": True}, {}, "set thresholding to False"),
        (LCMScheduler, {"thresholding": True}, {}, "set thresholding to False"),
        (
            EulerAncestralDiscreteScheduler,
            {"prediction_type": "sample"},
            {},
            "no prediction_type 'sample': use a model",
        ),
        (DDIMScheduler, {"prediction_type": "flow_prediction"}, {}, "no prediction_type 'flow_prediction': use a"),
        (LCMScheduler, {}, {"num_inference_steps": None}, "pass either num_inference_steps or timesteps"),
        (LCMScheduler, {}, {"num_inference_steps": 4, **CUSTOM}, "pass either num_inference_steps or timesteps"),
        (LCMScheduler, {}, {"num_inference_steps": 51}, "1 to 50 steps, not 51.*raises original_inference_steps"),
        (EulerDiscreteScheduler, {}, {"num_inference_steps": 0}, "1 to 1000 steps, not 0"),
        (DDIMScheduler, {}, {"num_inference_steps": 1001}, "1 to 1000 steps, not 1001"),
        (DDIMScheduler, {"steps_offset": 1}, {"num_inference_steps": 1000}, "no usable timesteps for 1000 steps"),
        (DDIMScheduler, TRAILING, {"num_inference_steps": 61}, "no usable timesteps for 61 steps"),
        (DDIMScheduler, {}, CUSTOM, "takes no timesteps: pass num_inference_steps, or convert to lcm, euler, tcd"),
        (EulerAncestralDiscreteScheduler, {}, CUSTOM, "takes no timesteps: pass num_inference_steps"),
        (LCMScheduler, {}, {"timesteps": [499, 999]}, "must descend within 999 to 0: pass e.g. 999 749 499 249"),
        (EulerDiscreteScheduler, {}, {"timesteps": [999, 499, 499]}, "must descend within 999 to 0"),
        (TCDScheduler, {}, {"timesteps": [1000, 499]}, "must descend within 999 to 0"),
        (EulerDiscreteScheduler, {}, {"timesteps": [999, -1]}, "must descend within 999 to 0"),
        (LCMScheduler, {}, {"timesteps": []}, "must descend within 999 to 0"),
        (LCMScheduler, {}, {"num_inference_steps": 1}, "one-step schedule.*pass at least 2 steps"),
        (EulerDiscreteScheduler, {}, {"timesteps": [999]}, "one-step schedule.*pass at least 2 steps"),
        (LCMScheduler, {}, {"eta": 0.5}, "takes no eta: drop it"),
        (EulerDiscreteScheduler, {}, {"eta": 0.0}, "takes no eta: drop it"),
        (DDIMScheduler, {}, {"eta": 0.0}, r"no density to train on: pass an eta in \(0, 1\], by default 1.0"),
        (TCDScheduler, {}, {"eta": 0.0}, r"no density to train on: pass an eta in \(0, 1\], by default 0.3"),
        (TCDScheduler, {}, {"eta": 1.1}, r"out of range: pass an eta in \(0, 1\]"),
        (DDIMScheduler, {}, {"eta": -0.1}, r"out of range: pass an eta in \(0, 1\]"),
        (DDIMScheduler, {}, {"eta": float("nan")}, r"out of range: pass an eta in \(0, 1\]"),
        (TCDScheduler, {}, {"timesteps": [999, 499, 0]}, "no noise after timestep 499.*end above 0, or a larger eta"),
        (LCMScheduler, {"original_inference_steps": 1000, **ZERO_SNR}, {}, "not finite at timestep 999.*v_prediction"),
        (DDIMScheduler, ZERO_SNR, {}, "not finite at timestep 999.*v_prediction"),
    ],
    ids=name_case,
)
def test_what_has_no_transition_is_a_clear_error(scheduler_class, config, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        build(scheduler_class, "epsilon", config, settings)
    assert "\n" not in str(error.value)


def test_settings_of_another_class_do_not_count():
    """A config keeps the entries of the class that it was converted from; LCM has no Karras sigmas."""
    karras = EulerDiscreteScheduler(**{**SDXL_BASE, "use_karras_sigmas": True})
    assert make_schedule(LCMScheduler.from_config(karras.config), 4).num_steps == 4
    assert make_schedule(convert_scheduler(karras, "lcm"), 4).num_steps == 4
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        make_schedule(convert_scheduler(karras, "euler"), 4)


def test_every_scheduler_that_takes_eta_has_a_default():
    for scheduler_class in SCHEDULERS.values():
        schedule = build(scheduler_class)[1]
        assert schedule.eta == DEFAULT_ETA.get(scheduler_class)


# Noise


def test_keyed_noise_depends_on_the_key_alone():
    keys = [(0, epoch, prompt, sample) for epoch in range(2) for prompt in range(3) for sample in range(2)]
    noise = keyed_noise(keys, (5, 4, 8, 8))
    assert noise.shape == (12, 5, 4, 8, 8) and noise.dtype == torch.float32
    assert torch.equal(keyed_noise(keys[7:9][::-1], (5, 4, 8, 8)), noise[7:9].flip(0))
    assert torch.equal(keyed_noise([np.array(keys[3])], (5, 4, 8, 8))[0], noise[3])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keyed_noise(keys[:1], (2,))
    assert torch.equal(torch.get_rng_state(), before)


def test_keyed_noise_is_standard_normal_and_independent():
    noise = keyed_noise([(1, index) for index in range(64)] + [(11, 0), (1, 1, 0)], (4096,))
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.1
