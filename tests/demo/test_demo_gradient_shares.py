"""The gradient's shares against what the weightings say."""

import re

import pytest

from demo import gradient_shares
from pso_utils.mdp import forward_weights
from pso_utils.schedules import make_schedule


def printed_shares(text: str) -> dict[str, dict[int, float]]:
    lines = dict(re.findall(r"^(\w+): (.*at.*)$", text, re.MULTILINE))
    values = {weighting: re.findall(r"([\d.]+) at (\d+)", line) for weighting, line in lines.items()}
    return {name: {int(timestep): float(share) for share, timestep in pairs} for name, pairs in values.items()}


def test_shares_of_a_fresh_lora_differ_between_weightings_by_the_weights_alone(capsys):
    """Its gains are 0, so the loss is half of beta times the weighted difference of the errors, whose gradients are the
    same under every weighting."""
    gradient_shares.main(["--num_pairs", "8"])
    shares = printed_shares(capsys.readouterr().out)
    assert list(shares["x0"]) == [999, 749, 499, 249] and list(shares["mdp"]) == [999, 749, 499]
    schedule = make_schedule(gradient_shares.load_model().pipeline.scheduler, 4, stochastic=False)
    for weighting, own in shares.items():
        assert sum(own.values()) == pytest.approx(1, abs=0.002)
        expected = [shares["x0"][t] * w.item() for t, w in zip(own, forward_weights(schedule, weighting))]
        assert list(own.values()) == pytest.approx([value / sum(expected) for value in expected], abs=0.03)


@pytest.mark.parametrize("task", ["style", "concept"])
def test_every_task_has_shares(task, capsys):
    gradient_shares.main(["--num_pairs", "2", "--task", task])
    assert printed_shares(capsys.readouterr().out).keys() == {"epsilon", "x0", "mdp"}
