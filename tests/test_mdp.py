"""The transition and the forward process against diffusers' `step`, its pipeline, closed forms and autograd."""

import dataclasses
import functools
import math
from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from test_schedules import (
    BETAS,
    CLIPPED,
    DEPLOYED,
    DIFFUSION,
    EVERY,
    FLOW,
    FLOW_DEPLOYED,
    FLOW_HALF,
    FLOW_LCM,
    FLOW_RENOISED,
    MATRIX,
    OFFLINE,
    ONE_A_CLASS,
    SCM,
    TRAILING,
    VARIANTS,
    Case,
    randn,
    relative_error,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from pso_utils.errors import UserError
from pso_utils.mdp import (
    WEIGHTINGS,
    add_noise,
    diffusion_inputs,
    forward_weights,
    log_prob,
    predict,
    sample_trajectory,
    transition,
)
from pso_utils.schedules import make_schedule


FLOW_IN_DIFFUSERS = FLOW_DEPLOYED + FLOW_RENOISED + FLOW_LCM


def shuffled(case):
    """The schedule, and its steps, each once, in no order."""
    schedule = case.schedule()
    step_index = torch.randperm(schedule.num_steps, generator=torch.Generator().manual_seed(1))
    return schedule, step_index, schedule.at(step_index)


def perfect_output(steps, clean, noise):
    """What a model returns that knows the clean latents [B, C, h, w] and the noise of `add_noise`."""
    alpha, sigma = steps.columns.alpha, steps.columns.sigma
    level = (alpha**2 + sigma**2).sqrt()  # 1, except for the Euler family's sigma space
    return {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": (alpha * noise - sigma * clean) / level,
        "flow": noise - clean,
        "trigflow": alpha * steps.schedule.sigma_data * noise - sigma / steps.schedule.sigma_data * clean,
    }[steps.schedule.prediction_type]


def diffusers_step(stepper, step, model_output, sample, eta=None):
    """The scheduler's own next latents, from generator 0."""
    eta = {"eta": eta} if "eta" in signature(stepper.step).parameters else {}
    generator = torch.Generator().manual_seed(0)
    return stepper.step(model_output, stepper.timesteps[step], sample, **eta, generator=generator)


# ---- The transition against diffusers' step ----


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_transition_is_the_schedulers_step(case):
    """`step` in float64: in float32 its own rounding is up to 8e-5, for the Euler family at sigma 4096."""
    schedule, step_index, steps = shuffled(case)
    model_output, sample = randn(2, schedule.num_steps, seed=2)
    mean, std = transition(steps, model_output, sample)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, step in enumerate(step_index.tolist()):
        stepper, current = case.stepper(torch.float64), sample[row : row + 1].double()
        model_input = stepper.scale_model_input(current, stepper.timesteps[step])
        assert relative_error(steps.columns.input_scale[row] * current, model_input) < 1e-6
        expected = diffusers_step(stepper, step, model_output[row : row + 1].double(), current, schedule.eta)
        assert relative_error(mean[row].double() + std[row].double() * noise, expected.prev_sample) < 1e-6


@pytest.mark.parametrize("case", FLOW_IN_DIFFUSERS + SCM, ids=str)
def test_flow_transition_is_the_schedulers_step(case):
    """Flow matching's bit for bit, in float32."""
    schedule, step_index, steps = shuffled(case)
    model_output, sample = randn(2, schedule.num_steps, seed=2)
    mean, std = transition(steps, model_output, sample)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for row, step in enumerate(step_index.tolist()):
        stepper, rows = case.stepper(), slice(row, row + 1)
        expected = diffusers_step(stepper, step, model_output[rows], sample[rows]).prev_sample
        computed = mean[rows] + std[rows] * noise
        assert torch.equal(steps.timesteps[row], stepper.timesteps[step])
        assert relative_error(computed, expected) < 1e-6
        assert case in SCM or torch.equal(computed, expected)


@pytest.mark.parametrize("case", FLOW_HALF, ids=str)
def test_flow_at_half_eta_is_coefficient_preserving_sampling(case):
    """std = s' sin(eta pi / 2), and s' cos(eta pi / 2) of the predicted noise, in float64."""
    schedule, step_index, steps = shuffled(case)
    levels = case.stepper().sigmas.double()
    s, s_next = levels[step_index][:, None, None, None], levels[step_index + 1][:, None, None, None]
    model_output, sample = randn(2, schedule.num_steps, seed=2)
    mean, std = transition(steps, model_output, sample)
    v, x = model_output.double(), sample.double()
    expected = (1 - s_next) * (x - s * v) + s_next * math.cos(math.pi / 4) * (x + (1 - s) * v)
    assert relative_error(mean.double(), expected) < 1e-6
    assert torch.allclose(std.double(), s_next * math.sin(math.pi / 4), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ("epsilon", "v_prediction", "sample"))
@pytest.mark.parametrize(
    "config, arguments",
    [
        (TRAILING, {}),
        ({"timestep_spacing": "leading", "steps_offset": 1}, {"timesteps": [999, 749, 499, 249]}),
        ({"final_sigmas_type": "sigma_min", **TRAILING}, {"num_inference_steps": 5}),
    ],
)
def test_euler_is_the_ancestral_closed_form_over_its_own_sigmas(prediction_type, config, arguments):
    """In float64, from the noise levels of the betas alone, as the method page has it."""
    schedule = Case(EulerDiscreteScheduler, {"prediction_type": prediction_type, **config}, arguments).schedule()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    final = levels[0] if "final_sigmas_type" in config else 0.0
    sigmas = torch.tensor([*levels[schedule.timesteps.long().numpy()], final])
    start = math.sqrt(sigmas[0] ** 2 + 1) if config["timestep_spacing"] == "leading" else float(sigmas[0])
    assert schedule.init_noise_sigma == pytest.approx(start, rel=1e-5)

    s, s_next = sigmas[:-1, None, None, None], sigmas[1:, None, None, None]
    model_output, x = randn(2, schedule.num_steps, seed=3).double()
    x = x * s
    if prediction_type == "epsilon":
        x0 = x - s * model_output
    elif prediction_type == "v_prediction":  # z = x / sqrt(s^2 + 1) is variance preserving, and x0 = alpha z - sigma v
        x0 = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * model_output
    else:
        x0 = model_output
    s_up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
    s_down = (s_next**2 - s_up**2).sqrt()

    steps = schedule.at(torch.arange(schedule.num_steps))
    mean, std = transition(steps, model_output.float(), x.float())
    expected_mean = x + (x - x0) / s * (s_down - s)
    assert torch.allclose(steps.columns.input_scale.double(), 1 / (s**2 + 1).sqrt(), rtol=1e-5)
    assert torch.allclose(predict(steps, model_output.float(), x.float())[0].double(), x0, rtol=1e-5, atol=1e-4)
    assert torch.allclose(mean.double(), expected_mean, rtol=1e-5, atol=1e-4)
    assert torch.allclose(std.double(), s_up, rtol=1e-4)


# ---- Predictions ----


@pytest.mark.parametrize("case", DIFFUSION + SCM, ids=str)
def test_predicted_clean_latents_are_diffusers(case):
    """Those that `step` returns (LCM's after undoing the boundary scalings); for TCD, which returns none, DDIM's."""
    schedule, step_index, steps = shuffled(case)
    tolerance = 1e-6 if schedule.clip_range is None else 1e-5  # x0 is up to 80 times the limit before it is clipped
    model_output, sample = randn(2, schedule.num_steps, seed=2)
    computed, _ = predict(steps, model_output, sample)
    dtype = torch.float32 if case in SCM else torch.float64
    for row, step in enumerate(step_index.tolist()):
        output, current = model_output[row : row + 1].to(dtype), sample[row : row + 1].to(dtype)
        stepper = case.stepper(dtype)
        timestep = stepper.timesteps[step]
        if case.scheduler_class is TCDScheduler:
            levels = stepper.alphas_cumprod
            stepper = DDIMScheduler.from_config(stepper.config, clip_sample=False)
            stepper.set_timesteps(1)
            stepper.alphas_cumprod = levels
        result = stepper.step(output, timestep, current)
        if case.scheduler_class is LCMScheduler:
            c_skip, c_out = stepper.get_scalings_for_boundary_condition_discrete(timestep)
            if c_out == 0:  # at timestep 0 the prediction does not count
                continue
            expected = (result.denoised - c_skip * current) / c_out
        else:
            expected = result.pred_original_sample
        assert relative_error(computed[row : row + 1].to(dtype), expected) < tolerance


@pytest.mark.parametrize("case", [case for case in EVERY if not case.config.get("clip_sample")], ids=str)
def test_a_perfect_output_predicts_the_clean_latents_and_the_noise(case):
    """So that all prediction types have the same transition; up to float32's rounding over alpha and sigma."""
    schedule, _, steps = shuffled(case)
    clean, noise = randn(2, schedule.num_steps, seed=4)
    x0, eps = predict(steps, perfect_output(steps, clean, noise), add_noise(steps, clean, noise))
    alpha, sigma = (column / (steps.columns.alpha**2 + steps.columns.sigma**2).sqrt() for column in steps.columns[:2])
    assert ((x0 - clean).abs() * alpha < 5e-6).all()
    assert ((eps - noise).abs() * sigma < 5e-6).all()


@pytest.mark.parametrize("case", OFFLINE + VARIANTS + FLOW + SCM, ids=str)
def test_gain_is_autograds_derivative(case):
    """Of the mean with respect to the predicted clean latents, wherever they are within the limits of clipping."""
    schedule, _, steps = shuffled(case)
    model_output, sample = randn(2, schedule.num_steps, seed=3) * 1e-3
    model_output.requires_grad_()
    mean, _ = transition(steps, model_output, sample)
    x0, _ = predict(steps, model_output, sample)
    of_mean, of_x0 = (torch.autograd.grad(value.sum(), model_output)[0] for value in (mean, x0))
    assert torch.allclose(steps.columns.gain * of_x0, of_mean, rtol=1e-5, atol=1e-6)


# ---- Trajectories ----


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def conditions(pipeline) -> dict:
    """Arguments of the UNet for a batch of two."""
    add_time_ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 128)
    generator = torch.Generator().manual_seed(7)
    return {
        "encoder_hidden_states": torch.randn(2, 24, 128, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 128, generator=generator),
            "time_ids": add_time_ids.repeat(2, 1),
        },
    }


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


def same_noise(num_steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the generators draw, in the pipeline's order [2, N + 1, 4, 8, 8]."""
    return torch.stack(
        [
            torch.cat([torch.randn(1, 4, 8, 8, generator=generator, dtype=dtype) for _ in range(num_steps + 1)])
            for generator in generators()
        ]
    )


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_trajectory_is_the_pipelines(pipeline, conditions, case):
    """In float32; at sigma 4096 (zero SNR), where the pipeline itself then loses five digits in
    x + derivative (sigma_down - sigma), that of a pipeline in float64."""
    schedule, expected = case.schedule(), []
    dtype = torch.float64 if schedule.columns.sigma.max() > 1000 else torch.float32
    pipeline.to(dtype)
    pipeline.scheduler = scheduler = case.stepper(dtype)
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_timesteps_in_dtype(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas.to(dtype)

    scheduler.set_timesteps = set_timesteps_in_dtype
    prompt_embeds, added = conditions["encoder_hidden_states"].to(dtype), conditions["added_cond_kwargs"]
    pipeline(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=added["text_embeds"].to(dtype),
        guidance_scale=0.0,
        generator=generators(),
        eta=schedule.eta or 0.0,
        output_type="latent",
        height=32,
        width=32,
        callback_on_step_end=lambda pipeline, step, timestep, kwargs: expected.append(kwargs["latents"]) or {},
        **case.steps,
    )

    def denoise(latents, timesteps):
        added_cond_kwargs = {name: tensor.to(dtype) for name, tensor in added.items()}
        return pipeline.unet(
            latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added_cond_kwargs
        ).sample

    computed = sample_trajectory(schedule, denoise, same_noise(schedule.num_steps, dtype))
    assert computed.dtype == torch.float32 and computed.shape == (2, schedule.num_steps + 1, 4, 8, 8)
    for latents, wanted in zip(computed[:, 1:].unbind(1), expected, strict=True):
        assert wanted.dtype == dtype
        assert relative_error(latents, wanted) < 1e-5


@pytest.mark.parametrize("case", FLOW_IN_DIFFUSERS + SCM, ids=str)
def test_flow_trajectory_is_that_of_the_schedulers_steps(case):
    """Flow matching's bit for bit."""

    def denoise(x, timesteps):
        return torch.sin(3 * x) * (1 + timesteps[:, None, None, None] / 1000)

    schedule, stepper, generator = case.schedule(), case.stepper(), generators()
    noise = same_noise(schedule.num_steps)
    expected = [torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generator])]
    expected[0] *= case.config.get("sigma_data", 0.5) if case in SCM else 1
    for timestep in stepper.timesteps[: schedule.num_steps]:
        output = denoise(expected[-1], timestep.repeat(2))
        expected.append(stepper.step(output, timestep, expected[-1], generator=generator).prev_sample)
    computed, expected = sample_trajectory(schedule, denoise, noise), torch.stack(expected, dim=1)
    assert relative_error(computed, expected) < 1e-5
    assert case in SCM or torch.equal(computed, expected)


def test_sampling_reports_every_step_and_keeps_no_graph():
    weight, calls = torch.ones((), requires_grad=True), []
    latents = sample_trajectory(
        Case(LCMScheduler).schedule(), lambda x, timesteps: weight * x, randn(1, 5), lambda: calls.append(1)
    )
    assert len(calls) == 4 and not latents.requires_grad


# ---- Densities ----


@pytest.mark.parametrize("case", [case for case in ONE_A_CLASS if case not in FLOW_DEPLOYED], ids=str)
def test_log_prob_is_the_mean_of_the_normals(case):
    """With the gradient of the model's output and of the latents."""
    schedule = case.schedule()
    steps = schedule.at(torch.tensor([0, 2, 1, 2, 0]) % (schedule.num_steps - 1))
    model_output, sample, noise = randn(3, 5, seed=5)
    inputs = model_output.requires_grad_(), sample.requires_grad_()
    mean, std = transition(steps, *inputs)
    next_sample = (mean + std * noise).detach()
    computed = log_prob(steps, *inputs, next_sample)
    expected = torch.distributions.Normal(mean.double(), std.double()).log_prob(next_sample.double()).flatten(1).mean(1)
    assert computed.shape == (5,) and torch.allclose(computed.double(), expected, atol=1e-5)
    gradients = (torch.autograd.grad(value.sum(), inputs, retain_graph=True) for value in (computed, expected))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ONE_A_CLASS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_computed_in_float32(case, dtype):
    steps = case.schedule().at(torch.tensor([0, 1, 0]))
    tensors = randn(3, 3).to(dtype)
    for function, count in [(predict, 2), (transition, 2), (add_noise, 2), (log_prob, 3)]:
        computed, expected = function(steps, *tensors[:count]), function(steps, *tensors[:count].float())
        pairs = [(computed, expected)] if isinstance(computed, torch.Tensor) else zip(computed, expected)
        for ours, wanted in pairs:
            assert ours.dtype == torch.float32 and torch.equal(ours.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("case", MATRIX + ONE_A_CLASS[-4:], ids=str)
def test_nothing_waits_for_the_device(case):
    """Fake tensors have no values: any read of one on the host raises."""
    schedule = case.schedule()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        values = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        fake = dataclasses.replace(schedule, **{name: mode.from_tensor(value) for name, value in tensors.items()})
        sample, step_index = torch.randn(3, 4, 8, 8), torch.randint(0, 2, (3,))
        steps = fake.at(step_index)
        results = [
            *predict(steps, sample.half(), sample),
            *transition(steps, sample.half(), sample),
            log_prob(steps, sample.half(), sample, sample),
            add_noise(steps, sample.half(), sample.half()),
            *(WEIGHTINGS[weighting].weight(fake) for weighting in WEIGHTINGS),
        ]
        if fake.train_alpha is not None:
            results += diffusion_inputs(fake, sample.half(), sample.half(), step_index)[::2]
    assert {tensor.dtype for tensor in results} == {torch.float32}


# ---- The forward process ----


@pytest.mark.parametrize("case", EVERY + DEPLOYED, ids=str)
def test_noise_is_added_as_by_the_scheduler(case):
    """Flow matching's and Euler's bit for bit; SCM has no method, and is the closed form."""
    schedule, step_index, steps = shuffled(case)
    clean, noise = randn(2, schedule.num_steps)
    scheduler = case.scheduler()
    scheduler.set_timesteps(**case.steps)
    timesteps = scheduler.timesteps[step_index]
    computed = add_noise(steps, clean, noise)
    if case.scheduler_class in {flow.scheduler_class for flow in FLOW}:
        assert torch.equal(computed, scheduler.scale_noise(clean, timesteps, noise))
    elif case in SCM:
        angle = timesteps[:, None, None, None]
        expected = angle.cos() * clean + angle.sin() * scheduler.config.sigma_data * noise
        assert relative_error(computed, expected) < 1e-6
    else:
        expected = scheduler.add_noise(clean, noise, timesteps)
        assert relative_error(computed, expected) < 1e-6
        assert not hasattr(scheduler, "sigmas") or torch.equal(computed, expected)


@pytest.mark.parametrize("case", OFFLINE + FLOW + SCM, ids=str)
def test_epsilon_weighting_is_the_squared_error_of_the_predicted_noise(case):
    schedule, step_index, steps = shuffled(case)
    clean, noise, model_output = randn(3, schedule.num_steps, seed=4)
    x0, eps = predict(steps, model_output, add_noise(steps, clean, noise))
    weight = forward_weights(schedule, "epsilon")[step_index]
    computed = weight * ((x0 - clean) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(computed, ((eps - noise) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("case", OFFLINE + FLOW + SCM, ids=str)
def test_mdp_weighting_is_the_kl_between_the_transitions(case):
    """From the transition towards the data to the model's, averaged over dimensions; undefined without a density."""
    schedule = case.schedule()
    if schedule.num_steps == 1 or schedule.eta == 0:
        with pytest.raises(UserError, match="--weighting mdp needs .*pass --weighting epsilon or x0, or "):
            forward_weights(schedule, "mdp")
        return
    weight = forward_weights(schedule, "mdp")
    assert weight.shape == (schedule.num_steps - 1,) and weight.dtype == torch.float32
    steps = schedule.at(torch.arange(schedule.num_steps - 1))
    clean, noise, error = randn(3, schedule.num_steps - 1, seed=4)
    sample, towards_data = add_noise(steps, clean, noise), perfect_output(steps, clean, noise)
    outputs = towards_data, towards_data + 0.3 * error
    transitions = (transition(steps, output, sample) for output in outputs)
    normals = (torch.distributions.Normal(mean.double(), std.double()) for mean, std in transitions)
    divergence = torch.distributions.kl_divergence(*normals).mean(dim=(1, 2, 3))
    x0, _ = predict(steps, outputs[1], sample)
    computed = weight * ((clean - x0) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(computed.double(), divergence, rtol=1e-4)


@pytest.mark.parametrize("case", ONE_A_CLASS, ids=str)
def test_x0_weighting_is_one_at_every_step(case):
    schedule = case.schedule()
    assert torch.equal(forward_weights(schedule, "x0"), torch.ones(schedule.num_steps))


@pytest.mark.parametrize(
    "case, weighting, message",
    [
        (
            Case(LCMScheduler, {}, {"num_inference_steps": 1}),
            "mdp",
            "needs a step before the last.*or at least 2 steps",
        ),
        (Case(DDIMScheduler, {}, {"eta": 0.0}), "mdp", r"DDIMScheduler adds none after timestep 750.*\(--eta\)"),
        (FLOW_DEPLOYED[0], "mdp", r"FlowMatchEuler.* adds none after timestep 1000.*an eta above 0 \(--eta\)"),
        (Case(TCDScheduler, {}, {"timesteps": [999, 499, 0]}), "mdp", "499.*or timesteps that end above 0"),
        (Case(LCMScheduler), "snr", r"unknown weighting 'snr': pass one of epsilon, x0, velocity, mdp \(--weighting\)"),
    ],
)
def test_what_has_no_weight_is_a_clear_error(case, weighting, message):
    schedule = case._replace(arguments={**case.arguments, "stochastic": False}).schedule()
    with pytest.raises(UserError, match=message) as error:
        forward_weights(schedule, weighting)
    assert "\n" not in str(error.value)
    assert len(forward_weights(schedule, "epsilon")) == len(forward_weights(schedule, "x0")) == schedule.num_steps


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_diffusion_inputs_are_those_of_ddpm_training(case):
    schedule, ddpm = case.schedule(), DDPMScheduler(**BETAS)
    timesteps = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:32]
    timesteps[:4] = torch.tensor([0, 999, 500, 1])
    clean, noise = randn(2, 32, seed=5)
    model_input, model_timesteps, target = diffusion_inputs(schedule, clean, noise, timesteps)
    targets = {"epsilon": noise, "v_prediction": ddpm.get_velocity(clean, noise, timesteps), "sample": clean}
    assert torch.allclose(model_input, ddpm.add_noise(clean, noise, timesteps), atol=1e-5)
    assert torch.allclose(target, targets[schedule.prediction_type], atol=1e-5)
    assert model_timesteps.tolist() == timesteps.tolist() and model_timesteps.dtype == schedule.timesteps.dtype


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_diffusion_inputs_at_the_schedules_timesteps_are_what_its_steps_give_the_model(case):
    schedule = case.schedule()
    steps, (clean, noise) = schedule.at(torch.arange(4)), randn(2, 4, seed=5)
    sample = add_noise(steps, clean, noise)
    model_input, _, target = diffusion_inputs(schedule, clean, noise, schedule.timesteps.long())
    assert torch.allclose(model_input, steps.columns.input_scale * sample, atol=1e-5)
    assert torch.allclose(predict(steps, target, sample)[0], clean, atol=1e-4)


def test_plain_diffusion_loss_of_other_models_is_refused():
    with pytest.raises(UserError, match="has no plain diffusion loss here: pass another --loss"):
        diffusion_inputs(SCM[0].schedule(), *randn(2, 3), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_flow_matching_trains_at_shifted_levels_and_predicts_the_velocity(shift):
    """s of s / (s + (1 - s) / k): the static shift k, or the dynamic one, k = exp(mu)."""
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    schedule, factor = make_schedule(scheduler, 4, stochastic=False, mu=1.5), shift.get("shift", math.exp(1.5))
    clean, noise = randn(2, 3, seed=5)
    at = torch.tensor([0, 499, 999])
    inputs = diffusion_inputs(schedule, clean, noise, at)
    level = (at + 1) / 1000
    level = (factor * level / (1 + (factor - 1) * level))[:, None, None, None]
    assert torch.allclose(inputs.timesteps, 1000 * level.flatten(), rtol=1e-5)
    assert torch.allclose(inputs.model_input, (1 - level) * clean + level * noise, atol=1e-5)
    assert torch.equal(inputs.target, noise - clean)


def test_the_velocity_weighting_is_flow_matchings_alone():
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, stochastic=False)
    weights = forward_weights(schedule, "velocity")
    steps, (clean, noise, output) = schedule.at(torch.arange(4)), randn(3, 4, seed=6)
    predicted = predict(steps, output, add_noise(steps, clean, noise))[0]
    error = ((noise - clean - output) ** 2).flatten(1).mean(1)  # of the velocity itself
    assert torch.allclose(weights * ((clean - predicted) ** 2).flatten(1).mean(1), error, rtol=1e-4)
    with pytest.raises(UserError, match="is for flow matching, and LCMScheduler is none"):
        forward_weights(Case(LCMScheduler).schedule(), "velocity")


def test_clipping_leaves_the_predicted_noise_as_it_was():
    clipped, free = Case(DDIMScheduler, CLIPPED).schedule(), Case(DDIMScheduler, {"clip_sample": False}).schedule()
    tensors, step_index = randn(2, 4), torch.arange(4)
    (x0, eps), (free_x0, free_eps) = predict(clipped.at(step_index), *tensors), predict(free.at(step_index), *tensors)
    assert torch.equal(x0, free_x0.clamp(-0.5, 0.5)) and not torch.equal(x0, free_x0) and torch.equal(eps, free_eps)
