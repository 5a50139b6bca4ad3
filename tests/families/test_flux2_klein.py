"""FLUX.2-klein's own: what is refused, where its LoRA goes, how it is called."""

import json

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from family_inputs import generators, one_line

from pso_utils.errors import UserError
from pso_utils.families import Deployment, lora
from pso_utils.families.flux2_klein import Flux2Klein
from pso_utils.families.loading import ModelSource, read_model_info
from tests.families.cases import PROMPTS
from tests.families.cases.flux2_klein import build, unpack


@pytest.mark.parametrize("entries", [{}, {"is_distilled": False}])
def test_a_base_is_refused_before_anything_else_is_read(tmp_path, entries):
    entries |= {"_class_name": "Flux2KleinPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="no few-step model .*; pass FLUX.2-klein-4B or -9B") as info:
        read_model_info(ModelSource(str(tmp_path)))
    one_line(info)


def test_guidance_is_refused():
    assert Flux2Klein.checked_guidance({}, None) == 1.0
    with pytest.raises(UserError, match="--guidance_scale 4.0: .* drop the flag") as info:
        Flux2Klein.checked_guidance({}, 4.0)
    one_line(info)


@pytest.mark.parametrize("num_layers, num_single_layers", [(5, 20), (8, 24)])  # the 4B's, the 9B's
def test_the_lora_goes_into_the_single_blocks_that_there_are(num_layers, num_single_layers):
    config = {"num_layers": num_layers, "num_single_layers": num_single_layers, "in_channels": 16}
    sizes = {"num_attention_heads": 1, "attention_head_dim": 16, "joint_attention_dim": 48, "axes_dims_rope": (4,) * 4}
    with torch.device("meta"):
        denoiser = Flux2Transformer2DModel(**config, **sizes)
    targets = Flux2Klein.default_lora_targets(denoiser.config)
    lora.add_lora(denoiser, rank=2, target_modules=targets)
    assert len(lora.lora_layers(denoiser)) == 4 * num_layers + 2 * num_single_layers
    assert denoiser.peft_config["default"].target_modules == set(targets)  # which a checkpoint is compared with


def test_the_plain_pipeline_draws_the_same_when_called_as_the_card_says():
    pipeline, deployment = build(), Deployment(2, None, None, 32, 32)
    pipeline.set_progress_bar_config(disable=True)
    assert Flux2Klein(pipeline).call_arguments(deployment)["max_sequence_length"] == 512
    family = Flux2Klein(pipeline, max_sequence_length=64)
    conditioning = family.collate(family.encode_prompts(PROMPTS), 32, 32)
    assert conditioning["prompt_embeds"].shape == (2, 64, 48)
    call = family.call_arguments(deployment)
    assert call == {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_sequence_length": 64,
        "height": 32,
        "width": 32,
    }
    drawn = []
    pipeline(
        prompt=PROMPTS,
        generator=generators(),
        callback_on_step_end=lambda pipeline, step, timestep, tensors: drawn.append(tensors["latents"]) or {},
        **call,
    )
    expected = unpack(pipeline, drawn[-1], 32, 32)
    assert torch.equal(family.generate(conditioning, generators(), deployment), expected)
