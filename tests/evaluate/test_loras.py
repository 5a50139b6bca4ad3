"""A LoRA is found, and is on the pipeline only while it is asked for."""

import shutil

import pytest
import torch
from evaluation_runs import TURBO
from safetensors.torch import save_file

from pso_utils.evaluate.loras import Model, applied, find_lora
from pso_utils.families.loading import ModelSource, empty_parts, load_pipeline, read_model_info


def test_one_of_several_files_can_be_named_and_training_folders_are_unambiguous(shared, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "run.safetensors")
    shutil.copy(shared / "a" / "pytorch_lora_weights.safetensors", tmp_path)
    assert find_lora(f"x={tmp_path}").lora == str(tmp_path / "pytorch_lora_weights.safetensors")
    assert find_lora("x=me/mine:my.safetensors").lora == "me/mine:my.safetensors"
    path = shared / "a" / "pytorch_lora_weights.safetensors"
    assert find_lora(f"x={path}", scale=0.5) == Model("x", str(path), 0.5)


def test_a_lora_is_applied_within_the_context_alone_even_if_that_fails(shared):
    pipeline = load_pipeline(ModelSource(TURBO))
    before = {name for name, _ in pipeline.unet.named_parameters()}
    with applied(pipeline, Model("base")):
        assert {name for name, _ in pipeline.unet.named_parameters()} == before
    with pytest.raises(KeyboardInterrupt), applied(pipeline, find_lora(f"a={shared / 'a'}")):
        assert pipeline.get_active_adapters() == ["evaluated"]
        raise KeyboardInterrupt
    assert {name for name, _ in pipeline.unet.named_parameters()} == before


def test_the_empty_parts_have_the_models_layers_and_no_memory(tiny_pipeline_dir):
    source = ModelSource(tiny_pipeline_dir)
    parts, pipeline = empty_parts(source, read_model_info(source)), load_pipeline(source)
    assert parts.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for name, part in parts.items():
        assert all(parameter.is_meta for parameter in part.parameters())
        shapes = {key: value.shape for key, value in getattr(pipeline, name).state_dict().items()}
        assert {key: value.shape for key, value in part.state_dict().items()} == shapes
