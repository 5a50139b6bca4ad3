"""From the scores of each prompt's samples to its pair."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


COMBINATIONS = ("sum", "pareto")


class PairSelection(NamedTuple):
    """The pair picked for each prompt, as indices into its K samples, all `[P]`.

    Attributes:
        target: long, the preferred sample.
        reference: long, the sample that it is preferred to.
        tie: bool, no sample is preferred; target and reference are then meaningless.
    """

    target: Tensor
    reference: Tensor
    tie: Tensor


def within_group_deviation(scores: Tensor) -> Tensor:
    """The standard deviation [R] of the scores [R, P, K] about the mean of their own prompt's K, over all prompts; 1
    where all samples of each prompt score alike. By it rewards of unlike units can be added: a deviation for each
    prompt would be a vote without size where K is 2."""
    variance = scores.double().var(dim=2).mean(dim=1)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()


def select_pairs(scores: Tensor, weights: Tensor, combination: str = "sum") -> PairSelection:
    """Picks a target and a reference among the K samples of each of P prompts.

    - `sum`: best against worst by the weighted sum of the rewards; a tie where these are equal.
    - `pareto`: target i and reference j where i is at least as good as j in every reward and better in one, the sign
      of a reward's weight saying which direction is better. Of several such pairs, the one whose weighted sums differ
      most; a tie where there is none.

    Among equal candidates the lowest index is taken (target first), so the choice is deterministic.

    Args:
        scores: `[R, P, K]`.
        weights: `[R]`.

    Raises:
        ValueError: fewer than two samples a prompt, shapes that don't fit, or an unknown combination.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"unknown reward combination '{combination}': pass one of {', '.join(COMBINATIONS)}")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=scores.device)
    if scores.ndim != 3 or weights.shape != scores.shape[:1] or scores.shape[2] < 2:
        raise ValueError(
            "pairs need scores [rewards, prompts, at least 2 samples] and one weight for each reward, not "
            f"{list(scores.shape)} and {list(weights.shape)}"
        )
    weighted = weights[:, None, None] * scores.double()
    # Added one by one: the order within `Tensor.sum` may depend on an element's position, and the sums of equal samples
    # must be equal.
    combined = sum(weighted.unbind())  # [P, K]
    if combination == "sum":
        target, reference = combined.argmax(dim=1), combined.argmin(dim=1)
        return PairSelection(target, reference, combined.amax(dim=1) == combined.amin(dim=1))

    target_scores, reference_scores = weighted[..., :, None], weighted[..., None, :]  # [R, P, K, 1], [R, P, 1, K]
    dominates = (target_scores >= reference_scores).all(dim=0) & (target_scores > reference_scores).any(dim=0)
    difference = combined[:, :, None] - combined[:, None, :]
    best = difference.masked_fill(~dominates, -math.inf).flatten(1).argmax(dim=1)
    num_samples = scores.shape[2]
    return PairSelection(best // num_samples, best % num_samples, ~dominates.flatten(1).any(dim=1))


def score_metrics(names: list[str], weights: Tensor, scores: Tensor, selection: PairSelection) -> dict[str, float]:
    """Of the weighted reward, and of each if there are several: the mean, the standard deviation over all samples and
    within the samples of a prompt, and the gap, by how much the pairs' targets have more than their references.

    Args:
        weights: [R].
        scores: [R, P, K].
        selection: the pairs of all P prompts.
    """
    rows = {"reward": torch.einsum("r,rpk->pk", weights, scores)}
    if len(names) > 1:
        rows |= {f"reward/{name}": row for name, row in zip(names, scores)}
    values = {}
    for name, row in rows.items():
        target, reference = (row.gather(1, index[:, None]) for index in (selection.target, selection.reference))
        gaps = (target - reference)[~selection.tie]
        values |= {f"{name}_mean": row.mean(), f"{name}_std": row.std()}
        values |= {f"{name}_std_within_prompts": row.var(dim=1).mean().sqrt()}
        values |= {f"{name}_gap": gaps.mean()} if len(gaps) else {}
    return {name: value.item() for name, value in values.items()}
