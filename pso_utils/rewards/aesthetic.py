"""LAION's aesthetic score."""

import os
import re

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.rewards.clip import CLIP_MODEL, CLIPImages, check_clip
from pso_utils.rewards.registry import Reward, register_reward
from pso_utils.sources import check_exists, fetch_file, read_weights, split_source


AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"


def split_head(source: str) -> tuple[str, str | None, str]:
    """Splits `HEAD` or `HEAD,CLIP` into the head's folder or hub id, its file or None, and the CLIP model's source."""
    if os.path.isfile(os.path.expanduser(source)):  # a path may contain ","
        return *split_source(source), CLIP_MODEL
    head, _, clip_model = source.partition(",")
    return *split_source(head), os.path.expanduser(clip_model) or CLIP_MODEL


def check_aesthetic(source: str) -> None:
    location, filename, clip_model = split_head(source)
    if not filename:
        raise UserError(
            f"there is no file '{location}': pass --reward_model aesthetic=HEAD, or aesthetic=HEAD,CLIP, with HEAD the "
            f"weights of LAION's predictor (a local file or repo:file) and CLIP the model below it ({CLIP_MODEL})"
        )
    check_exists(location, "--reward_model")
    check_clip(clip_model)


class AestheticReward(CLIPImages):
    """LAION's aesthetic score, about 1 to 10: a head of linear layers, with nothing between them, on CLIP ViT-L/14's
    image embedding, normalised. One layer is the predictor of LAION-Aesthetics V1, five are V2's (its dropout is off).

    Args:
        state_dict: the head's `weight` and `bias`, or `layers.0.weight`, ...; the layers in the order of their numbers.
        model: hub id or folder of the CLIP model.
        cache_dir: as in `from_pretrained`.

    Raises:
        UserError: the layers don't make a number of an embedding of this model.
    """

    def __init__(self, state_dict: dict[str, Tensor], model: str, *, cache_dir: str | None = None):
        super().__init__(model, cache_dir=cache_dir)

        def numbers(name):
            return [int(number) for number in re.findall(r"\d+", name)]

        names = sorted((name for name in state_dict if name.endswith("weight")), key=numbers)
        self.layers = [
            [state_dict[name].float(), state_dict.get(name.removesuffix("weight") + "bias", torch.zeros(1)).float()]
            for name in names
        ]
        shapes = [tuple(weight.shape) for weight, _ in self.layers]
        widths = [self.model.config.projection_dim, *(shape[0] for shape in shapes)]
        if shapes != list(zip(widths[1:], widths)) or widths[-1] != 1 or not shapes:
            raise UserError(
                f"the head's layers {shapes} (outputs, inputs) don't make one number of this CLIP's embedding of "
                f"{widths[0]}: pass the head that was trained on it"
            )

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        values = F.normalize(self.embed_images(images), dim=-1)
        for weight, bias in self.layers:
            values = F.linear(values, weight.to(values), bias.to(values))
        return values.squeeze(-1)


@register_reward("aesthetic", default_model=AESTHETIC_HEAD, check_model=check_aesthetic)
def aesthetic(model: str, cache_dir: str | None) -> Reward:
    """LAION's aesthetic score: how much people like the image, whatever its prompt."""
    location, filename, clip_model = split_head(model)
    head = read_weights(fetch_file(location, filename, cache_dir))
    try:
        return AestheticReward(head, clip_model, cache_dir=cache_dir)
    except OSError as error:
        raise UserError(
            f"cannot load '{clip_model}': {first_line(error)}; pass a local copy by --reward_model "
            "aesthetic=HEAD,FOLDER"
        ) from error
