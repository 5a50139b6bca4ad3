"""Krea-2-Turbo: which of the two models it is, its levels, its prompts and its norms."""

import json

import pytest
import torch

from pso_utils.errors import UserError
from pso_utils.families import Deployment
from pso_utils.families.krea2 import Krea2
from pso_utils.families.loading import ModelSource, load_pipeline, read_model_info
from tests.families.cases import PROMPTS
from tests.families.cases.krea2 import build
from tests.families.family_inputs import SIZE, deployed_schedule, generators, one_line, sample_deployed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("krea2")
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(folder):
    return Krea2(load_pipeline(ModelSource(str(folder))))


@pytest.mark.parametrize("is_distilled", [False, None])
def test_the_base_model_is_refused(folder, tmp_path, is_distilled):
    model_index = json.loads((folder / "model_index.json").read_text()) | {"is_distilled": is_distilled}
    (tmp_path / "model_index.json").write_text(json.dumps(model_index))
    with pytest.raises(UserError, match="pass Krea-2-Turbo$") as info:
        read_model_info(ModelSource(str(tmp_path)))
    one_line(info)


def test_the_levels_are_the_same_at_every_size(folder):
    info = read_model_info(ModelSource(str(folder)))
    expected = [1, 0.957, 0.905, 0.84, 0.76, 0.655, 0.513, 0.311]
    for side in (32, 1024):
        assert deployed_schedule(info, 8, side).columns.sigma.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_trajectory_is_the_pipelines_bit_for_bit_on_the_same_embeddings(family, folder):
    schedule = deployed_schedule(read_model_info(ModelSource(str(folder))), 3)
    conditioning = family.collate(family.encode_prompts(PROMPTS), **SIZE)
    expected = family.generate(conditioning, generators(), Deployment(3, None, None, **SIZE))
    assert torch.equal(sample_deployed(family, schedule, conditioning), expected)


def test_of_a_prompt_its_own_tokens_are_kept_alone(family):
    for prompt, row in zip(PROMPTS, family.encode_prompts(PROMPTS)):
        num_tokens = len(family.pipeline.tokenizer(prompt)["input_ids"])
        assert row["prompt_embeds"].shape == (num_tokens + 5, 3, 16)  # 5: the template's end; of three layers


def test_it_is_called_without_classifier_free_guidance(family):
    arguments = family.call_arguments(Deployment(8, None, None, **SIZE))
    settings = {"num_inference_steps": 8, "guidance_scale": 0.0, "max_sequence_length": 512}
    assert arguments == settings | SIZE
    with pytest.raises(UserError, match="--guidance_scale 1.0: .* drop the flag") as info:
        Krea2.checked_guidance(family.denoiser.config, 1.0)
    one_line(info)


def test_norms_stay_in_float32(folder):
    """As diffusers loads them, from a file of weights alone, too."""
    file = str(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for source in (ModelSource(str(folder)), ModelSource(str(folder), distilled_denoiser=file)):
        family = Krea2(load_pipeline(source, weight_dtype=torch.bfloat16))
        for name, parameter in family.denoiser.named_parameters():
            is_norm = name.split(".")[-2].startswith("norm")
            assert parameter.dtype == (torch.float32 if is_norm else torch.bfloat16), name
        conditioning = family.collate(family.encode_prompts(PROMPTS), **SIZE)
        latents = torch.zeros(2, *family.latent_shape(**SIZE))
        with torch.no_grad():
            output = family.predict(latents, torch.tensor([1000.0, 500.0]), conditioning)
        assert output.dtype == torch.float32 and output.isfinite().all()
