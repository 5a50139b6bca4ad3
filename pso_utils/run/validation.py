"""Validation images: what the pipeline itself draws at deployment, on fixed prompts and noise."""

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.families import Conditioning, Deployment, Family
from pso_utils.rewards import Rewards, statistics
from pso_utils.run.checkpoints import TrainingState
from pso_utils.run.grids import before_and_after, image_grid


logger = logging.getLogger(__name__)


class Validation:
    """Draws the validation prompts with the deployed pipeline, scores and logs the images.

    Image i of every prompt is drawn from the noise of seed + i, always. The images are divided among the processes;
    every method must be called by all of them.

    Args:
        embed: prompts -> a conditioning each.
        prompts: what is drawn.
        deployment: how.
        batch_size: images drawn at once.
        rewards: without any, nothing is scored.
        log: (step, values), to the trackers and the metrics.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        family: Family,
        embed: Callable[[Sequence[str]], list[Conditioning]],
        *,
        prompts: Sequence[str],
        deployment: Deployment,
        batch_size: int,
        rewards: Rewards,
        log: Callable[[int, dict], None],
    ):
        self.num_images, self.seed, self.output_dir = args.num_validation_images, args.seed, Path(args.output_dir)
        self.accelerator, self.family, self.embed = accelerator, family, embed
        self.interval = args.validation_steps
        self.prompts, self.deployment, self.batch_size = list(prompts), deployment, batch_size
        self.rewards, self.log = rewards, log
        self.before = self.after = None  # images of step 0, and the latest
        self.values = {}  # the latest images' scores

    def is_due(self, state: TrainingState) -> bool:
        """Whether a multiple of --validation_steps was reached or passed since the last one, by this run or the one
        that it goes on with: at the start, too."""
        return state.global_step // self.interval > state.validated_step // self.interval

    def draw(self) -> tuple[list[Image.Image], Tensor]:
        """The images, prompt by prompt, and their scores [R, B], on every process.

        Raises:
            Exception: of any kind, where one process fails; all of them do then.
        """
        total, problem = len(self.prompts) * self.num_images, None
        try:
            pixels, scores = self._draw_part(total)
        except Exception as error:  # raised again below, where the other processes do not wait for this one any more
            problem = error
        has_failed = torch.tensor(float(problem is not None), device=self.accelerator.device)
        has_failed = self.accelerator.reduce(has_failed, "sum") > 0
        if problem is not None:
            raise problem
        if has_failed:
            raise UserError("another process failed in it, see its message")
        pixels, scores = self.accelerator.gather(tuple(t.to(self.accelerator.device) for t in (pixels, scores)))
        return [Image.fromarray(image) for image in pixels[:total].cpu().numpy()], scores[:total].T.cpu()

    @torch.no_grad()
    def _draw_part(self, total: int) -> tuple[Tensor, Tensor]:
        """This process's pixels [B, H, W, 3] and scores [B, R] of all `total` images. Every process draws the same
        number, the last ones repeating the last image, so that they can be gathered."""
        per_rank = math.ceil(total / self.accelerator.num_processes)
        first = self.accelerator.process_index * per_rank
        indices = [min(index, total - 1) for index in range(first, first + per_rank)]
        prompts = [self.prompts[index // self.num_images] for index in indices]
        seeds = [self.seed + index % self.num_images for index in indices]

        conditioning = self.family.collate(self.embed(prompts), self.deployment.height, self.deployment.width)
        latents = self.family.draw_latents(conditioning, seeds, deployment=self.deployment, batch_size=self.batch_size)
        images = self.family.decode_latents(latents)
        with self.rewards.loaded():
            scores = self.rewards(images, prompts).T.contiguous()  # [B, R]: gather concatenates the first dimension
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return pixels, scores

    def __call__(self, state: TrainingState):
        """Draws and logs, unless it was done at this step already (by the run that this one goes on with). What fails
        in it is a warning once something is learnt, for training is worth more than its pictures; before that it ends
        the run, whose user can still mend it."""
        step = state.global_step
        if self.num_images == 0 or state.validated_step == step:
            return
        state.validated_step, self.after, self.values = step, None, {}
        try:
            self._validate(step)
        except Exception as error:  # a reward's, the disk's, a bug's: each has its own
            if step == 0:
                raise
            logger.warning(f"the validation at step {step} failed, the run goes on: {first_line(error)}", exc_info=True)

    def _validate(self, step: int):
        self.after, scores = self.draw()
        if step == 0:
            self.before = self.after
        if self.rewards.names:
            self.values = summarize_scores(self.rewards, scores, self.num_images)
            self.log(step, self.values)
        if self.accelerator.is_main_process:
            grid = image_grid(self.after, self.num_images)
            (self.output_dir / "validation").mkdir(exist_ok=True)
            grid.save(self.output_dir / "validation" / f"step-{step:06d}.png")
            log_grid(self.accelerator, grid, step, " | ".join(self.prompts))

    def save_before_and_after(self, state: TrainingState) -> list[tuple[str, str]]:
        """Writes before_after.png; returns (caption, file name) of it for the model card, nothing where it fails, which
        is a warning.

        What this process has not drawn itself, because it resumed, is drawn now; before is the model without LoRA.
        """
        if self.num_images == 0:
            return []
        try:
            if self.before is None:
                with self.family.without_lora():
                    self.before, _ = self.draw()
            if self.after is None or state.validated_step != state.global_step:
                self.after, _ = self.draw()
            if self.accelerator.is_main_process:
                picture = before_and_after(self.before, self.after, self.prompts, self.num_images)
                picture.save(self.output_dir / "before_after.png")
        except Exception as error:  # as above: the LoRA is saved
            logger.warning(f"before_after.png cannot be drawn: {first_line(error)}", exc_info=True)
            return []
        return [("before and after", "before_after.png")]


def summarize_scores(rewards: Rewards, scores: Tensor, num_images: int) -> dict[str, float]:
    """Mean and standard error of the weighted sum of the rewards, and of each where there are several: over prompts, as
    in the evaluation's tables, or where there is only one, over its images.

    Args:
        scores: [R, B], `num_images` of each prompt after each other.
    """
    rows = {"validation/reward": (rewards.weights[:, None] * scores).sum(dim=0)}
    if len(rewards.names) > 1:
        rows |= {f"validation/{name}": row for name, row in zip(rewards.names, scores)}
    images = np.arange(scores.shape[1])
    prompts = images // num_images if len(images) > num_images else images
    values = {}
    for name, row in rows.items():
        summary = statistics.summarize(row.double().numpy(), prompts)
        values[f"{name}_mean"] = summary["mean"]
        if math.isfinite(summary["standard_error"]):
            values[f"{name}_standard_error"] = summary["standard_error"]
    return values


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int, caption: str):
    """Sends a grid of images to the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(grid, caption=caption)}, step=step)
