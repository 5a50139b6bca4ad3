"""The PSO losses against plain transcriptions of their equations, against Diffusion-DPO's and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from test_mdp import FORWARD, OFFLINE, build, closed_forms, column, draw, name_case

from pso_utils.losses import SATURATION, denoising_error, hinge_pso_loss, offline_pso_loss, online_pso_loss
from pso_utils.mdp import WEIGHTINGS, add_noise, forward_weight, num_weighted_steps, predict_original_sample


BETA, CLIP_RANGE = 50.0, 0.1
LOW, HIGH = math.log1p(-CLIP_RANGE), math.log1p(CLIP_RANGE)


def transcription(target_log_ratio, reference_log_ratio, beta, clip_range):
    """The equation as the method states it, in float64."""

    def clipped(log_ratio):
        return torch.log(torch.clamp(torch.exp(log_ratio.double()), 1 - clip_range, 1 + clip_range))

    margin = beta * (clipped(target_log_ratio) - clipped(reference_log_ratio))
    return -torch.log(torch.sigmoid(margin))


def gradients(target, reference, beta=BETA, clip_range=CLIP_RANGE):
    target, reference = target.clone().requires_grad_(), reference.clone().requires_grad_()
    result = online_pso_loss(target, reference, beta, clip_range)
    return result, *torch.autograd.grad(result.loss.sum(), (target, reference))


def random_log_ratios(count=512, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, generator=generator), scale * torch.randn(count, generator=generator)


@pytest.mark.parametrize("beta, clip_range", [(50.0, 0.1), (1.0, 0.5), (500.0, 1e-3)])
def test_loss_and_gradient_equal_the_plain_transcription(beta, clip_range):
    target, reference = random_log_ratios(scale=clip_range)
    result, *computed = gradients(target, reference, beta, clip_range)

    inputs = target.double().requires_grad_(), reference.double().requires_grad_()
    expected = transcription(*inputs, beta, clip_range)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(computed, torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6 * beta)


def test_equal_ratios_give_log_two():
    zeros = torch.zeros(3)
    result = online_pso_loss(zeros, zeros, BETA, CLIP_RANGE)
    torch.testing.assert_close(result.loss, torch.full((3,), math.log(2)))
    assert result.pair_accuracy.tolist() == [0.5] * 3


def test_descent_raises_the_target_and_lowers_the_reference():
    target, reference = random_log_ratios(scale=0.02)
    _, target_grad, reference_grad = gradients(target, reference)
    assert (target_grad < 0).all() and (reference_grad > 0).all()
    torch.testing.assert_close(target_grad, -reference_grad)


def test_descent_on_a_policy_moves_its_densities_as_wanted():
    # A Gaussian policy between the two actions: only its mean is trained.
    mean = torch.zeros(1, requires_grad=True)
    actions = torch.tensor([1.0, -1.0])
    reference_log_prob = torch.distributions.Normal(torch.zeros(1), 1.0).log_prob(actions)

    def log_ratios():
        return torch.distributions.Normal(mean, 1.0).log_prob(actions) - reference_log_prob

    target, reference = log_ratios().split(1)
    online_pso_loss(target, reference, BETA, CLIP_RANGE).loss.mean().backward()
    with torch.no_grad():
        mean -= 1e-3 * mean.grad
        target, reference = log_ratios().split(1)
    assert target > 0 > reference


@pytest.mark.parametrize("seed", range(3))
def test_has_gradient_is_false_exactly_where_both_are_clipped(seed):
    target, reference = random_log_ratios(scale=0.2, seed=seed)
    result, target_grad, reference_grad = gradients(target, reference)
    target_clipped = result.target_clipped_low + result.target_clipped_high > 0
    reference_clipped = result.reference_clipped_low + result.reference_clipped_high > 0
    assert torch.equal(result.has_gradient, (target_grad != 0) | (reference_grad != 0))
    assert torch.equal(result.has_gradient, ~(target_clipped & reference_clipped))
    assert torch.equal(target_clipped, target_grad == 0) and torch.equal(reference_clipped, reference_grad == 0)
    assert 0 < result.has_gradient.sum() < len(target)  # the case has both kinds


def test_each_side_of_each_sample_is_reported():
    target = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    reference = torch.tensor([0.0, 0.0, -1.0, 1.0])
    result = online_pso_loss(target, reference, BETA, CLIP_RANGE)
    assert result.target_clipped_low.tolist() == [1, 0, 0, 0]
    assert result.target_clipped_high.tolist() == [0, 1, 0, 0]
    assert result.reference_clipped_low.tolist() == [0, 0, 1, 0]
    assert result.reference_clipped_high.tolist() == [0, 0, 0, 1]
    assert result.pair_accuracy.tolist() == [0, 1, 1, 0]
    assert result.has_gradient.all()


@pytest.mark.parametrize("bound, outwards", [(LOW, -math.inf), (HIGH, math.inf)])
def test_a_ratio_on_the_bound_has_its_gradient_and_the_next_float_has_not(bound, outwards):
    on_bound = torch.tensor([bound])
    beyond = torch.nextafter(on_bound, torch.tensor([outwards]))
    inside = torch.nextafter(on_bound, torch.tensor([0.0]))
    far = torch.full((1,), 9.0)  # the other sample is clipped, so this one decides
    for log_ratio, kept in [(inside, True), (on_bound, True), (beyond, False)]:
        as_target, target_grad, _ = gradients(log_ratio, far)
        as_reference, _, reference_grad = gradients(far, log_ratio)
        assert as_target.has_gradient.item() is as_reference.has_gradient.item() is kept
        assert (target_grad.item() != 0) is (reference_grad.item() != 0) is kept


@pytest.mark.parametrize("extreme", [-1e4, -89.0, 89.0, 1e4])
def test_extreme_ratios_give_finite_losses_and_zero_gradients(extreme):
    # exp(89) overflows float32: a clamp of exp would give the gradient 0 * inf.
    extreme = torch.full((1,), extreme)
    for pair in [(extreme, torch.zeros(1)), (torch.zeros(1), extreme)]:
        result, *computed = gradients(*pair)
        assert torch.isfinite(result.loss).all()
        assert all(torch.isfinite(gradient).all() for gradient in computed)


def test_swapping_the_pair_mirrors_the_gradient():
    target, reference = random_log_ratios(scale=0.08)
    result, target_grad, reference_grad = gradients(target, reference)
    swapped, swapped_target_grad, swapped_reference_grad = gradients(reference, target)
    # d/dr of -log sigmoid(m) and of -log sigmoid(-m) add up to -beta, where the sample is not clipped.
    for sample, forward, backward in [
        (target, target_grad, swapped_reference_grad),
        (reference, reference_grad, swapped_target_grad),
    ]:
        inside = (LOW <= sample) & (sample <= HIGH)
        torch.testing.assert_close((forward - backward).abs(), BETA * inside.float(), rtol=1e-5, atol=1e-5)
        assert ((forward * backward)[inside] < 0).all() and (forward[~inside] == 0).all()
    assert torch.equal(swapped.pair_accuracy, 1 - result.pair_accuracy)
    assert torch.equal(swapped.has_gradient, result.has_gradient)
    # At equal ratios the mirror is exact.
    _, target_grad, reference_grad = gradients(target, target)
    assert torch.equal(target_grad, -reference_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    target, reference = (log_ratio.to(dtype) for log_ratio in random_log_ratios(scale=0.05))
    result, target_grad, reference_grad = gradients(target, reference)
    expected, expected_target_grad, expected_reference_grad = gradients(target.float(), reference.float())
    for value, wanted in zip(result, expected):
        assert torch.equal(value, wanted) and value.dtype == wanted.dtype
    assert result.loss.dtype == torch.float32
    assert target_grad.dtype == reference_grad.dtype == dtype
    assert torch.equal(target_grad, expected_target_grad.to(dtype))
    assert torch.equal(reference_grad, expected_reference_grad.to(dtype))


def test_nothing_but_the_loss_carries_a_gradient():
    target, reference = (log_ratio.requires_grad_() for log_ratio in random_log_ratios(4))
    result = online_pso_loss(target, reference, BETA, CLIP_RANGE)
    assert result.loss.requires_grad and not any(value.requires_grad for value in result[1:])
    assert all(value.shape == (4,) for value in result)
    assert result.has_gradient.dtype == torch.bool


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2), torch.zeros(3), 50.0, 0.1), r"one length \[B\], not \[2\] and \[3\]"),
        ((torch.zeros(()), torch.zeros(()), 50.0, 0.1), "two vectors"),
        ((torch.zeros(2), torch.zeros(2), 0.0, 0.1), "beta must be a positive number, not 0.0"),
        ((torch.zeros(2), torch.zeros(2), math.nan, 0.1), "beta must be a positive number"),
        ((torch.zeros(2), torch.zeros(2), 50.0, 0.0), "clip_range must lie between 0 and 1, not 0.0"),
        ((torch.zeros(2), torch.zeros(2), 50.0, 1.0), "clip_range must lie between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        online_pso_loss(*arguments)


# Offline


def denoising_errors(schedule, clean, noise, model_output, step_index, weighting="epsilon"):
    """d [B] by the project's functions, from clean latents to error."""
    sample = add_noise(schedule, clean, noise, step_index)
    prediction = predict_original_sample(schedule, model_output, sample, step_index)
    return denoising_error(clean, prediction, forward_weight(schedule, step_index, weighting))


def transcribed_errors(schedule, clean, noise, model_output, step_index, weighting):
    """The method page's d for a model that predicts noise, in float64."""
    alpha, sigma, gain, std = (closed_forms(schedule)[name][step_index] for name in ("alpha", "sigma", "gain", "std"))
    clean, noise, model_output = clean.double(), noise.double(), model_output.double()
    x_t = column(alpha) * clean + column(sigma) * noise
    f = (x_t - column(sigma) * model_output) / column(alpha)
    w = {"epsilon": (alpha / sigma) ** 2, "x0": torch.ones_like(alpha), "mdp": gain**2 / (2 * std**2)}[weighting]
    return w * ((clean - f) ** 2).mean(dim=(1, 2, 3))


def offline_gradients(target, reference, beta=BETA, target_anchor=0.0):
    target, reference = target.clone().requires_grad_(), reference.clone().requires_grad_()
    result = offline_pso_loss(target, reference, beta, target_anchor)
    return result, *torch.autograd.grad(result.loss.sum(), (target, reference))


@pytest.mark.parametrize(
    "scheduler_class, prediction_type, config, settings, weighting",
    [
        (*case, weighting)
        for case in OFFLINE
        for weighting in WEIGHTINGS
        if case[1] == "epsilon"
        and not (weighting == "mdp" and (case[3]["num_inference_steps"] == 1 or case[3].get("eta") == 0))
    ],
    ids=name_case,
)
def test_offline_loss_equals_the_plain_transcription(scheduler_class, prediction_type, config, settings, weighting):
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    steps = num_weighted_steps(schedule, weighting)
    step_index = torch.randint(steps, (16,), generator=torch.Generator().manual_seed(0))
    target, reference, noise = draw(3, 16, seed=1)
    outputs = noise + 0.2 * draw(4, 16, seed=2)  # theta's and ref's on the target, then on the reference
    cases = list(zip((target, target, reference, reference), outputs))
    computed = [denoising_errors(schedule, clean, noise, output, step_index, weighting) for clean, output in cases]
    expected = [transcribed_errors(schedule, clean, noise, output, step_index, weighting) for clean, output in cases]
    for ours, theirs in zip(computed, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)

    beta, anchor = 3 / float((expected[1] - expected[0]).abs().max()), 2.0
    d_theta_tau, d_ref_tau, d_theta_rho, d_ref_rho = expected
    for weight in (1.0, 0.3):
        result = offline_pso_loss(computed[1] - computed[0], computed[3] - computed[2], beta, anchor, weight)
        loss = -torch.log(torch.sigmoid(beta * ((d_ref_tau - d_theta_tau) - weight * (d_ref_rho - d_theta_rho))))
        loss += anchor * torch.clamp(d_theta_tau - d_ref_tau, min=0)
        torch.testing.assert_close(result.loss.double(), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler_class, prediction_type, config, settings",
    [case for case in FORWARD if case[1] == "epsilon" and not case[2].get("clip_sample")],
    ids=name_case,
)
def test_epsilon_weighted_error_is_the_noises(scheduler_class, prediction_type, config, settings):
    _, schedule = build(scheduler_class, prediction_type, config, settings)
    step_index = torch.arange(schedule.num_steps)
    clean, noise, model_output = draw(3, schedule.num_steps)
    computed = denoising_errors(schedule, clean, noise, model_output, step_index)
    torch.testing.assert_close(computed, ((model_output - noise) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta_dpo", [500.0, 5000.0])
@pytest.mark.parametrize(
    "scheduler_class, config",
    [
        (DDIMScheduler, {"clip_sample": False}),
        (LCMScheduler, {"original_inference_steps": 1000}),
        (EulerDiscreteScheduler, {}),
    ],
    ids=name_case,
)
def test_over_all_training_timesteps_it_is_diffusion_dpo(scheduler_class, config, beta_dpo):
    """With beta = beta_dpo / 2, on a schedule of as many steps as there are training timesteps."""
    eta = {"eta": 0.0} if scheduler_class is DDIMScheduler else {}
    settings = {"num_inference_steps": 1000, "stochastic": False, **eta}
    _, schedule = build(scheduler_class, "epsilon", config, settings)
    assert schedule.timesteps.tolist() == list(range(999, -1, -1))
    step_index = torch.randint(1000, (64,), generator=torch.Generator().manual_seed(0))
    step_index[:2] = torch.tensor([0, 999])
    clean_w, clean_l, noise = draw(3, 64, seed=1)
    ref_w, ref_l = noise + 0.3 * draw(2, 64, seed=2)
    model_w, model_l = torch.stack([ref_w, ref_l]) + 0.02 * draw(2, 64, seed=3)

    model_losses_w, model_losses_l, ref_losses_w, ref_losses_l = (
        ((output - noise) ** 2).mean(dim=(1, 2, 3)) for output in (model_w, model_l, ref_w, ref_l)
    )
    inside = -0.5 * beta_dpo * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
    assert 0.1 < inside.abs().mean() < 10

    target_gain, reference_gain = (
        denoising_errors(schedule, clean, noise, ref, step_index)
        - denoising_errors(schedule, clean, noise, model, step_index)
        for clean, ref, model in [(clean_w, ref_w, model_w), (clean_l, ref_l, model_l)]
    )
    computed = offline_pso_loss(target_gain, reference_gain, beta_dpo / 2).loss
    torch.testing.assert_close(computed, -F.logsigmoid(inside), rtol=1e-3, atol=1e-4)


def test_offline_descent_raises_the_target_and_lowers_the_reference():
    target, reference = random_log_ratios(scale=0.02)
    result, target_grad, reference_grad = offline_gradients(target, reference)
    factor = torch.sigmoid(-BETA * (target - reference))
    torch.testing.assert_close(target_grad, -BETA * factor)
    torch.testing.assert_close(reference_grad, BETA * factor)
    assert torch.equal(result.saturated, (factor < SATURATION).float()) and 0 < result.saturated.mean() < 1
    assert torch.equal(result.pair_accuracy, (target > reference).float())
    assert not result.anchored.any()


def test_anchor_acts_exactly_where_the_target_got_worse():
    target, reference = random_log_ratios(scale=0.02)
    target[:2] = torch.tensor([0.0, -0.0])  # as before the first update
    anchored, target_grad, reference_grad = offline_gradients(target, reference, target_anchor=7.0)
    plain, plain_target_grad, plain_reference_grad = offline_gradients(target, reference)
    worse = (target < 0).float()
    assert torch.equal(anchored.anchored, worse) and 0 < worse.mean() < 1
    torch.testing.assert_close(anchored.loss - plain.loss, 7 * worse * -target, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target_grad - plain_target_grad, -7 * worse, rtol=1e-4, atol=1e-5)
    assert torch.equal(reference_grad, plain_reference_grad)


def test_offline_loss_starts_at_log_two_and_stays_finite():
    gain = torch.tensor([0.0, 1e4, -1e4])
    result, *computed = offline_gradients(gain, torch.zeros(3))
    torch.testing.assert_close(result.loss, torch.tensor([math.log(2), 0.0, BETA * 1e4]))
    assert result.pair_accuracy.tolist() == [0.5, 1, 0] and result.saturated.tolist() == [0, 1, 0]
    assert all(gradient.isfinite().all() for gradient in computed)


@pytest.mark.parametrize("beta, kappa, prior_loss_weight", [(5.0, 0.1, 0.5), (5.0, 1.0, 0.5), (2.0, 3.0, 0.0)])
def test_hinge_equals_the_releases_formula(beta, kappa, prior_loss_weight):
    """Against torch's margin_ranking_loss, and the method page's reading of its gradient."""
    target, reference = (3 * values.abs() for values in random_log_ratios(scale=1.0))
    target.requires_grad_(), reference.requires_grad_()
    result = hinge_pso_loss(target, reference, beta, kappa, prior_loss_weight)
    hinge = F.margin_ranking_loss(
        beta * kappa * reference, beta * target, torch.ones_like(target), margin=1.0, reduction="none"
    )
    torch.testing.assert_close(result.loss, hinge + prior_loss_weight * reference)
    target_grad, reference_grad = torch.autograd.grad(result.loss.sum(), (target, reference))
    active = result.active
    assert torch.equal(active, (hinge > 0).float()) and 0 < active.mean() < 1
    torch.testing.assert_close(target_grad, beta * active)
    torch.testing.assert_close(reference_grad, prior_loss_weight - beta * kappa * active)
    if beta * kappa == prior_loss_weight:  # the release's figures: plain regression onto the target while active
        assert (reference_grad[active > 0] == 0).all()
    assert torch.equal(result.pair_accuracy, (target < reference).float())


@pytest.mark.parametrize("loss, settings", [(offline_pso_loss, (9.0, 2.0)), (hinge_pso_loss, (5.0, 0.1, 0.5))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_offline_losses_are_computed_in_float32(loss, settings, dtype):
    target, reference = (values.to(dtype).requires_grad_() for values in random_log_ratios(8))
    result, expected = loss(target, reference, *settings), loss(target.float(), reference.float(), *settings)
    for value, wanted in zip(result, expected):
        assert torch.equal(value, wanted) and value.shape == (8,) and value.dtype == torch.float32
    assert result.loss.requires_grad and not any(value.requires_grad for value in result[1:])


def test_denoising_error_of_half_precision_is_computed_in_float32():
    # The square of 300 overflows float16.
    clean, prediction = torch.full((2, 4, 32, 32), 300.0).half(), torch.zeros(2, 4, 32, 32).half().requires_grad_()
    error = denoising_error(clean, prediction, torch.tensor([1.0, 0.5]))
    assert error.dtype == torch.float32 and error.tolist() == [90000, 45000]
    gradient = torch.autograd.grad(error.sum() * 64, prediction)[0]
    torch.testing.assert_close(gradient[:, 0, 0, 0], torch.tensor([-2.0, -1.0]).half() * 300 * 64 / 4096)


ZEROS = torch.zeros(2)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (offline_pso_loss, (ZEROS, torch.zeros(3), 50.0), r"gains must be two vectors.*not \[2\] and \[3\]"),
        (offline_pso_loss, (ZEROS, ZEROS, math.inf), "beta must be a positive number, not inf"),
        (offline_pso_loss, (ZEROS, ZEROS, 50.0, -1.0), "target_anchor must be a number of at least 0, not -1.0"),
        (offline_pso_loss, (ZEROS, ZEROS, 50.0, 0.0, -1.0), "reference_weight must be a number of at least 0"),
        (hinge_pso_loss, (ZEROS[None], ZEROS[None], 5.0, 0.1, 0.5), "errors must be two vectors"),
        (hinge_pso_loss, (ZEROS, ZEROS, -5.0, 0.1, 0.5), "beta must be a positive number, not -5.0"),
        (hinge_pso_loss, (ZEROS, ZEROS, 5.0, -0.1, 0.5), "reference_weight must be a number of at least 0"),
        (hinge_pso_loss, (ZEROS, ZEROS, 5.0, 0.1, math.nan), "prior_loss_weight must be a number of at least 0"),
        (denoising_error, (torch.zeros(2, 3), torch.zeros(2, 1), ZEROS), r"one shape .*not \[2, 3\] and \[2, 1\]"),
        (denoising_error, (ZEROS, ZEROS, ZEROS), "two tensors of one shape"),
        (denoising_error, (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1)), r"a vector \[2\], not \[2, 1\]"),
    ],
)
def test_bad_offline_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
