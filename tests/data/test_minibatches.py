"""What the losses take: rows of targets and references with the records' own draws and prompts."""

import pytest
import torch
from pair_sources import load_pairs, make_loader, png, read, write_image_folder, write_pickapic

from pso_utils.data.images import draw_noise, draw_timestep_uniform
from pso_utils.data.latent_cache import encoded_minibatches
from pso_utils.data.minibatches import TrainingPairs
from pso_utils.data.pairs import load_image_folder
from pso_utils.data.prompt_cache import PromptCache
from pso_utils.families.sdxl import SDXL
from tests.conftest import build_pipeline


@pytest.fixture(scope="module")
def family():
    return SDXL(build_pipeline(), vae_batch_size=1)


@pytest.fixture
def loader(tmp_path):
    """Of twelve pairs with a flip, in minibatches of two, two and one."""
    source = load_pairs(tmp_path / "datasets", write_pickapic(tmp_path / "pairs", num_shards=2))
    return make_loader(source, resolution=16)


class DrawnReferences:
    """What stands in for `ReferenceLatents`: as many zeros as the record's number."""

    def indices_of(self, record_ids, *, epoch):
        return [int(record_id) for record_id in record_ids]

    def __call__(self, indices, flipped):
        return torch.stack([torch.full((4, 4, 4), float(index)) for index in indices])


def rows_of(conditioning, embed, captions: list[str]):
    expected = torch.stack([row["prompt_embeds"] for row in embed(captions)])
    assert torch.equal(conditioning["prompt_embeds"], expected)


@pytest.mark.parametrize("settings, rows", [({}, 2), ({"takes_references": False}, 1), ({"class_prompt": "a cat"}, 3)])
def test_rows_are_targets_references_and_those_again_with_the_class_prompt(family, loader, settings, rows):
    embed = PromptCache(family)
    pairs = TrainingPairs(family=family, loader=loader, embed=embed, **settings)
    latents = read(loader, 1, 5, minibatches=lambda loader, *start: encoded_minibatches(family, loader, *start))
    minibatches = list(pairs.minibatches(1, 5))
    assert [minibatch.end for minibatch in minibatches] == [10, 12]
    assert [len(microbatch.noise) for minibatch in minibatches for microbatch in minibatch.microbatches] == [2, 2, 1, 2]
    for minibatch, expected in zip(minibatches, latents, strict=True):
        for microbatch, batch in zip(minibatch.microbatches, expected.microbatches, strict=True):
            wanted = [batch.targets, batch.references, batch.references][:rows]
            assert torch.equal(microbatch.latents, torch.stack(wanted))
            draws = {"seed": loader.seed, "epoch": 1}
            assert torch.equal(microbatch.noise, draw_noise(batch.ids, batch.targets.shape[1:], **draws))
            assert torch.equal(microbatch.uniform, draw_timestep_uniform(batch.ids, **draws))
            captions = [*batch.captions * min(rows, 2), *["a cat"] * len(batch.ids) * (rows == 3)]
            rows_of(microbatch.conditioning, embed, captions)
            sizes = torch.cat([batch.original_sizes, batch.crop_top_lefts], dim=1).repeat(rows, 1)
            assert torch.equal(microbatch.conditioning["add_time_ids"][:, :4], sizes.float())


def test_targets_alone_get_the_references_that_were_drawn_for_them(family, tmp_path):
    loader = make_loader(
        load_image_folder(str(write_image_folder(tmp_path / "images")), flag="--train_data_dir"), resolution=16
    )
    pairs = TrainingPairs(family=family, loader=loader, embed=PromptCache(family), references=DrawnReferences())
    (minibatch,) = pairs.minibatches(0)
    drawn = torch.cat([microbatch.latents[1] for microbatch in minibatch.microbatches])
    (latents,) = read(loader, 0, minibatches=lambda loader, *start: encoded_minibatches(family, loader, *start))
    ids = [int(record_id) for batch in latents.microbatches for record_id in batch.ids]
    assert drawn[:, 0, 0, 0].tolist() == ids and sorted(ids) == [0, 1, 2]


def test_a_microbatch_of_broken_images_is_counted_and_left_out(family, tmp_path):
    folder = write_image_folder(tmp_path / "images")
    (folder / "a.png").write_bytes(png()[:40])
    source = load_image_folder(str(folder), flag="--train_data_dir")
    loader = make_loader(source, resolution=16, train_batch_size=1, skip_broken_images=True)
    pairs = TrainingPairs(family=family, loader=loader, embed=PromptCache(family), takes_references=False)
    (minibatch,) = pairs.minibatches(0)
    assert [len(microbatch.noise) for microbatch in minibatch.microbatches] == [1, 1]
    assert minibatch.num_broken == 1 and minibatch.end == 3
