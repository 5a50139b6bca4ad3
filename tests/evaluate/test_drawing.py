"""What is paired is paired, and no image is drawn twice."""

import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from evaluation_runs import PROMPTS, REWARDS, TURBO, pixels, run, untimed
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from pso_utils.evaluate.plan import noise_seed
from pso_utils.families.lora_export import export_lora
from pso_utils.families.sdxl import SDXL


pytestmark = pytest.mark.usefixtures("fresh_state")


def test_images_are_those_of_the_plain_pipeline_with_the_lora(shared, tmp_path):
    run(shared, tmp_path, "--lora", f"a={shared / 'a'}", "--lora_scale", 0.5, "--max_prompts", 3, "--batch_size", 3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generators = [torch.Generator().manual_seed(noise_seed(0, index, 0)) for index in range(3)]
        options = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32}
        return np.stack([np.asarray(i) for i in pipeline(PROMPTS[:3], generator=generators, **options).images])

    # prompts are encoded one by one here and together there: a rounding of 8-bit values apart
    np.testing.assert_allclose(pixels(tmp_path, "base"), draw(), atol=1)
    pipeline.load_lora_weights(shared / "a", adapter_name="a")
    pipeline.set_adapters("a", 0.5)
    np.testing.assert_allclose(pixels(tmp_path, "a"), draw(), atol=1)
    assert np.abs(pixels(tmp_path, "a") - pixels(tmp_path, "base").astype(float)).mean() > 5


def test_a_lora_at_scale_0_is_the_base_bit_for_bit_and_shows_no_difference(shared, tmp_path):
    rows = run(shared, tmp_path, "--lora", f"a={shared / 'a'}", "--lora_scale", 0, *REWARDS)
    assert (pixels(tmp_path, "a") == pixels(tmp_path, "base")).all()
    for score in rows["a"]["scores"].values():
        assert score["difference"] == score["difference_standard_error"] == 0
        assert score["interval"] == [0, 0] and score["win_rate"] == 0.5


def test_a_lora_against_itself_shows_no_difference_and_leaves_nothing_behind_for_the_next(shared, tmp_path):
    a, b = (("--lora", f"{name}={shared / name}") for name in "ab")
    rows = run(shared, tmp_path / "all", *a, "--lora", f"again={shared / 'a'}", *b, *REWARDS)
    assert rows["a"]["scores"] == rows["again"]["scores"] != rows["b"]["scores"]
    assert rows["a"]["scores"]["clip"]["difference"] != 0
    assert (pixels(tmp_path / "all", "a") == pixels(tmp_path / "all", "again")).all()
    assert run(shared, tmp_path / "alone", *b, *REWARDS)["b"]["scores"] == rows["b"]["scores"]


def test_loras_of_the_text_encoders_and_with_kohyas_keys_are_loaded_whole(shared, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    pipeline.text_encoder.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    layers = {key: 5 * value for key, value in get_peft_model_state_dict(pipeline.text_encoder).items()}
    pipeline.save_lora_weights(tmp_path / "text", text_encoder_lora_layers=layers)
    settings = {"part": "unet", "save_dtype": "fp32", "details": {}}
    source = shared / "a" / "pytorch_lora_weights.safetensors"
    export_lora(source, tmp_path / "kohya.safetensors", SDXL.lora_format, **settings)
    loras = {"text": tmp_path / "text", "kohya": tmp_path / "kohya.safetensors", "a": shared / "a"}
    more = [flag for name, path in loras.items() for flag in ("--lora", f"{name}={path}")]
    run(shared, tmp_path / "out", *more, "--max_prompts", 2)
    np.testing.assert_allclose(pixels(tmp_path / "out", "kohya"), pixels(tmp_path / "out", "a"), atol=1)
    difference = np.abs(pixels(tmp_path / "out", "text") - pixels(tmp_path / "out", "base").astype(float))
    assert difference.mean() > 1

    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "text")
    generators = [torch.Generator().manual_seed(noise_seed(0, index, 0)) for index in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32}
    expected = np.stack([np.asarray(i) for i in pipeline(PROMPTS[:2], generator=generators, **options).images])
    np.testing.assert_allclose(pixels(tmp_path / "out", "text"), expected, atol=1)


def test_every_image_has_its_own_noise_and_every_model_and_number_of_steps_the_same():
    seeds = {noise_seed(seed, prompt, image) for seed in range(3) for prompt in range(9) for image in range(9)}
    assert len(seeds) == 3 * 9 * 9
    generator = torch.Generator()
    assert all(generator.manual_seed(seed).initial_seed() == seed for seed in seeds)


# ---- Resuming ----


def test_an_interrupted_run_goes_on_and_draws_no_image_twice(shared, tmp_path, drawn, monkeypatch):
    more = ["--lora", f"a={shared / 'a'}", "--images_per_prompt", 2, "--batch_size", 5, *REWARDS]
    run(shared, tmp_path / "whole", *more)
    assert drawn == [5, 5, 2] * 2
    decode_latents = SDXL.decode_latents

    def interrupted(family, latents):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return decode_latents(family, latents)

    drawn.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SDXL, "decode_latents", interrupted)
        run(shared, tmp_path / "parts", *more)
    assert drawn == [5, 5, 2, 5, 5]  # the last was not decoded
    drawn.clear()
    run(shared, tmp_path / "parts", *more)
    assert drawn == [5, 2]
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    drawn.clear()
    run(shared, tmp_path / "parts", *more, "--reward", "jpeg_compressibility")  # another reward draws nothing
    assert drawn == []


def test_what_settings_change_is_drawn_anew_and_nothing_else(shared, tmp_path, drawn):
    lora = shutil.copytree(shared / "a", tmp_path / "a")
    more = ["--lora", f"a={lora}", "--batch_size", 6]
    run(shared, tmp_path / "out", *more)
    before = pixels(tmp_path / "out", "a")
    drawn.clear()

    os.utime(lora / "pytorch_lora_weights.safetensors", ns=(1, 1))  # trained again, into the same folder
    run(shared, tmp_path / "out", *more)
    assert drawn == [6]
    run(shared, tmp_path / "out", *more, "--lora_scale", 0.5)
    assert drawn == [6, 6] and (pixels(tmp_path / "out", "a") != before).any()
    drawn.clear()
    run(shared, tmp_path / "out", *more, "--lora_scale", 0.5, "--seed", 1)
    assert drawn == [6, 6]  # both models
    drawn.clear()
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:3], "apple food"]))
    run(shared, tmp_path / "out", *more, "--lora_scale", 0.5, "--seed", 1, "--prompts", tmp_path / "prompts.txt")
    assert drawn == [1, 1]  # the prompt that changed


def test_a_damaged_image_is_drawn_again(shared, tmp_path, drawn):
    run(shared, tmp_path, "--batch_size", 6)
    path = tmp_path / "images" / "base" / "steps-2" / "00003-00.png"
    whole = path.read_bytes()
    for damaged in (whole[:20], whole[:-40], whole[:-40] + b"\0" * 40, b""):
        path.write_bytes(damaged)
        drawn.clear()
        run(shared, tmp_path, "--batch_size", 6)
        assert drawn == [1] and Image.open(path).convert("RGB").size == (32, 32)
