"""The choice of pairs against brute-force loops."""

import itertools
import math

import pytest
import torch

from pso_utils.rewards import score_metrics, select_pairs, within_group_deviation


def brute_force(scores, weights, combination):
    num_rewards, num_prompts, num_samples = scores.shape
    pairs = []
    for prompt in range(num_prompts):
        sample = [[scores[r, prompt, k].item() for r in range(num_rewards)] for k in range(num_samples)]
        total = [sum(w.item() * s for w, s in zip(weights, values)) for values in sample]
        best = None
        for i, j in itertools.product(range(num_samples), repeat=2):
            signed = [
                (math.copysign(1, w) * a, math.copysign(1, w) * b) for w, a, b in zip(weights, sample[i], sample[j])
            ]
            if combination == "sum":
                wins = total[i] > total[j]
            else:
                wins = all(a >= b for a, b in signed) and any(a > b for a, b in signed)
            if wins and (best is None or total[i] - total[j] > best[0]):
                best = (total[i] - total[j], i, j)
        pairs.append(best and best[1:])
    return pairs


@pytest.mark.parametrize("combination", ["sum", "pareto"])
@pytest.mark.parametrize("num_samples", [2, 3, 6])
@pytest.mark.parametrize("weights", [[1.0], [-2.0], [1.0, 0.1], [1.0, -0.5, 3.0]])
@pytest.mark.parametrize("levels", [2, 5, None])
def test_pairs_equal_the_brute_force(combination, num_samples, weights, levels):
    generator = torch.Generator().manual_seed(len(weights) * 100 + num_samples)
    shape = (len(weights), 200, num_samples)
    if levels is None:
        scores = torch.randn(shape, generator=generator)
    else:  # few levels: many equal scores
        scores = torch.randint(levels, shape, generator=generator).float()
    weights = torch.tensor(weights)
    selection = select_pairs(scores, weights, combination)
    expected = brute_force(scores, weights, combination)
    assert selection.target.dtype == selection.reference.dtype == torch.long and selection.tie.dtype == torch.bool
    assert selection.tie.tolist() == [pair is None for pair in expected]
    kept = [prompt for prompt, pair in enumerate(expected) if pair is not None]
    found = [(selection.target[prompt].item(), selection.reference[prompt].item()) for prompt in kept]
    assert found == [expected[prompt] for prompt in kept]


def test_two_samples_are_ordered_by_their_score():
    selection = select_pairs(torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]]), torch.tensor([1.0]))
    assert selection.target.tolist()[:2] == [1, 0] and selection.reference.tolist()[:2] == [0, 1]
    assert selection.tie.tolist() == [False, False, True]


def test_pareto_wants_every_reward_and_sum_their_weighted_sum():
    scores = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]], [[1.0, 5.0], [1.0, 1.0], [2.0, 2.0]]])
    weights = torch.tensor([1.0, 1.0])
    assert select_pairs(scores, weights, "sum").tie.tolist() == [False, False, True]
    assert select_pairs(scores, weights, "sum").target.tolist()[:2] == [1, 0]
    pareto = select_pairs(scores, weights, "pareto")
    assert pareto.tie.tolist() == [True, False, True] and pareto.target[1] == 0
    # A negative weight turns its reward round: what was a conflict agrees.
    turned = select_pairs(scores, torch.tensor([1.0, -1.0]), "pareto")
    assert turned.tie.tolist() == [False, False, True] and turned.target.tolist()[:2] == [0, 0]


def test_equal_samples_tie_wherever_they_stand():
    # 33 samples of 9 rewards: long enough for a vectorised reduction with a remainder.
    weights = torch.linspace(0.1, 1.7, 9)
    scores = torch.randn(9, 50, 1, generator=torch.Generator().manual_seed(0)).expand(9, 50, 33)
    for combination in ("sum", "pareto"):
        assert select_pairs(scores, weights, combination).tie.all()


@pytest.mark.parametrize(
    "scores, weights, combination, message",
    [
        (torch.zeros(1, 2, 1), [1.0], "sum", "at least 2 samples"),
        (torch.zeros(2, 2), [1.0, 1.0], "sum", "at least 2 samples"),
        (torch.zeros(2, 2, 2), [1.0], "sum", "one weight for each reward"),
        (torch.zeros(1, 2, 2), [1.0], "best", "pass one of sum, pareto"),
    ],
)
def test_bad_selections_are_named(scores, weights, combination, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(scores, torch.tensor(weights), combination)


def test_the_deviation_within_groups_is_about_each_prompts_own_mean():
    torch.manual_seed(0)
    spread = torch.randn(2, 500, 8, dtype=torch.float64) * torch.tensor([3.0, 0.5]).view(2, 1, 1)
    deviation = within_group_deviation(spread + 100 * torch.randn(2, 500, 1))  # unlike prompts, alike spreads
    assert torch.allclose(deviation, torch.tensor([3.0, 0.5], dtype=torch.float64), rtol=0.05)
    assert within_group_deviation(torch.ones(1, 3, 4)).tolist() == [1.0]  # nothing to divide by


def test_in_units_of_their_deviations_a_rewards_own_unit_decides_nothing():
    scores, weights = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 1.0])
    scaled = scores * torch.tensor([1.0, 1e6]).view(2, 1, 1)
    plain, others = (select_pairs(each, weights / within_group_deviation(each)) for each in (scores, scaled))
    assert torch.equal(plain.target, others.target) and torch.equal(plain.reference, others.reference)
    assert not torch.equal(select_pairs(scaled, weights).target, plain.target)


def test_score_metrics_are_of_the_weighted_reward_and_of_each_and_of_the_pairs_alone():
    scores = torch.tensor([[[1.0, 3.0], [5.0, 5.0]], [[0.0, 0.5], [2.0, 2.0]]])  # [R, P, K]; the second prompt ties
    weights = torch.tensor([1.0, -2.0])
    selection = select_pairs(scores, weights)
    assert selection.tie.tolist() == [False, True]
    values = score_metrics(["a", "b"], weights, scores, selection)
    reward = scores[0] - 2 * scores[1]
    assert values["reward_mean"] == reward.mean() and values["reward_std"] == pytest.approx(reward.std().item())
    assert values["reward/a_mean"] == 3.5 and values["reward/a_std_within_prompts"] == 1  # variances of 2 and 0
    chosen = scores[:, 0, selection.target[0]] - scores[:, 0, selection.reference[0]]
    assert values["reward_gap"] == chosen[0] - 2 * chosen[1]
    assert values["reward/b_gap"] == chosen[1]
    nothing_but_ties = selection._replace(tie=torch.ones(2, dtype=torch.bool))
    assert "reward_gap" not in score_metrics(["a"], weights[:1], scores[:1], nothing_but_ties)
