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

from demo import evaluate
from demo.measures import Yardstick, mean_pairwise_distance, sharpness, to_pixels
from demo.recipe.common import ARTISTS, DEMO, load_drawings
from demo.rewards import twemoji
from pso_utils.rewards import load_rewards, parse_rewards


ROOT = DEMO.parent


@pytest.fixture(scope="module")
def yardstick():
    return Yardstick()


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


def test_sharpness_and_pairwise_distance_equal_plain_loops():
    pixels = torch.rand(4, 3, 6, 5) * 2 - 1
    first = pixels[0]
    values = [
        abs(4 * first[c, y, x] - first[c, y - 1, x] - first[c, y + 1, x] - first[c, y, x - 1] - first[c, y, x + 1])
        for c in range(3)
        for y in range(1, 5)
        for x in range(1, 4)
    ]
    assert sharpness(pixels)[0].item() == pytest.approx(np.mean(values), rel=1e-5)
    distances = [(pixels[i] - pixels[j]).square().mean() for i in range(4) for j in range(4) if i != j]
    assert mean_pairwise_distance(pixels) == pytest.approx(np.mean(distances), rel=1e-4)


def test_the_drawings_measure_as_themselves(yardstick):
    """Every artist's own drawings are at distance 0, closest to that artist, as sharp as themselves."""
    concepts = torch.arange(40)
    for index in range(len(ARTISTS)):
        reconstructed = yardstick.reconstructions[concepts, index]
        measures = yardstick.measure(reconstructed, "name", concepts)
        assert (measures.closest == index).float().mean() > 0.95
        assert measures.distance.mean() < 0.03  # the autoencoder's error
        assert measures.sharpness == pytest.approx(1, abs=0.15)
    exact = yardstick.measure(to_pixels(drawn(yardstick.pixels[concepts, 0])), "class", concepts)
    assert exact.distance.max() < 1e-4 and exact.diversity > 0


def test_evaluation_of_a_base_against_itself_shows_no_gain(tmp_path, capsys):
    paired = evaluate.paired(torch.ones(5), torch.ones(5))
    assert paired["gain"] == 0 and paired["standard_errors"] == 0
    evaluate.main(["--num_images", "12", "--kind", "name", "--output_dir", str(tmp_path)])
    assert "| base | lcm | 4 | name |" in capsys.readouterr().out
    assert (tmp_path / "lcm_4_name.png").is_file() and (tmp_path / "results.json").is_file()


def test_evaluation_refuses_a_folder_without_lora(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--lora", f"mine={tmp_path}"])
    assert stop.value.code == 2 and "pytorch_lora_weights.safetensors" in capsys.readouterr().err


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
