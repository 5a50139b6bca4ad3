"""A reward of the demo's own: how close an image is to one artist's drawing of its prompt.

accelerate launch train_pso_online.py --reward demo.rewards:twemoji ...
"""

from functools import cache

import numpy as np
import torch

from demo.recipe.common import STYLES, load_drawings


@cache
def drawings_of(style: str) -> dict[str, torch.Tensor]:
    """Maps each caption to the drawings [D, 3, 32, 32] in [-1, 1] that it describes: one for "red panda animal",
    every animal's for "animal", all for the empty caption."""
    drawings = load_drawings()
    pixels = drawings.pixels[:, STYLES.index(style)]
    described = {caption: pixels[i : i + 1] for i, caption in enumerate(drawings.captions)}
    described |= {kind: pixels[drawings.of_class(kind)] for kind in set(drawings.classes)}
    return described | {"": pixels}


def twemoji(images, prompts):
    """Minus the mean squared error, pixels in [-1, 1], to the closest of Twemoji's drawings of the prompt; [B]."""
    described = drawings_of("twemoji")
    rewards = []
    for image, prompt in zip(images, prompts):
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        rewards.append(-(described[prompt] - pixels).square().mean(dim=(1, 2, 3)).min())
    return torch.stack(rewards)
