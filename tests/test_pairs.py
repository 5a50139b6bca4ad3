"""Pairs from every source, in an order that neither processes, nor workers, nor a resumed run change."""

import io
import json
import math
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from pso_utils.pairs import (
    PairLoader,
    contiguous_share,
    load_images,
    load_instance_images,
    load_preference_pairs,
)


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


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory) -> Path:
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "pickapic")


@pytest.fixture
def load(tmp_path):
    """`load_preference_pairs` with a cache of its own."""

    def call(dataset, **settings):
        settings = {"cache_dir": str(tmp_path / "cache"), "shuffle_buffer_size": 4, **settings}
        return load_preference_pairs(str(dataset), **settings)

    return call


def make_loader(source, **settings) -> PairLoader:
    settings = {"resolution": 8, "train_batch_size": 2, "group_size": 5, "seed": 3, "random_flip": True, **settings}
    return PairLoader(source, **settings)


def read(loader: PairLoader, epoch: int = 0, start: int = 0):
    """[(size, end, [batch, ...]), ...]"""
    return [(group.size, group.end, list(group.batches)) for group in loader.groups(epoch, start)]


def ids(groups) -> list[str]:
    return [record_id for _, _, batches in groups for batch in batches for record_id in batch.ids]


def captions_of(groups) -> list[str]:
    return [caption for _, _, batches in groups for batch in batches for caption in batch.captions]


def pixels(groups) -> torch.Tensor:
    batches = [batch for _, _, batches in groups for batch in batches]
    return torch.cat([torch.stack([batch.target_pixels, batch.reference_pixels]) for batch in batches], dim=1)


# ---- What is read ----


@pytest.mark.parametrize("streaming", [False, True])
def test_pickapics_schema_is_read_and_the_winner_is_the_target(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    groups = read(make_loader(source))
    assert len(ids(groups)) == len(set(ids(groups))) == 18 and source.num_ties == 6
    for _, _, batches in groups:
        for batch in batches:
            red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
            assert torch.equal(batch.target_pixels, red.view(3, 1, 1).expand_as(batch.target_pixels))
            assert torch.equal(batch.reference_pixels, blue.view(3, 1, 1).expand_as(batch.reference_pixels))
            for caption, (height, width) in zip(batch.captions, batch.original_sizes.tolist()):
                number = int(caption.split()[1])
                assert LABELS[number % 8] != 0.5
                assert (width, height) == ((12, 8 + number % 5) if LABELS[number % 8] == 1 else (9, 16))


def test_ids_are_places_in_the_source_whatever_the_order(pickapic, load):
    table, stream = load(pickapic), load(pickapic, streaming=True)
    for epoch in range(2):
        for _, _, batches in read(make_loader(table), epoch):
            for batch in batches:
                assert batch.captions == [f"caption {record_id}" for record_id in batch.ids]
        for _, _, batches in read(make_loader(stream), epoch):
            for batch in batches:
                places = [tuple(map(int, record_id.split("-"))) for record_id in batch.ids]
                assert batch.captions == [f"caption {8 * shard + row}" for shard, row in places]
    assert table.captions() == [f"caption {number}" for number in range(24) if LABELS[number % 8] != 0.5]


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
            batches = [batch for _, _, batches in read(make_loader(source, center_crop=True)) for batch in batches]
            captions = [caption for batch in batches for caption in batch.captions]
            assert sorted(captions) == sorted(expected) and source.num_ties == 2, path
            sizes = torch.cat([batch.original_sizes for batch in batches]).tolist()
            found = dict(zip(captions, sizes))
            first = first or found
            assert found == first, path


def test_named_winner_and_loser_columns_need_no_label(load, tmp_path):
    rows = [{"good": png(WON), "bad": png(LOST), "text": "a"}, {"good": png(WON), "bad": png(LOST), "text": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = {"winner_column": "good", "loser_column": "bad", "caption_column": "text"}
    for streaming in [False, True]:
        (group,) = read(make_loader(load(tmp_path / "pairs.parquet", streaming=streaming, **columns)))
        assert pixels([group])[:, :, :, 0, 0].unique(dim=1).squeeze(1).tolist() == [[1, -1, -1], [-1, -1, 1]]


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


@pytest.mark.parametrize("metadata", ["jsonl", "csv", "parquet"])
def test_image_folders_have_captions_and_no_reference(tmp_path, metadata):
    folder = str(write_image_folder(tmp_path / "images", metadata))
    for flag, streaming in [("train_data_dir", False), ("train_data_dir", True), ("dataset_name", False)]:
        source = load_images(**{flag: folder}, streaming=streaming, cache_dir=str(tmp_path / "cache"))
        (group,) = read(make_loader(source))
        values = {}
        for batch in group[2]:
            assert batch.reference_pixels is None
            values |= dict(zip(batch.captions, ((batch.target_pixels[:, 0, 0, 0] + 1) * 127.5).round().tolist()))
        assert values == {"drawing c": 0, "drawing a": 1, "drawing b": 2}


def test_instance_images_are_sorted_by_name_and_share_a_caption(tmp_path):
    folder = write_image_folder(tmp_path / "cat", metadata=None)
    (folder / "notes.txt").write_text("no image")
    source = load_instance_images(str(folder), caption="a photo of sks cat")
    records = [source.record(index) for index in range(len(source))]
    assert [Path(record.target).name for record in records] == ["a.png", "b.png", "c.png"]
    assert [record.id for record in records] == ["0", "1", "2"]
    assert {record.caption for record in records} == {"a photo of sks cat"}
    assert sorted(ids(read(make_loader(source)))) == ["0", "1", "2"]


def test_instance_images_are_found_from_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    write_image_folder(tmp_path / "photos" / "cat", metadata=None)
    monkeypatch.chdir(tmp_path)
    source = load_instance_images("photos/cat", caption="a photo of sks cat")
    assert sorted(ids(read(make_loader(source)))) == ["0", "1", "2"]


# ---- Order ----


@pytest.mark.parametrize("streaming", [False, True])
def test_every_epoch_has_every_record_once_in_an_order_of_its_own(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    epochs = [ids(read(make_loader(source), epoch)) for epoch in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) and max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[1] == ids(read(make_loader(load(pickapic, streaming=streaming)), 1))
    assert epochs[1] != ids(read(make_loader(source, seed=4), 1))


def test_streaming_or_not_the_same_pairs_are_seen(pickapic, load):
    captions = []
    for streaming in [False, True]:
        captions.append(sorted(captions_of(read(make_loader(load(pickapic, streaming=streaming))))))
    assert captions[0] == captions[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_groups_are_consecutive_and_the_last_may_be_smaller(pickapic, load, streaming):
    groups = read(make_loader(load(pickapic, streaming=streaming)))
    assert [(size, end) for size, end, _ in groups] == [(5, 5), (5, 10), (5, 15), (3, 18)]
    assert [[len(batch.ids) for batch in batches] for _, _, batches in groups] == [[2, 2, 1]] * 3 + [[2, 1]]


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_gives_exactly_the_rest(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    whole = read(make_loader(source), 1)
    for number, (_, end, _) in enumerate(whole):
        rest = read(make_loader(load(pickapic, streaming=streaming)), 1, start=end)
        assert [group[:2] for group in rest] == [group[:2] for group in whole[number + 1 :]]
        assert ids(rest) == ids(whole[number + 1 :])
        if rest:
            assert torch.equal(pixels(rest), pixels(whole[number + 1 :]))
    assert rest == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_processes_share_out_each_group(pickapic, load, streaming, num_processes):
    alone = read(make_loader(load(pickapic, streaming=streaming)))
    shares = [
        read(make_loader(load(pickapic, streaming=streaming), num_processes=num_processes, process_index=index))
        for index in range(num_processes)
    ]
    for number, group in enumerate(alone):
        assert all(share[number][:2] == group[:2] and share[number][2] for share in shares)  # all in step
        together = [share[number] for share in shares]
        assert ids(together) == ids([group])
        assert torch.equal(pixels(together), pixels([group]))


@pytest.mark.parametrize("num_items", [0, 1, 5, 8])
def test_shares_are_those_of_tensor_split(num_items):
    expected = [share.tolist() for share in torch.tensor_split(torch.arange(num_items), 3)]
    assert [contiguous_share(list(range(num_items)), 3, index) for index in range(3)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = (read(make_loader(source, num_workers=workers)) for workers in (0, 2))
    assert [group[:2] for group in one] == [group[:2] for group in two]
    assert ids(one) == ids(two)
    assert torch.equal(pixels(one), pixels(two))
    assert torch.equal(torch.get_rng_state(), state)  # and no global randomness is used up
    pickle.dumps(source)  # for workers that are spawned


def test_an_unread_rest_of_a_group_does_not_run_into_the_next(pickapic, load):
    loader = make_loader(load(pickapic))
    firsts = [next(group.batches).ids for group in loader.groups(0)]
    assert firsts == [batches[0].ids for _, _, batches in read(loader)]


def test_crops_differ_between_epochs_and_hold_for_both_images(load, tmp_path):
    columns, rows = np.meshgrid(np.arange(40), np.arange(20))
    file = io.BytesIO()
    PILImage.fromarray(np.stack([columns, rows, rows], -1).astype(np.uint8)).save(file, "PNG")
    row = {"jpg_0": file.getvalue(), "jpg_1": file.getvalue(), "label_0": 1.0, "caption": "a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    loader = make_loader(load(tmp_path / "pairs.parquet"), resolution=20)
    lefts = set()
    for epoch in range(12):
        ((_, _, (batch,)),) = read(loader, epoch)
        assert torch.equal(batch.target_pixels, batch.reference_pixels)
        assert batch.original_sizes.tolist() == [[20, 40]] and batch.original_sizes.dtype == torch.long
        ((top, left),) = batch.crop_top_lefts.tolist()
        corner = ((batch.target_pixels[0, 0, 0, 0] + 1) * 127.5).round().item()
        assert top == 0 and corner in (left, 39 - left)  # the image's own column, unflipped or flipped
        lefts.add((left, corner == left))
    assert len(lefts) > 4 and len({flipped for _, flipped in lefts}) == 2


# ---- Broken images ----


def write_broken(folder: Path, num_rows: int, broken: set[int]) -> Path:
    folder.mkdir()
    rows = [pickapic_row(number, 1) for number in range(num_rows)]
    for number in broken:
        rows[number]["jpg_1"] = [rows[number]["jpg_1"][:40], None][number % 2]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_an_error_with_its_row_in_one_line(load, tmp_path, streaming, num_workers):
    loader = make_loader(load(write_broken(tmp_path / "a", 6, {2}), streaming=streaming), num_workers=num_workers)
    where = r"^row 2 \(counted from 0\)" + (" of shard 0" if streaming else "") + " of --dataset_name .* broken image"
    with pytest.raises(ValueError, match=where) as error:
        read(loader)
    assert "--skip_broken_images" in str(error.value) and "\n" not in str(error.value)


def test_a_broken_or_missing_file_is_named(load, tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:40])
    for name in ["cut.png", "gone.png"]:
        row = {"jpg_0": "good.png", "jpg_1": name, "label_0": 1, "caption": "a"}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=rf"row 0 .*pairs.jsonl has a broken image: {name}: "):
            read(make_loader(load(tmp_path / "pairs.jsonl")))


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_broken_images_are_counted_and_keep_the_processes_in_step(load, tmp_path, streaming):
    source = load(write_broken(tmp_path / "a", 6, {0, 1, 2, 3, 4}), streaming=streaming)
    settings = {"skip_broken_images": True, "group_size": 2, "train_batch_size": 1}
    groups = read(make_loader(source, **settings))
    assert [group[:2] for group in groups] == [(2, 2), (2, 4), (2, 6)]
    batches = [batch for _, _, batches in groups for batch in batches]
    assert sum(batch.num_broken for batch in batches) == 5
    assert [record_id.split("-")[-1] for record_id in ids(groups)] == ["5"]
    for batch in batches:
        size = len(batch.ids)
        assert batch.target_pixels.shape == batch.reference_pixels.shape == (size, 3, 8, 8)
        assert batch.original_sizes.shape == batch.crop_top_lefts.shape == (size, 2)
        assert size + batch.num_broken == 1


# ---- Errors ----


def rejects(message: str):
    return pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$")


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_cannot_be_read_are_a_clear_error(pickapic, load, tmp_path, streaming):
    for missing in ["nowhere.parquet", "nowhere", "nowhere/*.parquet"]:
        with rejects("nowhere.* does not exist; pass a file, a folder"):
            load(tmp_path / missing, streaming=streaming)
    with rejects("cannot read --dataset_name nobody/nothing .*--dataset_split train"):
        load("nobody/nothing", streaming=streaming)
    with rejects(r"cannot read .*\(--dataset_split test\).*'train'"):
        load(pickapic, dataset_split="test", streaming=streaming)
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
        load(tmp_path / "saved", dataset_split="test", streaming=streaming)


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
    with rejects("has images and no captions: put a metadata.jsonl beside them"):
        load_images(train_data_dir=str(write_image_folder(tmp_path / "bare", metadata=None)))
    with rejects("--train_data_dir .*nowhere is not a folder"):
        load_images(train_data_dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with rejects("--train_data_dir .*empty has no images in it"):
        load_images(train_data_dir=str(tmp_path / "empty"))
    folder = write_image_folder(tmp_path / "named", caption="description")
    with rejects(r"no column 'text'; pass --image_column and --caption_column, of \['description', 'image'\]"):
        load_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    with rejects("pass either --dataset_name NAME or --train_data_dir FOLDER"):
        load_images()
    with rejects("--instance_data_dir .*empty has no images in it"):
        load_instance_images(str(tmp_path / "empty"))
    with rejects("--instance_data_dir .*nowhere is not a folder"):
        load_instance_images(str(tmp_path / "nowhere"))


def test_images_without_a_caption_are_counted_in_a_warning(tmp_path, caplog):
    folder = write_image_folder(tmp_path / "images")
    load_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert not caplog.records
    (folder / "d.png").write_bytes(png())
    assert len(load_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))) == 3
    assert "has 4 images, of which only 3 have a caption" in caplog.text


def test_an_unknown_interpolation_is_a_clear_error(pickapic, load):
    with rejects("unknown interpolation 'cubic': pass one of bilinear, bicubic, lanczos"):
        make_loader(load(pickapic), interpolation="cubic")


# ---- Memory ----


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("num_shards, row_groups", [(1, 60), (4, 15)])
def test_memory_does_not_grow_with_a_stream(load, tmp_path, num_shards, row_groups):
    """1,200 pairs of 200 kB: 240 MB in all, of which a pass may keep only the buffer and the open row groups, 26 MB.

    The rows are unlike, so that the files are as large as what they hold: a reader that keeps one whole shows. Held
    against what was taken when a tenth was read, the buffer full: the allocators keep more than they need at first.
    """
    folder = tmp_path / "large"
    folder.mkdir()
    padding = np.random.default_rng(0).bytes  # after the image's end, where Pillow does not look
    images = [{"jpg_0": png(WON) + padding(100_000), "jpg_1": png(LOST) + padding(100_000)} for _ in range(20)]
    table = pa.Table.from_pylist([{**row, "label_0": 1.0, "caption": "a"} for row in images])
    for shard in range(num_shards):
        with pq.ParquetWriter(folder / f"{shard}.parquet", table.schema, compression="none") as writer:
            for _ in range(row_groups):
                writer.write_table(table)
    loader = make_loader(load(folder, streaming=True, shuffle_buffer_size=50), group_size=16, train_batch_size=16)
    sizes, seen = [], 0
    for group in loader.groups(0):
        seen += sum(len(batch.ids) for batch in group.batches)
        sizes.append(resident_megabytes())
    assert seen == 1200
    assert max(sizes) - max(sizes[: len(sizes) // 10]) < 100, sizes[::6]
