"""The model card's example is run: it draws what the trained pipeline draws."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from pso_utils.families import Deployment
from pso_utils.families.loading import load_pipeline
from pso_utils.families.sdxl import SDXL
from pso_utils.run import arguments
from pso_utils.run.model_card import save_model_card, scheduler_code, usage_snippet
from pso_utils.run.models import model_source
from tests.conftest import build_pipeline
from tests.families.family_inputs import randomize_lora
from tests.script_runs import to_flags


PROMPT = 'red "panda" animal'

DEPLOYMENTS = {
    "lcm": Deployment(4, None, None, 32, 32),
    "tcd": Deployment(None, [999, 749, 499, 249], 0.3, 32, 32),
    "ddim": Deployment(4, None, 1.0, 32, 32),
}


def parse(pipeline_dir, output_dir="lora", **flags):
    """The arguments that the card is written from."""
    parser = arguments.ArgumentParser()
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="lora")
    flags |= {"pretrained_model_name_or_path": pipeline_dir, "output_dir": output_dir}
    return parser.parse_args(to_flags(flags))


def run_snippet(readme) -> Image.Image:
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    return namespace["image"]


def expected_image(pipeline, deployment: Deployment) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: value for name, value in deployment._asdict().items() if value is not None}
    return pipeline(PROMPT, guidance_scale=0.0, generator=torch.Generator().manual_seed(0), **settings).images[0]


def assert_same_image(one: Image.Image, other: Image.Image):
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= (8 if torch.cuda.is_available() else 0)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_snippet_draws_what_the_trained_pipeline_draws(tiny_pipeline_dir, tmp_path, name):
    args = parse(tiny_pipeline_dir, tmp_path, scheduler=name)
    family = SDXL(load_pipeline(model_source(args)))
    family.add_lora(rank=4, lora_alpha=8)
    randomize_lora(family.denoiser)
    family.save_lora(tmp_path)
    readme = save_model_card(args, family, DEPLOYMENTS[name], prompt=PROMPT)
    assert_same_image(run_snippet(readme), expected_image(family.pipeline, DEPLOYMENTS[name]))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_snippet_loads_what_went_into_the_base_model(tiny_pipeline_dir, tmp_path, suffix):
    distilled, vae, distillation_lora = (tmp_path / name for name in (f"unet{suffix}", "vae", "distillation"))
    other = build_pipeline(seed=5)
    other.vae.save_pretrained(vae)
    if suffix == ".safetensors":
        save_file(other.unet.state_dict(), distilled)
    elif suffix == ".bin":
        torch.save(other.unet.state_dict(), distilled)
    else:
        other.unet.save_pretrained(distilled)
    other_family = SDXL(other)
    other_family.add_lora(rank=2)
    randomize_lora(other.unet, seed=2)
    other_family.save_lora(distillation_lora)

    parts = {"pretrained_vae_model_name_or_path": vae, "distilled_unet": distilled}
    args = parse(tiny_pipeline_dir, tmp_path / "lora", distillation_lora=distillation_lora, **parts)
    family, deployment = SDXL(load_pipeline(model_source(args))), Deployment(2, None, None, 32, 32)
    family.add_lora(rank=4)  # changes nothing yet
    family.save_lora(args.output_dir)
    readme = save_model_card(args, family, deployment, prompt=PROMPT)
    assert_same_image(expected_image(family.pipeline, deployment), run_snippet(readme))


def test_card_states_settings_and_images_and_is_valid_for_the_hub(tmp_path):
    parts = {"distilled_unet": "tianweiy/DMD2:dmd2_sdxl_4step_unet_fp16.bin"}
    parts |= {"distillation_lora": "ByteDance/Hyper-SD:Hyper-SDXL-4steps-lora.safetensors"}
    readme = save_model_card(
        parse("stabilityai/sdxl-turbo", tmp_path, **parts),
        SDXL(build_pipeline()),
        DEPLOYMENTS["lcm"],
        prompt="a cat",
        hub_model_id="someone/cats",
        training={"reward": "pickscore=1", "beta": 50.0},
        images=[("a cat", "before_after.png")],
    )
    card = ModelCard.load(readme)
    assert card.data.base_model == "stabilityai/sdxl-turbo"
    assert {"lora", "stable-diffusion-xl"} <= set(card.data.tags)
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
    args = parse(tiny_pipeline_dir, tmp_path)
    readme = save_model_card(args, SDXL(build_pipeline()), DEPLOYMENTS["lcm"], prompt="a cat")
    assert ModelCard.load(readme).data.base_model is None


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
def test_the_hubs_card_names_what_is_local_without_a_path(tiny_pipeline_dir, tmp_path, suffix):
    parts = {"distilled_unet": tmp_path / f"unet{suffix}", "pretrained_vae_model_name_or_path": tmp_path / "my-vae"}
    (tmp_path / "my-vae").mkdir()
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "few.safetensors").write_text("")
    if suffix:
        parts["distilled_unet"].write_text("")
    else:
        parts["distilled_unet"].mkdir()
    parts["distillation_lora"] = f"{tmp_path}/loras:few.safetensors"
    args, family = parse(tiny_pipeline_dir, tmp_path / "out", **parts), SDXL(build_pipeline())
    (tmp_path / "out").mkdir()
    card = save_model_card(args, family, DEPLOYMENTS["lcm"], prompt="a cat", hub_model_id="me/cats").read_text()
    assert str(tmp_path) not in card and str(tmp_path.parent) not in card and tiny_pipeline_dir not in card
    name = tiny_pipeline_dir.rpartition("/")[2]
    assert f"LoRA weights for {name}, tuned" in card and f"from_pretrained('{name}'" in card
    assert f"# my-vae, unet{suffix}, few.safetensors, {name}: the trainer's own, replace by your path" in card
    assert "load_lora_weights('few.safetensors')" in card and "load_lora_weights('me/cats')" in card
    local = save_model_card(args, family, DEPLOYMENTS["lcm"], prompt="a cat").read_text()
    assert str(tmp_path / f"unet{suffix}") in local and "replace by your path" not in local


def test_the_card_of_the_current_folder_has_its_name(tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = save_model_card(parse(tiny_pipeline_dir, "."), SDXL(build_pipeline()), DEPLOYMENTS["lcm"], prompt="a cat")
    assert f"# {tmp_path.name}\n" in card.read_text()


def test_scheduler_code_makes_the_same_scheduler():
    source = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    source = DDIMScheduler.from_config({**LCMScheduler().config, **source.config})
    made = eval(scheduler_code(source))
    shared = made.config.keys() - {"_use_default_values"}
    assert {key: made.config[key] for key in shared} == {key: source.config[key] for key in shared}


def test_snippet_is_free_of_unused_imports():
    source = model_source(parse("base", distilled_unet="a/b:c.bin"))
    code = usage_snippet(source, SDXL(build_pipeline()), Deployment(4, None, None, 32, 32), lora="lora", prompt="a")
    names = re.findall(r"^from \S+ import (.*)$", code, flags=re.MULTILINE)
    for name in ", ".join(names).split(", "):
        assert code.count(name) >= 2
