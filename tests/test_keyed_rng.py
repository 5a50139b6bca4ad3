"""Keyed draws: functions of the key alone, with the distribution that they claim."""

import hashlib

import numpy as np
import pytest
import torch

from pso_utils.keyed_rng import keyed_noise, keyed_permutation, keyed_uniform


KEYS = [(0, epoch, prompt, sample) for epoch in range(2) for prompt in range(3) for sample in range(2)]
SHAPES = [(), (3,), (5, 4, 8, 8)]


def formula(key, shape) -> torch.Tensor:
    """Today's draws. Whoever changes them changes every run that is resumed."""
    text = ",".join(str(part) for part in key)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_torchs_from_a_generator_seeded_by_the_keys_sha256(shape):
    assert torch.equal(keyed_noise(KEYS, shape), torch.stack([formula(key, shape) for key in KEYS]))


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_draws_are_the_distribution_function_of_the_noise(shape):
    expected = torch.special.ndtr(keyed_noise(KEYS, shape))
    assert torch.equal(keyed_uniform(KEYS, shape), expected) and expected.max() < 1


def test_permutation_is_the_order_of_the_noise():
    assert torch.equal(keyed_permutation((3, 1), 100), keyed_noise([(3, 1)], (100,))[0].argsort())


@pytest.mark.parametrize("function", [keyed_noise, keyed_uniform])
def test_a_draw_does_not_depend_on_its_batch(function):
    batch = function(KEYS, (5, 4, 8, 8))
    assert batch.shape == (12, 5, 4, 8, 8) and batch.dtype == torch.float32
    assert torch.equal(function(KEYS[7:9][::-1], (5, 4, 8, 8)), batch[7:9].flip(0))


def test_keys_may_be_numbers_of_numpy_and_torch():
    for key in (np.array(KEYS[3]), torch.tensor(KEYS[3]), [np.int32(part) for part in KEYS[3]]):
        assert torch.equal(keyed_noise([key], (4,)), keyed_noise([KEYS[3]], (4,)))


def test_every_part_of_a_key_counts():
    keys = [(1, 11), (11, 1), (1, 1, 1), (111,), (1, 1, 0), (1, 1), (-1, 1), (1, 11, 0)]
    assert len({tuple(noise.tolist()) for noise in keyed_noise(keys, (4,))}) == len(keys)
    assert not torch.equal(keyed_permutation((0, 1), 50), keyed_permutation((1, 0), 50))


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    keyed_noise(KEYS, (2,)), keyed_uniform(KEYS), keyed_permutation((0,), 5)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_no_keys_give_an_empty_batch():
    assert keyed_noise([], (4, 8, 8)).shape == (0, 4, 8, 8) and keyed_uniform([]).shape == (0,)


def test_noise_is_standard_normal_and_independent_between_keys():
    noise = keyed_noise([(1, index) for index in range(64)] + [(11, 0), (1, 1, 0)], (4096,))
    assert noise.mean().abs() < 0.01 and (noise.var() - 1).abs() < 0.01
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize("shape, count", [((), 20_000), ((20_000,), 1)])
def test_uniform_draws_are_uniform(shape, count):
    """Within a key and over keys: Kolmogorov's statistic at a level of 0.001."""
    draws = keyed_uniform([(7, index) for index in range(count)], shape).flatten().sort().values
    assert 0 <= draws[0] and draws[-1] < 1
    assert (draws - torch.arange(len(draws)) / len(draws)).abs().max() < 1.95 / len(draws) ** 0.5


def test_no_uniform_draw_is_one(monkeypatch):
    monkeypatch.setattr("pso_utils.keyed_rng.keyed_noise", lambda keys, shape: torch.tensor([-40.0, 0.0, 5.5, 40.0]))
    draws = keyed_uniform([(0,)], (4,)).tolist()
    assert draws[:2] == [0, 0.5] and draws[2] < 1 and draws[3] < 1


@pytest.mark.parametrize("length", (0, 1, 2, 1000))
def test_permutation_holds_every_index_once(length):
    order = keyed_permutation((1, length), length)
    assert order.dtype == torch.long and order.sort().values.tolist() == list(range(length))


def test_permutations_are_equally_likely():
    counts = torch.zeros(4, 4)
    for key in range(2000):
        counts[torch.arange(4), keyed_permutation((key,), 4)] += 1
    assert ((counts - 500).abs() < 5 * (2000 * 3 / 16) ** 0.5).all()
