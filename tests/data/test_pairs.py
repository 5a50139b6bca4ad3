"""Records from every kind of source."""

import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
from pair_sources import (
    LABELS,
    LOST,
    WON,
    captions_of,
    flat,
    ids,
    load_pairs,
    make_loader,
    pickapic_row,
    pixels,
    png,
    read,
    rejects,
    write_image_folder,
    write_pickapic,
)

from pso_utils.data.pairs import Columns, Table, load_image_folder, load_images, make_source


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory) -> Path:
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "pickapic")


@pytest.fixture
def load(tmp_path):
    """`load_preference_pairs` with a cache of its own."""
    return partial(load_pairs, tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_pickapics_schema_is_read_and_the_winner_is_the_target(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    minibatches = read(make_loader(source))
    assert len(ids(minibatches)) == len(set(ids(minibatches))) == 18 and source.num_ties == 6
    for microbatch in flat(minibatches):
        red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
        assert torch.equal(microbatch.target_pixels, red.view(3, 1, 1).expand_as(microbatch.target_pixels))
        assert torch.equal(microbatch.reference_pixels, blue.view(3, 1, 1).expand_as(microbatch.reference_pixels))
        for caption, (height, width) in zip(microbatch.captions, microbatch.original_sizes.tolist()):
            number = int(caption.split()[1])
            assert LABELS[number % 8] != 0.5
            assert (width, height) == ((12, 8 + number % 5) if LABELS[number % 8] == 1 else (9, 16))


def test_ids_are_rows_of_the_source_whatever_the_order(pickapic, load):
    table, stream = load(pickapic), load(pickapic, streaming=True)
    for epoch in range(2):
        for microbatch in flat(read(make_loader(table), epoch)):
            assert microbatch.captions == [f"caption {record_id}" for record_id in microbatch.ids]
        for microbatch in flat(read(make_loader(stream), epoch)):
            numbers = [tuple(map(int, record_id.split("-"))) for record_id in microbatch.ids]
            assert microbatch.captions == [f"caption {8 * shard + row}" for shard, row in numbers]
    kept = [number for number in range(24) if LABELS[number % 8] != 0.5]
    assert table.captions() == [f"caption {number}" for number in kept] and table.ids() == list(map(str, kept))
    assert table.ids([3, 1]) == [str(kept[3]), str(kept[1])] and table.ids([]) == table.captions([]) == []
    assert table.captions([3, 1]) == [f"caption {kept[3]}", f"caption {kept[1]}"]


def test_every_file_format_gives_the_same_pairs(pickapic, load, tmp_path):
    rows = [pickapic_row(number, label) for number, label in enumerate(LABELS)]
    expected = {f"caption {number}" for number, label in enumerate(LABELS) if label != 0.5}
    names = ["jpg_0", "jpg_1", "caption", "label_0"]
    dataset = Dataset.from_list([{name: row[name] for name in names} for row in rows])
    images = dataset.cast(Features(jpg_0=Image(), jpg_1=Image(), caption=Value("string"), label_0=Value("float64")))

    images.to_parquet(tmp_path / "images.parquet")
    parquet = pickapic / "train-00000-of-00003.parquet"
    sources = [
        tmp_path / "images.parquet",
        parquet,
        pickapic / "train-00000*.parquet",
    ]
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=images).save_to_disk(tmp_path / "saved_splits")
    sources += [tmp_path / "saved", tmp_path / "saved_splits", *(tmp_path / "saved").glob("*.arrow")]

    files = tmp_path / "files"
    files.mkdir()
    for row in rows:
        for name in names[:2]:
            (files / f"{row['caption']} {name}.png").write_bytes(row[name])
    listed = [{**row, **{name: f"{row['caption']} {name}.png" for name in names[:2]}} for row in rows]
    listed = Dataset.from_list([{name: row[name] for name in names} for row in listed])  # paths beside the file
    listed.to_json(files / "pairs.jsonl")
    listed.to_csv(files / "pairs.csv")
    sources += [files / "pairs.jsonl", files / "pairs.csv"]

    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number, row in enumerate(rows):
            for name in names:
                data = row[name] if isinstance(row[name], bytes) else str(row[name]).encode()
                member = tarfile.TarInfo(f"{number:03d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    sources += [tmp_path / "pairs.tar"]

    first = None
    for path in sources:
        for streaming in [False, True]:
            source = load(path, streaming=streaming)
            minibatches = read(make_loader(source, center_crop=True))
            captions = captions_of(minibatches)
            assert sorted(captions) == sorted(expected) and source.num_ties == 2, path
            sizes = torch.cat([microbatch.original_sizes for microbatch in flat(minibatches)]).tolist()
            found = dict(zip(captions, sizes))
            first = first or found
            assert found == first, path


def test_named_winner_and_loser_columns_need_no_label(load, tmp_path):
    rows = [{"good": png(WON), "bad": png(LOST), "text": "a"}, {"good": png(WON), "bad": png(LOST), "text": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = {"winner_column": "good", "loser_column": "bad", "caption_column": "text"}
    for streaming in [False, True]:
        (minibatch,) = read(make_loader(load(tmp_path / "pairs.parquet", streaming=streaming, **columns)))
        assert pixels([minibatch])[:, :, :, 0, 0].unique(dim=1).squeeze(1).tolist() == [[1, -1, -1], [-1, -1, 1]]


def test_unlabelled_rows_are_dropped_as_ties(load, tmp_path):
    rows = [pickapic_row(number, 1) for number in range(3)]
    rows[1]["label_0"], rows[2]["label_0"] = None, math.nan
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for streaming in [False, True]:
        source = load(tmp_path / "pairs.parquet", streaming=streaming)
        assert len(ids(read(make_loader(source)))) == 1 and source.num_ties == 2


def test_the_first_records_of_a_stream_are_as_they_are_stored(pickapic, load):
    kept = [number for number in range(24) if LABELS[number % 8] != 0.5]
    for limit in [None, 5]:
        records = load(pickapic, streaming=True, max_train_samples=limit).first(10)
        assert [record.caption for record in records] == [f"caption {number}" for number in kept[: limit or 10]]


def test_max_train_samples_keeps_the_first_pairs(pickapic, load):
    for streaming in [False, True]:
        loader = make_loader(load(pickapic, streaming=streaming, max_train_samples=10))
        for epoch in range(2):
            captions = captions_of(read(loader, epoch))
            kept = [number for number in range(24) if LABELS[number % 8] != 0.5][:10]
            assert sorted(captions) == sorted(f"caption {number}" for number in kept)


def train_images(folder, **settings) -> Table:
    return load_image_folder(str(folder), flag="--train_data_dir", **settings)


def instance_images(folder, caption: str = "a cat") -> Table:
    return load_image_folder(str(folder), flag="--instance_data_dir", caption=caption, is_flat=True)


@pytest.mark.parametrize("metadata", ["jsonl", "csv", "parquet"])
def test_image_folders_have_captions_and_no_reference(tmp_path, metadata):
    folder = str(write_image_folder(tmp_path / "images", metadata))
    cache = {"cache_dir": str(tmp_path / "cache")}
    for source in (
        train_images(folder, **cache),
        *(load_images(folder, streaming=each, **cache) for each in (False, True)),
    ):
        values = {}
        for microbatch in flat(read(make_loader(source))):
            assert microbatch.reference_pixels is None
            red = ((microbatch.target_pixels[:, 0, 0, 0] + 1) * 127.5).round()
            values |= dict(zip(microbatch.captions, red.tolist()))
        assert values == {"drawing c": 0, "drawing a": 1, "drawing b": 2}


def test_instance_images_are_sorted_by_name_and_share_a_caption(tmp_path):
    folder = write_image_folder(tmp_path / "cat", metadata=None)
    (folder / "notes.txt").write_text("no image")
    source = instance_images(folder, "a photo of sks cat")
    records = [source.record(index) for index in range(len(source))]
    assert [Path(record.target).name for record in records] == ["a.png", "b.png", "c.png"]
    assert [record.id for record in records] == ["0", "1", "2"]
    assert {record.caption for record in records} == {"a photo of sks cat"}
    assert sorted(ids(read(make_loader(source)))) == ["0", "1", "2"]


def test_instance_images_are_found_from_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    write_image_folder(tmp_path / "photos" / "cat", metadata=None)
    monkeypatch.chdir(tmp_path)
    source = instance_images("photos/cat", "a photo of sks cat")
    assert sorted(ids(read(make_loader(source)))) == ["0", "1", "2"]


def test_a_stream_that_decodes_ahead_of_its_reader_still_gives_stored_images(tmp_path):
    """As `datasets` opens a WebDataset of the hub: a broken image would break off the stream."""
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, data in enumerate([png(), png()[:40], png()]):
            for name, content in [("png", data), ("txt", b"a drawing")]:
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    dataset = load_dataset("webdataset", data_files=[str(tmp_path / "images.tar")], split="train", streaming=True)
    columns, settings = Columns("png", "txt"), {"name": "a stream", "folders": [tmp_path], "remedy": "others"}
    source = make_source(dataset.decode(num_threads=2), columns, **settings)
    microbatches = flat(read(make_loader(source, skip_broken_images=True)))
    assert sum(microbatch.num_broken for microbatch in microbatches) == 1
    assert [caption for microbatch in microbatches for caption in microbatch.captions] == ["a drawing"] * 2


# ---- The fingerprint ----


def test_a_rewritten_file_has_another_fingerprint(load, tmp_path):
    def write(labels):
        rows = [pickapic_row(number, label) for number, label in enumerate(labels)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")

    write([1, 1, 0])
    settings = [{}, {"max_train_samples": 2}, {"winner_column": "jpg_0", "loser_column": "jpg_1"}]
    settings += [{"winner_column": "jpg_1", "loser_column": "jpg_0"}]
    before = [load(tmp_path / "pairs.parquet", **values).fingerprint for values in settings]
    assert before == [load(tmp_path / "pairs.parquet", **values).fingerprint for values in settings]
    write([1, 0, 1])
    after = [load(tmp_path / "pairs.parquet", **values).fingerprint for values in settings]
    assert len(set(before + after)) == 8


def test_a_saved_data_set_of_other_rows_has_another_fingerprint(load, tmp_path):
    fingerprints = []
    for rows in ([1, 0], [1, 0], [0, 1]):
        Dataset.from_list([pickapic_row(n, label) for n, label in enumerate(rows)]).save_to_disk(tmp_path / "saved")
        fingerprints.append(load(tmp_path / "saved").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("load", [train_images, load_images], ids=["train_data_dir", "dataset_name"])
def test_a_folder_with_an_overwritten_image_has_another_fingerprint(tmp_path, load):
    folder = write_image_folder(tmp_path / "images")

    def fingerprint():
        return load(str(folder), cache_dir=str(tmp_path / "cache")).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (folder / "a.png").write_bytes(png(WON))
    assert fingerprint() != before


def test_the_fingerprint_of_instance_images_has_their_names_sizes_and_times(tmp_path):
    folder = write_image_folder(tmp_path / "cat", metadata=None)
    fingerprints = [instance_images(folder).fingerprint]
    assert instance_images(folder).fingerprint == fingerprints[0]
    stat = (folder / "a.png").stat()
    (folder / "a.png").rename(folder / "d.png")
    fingerprints.append(instance_images(folder).fingerprint)
    (folder / "d.png").write_bytes(png(size=(80, 60)))
    os.utime(folder / "d.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fingerprints.append(instance_images(folder).fingerprint)
    os.utime(folder / "d.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    fingerprints.append(instance_images(folder).fingerprint)
    assert len(set(fingerprints)) == 4


def test_another_process_finds_the_same_fingerprints(pickapic, load, tmp_path):
    folder = write_image_folder(tmp_path / "cat", metadata=None)
    program = "import sys; from pso_utils.data.pairs import load_image_folder, load_preference_pairs\n"
    program += "print(load_preference_pairs(sys.argv[1], cache_dir=sys.argv[2]).fingerprint)\n"
    program += "print(load_image_folder(sys.argv[3], flag='--dir', caption='a cat', is_flat=True).fingerprint)\n"
    arguments = [str(pickapic), str(tmp_path / "another cache"), str(folder)]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    ours = [load(pickapic).fingerprint, instance_images(folder).fingerprint]
    assert result.stdout.split() == ours


# ---- Errors ----


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named_with_those_there_are(pickapic, load, streaming):
    with rejects("no column 'text'; pass --winner_column .*'caption', .*'jpg_0'"):
        load(pickapic, caption_column="text", streaming=streaming)
    with rejects("no column 'good'; pass --winner_column and --loser_column"):
        load(pickapic, winner_column="good", loser_column="bad", streaming=streaming)
    with rejects("pass --winner_column and --loser_column together"):
        load(pickapic, winner_column="jpg_0", streaming=streaming)
    with rejects("no column 'image'; pass --image_column and --caption_column, of "):
        load_images(dataset_name=str(pickapic / "train-00000-of-00003.parquet"), streaming=True)


def with_rows(folder: Path, **values) -> Path:
    """Three good pairs, the second with `values` in place of its own."""
    rows = [pickapic_row(number, 1) for number in range(3)]
    for name, value in values.items():
        for row in rows:
            row[name] = type(value)(row[name]) if value is not None else row[name]
        rows[1][name] = value
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("label", [0.7, 2, -1, "left"])
def test_a_bad_label_is_an_error_with_its_row(load, tmp_path, label):
    folder = with_rows(tmp_path / "a", label_0=label)
    message = rf"row 1 \(counted from 0\).*'label_0' is {re.escape(repr(label))}; a label is 1 .*--winner_column"
    with rejects(message):
        load(folder)
    with rejects(message):
        read(make_loader(load(folder, streaming=True)))


def test_a_caption_that_is_no_string_is_an_error_with_its_row(load, tmp_path):
    folder = with_rows(tmp_path / "a", caption=None)
    message = r"row 1 \(counted from 0\).* has a caption that is no string: None; pass another --caption_column"
    with rejects(message):
        load(folder)
    with rejects(message):
        read(make_loader(load(folder, streaming=True)))


def test_nothing_but_ties_is_an_error(load, tmp_path):
    folder = write_pickapic(tmp_path / "ties", num_shards=2, labels=[0.5])
    with rejects("is empty after dropping 16 ties"):
        load(folder)
    for use in [lambda source: read(make_loader(source)), lambda source: source.first(4)]:
        with rejects("is empty after dropping 16 ties"):
            use(load(folder, streaming=True))


def test_a_stream_that_breaks_off_names_its_shard(load, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"jpg_0": "a", "jpg_1": "b", "label_0": 1, "caption": "c"}) + "\n")
    (tmp_path / "b.jsonl").write_text("{no json\n")
    with rejects("cannot read .*shard 1 of --dataset_name .*jsonl|cannot read on after 0 rows of shard 1 .*jsonl"):
        read(make_loader(load(tmp_path / "*.jsonl", streaming=True), skip_broken_images=True))


def test_image_folders_without_captions_or_images_are_a_clear_error(tmp_path):
    with rejects("bare has 3 images and no captions, as of a.png: write a.txt beside it, or pass --instance_prompt"):
        train_images(str(write_image_folder(tmp_path / "bare", metadata=None)))
    with rejects("--train_data_dir .*nowhere is not a folder"):
        train_images(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with rejects("--train_data_dir .*empty has no images in it"):
        train_images(str(tmp_path / "empty"))
    folder = write_image_folder(tmp_path / "named", caption="description")
    with rejects(r"no column 'text'; pass --caption_column, of \['description', 'image'\]"):
        train_images(str(folder), cache_dir=str(tmp_path / "cache"))
    with rejects("--instance_data_dir .*empty has no images in it"):
        instance_images(tmp_path / "empty")
    with rejects("--instance_data_dir .*nowhere is not a folder"):
        instance_images(tmp_path / "nowhere")


def test_images_without_a_caption_are_counted_in_a_warning(tmp_path, caplog):
    folder = write_image_folder(tmp_path / "images")
    train_images(str(folder), cache_dir=str(tmp_path / "cache"))
    assert not caplog.records
    (folder / "d.png").write_bytes(png())
    assert len(train_images(str(folder), cache_dir=str(tmp_path / "cache"))) == 3
    assert "has 4 images, of which only 3 have a caption" in caplog.text
