"""Fidelity against plain loops."""

import numpy as np
import pytest
import torch

from pso_utils.evaluate import fidelity


def test_data_fidelity_equals_plain_loops():
    generator = torch.Generator().manual_seed(0)
    samples, data = (torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1 for count in (4, 3))
    measured = fidelity.data_fidelity(samples, iter(data), data_sharpness=0.25)
    assert measured.keys() == fidelity.DATA_MEASURES.keys()
    nearest = [min(((sample - image) ** 2).mean().item() for image in data) for sample in samples]
    torch.testing.assert_close(measured["data distance"], torch.tensor(nearest))
    others = [np.mean([((samples[i] - samples[j]) ** 2).mean().item() for j in range(4) if j != i]) for i in range(4)]
    torch.testing.assert_close(measured["diversity"], torch.tensor(others, dtype=torch.float32))
    torch.testing.assert_close(measured["sharpness"], fidelity.sharpness(samples) / 0.25)
    assert fidelity.data_fidelity(samples[:1], data, data_sharpness=1.0)["diversity"].isnan().all()


def test_sharpness_equals_a_plain_loop():
    pixels = torch.rand(4, 3, 6, 5) * 2 - 1
    first = pixels[0]
    values = [
        abs(4 * first[c, y, x] - first[c, y - 1, x] - first[c, y + 1, x] - first[c, y, x - 1] - first[c, y, x + 1])
        for c in range(3)
        for y in range(1, 5)
        for x in range(1, 4)
    ]
    assert fidelity.sharpness(pixels)[0].item() == pytest.approx(np.mean(values), rel=1e-5)
