"""Scores of all images: by rewards, by likeness to a subject, by fidelity to the data."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import free_memory
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.data.images import BrokenImage, decode_image, pixels_of, transform_pair
from pso_utils.data.pairs import Table
from pso_utils.data.readers import describe
from pso_utils.errors import UserError, first_line
from pso_utils.evaluate import fidelity
from pso_utils.evaluate.drawing import Images, batches_of
from pso_utils.evaluate.plan import SUBJECT_FLAGS, Plan
from pso_utils.families import Family
from pso_utils.rewards import CLIPImages, Rewards, RewardSpec, load_rewards


logger = get_logger(__name__)


class Measure(NamedTuple):
    name: str
    kind: str  # "reward", "subject" or "data"
    higher_is_better: bool


# The score of each image [rows, images], NaN where there is none.
Scores = dict[Measure, np.ndarray]

DATA_MEASURES = [Measure(name, "data", higher) for name, higher in fidelity.DATA_MEASURES.items()]


def score_all(
    plan: Plan, images: Images, accelerator: Accelerator, *, data_sharpness: float | None, **settings
) -> Scores:
    """The scores by every measure, on every process; all processes call it. `settings` are those of `load_reward`.

    Raises:
        UserError: a reward that fails on every image.
    """
    scores = {}
    for spec in plan.rewards:
        reward = load_reward(spec, plan.references, device=accelerator.device, **settings)
        measure = Measure(spec.name, "subject" if spec.name in SUBJECT_FLAGS else "reward", spec.weight > 0)
        scores[measure] = sum_over_processes(accelerator, score_images(plan, images, reward, accelerator))
        if np.isnan(scores[measure]).all():
            raise UserError(f"reward '{spec.name}' failed on every image; the warning above says how")
        del reward  # one reward model at a time
        free_memory()
    if plan.data is not None:
        for measure, values in measure_data(plan, images, accelerator, data_sharpness=data_sharpness).items():
            values = sum_over_processes(accelerator, values)
            if not np.isnan(values).all():  # no diversity among single images
                scores[measure] = values
    return scores


def sum_over_processes(accelerator: Accelerator, values: np.ndarray) -> np.ndarray:
    if accelerator.num_processes == 1:  # Apple's GPUs have no float64
        return values
    return accelerator.reduce(torch.from_numpy(values).to(accelerator.device), "sum").cpu().numpy()


# ---- By rewards ----


def load_reward(
    spec: RewardSpec, references: list[Image.Image], *, device, cache_dir: str | None, batch_size: int, dtype
) -> Rewards:
    """A reward of --reward, or one of the subject's."""
    if spec.name not in SUBJECT_FLAGS:
        return load_rewards([spec], device=device, cache_dir=cache_dir, batch_size=batch_size, dtype=dtype)
    embedder_class = {"CLIP-I": CLIPImages, "DINO": fidelity.VisionImages}[spec.name]
    try:
        embedder = embedder_class(os.path.expanduser(spec.model), cache_dir=cache_dir).to(dtype=dtype)
    except Exception as error:  # of transformers, the hub, the file's format: each library has its own
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"{SUBJECT_FLAGS[spec.name]} {spec.model} cannot be loaded ({message}): pass a local folder or a hub id"
        ) from error
    return Rewards([fidelity.ReferenceSimilarity(embedder, references)], [spec], batch_size=batch_size, device=device)


def score_images(plan: Plan, images: Images, reward: Rewards, accelerator: Accelerator) -> np.ndarray:
    """Scores [rows, images] of this process's images, 0 for the others'; NaN where the reward fails."""
    scores, failures = np.zeros((len(plan.rows), len(plan.samples))), []
    batches = list(batches_of(range(len(plan.samples)), reward.batch_size, accelerator))
    total, is_main = len(plan.rows) * sum(map(len, batches)), accelerator.is_local_main_process
    with tqdm(total=total, desc=f"scoring {reward.names[0]}", unit="image", disable=not is_main) as bar:
        for row, (model, setting) in enumerate(plan.rows):
            for indices in batches:
                samples = [plan.samples[index] for index in indices]
                batch = images.read(model, setting, samples), [sample.prompt for sample in samples]
                scores[row, list(indices)] = score_or_nan(reward, *batch, failures).numpy()
                bar.update(len(samples))
    if failures:
        error = failures[0]
        reason = "; ".join([first_line(error), *getattr(error, "__notes__", [])])
        message = f"{len(failures)} images were not scored: {reason}"
        exc_info = None if isinstance(error, UserError) else error
        logger.warning(message, exc_info=exc_info, main_process_only=False)
    return scores


def score_or_nan(reward: Rewards, images: list[Image.Image], prompts: list[str], failures: list[Exception]) -> Tensor:
    """Scores [B]; of a batch that fails, each image's own, NaN where that fails too: its exception is in `failures`."""
    try:
        return reward(images, prompts)[0]
    except Exception as error:  # whatever a reward raises of one image, the others are scored
        if len(images) == 1:
            failures.append(error.with_traceback(None) if failures else error)  # which would keep its images
            return torch.tensor([math.nan])
    scores = [score_or_nan(reward, [image], [prompt], failures) for image, prompt in zip(images, prompts)]
    return torch.cat(scores)


# ---- By the data ----


def data_pixels(data: Table, rows: Sequence[int], resolution: int) -> Iterator[Tensor]:
    """The data's images [3, H, W] in [-1, 1], in the middle, at the samples' size."""
    for row in rows:
        record = data.record(row)
        try:
            image = decode_image(record.target, data.folders)
        except BrokenImage as error:
            raise UserError(f"{describe(record.id)} of {data.name}, --image_column: {error}") from error
        yield transform_pair(image, None, resolution=resolution).target


def data_by_prompt(plan: Plan, accelerator: Accelerator, *, progress: str) -> Iterator[tuple[list[int], Callable]]:
    """For each of this process's prompts, the indices of its samples, and a function that reads its own images."""
    samples, rows = indices_by(plan.prompts), indices_by(plan.data.captions())
    resolution = plan.settings[0].deployment.height
    own = list(samples.items())[accelerator.process_index :: accelerator.num_processes]
    for prompt, indices in tqdm(own, desc=progress, unit="prompt", disable=not accelerator.is_local_main_process):
        yield indices, partial(data_pixels, plan.data, rows[prompt], resolution)


def indices_by(values: Sequence[str]) -> dict[str, list[int]]:
    """Each value -> where it is."""
    indices: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        indices.setdefault(value, []).append(index)
    return indices


@torch.no_grad()
def measure_data_sharpness(plan: Plan, family: Family, accelerator: Accelerator) -> float:
    """Sharpness of the VAE's reconstructions of the data, each prompt's weighing as much as its samples do; all
    processes call it."""
    total = np.zeros(1)
    for indices, read_data in data_by_prompt(plan, accelerator, progress="reconstructing the data"):
        decoded = (family.decode_latents(family.encode_images(pixels[None]))[0] for pixels in read_data())
        total += len(indices) * np.mean([fidelity.sharpness(pixels_of(image)).item() for image in decoded])
    return float(sum_over_processes(accelerator, total)[0]) / len(plan.samples)


def measure_data(plan: Plan, images: Images, accelerator: Accelerator, *, data_sharpness: float) -> Scores:
    """`DATA_MEASURES` of the samples of this process's prompts, 0 for the others'."""
    scores = {measure: np.zeros((len(plan.rows), len(plan.samples))) for measure in DATA_MEASURES}
    for indices, read_data in data_by_prompt(plan, accelerator, progress="comparing with the data"):
        samples = [plan.samples[index] for index in indices]
        for row, (model, setting) in enumerate(plan.rows):
            pixels = torch.stack([pixels_of(image) for image in images.read(model, setting, samples)])
            values = fidelity.data_fidelity(pixels, read_data(), data_sharpness=data_sharpness)
            for measure in DATA_MEASURES:
                scores[measure][row, indices] = values[measure.name].numpy()
    return scores
