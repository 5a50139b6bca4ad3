"""The PSO losses against plain transcriptions of their equations, against Diffusion-DPO's and against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from test_schedules import FLOW_HALF, OFFLINE, SCM, UNCLIPPED, Case, randn, relative_error

from pso_utils.losses import SATURATION, denoising_error, hinge_pso_loss, offline_pso_loss, online_pso_loss
from pso_utils.mdp import WEIGHTINGS, add_noise, forward_weights, predict


ONLINE = {"beta": 50.0, "clip_range": 0.1}
HINGE = {"beta": 5.0, "reference_weight": 0.1, "prior_loss_weight": 0.5}
LOW, HIGH = math.log1p(-0.1), math.log1p(0.1)
# (loss, its settings, the names of its metrics)
LOSSES = [
    (
        online_pso_loss,
        ONLINE,
        "loss pair_accuracy target_log_ratio reference_log_ratio target_clipped_low target_clipped_high "
        "reference_clipped_low reference_clipped_high",
    ),
    (
        offline_pso_loss,
        {"beta": 9.0, "target_anchor": 2.0},
        "loss target_gain reference_gain pair_accuracy saturated anchored",
    ),
    (hinge_pso_loss, HINGE, "loss target_error reference_error pair_accuracy active"),
]


def random_pairs(count=512, scale=0.1, seed=0):
    """Targets' and references' log-ratios, gains or errors [count]."""
    return scale * torch.randn(2, count, generator=torch.Generator().manual_seed(seed))


def with_gradients(loss, target, reference, **settings):
    """The loss [B], its metrics, and the gradients of its sum [B] each."""
    inputs = target.clone().requires_grad_(), reference.clone().requires_grad_()
    value, metrics = loss(*inputs, **settings)
    return value, metrics, *torch.autograd.grad(value.sum(), inputs)


# ---- All losses ----


@pytest.mark.parametrize("loss, settings, names", LOSSES)
def test_metrics_are_the_documented_names_without_gradient(loss, settings, names):
    target, reference = (values.requires_grad_() for values in random_pairs(4))
    value, metrics = loss(target, reference, **settings)
    assert list(metrics) == names.split()
    assert value.requires_grad and torch.equal(metrics["loss"], value)
    for metric in metrics.values():
        assert not metric.requires_grad and metric.shape == (4,) and metric.dtype == torch.float32


@pytest.mark.parametrize("loss, settings, names", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(loss, settings, names, dtype):
    target, reference = random_pairs(8, scale=0.05).to(dtype)
    value, metrics, *gradients = with_gradients(loss, target, reference, **settings)
    wanted, wanted_metrics, *wanted_gradients = with_gradients(loss, target.float(), reference.float(), **settings)
    assert value.dtype == torch.float32 and torch.equal(value, wanted)
    assert all(torch.equal(metrics[name], wanted_metrics[name]) for name in names.split())
    for ours, theirs in zip(gradients, wanted_gradients):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))


ZEROS, LATENTS = torch.zeros(2), torch.zeros(2, 1, 1, 3)


@pytest.mark.parametrize(
    "function, tensors, settings, message",
    [
        (online_pso_loss, (ZEROS, ZEROS), {**ONLINE, "beta": 0.0}, "beta must be above 0 .* not 0.0 and 0.1"),
        (online_pso_loss, (ZEROS, ZEROS), {**ONLINE, "beta": math.nan}, "beta must be above 0"),
        (online_pso_loss, (ZEROS, ZEROS), {**ONLINE, "clip_range": 0.0}, "clip_range between 0 and 1, .* and 0.0"),
        (online_pso_loss, (ZEROS, ZEROS), {**ONLINE, "clip_range": 1.0}, "clip_range between 0 and 1"),
        (offline_pso_loss, (ZEROS, ZEROS), {"beta": math.inf}, "beta must be above 0, .* not inf, 0.0 and 1.0"),
        (offline_pso_loss, (ZEROS, ZEROS), {"beta": 1.0, "target_anchor": -1.0}, "at least 0, not 1.0, -1.0 and"),
        (offline_pso_loss, (ZEROS, ZEROS), {"beta": 1.0, "reference_weight": -1.0}, "reference_weight at least 0"),
        (hinge_pso_loss, (ZEROS, ZEROS), {**HINGE, "beta": -5.0}, "beta must be above 0, .* not -5.0, 0.1 and 0.5"),
        (hinge_pso_loss, (ZEROS, ZEROS), {**HINGE, "reference_weight": -0.1}, "at least 0, not 5.0, -0.1 and 0.5"),
        (hinge_pso_loss, (ZEROS, ZEROS), {**HINGE, "prior_loss_weight": math.nan}, "prior_loss_weight at least 0"),
        (denoising_error, (LATENTS, LATENTS[..., :1], ZEROS), {}, r"one shape .*\[2, 1, 1, 3\], \[2, 1, 1, 1\] and"),
        (denoising_error, (LATENTS, LATENTS, ZEROS[:, None]), {}, r"a vector \[B\], not .* and \[2, 1\]"),
        (denoising_error, (LATENTS[None], LATENTS[None], torch.zeros(1)), {}, r"a vector \[B\], not .* and \[1\]"),
    ],
)
def test_bad_arguments_are_named(function, tensors, settings, message):
    with pytest.raises(ValueError, match=message):
        function(*tensors, **settings)


@pytest.mark.parametrize("loss, settings, names", LOSSES)
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_targets_and_references_of_unlike_shapes_are_refused(loss, settings, names, shape):
    """Two of these would broadcast."""
    with pytest.raises(RuntimeError, match="equal size"):
        loss(ZEROS, torch.zeros(shape), **settings)


# ---- Online ----


@pytest.mark.parametrize("beta, clip_range", [(50.0, 0.1), (1.0, 0.5), (500.0, 1e-3)])
def test_online_loss_and_gradient_are_the_releases_formula(beta, clip_range):
    """log clamp(exp(r)), in float64."""

    def formula(*log_ratios):
        target, reference = (torch.log(torch.clamp(r.exp(), 1 - clip_range, 1 + clip_range)) for r in log_ratios)
        return -torch.log(torch.sigmoid(beta * (target - reference)))

    target, reference = random_pairs(scale=clip_range)
    value, _, *gradients = with_gradients(online_pso_loss, target, reference, beta=beta, clip_range=clip_range)
    inputs = target.double().requires_grad_(), reference.double().requires_grad_()
    expected = formula(*inputs)
    assert relative_error(value.double(), expected) < 1e-6
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), inputs)):
        assert relative_error(ours.double(), theirs) < 1e-6


def test_equal_ratios_give_log_two():
    value, metrics = online_pso_loss(torch.zeros(3), torch.zeros(3), **ONLINE)
    torch.testing.assert_close(value, torch.full((3,), math.log(2)))
    assert metrics["pair_accuracy"].tolist() == [0.5] * 3


def test_online_descent_raises_the_target_and_lowers_the_reference():
    _, _, target_grad, reference_grad = with_gradients(online_pso_loss, *random_pairs(scale=0.02), **ONLINE)
    assert (target_grad < 0).all()
    torch.testing.assert_close(target_grad, -reference_grad)


def test_descent_on_a_policy_moves_its_densities_as_wanted():
    # A Gaussian policy between the two actions: only its mean is trained.
    mean = torch.zeros(1, requires_grad=True)
    actions = torch.tensor([1.0, -1.0])
    base_log_prob = torch.distributions.Normal(torch.zeros(1), 1.0).log_prob(actions)

    def log_ratios():
        return (torch.distributions.Normal(mean, 1.0).log_prob(actions) - base_log_prob).split(1)

    online_pso_loss(*log_ratios(), **ONLINE)[0].mean().backward()
    with torch.no_grad():
        mean -= 1e-3 * mean.grad
        target, reference = log_ratios()
    assert target > 0 > reference


def test_a_sample_has_a_gradient_exactly_where_it_is_not_reported_as_clipped():
    target, reference = random_pairs(scale=0.2)
    _, metrics, *gradients = with_gradients(online_pso_loss, target, reference, **ONLINE)
    for name, gradient in zip(("target", "reference"), gradients):
        clipped = metrics[f"{name}_clipped_low"] + metrics[f"{name}_clipped_high"]
        assert torch.equal(clipped, (gradient == 0).float()) and 0 < clipped.mean() < 1


def test_each_side_of_each_sample_is_reported():
    target, reference = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 1.0]])
    _, metrics = online_pso_loss(target, reference, **ONLINE)
    assert metrics["target_clipped_low"].tolist() == [1, 0, 0, 0]
    assert metrics["target_clipped_high"].tolist() == [0, 1, 0, 0]
    assert metrics["reference_clipped_low"].tolist() == [0, 0, 1, 0]
    assert metrics["reference_clipped_high"].tolist() == [0, 0, 0, 1]
    assert metrics["pair_accuracy"].tolist() == [0, 1, 1, 0]
    assert torch.equal(metrics["target_log_ratio"], target)
    assert torch.equal(metrics["reference_log_ratio"], reference)


@pytest.mark.parametrize("bound, outwards", [(LOW, -math.inf), (HIGH, math.inf)])
def test_a_ratio_on_the_bound_has_its_gradient_and_the_next_float_has_not(bound, outwards):
    on_bound = torch.tensor([bound])
    beyond, inside = (torch.nextafter(on_bound, torch.tensor([to])) for to in (outwards, 0.0))
    for log_ratio, kept in [(inside, True), (on_bound, True), (beyond, False)]:
        for position, pair in enumerate([(log_ratio, torch.zeros(1)), (torch.zeros(1), log_ratio)]):
            _, metrics, *gradients = with_gradients(online_pso_loss, *pair, **ONLINE)
            name = ("target", "reference")[position]
            assert (gradients[position].item() != 0) is kept
            assert (metrics[f"{name}_clipped_low"] + metrics[f"{name}_clipped_high"] == 0).item() is kept


@pytest.mark.parametrize("extreme", [-1e4, -89.0, 89.0, 1e4])
def test_extreme_ratios_give_finite_losses_and_gradients(extreme):
    # exp(89) overflows float32: a clamp of exp would give the gradient 0 * inf.
    pairs = torch.tensor([[extreme, 0.0], [0.0, extreme]])
    value, _, *gradients = with_gradients(online_pso_loss, *pairs, **ONLINE)
    assert all(values.isfinite().all() for values in (value, *gradients))


def test_swapping_the_pair_mirrors_the_gradient():
    target, reference = random_pairs(scale=0.08)
    _, metrics, target_grad, reference_grad = with_gradients(online_pso_loss, target, reference, **ONLINE)
    _, swapped, *swapped_gradients = with_gradients(online_pso_loss, reference, target, **ONLINE)
    # d/dr of -log sigmoid(m) and of -log sigmoid(-m) add up to -beta, where the sample is not clipped.
    for sample, forward, backward in [
        (target, target_grad, swapped_gradients[1]),
        (reference, reference_grad, swapped_gradients[0]),
    ]:
        inside = (LOW <= sample) & (sample <= HIGH)
        torch.testing.assert_close((forward - backward).abs(), 50 * inside.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(swapped["pair_accuracy"], 1 - metrics["pair_accuracy"])


# ---- Offline ----


def denoising_errors(schedule, clean, noise, model_output, step_index, weighting="epsilon"):
    """d [B] by the project's functions, from clean latents to error."""
    steps = schedule.at(step_index)
    x0, _ = predict(steps, model_output, add_noise(steps, clean, noise))
    return denoising_error(clean, x0, forward_weights(schedule, weighting)[step_index])


def transcribed_errors(schedule, clean, noise, model_output, step_index, weighting):
    """The method page's d, in float64."""
    levels = (schedule.columns._asdict()[name][step_index] for name in ("alpha", "sigma", "gain", "std"))
    alpha, sigma, gain, std = (level.double()[:, None, None, None] for level in levels)
    clean, noise, model_output = clean.double(), noise.double(), model_output.double()
    x_t = alpha * clean + sigma * noise
    f = {
        "epsilon": (x_t - sigma * model_output) / alpha,
        "flow": x_t - sigma * model_output,
        "trigflow": alpha * x_t - sigma / schedule.sigma_data * model_output,
    }[schedule.prediction_type]
    w = {"epsilon": (alpha / sigma) ** 2, "x0": 1.0, "velocity": 1 / sigma**2, "mdp": gain**2 / (2 * std**2)}[weighting]
    return (w * (clean - f) ** 2).mean(dim=(1, 2, 3))


def has_weights(case, weighting) -> bool:
    if weighting == "velocity":
        return case in FLOW_HALF
    return weighting != "mdp" or not (case.steps["num_inference_steps"] == 1 or case.arguments.get("eta") == 0)


@pytest.mark.parametrize(
    "case, weighting",
    [
        (case, weighting)
        for case in OFFLINE + FLOW_HALF + SCM
        for weighting in WEIGHTINGS
        if has_weights(case, weighting)
    ],
    ids=str,
)
def test_denoising_error_equals_the_plain_transcription(case, weighting):
    schedule = case.schedule()
    step_index = torch.arange(16) % len(forward_weights(schedule, weighting))
    clean, noise, error = randn(3, 16, seed=1)
    model_output = (noise if schedule.prediction_type == "epsilon" else noise - clean) + 0.2 * error
    arguments = schedule, clean, noise, model_output, step_index, weighting
    torch.testing.assert_close(
        denoising_errors(*arguments).double(), transcribed_errors(*arguments), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("anchor", (0.0, 2.0))
@pytest.mark.parametrize("weight", (1.0, 0.3))
def test_offline_loss_and_gradient_equal_the_plain_transcription(weight, anchor):
    target, reference = random_pairs()
    settings = {"beta": 20.0, "target_anchor": anchor, "reference_weight": weight}
    value, _, *gradients = with_gradients(offline_pso_loss, target, reference, **settings)
    inputs = target.double().requires_grad_(), reference.double().requires_grad_()
    expected = -torch.log(torch.sigmoid(20 * (inputs[0] - weight * inputs[1])))
    expected = expected + anchor * torch.clamp(-inputs[0], min=0)
    assert relative_error(value.double(), expected) < 1e-6
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), inputs)):
        assert relative_error(ours.double(), theirs) < 1e-6


@pytest.mark.parametrize("beta_dpo", [500.0, 5000.0])
@pytest.mark.parametrize(
    "scheduler_class, config, eta",
    [
        (DDIMScheduler, UNCLIPPED, {"eta": 0.0}),
        (LCMScheduler, {"original_inference_steps": 1000}, {}),
        (EulerDiscreteScheduler, {}, {}),
    ],
)
def test_over_all_training_timesteps_it_is_diffusion_dpo(scheduler_class, config, eta, beta_dpo):
    """With beta = beta_dpo / 2, on a schedule of as many steps as there are training timesteps."""
    schedule = Case(scheduler_class, config, {"num_inference_steps": 1000, "stochastic": False, **eta}).schedule()
    assert schedule.timesteps.tolist() == list(range(999, -1, -1))
    step_index = torch.randint(1000, (64,), generator=torch.Generator().manual_seed(0))
    step_index[:2] = torch.tensor([0, 999])
    clean_w, clean_l, noise = randn(3, 64, seed=1)
    base_w, base_l = noise + 0.3 * randn(2, 64, seed=2)
    model_w, model_l = torch.stack([base_w, base_l]) + 0.02 * randn(2, 64, seed=3)

    model_loss_w, model_loss_l, base_loss_w, base_loss_l = (
        ((output - noise) ** 2).mean(dim=(1, 2, 3)) for output in (model_w, model_l, base_w, base_l)
    )
    inside = -0.5 * beta_dpo * ((model_loss_w - model_loss_l) - (base_loss_w - base_loss_l))
    assert 0.1 < inside.abs().mean() < 10

    gains = (
        denoising_errors(schedule, clean, noise, base, step_index)
        - denoising_errors(schedule, clean, noise, model, step_index)
        for clean, base, model in [(clean_w, base_w, model_w), (clean_l, base_l, model_l)]
    )
    computed, _ = offline_pso_loss(*gains, beta=beta_dpo / 2)
    torch.testing.assert_close(computed, -F.logsigmoid(inside), rtol=1e-3, atol=1e-4)


def test_offline_descent_raises_the_target_and_lowers_the_reference():
    target, reference = random_pairs(scale=0.02)
    _, metrics, target_grad, reference_grad = with_gradients(offline_pso_loss, target, reference, beta=50.0)
    factor = torch.sigmoid(-50 * (target - reference))
    torch.testing.assert_close(target_grad, -50 * factor)
    torch.testing.assert_close(reference_grad, 50 * factor)
    assert torch.equal(metrics["saturated"], (factor < SATURATION).float()) and 0 < metrics["saturated"].mean() < 1
    assert torch.equal(metrics["pair_accuracy"], (target > reference).float())
    assert not metrics["anchored"].any()


def test_anchor_acts_exactly_where_the_target_got_worse():
    target, reference = random_pairs(scale=0.02)
    target[:2] = torch.tensor([0.0, -0.0])  # as before the first update
    value, metrics, target_grad, reference_grad = with_gradients(
        offline_pso_loss, target, reference, beta=50.0, target_anchor=7.0
    )
    plain, _, plain_target_grad, plain_reference_grad = with_gradients(offline_pso_loss, target, reference, beta=50.0)
    worse = (target < 0).float()
    assert torch.equal(metrics["anchored"], worse) and 0 < worse.mean() < 1
    torch.testing.assert_close(value - plain, 7 * worse * -target, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target_grad - plain_target_grad, -7 * worse, rtol=1e-4, atol=1e-5)
    assert torch.equal(reference_grad, plain_reference_grad)


def test_offline_loss_starts_at_log_two_and_stays_finite():
    gain = torch.tensor([0.0, 1e4, -1e4])
    value, metrics, *gradients = with_gradients(offline_pso_loss, gain, torch.zeros(3), beta=50.0)
    torch.testing.assert_close(value, torch.tensor([math.log(2), 0.0, 5e5]))
    assert metrics["pair_accuracy"].tolist() == [0.5, 1, 0] and metrics["saturated"].tolist() == [0, 1, 0]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("beta, kappa, prior_loss_weight", [(5.0, 0.1, 0.5), (5.0, 1.0, 0.5), (2.0, 3.0, 0.0)])
def test_hinge_equals_the_releases_formula(beta, kappa, prior_loss_weight):
    """Against torch's margin_ranking_loss, and the method page's reading of its gradient."""
    target, reference = 3 * random_pairs(scale=1.0).abs()
    settings = {"beta": beta, "reference_weight": kappa, "prior_loss_weight": prior_loss_weight}
    value, metrics, target_grad, reference_grad = with_gradients(hinge_pso_loss, target, reference, **settings)
    hinge = F.margin_ranking_loss(
        beta * kappa * reference, beta * target, torch.ones_like(target), margin=1.0, reduction="none"
    )
    torch.testing.assert_close(value, hinge + prior_loss_weight * reference)
    active = metrics["active"]
    assert torch.equal(active, (hinge > 0).float()) and 0 < active.mean() < 1
    torch.testing.assert_close(target_grad, beta * active)
    torch.testing.assert_close(reference_grad, prior_loss_weight - beta * kappa * active)
    if beta * kappa == prior_loss_weight:  # the release's figures: plain regression onto the target while active
        assert (reference_grad[active > 0] == 0).all()
    assert torch.equal(metrics["pair_accuracy"], (target < reference).float())


def test_a_pair_of_equal_errors_is_half_right():
    _, metrics = hinge_pso_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), **HINGE)
    assert metrics["pair_accuracy"].tolist() == [0.5, 1]


def test_denoising_errors_of_several_rows_are_those_of_each():
    clean, predicted = randn(2, 3, 2, seed=1), randn(2, 3, 2, seed=2)
    weight = torch.tensor([1.0, 0.5])
    rows = [denoising_error(*row, weight) for row in zip(clean.flatten(0, 1), predicted.flatten(0, 1))]
    assert torch.equal(denoising_error(clean, predicted, weight), torch.stack(rows).view(2, 3, 2))


def test_denoising_error_of_half_precision_is_computed_in_float32():
    # The square of 300 overflows float16.
    clean, prediction = torch.full((2, 4, 32, 32), 300.0).half(), torch.zeros(2, 4, 32, 32).half().requires_grad_()
    error = denoising_error(clean, prediction, torch.tensor([1.0, 0.5]))
    assert error.dtype == torch.float32 and error.tolist() == [90000, 45000]
    gradient = torch.autograd.grad(error.sum() * 64, prediction)[0]
    torch.testing.assert_close(gradient[:, 0, 0, 0], torch.tensor([-2.0, -1.0]).half() * 300 * 64 / 4096)
