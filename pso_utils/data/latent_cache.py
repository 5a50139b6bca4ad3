"""Tensors on disk, so that each image passes through the VAE once."""

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.data.loader import Minibatch, PairBatch, PairLoader, RecordBatch
from pso_utils.families import Family


logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"


def prepare_folder(folder: Path, settings: dict) -> None:
    """Makes `folder`, empty unless it was made with the same `settings`, which must be JSON: what its files depend on.
    For one process."""
    text, path = json.dumps(settings), folder / SETTINGS_NAME
    if folder.exists() and not (path.is_file() and path.read_text() == text):
        logger.warning(f"{folder} was made with other settings: it is made anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class TensorCache:
    """Tensors by name in files under `folder`, by a key; written whole or not at all."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{zlib.crc32(key.encode()) % 256:02x}" / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        return load_file(self.path(key)) if key in self else None

    def put(self, key: str, tensors: dict[str, Tensor]):
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # two processes may write the same one
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)


class LatentBatch(NamedTuple):
    """b records of a microbatch as clean latents, on the device that encodes; b is 0 where there is none, or all are
    broken."""

    targets: Tensor  # [b, C, h, w], float32
    references: Tensor | None  # likewise; None for targets alone
    captions: list[str]
    original_sizes: Tensor  # [b, 2], as in `PairBatch`, like the following
    crop_top_lefts: Tensor
    flipped: Tensor
    ids: list[str]
    num_broken: int


def encode_pairs(family: Family, batch: PairBatch) -> LatentBatch:
    """A microbatch's images, targets and references together, through the VAE."""
    pixels = [part for part in (batch.target_pixels, batch.reference_pixels) if part is not None]
    shape = family.latent_shape(*batch.target_pixels.shape[2:])
    latents = torch.empty(0, *shape, device=family.device)
    if batch.ids:
        latents = family.encode_images(torch.cat(pixels))
    targets, *references = latents.unflatten(0, (len(pixels), len(batch.ids)))
    return LatentBatch(targets, references[0] if references else None, *batch[2:])


def encoded_minibatches(family: Family, loader: PairLoader, epoch: int, start: int = 0) -> Iterator[Minibatch]:
    """`PairLoader.minibatches`, of `LatentBatch`, each image through the VAE."""
    for minibatch in loader.minibatches(epoch, start):
        yield minibatch._replace(microbatches=(encode_pairs(family, batch) for batch in minibatch.microbatches))


class LatentCache:
    """The latents of a table's records on disk, by record and flip, filled before training.

    Args:
        folder: emptied if another data set, size or model filled it.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, family: Family, loader: PairLoader):
        self.cache, self.accelerator, self.family, self.loader = TensorCache(folder), accelerator, family, loader
        if accelerator.is_main_process:
            settings = {"model": family.origin, "resolution": loader.resolution}
            prepare_folder(folder, {**settings, "data": loader.source.fingerprint})
        accelerator.wait_for_everyone()

    def fill(self):
        """Encodes all records that are not there yet, each process its part, both ways round with `random_flip`. A
        batch of which some are there is encoded anew as a whole: among others a record's latents might differ in their
        last bits."""
        flips, source = (False, True) if self.loader.random_flip else (False,), self.loader.source
        count = len(source) * (1 + source.has_references) * len(flips)
        size = count * 4 * math.prod(self.family.latent_shape(self.loader.resolution, self.loader.resolution))
        if self.accelerator.is_main_process:
            logger.info(f"the cache will hold {count} latents, {size / 1e6:.1f} MB on disk")
        total = math.ceil(len(source) / self.accelerator.num_processes) * len(flips)
        bar = tqdm(total=total, disable=not self.accelerator.is_local_main_process, desc="encoding", leave=False)
        with bar, self.family.parts_loaded():
            for flip in flips:
                for ids, batch in self.loader.stored_order(flip=flip, is_done=partial(self._has, flip)):
                    if batch is not None:
                        self._write(ids, encode_pairs(self.family, batch), flip)
                    bar.update(len(ids))
        self.accelerator.wait_for_everyone()

    def _has(self, flip: bool, ids: Sequence[str]) -> bool:
        return all(_key(record_id, flip) in self.cache for record_id in ids)

    def _write(self, ids: Sequence[str], batch: LatentBatch, flip: bool):
        for row, record_id in enumerate(batch.ids):
            entry = {"target": batch.targets[row].cpu()}
            if batch.references is not None:
                entry["reference"] = batch.references[row].cpu()
            entry |= {"original_size": batch.original_sizes[row], "crop_top_left": batch.crop_top_lefts[row]}
            self.cache.put(_key(record_id, flip), entry)
        for record_id in set(ids) - set(batch.ids):  # an image of theirs is broken
            self.cache.put(_key(record_id, flip), {})

    def minibatches(self, epoch: int, start: int = 0) -> Iterator[Minibatch]:
        """`PairLoader.minibatches`, of `LatentBatch`, without reading an image."""
        for minibatch in self.loader.record_minibatches(epoch, start):
            yield minibatch._replace(microbatches=map(self._read, minibatch.microbatches))

    def _read(self, batch: RecordBatch) -> LatentBatch:
        entries = [self.cache.get(_key(*record)) for record in zip(batch.ids, batch.flipped.tolist())]
        rows = [row for row, entry in enumerate(entries) if entry]
        unbroken = [entries[row] for row in rows]
        shape = self.family.latent_shape(self.loader.resolution, self.loader.resolution)

        def stack(name: str, *shape: int) -> Tensor:
            return torch.stack([entry[name] for entry in unbroken]) if unbroken else torch.empty(0, *shape)

        has_references = self.loader.source.has_references
        return LatentBatch(
            stack("target", *shape).to(self.family.device),
            stack("reference", *shape).to(self.family.device) if has_references else None,
            [batch.captions[row] for row in rows],
            stack("original_size", 2).long(),
            stack("crop_top_left", 2).long(),
            batch.flipped[rows],
            [batch.ids[row] for row in rows],
            len(entries) - len(unbroken),
        )


def _key(record_id: str, flipped: bool) -> str:
    return f"{int(record_id):08d}{'-flipped' if flipped else ''}"
