"""Reference images that the model draws itself, for targets that come without one (style, concept)."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pso_utils.data.images import draw_reference_uniform, pixels_of
from pso_utils.data.latent_cache import TensorCache, prepare_folder
from pso_utils.families import Family


METADATA_NAME = "metadata.jsonl"


class References:
    """One image for each caption, as PNG under `folder/step-N` with a metadata.jsonl: for people to look at, and for a
    resumed run, which draws only what is missing.

    The images of step N are a function of the captions, the settings and the model at step N, so they are drawn anew
    where any of these has changed.

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
        *,
        settings: dict,
        seed: int,
        batch_size: int,
    ):
        self.accelerator, self.root, self.captions, self.draw = accelerator, Path(folder), list(captions), draw
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.step = -1  # whose images are the current ones

    @property
    def folder(self) -> Path:
        return self.root / f"step-{self.step:06d}"

    def refresh(self, step: int, progress: Callable[[int], None] = lambda count: None):
        """Makes the images of step `step` the current ones, and draws those that aren't there; all processes call it.

        Every image has a noise of its own, another one at each refresh.
        """
        self.step = step
        if self.accelerator.is_main_process:
            prepare_folder(self.folder, {**self.settings, "seed": self.seed, "captions": self.captions})
            lines = [{"file_name": self.path(i).name, "text": caption} for i, caption in enumerate(self.captions)]
            (self.folder / METADATA_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.accelerator.wait_for_everyone()
        for start in range(0, len(self.own_indices), self.batch_size):
            indices = self.own_indices[start : start + self.batch_size]
            # Always in the same batches: in others a resumed run's images might differ in their last bits
            if not all(self.path(index).is_file() for index in indices):
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

    @property
    def own_indices(self) -> range:
        """Those that this process draws."""
        return range(self.accelerator.process_index, len(self.captions), self.accelerator.num_processes)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def pixels(self, indices: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Current images [B, 3, H, W] in [-1, 1], mirrored where `flipped`."""
        pixels = [pixels_of(Image.open(self.path(index))) for index in indices]
        return torch.stack([image.flip(-1) if flip else image for image, flip in zip(pixels, flipped)])

    def _seed(self, step: int, index: int) -> int:
        # far from the validation's seeds, which count up from the run's
        return (self.seed + 1) * 1_000_003 + step * len(self.captions) + index


class ReferenceLatents:
    """The latents of the current references: encoded for each use, or kept on disk beside the images.

    Args:
        images: what is encoded.
        record_ids: of the records that the images are for, one each, in order; None: each is for any record.
        is_cached: whether the latents are kept.
        random_flip: whether mirrored ones are asked for, too.
    """

    def __init__(
        self,
        images: References,
        family: Family,
        *,
        record_ids: Sequence[str] | None = None,
        is_cached: bool,
        random_flip: bool,
    ):
        self.images, self.family, self.is_cached, self.random_flip = images, family, is_cached, random_flip
        self._index_of_record = None
        if record_ids is not None:
            self._index_of_record = {record_id: index for index, record_id in enumerate(record_ids)}

    def indices_of(self, record_ids: Sequence[str], *, epoch: int) -> list[int]:
        """Which image each record is paired with: its own, or any, drawn anew in each epoch."""
        if self._index_of_record is not None:
            return [self._index_of_record[record_id] for record_id in record_ids]
        uniform = draw_reference_uniform(record_ids, seed=self.images.seed, epoch=epoch)
        return (uniform * len(self.images.captions)).long().tolist()

    @property
    def cache(self) -> TensorCache:
        return TensorCache(self.images.folder / "latents")

    def refresh(self, step: int, progress: Callable[[int], None] = lambda count: None):
        """`References.refresh`, and the latents of what is current now, where they are kept; what is offloaded moves
        once. All processes call it."""
        with self.family.parts_loaded():
            self.images.refresh(step, progress)
            if self.is_cached:
                for flip in (False, True) if self.random_flip else (False,):
                    self._fill(flip)
        self.images.accelerator.wait_for_everyone()

    def _fill(self, flip: bool):
        """Encodes this process's part that is not there yet. Always in the same batches, too."""
        own, batch_size = self.images.own_indices, self.images.batch_size
        for start in range(0, len(own), batch_size):
            indices = own[start : start + batch_size]
            if not all(_key(index, flip) in self.cache for index in indices):
                latents = self.family.encode_images(self.images.pixels(indices, [flip] * len(indices)))
                for index, row in zip(indices, latents.cpu()):
                    self.cache.put(_key(index, flip), {"latents": row})

    def __call__(self, indices: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Latents [B, C, h, w], float32, on the family's device, of current references, mirrored where `flipped`."""
        if not self.is_cached:
            return self.family.encode_images(self.images.pixels(indices, flipped))
        keys = [_key(index, flip) for index, flip in zip(indices, flipped)]
        return torch.stack([self.cache.get(key)["latents"] for key in keys]).to(self.family.device)


def _key(index: int, flip: bool) -> str:
    return f"{index:06d}{'-flipped' if flip else ''}"


def write_image(image: Image.Image, path: Path):
    """Writes a PNG whole or not at all, for a run that is killed."""
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)
