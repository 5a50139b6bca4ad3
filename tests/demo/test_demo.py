"""The shipped models and what the README says can be done with them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from demo import concept, evaluate
from demo.measures import DrawingBenchmark, draw_prompts, load_model, paired, stack_pixels
from demo.recipe.common import ARTISTS, DEMO, STYLES, load_drawings
from demo.rewards import twemoji
from pso_utils.rewards import load_rewards, parse_rewards


ROOT = DEMO.parent


@pytest.fixture(scope="module")
def benchmark():
    return DrawingBenchmark()


def drawn(pixels: torch.Tensor):
    """Drawings [B, 3, H, W] in [-1, 1] as PIL images."""
    arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def test_shipped_models_fit_into_45_megabytes():
    tracked = [path for path in DEMO.rglob("*") if path.is_file() and "build" not in path.relative_to(DEMO).parts]
    assert sum(path.stat().st_size for path in tracked) < 45e6


def test_plain_from_pretrained_loads_one_dtype_and_draws():
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    image = pipeline("hedgehog animal", num_inference_steps=4, guidance_scale=0.0).images[0]
    assert image.size == (32, 32) and np.asarray(image).std() > 10


def test_teacher_has_the_architecture_of_the_distilled_unet():
    teacher = UNet2DConditionModel.from_pretrained(DEMO / "emoji-teacher")
    distilled = UNet2DConditionModel.from_pretrained(DEMO / "emoji-turbo", subfolder="unet")
    assert {k: v.shape for k, v in teacher.state_dict().items()} == {
        k: v.shape for k, v in distilled.state_dict().items()
    }


def test_held_out_concepts_are_of_known_classes_and_in_no_training_caption():
    drawings, held_out = load_drawings(), load_drawings("held_out")
    assert not set(held_out.names) & set(drawings.names)
    assert set(held_out.classes) <= set(drawings.classes)
    assert not set(held_out.captions) & set((DEMO / "prompts.txt").read_text().splitlines())


def test_emoji_clip_finds_the_caption_of_most_drawings():
    drawings = load_drawings()
    clip = load_rewards(parse_rewards(["clip"], [str(DEMO / "emoji-clip")]), batch_size=110)
    images = drawn(drawings.pixels[:, 0])
    own = clip(images, drawings.captions)[0]
    other = clip(images, drawings.captions[1:] + drawings.captions[:1])[0]
    assert (own > other).float().mean() > 0.95


def test_twemoji_reward_is_zero_for_the_drawing_itself_and_falls_with_the_distance():
    drawings = load_drawings()
    pixels = drawings.pixels[:6, ARTISTS.index("twemoji")]
    captions = drawings.captions[:6]
    assert twemoji(drawn(pixels), captions).abs().max() < 1e-4  # 8 bits a channel
    assert twemoji(drawn(pixels), drawings.classes[:6]).abs().max() < 1e-4  # the class caption fits it as well
    faded = twemoji(drawn(pixels * 0.5), captions)
    assert torch.allclose(faded, -(pixels * 0.5).square().mean(dim=(1, 2, 3)), atol=2e-3)


def test_the_drawings_measure_as_themselves(benchmark):
    """Every artist's own drawings are at distance 0, closest to that artist, as sharp as themselves."""
    concepts = torch.arange(40)
    for index in range(len(ARTISTS)):
        reconstructed = benchmark.reconstructions[concepts, index]
        measures = benchmark.measure(reconstructed, "name", concepts)
        assert (measures.closest == index).float().mean() > 0.95
        assert measures.distance.mean() < 0.03  # the autoencoder's error
        assert measures.sharpness == pytest.approx(1, abs=0.15)
    exact = benchmark.measure(stack_pixels(drawn(benchmark.pixels[concepts, 0])), "class", concepts)
    assert exact.distance.max() < 1e-4 and exact.diversity > 0


def test_with_the_ink_its_own_drawings_are_found_to_be_ink():
    benchmark, concepts = DrawingBenchmark(STYLES), torch.arange(40)
    ink = STYLES.index("ink")
    figures = benchmark.figures(drawn(benchmark.reconstructions[concepts, ink]), "name", concepts)
    assert figures["ink"] > 0.95 and figures["ink distance"] < 0.03
    own = benchmark.sharpness[concepts, ink].mean() / benchmark.sharpness[:, ink].mean()
    assert figures["ink sharpness"] == pytest.approx(own.item(), rel=0.02)  # 8 bits a channel


def test_images_are_those_of_the_plain_pipeline_from_the_seeds_that_follow_the_first():
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["hedgehog animal", "face", "octopus animal"]
    generators = [torch.Generator().manual_seed(7 + index) for index in range(3)]
    expected = pipeline(prompts, num_inference_steps=2, guidance_scale=0.0, generator=generators).images
    images = draw_prompts(load_model(), prompts, steps=2, seed=7)
    np.testing.assert_allclose(*([np.asarray(image) for image in own] for own in (images, expected)), atol=1)


def test_a_gain_is_in_paired_standard_errors_and_in_the_bases_deviations():
    tuned, base = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    gains = tuned - base
    measured = paired(tuned, base)
    assert measured["gain"] == pytest.approx(gains.mean().item())
    assert measured["standard_errors"] == pytest.approx((gains.mean() / gains.std() * 2).item())
    assert measured["base_deviations"] == pytest.approx((gains.mean() / base.std()).item())
    none = paired(torch.ones(5), torch.ones(5))
    assert none["gain"] == 0 and none["standard_errors"] == 0


def test_the_evaluation_prints_its_table_and_writes_pictures(tmp_path, capsys):
    evaluate.main(["--num_images", "12", "--kind", "name", "--output_dir", str(tmp_path)])
    assert "| base | lcm | 4 | name |" in capsys.readouterr().out
    assert (tmp_path / "lcm_4_name.png").is_file() and (tmp_path / "results.json").is_file()


def test_a_concepts_own_views_are_the_closest_to_it(tmp_path, capsys):
    """The base does not draw the held-out snake; its views measure as close to each other as it gets."""
    concept.main(["--num_images", "4", "--output_dir", str(tmp_path)])
    assert "| base | 0." in capsys.readouterr().out and (tmp_path / "samples.png").is_file()
    benchmark = concept.ConceptBenchmark("snake")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert benchmark.similarity(benchmark.views, [""] * len(benchmark.views)).min() > row["image cosine"]


@pytest.mark.parametrize("program", [evaluate, concept])
def test_a_folder_without_lora_is_refused(program, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--lora", f"mine={tmp_path}", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and "pass a LoRA's folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_short_run_of_the_demo_raises_the_reward(tmp_path):
    """The README's command with fewer steps, then the evaluation on other noise."""
    readme = (ROOT / "README.md").read_text()
    command = readme.split("<!-- demo -->")[1].split("```")[1].split("train_pso_online.py", 1)[1]
    flags = shlex.split(command.replace("\\\n", " "))
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "run")
    flags[flags.index("--max_train_steps") + 1] = "8"  # of 22: three minutes on two slow cores
    subprocess.run([sys.executable, "train_pso_online.py", *flags], cwd=ROOT, check=True)
    evaluate.main(["--lora", f"run={tmp_path / 'run'}", "--num_images", "256", "--output_dir", str(tmp_path / "out")])
    rows = json.loads(Path(tmp_path, "out", "results.json").read_text())
    gains = {row["prompts"]: row["paired"]["twemoji reward"] for row in rows if row["model"] == "run"}
    assert gains["name"]["standard_errors"] > 3  # 220 of the 226 prompts are names
    assert gains["class"]["standard_errors"] > -2
