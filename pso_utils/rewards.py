"""Rewards: what samples are scored by, and how scores become pairs.

A reward is a callable `(images: list of PIL images, prompts: list of str) -> float tensor [B]`. To add one, write a
factory that makes it and register that:

    @register_reward("darkness")
    def darkness(model, cache_dir):
        return lambda images, prompts: torch.tensor([-ImageStat.Stat(image.convert("L")).mean[0] for image in images])

One's own reward in a file of one's own needs no registration: `--reward my_module:my_function`.
"""

import difflib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


Reward = Callable[[list[Image.Image], list[str]], Tensor]

JPEG_QUALITY = 95  # as in DDPO (arXiv 2305.13301), whose compressibility rewards these are
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
COMBINATIONS = ("sum", "pareto")


class RewardError(ValueError):
    """A reward that cannot be made or that returned no scores. The message is one line for the user."""


class RewardSpec(NamedTuple):
    name: str
    weight: float  # its sign says which direction is better
    model: str | None  # hub id or local folder; None where the reward takes no model


class RegisteredReward(NamedTuple):
    factory: Callable[[str | None, str | None], Reward]
    default_model: str | None
    check_model: Callable[[str], None] | None
    check_source: Callable[[str], None] | None = None
    packages: tuple[str, ...] = ()


REWARDS: dict[str, RegisteredReward] = {}


def register_reward(
    name: str,
    default_model: str | None = None,
    check_model: Callable[[str], None] | None = None,
    check_source: Callable[[str], None] | None = None,
    packages: tuple[str, ...] = (),
) -> Callable:
    """Decorator that registers a factory `(model, cache_dir) -> reward` under `name`.

    Args:
        name: what `--reward` calls it.
        default_model: hub id or folder handed to the factory where `--reward_model` gives none. A reward without a
            default takes no model: its factory gets `None`.
        check_model: early check of a local model folder from its files alone; raises `ValueError`.
        check_source: early check of what `--reward_model` gives, for a model that is not just a folder or a hub id.
        packages: what must be installed beside this project's own requirements.

    What the factory returns may have `.to(device)` and `.to(dtype=dtype)`.
    """
    if name in REWARDS or "=" in name:
        raise ValueError(f"cannot register a reward as '{name}': the name is taken or contains '='")

    def decorator(factory):
        REWARDS[name] = RegisteredReward(factory, default_model, check_model, check_source, packages)
        return factory

    return decorator


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB version of a PIL image of any mode, transparent parts on white."""
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- CLIP: one implementation for every CLIP model of transformers ----


def check_clip_folder(folder: str) -> None:
    """Checks from its files alone that `folder` holds a `CLIPModel` with tokenizer and image processor.

    Raises:
        RewardError: naming the missing file, or the kind of model that it holds instead.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise RewardError(f"'{folder}' has no config.json: pass the folder of a CLIPModel saved by save_pretrained")
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RewardError(f"'{path / 'config.json'}' cannot be read as JSON: {_first_line(error)}") from error
    if model_type != "clip":
        raise RewardError(f"'{folder}' holds a model of type '{model_type}': pass one of type 'clip' (a CLIPModel)")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise RewardError(f"'{folder}' has no weights: pass a folder that holds model.safetensors")
    if not _has_processor(folder):
        raise RewardError(
            f"'{folder}' has no tokenizer (tokenizer.json) or no image processor (preprocessor_config.json): "
            "save the model's processor into the same folder"
        )


def _has_processor(model: str, cache_dir: str | None = None) -> bool:
    # Asked file by file: AutoTokenizer makes an empty tokenizer, without an error, where the files are missing.
    from transformers.utils import has_file

    def has(*names):
        return all(has_file(model, name, cache_dir=cache_dir) for name in names)

    has_tokenizer = has("tokenizer.json") or has("vocab.json", "merges.txt")
    return has_tokenizer and (has("preprocessor_config.json") or has("processor_config.json"))


def load_clip(model: str, cache_dir: str | None):
    """A frozen `CLIPModel` in float32; raises RewardError where the checkpoint lacks weights."""
    from transformers import CLIPModel  # not at the top: JPEG rewards and one's own do without

    clip, loading = CLIPModel.from_pretrained(model, cache_dir=cache_dir, output_loading_info=True)
    if loading["missing_keys"]:  # transformers would draw them at random
        raise RewardError(
            f"the weights in '{model}' lack {len(loading['missing_keys'])} tensors of a CLIPModel, such as "
            f"{min(loading['missing_keys'])}: pass a complete one"
        )
    return clip.float().eval().requires_grad_(False)


class CLIPImages:
    """A CLIP model's image embeddings [B, D], float32, not normalised."""

    def __init__(self, model: str, processor: str | None = None, cache_dir: str | None = None):
        from transformers import CLIPImageProcessorPil  # the Pil class, as CLIPImageProcessor needs torchvision

        self.image_processor = CLIPImageProcessorPil.from_pretrained(processor or model, cache_dir=cache_dir)
        self.model = load_clip(model, cache_dir)

    def to(self, device=None, dtype=None) -> "CLIPImages":
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        pixel_values = self.image_processor([to_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float()


class CLIPReward(CLIPImages):
    """Cosine similarity of an image's and its prompt's CLIP embeddings; the model is float32 unless `to` says else.

    Prompts are truncated at the text encoder's limit. Scores don't depend on the batch, up to float32 rounding.

    Args:
        model: hub id or folder of a `CLIPModel`.
        processor: hub id or folder of its tokenizer and image processor, `model` itself by default.
        cache_dir: as in `from_pretrained`.

    Raises:
        RewardError: weights are missing from the checkpoint, or the tokenizer doesn't belong to the model.
        OSError: transformers cannot find the files.
    """

    def __init__(self, model: str, processor: str | None = None, cache_dir: str | None = None):
        from transformers import AutoTokenizer

        super().__init__(model, processor, cache_dir)
        processor = processor or model
        self.tokenizer = AutoTokenizer.from_pretrained(processor, cache_dir=cache_dir)
        self.max_length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        self._check_end_of_text(processor)

    def _check_end_of_text(self, processor: str) -> None:
        # The text encoder reads its embedding where it finds the end-of-text token. With another tokenizer it finds
        # none and reads the first token, alike for all prompts, and scores mean nothing.
        input_ids = self._tokenize(["a", "a longer prompt"])["input_ids"]
        eos_token_id = self.model.config.text_config.eos_token_id
        # Configs from before transformers 4.31 have 2 there: the encoder then takes the largest id for the end.
        end = input_ids.max() if eos_token_id == 2 else eos_token_id
        first_end = (input_ids == end).int().argmax(dim=1, keepdim=True)
        if not (input_ids.gather(1, first_end) == self.tokenizer.eos_token_id).all():
            raise RewardError(
                f"the tokenizer in '{processor}' ends prompts with token {self.tokenizer.eos_token_id}, but the model "
                f"looks for {int(end)} (eos_token_id of its text_config): pass a model with its own tokenizer"
            )

    def _tokenize(self, prompts: list[str]):
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        device = self.model.device
        image_embeds = self.embed_images(images)

        unique_prompts = list(dict.fromkeys(prompts))  # the samples of one prompt share its embedding
        tokens = self._tokenize(unique_prompts).to(device)
        text_embeds = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()
        prompt_index = torch.tensor([unique_prompts.index(prompt) for prompt in prompts], device=device)
        return F.cosine_similarity(image_embeds, text_embeds[prompt_index], dim=-1)


@register_reward("clip", default_model="openai/clip-vit-large-patch14", check_model=check_clip_folder)
def clip(model: str, cache_dir: str | None) -> Reward:
    """CLIP score: how well the image fits its prompt."""
    return CLIPReward(model, cache_dir=cache_dir)


@register_reward("pickscore", default_model="yuvalkirstain/PickScore_v1", check_model=check_clip_folder)
def pickscore(model: str, cache_dir: str | None) -> Reward:
    """PickScore (arXiv 2305.01569): a CLIP ViT-H tuned on human preferences, without its logit scale of about 100."""
    processor = model if _has_processor(model, cache_dir) else PICKSCORE_PROCESSOR
    return CLIPReward(model, processor, cache_dir)


# ---- LAION's aesthetic score ----

AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"


def split_aesthetic_source(source: str) -> tuple[str, str]:
    """Splits `HEAD` or `HEAD,CLIP` into the head's and the CLIP model's source."""
    if os.path.isfile(os.path.expanduser(source)):  # a path may contain ","
        return source, AESTHETIC_CLIP
    head, _, clip_model = source.partition(",")
    return head, clip_model or AESTHETIC_CLIP


def check_aesthetic_source(source: str) -> None:
    head, clip_model = split_aesthetic_source(source)
    if not os.path.isfile(os.path.expanduser(head)) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?:[^:]+", head):
        raise RewardError(
            f"there is no file '{head}': pass --reward_model aesthetic=HEAD, or aesthetic=HEAD,CLIP, with HEAD the "
            f"weights of LAION's predictor (a local file or repo:file) and CLIP the model below it ({AESTHETIC_CLIP})"
        )
    if os.path.isdir(os.path.expanduser(clip_model)):
        check_clip_folder(os.path.expanduser(clip_model))


class AestheticReward(CLIPImages):
    """LAION's aesthetic score, about 1 to 10: a head of linear layers, with nothing between them, on CLIP ViT-L/14's
    image embedding, normalised. One layer is the predictor of LAION-Aesthetics V1, five are V2's (its dropout is off).

    Args:
        state_dict: the head's `weight` and `bias`, or `layers.0.weight`, ...; the layers in the order of their numbers.

    Raises:
        RewardError: the layers don't make a number of an embedding of this model.
    """

    def __init__(self, state_dict: dict[str, Tensor], model: str, cache_dir: str | None = None):
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
            raise RewardError(
                f"the head's layers {shapes} (outputs, inputs) don't make one number of this CLIP's embedding of "
                f"{widths[0]}: pass the head that was trained on it"
            )

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        values = F.normalize(self.embed_images(images), dim=-1)
        for weight, bias in self.layers:
            values = F.linear(values, weight.to(values), bias.to(values))
        return values.squeeze(-1)


@register_reward("aesthetic", default_model=AESTHETIC_HEAD, check_source=check_aesthetic_source)
def aesthetic(model: str, cache_dir: str | None) -> Reward:
    """LAION's aesthetic score: how much people like the image, whatever its prompt."""
    from pso_utils.sdxl import fetch_file, read_weights, split_source

    head, clip_model = split_aesthetic_source(model)
    path = fetch_file(*split_source(head), cache_dir)
    return AestheticReward(read_weights(head, path), os.path.expanduser(clip_model), cache_dir)


# ---- The scorers of the imscore package ----

IMSCORE = {  # class: its module in imscore, and its weights
    "CLIPAestheticScorer": ("aesthetic", "RE-N-Y/imreward-overall_rating-clip"),
    "CLIPPreferenceScorer": ("preference", "RE-N-Y/pickscore-clip"),
    "CLIPScore": ("preference", "RE-N-Y/clipscore-vit-large-patch14"),
    "CycleReward": ("cyclereward", "NagaSaiAbhinay/CycleReward-Combo"),
    "Dinov2AestheticScorer": ("aesthetic", "RE-N-Y/imreward-overall_rating-dinov2"),
    "EvalMuse": ("evalmuse", "RE-N-Y/evalmuse"),
    "HPSv2": ("hps", "RE-N-Y/hpsv21"),
    "HPSv3": ("hpsv3", "RE-N-Y/hpsv3"),
    "ImageReward": ("imreward", "RE-N-Y/ImageReward"),
    "LAIONAestheticScorer": ("aesthetic", "RE-N-Y/laion-aesthetic"),
    "MPS": ("mps", "RE-N-Y/mpsv1"),
    "PickScorer": ("pickscore", "RE-N-Y/pickscore"),
    "ShadowAesthetic": ("aesthetic", "RE-N-Y/aesthetic-shadow-v2"),
    "SiglipAestheticScorer": ("aesthetic", "RE-N-Y/imreward-overall_rating-siglip"),
    "SiglipPreferenceScorer": ("preference", "RE-N-Y/pickscore-siglip"),
    "VQAScore": ("vqascore", "RE-N-Y/clip-t5-xxl"),
}


class ImscoreReward:
    """A scorer of imscore: `score(pixels [B, 3, H, W] in [0, 1], prompts)` to logits [B] or [B, 1]."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.eval().requires_grad_(False)

    def to(self, device=None, dtype=None) -> "ImscoreReward":
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        if len({image.size for image in images}) > 1:  # no common tensor
            return torch.cat([self([image], [prompt]) for image, prompt in zip(images, prompts)])
        parameter = next(self.model.parameters())
        pixels = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images])).permute(0, 3, 1, 2)
        scores = self.model.score(pixels.to(parameter.device, parameter.dtype) / 255, prompts).float()
        return scores.reshape(len(images)) if scores.numel() == len(images) else scores


def imscore(name: str, model: str, cache_dir: str | None) -> Reward:
    """The scorer `imscore:NAME`."""
    scorer = getattr(importlib.import_module(f"imscore.{IMSCORE[name][0]}.model"), name)
    return ImscoreReward(scorer.from_pretrained(model, cache_dir=cache_dir))


for _name, (_, _weights) in IMSCORE.items():
    register_reward(f"imscore:{_name}", _weights, packages=("imscore", "torchvision"))(partial(imscore, _name))


# ---- JPEG size ----


def jpeg_size(image: Image.Image) -> float:
    """Size of the image as a JPEG, in kB (1,000 bytes)."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return len(buffer.getvalue()) / 1000


@register_reward("jpeg_compressibility")
def jpeg_compressibility(model: None, cache_dir: str | None) -> Reward:
    """Minus the JPEG's size in kB: prefers plain images."""
    return lambda images, prompts: -torch.tensor([jpeg_size(image) for image in images])


@register_reward("jpeg_incompressibility")
def jpeg_incompressibility(model: None, cache_dir: str | None) -> Reward:
    """The JPEG's size in kB: prefers images full of detail."""
    return lambda images, prompts: torch.tensor([jpeg_size(image) for image in images])


# ---- From the command line ----


def parse_rewards(specs: Sequence[str], reward_model: Sequence[str] | None = None) -> list[RewardSpec]:
    """Reads and checks `--reward` and `--reward_model` without loading a model.

    Only the modules of `module:function` rewards are imported; the current folder and the script's are searched after
    Python's own path.

    Args:
        specs: each `NAME` or `NAME=WEIGHT`; NAME is registered, or the `module:function` of a reward.
        reward_model: each `NAME=MODEL`, or `MODEL` alone where only one of the rewards takes a model. MODEL is a hub
            id or a local folder.

    Raises:
        RewardError: with one line that says what is wrong and what to pass instead.
    """
    weights: dict[str, float] = {}
    for spec in specs:
        name, separator, weight = (part.strip() for part in spec.partition("="))
        if name in weights:
            raise RewardError(f"reward '{name}' is given twice: pass it once, with one weight")
        if name not in REWARDS:
            if ":" not in name or name.startswith("imscore:"):
                raise RewardError(
                    f"unknown reward '{name}'{_did_you_mean(name, REWARDS)} Pass one of {_known_rewards()}, or "
                    "module:function for your own"
                )
            import_reward(name)
        else:
            _check_packages(name)
        weights[name] = _parse_weight(name, weight) if separator else 1.0
    if not weights:
        raise RewardError(f"no reward is given: pass --reward with one of {_known_rewards()}")

    models = _parse_models(reward_model or [], list(weights))
    return [RewardSpec(name, weight, models.get(name)) for name, weight in weights.items()]


def _known_rewards() -> str:
    return ", ".join([*sorted(name for name in REWARDS if ":" not in name), f"imscore:NAME ({', '.join(IMSCORE)})"])


def _check_packages(name: str) -> None:
    missing = [package for package in REWARDS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RewardError(
            f"reward '{name}' needs {' and '.join(missing)}, not installed here: run "
            f"`pip install {' '.join(REWARDS[name].packages)}`"
        )


def _parse_weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    weight = torch.tensor(weight, dtype=torch.float32).item()  # as `Rewards` keeps it
    if not math.isfinite(weight) or weight == 0:
        raise RewardError(
            f"weight '{text}' of reward '{name}' is not a finite number other than 0: pass, for instance, {name}=0.5"
        )
    return weight


def _parse_models(reward_model: Sequence[str], names: list[str]) -> dict[str, str]:
    models = {name: REWARDS[name].default_model for name in names if name in REWARDS}
    models = {name: model for name, model in models.items() if model is not None}
    given: dict[str, str] = {}
    for text in reward_model:
        name, separator, model = text.partition("=")
        if os.path.exists(os.path.expanduser(text)) or not separator:  # a path may contain "="
            if len(models) != 1:
                raise RewardError(
                    f"--reward_model '{text}': "
                    + (f"pass NAME=MODEL with NAME one of {', '.join(models)}" if models else _no_model(names))
                )
            name, model = next(iter(models)), text
        elif name not in models:
            raise RewardError(
                f"--reward_model '{text}': '{name}' is none of the rewards that take a model"
                f"{_did_you_mean(name, models)} "
                + (f"Pass NAME=MODEL with NAME one of {', '.join(models)}" if models else _no_model(names))
            )
        if name in given:
            raise RewardError(f"--reward_model gives reward '{name}' two models: pass one")
        given[name] = _check_model(name, model)
    for name in models.keys() - given.keys():
        models[name] = _check_model(name, models[name])
    return {**models, **given}


def _no_model(names: list[str]) -> str:
    return f"the rewards given ({', '.join(names)}) take no model, so drop --reward_model"


def _check_model(name: str, model: str) -> str:
    path = os.path.expanduser(model)
    if REWARDS[name].check_source is not None:
        try:
            REWARDS[name].check_source(model)
        except ValueError as error:
            raise RewardError(f"reward '{name}': {error}") from error
        return model
    if os.path.isdir(path):
        if REWARDS[name].check_model is not None:
            try:
                REWARDS[name].check_model(path)
            except ValueError as error:
                raise RewardError(f"reward '{name}': {error}") from error
        return path
    if os.path.isfile(path):
        raise RewardError(f"reward '{name}': its model '{model}' is a file; pass the folder that it lies in")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):  # what the hub takes for an id
        raise RewardError(f"reward '{name}': there is no folder '{model}'; pass a local folder or a hub id")
    return model


def _did_you_mean(name: str, known) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean '{matches[0]}'?" if matches else "."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def import_reward(name: str) -> Reward:
    """Imports the user's own reward, `module:function`, a callable `(images, prompts)`.

    Raises:
        RewardError: the name is malformed, the module is missing, fails while it is imported or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    parts = module_name.split(".")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in parts) or parts[-1] == "py":
        raise RewardError(
            f"reward '{name}' is not module:function: pass, for instance, my_reward:score for the function score in "
            "my_reward.py (the module's name, without folders and .py)"
        )
    script = getattr(sys.modules["__main__"], "__file__", None)
    folders = [os.path.dirname(os.path.abspath(script))] if script else []
    for folder in [*folders, os.getcwd()]:
        # At the end: a file there, named as an installed package, must not take that package's place.
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failure(name, module_name, error) from error
        raise RewardError(
            f"reward '{name}': there is no module '{module_name}' in the current folder, the script's or Python's "
            f"path: put {module_name.replace('.', '/')}.py into one of them"
        ) from error
    except (Exception, SystemExit) as error:  # a module without a main guard may exit
        raise _import_failure(name, module_name, error) from error
    where = getattr(module, "__file__", None) or module_name
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise RewardError(
            f"reward '{name}': {where} has no '{attribute}'{_did_you_mean(attribute, own)} "
            f"It defines {', '.join(own) or 'no function'}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(
            f"reward '{name}': '{attribute}' in {where} is a {type(function).__name__}, not a function: pass one that "
            "takes (images, prompts)"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return function
    try:
        signature.bind([], [])
    except TypeError as error:
        raise RewardError(
            f"reward '{name}': {attribute}{signature} in {where} must take (images, prompts): {error}"
        ) from error
    return function


def _import_failure(name: str, module_name: str, error: BaseException) -> RewardError:
    return RewardError(f"reward '{name}': importing {module_name} failed: {type(error).__name__}: {_first_line(error)}")


# ---- Scoring ----


class Rewards:
    """Scores samples by several rewards.

    Args:
        rewards: the callables.
        specs: their names and weights, in the same order.
        batch_size: how many images a reward is given at once.
    """

    def __init__(self, rewards: Sequence[Reward], specs: Sequence[RewardSpec], batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"the reward's batch size must be at least 1, not {batch_size}")
        self.rewards = list(rewards)
        self.names = [spec.name for spec in specs]
        self.weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float32)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores `[R, B]`, float32 on the CPU: row r is reward r of each image, its weight not applied.

        Raises:
            RewardError: a reward raised, or returned something else than B finite numbers.
        """
        images, prompts = list(images), list(prompts)
        if len(images) != len(prompts):
            raise ValueError(f"each image needs its prompt: got {len(images)} images and {len(prompts)} prompts")
        scores = torch.zeros(len(self.rewards), len(images))
        for index, (name, reward) in enumerate(zip(self.names, self.rewards)):
            for start in range(0, len(images), self.batch_size):
                batch = slice(start, start + self.batch_size)
                scores[index, batch] = _score(name, reward, images[batch], prompts[batch])
        return scores

    def to(self, device) -> "Rewards":
        """Moves the rewards that have a model (`.to`)."""
        for reward in self.rewards:
            if hasattr(reward, "to"):
                reward.to(device)
        return self


def _score(name: str, reward: Reward, images: list[Image.Image], prompts: list[str]) -> Tensor:
    wanted = f"it should return one finite number for each image, here a float tensor of shape [{len(images)}]"
    try:
        result = reward(images, prompts)
    except torch.OutOfMemoryError:
        raise  # no fault of the reward's
    except Exception as error:
        inner = error.__traceback__.tb_next  # the reward's own frame; None if the call itself failed
        where = f" ({os.path.basename(inner.tb_frame.f_code.co_filename)}:{inner.tb_lineno})" if inner else ""
        raise RewardError(
            f"reward '{name}' raised {type(error).__name__}: {_first_line(error)}{where}; {wanted}"
        ) from error
    try:
        scores = torch.as_tensor(result)
        if scores.is_complex():
            raise TypeError("complex numbers")
        scores = scores.detach().to("cpu", torch.float32)
    except Exception as error:
        raise RewardError(f"reward '{name}' returned {_describe(result)}; {wanted}") from error
    if scores.shape != (len(images),):
        raise RewardError(f"reward '{name}' returned shape {list(scores.shape)}; {wanted}")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward '{name}' returned {scores[bad[0]].item()} for the prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(images)} scores are not finite); {wanted}"
        )
    return scores


def _describe(result) -> str:
    if isinstance(result, (list, tuple)) and result:
        return f"a {type(result).__name__} of {', '.join(sorted({type(item).__name__ for item in result}))}"
    return "None" if result is None else f"a {type(result).__name__}"


def load_rewards(
    specs: Sequence[RewardSpec],
    device="cpu",
    cache_dir: str | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> Rewards:
    """Loads the rewards that `parse_rewards` has checked, and moves them to `device`; those with a model to `dtype`,
    if it is given. Scores are float32 all the same.

    Raises:
        RewardError: a model cannot be loaded.
    """
    rewards = []
    for spec in specs:
        if spec.name not in REWARDS:
            rewards.append(import_reward(spec.name))
            continue
        try:
            reward = REWARDS[spec.name].factory(spec.model, cache_dir)
        except RewardError as error:
            raise RewardError(f"reward '{spec.name}': {error}") from error
        except Exception as error:
            what = f"cannot load '{spec.model}'" if spec.model else "cannot be made"
            hint = f"; pass a local copy by --reward_model {spec.name}=FOLDER" if spec.model else ""
            raise RewardError(
                f"reward '{spec.name}': {what}: {type(error).__name__}: {_first_line(error)}{hint}"
            ) from error
        if dtype is not None and hasattr(reward, "to"):
            reward.to(dtype=dtype)
        rewards.append(reward)
    return Rewards(rewards, specs, batch_size).to(device)


# ---- From scores to pairs ----


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


def select_pairs(scores: Tensor, weights: Tensor, combination: str = "sum") -> PairSelection:
    """Picks a target and a reference among the K samples of each of P prompts.

    - `sum`: best against worst by the weighted sum of the rewards; a tie where these are equal.
    - `pareto`: target i and reference j where i is at least as good as j in every reward and better in one, the sign
      of a reward's weight saying which direction is better. Of several such pairs, the one whose weighted sums differ
      most; a tie where there is none.

    Equal candidates are decided by the lowest index (target first), so the choice is deterministic.

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
    # Added up one by one: a reduction's order may depend on an element's place, and equal samples must be equal.
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
