"""What all families share: the conditioning, where the parts are, which sizes they draw."""

import logging
import weakref

import diffusers
import numpy as np
import pytest
import torch
import transformers
from family_inputs import PROMPTS, SIZE, batch, generators, noise

from pso_utils.errors import UserError
from pso_utils.families import Conditioning, Deployment
from pso_utils.families.base import quiet_libraries
from pso_utils.families.sdxl import SDXL


# ---- Conditioning ----


def conditioning(seed: int = 0) -> Conditioning:
    """A batch of 3."""
    return Conditioning(embeds=noise(3, 5, 2, seed=seed), pooled=noise(3, 4, seed=seed + 1), ids=torch.arange(3))


def assert_equal(a: Conditioning, b: Conditioning):
    assert type(a) is type(b) is Conditioning and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0, 2]), torch.tensor([True, False, True])])
def test_rows_of_a_batch(index):
    whole = conditioning()
    rows = whole.rows(index)
    assert type(rows) is Conditioning and rows.keys() == whole.keys()
    assert all(torch.equal(rows[name], whole[name][index]) for name in whole)


def test_a_batch_is_repeated_as_a_whole_or_row_by_row():
    whole = conditioning()
    assert_equal(whole.repeat(2), whole.rows(torch.tensor([0, 1, 2, 0, 1, 2])))
    assert_equal(whole.repeat_interleave(2), whole.rows(torch.tensor([0, 0, 1, 1, 2, 2])))


def test_cat_and_stack_undo_rows():
    whole = conditioning()
    assert_equal(Conditioning.cat([whole.rows(slice(0, 1)), whole.rows(slice(1, 3))]), whole)
    del whole["ids"]  # numbers, which have no length
    singles = [Conditioning({name: tensor[row] for name, tensor in whole.items()}) for row in range(3)]
    assert_equal(Conditioning.stack(singles), whole)


def test_stack_pads_what_is_shorter_with_zeros_at_the_end():
    rows = [Conditioning(embeds=torch.ones(n, 2), mask=torch.ones(n, dtype=torch.bool)) for n in (1, 3)]
    batch = Conditioning.stack(rows)
    assert batch["embeds"].tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]
    assert batch["mask"].tolist() == [[True, False, False], [True] * 3]


def test_to_moves_and_nbytes_counts_all_tensors():
    whole = conditioning()
    assert {tensor.device.type for tensor in whole.to("meta").values()} == {"meta"}
    assert_equal(whole.to("cpu"), whole)
    assert whole.nbytes == 4 * (3 * 5 * 2 + 3 * 4) + 8 * 3


# ---- Sizes ----


@pytest.mark.parametrize("height, width", [(32, 32), (8, 64), (1024, 1032)])
def test_sizes_that_the_model_draws(height, width):
    SDXL.check_size({"block_out_channels": (16, 16, 32)}, {}, height=height, width=width)


@pytest.mark.parametrize(
    "side, num_blocks, remedy",
    [
        (0, 3, "not a multiple of 8: pass 8 or 16"),
        (4, 3, "not a multiple of 8: pass 8 or 16"),
        (-8, 3, "not a multiple of 8: pass 8 or 16"),
        (36, 3, "not a multiple of 8: pass 32 or 40"),
        (36, 5, "not a multiple of 16: pass 32 or 48"),
    ],
)
def test_a_size_that_the_model_cannot_draw_names_the_next_ones(side, num_blocks, remedy):
    for height, width in ((side, 32), (32, side)):
        with pytest.raises(UserError, match=f"--resolution {side} is {remedy}"):
            SDXL.check_size({"block_out_channels": (16,) * num_blocks}, {}, height=height, width=width)


# ---- Libraries' warnings ----


def test_libraries_are_quiet_only_within_the_context():
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in loggings]
    diffusers.utils.logging.set_verbosity_info()
    with pytest.raises(RuntimeError), quiet_libraries():
        assert [library.get_verbosity() for library in loggings] == [logging.ERROR] * 2
        raise RuntimeError
    assert [library.get_verbosity() for library in loggings] == [logging.INFO, before[1]]
    diffusers.utils.logging.set_verbosity(before[0])


# ---- Offloading ----


@pytest.fixture
def moves(pipeline, monkeypatch) -> list[tuple[str, str]]:
    """Every move of a part of `pipeline`, as (part, device type). Text encoders and VAE start on the meta device, as if
    it were the CPU beside an accelerator: there they cannot run, and moving them to the CPU brings their weights."""
    moves = []

    def watch(name, module, offloaded):
        weights = {part: (dict(part._parameters), dict(part._buffers)) for part in module.modules()}
        plain_to = module.to

        def to(device):
            moves.append((name, torch.device(device).type))
            if moves[-1][1] == "meta":
                return plain_to("meta")
            for part, (parameters, buffers) in weights.items():
                part._parameters.update(parameters)
                part._buffers.update(buffers)
            return module

        monkeypatch.setattr(module, "to", to)
        if offloaded:
            plain_to("meta")

    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        watch(name, getattr(pipeline, name), offloaded=name != "unet")
    return moves


def use_all_parts(family) -> list:
    """What text encoders, denoiser and VAE make, and all of them are used twice."""
    results = []
    for _ in range(2):
        conditioning = batch(family)
        latents = family.generate(conditioning, generators(), Deployment(2, None, None, **SIZE))
        images = [torch.tensor(np.asarray(image)) for image in family.decode_latents(latents)]
        results += [*conditioning.values(), latents, *images, family.encode_images(noise(2, 3, 32, 32))]
    return results


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def there_and_back(*names) -> list[tuple[str, str]]:
    return [(name, device) for device in ("cpu", "meta") for name in names]


@pytest.fixture
def expected(tiny_pipeline_dir, pipeline) -> list:
    """What a family makes that is on the CPU and stays there."""
    return use_all_parts(SDXL(pipeline))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # tensors on `cpu:0` say `cpu`, and those on `cuda` say `cuda:0`
def test_offloaded_parts_are_on_the_device_only_while_used(expected, pipeline, moves, device):
    family = SDXL(pipeline, device=device, offload=True)
    results = use_all_parts(family)
    assert all(map(torch.equal, results, expected))
    assert moves == [*there_and_back(*TEXT_ENCODERS), *there_and_back("vae"), *there_and_back("vae")] * 2


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_offloaded_parts_move_once_within_parts_loaded(expected, pipeline, moves, device):
    family = SDXL(pipeline, device=device, offload=True)
    with family.parts_loaded():
        assert moves == []
        assert all(map(torch.equal, use_all_parts(family), expected))
        with family.parts_loaded():
            use_all_parts(family)
        assert moves == [(name, "cpu") for name in (*TEXT_ENCODERS, "vae")]
    assert sorted(moves[3:]) == sorted((name, "meta") for name in (*TEXT_ENCODERS, "vae"))
    family.encode_prompts(PROMPTS)
    assert moves[6:] == there_and_back(*TEXT_ENCODERS)


def test_offloaded_parts_go_back_after_an_exception(pipeline, moves):
    family = SDXL(pipeline, offload=True)
    with pytest.raises(RuntimeError, match="mine"), family.parts_loaded():
        family.encode_prompts(PROMPTS)
        raise RuntimeError("mine")
    assert moves == there_and_back(*TEXT_ENCODERS)
    moves.clear()
    with pytest.raises(UserError, match="not finite"):
        family.decode_latents(torch.full((2, 4, 8, 8), float("nan")))
    assert moves == there_and_back("vae")


def test_parts_that_are_not_offloaded_stay_where_they_are(expected, pipeline, moves):
    for name in (*TEXT_ENCODERS, "vae"):
        getattr(pipeline, name).to("cpu")
    moves.clear()
    family = SDXL(pipeline)
    assert all(map(torch.equal, use_all_parts(family), expected))
    with family.parts_loaded():
        use_all_parts(family)
    assert moves == []


def test_text_encoders_that_are_freed_leave_memory_and_are_not_missed(family):
    conditioning, deployment = batch(family), Deployment(2, None, None, **SIZE)
    latents = family.generate(conditioning, generators(), deployment)
    parts = [weakref.ref(part) for part in family.text_encoders]
    assert len(parts) == 2
    family.free_text_encoders()
    assert family.text_encoders == [] and [part() for part in parts] == [None, None]
    assert torch.equal(family.generate(conditioning, generators(), deployment), latents)
    assert len(family.decode_latents(latents)) == 2
