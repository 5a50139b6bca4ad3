import re

import conftest
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_sdxl import randomize_lora

from pso_utils import sdxl
from pso_utils.model_card import save_model_card, scheduler_code, usage_snippet


PROMPT = 'red "panda" animal'

DEPLOYMENTS = {
    "lcm": {"num_inference_steps": 4},
    "tcd": {"timesteps": [999, 749, 499, 249], "eta": 0.3},
    "ddim": {"num_inference_steps": 4, "eta": 1.0},
    "euler_ancestral": {"num_inference_steps": 4},
    "euler": {"num_inference_steps": 2},
}


def run_snippet(readme) -> Image.Image:
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    return namespace["image"]


def expected_image(pipeline, deployment) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, height=32, width=32, guidance_scale=0.0, generator=generator, **deployment).images[0]


def assert_same_image(one: Image.Image, other: Image.Image):
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= (8 if torch.cuda.is_available() else 0)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_snippet_draws_what_the_trained_pipeline_draws(tiny_pipeline_dir, tmp_path, name):
    pipeline = sdxl.load_pipeline(tiny_pipeline_dir, scheduler=name)
    sdxl.add_lora(pipeline.unet, 4, 8)
    randomize_lora(pipeline.unet)
    sdxl.save_lora(pipeline.unet, tmp_path, kohya=True)
    readme = save_model_card(
        tmp_path,
        base_model=tiny_pipeline_dir,
        scheduler=pipeline.scheduler,
        prompt=PROMPT,
        resolution=32,
        **DEPLOYMENTS[name],
    )
    assert_same_image(run_snippet(readme), expected_image(pipeline, DEPLOYMENTS[name]))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_snippet_loads_what_went_into_the_base_model(tiny_pipeline_dir, tmp_path, suffix):
    distilled, vae, distillation_lora = (tmp_path / name for name in (f"unet{suffix}", "vae", "distillation"))
    other = conftest.build_pipeline(seed=5)
    other.vae.save_pretrained(vae)
    if suffix == ".safetensors":
        save_file(other.unet.state_dict(), distilled)
    elif suffix == ".bin":
        torch.save(other.unet.state_dict(), distilled)
    else:
        other.unet.save_pretrained(distilled)
    sdxl.add_lora(other.unet, 2)
    randomize_lora(other.unet, seed=2)
    sdxl.save_lora(other.unet, distillation_lora)
    parts = {"vae": str(vae), "distilled_unet": str(distilled), "distillation_lora": str(distillation_lora)}
    pipeline = sdxl.load_pipeline(tiny_pipeline_dir, **parts)
    deployment = {"num_inference_steps": 2}
    assert_same_image(
        expected_image(pipeline, deployment),
        run_snippet(
            save_model_card(
                save_new_lora(pipeline, tmp_path / "lora"),
                base_model=tiny_pipeline_dir,
                scheduler=pipeline.scheduler,
                prompt=PROMPT,
                resolution=32,
                **deployment,
                **parts,
            )
        ),
    )


def save_new_lora(pipeline, output_dir):
    """A LoRA that changes nothing yet."""
    sdxl.add_lora(pipeline.unet, 4)
    sdxl.save_lora(pipeline.unet, output_dir)
    return output_dir


def test_card_states_facts_and_images_and_is_valid_for_the_hub(tmp_path):
    readme = save_model_card(
        tmp_path,
        base_model="stabilityai/sdxl-turbo",
        scheduler=LCMScheduler(original_inference_steps=1000),
        prompt="a cat",
        hub_model_id="someone/cats",
        training={"reward": "pickscore=1", "beta": 50.0},
        images=[("a cat", "before_after.png")],
        num_inference_steps=4,
        distilled_unet="tianweiy/DMD2:dmd2_sdxl_4step_unet_fp16.bin",
        distillation_lora="ByteDance/Hyper-SD:Hyper-SDXL-4steps-lora.safetensors",
    )
    card = ModelCard.load(readme)
    assert card.data.base_model == "stabilityai/sdxl-turbo" and "lora" in card.data.tags
    for text in (
        "| beta | 50.0 |",
        "![a cat](before_after.png)",
        "pipe.load_lora_weights('someone/cats')",
        "LCMScheduler(original_inference_steps=1000)",
        "torch.load(hf_hub_download('tianweiy/DMD2', 'dmd2_sdxl_4step_unet_fp16.bin')",
        "pipe.load_lora_weights('ByteDance/Hyper-SD', weight_name='Hyper-SDXL-4steps-lora.safetensors')",
    ):
        assert text in card.content
    assert "TODO" not in card.content


def test_local_base_model_is_no_hub_id(tiny_pipeline_dir, tmp_path):
    readme = save_model_card(
        tmp_path, base_model=tiny_pipeline_dir, scheduler=LCMScheduler(), prompt="a cat", num_inference_steps=4
    )
    assert ModelCard.load(readme).data.base_model is None


def test_scheduler_code_makes_the_same_scheduler():
    source = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    source = DDIMScheduler.from_config({**LCMScheduler().config, **source.config})
    made = eval(scheduler_code(source))
    ignored = {"_use_default_values"}
    shared = made.config.keys() - ignored
    assert {key: made.config[key] for key in shared} == {key: source.config[key] for key in shared}


def test_snippet_is_formatted_and_free_of_unused_imports(tmp_path):
    code = usage_snippet(
        base_model="base",
        lora="lora",
        scheduler=LCMScheduler(),
        prompt="a",
        num_inference_steps=4,
        distilled_unet="a/b:c.bin",
    )
    names = re.findall(r"^from \S+ import (.*)$", code, flags=re.MULTILINE)
    for name in ", ".join(names).split(", "):
        assert code.count(name) >= 2
