"""Quantized bases, on the CPU; tests of a GPU are skipped where there is none."""

import pytest
import torch

from pso_utils.families import find_family
from pso_utils.families.quantize import QUANTIZATIONS, quantize
from tests.conftest import build_pipeline
from tests.families.cases import PROMPTS, find_case
from tests.families.family_inputs import noise, randomize_lora


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
LARGEST_ERROR = {"nf4": 0.15, "int8": 0.02}  # of the model's output, relative


def make_family(build, kind: str | None, device: str):
    pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    family = find_family(type(pipeline).__name__, "tiny")(pipeline, device=device)
    if kind is not None:
        quantize(family.denoiser, kind, device)
    for module in (family.denoiser, *family.text_encoders):
        module.to(device)
    return family


def predict(family) -> torch.Tensor:
    conditioning = family.collate(family.encode_prompts(PROMPTS), 32, 32)
    latents = noise(2, *family.latent_shape(32, 32)).to(family.device)
    return family.predict(latents, torch.tensor([900.0, 300.0], device=family.device), conditioning)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("build", [build_pipeline, find_case("z_image").build], ids=["sdxl", "z_image"])
def test_a_lora_is_trained_on_top_of_a_quantized_base(build, kind, device, tmp_path):
    with torch.no_grad():
        full, family = predict(make_family(build, None, device)), make_family(build, kind, device)
        base = predict(family)
    assert 0 < (base - full).norm() / full.norm() < LARGEST_ERROR[kind]
    weights = [parameter for parameter in family.denoiser.parameters() if not parameter.is_floating_point()]
    assert sum(weight.numel() for weight in weights) > 10_000

    parameters = family.add_lora(rank=2, seed=0)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    randomize_lora(family.denoiser)
    tuned = predict(family)
    gradients = torch.autograd.grad((tuned**2).mean(), parameters)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    with torch.no_grad(), family.without_lora():
        assert torch.equal(predict(family), base)  # off, it is the quantized base
    family.save_lora(tmp_path)
    loaded = make_family(build, kind, device)
    loaded.pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert torch.allclose(predict(loaded), tuned, atol=1e-5)
