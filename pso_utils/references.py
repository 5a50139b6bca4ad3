"""Reference images that the model draws itself, for targets that come without one (style, concept)."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .images import pixels_of


logger = logging.getLogger(__name__)

METADATA_NAME = "metadata.jsonl"
SETTINGS_NAME = "settings.json"


class References:
    """One image for each caption, as PNG under `folder/step-N` with a metadata.jsonl: for people to look at, and for a
    resumed run, which draws only what is missing.

    The images of step N are a function of the captions, the settings and the model at step N, so a folder whose
    settings are others' is drawn anew.

    Args:
        folder: of all refreshes.
        captions: of the images, in order.
        draw: (captions, seeds) -> images, without gradient.
        settings: all that the images depend on beside caption, seed and step; JSON.
        batch_size: images drawn at once.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        captions: Sequence[str],
        draw: Callable[[list[str], list[int]], list[Image.Image]],
        settings: dict,
        seed: int,
        batch_size: int,
    ):
        self.accelerator, self.root, self.captions, self.draw = accelerator, Path(folder), list(captions), draw
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.folder = None

    def refresh(self, step: int, progress: Callable[[int], None] = lambda count: None):
        """Makes the images of step `step` the current ones, and draws those that aren't there; all processes call it.

        Every image has a noise of its own, another one at each refresh.
        """
        self.folder = self.root / f"step-{step:06d}"
        if self.accelerator.is_main_process:
            self._prepare()
        self.accelerator.wait_for_everyone()
        mine = range(self.accelerator.process_index, len(self.captions), self.accelerator.num_processes)
        missing = [index for index in mine if not self.path(index).is_file()]
        progress(len(mine) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            indices = missing[start : start + self.batch_size]
            seeds = [self._seed(step, index) for index in indices]
            for index, image in zip(indices, self.draw([self.captions[index] for index in indices], seeds)):
                write_image(image, self.path(index))
            progress(len(indices))
        self.accelerator.wait_for_everyone()

    def drop_after(self, step: int):
        """Deletes the images of steps after `step`; all processes call it. Where they depend on the LoRA, those of a
        run that was otherwise trained, or killed, are not this run's."""
        if self.accelerator.is_main_process:
            for folder in self.root.glob("step-*"):
                if int(folder.name.removeprefix("step-")) > step:
                    shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """The current images [B, 3, H, W] in [-1, 1]."""
        return torch.stack([pixels_of(Image.open(self.path(index))) for index in indices])

    def _seed(self, step: int, index: int) -> int:
        # far from the validation's seeds, which count up from the run's
        return (self.seed + 1) * 1_000_003 + step * len(self.captions) + index

    def _prepare(self):
        settings = json.dumps({**self.settings, "seed": self.seed, "captions": self.captions})
        path = self.folder / SETTINGS_NAME
        if self.folder.exists() and not (path.is_file() and path.read_text() == settings):
            logger.warning(f"{self.folder} holds references of other settings: they are drawn anew")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(settings)
        lines = [{"file_name": self.path(i).name, "text": caption} for i, caption in enumerate(self.captions)]
        (self.folder / METADATA_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_image(image: Image.Image, path: Path):
    """Writes a PNG whole or not at all, for a run that is killed."""
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)
