"""Data sets of every kind, and what is said of those that cannot be read."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from pair_sources import load_pairs, pickapic_row, png, rejects, write_pickapic

from pso_utils.data.readers import dataset_folder, images_of_folder, is_local, one_line_errors, open_dataset


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory) -> Path:
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "pickapic")


@pytest.fixture
def load(tmp_path):
    """`load_preference_pairs` with a cache of its own."""
    return partial(load_pairs, tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_cannot_be_read_are_a_clear_error(pickapic, load, tmp_path, streaming):
    for missing in ["nowhere.parquet", "nowhere", "nowhere/*.parquet"]:
        with rejects("nowhere.* does not exist; pass a file, a folder"):
            load(tmp_path / missing, streaming=streaming)
    with rejects("cannot read --dataset_name nobody/nothing .*--dataset_split train"):
        load("nobody/nothing", streaming=streaming)
    with rejects(r"cannot read .*\(--dataset_split test\).*'train'"):
        load(pickapic, split="test", streaming=streaming)
    (tmp_path / "empty").mkdir()
    with rejects("cannot read --dataset_name .*empty.* doesn't contain any data files"):
        load(tmp_path / "empty", streaming=streaming)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing of it")
    with rejects("cannot read --dataset_name .*broken.parquet"):
        load(tmp_path / "broken.parquet", streaming=streaming)
    (tmp_path / "broken.jsonl").write_text('{"caption": ')
    with rejects("cannot read --dataset_name .*broken.jsonl"):
        load(tmp_path / "broken.jsonl", streaming=streaming)
    (tmp_path / "notes.docx").write_text("no data")
    with rejects(r"notes.docx has files of .* unknown one; pass one of .parquet, .arrow"):
        load(tmp_path / "notes.docx", streaming=streaming)
    schema = pa.Table.from_pylist([pickapic_row(0, 1)]).schema
    pq.ParquetWriter(tmp_path / "none.parquet", schema).close()
    with rejects("none.parquet is empty"):
        load(tmp_path / "none.parquet", streaming=streaming)
    DatasetDict(train=Dataset.from_list([{"a": 1}])).save_to_disk(tmp_path / "saved")
    with rejects(r"has no split 'test'; pass --dataset_split, one of \['train'\]"):
        load(tmp_path / "saved", split="test", streaming=streaming)


def test_a_data_set_is_a_table_or_a_stream(pickapic, tmp_path):
    cache_dir = str(tmp_path / "cache")
    table, stream = (open_dataset(str(pickapic), streaming=flag, cache_dir=cache_dir) for flag in (False, True))
    assert isinstance(table, Dataset) and isinstance(stream, IterableDataset)
    assert [row["caption"] for row in stream] == table["caption"][:] == [f"caption {number}" for number in range(24)]
    table.save_to_disk(tmp_path / "saved")
    assert isinstance(open_dataset(str(tmp_path / "saved"), streaming=True), Dataset)


def test_the_folder_of_a_data_set_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data", "a.jsonl").write_text("{}")
    for name in ["data", "data/a.jsonl", "data/*.jsonl"]:
        assert dataset_folder(name) == Path("data"), name
    assert dataset_folder("user/data") is None


@pytest.mark.parametrize("name", ["./a", "../a", "~/a", "/a", "a.parquet", "a/*.csv", "a/[ab]"])
def test_names_of_files_and_patterns_are_local(name):
    assert is_local(name)


@pytest.mark.parametrize("name", ["data", "user/data", "user/data-1.0"])
def test_names_of_the_hub_are_not_local(name):
    assert not is_local(name)


def test_the_first_cause_is_told_in_one_line():
    with rejects("^cannot read it, all: the cause, in two lines; mend it$"):
        with one_line_errors("it", detail=", all", remedy="; mend it"):
            raise RuntimeError("an unhelpful summary") from OSError("the cause,\nin two lines")


def test_the_images_of_a_folder_are_those_with_an_images_suffix_sorted(tmp_path):
    for name in ["b.PNG", "a.jpg", "notes.txt"]:
        (tmp_path / name).write_bytes(png())
    (tmp_path / "c.png").mkdir()
    assert images_of_folder(tmp_path, "--flag") == [str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG")]
