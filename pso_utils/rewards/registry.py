"""The rewards that `--reward` knows, the user's own, and scoring by several of them."""

import difflib
import importlib
import inspect
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.sources import check_exists


logger = logging.getLogger(__name__)

SLOW_SECONDS = 60  # after which a call of a reward is worth a line in the log

Reward = Callable[[list[Image.Image], list[str]], Tensor]


class RewardSpec(NamedTuple):
    name: str
    weight: float  # its sign says which direction is better
    model: str | None  # what `--reward_model` gives, or the default; None where the reward takes no model


class RegisteredReward(NamedTuple):
    factory: Callable[[str | None, str | None], Reward]
    default_model: str | None
    check_model: Callable[[str], None]


REWARDS: dict[str, RegisteredReward] = {}


def check_folder_or_hub_id(model: str) -> None:
    """Raises UserError for a file, and for what is neither a local folder nor the form of a hub id."""
    if os.path.isfile(os.path.expanduser(model)):
        raise UserError(f"its model '{model}' is a file; pass the folder that it lies in")
    check_exists(model, "--reward_model")


def register_reward(
    name: str, *, default_model: str | None = None, check_model: Callable[[str], None] = check_folder_or_hub_id
) -> Callable:
    """Decorator that registers a factory `(model, cache_dir) -> reward` under `name`.

    Args:
        name: what `--reward` calls it.
        default_model: what the factory gets where `--reward_model` gives none. A reward without a default takes no
            model: its factory gets `None`.
        check_model: checks a model's source before anything is loaded, from local files alone; raises `UserError`.

    What the factory returns may have `.to(device)` and `.to(dtype=dtype)`.
    """
    if name in REWARDS or "=" in name:
        raise ValueError(f"cannot register a reward as '{name}': the name is taken or contains '='")

    def decorator(factory):
        REWARDS[name] = RegisteredReward(factory, default_model, check_model)
        return factory

    return decorator


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
        UserError: with one line that says what is wrong and what to pass instead. What a user's module raises while it
            is imported is not caught.
    """
    known = ", ".join(sorted(REWARDS))
    weights: dict[str, float] = {}
    for spec in specs:
        name, separator, weight = (part.strip() for part in spec.partition("="))
        if name in weights:
            raise UserError(f"reward '{name}' is given twice: pass it once, with one weight")
        if name not in REWARDS:
            if ":" not in name:
                raise UserError(
                    f"unknown reward '{name}'{_did_you_mean(name, REWARDS)}; pass one of {known}, or module:function "
                    "for your own"
                )
            import_reward(name)
        weights[name] = _parse_weight(name, weight) if separator else 1.0
    if not weights:
        raise UserError(f"no reward is given: pass --reward with one of {known}")

    models = _parse_models(reward_model or [], list(weights))
    return [RewardSpec(name, weight, models.get(name)) for name, weight in weights.items()]


def _parse_weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    weight = torch.tensor(weight, dtype=torch.float32).item()  # as `Rewards` keeps it
    if not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"weight '{text}' of reward '{name}' is not a finite number other than 0: pass, for instance, {name}=0.5"
        )
    return weight


def _parse_models(reward_model: Sequence[str], names: list[str]) -> dict[str, str]:
    """The model of each reward that takes one."""
    models = {name: REWARDS[name].default_model for name in names if name in REWARDS}
    models = {name: model for name, model in models.items() if model is not None}
    if models:
        advice = f"pass NAME=MODEL with NAME one of {', '.join(models)}"
    else:
        advice = f"the rewards given ({', '.join(names)}) take no model, so drop --reward_model"
    given: dict[str, str] = {}
    for text in reward_model:
        name, separator, model = text.partition("=")
        if os.path.exists(os.path.expanduser(text)) or not separator:  # a path may contain "="
            if len(models) != 1:
                raise UserError(f"--reward_model '{text}': {advice}")
            name, model = next(iter(models)), text
        elif name not in models:
            raise UserError(
                f"--reward_model '{text}': '{name}' is none of the rewards that take a model"
                f"{_did_you_mean(name, models)}; {advice}"
            )
        if name in given:
            raise UserError(f"--reward_model gives reward '{name}' two models: pass one")
        given[name] = model
    models = {name: os.path.expanduser(model) for name, model in (models | given).items()}
    for name, model in models.items():
        try:
            REWARDS[name].check_model(model)
        except UserError as error:
            raise UserError(f"reward '{name}': {error}") from error
    return models


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def import_reward(name: str) -> Reward:
    """Imports the user's own reward, `module:function`, a callable `(images, prompts)`.

    Raises:
        UserError: the name is malformed, or there is no such module or no such callable in it. What the module itself
            raises is not caught, except that it ends the program.
    """
    module_name, _, attribute = name.partition(":")
    parts = module_name.split(".")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in parts) or parts[-1] == "py":
        raise UserError(
            f"reward '{name}' is not module:function: pass, for instance, my_reward:score for the function score in "
            "my_reward.py (the module's name, without folders and .py)"
        )
    script = getattr(sys.modules["__main__"], "__file__", None)
    folders = [os.path.dirname(os.path.abspath(script))] if script else []
    for folder in [*folders, os.getcwd()]:
        # Appended, so that a file with the name of an installed package does not take that package's place.
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # another module, which this one imports
        raise UserError(
            f"reward '{name}': there is no module '{module_name}' in the current folder, the script's or Python's "
            f"path: put {module_name.replace('.', '/')}.py into one of them"
        ) from error
    except SystemExit as error:  # it would end the program without a word
        raise UserError(
            f"reward '{name}': importing {module_name} ends the program (SystemExit: {error}); put what it does as a "
            'script under `if __name__ == "__main__":`'
        ) from error
    file = getattr(module, "__file__", None) or module_name
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(
            f"reward '{name}': {file} has no '{attribute}'{_did_you_mean(attribute, own)}; it defines "
            f"{', '.join(own) or 'no function'}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(
            f"reward '{name}': '{attribute}' in {file} is a {type(function).__name__}, not a function: pass one that "
            "takes (images, prompts)"
        )
    try:
        inspect.signature(function).bind([], [])
    except ValueError:  # some callables written in C have no signature
        pass
    except TypeError as error:
        raise UserError(
            f"reward '{name}': {attribute}{inspect.signature(function)} in {file} must take (images, prompts): {error}"
        ) from error
    return function


# ---- Scoring ----


class Rewards:
    """Scores samples by several rewards.

    Args:
        rewards: the callables.
        specs: their names and weights, in the same order.
        batch_size: how many images a reward is given at once.
        device: where those with a model (`.to`) score.
        offload: whether they are on the CPU except within `loaded`.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        specs: Sequence[RewardSpec],
        *,
        batch_size: int = 8,
        device="cpu",
        offload: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"the reward's batch size must be at least 1, not {batch_size}")
        self.rewards = list(rewards)
        self.names = [spec.name for spec in specs]
        self.weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float32)
        self.batch_size, self.device, self.offload = batch_size, device, offload
        self.to("cpu" if offload else device)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within this, the rewards are where they score."""
        try:
            if self.offload:
                self.to(self.device)
            yield
        finally:
            if self.offload:
                self.to("cpu")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores `[R, B]`, float32 on the CPU: row r is reward r of each RGB image, its weight not applied.

        Raises:
            UserError: a reward returned something else than B finite numbers, or ends the program. What else it raises
                is not caught; a note on the exception says which reward it was.
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
        with _said_when_slow(f"reward '{name}' has been scoring {len(images)} images for over {SLOW_SECONDS} seconds"):
            result = reward([image.copy() for image in images], prompts)  # it may draw on them
    except SystemExit as error:  # of 0 would pass for a good end
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"reward '{name}' ends the program (SystemExit: {error.code}, {place.filename}, line {place.lineno}); raise"
            " another exception there, or return a score"
        ) from error
    except Exception as error:  # of any kind: it is raised again as it is, with a note
        error.add_note(f"reward '{name}' raised this; {wanted}")
        raise
    try:
        scores = torch.as_tensor(result)
        if scores.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"reward '{name}' returned {_describe(result)}; {wanted}") from error
    scores = scores.detach().to("cpu", torch.float32)
    if scores.shape != (len(images),):
        raise UserError(f"reward '{name}' returned shape {list(scores.shape)}; {wanted}")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"reward '{name}' returned {scores[bad[0]].item()} for the prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(images)} scores are not finite); {wanted}"
        )
    return scores


@contextmanager
def _said_when_slow(message: str) -> Iterator[None]:
    """Warns while what is done within this goes on, so that a reward that hangs does not do so in silence."""
    timer = threading.Timer(SLOW_SECONDS, logger.warning, [message])
    timer.daemon = True  # does not outlive the program
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _describe(result) -> str:
    if isinstance(result, (list, tuple)) and result:
        return f"a {type(result).__name__} of {', '.join(sorted({type(item).__name__ for item in result}))}"
    return "None" if result is None else f"a {type(result).__name__}"


def load_rewards(
    specs: Sequence[RewardSpec],
    *,
    device="cpu",
    offload: bool = False,
    cache_dir: str | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
) -> Rewards:
    """Loads the rewards that `parse_rewards` has checked; those with a model in `dtype`, if it is given. Scores are
    float32 all the same. `device`, `offload` and `batch_size` are `Rewards`'.

    Raises:
        UserError: a model is not to be had, or is none that the reward can use.
    """
    rewards = []
    for spec in specs:
        if spec.name not in REWARDS:
            rewards.append(import_reward(spec.name))
            continue
        try:
            reward = REWARDS[spec.name].factory(spec.model, cache_dir)
        except UserError as error:
            raise UserError(f"reward '{spec.name}': {error}") from error
        except OSError as error:  # how transformers and the hub say that there is no such model
            if spec.model is None:
                raise
            raise UserError(
                f"reward '{spec.name}': cannot load '{spec.model}': {first_line(error)}; pass a local copy by "
                f"--reward_model {spec.name}=FOLDER"
            ) from error
        if dtype is not None and hasattr(reward, "to"):
            reward.to(dtype=dtype)
        rewards.append(reward)
    return Rewards(rewards, specs, batch_size=batch_size, device=device, offload=offload)
