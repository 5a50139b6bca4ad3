"""The LoRA that is trained: its start, its switch, its files."""

import json
import time
from copy import deepcopy
from statistics import median

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from family_inputs import batch, draw, noise, one_line, plain_pipeline, randomize_lora
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pso_utils.errors import UserError
from pso_utils.families import lora
from pso_utils.families.loading import ModelSource, empty_denoiser, load_pipeline
from pso_utils.families.sdxl import SDXL


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
OTHER_TARGETS = ["to_k", "proj_in", "ff.net.0.proj", "conv1"]


# ---- The start ----


def test_new_lora_is_the_identity_float32_and_reproducible(tiny_pipeline_dir):
    pipelines = [load_pipeline(ModelSource(tiny_pipeline_dir), weight_dtype=torch.bfloat16) for _ in range(2)]
    images = draw(pipelines[0])
    state = torch.get_rng_state()
    parameters = [SDXL(pipeline).add_lora(rank=4, seed=3) for pipeline in pipelines]
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in parameters[0]} == {torch.float32}
    assert {name.split(".")[-3] for name, p in pipelines[0].unet.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert all(map(torch.equal, *parameters))
    assert np.array_equal(draw(pipelines[0]), images)
    assert pipelines[0].unet.dtype == torch.bfloat16


def test_the_lora_starts_from_its_seed_and_without_one_from_the_global_generator(loaded_pipeline):
    starts = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0), (None, 0), (None, 1)):
        torch.manual_seed(global_seed)
        starts.append(SDXL(deepcopy(loaded_pipeline)).add_lora(rank=2, target_modules=["to_q"], seed=seed)[0])
    assert torch.equal(starts[0], starts[1])
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 4


def test_rank_alpha_and_targets_are_those_asked_for(family):
    parameters = family.add_lora(rank=3)
    config = family.denoiser.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 3, set(SDXL.lora_targets))
    assert len(parameters) == 2 * len(family.lora_layers) > 0
    assert {id(parameter) for parameter in parameters} == {
        id(parameter) for parameter in family.denoiser.parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("targets", [["to_q", "to_x"], ["o_q"], ["conv_act"]])
def test_lora_target_that_matches_nothing_or_takes_no_lora_is_an_error(family, targets):
    with pytest.raises(UserError, match=f"--lora_target_modules.* {targets[-1]}") as info:
        family.add_lora(rank=4, lora_alpha=4, target_modules=targets)
    one_line(info)


def test_lora_targets_are_checked_before_weights_are_loaded(pipeline):
    unet = empty_denoiser(SDXL, pipeline.unet.config)
    lora.check_lora_targets(unet, ["to_q", "conv_in", *OTHER_TARGETS], SDXL.lora_targets)
    with pytest.raises(UserError, match="no module to_x; use for instance to_q to_k to_v to_out.0"):
        lora.check_lora_targets(unet, ["to_x"], SDXL.lora_targets)
    assert next(unet.parameters()).is_meta


# ---- The switch ----


@pytest.fixture
def predict(family):
    """What the model makes of some latents at unlike timesteps."""
    conditioning, latents = batch(family), noise(2, 4, 8, 8)
    return lambda: family.predict(latents, torch.tensor([999, 499]), conditioning)


@pytest.mark.parametrize("targets", [None, OTHER_TARGETS])
def test_without_lora_is_the_base_bit_for_bit_and_leaves_training_undisturbed(family, predict, targets):
    base = predict()
    parameters = family.add_lora(rank=4, target_modules=targets)
    randomize_lora(family.denoiser)
    expected = torch.autograd.grad(predict().square().mean(), parameters)
    output = predict()
    with torch.no_grad(), family.without_lora():
        assert torch.equal(predict(), base)
    assert not torch.equal(output, base)
    output.square().mean().backward()
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, expected))
    assert torch.equal(predict(), output)


def test_the_lora_is_back_after_an_exception(family, predict):
    family.add_lora(rank=4)
    randomize_lora(family.denoiser)
    output = predict()
    with pytest.raises(RuntimeError), family.without_lora():
        raise RuntimeError
    assert torch.equal(predict(), output)


def test_the_switch_does_not_touch_which_parameters_require_a_gradient(family):
    parameters = family.add_lora(rank=4)
    parameters[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in family.denoiser.parameters()]
    assert 0 < sum(before) < len(before)
    with family.without_lora():
        assert [parameter.requires_grad for parameter in family.denoiser.parameters()] == before
    assert [parameter.requires_grad for parameter in family.denoiser.parameters()] == before


def test_without_lora_before_there_is_one_changes_nothing(family, predict):
    base = predict()
    with family.without_lora():
        assert torch.equal(predict(), base)


def test_switching_as_many_layers_as_sdxl_has_takes_well_under_a_millisecond():
    model = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1)}) for _ in range(560))
    layers = lora.lora_layers(inject_adapter_in_model(LoraConfig(r=1, target_modules=["to_q"]), model))
    assert len(layers) == 560
    seconds = []
    for _ in range(20):
        start = time.thread_time()  # other processes don't count
        with lora.disabled(layers):
            pass
        seconds.append(time.thread_time() - start)
    assert all(not layer.disable_adapters for layer in layers)
    assert median(seconds) < 1e-3


# ---- The files ----


@pytest.mark.parametrize("lora_alpha", [4, 2.5])
@pytest.mark.parametrize("targets", [SDXL.lora_targets, OTHER_TARGETS])
def test_saved_lora_draws_the_same_images_in_a_fresh_pipeline(tiny_pipeline_dir, tmp_path, family, lora_alpha, targets):
    family.add_lora(rank=4, lora_alpha=lora_alpha, target_modules=targets)
    base = draw(family.pipeline)
    randomize_lora(family.denoiser)
    expected = draw(family.pipeline)
    assert np.abs(expected - base).max() > 1e-3
    family.save_lora(tmp_path / "new" / "folder")
    fresh = plain_pipeline(tiny_pipeline_dir)
    fresh.load_lora_weights(str(tmp_path / "new" / "folder"))
    assert np.array_equal(draw(fresh), expected)


def test_saved_lora_file_holds_every_weight_in_float32(tmp_path, tiny_pipeline_dir):
    family = SDXL(load_pipeline(ModelSource(tiny_pipeline_dir), weight_dtype=torch.bfloat16))
    family.add_lora(rank=4, lora_alpha=8)
    randomize_lora(family.denoiser)
    family.save_lora(tmp_path)
    saved = load_file(tmp_path / WEIGHT_NAME)
    state_dict = get_peft_model_state_dict(family.denoiser)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert saved.keys() == {f"unet.{key}" for key in state_dict}
    assert all(torch.equal(saved[f"unet.{key}"], value) for key, value in state_dict.items())


def test_rank_alpha_and_targets_are_in_the_metadata(tmp_path, family):
    family.add_lora(rank=4, lora_alpha=2.5)
    family.save_lora(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHT_NAME]
    with safe_open(tmp_path / WEIGHT_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 2.5)
    assert metadata["unet.target_modules"] == sorted(SDXL.lora_targets)  # a set has another order in every process


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path, family, folder):
    (tmp_path / "file").write_text("mine")
    family.add_lora(rank=2)
    with pytest.raises(UserError, match="the LoRA cannot be written to .*; make room there") as info:
        family.save_lora(tmp_path / folder)
    assert str(tmp_path / folder) in one_line(info)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device\nmore"), OSError(28, "No space")]
)
def test_a_full_disk_is_one_clear_error(tmp_path, family, monkeypatch, error):
    def write(*arguments, **settings):
        raise error

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_lora_weights", write)
    family.add_lora(rank=2)
    with pytest.raises(UserError, match="the LoRA cannot be written to .*No space.*; make room there") as info:
        family.save_lora(tmp_path)
    one_line(info)


# ---- Resuming ----


def weights(family) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in family.denoiser.parameters() if parameter.requires_grad]


def test_loaded_lora_is_the_one_that_was_saved_and_still_the_one_that_is_trained(tmp_path, family, predict):
    parameters = family.add_lora(rank=4, seed=0)
    randomize_lora(family.denoiser)
    family.save_lora(tmp_path)
    saved, output = weights(family), predict()
    randomize_lora(family.denoiser, seed=5)
    assert not torch.equal(predict(), output)
    lora.load_lora(family.denoiser, "unet", tmp_path)
    assert all(map(torch.equal, weights(family), saved)) and torch.equal(predict(), output)
    trained = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
    assert len(trained) == len(parameters) and all(a is b for a, b in zip(trained, parameters))


def test_a_lora_that_does_not_fit_is_one_clear_error_and_changes_nothing(tmp_path, family, loaded_pipeline):
    other = SDXL(deepcopy(loaded_pipeline))
    other.add_lora(rank=2)
    other.save_lora(tmp_path)
    family.add_lora(rank=4)
    before = weights(family)
    with pytest.raises(UserError, match="a LoRA of another model; pass the base model") as info:
        lora.load_lora(family.denoiser, "unet", tmp_path)
    one_line(info)
    (tmp_path / WEIGHT_NAME).write_bytes((tmp_path / WEIGHT_NAME).read_bytes()[:-1])
    for _ in ("cut off", "missing"):
        with pytest.raises(UserError, match="not a readable .safetensors file") as info:
            lora.load_lora(family.denoiser, "unet", tmp_path)
        one_line(info)
        (tmp_path / WEIGHT_NAME).unlink(missing_ok=True)
    assert all(map(torch.equal, weights(family), before))


# ---- A LoRA to go on from ----


def test_a_loras_file_says_rank_alpha_and_layers(family, tmp_path):
    family.add_lora(rank=3, lora_alpha=5, target_modules=["to_q", "to_v"])
    family.save_lora(tmp_path / "own")
    for source in (tmp_path / "own", tmp_path / "own" / "pytorch_lora_weights.safetensors"):
        path = lora.lora_file(str(source))
        assert lora.read_lora_settings(path, part="unet") == (3, 5, ["to_q", "to_v"])
    with pytest.raises(UserError, match="does not say rank, alpha and layers of one LoRA of the transformer"):
        lora.read_lora_settings(path, part="transformer")


def test_a_lora_without_metadata_is_none_to_go_on_from(tmp_path):
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no LoRA")
    for name, message in (("bare", "does not say rank, alpha and layers"), ("text", "is no LoRA that can be read")):
        with pytest.raises(UserError, match=message) as info:
            lora.read_lora_settings(str(tmp_path / f"{name}.safetensors"), part="unet")
        assert "pass one written by" in one_line(info)
