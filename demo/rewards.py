"""Rewards of the demo's own: how close an image is to one artist's drawing of its prompt.

accelerate launch train_pso_online.py --reward demo.rewards:twemoji ...
"""

from functools import cache

import torch

from demo.recipe.common import STYLES, load_drawings
from pso_utils.data.images import pixels_of


@cache
def drawings_of(style: str) -> dict[str, torch.Tensor]:
    """Maps each caption to the drawings [D, 3, 32, 32] in [-1, 1] that it describes: one for "red panda animal",
    every animal's for "animal", all for the empty caption."""
    drawings = load_drawings()
    pixels = drawings.pixels[:, STYLES.index(style)]
    described = {caption: pixels[i : i + 1] for i, caption in enumerate(drawings.captions)}
    described |= {kind: pixels[drawings.of_class(kind)] for kind in set(drawings.classes)}
    return described | {"": pixels}


def likeness(style: str, images, prompts) -> torch.Tensor:
    """Minus the mean squared error, pixels in [-1, 1], to the closest of the artist's drawings of the prompt; [B]."""
    described = drawings_of(style)
    errors = [(described[prompt] - pixels_of(image)).square() for image, prompt in zip(images, prompts)]
    return torch.stack([-error.mean(dim=(1, 2, 3)).min() for error in errors])


def twemoji(images, prompts):
    return likeness("twemoji", images, prompts)


def fluent(images, prompts):
    return likeness("fluent", images, prompts)


def noto(images, prompts):
    return likeness("noto", images, prompts)
