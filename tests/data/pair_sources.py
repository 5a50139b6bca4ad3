"""What the tests of the sources and of the loader share: small data sets of pairs, and minibatches as lists."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage

from pso_utils.data.loader import Minibatch, PairLoader
from pso_utils.data.pairs import load_preference_pairs
from pso_utils.errors import UserError


def png(color=(0, 0, 0), size=(12, 8)) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


WON, LOST = (255, 0, 0), (0, 0, 255)
LABELS = [1, 0, 0.5, 1, 0, 1, 0.5, 0]


def pickapic_row(number: int, label: float) -> dict:
    """A row of Pick-a-Pic v2, with its other columns; the images are of unlike sizes, the winner is red."""
    first, second = (WON, LOST) if label == 1 else (LOST, WON)
    return {
        "are_different": True,
        "best_image_uid": f"uid-{number}",
        "caption": f"caption {number}",
        "image_0_uid": f"a-{number}",
        "image_1_uid": f"b-{number}",
        "jpg_0": png(first, (12, 8 + number % 5)),
        "jpg_1": png(second, (9, 16)),
        "label_0": float(label),
        "label_1": 1.0 - label,
        "has_label": True,
    }


def write_pickapic(folder: Path, num_shards: int = 3, rows_per_shard: int = 8, labels=LABELS) -> Path:
    folder.mkdir()
    for shard in range(num_shards):
        numbers = range(shard * rows_per_shard, (shard + 1) * rows_per_shard)
        rows = [pickapic_row(number, labels[number % len(labels)]) for number in numbers]
        path = folder / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return folder


def write_image_folder(folder: Path, metadata: str | None = "jsonl", caption: str = "text") -> Path:
    folder.mkdir()
    rows = [{"file_name": f"{name}.png", caption: f"drawing {name}"} for name in "cab"]
    for number, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(png((number, 0, 0)))
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif metadata is not None:
        getattr(Dataset.from_list(rows), f"to_{metadata}")(folder / f"metadata.{metadata}")
    return folder


def make_loader(source, **settings) -> PairLoader:
    settings = {"resolution": 8, "train_batch_size": 2, "minibatch_size": 5, "seed": 3, "random_flip": True, **settings}
    return PairLoader(source, **settings)


def load_pairs(cache_dir: Path, dataset, **settings):
    settings = {"cache_dir": str(cache_dir), "shuffle_buffer_size": 4, **settings}
    return load_preference_pairs(str(dataset), **settings)


def read(loader: PairLoader, epoch: int = 0, start: int = 0, minibatches=PairLoader.minibatches) -> list[Minibatch]:
    """An epoch's minibatches, each with a list of its microbatches."""
    return [
        minibatch._replace(microbatches=list(minibatch.microbatches)) for minibatch in minibatches(loader, epoch, start)
    ]


def flat(minibatches: list[Minibatch]) -> list:
    return [microbatch for minibatch in minibatches for microbatch in minibatch.microbatches]


def ids(minibatches: list[Minibatch]) -> list[str]:
    return [record_id for microbatch in flat(minibatches) for record_id in microbatch.ids]


def captions_of(minibatches: list[Minibatch]) -> list[str]:
    return [caption for microbatch in flat(minibatches) for caption in microbatch.captions]


def pixels(minibatches: list[Minibatch]) -> torch.Tensor:
    pairs = [torch.stack([microbatch.target_pixels, microbatch.reference_pixels]) for microbatch in flat(minibatches)]
    return torch.cat(pairs, dim=1)


def rejects(message: str):
    return pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$")
