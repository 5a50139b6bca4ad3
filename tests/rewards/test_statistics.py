"""Statistics against scipy on the same numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from pso_utils.rewards.statistics import bootstrap_interval, compare, mean, standard_error, summarize


NUM_PROMPTS = 60


@pytest.fixture
def scores():
    """Scores of 4 images of each prompt, those of a prompt alike, and the base's: [P, 4] each."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(NUM_PROMPTS, 1)) + 0.3 * rng.normal(size=(NUM_PROMPTS, 4))
    return base + 0.2 + 0.5 * rng.normal(size=(NUM_PROMPTS, 1)) + 0.2 * rng.normal(size=(NUM_PROMPTS, 4)), base


PROMPTS = np.arange(NUM_PROMPTS).repeat(4)


def test_with_one_image_a_prompt_the_standard_error_is_the_usual_one(scores):
    values = scores[0][:, 0]
    assert standard_error(values, np.arange(NUM_PROMPTS)) == pytest.approx(stats.sem(values), rel=1e-12)


def test_the_standard_error_is_that_of_the_prompts_means(scores):
    values = scores[0]
    assert standard_error(values.flatten(), PROMPTS) == pytest.approx(stats.sem(values.mean(axis=1)), rel=1e-12)
    assert standard_error(values.flatten(), PROMPTS) > 1.5 * stats.sem(values.flatten())  # images of a prompt are alike


def test_the_difference_in_standard_errors_is_the_paired_t_statistic(scores):
    tuned, base = scores
    result = compare(tuned.flatten(), base.flatten(), PROMPTS)
    expected = stats.ttest_rel(tuned.mean(axis=1), base.mean(axis=1)).statistic
    assert result["difference"] / result["difference_standard_error"] == pytest.approx(expected, rel=1e-12)
    assert result["difference"] == pytest.approx((tuned - base).mean(), rel=1e-12) and result["paired"] == tuned.size


def test_the_interval_is_scipys_bootstrap_over_prompts_within_monte_carlo_error(scores):
    difference = scores[0] - scores[1]
    ours = bootstrap_interval(difference.flatten(), PROMPTS)
    rng = np.random.default_rng(1)
    theirs = stats.bootstrap((difference.mean(axis=1),), np.mean, n_resamples=10_000, method="percentile", rng=rng)
    # a 2.5% quantile of 10,000 draws has a standard error of about 0.027 deviations; of two, four of them
    tolerance = 4 * math.sqrt(2) * 0.027 * theirs.standard_error
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=tolerance)
    assert ours == bootstrap_interval(difference.flatten(), PROMPTS)  # no chance from run to run


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(size=(40, 1)) + rng.normal(size=(40, 2))
        low, high = bootstrap_interval(values.flatten(), np.arange(40).repeat(2), resamples=400)
        hits += low <= 0 <= high
    assert 0.88 < hits / 200 < 0.99  # 0.95, less a little for 40 prompts


def test_wins_are_counted_in_the_better_direction_and_ties_count_half():
    scores, base = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 5.0, 1.0])
    prompts = np.arange(4)
    assert compare(scores, base, prompts)["win_rate"] == 2.5 / 4
    assert compare(scores, base, prompts, higher_is_better=False)["win_rate"] == 1.5 / 4


def test_equal_scores_are_exactly_no_difference(scores):
    values = scores[0].flatten()
    result = compare(values, values.copy(), PROMPTS)
    assert result["difference"] == result["difference_standard_error"] == 0
    assert result["interval"] == (0, 0) and result["win_rate"] == 0.5


def test_failed_images_are_left_out_with_their_partners(scores):
    tuned, base = scores[0].flatten(), scores[1].flatten()
    tuned[:4], base[9], base[200] = math.nan, math.nan, math.nan  # the first prompt has no score at all
    kept = ~np.isnan(tuned - base)
    result, expected = compare(tuned, base, PROMPTS), compare(tuned[kept], base[kept], PROMPTS[kept])
    assert result == expected and result["paired"] == len(tuned) - 6
    assert summarize(base, PROMPTS)["count"] == len(base) - 2 and summarize(base, PROMPTS)["failed"] == 2
    assert summarize(base, PROMPTS)["mean"] == pytest.approx(np.nanmean(base))


def test_what_one_prompt_cannot_tell_is_not_a_number():
    assert math.isnan(standard_error(np.array([1.0, 2.0]), np.array([0, 0])))
    assert all(map(math.isnan, bootstrap_interval(np.array([1.0, 2.0]), np.array([0, 0]))))
    assert math.isnan(mean(np.array([math.nan])))
