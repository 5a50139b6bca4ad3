"""Scores of all kinds; rewards that fail."""

import json
import shutil
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from evaluation_runs import CLIP, PROMPTS, TURBO, error_of, flags, run
from PIL import Image
from transformers import AutoModel, CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from pso_utils.data.images import pixels_of
from pso_utils.evaluate import fidelity


pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "def score(images, prompts):\n"
        "    if any('face' in prompt for prompt in prompts):\n"
        "        raise RuntimeError('no faces')\n"
        "    return [float(len(prompt)) + image.getpixel((0, 0))[0] for image, prompt in zip(images, prompts)]\n"
        "def never(images, prompts):\n"
        "    return [float('nan')] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("picky", None)


def test_images_on_which_a_reward_fails_are_counted_and_left_out(own_rewards, shared, tmp_path, caplog):
    rows = run(shared, tmp_path / "out", "--lora", f"a={shared / 'a'}", "--reward", "picky:score")
    score = rows["a"]["scores"]["picky:score"]
    assert (score["count"], score["failed"], score["paired"]) == (5, 1, 5)
    lines = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    values = [line["picky:score"] for line in lines if line["model"] == "a"]
    assert values[3] is None and score["mean"] == pytest.approx(np.mean([v for v in values if v is not None]))
    assert "2 images were not scored: RuntimeError: no faces; reward 'picky:score' raised this" in caplog.text
    assert 'picky.py", line 3, in score' in caplog.text  # where it failed
    for name in ("results.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "score failed on 2 of 12 images (base, 2 steps: 1; a, 2 steps: 1)" in text


def test_a_reward_that_fails_on_all_images_is_an_error(own_rewards, shared, tmp_path, capsys):
    message = error_of(flags(shared, tmp_path / "out", "--reward", "picky:never"), capsys)
    assert "'picky:never' failed on every image" in message


def test_a_negative_weight_says_that_lower_is_better(shared, tmp_path):
    more = ["--lora", f"a={shared / 'a'}", "--reward"]
    up = run(shared, tmp_path, *more, "jpeg_incompressibility")["a"]["scores"]["jpeg_incompressibility"]
    down = run(shared, tmp_path, *more, "jpeg_incompressibility=-1")["a"]["scores"]["jpeg_incompressibility"]
    assert down["mean"] == up["mean"] and down["win_rate"] == pytest.approx(1 - up["win_rate"])


def test_fidelity_to_the_data_of_each_prompt(shared, tmp_path):
    """Data that are the samples themselves: at distance 0; and as sharp as the VAE makes them again."""
    run(shared, tmp_path / "first")
    files = sorted((tmp_path / "first" / "images" / "base" / "steps-2").glob("*.png"))
    (tmp_path / "data").mkdir()
    lines = []
    for file, prompt in zip(files, PROMPTS):
        shutil.copy(file, tmp_path / "data" / file.name)
        lines.append(json.dumps({"file_name": file.name, "caption": prompt}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    more = ["--dataset_name", tmp_path / "data", "--image_column", "image", "--caption_column", "caption"]
    rows = run(shared, tmp_path / "out", *more, "--lora", f"a={shared / 'a'}", "--images_per_prompt", 2)
    lines = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    own = [line for line in lines if line["model"] == "base" and line["image_index"] == 0]
    # other batches: some values are a step of 8 bits apart, which is 2e-8 each
    assert max(line["data distance"] for line in own) < 1e-6 and rows["a"]["scores"]["data distance"]["mean"] > 0.01
    other = [line for line in lines if line["model"] == "base" and line["image_index"] == 1]
    first, second = (pixels_of(Image.open(tmp_path / "out" / line["file"])) for line in (own[0], other[0]))
    assert own[0]["diversity"] == other[0]["diversity"] == pytest.approx((first - second).square().mean().item())

    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    data = torch.stack([pixels_of(Image.open(file)) for file in files])
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(data).latent_dist.mode()).sample.clamp(-1, 1)
    ratio = (fidelity.sharpness(data).mean() / fidelity.sharpness(decoded).mean()).item()
    assert np.mean([line["sharpness"] for line in own]) == pytest.approx(ratio, rel=0.02)  # theirs are not of 8 bits


def test_subject_fidelity_is_the_mean_cosine_to_the_reference_images(shared, tmp_path):
    run(shared, tmp_path / "first", "--max_prompts", 2)
    references = tmp_path / "first" / "images" / "base" / "steps-2"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino")
    more = ["--reference_images", references, "--subject_clip_model", CLIP, "--subject_vision_model", tmp_path / "dino"]
    rows = run(shared, tmp_path / "out", *more, "--max_prompts", 2)

    images = [Image.open(path) for path in sorted(references.iterdir())]
    clip, vit = CLIPModel.from_pretrained(CLIP).eval(), AutoModel.from_pretrained(tmp_path / "dino").eval()
    with torch.no_grad():
        inputs = CLIPImageProcessorPil.from_pretrained(CLIP)(images, return_tensors="pt")
        clip_embeds = clip.visual_projection(clip.vision_model(**inputs).pooler_output)
        inputs = ViTImageProcessor.from_pretrained(tmp_path / "dino")(images, return_tensors="pt")
        dino_embeds = vit(**inputs).last_hidden_state[:, 0]
    for name, embeds in {"CLIP-I": clip_embeds, "DINO": dino_embeds}.items():
        cosine = torch.nn.functional.cosine_similarity(embeds[0], embeds[1], dim=0).item()
        assert rows["base"]["scores"][name]["mean"] == pytest.approx((1 + cosine) / 2, abs=1e-5)
