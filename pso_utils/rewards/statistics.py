"""Statistics of scores of several images a prompt. The images of one prompt are alike, so the uncertainty of a mean
comes from the choice of prompts: standard errors and intervals are those of a mean over prompts.

Functions take scores [N], and the prompt of each as an integer, [N]. A score that is NaN is left out.
"""

import math

import numpy as np


RESAMPLES = 10_000


def _by_prompt(scores: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each prompt's scores, both [P], of the prompts that have a score."""
    kept = ~np.isnan(scores)
    prompt_index = np.unique(prompts[kept], return_inverse=True)[1]
    return np.bincount(prompt_index, scores[kept]), np.bincount(prompt_index)


def mean(scores: np.ndarray) -> float:
    kept = scores[~np.isnan(scores)]
    return float(kept.mean()) if len(kept) else math.nan


def standard_error(scores: np.ndarray, prompts: np.ndarray) -> float:
    """Standard error of the mean over all images, from the spread between prompts. With equally many images a prompt it
    is that of the prompts' means; with one, the usual one. NaN with fewer than two prompts."""
    sums, counts = _by_prompt(scores, prompts)
    if len(sums) < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(len(sums) / (len(sums) - 1) * np.square(residuals).sum()) / counts.sum())


def bootstrap_interval(
    scores: np.ndarray, prompts: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over all images, the prompts resampled with all their images. (NaN,
    NaN) with fewer than two prompts."""
    sums, counts = _by_prompt(scores, prompts)
    if len(sums) < 2:
        return math.nan, math.nan
    rng, means = np.random.default_rng(seed), []
    for start in range(0, resamples, 1000):  # not at once: 10,000 resamples of 4,000 prompts are 320 MB
        times = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(1000, resamples - start))
        means.append(times @ sums / (times @ counts))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def summarize(scores: np.ndarray, prompts: np.ndarray) -> dict:
    """`count` of the images that have a score, `failed` of those that have none, `mean` and `standard_error`."""
    failed = int(np.isnan(scores).sum())
    error = standard_error(scores, prompts)
    return {"count": len(scores) - failed, "failed": failed, "mean": mean(scores), "standard_error": error}


def compare(scores: np.ndarray, base: np.ndarray, prompts: np.ndarray, *, higher_is_better: bool = True) -> dict:
    """Scores against the base's of the same prompts and noise, over the images that have both: `paired` of them, the
    mean `difference`, its standard error and 95% `interval`, and the `win_rate`, the fraction of images that are
    better, a tie counting half."""
    difference = scores - base
    kept = difference[~np.isnan(difference)]
    wins = (kept > 0 if higher_is_better else kept < 0) + 0.5 * (kept == 0)
    return {
        "paired": len(kept),
        "difference": mean(difference),
        "difference_standard_error": standard_error(difference, prompts),
        "interval": bootstrap_interval(difference, prompts),
        "win_rate": mean(wins),
    }
