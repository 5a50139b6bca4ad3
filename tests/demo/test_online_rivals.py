"""The losses of the comparison's other online forms, against the script's and closed forms."""

import pytest
import torch

from demo.compare.online_rivals import group_advantages, group_pso_loss, nft_loss, optimality, parameters_of
from pso_utils.losses import denoising_error, offline_pso_loss


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_group_of_two_is_the_pair():
    scores, gains = randn(6, 5), randn(2, 6, seed=1).requires_grad_()
    kept, advantages = group_advantages(scores, 1)
    assert torch.equal(kept, torch.stack([scores.argmax(dim=1), scores.argmin(dim=1)], dim=1))
    assert torch.allclose(advantages, torch.tensor([1.0, -1.0]).expand(6, 2))
    loss = group_pso_loss(gains, advantages.T, beta=3.0, target_anchor=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), gains)
    pair, _ = offline_pso_loss(*gains, beta=3.0, target_anchor=2.0)
    assert torch.allclose(loss, pair, rtol=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(pair.sum(), gains)[0], rtol=1e-6, atol=1e-7)


def test_advantages_of_a_group_sum_to_zero_and_are_two_in_size_but_for_a_tie():
    _, advantages = group_advantages(torch.cat([randn(4, 8), torch.ones(1, 8)]), 2)
    assert torch.allclose(advantages.sum(dim=1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(advantages.abs().sum(dim=1), torch.tensor([2.0, 2, 2, 2, 0]), atol=1e-6)
    assert (advantages[:4, 0] > 0).all() and (advantages[:4, -1] < 0).all()


def test_nft_at_the_old_policy_has_the_gradient_of_the_weighted_errors():
    """At f_theta = f_old: d loss / d f_theta = (2 r - 1) d error / d f_theta, for any beta."""
    latents, old = randn(4, 3, 2, 5, 5), randn(4, 3, 2, 5, 5, seed=1)
    chosen, weight = optimality(randn(3, 4)).T, torch.tensor([1.0, 2.0, 0.5])
    predicted = old.clone().requires_grad_()
    loss = nft_loss(latents, predicted, old, chosen, weight, beta=0.7)
    (gradient,) = torch.autograd.grad(loss.sum(), predicted)
    weighted = ((2 * chosen - 1) * denoising_error(latents, predicted, weight)).mean(dim=0)
    assert torch.allclose(gradient, torch.autograd.grad(weighted.sum(), predicted)[0], rtol=1e-5, atol=1e-7)


def test_optimality_is_between_0_and_1_and_a_half_in_a_tie():
    values = optimality(torch.cat([10 * randn(3, 8), torch.ones(1, 8)]))
    assert values.min() >= 0 and values.max() <= 1 and torch.equal(values[3], torch.full((8,), 0.5))


def test_parameters_have_other_values_within_the_context_alone():
    parameters = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ZeroDivisionError), parameters_of(parameters, [torch.ones(2)]):
        assert torch.equal(parameters[0], torch.ones(2))
        raise ZeroDivisionError
    assert torch.equal(parameters[0], torch.zeros(2)) and parameters[0].requires_grad
