"""Where the images of offline training are read from: sources of records, which are pairs of images or targets alone.

`load_preference_pairs`, `load_images`, `load_image_folder` and `load_pair_folder` make a source; `loader.PairLoader`
deals it out.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pso_utils.data import readers
from pso_utils.data.folders import Example, captioned_images, paired_images
from pso_utils.data.images import BrokenImage, image_size
from pso_utils.errors import UserError
from pso_utils.keyed_rng import keyed_permutation


logger = logging.getLogger(__name__)

_ORDER = -2  # the third number in the key of an epoch's order; those of other draws are in `images`

# Streamed files that are read side by side. A Parquet reader holds a row group, which may be hundreds of megabytes.
_MAX_OPEN_SHARDS = 4


class Record(NamedTuple):
    """One pair, its images not yet decoded, or one target, whose `reference` is None.

    `id` says where the record is in its source, in whatever order it is read: its row, counted from 0, or for a stream
    shard-row, such as "3-17".
    """

    id: str
    target: object
    reference: object
    caption: str

    @property
    def files(self) -> list[str]:
        """Those of its images that are files, the target's first, and not stored as bytes or named by a URL."""
        images = [self.target, self.reference]
        images = [image["path"] if isinstance(image, dict) and not image["bytes"] else image for image in images]
        return [image for image in images if isinstance(image, str) and "://" not in image]


@dataclass(frozen=True)
class Columns:
    """The columns that make a record. With `label`, `target` and `reference` are only the two images' names in the
    data set: the label says whether the first (1) or the second (0) won, or that neither did (0.5, or no label)."""

    target: str
    caption: str
    reference: str | None = None
    label: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.target, self.reference, self.caption, self.label) if name is not None]

    def record(self, row: dict, record_id: str, source: str) -> Record | None:
        """The record of a row, or None for a tie.

        Raises:
            UserError: the row lacks a column, or its label or caption is none.
        """
        where = f"{readers.describe(record_id)} of {source}"
        missing = [name for name in self.names if name not in row]
        if missing:
            raise UserError(f"{where} has no column '{missing[0]}', only {sorted(row)}")
        target, reference = row[self.target], None if self.reference is None else row[self.reference]
        if self.label is not None:
            index = index_of_target(row[self.label], f"{where}: '{self.label}'")
            if index is None:
                return None
            if index == 1:
                target, reference = reference, target
        return Record(record_id, target, reference, readers.check_caption(row[self.caption], where))


def index_of_target(label, where: str) -> int | None:
    """Which of the two images won: 0 for label 1, 1 for label 0, None for a tie (0.5) or no label."""
    try:
        value = math.nan if label is None else float(label)
    except (TypeError, ValueError):
        value = -1.0
    if math.isnan(value) or value == 0.5:
        return None
    if value not in (0.0, 1.0):
        raise UserError(
            f"{where} is {label!r}; a label is 1 (the first image won), 0 (the second) or 0.5 (a tie); else pass"
            " --winner_column and --loser_column"
        )
    return 1 - int(value)


class Table:
    """Records with random access, the rows of a `datasets.Dataset`. Its items are indices.

    Attributes:
        name: for messages, the flag that it was read by.
        has_references: whether its records are pairs.
        folders: where the image paths of its rows may lead; relative ones start in the first.
        num_ties: ties that were left out.
    """

    def __init__(
        self, dataset, columns: Columns, rows: Sequence[int], *, name: str, folders: Sequence[Path], num_ties: int = 0
    ):
        self.name, self.folders, self.num_ties = name, folders, num_ties
        self.has_references = columns.reference is not None
        self._dataset, self._columns, self._rows = dataset, columns, rows

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        row = int(self._rows[index])
        return self._columns.record(self._dataset[row], str(row), self.name)

    def ids(self, indices: Sequence[int] | None = None) -> list[str]:
        """The ids of some records, or of all."""
        return [str(row) for row in self._rows_at(indices)]

    def captions(self, indices: Sequence[int] | None = None) -> list[str]:
        """The captions of some records, or of all, read without their images."""
        return self._captions if indices is None else [self._captions[index] for index in indices]

    @cached_property
    def _captions(self) -> list[str]:
        return readers.read_captions(self._dataset, self._columns.caption, self._rows, self.name)

    def _rows_at(self, indices: Sequence[int] | None) -> Sequence[int]:
        return self._rows if indices is None else [int(self._rows[index]) for index in indices]

    @property
    def fingerprint(self) -> str:
        """A hash of all that the records' contents depend on, as far as `datasets` knows it: the files that it was
        made from and when they were last written, the columns, and the rows that are kept. Image files that a JSON or
        CSV file names are not among them."""
        # Private, but nothing public says from which files a data set was made
        digest = hashlib.sha256(f"{self._dataset._fingerprint} {self._columns}".encode())
        digest.update(np.asarray(self._rows, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def order(self, *, seed: int, epoch: int) -> Iterator[int]:
        """Every index once: the permutation of (seed, epoch)."""
        return iter(keyed_permutation((seed, epoch, _ORDER), len(self)).tolist())


class Stream:
    """Records of a `datasets.IterableDataset`, whose number is not known. Its items are the records themselves.

    Attributes: as for `Table`; `num_ties` counts those of the latest pass, as far as it was read.
    """

    def __init__(
        self,
        dataset,
        columns: Columns,
        *,
        name: str,
        folders: Sequence[Path],
        max_records: int | None,
        shuffle_buffer_size: int,
    ):
        self.name, self.folders, self.num_ties = name, folders, 0
        self.has_references = columns.reference is not None
        self._dataset, self._columns, self._max_records = dataset, columns, max_records
        # The first so many records are one shard: which they are must not depend on the order of the shards.
        self._shards = [0] if max_records is not None else list(range(dataset.num_shards))
        self._shuffle_buffer_size = shuffle_buffer_size

    def _read(self, shards: list[int]) -> Iterator[dict]:
        """The records of some shards, each numbered by shard and row before anything is shuffled."""
        for shard in shards:
            dataset = self._dataset
            if self._max_records is None:
                dataset = dataset.shard(num_shards=len(self._shards), index=shard)
            yield from islice(self._records(shard, rows_in_order(dataset)), self._max_records)

    def _records(self, shard: int, rows: Iterator[dict]) -> Iterator[dict]:
        for row in count():
            where, remedy = f"on after {row} rows of shard {shard} of {self.name}", "; repair or remove that file"
            with readers.one_line_errors(where, remedy=remedy):  # a damaged file, or a connection that stays down
                values = next(rows, None)
            if values is None:
                return
            record = self._columns.record(values, f"{shard}-{row}", self.name)
            if record is None:
                self.num_ties += 1
            else:
                yield record._asdict()

    def record(self, item: Record) -> Record:
        return item

    def ids(self, items: list[Record]) -> list[str]:
        return [item.id for item in items]

    def captions(self, items: list[Record]) -> list[str]:
        return [item.caption for item in items]

    def first(self, number: int) -> list[Record]:
        """The first so many records as they are stored, without filling the shuffle buffer; raises as `order`."""
        return list(islice(self._pass(self._read(self._shards)), number))

    def order(self, *, seed: int, epoch: int, num_processes: int = 1, process_index: int = 0) -> Iterator[Record]:
        """Every record once over all processes: `datasets` shuffles the shards, and a buffer of records, by (seed,
        epoch). Each process reads shards of its own; where there are fewer of them than processes, each reads all of
        them and takes one record of `num_processes`.

        Raises:
            UserError: the stream cannot be read, or, on one process, has nothing but ties.
        """
        from datasets import IterableDataset  # imported here, as below, because it takes seconds

        are_enough = len(self._shards) >= num_processes
        own = self._shards[process_index::num_processes] if are_enough else self._shards
        numbered = IterableDataset.from_generator(self._read, gen_kwargs={"shards": own})
        generator = np.random.default_rng((seed, epoch))
        buffers = {"buffer_size": self._shuffle_buffer_size, "max_buffer_input_shards": _MAX_OPEN_SHARDS}
        records = self._pass(numbered.shuffle(generator=generator, **buffers), may_be_empty=num_processes > 1)
        return records if are_enough else islice(records, process_index, None, num_processes)

    def _pass(self, records, *, may_be_empty: bool = False) -> Iterator[Record]:
        self.num_ties, is_empty = 0, True
        for values in records:
            is_empty = False
            yield Record(**values)
        if is_empty and not may_be_empty:
            raise only_ties(self.name, self.num_ties)


def rows_in_order(dataset) -> Iterator[dict]:
    """The rows of a `datasets.IterableDataset`, its Parquet files opened anew for each row group: pyarrow's scanner
    reads ahead of a slow reader, up to a gigabyte of every open file."""
    for index in range(dataset.num_shards):
        yield from dataset.shard(num_shards=dataset.num_shards, index=index).reshard()


def only_ties(name: str, num_ties: int) -> UserError:
    return UserError(
        f"{name} is empty after dropping {num_ties} ties: no row says which image won; pass another --dataset_split,"
        " or --winner_column and --loser_column"
    )


# ---- Sources ----


def load_preference_pairs(
    dataset_name: str,
    *,
    caption_column: str = "caption",
    winner_column: str | None = None,
    loser_column: str | None = None,
    image_columns: Sequence[str] = ("jpg_0", "jpg_1"),
    label_column: str = "label_0",
    max_train_samples: int | None = None,
    shuffle_buffer_size: int = 1000,
    **settings,
) -> Table | Stream:
    """Winner and loser images of one prompt, by default in Pick-a-Pic's schema: two images and a label that says which
    won. With `winner_column` and `loser_column` there is no label, and no tie.

    `max_train_samples` keeps the first so many pairs that are no ties. `settings` are those of `readers.open_dataset`.
    Image paths lead into the data set's own folder, in which relative ones start.

    Raises:
        UserError: the data set cannot be read, lacks a column, is empty, has a label that is none, or only ties.
    """
    if (winner_column is None) != (loser_column is None):
        raise UserError("pass --winner_column and --loser_column together, or neither (then a label says who won)")
    if winner_column is not None:
        columns = Columns(winner_column, caption_column, loser_column)
    else:
        columns = Columns(image_columns[0], caption_column, image_columns[1], label_column)
    dataset = readers.open_dataset(dataset_name, **settings)
    folders = readers.row_folders(readers.dataset_folder(dataset_name), settings.get("cache_dir"))
    remedy = "--winner_column and --loser_column (and --caption_column)"
    limits = {"max_records": max_train_samples, "shuffle_buffer_size": shuffle_buffer_size}
    name = f"--dataset_name {dataset_name}"
    return make_source(dataset, columns, name=name, folders=folders, remedy=remedy, **limits)


def load_images(
    dataset_name: str,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    **settings,
) -> Table | Stream:
    """Captioned target images of a data set. `settings` are those of `readers.open_dataset`.

    Raises:
        UserError: the data set is unreadable, empty, or without captions.
    """
    name, folder = f"--dataset_name {dataset_name}", readers.dataset_folder(dataset_name)
    dataset = readers.open_dataset(dataset_name, **settings)
    columns, remedy = Columns(image_column, caption_column), "--image_column and --caption_column"
    folders = readers.row_folders(folder, settings.get("cache_dir"))
    return make_source(dataset, columns, name=name, folders=folders, remedy=remedy, max_records=max_train_samples)


def load_image_folder(
    folder: str,
    *,
    flag: str,
    caption: str | None = None,
    caption_column: str = "text",
    is_flat: bool = False,
    max_train_samples: int | None = None,
    **settings,
) -> Table:
    """Captioned target images of a folder. In imagefolder layout: a metadata.jsonl (or .csv, .parquet) has their
    `file_name` and `caption_column`; else NAME.txt beside NAME.jpg has the caption, and images without one have
    `caption`.

    Args:
        flag: what named the folder, for messages.
        is_flat: without its subfolders, and without a metadata file.
        settings: of `readers.open_dataset`.

    Raises:
        UserError: there are no images, or none with a caption.
    """
    # Resolved, because a relative path is taken to lie in the table's folder
    name, folder = f"{flag} {folder}", Path(folder).expanduser().resolve()
    if is_flat or not (folder.is_dir() and readers.has_metadata(folder)):
        return folder_table(
            captioned_images(folder, name, caption=caption, is_flat=is_flat), name, folder, max_train_samples
        )
    dataset = readers.open_image_folder(folder, name, **settings)
    folders = readers.row_folders(folder, settings.get("cache_dir"))
    columns, limit = Columns("image", caption_column), {"max_records": max_train_samples}
    source = make_source(dataset, columns, name=name, folders=folders, remedy="--caption_column", **limit)
    num_images = len(readers.image_files(folder.rglob("*")))
    if num_images > len(dataset):
        logger.warning(f"{name} has {num_images} images, of which only {len(dataset)} have a caption in the metadata")
    return source


def load_pair_folder(
    folder: str, *, flag: str, caption: str | None = None, max_train_samples: int | None = None
) -> Table:
    """The pairs of a folder of winners and one of losers, or of a pairs.jsonl, as `paired_images` finds them."""
    name, folder = f"{flag} {folder}", Path(folder).expanduser().resolve()
    return folder_table(paired_images(folder, name, caption=caption), name, folder, max_train_samples)


def folder_table(examples: Sequence[Example], name: str, folder: Path, max_records: int | None) -> Table:
    from datasets import Dataset

    examples = examples[:max_records]
    columns = {"target": [example.target for example in examples], "caption": [example.caption for example in examples]}
    is_paired = examples[0].reference is not None
    if is_paired:
        columns["reference"] = [example.reference for example in examples]
    for key in ("target", "reference")[: 1 + is_paired]:  # for the fingerprint
        columns[f"{key}_stat"] = [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, columns[key])]
    record = Columns("target", "caption", "reference" if is_paired else None)
    return Table(Dataset.from_dict(columns), record, range(len(examples)), name=name, folders=[folder])


def check_images(source: Table, *, skip_broken_images: bool) -> list[tuple[int, int]]:
    """Reads the header of each image that is a file: a broken one is an error before a model is loaded, or with
    `skip_broken_images` counted in a warning. Returns the sides of the targets, of records that are not broken."""
    sizes, broken = [], []
    for index in range(len(source)):
        try:
            sizes += [image_size(image, source.folders) for image in source.record(index).files][:1]
        except BrokenImage as error:
            broken.append(str(error))
            if not skip_broken_images:
                raise UserError(
                    f"{source.name} has a broken image: {error}; mend or remove it, or pass --skip_broken_images"
                ) from error
    if broken:
        logger.warning(f"{source.name} has {len(broken)} broken images, which are left out: {broken[0]}")
    return sizes


def make_source(
    dataset,
    columns: Columns,
    *,
    name: str,
    folders: Sequence[Path],
    remedy: str,
    max_records=None,
    shuffle_buffer_size=1000,
) -> Table | Stream:
    """A data set as a source, after checking what can be checked without reading an image. `name` is what errors call
    it, `remedy` the flags that they advise where a column is missing."""
    from datasets import Dataset

    # Some streams don't say which columns there are
    readers.check_columns(dataset.column_names or first_row(dataset, name), columns.names, name, remedy)
    dataset = undecoded(dataset, columns)
    first_row(dataset, name)
    if not isinstance(dataset, Dataset):
        limits = {"max_records": max_records, "shuffle_buffer_size": shuffle_buffer_size}
        return Stream(dataset, columns, name=name, folders=folders, **limits)
    rows = range(len(dataset)) if columns.label is None else decided_rows(dataset, columns.label, name)
    num_ties = len(dataset) - len(rows)
    if len(rows) == 0:
        raise only_ties(name, num_ties)
    table = Table(dataset, columns, rows[:max_records], name=name, folders=folders, num_ties=num_ties)
    table.captions()  # a caption that is no string is an error now, not when it is trained on
    return table


def first_row(dataset, name: str) -> dict:
    with readers.one_line_errors(name):
        row = next(iter(dataset), None)
    if row is None:
        raise UserError(f"{name} is empty; pass one that has rows")
    return row


def undecoded(dataset, columns: Columns):
    """The data set with these columns alone, its images as they are stored."""
    import datasets

    if dataset.features is None:  # of some streams; they hold no image features
        return dataset
    if isinstance(dataset, datasets.IterableDataset):  # those of the hub may decode in threads, before any cast
        dataset = dataset.decode(False)
    dataset = dataset.select_columns(list(dict.fromkeys(columns.names)))
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def decided_rows(dataset, label_column: str, name: str) -> np.ndarray:
    """The rows that are no ties, by the label column alone."""
    labels, where = enumerate(dataset[label_column][:]), f"{name}: '{label_column}'"
    rows = [row for row, label in labels if index_of_target(label, f"{readers.describe(row)} of {where}") is not None]
    return np.array(rows, dtype=np.int64)
