"""Validation images: what the pipeline itself draws at deployment, on fixed prompts and noise."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pso_utils import score_statistics
from pso_utils.sdxl import lora_disabled


def deployment_pipeline(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """A pipeline over the same UNet, VAE and scheduler that takes prompt embeddings alone: text encoders, which may be
    offloaded, don't decide where it runs."""
    deployment = StableDiffusionXLPipeline(
        vae=pipeline.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        add_watermarker=False,
    )
    deployment.set_progress_bar_config(disable=True)
    return deployment


def draw_latents(
    pipeline: StableDiffusionXLPipeline,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    seeds: Sequence[int],
    batch_size: int,
    **settings,
) -> Tensor:
    """Latents [B, C, H, W] that the pipeline draws for B prompts, image i from a CPU generator seeded by `seeds[i]`.

    `settings` are the pipeline's own arguments: num_inference_steps, timesteps, eta, guidance_scale, height, width.
    """
    latents = []
    for start in range(0, len(seeds), batch_size):
        batch = slice(start, start + batch_size)
        latents += pipeline(
            prompt_embeds=prompt_embeds[batch],
            pooled_prompt_embeds=pooled_prompt_embeds[batch],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            output_type="latent",
            **settings,
        ).images
    return torch.stack(latents)


def pipeline_settings(settings: dict, resolution: int) -> dict:
    """The pipeline's arguments for a deployment's settings (`training.deployment_settings` and guidance_scale)."""
    return {**settings, "eta": settings["eta"] or 0.0, "height": resolution, "width": resolution}


class Validation:
    """Draws the validation prompts with the deployed pipeline, scores and logs the images.

    Image i of every prompt is drawn from the noise of seed + i, always. The images are shared out to the processes;
    every method must be called by all of them.

    Args:
        prompts: what is drawn.
        settings: the pipeline's num_inference_steps or timesteps, eta and guidance_scale.
        batch_size: images drawn at once.
        embed: prompts -> (prompt_embeds, pooled_prompt_embeds).
        decode: latents -> images.
        score: (images, prompts) -> scores [R, B].
        rewards: for their names and weights; without any, nothing is scored.
        log: (step, values), to the trackers and the metrics.
    """

    def __init__(self, args, accelerator, pipeline, prompts, settings, batch_size, embed, decode, score, rewards, log):
        self.accelerator, self.pipeline = accelerator, deployment_pipeline(pipeline)
        self.prompts = prompts
        self.num_images, self.seed, self.output_dir = args.num_validation_images, args.seed, Path(args.output_dir)
        self.settings = pipeline_settings(settings, args.resolution)
        self.batch_size = batch_size
        self.embed, self.decode, self.score, self.rewards, self.log = embed, decode, score, rewards, log
        self.before = self.after = None  # images of step 0, and the latest
        self.values = {}  # the latest images' scores

    @torch.no_grad()
    def draw(self) -> tuple[list[Image.Image], Tensor]:
        """The images, prompt by prompt, and their scores [R, B], on every process."""
        total = len(self.prompts) * self.num_images
        # Every process draws the same number, the last ones repeating the last image, so that they can be gathered.
        share = math.ceil(total / self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        indices = [min(index, total - 1) for index in range(first, first + share)]
        prompts = [self.prompts[index // self.num_images] for index in indices]
        seeds = [self.seed + index % self.num_images for index in indices]

        latents = draw_latents(self.pipeline, *self.embed(prompts), seeds, self.batch_size, **self.settings)
        images = self.decode(latents)
        scores = self.score(images, prompts).T.contiguous()  # [share, R]: gather concatenates the first dimension
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        pixels, scores = self.accelerator.gather(tuple(t.to(self.accelerator.device) for t in (pixels, scores)))
        return [Image.fromarray(image) for image in pixels[:total].cpu().numpy()], scores[:total].T.cpu()

    def __call__(self, state):
        """Draws and logs, unless it was done at this step already (by the run that this one goes on with)."""
        if self.num_images == 0 or state.validated_step == state.global_step:
            return
        self.after, scores = self.draw()
        if state.global_step == 0:
            self.before = self.after
        state.validated_step = step = state.global_step
        if self.rewards.names:
            self.values = summarize_scores(self.rewards.names, self.rewards.weights, scores, self.num_images)
            self.log(step, self.values)
        if self.accelerator.is_main_process:
            grid = image_grid(self.after, self.num_images)
            (self.output_dir / "validation").mkdir(exist_ok=True)
            grid.save(self.output_dir / "validation" / f"step-{step:06d}.png")
            log_grid(self.accelerator, grid, step, " | ".join(self.prompts))

    def save_before_and_after(self, state) -> list[tuple[str, str]]:
        """Writes before_after.png; returns (caption, file name) of it for the model card.

        What this process has not drawn itself, because it resumed, is drawn now; before is the UNet without LoRA.
        """
        if self.num_images == 0:
            return []
        if self.before is None:
            with lora_disabled(self.pipeline.unet):
                self.before, _ = self.draw()
        if self.after is None or state.validated_step != state.global_step:
            self.after, _ = self.draw()
        if self.accelerator.is_main_process:
            picture = before_and_after(self.before, self.after, self.prompts, self.num_images)
            picture.save(self.output_dir / "before_after.png")
        return [("before and after", "before_after.png")]


def summarize_scores(names: Sequence[str], weights: Tensor, scores: Tensor, num_images: int) -> dict[str, float]:
    """Mean and standard error of the weighted sum of the rewards, and of each where there are several: over prompts, as
    in the evaluation's tables, or where there is only one, over its images.

    Args:
        scores: [R, B], `num_images` of each prompt after each other.
    """
    rows = {"validation/reward": (weights[:, None] * scores).sum(dim=0)}
    if len(names) > 1:
        rows |= {f"validation/{name}": row for name, row in zip(names, scores)}
    images = np.arange(scores.shape[1])
    prompts = images // num_images if len(images) > num_images else images
    values = {}
    for name, row in rows.items():
        summary = score_statistics.summarize(row.double().numpy(), prompts)
        values[f"{name}_mean"] = summary["mean"]
        if math.isfinite(summary["standard_error"]):
            values[f"{name}_standard_error"] = summary["standard_error"]
    return values


def fit_tile(image: Image.Image, smallest: int = 96, largest: int = 512) -> Image.Image:
    """Enlarges a tiny image by a whole factor, without blur, and shrinks a large one."""
    if image.width < smallest:
        factor = math.ceil(smallest / image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width > largest:
        return image.resize((largest, image.height * largest // image.width), Image.Resampling.LANCZOS)
    return image


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2, **tile) -> Image.Image:
    """The images in rows of `columns`, on white."""
    tiles = [fit_tile(image, **tile) for image in images]
    width, height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(tiles):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def before_and_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], prompts: Sequence[str], columns: int
) -> Image.Image:
    """Both sets of images side by side, a row for each prompt, from the same noise at the same place."""
    margin, line, gap = 8, 20, 24
    font = ImageFont.load_default(size=13)
    # Eight 512 px images a row would make a picture that no page shows; the full size is in the validation grids.
    rows = [
        [image_grid(images[start : start + columns], columns, largest=256) for images in (before, after)]
        for start in range(0, len(before), columns)
    ]
    width, height = rows[0][0].size
    picture = Image.new("RGB", (2 * margin + 2 * width + gap, line + margin + len(rows) * (height + line)), "white")
    draw = ImageDraw.Draw(picture)
    for side, label in enumerate(("before", "after")):
        draw.text((margin + side * (width + gap), 4), label, fill="black", font=font)
    for index, (row, prompt) in enumerate(zip(rows, prompts)):
        top = line + index * (height + line)
        for side, grid in enumerate(row):
            picture.paste(grid, (margin + side * (width + gap), top))
        caption = shorten(prompt or "(no prompt)", 2 * width + gap, font)
        draw.text((margin, top + height + 1), caption, fill="dimgray", font=font)
    return picture


def shorten(text: str, width: int, font) -> str:
    """`text` in one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # a letter is wider than a pixel, and measuring a text of 20,000 letter by letter takes minutes
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int, caption: str):
    """Sends a grid of images to the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(grid, caption=caption)}, step=step)
