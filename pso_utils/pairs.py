"""Pairs of images for offline training: where they are read from, and in which order each process sees them.

A source holds records: `load_preference_pairs`, `load_images` and `load_instance_images` make one. A `PairLoader` deals
a source out in groups of records, one group for each optimizer step, and turns them into tensors.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .images import INTERPOLATIONS, BrokenImage, decode_image, draw_augmentation, transform_pair
from .mdp import keyed_noise


logger = logging.getLogger(__name__)

FILE_FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}

_ORDER = -2  # in the keys of an epoch's order, where other draws have a count from 0 on

# Streamed files that are read side by side. A Parquet reader holds a row group, which may be hundreds of megabytes.
_MAX_OPEN_SHARDS = 4


# ---- Records ----


class Record(NamedTuple):
    """One pair, its images not yet decoded, or one target whose `reference` is None.

    `id` is the record's place in its source, in whatever order it is read: its row, counted from 0, or for a stream
    shard-row, such as "3-17".
    """

    id: str
    target: object
    reference: object
    caption: str


@dataclass(frozen=True)
class Columns:
    """The columns that make a record. With `label`, `target` and `reference` are only the two images' names in the
    data set: the label says whether the first (1) or the second (0) won, or that neither did (0.5, or no label)."""

    target: str
    caption: str
    reference: str | None = None
    label: str | None = None

    @property
    def images(self) -> list[str]:
        return [name for name in (self.target, self.reference) if name is not None]

    @property
    def names(self) -> list[str]:
        return [*self.images, self.caption, *([self.label] if self.label else [])]

    def record(self, row: dict, record_id: str, source: str) -> Record | None:
        """The record of a row, or None for a tie.

        Raises:
            ValueError: the row lacks a column, or its label or caption is none.
        """
        where = f"{describe(record_id)} of {source}"
        missing = [name for name in self.names if name not in row]
        if missing:
            raise ValueError(f"{where} has no column '{missing[0]}', only {sorted(row)}")
        images = [{} if row[name] is None else row[name] for name in self.images]  # an empty one is a broken one
        if self.label is not None:
            target = target_of_label(row[self.label], f"{where}: '{self.label}'")
            if target is None:
                return None
            images = images if target == 0 else images[::-1]
        caption = text_of_caption(row[self.caption], where)
        return Record(record_id, images[0], images[1] if len(images) > 1 else None, caption)


def text_of_caption(caption, where: str) -> str:
    if isinstance(caption, bytes):  # of a WebDataset
        caption = caption.decode("utf-8", errors="replace")
    if not isinstance(caption, str):
        raise ValueError(f"{where} has a caption that is no string: {caption!r}; pass another --caption_column")
    return caption


def describe(record_id: str) -> str:
    shard, _, row = record_id.rpartition("-")
    return f"row {row} (counted from 0)" + (f" of shard {shard}" if shard else "")


def target_of_label(label, where: str) -> int | None:
    """Which of the two images won: 0 for label 1, 1 for label 0, None for a tie (0.5) or no label."""
    try:
        value = math.nan if label is None else float(label)
    except (TypeError, ValueError):
        value = -1.0
    if math.isnan(value) or value == 0.5:
        return None
    if value not in (0.0, 1.0):
        raise ValueError(
            f"{where} is {label!r}; a label is 1 (the first image won), 0 (the second) or 0.5 (a tie); else pass"
            " --winner_column and --loser_column"
        )
    return 1 - int(value)


class Table:
    """Records with random access, the rows of a `datasets.Dataset`. Its items are indices.

    Attributes:
        name: for messages, the flag that it was read by.
        has_references: whether its records are pairs.
        folder: where the relative image paths of its rows start.
        num_ties: ties that were left out.
    """

    def __init__(self, name: str, dataset, columns: Columns, folder: Path, rows: Sequence[int], num_ties: int = 0):
        self.name, self.folder, self.num_ties = name, folder, num_ties
        self.has_references = columns.reference is not None
        self._dataset, self._columns, self._rows = dataset, columns, rows

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        row = int(self._rows[index])
        return self._columns.record(self._dataset[row], str(row), self.name)

    def captions(self) -> list[str]:
        """The captions of all records, read without their images.

        Raises:
            ValueError: one is no string.
        """
        column = self._columns.caption
        captions = self._dataset.select_columns(column).select(self._rows)[column]
        where = "{} of " + self.name
        return [text_of_caption(text, where.format(describe(str(row)))) for row, text in zip(self._rows, captions)]

    def ids(self) -> list[str]:
        """The records' ids, by index."""
        return [str(row) for row in self._rows]

    def order(self, seed: int, epoch: int) -> Iterator[int]:
        """Every index once: the permutation of (seed, epoch)."""
        draws = keyed_noise([(seed, epoch, _ORDER)], (len(self),))[0]
        return iter(draws.argsort(stable=True).tolist())


class Stream:
    """Records of a `datasets.IterableDataset`, whose number is not known. Its items are the records themselves.

    Attributes: as for `Table`; `num_ties` counts those of the latest pass, as far as it was read.
    """

    def __init__(
        self, name: str, dataset, columns: Columns, folder: Path, max_records: int | None, shuffle_buffer_size: int
    ):
        from datasets import IterableDataset

        self.name, self.folder, self.num_ties = name, folder, 0
        self.has_references = columns.reference is not None
        self._dataset, self._columns, self._max_records = dataset, columns, max_records
        # The first so many records are one shard: which they are must not depend on the order of the shards.
        self._num_shards = 1 if max_records is not None else dataset.num_shards
        shards = {"shards": list(range(self._num_shards))}
        self._numbered = IterableDataset.from_generator(self._read, gen_kwargs=shards)
        self._shuffle_settings = {"buffer_size": shuffle_buffer_size}
        if "max_buffer_input_shards" in inspect.signature(self._numbered.shuffle).parameters:  # since datasets 5
            self._shuffle_settings["max_buffer_input_shards"] = _MAX_OPEN_SHARDS

    def _read(self, shards: list[int]) -> Iterator[dict]:
        """The records of some shards, each numbered by shard and row before anything is shuffled."""
        for shard in shards:
            dataset = self._dataset
            if self._num_shards > 1:
                dataset = dataset.shard(num_shards=self._num_shards, index=shard)
            yield from islice(self._records(shard, dataset), self._max_records)

    def _records(self, shard: int, dataset) -> Iterator[dict]:
        rows = rows_in_order(dataset)
        row = 0
        while True:
            try:
                values = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a damaged file, or a connection that stays down
                raise ValueError(
                    f"cannot read on after {row} rows of shard {shard} of {self.name}: {reason(error)}; repair or"
                    " remove that file"
                ) from error
            record = self._columns.record(values, f"{shard}-{row}", self.name)
            row += 1
            if record is None:
                self.num_ties += 1
            else:
                yield record._asdict()

    def record(self, item: Record) -> Record:
        return item

    def first(self, count: int) -> list[Record]:
        """The first so many records as they are stored, without filling the shuffle buffer.

        Raises:
            ValueError: as `order`.
        """
        self.num_ties = 0
        records = [Record(**values) for values in islice(self._read(list(range(self._num_shards))), count)]
        if not records:
            raise only_ties(self.name, self.num_ties)
        return records

    def order(self, seed: int, epoch: int) -> Iterator[Record]:
        """Every record once: `datasets` shuffles the shards, and a buffer of records, by (seed, epoch).

        Raises:
            ValueError: the stream cannot be read, or has nothing but ties.
        """
        self.num_ties, count = 0, 0
        shuffled = self._numbered.shuffle(generator=np.random.default_rng((seed, epoch)), **self._shuffle_settings)
        for record in shuffled:
            count += 1
            yield Record(**record)
        if count == 0:
            raise only_ties(self.name, self.num_ties)


def rows_in_order(dataset) -> Iterator[dict]:
    """The rows of a `datasets.IterableDataset`, its Parquet files opened anew for each row group: pyarrow's scanner
    reads ahead of a slow reader, up to a gigabyte of every open file."""
    for index in range(dataset.num_shards):
        shard = dataset.shard(num_shards=dataset.num_shards, index=index)
        yield from shard.reshard() if hasattr(shard, "reshard") else shard  # since datasets 5


def only_ties(name: str, num_ties: int) -> ValueError:
    return ValueError(
        f"{name} is empty after dropping {num_ties} ties: no row says which image won; pass another --dataset_split,"
        " or --winner_column and --loser_column"
    )


# ---- Sources ----


def load_preference_pairs(
    dataset_name: str,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    caption_column: str = "caption",
    winner_column: str | None = None,
    loser_column: str | None = None,
    image_columns: tuple[str, str] = ("jpg_0", "jpg_1"),
    label_column: str = "label_0",
    max_train_samples: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
    shuffle_buffer_size: int = 1000,
) -> Table | Stream:
    """Winner and loser images of one prompt, by default in Pick-a-Pic's schema: two images and a label that says which
    won. With `winner_column` and `loser_column` there is no label, and no tie.

    `max_train_samples` keeps the first so many pairs that are no ties. A `save_to_disk` folder is memory-mapped, and
    so a `Table` even with `streaming`. Relative image paths start at the data set's own folder.

    Raises:
        ValueError: the data set cannot be read, lacks a column, is empty, has a label that is none, or only ties.
    """
    if (winner_column is None) != (loser_column is None):
        raise ValueError("pass --winner_column and --loser_column together, or neither (then a label says who won)")
    if winner_column is not None:
        columns = Columns(winner_column, caption_column, loser_column)
    else:
        columns = Columns(image_columns[0], caption_column, image_columns[1], label_column)
    name = f"--dataset_name {dataset_name}"
    dataset = open_dataset(dataset_name, dataset_config_name, dataset_split, streaming, cache_dir, num_workers)
    folder, remedy = dataset_folder(dataset_name), "--winner_column and --loser_column (and --caption_column)"
    return make_source(name, dataset, columns, folder, max_train_samples, shuffle_buffer_size, remedy)


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
    shuffle_buffer_size: int = 1000,
) -> Table | Stream:
    """Captioned target images, from either a data set or a folder in imagefolder layout: images, and a metadata.jsonl
    (or .csv, .parquet) with their `file_name` and `caption_column`.

    Raises:
        ValueError: no source or two of them, an unreadable or empty one, or one without captions.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("pass either --dataset_name NAME or --train_data_dir FOLDER, to say where the images are")
    if dataset_name is not None:
        name, folder = f"--dataset_name {dataset_name}", dataset_folder(dataset_name)
        dataset = open_dataset(dataset_name, dataset_config_name, dataset_split, streaming, cache_dir, num_workers)
    else:
        name, folder = f"--train_data_dir {train_data_dir}", Path(train_data_dir).expanduser()
        check_image_folder(folder, name, caption_column)
        # All files by pattern: left to itself, `datasets` takes an image called train.png for the whole training split
        files = {dataset_split: str(folder / "**")}
        dataset = read_dataset(name, "imagefolder", dataset_split, streaming, cache_dir, num_workers, data_files=files)
    columns = Columns(image_column, caption_column)
    remedy = "--image_column and --caption_column"
    source = make_source(name, dataset, columns, folder, max_train_samples, shuffle_buffer_size, remedy)
    if train_data_dir is not None and isinstance(source, Table):
        count = len(image_files(folder.rglob("*")))
        if count > len(dataset):
            logger.warning(f"{name} has {count} images, of which only {len(dataset)} have a caption in the metadata")
    return source


def load_instance_images(instance_data_dir: str, caption: str = "") -> Table:
    """The images of one concept: a folder's image files, sorted by name, each with the same `caption`.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    from datasets import Dataset  # imported here, as below, because it takes seconds

    # resolved, for the table takes paths that are not absolute as lying in its folder
    name, folder = f"--instance_data_dir {instance_data_dir}", Path(instance_data_dir).expanduser().resolve()
    check_folder(folder, name)
    files = image_files(folder.iterdir())
    if not files:
        raise ValueError(f"{name} has no images in it; pass a folder with .png, .jpg or other image files")
    dataset = Dataset.from_dict({"image": files, "caption": [caption] * len(files)})
    return Table(name, dataset, Columns("image", "caption"), folder, range(len(files)))


def check_folder(folder: Path, name: str):
    if not folder.is_dir():
        raise ValueError(f"{name} is not a folder; pass a folder with images")


def image_files(paths: Iterable[Path]) -> list[str]:
    Image.init()
    suffixes = {suffix for suffix, format_name in Image.registered_extensions().items() if format_name in Image.OPEN}
    return [str(path) for path in sorted(paths) if path.suffix.lower() in suffixes and path.is_file()]


def check_image_folder(folder: Path, name: str, caption_column: str):
    check_folder(folder, name)
    if any(next(folder.rglob(f"metadata.{suffix}"), None) for suffix in ("jsonl", "csv", "parquet")):
        return
    if not image_files(folder.rglob("*")):
        raise ValueError(f"{name} has no images in it; pass a folder with images and a metadata.jsonl")
    raise ValueError(
        f"{name} has images and no captions: put a metadata.jsonl beside them, with a line"
        f' {{"file_name": "...", "{caption_column}": "..."}} for each image'
    )


def dataset_folder(dataset_name: str) -> Path:
    """Where the relative paths in a data set start: its folder, or for one of the hub the current one."""
    path = Path(dataset_name).expanduser()
    if path.is_dir():
        return path
    return path.parent if matching_files(dataset_name) else Path()


def is_local(dataset_name: str) -> bool:
    """Whether this names a file or folder rather than a data set of the hub."""
    path = Path(dataset_name)
    return path.is_absolute() or path.suffix.lower() in FILE_FORMATS or bool(re.match(r"[.~]|.*[*?[]", dataset_name))


def matching_files(dataset_name: str) -> list[str]:
    """The file, or the files of a pattern such as folder/*.parquet; none for a folder or a name of the hub."""
    path = Path(dataset_name).expanduser()
    if any(character in path.name for character in "*?["):
        return [str(file) for file in sorted(path.parent.glob(path.name)) if file.is_file()]
    return [str(path)] if path.is_file() else []


def open_dataset(
    dataset_name: str,
    dataset_config_name: str | None,
    dataset_split: str,
    streaming: bool,
    cache_dir: str | None,
    num_workers: int,
):
    """A `datasets.Dataset` or `IterableDataset` of the hub, a folder (also of `save_to_disk`), a file or a pattern.

    Raises:
        ValueError: it is nowhere, of no known format, has no such split, or cannot be read.
    """
    name, path = f"--dataset_name {dataset_name}", Path(dataset_name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return open_saved_dataset(path, name, dataset_split)
        location, settings = str(path), {"name": dataset_config_name}
    elif files := matching_files(dataset_name):
        formats = {FILE_FORMATS.get(Path(file).suffix.lower()) for file in files}
        if len(formats) != 1 or None in formats:
            known = ", ".join(FILE_FORMATS)
            raise ValueError(f"{name} has files of unlike formats, or of an unknown one; pass one of {known}")
        location, settings = formats.pop(), {"data_files": files}
    elif is_local(dataset_name):
        raise ValueError(f"{name} does not exist; pass a file, a folder, a pattern of files or a data set of the hub")
    else:
        location, settings = dataset_name, {"name": dataset_config_name}
    return read_dataset(name, location, dataset_split, streaming, cache_dir, num_workers, **settings)


def open_saved_dataset(path: Path, name: str, split: str):
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # see read_dataset
        raise ValueError(f"cannot read {name}: {reason(error)}") from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise ValueError(f"{name} has no split '{split}'; pass --dataset_split, one of {sorted(dataset)}")
    return dataset[split]


def read_dataset(source: str, location: str, split: str, streaming: bool, cache_dir, num_workers: int, **settings):
    from datasets import load_dataset

    if not streaming:
        settings["num_proc"] = num_workers or None
    try:
        return load_dataset(location, split=split, streaming=streaming, cache_dir=cache_dir, **settings)
    except Exception as error:  # datasets raises a dozen unrelated classes for a source that it cannot read
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source} is empty; pass one that has images") from error
        raise ValueError(f"cannot read {source} (--dataset_split {split}): {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first cause of an error, on one line; what datasets raises in the end often says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or type(error).__name__


def make_source(
    name: str,
    dataset,
    columns: Columns,
    folder: Path,
    max_records: int | None,
    shuffle_buffer_size: int,
    remedy: str,
) -> Table | Stream:
    """A data set as a source, after checking what can be checked without reading an image."""
    from datasets import Dataset

    is_table = isinstance(dataset, Dataset)
    column_names = dataset.column_names
    if column_names is None:  # of some streams
        column_names = first_row(dataset, name)
    for column in columns.names:
        if column not in column_names:
            raise ValueError(f"{name} has no column '{column}'; pass {remedy}, of {sorted(column_names)}")
    dataset = undecoded(dataset, columns)
    if not is_table:
        first_row(dataset, name)
        return Stream(name, dataset, columns, folder, max_records, shuffle_buffer_size)
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; pass one that has images")
    rows = range(len(dataset)) if columns.label is None else decided_rows(dataset, columns.label, name)
    if len(rows) == 0:
        raise only_ties(name, len(dataset))
    table = Table(name, dataset, columns, folder, rows[:max_records], num_ties=len(dataset) - len(rows))
    table.captions()  # for its checks
    return table


def first_row(dataset, name: str) -> dict:
    try:
        row = next(iter(dataset), None)
    except Exception as error:  # see read_dataset
        raise ValueError(f"cannot read {name}: {reason(error)}") from error
    if row is None:
        raise ValueError(f"{name} is empty; pass one that has images")
    return row


def undecoded(dataset, columns: Columns):
    """The data set with these columns alone, its images as they are stored."""
    import datasets

    if dataset.features is None:  # of some streams; they hold no image features
        return dataset
    dataset = dataset.select_columns(list(dict.fromkeys(columns.names)))
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def decided_rows(dataset, label_column: str, name: str) -> np.ndarray:
    """The rows that are no ties, by the label column alone."""
    labels = list(dataset.select_columns(label_column)[label_column])
    where = "{} of {}: '{}'"
    targets = [
        target_of_label(label, where.format(describe(str(row)), name, label_column)) for row, label in enumerate(labels)
    ]
    return np.array([row for row, target in enumerate(targets) if target is not None], dtype=np.int64)


# ---- Groups and batches ----


class PairBatch(NamedTuple):
    """b records of this process's share of a group; b is 0 where it has none, or no sound ones."""

    target_pixels: Tensor  # [b, 3, H, W], float32 in [-1, 1]
    reference_pixels: Tensor | None  # likewise; None for targets alone
    captions: list[str]
    original_sizes: Tensor  # [b, 2], of the targets: height and width
    crop_top_lefts: Tensor  # [b, 2], of both: top and left, in the resized and flipped image
    flipped: Tensor  # [b], bool: whether the pair is mirrored
    ids: list[str]  # the records' places in the source
    num_broken: int  # records that were left out because an image is broken


class Group(NamedTuple):
    """The records of one optimizer step.

    size: on all processes, broken ones included. end: records of the epoch that are behind us after this group, where
    a resumed run starts. batches: those of this process, in order, one at least; to be read before the next group.
    """

    size: int
    end: int
    batches: Iterator[PairBatch]


class _Job(NamedTuple):
    """What a worker makes a batch of."""

    group: tuple[int, int]  # size, end
    items: list


@dataclass(frozen=True)
class PairLoader:
    """Deals out a source: each epoch is an order of all records, cut into groups of `group_size` (the last may be
    smaller); process r of P takes the r-th of P contiguous shares of each, in batches of `train_batch_size`.

    A record's crop and flip are a function of (seed, epoch, record): neither the processes, nor the workers, nor
    where the run was resumed change what is seen.

    Attributes:
        resolution: height and width of the pixels.
        num_workers: subprocesses that decode images; 0: the main process.
        skip_broken_images: leave out, and count, records with a broken image, instead of an error.
    """

    source: Table | Stream
    resolution: int
    train_batch_size: int
    group_size: int
    seed: int = 0
    num_processes: int = 1
    process_index: int = 0
    num_workers: int = 0
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    skip_broken_images: bool = False

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}: pass one of {', '.join(INTERPOLATIONS)}")

    def groups(self, epoch: int, start: int = 0) -> Iterator[Group]:
        """The groups of an epoch from its record `start` on (`Group.end` of the last one that was done).

        A stream is replayed and skipped to get there, without decoding an image: its state leaves the shuffle buffer
        out.

        Raises:
            ValueError: a broken image without `skip_broken_images`, a caption that is no string, an unreadable file.
        """
        loader = DataLoader(
            _BatchMaker(self, epoch),
            batch_size=None,  # a job is a batch already
            sampler=self._jobs(epoch, start),
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # it draws a seed for the workers; the global generator is the script's
        )
        for (size, end), results in groupby(loader, key=lambda result: result[0]):
            yield Group(size, end, (_raise_errors(result) for _, result in results))

    def _jobs(self, epoch: int, start: int) -> Iterator[_Job]:
        items = islice(self.source.order(self.seed, epoch), start, None)
        while group := list(islice(items, self.group_size)):
            start += len(group)
            share = contiguous_share(group, self.num_processes, self.process_index)
            for first in range(0, max(len(share), 1), self.train_batch_size):
                yield _Job((len(group), start), share[first : first + self.train_batch_size])


def contiguous_share(items: list, num_shares: int, index: int) -> list:
    """Share `index` of `items`, as torch.tensor_split cuts them: sizes differ by one at most, the larger come first."""
    size, larger = divmod(len(items), num_shares)
    start = index * size + min(index, larger)
    return items[start : start + size + (index < larger)]


class _BatchMaker:
    """A map-style data set for DataLoader, from jobs to batches; it runs in the workers."""

    def __init__(self, loader: PairLoader, epoch: int):
        self.loader, self.epoch = loader, epoch

    def __getitem__(self, job: _Job) -> tuple[tuple[int, int], PairBatch | ValueError]:
        try:
            return job.group, self.batch(job.items)
        except ValueError as error:  # a value, since DataLoader would put the worker's traceback into the message
            return job.group, ValueError(str(error))

    def batch(self, items: list) -> PairBatch:
        loader, source = self.loader, self.loader.source
        pairs, flipped, records, num_broken = [], [], [], 0
        for record in map(source.record, items):
            images = [record.target] if record.reference is None else [record.target, record.reference]
            try:
                target, *reference = [decode_image(image, source.folder) for image in images]
            except BrokenImage as error:
                if not loader.skip_broken_images:
                    raise ValueError(
                        f"{describe(record.id)} of {source.name} has a broken image: {error}; mend it, or pass"
                        " --skip_broken_images"
                    ) from error
                num_broken += 1
                continue
            augmentation = draw_augmentation(loader.seed, self.epoch, record.id, loader.center_crop, loader.random_flip)
            reference = reference[0] if reference else None
            pairs.append(transform_pair(target, reference, loader.resolution, loader.interpolation, augmentation))
            flipped.append(augmentation.flip)
            records.append(record)

        def stack(pixels: list[Tensor]) -> Tensor:
            return torch.stack(pixels) if pixels else torch.empty(0, 3, loader.resolution, loader.resolution)

        return PairBatch(
            stack([pair.target for pair in pairs]),
            stack([pair.reference for pair in pairs]) if source.has_references else None,
            [record.caption for record in records],
            torch.tensor([pair.original_size for pair in pairs], dtype=torch.long).view(-1, 2),
            torch.tensor([pair.crop_top_left for pair in pairs], dtype=torch.long).view(-1, 2),
            torch.tensor(flipped, dtype=torch.bool),
            [record.id for record in records],
            num_broken,
        )


def _unchanged(result):
    return result


def _raise_errors(result: PairBatch | ValueError) -> PairBatch:
    if isinstance(result, ValueError):
        raise result
    return result
