"""The model's own images for targets without a reference: what is drawn, when, and as which latents."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pso_utils.data.references import ReferenceLatents, References
from pso_utils.families.sdxl import SDXL
from tests.conftest import build_pipeline


CAPTIONS = [f"caption {number}" for number in range(5)]


def process(index: int = 0, count: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=count, process_index=index, is_main_process=index == 0, wait_for_everyone=lambda: None
    )


@pytest.fixture
def make(tmp_path):
    """A function that makes references of 16 px noise, whose `drawn` lists the batches of (caption, seed)."""

    def build(accelerator=None, captions=CAPTIONS, settings=None, seed=0) -> References:
        def draw(captions, seeds):
            references.drawn.append(list(zip(captions, seeds)))
            return [
                Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)) for seed in seeds
            ]

        references = References(
            accelerator or process(), tmp_path / "references", captions, draw, settings=settings or {}, seed=seed,
            batch_size=2,
        )  # fmt: skip
        references.drawn = []
        return references

    return build


def drawn_captions(references: References) -> list[list[str]]:
    return [[caption for caption, _ in batch] for batch in references.drawn]


def test_each_caption_has_an_image_and_a_line_and_they_are_drawn_once(make):
    references, counts = make(), []
    references.refresh(0, counts.append)
    assert drawn_captions(references) == [CAPTIONS[0:2], CAPTIONS[2:4], CAPTIONS[4:]]
    assert sum(counts) == 5
    lines = [json.loads(line) for line in (references.folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == CAPTIONS
    assert all(Image.open(references.folder / line["file_name"]).size == (16, 16) for line in lines)
    again, counts = make(), []
    again.refresh(0, counts.append)
    assert again.drawn == [] and sum(counts) == 5


def test_what_is_missing_is_drawn_in_the_same_batches(make):
    whole = make()
    whole.refresh(0)
    images = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    (whole.folder / "000003.png").unlink()
    again = make()
    again.refresh(0)
    assert again.drawn == whole.drawn[1:2]
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == images


@pytest.mark.parametrize("change", [{"captions": ["other"] * 5}, {"settings": {"vae": "other"}}, {"seed": 1}], ids=str)
def test_other_captions_settings_or_seeds_are_drawn_anew(make, change):
    make().refresh(0)
    other = make(**change)
    other.refresh(0)
    assert len(other.drawn) == 3


def test_every_image_of_every_refresh_has_a_noise_of_its_own(make):
    references = make(captions=CAPTIONS[:2], seed=3)
    for step in range(50):
        references.refresh(step)
    assert len({seed for batch in references.drawn for _, seed in batch}) == 100


def test_processes_draw_a_part_each(make):
    ranks = [make(process(rank, 2)) for rank in range(2)]
    for references in ranks:
        references.refresh(0)
    assert [sum(drawn_captions(references), []) for references in ranks] == [CAPTIONS[::2], CAPTIONS[1::2]]
    assert ranks[1].pixels(range(5), [False] * 5).shape == (5, 3, 16, 16)


def test_images_of_later_steps_are_dropped(make):
    references = make()
    for step in (0, 5, 10):
        references.refresh(step)
    references.drop_after(5)
    assert sorted(path.name for path in references.root.iterdir()) == ["step-000000", "step-000005"]


# ---- Latents ----


@pytest.fixture(scope="module")
def family():
    return SDXL(build_pipeline(), vae_batch_size=1)


def test_a_reference_is_mirrored_with_its_target(make):
    references = make()
    references.refresh(0)
    plain, mirrored = references.pixels([3, 1], [False, False]), references.pixels([3, 1], [True, False])
    assert torch.equal(mirrored, torch.stack([plain[0].flip(-1), plain[1]]))
    expected = np.asarray(Image.open(references.path(3)), np.float32) / 127.5 - 1
    assert np.allclose(plain[0].permute(1, 2, 0), expected) and not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_latents_are_those_of_the_images_bit_for_bit(make, family, encoded_images, random_flip):
    references = make()
    cached = ReferenceLatents(references, family, is_cached=True, random_flip=random_flip)
    plain = ReferenceLatents(references, family, is_cached=False, random_flip=random_flip)
    indices, flipped = [4, 0, 0, 3], [random_flip, False, random_flip, False]
    latents = []
    for step in (0, 2):
        plain.refresh(step)
        assert encoded_images == []
        cached.refresh(step)
        assert encoded_images == [2, 2, 1] * (1 + random_flip)
        encoded_images.clear()
        latents.append(cached(indices, flipped))
        assert encoded_images == []
        assert torch.equal(latents[-1], plain(indices, flipped))
        encoded_images.clear()
        cached.refresh(step)
        assert encoded_images == []
    assert not torch.equal(*latents)


def test_a_run_that_is_killed_while_filling_goes_on_with_the_same_batches(make, family, encoded_images):
    references = make()
    latents = ReferenceLatents(references, family, is_cached=True, random_flip=False)
    latents.refresh(0)
    files = {path: path.read_bytes() for path in (references.folder / "latents").rglob("*.safetensors")}
    assert len(files) == 5
    sorted(files, key=lambda path: path.name)[3].unlink()
    encoded_images.clear()
    latents.refresh(0)
    assert encoded_images == [2]
    assert {path: path.read_bytes() for path in (references.folder / "latents").rglob("*.safetensors")} == files


def test_processes_encode_a_part_each_and_read_what_others_wrote(make, family, encoded_images):
    ranks = [ReferenceLatents(make(process(rank, 2)), family, is_cached=True, random_flip=True) for rank in range(2)]
    for latents in ranks:
        latents.refresh(0)
    assert sum(encoded_images) == 10
    assert torch.equal(ranks[0](range(5), [True] * 5), ranks[1](range(5), [True] * 5))


def test_references_are_those_of_their_records_or_any_of_the_class(make, family):
    images, ids = make(captions=["a"] * 6), [str(row) for row in range(10, 70, 10)]
    settings = {"is_cached": False, "random_flip": False}
    assert ReferenceLatents(images, family, record_ids=ids, **settings).indices_of(ids[::-1], epoch=0) == [
        5,
        4,
        3,
        2,
        1,
        0,
    ]
    of_the_class = ReferenceLatents(images, family, **settings)
    epochs = [of_the_class.indices_of(ids, epoch=epoch) for epoch in range(20)]
    assert set(sum(epochs, [])) == set(range(6)) and len(set(map(tuple, epochs))) == 20
    assert of_the_class.indices_of(ids[2:4], epoch=3) == epochs[3][2:4]
