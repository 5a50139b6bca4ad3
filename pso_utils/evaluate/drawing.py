"""The images: kept on disk with a key of all that they depend on, so that none is drawn twice."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from pso_utils.data.prompt_cache import PromptCache
from pso_utils.evaluate.loras import Model, applied
from pso_utils.evaluate.plan import Plan, Sample, Setting
from pso_utils.families import Conditioning, Deployment, Family
from pso_utils.sources import source_state


Batch = tuple[Model, Setting, list[Sample]]


class Images:
    """The PNGs in a folder, one for each model, setting and sample.

    Args:
        model_settings: all that they depend on beside LoRA, deployment, prompt and seed; JSON.
        cache_dir: of LoRAs that were downloaded.
    """

    def __init__(self, folder: Path, models: Sequence[Model], model_settings: dict, *, cache_dir: str | None = None):
        self.folder = folder
        # as it is now: files that change later are another model's
        self._states = {
            model: [model_settings, source_state(model.lora, cache_dir=cache_dir), model.scale] for model in models
        }

    def path(self, model: Model, setting: Setting, sample: Sample) -> Path:
        name = f"{sample.prompt_index:05d}-{sample.image_index:02d}.png"
        return self.folder / model.name / f"steps-{setting.label}" / name

    def _key(self, model: Model, setting: Setting, sample: Sample) -> str:
        text = json.dumps([self._states[model], setting.deployment, sample.prompt, sample.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def is_drawn(self, model: Model, setting: Setting, sample: Sample) -> bool:
        try:
            with Image.open(self.path(model, setting, sample)) as image:
                key = image.info.get("key")
                image.verify()  # its check sums, to the end
        except (OSError, SyntaxError):  # the latter of verify
            return False
        return key == self._key(model, setting, sample)

    def write(self, batch: Batch, images: Sequence[Image.Image], *, seconds: float):
        """Writes the PNGs of a batch: whole or not at all, and all at once, for a run that is killed. A batch of which
        some are there would go on with fewer images, whose bits may be others. `seconds` are those of each."""
        model, setting, samples = batch
        paths = [self.path(model, setting, sample) for sample in samples]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for image, sample, path in zip(images, samples, paths):
            info = PngInfo()
            info.add_text("key", self._key(model, setting, sample))
            info.add_itxt("prompt", sample.prompt)
            info.add_text("seconds", str(seconds))
            image.save(path.with_suffix(".partial"), format="PNG", pnginfo=info)
        for path in paths:
            os.replace(path.with_suffix(".partial"), path)

    def read(self, model: Model, setting: Setting, samples: Sequence[Sample]) -> list[Image.Image]:
        """RGB."""
        return [Image.open(self.path(model, setting, sample)).convert("RGB") for sample in samples]

    def seconds(self, model: Model, setting: Setting, sample: Sample) -> float:
        with Image.open(self.path(model, setting, sample)) as image:  # its header alone
            return float(image.info["seconds"])


def batches_of(items: Sequence, size: int, accelerator: Accelerator) -> Iterator[Sequence]:
    """This process's batches. They are the same batches whatever the number of processes, and so are their images'
    bits."""
    for start in range(accelerator.process_index * size, len(items), accelerator.num_processes * size):
        yield items[start : start + size]


def pending_batches(plan: Plan, images: Images, accelerator: Accelerator, *, batch_size: int) -> list[Batch]:
    """This process's batches, row by row, with those of their images that are not drawn."""
    batches = [
        (model, setting, [sample for sample in samples if not images.is_drawn(model, setting, sample)])
        for model, setting in plan.rows
        for samples in batches_of(plan.samples, batch_size, accelerator)
    ]
    return [batch for batch in batches if batch[-1]]


@torch.no_grad()
def draw_pending(family: Family, batches: list[Batch], images: Images, *, cache_dir: str | None, show_progress: bool):
    """Draws and writes the batches, which are ordered by model."""
    total = sum(len(samples) for _, _, samples in batches)
    base_encode = PromptCache(family)
    with tqdm(total=total, desc="drawing", unit="image", disable=not show_progress) as bar:
        for model, own in itertools.groupby(batches, key=lambda batch: batch[0]):
            bar.set_postfix(model=model.name)
            with applied(family.pipeline, model, cache_dir=cache_dir):
                # a LoRA of the text encoders changes what they make of prompts
                is_changed = any(getattr(encoder, "peft_config", None) for encoder in family.text_encoders)
                encode = PromptCache(family) if is_changed else base_encode
                for _, setting, samples in own:
                    conditionings = encode([sample.prompt for sample in samples])
                    seeds, start = [sample.seed for sample in samples], time.perf_counter()
                    drawn = draw(family, conditionings, seeds, deployment=setting.deployment)
                    seconds = (time.perf_counter() - start) / len(samples)
                    images.write((model, setting, samples), drawn, seconds=seconds)
                    bar.update(len(samples))


def draw(
    family: Family, conditionings: Sequence[Conditioning], seeds: Sequence[int], *, deployment: Deployment
) -> list[Image.Image]:
    """The plain pipeline's RGB images of B prompts, drawn at once, each from its own seed's noise."""
    conditioning = family.collate(conditionings, deployment.height, deployment.width)
    latents = family.draw_latents(conditioning, seeds, deployment=deployment, batch_size=len(seeds))
    return family.decode_latents(latents)
