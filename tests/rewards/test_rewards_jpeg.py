"""JPEG rewards against PIL's own files."""

import io
import os

import numpy as np
import torch
from PIL import Image
from reward_inputs import make_images

from pso_utils.rewards import load_rewards, parse_rewards


def test_jpeg_rewards_are_the_size_of_the_file_and_its_negative(tmp_path):
    images = make_images(3, size=(64, 64)) + make_images(1, seed=5)
    sizes = []
    for image in images:
        image.save(tmp_path / "image.jpg", quality=95)
        sizes.append(os.path.getsize(tmp_path / "image.jpg") / 1000)
    scores = load_rewards(parse_rewards(["jpeg_incompressibility", "jpeg_compressibility=0.1"]))(images, [""] * 4)
    torch.testing.assert_close(scores, torch.tensor([sizes, [-size for size in sizes]]))
    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(buffer, format="JPEG", quality=95)
    rewards = load_rewards(parse_rewards(["jpeg_compressibility"]))
    plain, detailed = rewards([Image.new("RGB", (64, 64), "red"), noise], ["", ""])[0]
    assert plain > detailed
