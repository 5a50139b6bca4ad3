"""The latents on disk are those that the VAE makes of each record, bit for bit."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_sources import ids, load_pairs, make_loader, read, write_image_folder
from PIL import Image

from pso_utils.data import loader as loader_module
from pso_utils.data.latent_cache import LatentCache, TensorCache, encoded_minibatches
from pso_utils.data.pairs import load_image_folder
from pso_utils.families.sdxl import SDXL
from tests.conftest import build_pipeline


SIZE = {"resolution": 16, "center_crop": True}


@pytest.fixture(scope="module")
def family():
    return SDXL(build_pipeline(), vae_batch_size=1)


def process(index: int = 0, count: int = 1) -> SimpleNamespace:
    """What the cache asks of accelerate, of one of several processes that wait for nobody."""
    main = {"is_main_process": index == 0, "is_local_main_process": False}
    return SimpleNamespace(num_processes=count, process_index=index, wait_for_everyone=lambda: None, **main)


def noise_png(seed: int, size: tuple[int, int]) -> bytes:
    file, (width, height) = io.BytesIO(), size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_pairs(folder: Path, broken: tuple[int, ...] = (), first_seed: int = 0) -> Path:
    """Seven pairs of noise, of unlike sizes."""
    folder.mkdir()
    rows = []
    for number in range(7):
        images = [noise_png(first_seed + 2 * number + side, (20 + number, 24)) for side in range(2)]
        if number in broken:
            images[1] = images[1][:40]
        rows.append({"jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0, "caption": f"caption {number}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.fixture
def pairs(tmp_path):
    return load_pairs(tmp_path / "datasets", write_pairs(tmp_path / "pairs"))


def assert_same_minibatches(ours, theirs):
    assert [minibatch[:2] for minibatch in ours] == [minibatch[:2] for minibatch in theirs] and ours
    for our_minibatch, their_minibatch in zip(ours, theirs):
        for one, other in zip(our_minibatch.microbatches, their_minibatch.microbatches, strict=True):
            for name, value in other._asdict().items():
                mine = getattr(one, name)
                if isinstance(value, torch.Tensor):
                    assert mine.dtype == value.dtype and torch.equal(mine, value), name
                else:
                    assert mine == value, name


def read_both(family, cache, loader, epoch, start=0):
    cached = read(loader, epoch, start, minibatches=lambda _, epoch, start: cache.minibatches(epoch, start))
    plain = read(loader, epoch, start, minibatches=lambda loader, *rest: encoded_minibatches(family, loader, *rest))
    return cached, plain


@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_minibatches_are_those_of_the_images_bit_for_bit(
    family, pairs, tmp_path, random_flip, encoded_images, monkeypatch
):
    loader = make_loader(pairs, random_flip=random_flip, **SIZE)
    cache = LatentCache(tmp_path / "latents", process(), family, loader)
    cache.fill()
    assert sum(encoded_images) == 14 * (1 + random_flip)
    for epoch in range(2):
        assert_same_minibatches(*read_both(family, cache, loader, epoch))
    assert_same_minibatches(*read_both(family, cache, loader, 1, start=5))

    encoded_images.clear()
    for name in ("decode_image", "transform_pair"):
        monkeypatch.setattr(loader_module, name, lambda *args, **settings: pytest.fail("an image is read"))
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("an image is opened"))
    again = LatentCache(tmp_path / "latents", process(), family, loader)
    again.fill()
    records = read(loader, 0, minibatches=lambda _, epoch, start: again.minibatches(epoch, start))
    assert sorted(ids(records)) == list("0123456") and not encoded_images


def test_targets_alone_have_no_references(family, tmp_path):
    source = load_image_folder(str(write_image_folder(tmp_path / "images")), flag="--train_data_dir")
    loader = make_loader(source, **SIZE)
    cache = LatentCache(tmp_path / "latents", process(), family, loader)
    cache.fill()
    cached, plain = read_both(family, cache, loader, 0)
    assert_same_minibatches(cached, plain)
    assert cached[0].microbatches[0].references is None


def test_processes_fill_a_part_each_and_read_what_others_wrote(family, pairs, tmp_path, encoded_images):
    settings = {"num_processes": 3, "train_batch_size": 1, **SIZE}
    loaders = [make_loader(pairs, process_index=rank, **settings) for rank in range(3)]
    caches = [
        LatentCache(tmp_path / "latents", process(rank, 3), family, loader) for rank, loader in enumerate(loaders)
    ]
    for cache in caches:
        cache.fill()
    assert sum(encoded_images) == 14 * 2
    for cache, loader in zip(caches, loaders):
        assert_same_minibatches(*read_both(family, cache, loader, 0))


def test_broken_images_are_counted_as_without_the_cache(family, tmp_path):
    source = load_pairs(tmp_path / "datasets", write_pairs(tmp_path / "broken", broken=(0, 3, 4)))
    loader = make_loader(source, skip_broken_images=True, **SIZE)
    cache = LatentCache(tmp_path / "latents", process(), family, loader)
    for _ in range(2):
        cache.fill()
        for epoch in range(2):
            cached, plain = read_both(family, cache, loader, epoch)
            assert_same_minibatches(cached, plain)
            assert sum(batch.num_broken for minibatch in cached for batch in minibatch.microbatches) == 3


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_while_filling_goes_on_with_the_same_batches(
    family, pairs, tmp_path, encoded_images, monkeypatch
):
    loader = make_loader(pairs, train_batch_size=3, **SIZE)
    LatentCache(tmp_path / "whole", process(), family, loader).fill()
    whole, batches = files(tmp_path / "whole"), encoded_images.copy()
    assert batches == [6, 6, 2] * 2 and len(whole) == 1 + 14

    put, puts = TensorCache.put, []

    def put_or_die(*args):
        puts.append(1)
        if len(puts) == 6:
            raise KeyboardInterrupt
        put(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TensorCache, "put", put_or_die)
        LatentCache(tmp_path / "killed", process(), family, loader).fill()
    assert len(files(tmp_path / "killed")) == 1 + 5
    encoded_images.clear()
    LatentCache(tmp_path / "killed", process(), family, loader).fill()
    assert encoded_images == batches[1:]  # the second batch as a whole, though two of its records were there
    assert files(tmp_path / "killed") == whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cache, tensors = TensorCache(tmp_path), {"a": torch.arange(4.0), "b": torch.ones(2, 3).T}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        cache.put("key", tensors)
    assert "key" not in cache and cache.get("key") is None
    cache.put("key", tensors)
    assert "key" in cache and all(torch.equal(cache.get("key")[name], tensors[name]) for name in tensors)
    cache.put("nothing", {})
    assert "nothing" in cache and cache.get("nothing") == {}


def test_another_data_set_model_or_size_empties_the_cache(family, pairs, tmp_path, encoded_images):
    other_pairs = load_pairs(tmp_path / "datasets", write_pairs(tmp_path / "others", first_seed=100))
    other_family = SDXL(build_pipeline(seed=1))
    other_family.origin = {"pretrained_model_name_or_path": [["vae/model.safetensors", 1, 2]]}
    changes = [  # one thing at a time
        (family, pairs, {}),
        (other_family, pairs, {}),
        (other_family, other_pairs, {}),
        (other_family, other_pairs, {"resolution": 24}),
    ]
    for number, (each_family, source, size) in enumerate(changes):
        for changed in (True, False):
            encoded_images.clear()
            loader = make_loader(source, **SIZE | {"random_flip": False} | size)
            cache = LatentCache(tmp_path / "latents", process(), each_family, loader)
            cache.fill()
            assert sum(encoded_images) == 14 * changed, number
            assert len(files(tmp_path / "latents")) == 1 + 7
        assert_same_minibatches(*read_both(each_family, cache, loader, 0))
