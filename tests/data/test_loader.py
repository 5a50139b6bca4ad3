"""The order in which records are seen: neither processes, nor workers, nor a resumed run change it."""

import io
import json
import pickle
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_sources import (
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
    write_image_folder,
    write_pickapic,
)
from PIL import Image as PILImage

from pso_utils.data.loader import PairLoader, contiguous_part
from pso_utils.data.pairs import load_image_folder, load_images
from pso_utils.errors import UserError


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory) -> Path:
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "pickapic")


@pytest.fixture
def load(tmp_path):
    """`load_preference_pairs` with a cache of its own."""
    return partial(load_pairs, tmp_path / "cache")


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
def test_minibatches_are_consecutive_and_the_last_may_be_smaller(pickapic, load, streaming):
    minibatches = read(make_loader(load(pickapic, streaming=streaming)))
    assert [minibatch[:2] for minibatch in minibatches] == [(5, 5), (5, 10), (5, 15), (3, 18)]
    sizes = [[len(microbatch.ids) for microbatch in minibatch.microbatches] for minibatch in minibatches]
    assert sizes == [[2, 2, 1], [2, 2, 1], [2, 2, 1], [2, 1]]


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_gives_exactly_the_rest(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    whole = read(make_loader(source), 1)
    for number, minibatch in enumerate(whole):
        rest = read(make_loader(load(pickapic, streaming=streaming)), 1, start=minibatch.end)
        assert [minibatch[:2] for minibatch in rest] == [minibatch[:2] for minibatch in whole[number + 1 :]]
        assert ids(rest) == ids(whole[number + 1 :])
        if rest:
            assert torch.equal(pixels(rest), pixels(whole[number + 1 :]))
    assert rest == []


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_processes_share_out_each_minibatch(pickapic, load, num_processes):
    alone = read(make_loader(load(pickapic)))
    ranks = [
        read(make_loader(load(pickapic), num_processes=num_processes, process_index=index))
        for index in range(num_processes)
    ]
    for number, minibatch in enumerate(alone):
        assert all(rank[number][:2] == minibatch[:2] and rank[number].microbatches for rank in ranks)  # all in step
        together = [rank[number] for rank in ranks]
        assert ids(together) == ids([minibatch])
        assert torch.equal(pixels(together), pixels([minibatch]))


def read_in_threads(monkeypatch, num_processes: int, make, *args) -> list[list]:
    """What `read(make(index), *args)` gives on each of several processes, which here are threads that agree."""
    flags, barrier = [False] * num_processes, threading.Barrier(num_processes, timeout=60)

    def on_any_process(flag):
        flags[own.index] = flag
        barrier.wait()
        answer = any(flags)
        barrier.wait()
        return answer

    def run(index):
        own.index = index
        return read(make(index), *args)

    own = threading.local()
    monkeypatch.setattr("pso_utils.data.loader.on_any_process", on_any_process)
    with ThreadPoolExecutor(num_processes) as threads:
        return list(threads.map(run, range(num_processes)))


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_processes_share_a_stream_and_every_record_is_seen_once_resumed_too(pickapic, load, num_processes, monkeypatch):
    """Of 3 shards: with 2 processes one has twice as many, with 7 each takes every 7th record."""
    every = Counter(ids(read(make_loader(load(pickapic, streaming=True)))))

    def make(index):
        source = load(pickapic, streaming=True)
        return make_loader(source, minibatch_size=14, num_processes=num_processes, process_index=index)

    ranks = read_in_threads(monkeypatch, num_processes, make)
    assert len({len(rank) for rank in ranks}) == 1  # they are in step
    assert Counter(record for rank in ranks for record in ids(rank)) == every
    for index, rank in enumerate(ranks):
        assert all(len(ids([minibatch])) <= len(contiguous_part(range(14), num_processes, index)) for minibatch in rank)
        assert [minibatch.end for minibatch in rank] == [14 * number for number in range(1, len(rank) + 1)]
    for number, minibatch in enumerate(ranks[0]):
        rests = read_in_threads(monkeypatch, num_processes, make, 0, minibatch.end)
        assert [ids(rest) for rest in rests] == [ids(rank[number + 1 :]) for rank in ranks]
        assert [rest[-1].end for rest in rests if rest] == [rank[-1].end for rank, rest in zip(ranks, rests) if rest]


def test_a_process_reads_its_own_files_of_a_stream_alone(pickapic, load, monkeypatch):
    monkeypatch.setattr("pso_utils.data.loader.on_any_process", bool)
    source = load(pickapic, streaming=True)
    for index, own in [(0, [0, 2]), (1, [1])]:
        opened = []
        monkeypatch.setattr(source, "_records", lambda shard, rows, opened=opened: opened.append(shard) or [])
        with pytest.raises(UserError, match="is empty after dropping 0 ties"):
            read(make_loader(source, num_processes=2, process_index=index))
        assert sorted(opened) == own


def test_a_stream_of_ties_alone_is_an_error_on_all_processes_and_ties_of_one_are_none(load, tmp_path, monkeypatch):
    for name, labels in (("ties", [0.5]), ("half", [0.5, 0.5, 1, 0])):
        write_pickapic(tmp_path / name, num_shards=2, rows_per_shard=2, labels=labels)
    monkeypatch.setattr("pso_utils.data.loader.on_any_process", bool)
    sources = {name: load(tmp_path / name, streaming=True) for name in ("ties", "half")}
    with pytest.raises(UserError, match="is empty after dropping 2 ties"):
        read(make_loader(sources["ties"], num_processes=2, process_index=1))

    def make(index):
        return make_loader(sources["half"], num_processes=2, process_index=index)

    assert [len(ids(rank)) for rank in read_in_threads(monkeypatch, 2, make)] == [0, 2]


@pytest.mark.parametrize("num_items", [0, 1, 5, 8])
def test_parts_are_those_of_tensor_split(num_items):
    expected = [part.tolist() for part in torch.tensor_split(torch.arange(num_items), 3)]
    assert [contiguous_part(list(range(num_items)), 3, index) for index in range(3)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(pickapic, load, streaming):
    source = load(pickapic, streaming=streaming)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = (read(make_loader(source, num_workers=workers)) for workers in (0, 2))
    assert [minibatch[:2] for minibatch in one] == [minibatch[:2] for minibatch in two]
    assert ids(one) == ids(two)
    assert torch.equal(pixels(one), pixels(two))
    assert torch.equal(torch.get_rng_state(), state)  # and no global randomness is used up
    pickle.dumps(source)  # for workers that are spawned


def test_an_unread_rest_of_a_minibatch_does_not_run_into_the_next(pickapic, load):
    loader = make_loader(load(pickapic))
    firsts = [next(minibatch.microbatches).ids for minibatch in loader.minibatches(0)]
    assert firsts == [minibatch.microbatches[0].ids for minibatch in read(loader)]


def test_crops_differ_between_epochs_and_hold_for_both_images(load, tmp_path):
    columns, rows = np.meshgrid(np.arange(40), np.arange(20))
    file = io.BytesIO()
    PILImage.fromarray(np.stack([columns, rows, rows], -1).astype(np.uint8)).save(file, "PNG")
    row = {"jpg_0": file.getvalue(), "jpg_1": file.getvalue(), "label_0": 1.0, "caption": "a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    loader = make_loader(load(tmp_path / "pairs.parquet"), resolution=20)
    lefts = set()
    for epoch in range(12):
        (microbatch,) = flat(read(loader, epoch))
        assert torch.equal(microbatch.target_pixels, microbatch.reference_pixels)
        assert microbatch.original_sizes.tolist() == [[20, 40]] and microbatch.original_sizes.dtype == torch.long
        ((top, left),) = microbatch.crop_top_lefts.tolist()
        corner = ((microbatch.target_pixels[0, 0, 0, 0] + 1) * 127.5).round().item()
        assert top == 0 and corner in (left, 39 - left)  # the image's own column, unflipped or flipped
        lefts.add((left, corner == left))
    assert len(lefts) > 4 and len({flipped for _, flipped in lefts}) == 2


# ---- Without images ----


def read_records(*args, **settings):
    return read(*args, **settings, minibatches=PairLoader.record_minibatches)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_processes, index, start", [(1, 0, 0), (2, 0, 0), (2, 1, 5), (7, 6, 15)])
def test_records_are_dealt_out_as_pairs_are(pickapic, load, num_processes, index, *, start, streaming):
    source = load(pickapic, streaming=streaming)
    loader = make_loader(source, num_processes=num_processes, process_index=index)
    for epoch in range(2):
        pairs, records = read(loader, epoch, start), read_records(loader, epoch, start)
        assert [minibatch[:2] for minibatch in records] == [minibatch[:2] for minibatch in pairs]
        assert len(flat(pairs)) == len(flat(records))
        for pair_batch, record_batch in zip(flat(pairs), flat(records)):
            assert (record_batch.ids, record_batch.captions) == (pair_batch.ids, pair_batch.captions)
            assert record_batch.flipped.dtype == torch.bool and torch.equal(record_batch.flipped, pair_batch.flipped)


def test_records_are_dealt_out_without_reading_an_image(load, tmp_path, monkeypatch):
    source = load(write_broken(tmp_path / "a", 6, {0, 1, 2}))
    monkeypatch.setattr(source, "record", None)  # reads a row's images
    assert sorted(ids(read_records(make_loader(source)))) == list("012345")
    folder = write_image_folder(tmp_path / "cat", metadata=None)
    source = load_image_folder(str(folder), flag="--instance_data_dir", caption="a cat", is_flat=True)
    for file in folder.iterdir():
        file.unlink()
    assert captions_of(read_records(make_loader(source))) == ["a cat"] * 3


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
    with pytest.raises(UserError, match=where) as error:
        read(loader)
    assert "--skip_broken_images" in str(error.value) and "\n" not in str(error.value)


def test_a_broken_or_missing_file_is_named(load, tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:40])
    for name in ["cut.png", "gone.png"]:
        row = {"jpg_0": "good.png", "jpg_1": name, "label_0": 1, "caption": "a"}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=rf"row 0 .*pairs.jsonl has a broken image: {name}: "):
            read(make_loader(load(tmp_path / "pairs.jsonl")))


@pytest.mark.parametrize("streaming, num_workers", [(False, 0), (True, 0), (False, 1)])
def test_a_row_that_names_a_file_of_somebody_elses_ends_the_run(load, tmp_path, streaming, num_workers):
    """Also with --skip_broken_images, which would hide it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, directory in (("private.png", tmp_path), ("own.png", folder)):
        (directory / name).write_bytes(png())
    row = {"jpg_0": "own.png", "jpg_1": "../private.png", "label_0": 1, "caption": "a"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    loader = make_loader(
        load(folder / "pairs.jsonl", streaming=streaming), skip_broken_images=True, num_workers=num_workers
    )
    with pytest.raises(UserError, match="../private.png leads out of .*data: "):
        read(loader)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_zipped_folder_of_images_is_read(tmp_path, streaming):
    write_image_folder(tmp_path / "images")
    shutil.make_archive(tmp_path / "data" / "images", "zip", tmp_path / "images")
    source = load_images(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), streaming=streaming)
    assert sorted(captions_of(read(make_loader(source)))) == ["drawing a", "drawing b", "drawing c"]


@pytest.mark.parametrize("where", ["decode_image", "transform_pair"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_in_a_worker_is_no_broken_image(pickapic, load, monkeypatch, num_workers, where):
    def bug(*args, **settings):
        raise AttributeError("a bug of ours")

    monkeypatch.setattr(f"pso_utils.data.loader.{where}", bug)
    with pytest.raises(AttributeError, match="a bug of ours"):
        read(make_loader(load(pickapic), num_workers=num_workers, skip_broken_images=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_broken_images_are_counted_and_keep_the_processes_in_step(load, tmp_path, streaming):
    source = load(write_broken(tmp_path / "a", 6, {0, 1, 2, 3, 4}), streaming=streaming)
    settings = {"skip_broken_images": True, "minibatch_size": 2, "train_batch_size": 1}
    minibatches = read(make_loader(source, **settings))
    assert [minibatch[:2] for minibatch in minibatches] == [(2, 2), (2, 4), (2, 6)]
    microbatches = flat(minibatches)
    assert sum(microbatch.num_broken for microbatch in microbatches) == 5
    assert [record_id.split("-")[-1] for record_id in ids(minibatches)] == ["5"]
    for microbatch in microbatches:
        size = len(microbatch.ids)
        assert microbatch.target_pixels.shape == microbatch.reference_pixels.shape == (size, 3, 8, 8)
        assert microbatch.original_sizes.shape == microbatch.crop_top_lefts.shape == (size, 2)
        assert size + microbatch.num_broken == 1


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
    loader = make_loader(load(folder, streaming=True, shuffle_buffer_size=50), minibatch_size=16, train_batch_size=16)
    sizes, seen = [], 0
    for minibatch in loader.minibatches(0):
        seen += sum(len(microbatch.ids) for microbatch in minibatch.microbatches)
        sizes.append(resident_megabytes())
    assert seen == 1200
    assert max(sizes) - max(sizes[: len(sizes) // 10]) < 100, sizes[::6]
