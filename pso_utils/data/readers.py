"""Data sets and folders of images, as --dataset_name and the folder flags name them: the one way in for the scripts and
for the evaluation."""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from pso_utils.data.images import FORMATS as IMAGE_FORMATS
from pso_utils.errors import UserError


FORMATS = {f".{name}": name for name in ("parquet", "arrow", "json", "csv")} | {".jsonl": "json", ".tar": "webdataset"}


def open_dataset(
    dataset_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
):
    """A `datasets.Dataset`, or with `streaming` an `IterableDataset`: a data set of the hub, a folder, a folder of
    `save_to_disk` (which is memory-mapped, and so a `Dataset` even with `streaming`), a file or a pattern of files.

    Raises:
        UserError: it is nowhere, of no known format, has no such split, or cannot be read.
    """
    name, path = f"--dataset_name {dataset_name}", Path(dataset_name).expanduser()
    settings = {"split": split, "streaming": streaming, "cache_dir": cache_dir, "num_workers": num_workers}
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return open_saved_dataset(path, name, split)
        return read_dataset(str(path), name, config_name=config_name, **settings)
    if files := matching_files(dataset_name):
        formats = {FORMATS.get(Path(file).suffix.lower()) for file in files}
        if len(formats) != 1 or None in formats:
            known = ", ".join(FORMATS)
            raise UserError(f"{name} has files of unlike formats, or of an unknown one; pass one of {known}")
        return read_dataset(formats.pop(), name, data_files=files, **settings)
    if is_local(dataset_name):
        raise UserError(f"{name} does not exist; pass a file, a folder, a pattern of files or a data set of the hub")
    return read_dataset(dataset_name, name, config_name=config_name, **settings)


def row_folders(folder: Path | None, cache_dir: str | None = None) -> list[Path]:
    """Where the paths in a data set's rows may lead: into its own folder, in which relative ones start, and to where
    `datasets` keeps what it downloads and unpacks."""
    from datasets.config import DOWNLOADED_DATASETS_PATH  # imported here, as everywhere, because it takes seconds

    downloads = Path(cache_dir, "downloads").expanduser() if cache_dir else Path(DOWNLOADED_DATASETS_PATH)
    return [*([] if folder is None else [folder]), downloads, Path(HF_HUB_CACHE)]


def dataset_folder(dataset_name: str) -> Path | None:
    """A local data set's own folder; None for one of the hub."""
    path = Path(dataset_name).expanduser()
    if path.is_dir():
        return path
    return path.parent if matching_files(dataset_name) else None


def is_local(dataset_name: str) -> bool:
    """Whether this names a file or folder rather than a data set of the hub."""
    path = Path(dataset_name)
    return path.is_absolute() or path.suffix.lower() in FORMATS or bool(re.match(r"[.~]|.*[*?[]", dataset_name))


def matching_files(dataset_name: str) -> list[str]:
    """The file, or the files of a pattern such as folder/*.parquet; none for a folder or a name of the hub."""
    path = Path(dataset_name).expanduser()
    if any(character in path.name for character in "*?["):
        return [str(file) for file in sorted(path.parent.glob(path.name)) if file.is_file()]
    return [str(path)] if path.is_file() else []


def open_saved_dataset(path: Path, name: str, split: str):
    from datasets import load_from_disk

    with one_line_errors(name):
        dataset = load_from_disk(str(path))
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise UserError(f"{name} has no split '{split}'; pass --dataset_split, one of {sorted(dataset)}")
    return dataset[split]


def read_dataset(location: str, name: str, *, split: str, config_name=None, streaming=False, num_workers=0, **settings):
    """`datasets.load_dataset` of one split; `name` is what its errors call the source."""
    from datasets import load_dataset

    num_proc = num_workers if num_workers and not streaming else None
    with one_line_errors(name, detail=f" (--dataset_split {split})"):
        return load_dataset(location, config_name, split=split, streaming=streaming, num_proc=num_proc, **settings)


@contextmanager
def one_line_errors(name: str, *, detail: str = "", remedy: str = ""):
    """Turns what `datasets` raises in the block into a `UserError`."""
    try:
        yield
    except Exception as error:  # datasets raises a dozen unrelated classes for a source that it cannot read
        # the second is pyarrow's for a Parquet file of no rows
        if re.search("corresponds to no data|BatchSize must be greater than 0", f"{error} {reason(error)}"):
            raise UserError(f"{name} is empty, or has a file that is; pass one that has rows") from error
        raise UserError(f"cannot read {name}{detail}: {reason(error)}{remedy}") from error


def reason(error: BaseException) -> str:
    """The first cause of an error, on one line; what datasets raises in the end often says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or type(error).__name__


def check_columns(existing: Iterable[str], columns: Iterable[str], name: str, remedy: str) -> None:
    """Raises a `UserError` if one of the columns does not exist; `remedy` names the flags to pass instead."""
    for column in columns:
        if column not in existing:
            raise UserError(f"{name} has no column '{column}'; pass {remedy}, of {sorted(existing)}")


def read_captions(dataset, column: str, rows: Sequence[int], name: str) -> list[str]:
    """The captions of some rows of a `datasets.Dataset`, of which no other column is read; a `UserError` if one is no
    string."""
    return [check_caption(text, f"{describe(row)} of {name}") for row, text in zip(rows, dataset[column][rows])]


def check_caption(caption, where: str) -> str:
    if isinstance(caption, bytes):  # of a WebDataset
        caption = caption.decode("utf-8", errors="replace")
    if not isinstance(caption, str):
        raise UserError(f"{where} has a caption that is no string: {caption!r}; pass another --caption_column")
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a character that UTF-16 writes as two: JSON can say it, tokenizers cannot
        raise UserError(f"{where} has a caption with half a character: {caption!r}; mend it") from None
    return caption


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise UserError(f"{where} is not valid JSON: {error}") from None


def describe(record_id: str | int) -> str:
    """The row of a record's id, for messages."""
    shard, _, row = str(record_id).rpartition("-")
    return f"row {row} (counted from 0)" + (f" of shard {shard}" if shard else "")


# ---- Folders of images ----


def open_image_folder(folder: Path, name: str, *, split: str = "train", **settings):
    """A folder in imagefolder layout: images, and a metadata.jsonl (or .csv, .parquet) with their `file_name` and
    captions. `settings` are those of `open_dataset`."""
    # All files by pattern: left to itself, `datasets` takes an image called train.png for the whole training split
    return read_dataset("imagefolder", name, data_files={split: str(folder / "**")}, split=split, **settings)


def has_metadata(folder: Path) -> bool:
    """Whether the folder says its images' captions in a file of imagefolder's."""
    return any(next(folder.rglob(f"metadata.{suffix}"), None) for suffix in ("jsonl", "csv", "parquet"))


def check_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{name} is not a folder; pass a folder with images")


def image_files(paths: Iterable[Path]) -> list[str]:
    """Those of the paths that are files with an image's suffix, sorted."""
    suffixes = {suffix for suffix, format_name in Image.registered_extensions().items() if format_name in IMAGE_FORMATS}
    return [str(path) for path in sorted(paths) if path.suffix.lower() in suffixes and path.is_file()]


def images_of_folder(folder: Path, name: str, *, is_flat: bool = True) -> list[str]:
    """The image files in a folder, with its subfolders unless `is_flat`, sorted by name; a `UserError` if there are
    none."""
    check_folder(folder, name)
    files = image_files(folder.iterdir() if is_flat else folder.rglob("*"))
    if not files:
        raise UserError(f"{name} has no images in it; pass a folder with .png, .jpg or other image files")
    return files
