"""The online PSO loss against a plain transcription of its equation and against autograd."""

import math

import pytest
import torch

from pso_utils.losses import online_pso_loss


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
