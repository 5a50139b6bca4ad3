"""Images to latents and back, against diffusers' own pipeline and a VAE's own methods."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from family_inputs import SIZE, draw, noise, one_line, record_calls

from pso_utils.errors import UserError
from pso_utils.families import vae as vae_module
from pso_utils.families.sdxl import SDXL


MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.9, 1.1, 0.5, 2.0]
STATISTICS = [
    {},
    {"latents_mean": MEAN, "latents_std": STD},
    {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.7},
]


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        force_upcast=False,
    )
    return vae.requires_grad_(False).eval()


def decoder_input(vae, latents, batch_size: int = 2) -> torch.Tensor:
    """The latents that the VAE's decoder gets for the pipeline's."""
    calls = record_calls(vae.post_quant_conv, lambda: list(vae_module.decode(vae, latents, batch_size=batch_size)))
    return torch.cat([args[0] for args, _, _ in calls])


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("size", [SIZE, {"height": 32, "width": 64}])
def test_decoding_gives_the_pipelines_images(pipeline, statistics, size):
    pipeline.vae.register_to_config(**statistics)
    latents = draw(pipeline, output_type="latent", **size)
    expected = draw(pipeline, output_type="pil", **size)
    images = SDXL(pipeline, vae_batch_size=2).decode_latents(latents)
    assert [image.mode for image in images] == ["RGB"] * 2 and images[0].size == (size["width"], size["height"])
    assert all(map(np.array_equal, images, expected))
    for image, other in zip(SDXL(pipeline, vae_batch_size=1).decode_latents(latents), expected):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1  # batches of 1 round differently


@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_decoder_gets_the_pipelines_bits(pipeline, statistics):
    pipeline.vae.register_to_config(**statistics)
    latents = draw(pipeline, output_type="latent")
    ((args, _, _),) = record_calls(pipeline.vae.post_quant_conv, lambda: draw(pipeline))
    assert torch.equal(decoder_input(pipeline.vae, latents), args[0])


@pytest.mark.parametrize("statistics", [*STATISTICS, {"shift_factor": 0.6, "scaling_factor": 1.5}])
def test_encoding_undoes_decodings_normalisation(vae, statistics):
    vae.register_to_config(**statistics)
    pixels = noise(3, 3, 16, 24)
    expected = vae.encode(pixels).latent_dist.mode()
    latents = vae_module.encode(vae, pixels, batch_size=3)
    assert latents.dtype == torch.float32 and latents.shape == (3, 4, 8, 12)
    torch.testing.assert_close(decoder_input(vae, latents, batch_size=3), expected, rtol=1e-5, atol=1e-6)
    if statistics:
        assert not torch.allclose(latents, expected * 0.18215)


def test_shift_and_scale_are_those_of_diffusers_pipelines(vae):
    """(latents / scaling_factor) + shift_factor, as in StableDiffusion3Pipeline, whose VAEs have a shift."""
    vae.register_to_config(shift_factor=0.6, scaling_factor=1.5)
    latents = noise(2, 4, 8, 8)
    (images,) = vae_module.decode(vae, latents, batch_size=2)
    assert torch.equal(images, vae.decode(latents / 1.5 + 0.6).sample)


def test_encoding_gives_the_mode_whatever_the_generator(family):
    pixels = noise(3, 3, 32, 32).clamp(-1, 1)
    latents = family.encode_images(pixels)
    assert latents.shape == (3, 4, 8, 8) and not latents.requires_grad
    torch.manual_seed(7)
    assert torch.equal(family.encode_images(pixels), latents)
    family.vae_batch_size = 1
    torch.testing.assert_close(family.encode_images(pixels), latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size, sizes", [(1, [1, 1, 1]), (2, [2, 1]), (4, [3])])
def test_the_vae_takes_no_more_images_at_once_than_told(vae, batch_size, sizes):
    parts = list(vae_module.decode(vae, noise(3, 4, 4, 4), batch_size=batch_size))
    assert [len(part) for part in parts] == sizes
    encode = record_calls(vae.encoder, lambda: vae_module.encode(vae, noise(3, 3, 8, 8), batch_size=batch_size))
    assert [len(args[0]) for args, _, _ in encode] == sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_force_upcast_runs_the_vae_in_float32(pipeline, dtype):
    latents = draw(pipeline, output_type="latent")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(dtype)
    family = SDXL(pipeline)
    family.decode_latents(latents)
    assert pipeline.vae.dtype == torch.float32
    family.encode_images(noise(1, 3, 32, 32))
    assert pipeline.vae.dtype == torch.float32


def test_without_force_upcast_the_vae_keeps_its_dtype(vae):
    vae.to(torch.bfloat16)
    latents = vae_module.encode(vae, noise(1, 3, 8, 8), batch_size=1)
    assert latents.dtype == torch.float32 and vae.dtype == torch.bfloat16
    (images,) = vae_module.decode(vae, latents, batch_size=1)
    assert images.dtype == vae.dtype == torch.bfloat16


def test_images_that_are_not_finite_raise_with_the_remedy(family, vae):
    latents = torch.zeros(2, 4, 8, 8)
    with torch.no_grad():
        family.pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="VAE overflows in float32: .*sdxl-vae-fp16-fix") as info:
        family.decode_latents(latents)
    one_line(info)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="latents are not finite: lower --learning_rate") as info:
        family.decode_latents(latents)
    one_line(info)


def test_latents_that_are_not_finite_raise_with_the_remedy(family):
    with torch.no_grad():
        family.pipeline.vae.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE overflows in float32: use --mixed_precision bf16 or no") as info:
        family.encode_images(torch.zeros(1, 3, 32, 32))
    one_line(info)
