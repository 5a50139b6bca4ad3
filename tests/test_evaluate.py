"""The evaluation, run on the demo's model: what is paired is paired, and what fails is said."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from demo.measures import mean_pairwise_distance
from demo.recipe.common import DEMO
from pso_utils import evaluate, fidelity, sdxl
from pso_utils.images import pixels_of


pytestmark = pytest.mark.usefixtures("fresh_state")

ROOT = DEMO.parent
TURBO, CLIP = str(DEMO / "emoji-turbo"), str(DEMO / "emoji-clip")
PROMPTS = ["red panda animal", "octopus animal", "vehicle", "grinning face", "sailboat vehicle", "cactus plant"]
REWARDS = ["--reward", "clip", "--reward_model", CLIP, "--reward", "jpeg_incompressibility"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with prompts.txt and two random LoRAs, a and b."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, seed in (("a", 1), ("b", 2)):
        unet = sdxl.load_pipeline(TURBO).unet
        generator = torch.Generator().manual_seed(seed)
        for parameter in sdxl.add_lora(unet, 4, seed=0):
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        sdxl.save_lora(unet, folder / name)
    return folder


def flags(shared, output_dir, *more) -> list[str]:
    given = ["--pretrained_model_name_or_path", TURBO, "--resolution", "32", "--num_inference_steps", "2"]
    prompts = [] if "--dataset_name" in more or "--prompts" in more else ["--prompts", str(shared / "prompts.txt")]
    return [*given, "--output_dir", str(output_dir), *prompts, *map(str, more)]


def run(shared, output_dir, *more) -> dict:
    """Runs the evaluation; returns model -> its row of results.json, of the last number of steps."""
    evaluate.main(flags(shared, output_dir, *more))
    rows = json.loads((Path(output_dir) / "results.json").read_text())["rows"]
    return {row["model"]: row for row in rows}


def untimed(output_dir):
    results = json.loads((Path(output_dir) / "results.json").read_text())
    for row in results["rows"]:
        del row["seconds_per_image"], row["images_per_second"]
    return results["rows"]


def pixels(output_dir, model, steps=2) -> np.ndarray:
    files = sorted(Path(output_dir, "images", model, f"steps-{steps}").glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The number of images in each call of the pipeline."""
    calls, draw = [], evaluate.draw_latents

    def count(pipeline, prompt_embeds, pooled_prompt_embeds, seeds, *args, **kwargs):
        calls.append(len(seeds))
        return draw(pipeline, prompt_embeds, pooled_prompt_embeds, seeds, *args, **kwargs)

    monkeypatch.setattr(evaluate, "draw_latents", count)
    return calls


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


# ---- Drawing ----


def test_images_are_those_of_the_plain_pipeline_with_the_lora(shared, tmp_path):
    run(shared, tmp_path, "--lora", f"a={shared / 'a'}", "--lora_scale", 0.5, "--max_prompts", 3, "--batch_size", 3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generators = [torch.Generator().manual_seed(evaluate.noise_seed(0, index, 0)) for index in range(3)]
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
    sdxl.add_lora(pipeline.unet, 4, seed=0)
    set_peft_model_state_dict(pipeline.unet, {
        key.removeprefix("unet."): value
        for key, value in load_file(shared / "a" / "pytorch_lora_weights.safetensors").items()
    })  # fmt: skip
    sdxl.save_lora(pipeline.unet, tmp_path / "kohya", kohya=True)
    loras = {"text": tmp_path / "text", "kohya": tmp_path / "kohya" / sdxl.KOHYA_WEIGHT_NAME, "a": shared / "a"}
    more = [flag for name, path in loras.items() for flag in ("--lora", f"{name}={path}")]
    run(shared, tmp_path / "out", *more, "--max_prompts", 2)
    np.testing.assert_allclose(pixels(tmp_path / "out", "kohya"), pixels(tmp_path / "out", "a"), atol=1)
    difference = np.abs(pixels(tmp_path / "out", "text") - pixels(tmp_path / "out", "base").astype(float))
    assert difference.mean() > 1

    pipeline = StableDiffusionXLPipeline.from_pretrained(TURBO)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "text")
    generators = [torch.Generator().manual_seed(evaluate.noise_seed(0, index, 0)) for index in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32}
    expected = np.stack([np.asarray(i) for i in pipeline(PROMPTS[:2], generator=generators, **options).images])
    np.testing.assert_allclose(pixels(tmp_path / "out", "text"), expected, atol=1)


def test_every_image_has_its_own_noise_and_every_model_and_number_of_steps_the_same():
    seeds = {evaluate.noise_seed(seed, prompt, image) for seed in range(3) for prompt in range(9) for image in range(9)}
    assert len(seeds) == 3 * 9 * 9
    generator = torch.Generator()
    assert all(generator.manual_seed(seed).initial_seed() == seed for seed in seeds)


# ---- Resuming ----


def test_an_interrupted_run_goes_on_and_draws_no_image_twice(shared, tmp_path, drawn, monkeypatch):
    more = ["--lora", f"a={shared / 'a'}", "--images_per_prompt", 2, "--batch_size", 5, *REWARDS]
    run(shared, tmp_path / "whole", *more)
    assert drawn == [5, 5, 2] * 2
    count, decode_latents = [0], sdxl.decode_latents

    def interrupted(*args):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return decode_latents(*args)

    drawn.clear()
    monkeypatch.setattr("pso_utils.training.decode_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
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


# ---- Results ----


def test_the_table_is_that_of_the_scores_image_by_image(shared, tmp_path):
    rows = run(shared, tmp_path, "--lora", f"a={shared / 'a'}", "--images_per_prompt", 2, *REWARDS)
    lines = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(lines) == 2 * 2 * len(PROMPTS)
    by_model = {name: [line for line in lines if line["model"] == name] for name in ("base", "a")}
    for name, score in rows["a"]["scores"].items():
        tuned, base = (np.array([line[name] for line in by_model[model]]) for model in ("a", "base"))
        assert score["mean"] == pytest.approx(tuned.mean()) and score["difference"] == pytest.approx(
            (tuned - base).mean()
        )
    assert [line["seed"] for line in by_model["a"]] == [line["seed"] for line in by_model["base"]]

    line = by_model["a"][3]
    image = Image.open(tmp_path / line["file"])
    assert line["prompt"] == PROMPTS[1] == image.info["prompt"] and line["image_index"] == 1
    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPImageProcessorPil.from_pretrained(CLIP)
    tokens = evaluate.load_rewards(evaluate.parse_rewards(["clip"], [CLIP])).rewards[0].tokenizer
    inputs = tokens([line["prompt"]], return_tensors="pt") | processor([image], return_tensors="pt")
    with torch.no_grad():
        logit = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
    assert line["clip"] == pytest.approx(logit, abs=1e-5)
    table = (tmp_path / "results.md").read_text()
    assert (
        "| model | steps | clip | gain | wins | jpeg_incompressibility |" in table and "images/s | s/image |" in table
    )


def test_several_numbers_of_steps_and_timesteps_are_rows_and_pictures_of_their_own(shared, tmp_path):
    more = ["--lora", f"a={shared / 'a'}", "--max_prompts", 2]
    evaluate.main(flags(shared, tmp_path, *more, *REWARDS, "--num_inference_steps", 4, 1))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["model"], row["steps"]) for row in rows] == [("base", "1"), ("base", "4"), ("a", "1"), ("a", "4")]
    assert (tmp_path / "steps.png").is_file() and len(list((tmp_path / "grids").iterdir())) == 2
    evaluate.main(flags(shared, tmp_path, *more, *REWARDS, "--num_inference_steps", 4))  # nothing of the others is left
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["steps-4.png"]
    assert not (tmp_path / "steps.png").exists()
    evaluate.main(flags(shared, tmp_path / "own", *more, "--timesteps", 999, 749, 499, 249))  # no reward: pictures only
    assert (pixels(tmp_path / "own", "a", "999-749-499-249") == pixels(tmp_path, "a", 4)).all()
    assert (tmp_path / "own" / "report.html").is_file() and not (tmp_path / "own" / "steps.png").exists()


def test_two_processes_give_the_table_of_one(shared, tmp_path):
    """Batches are the same, so the images are the same bits; what is summed over processes is a number and zeros."""
    more = ["--lora", f"a={shared / 'a'}", "--batch_size", 2, "--reward_batch_size", 3, *REWARDS]
    run(shared, tmp_path / "one", *more)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command += ["-m", "pso_utils.evaluate", *flags(shared, tmp_path / "two", *more)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert (pixels(tmp_path / "two", "a") == pixels(tmp_path / "one", "a")).all()
    for ours, theirs in zip(untimed(tmp_path / "two"), untimed(tmp_path / "one")):
        for name, score in ours["scores"].items():
            assert score.pop("interval", []) == pytest.approx(theirs["scores"][name].pop("interval", []), abs=1e-6)
            assert score == pytest.approx(theirs["scores"][name], abs=1e-6)


# ---- Rewards that fail ----


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
    assert "2 images were not scored" in caplog.text and "no faces" in caplog.text
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


# ---- Bad input ----


def test_bad_flags_are_one_line_before_a_model_is_loaded(shared, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sdxl, "load_pipeline", load)
    empty, several, captions, other = (tmp_path / name for name in ("empty", "several", "data.jsonl", "other"))
    empty.mkdir(), several.mkdir()
    lora = load_file(shared / "a" / "pytorch_lora_weights.safetensors")
    for name in ("one.safetensors", "two.safetensors"):
        save_file(lora, several / name)
    captions.write_text('{"caption": "a"}\n')
    other.mkdir()
    wider = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in lora.items()}
    save_file(wider, other / "wider.safetensors")
    save_file({key.replace("attn1", "attn9"): value for key, value in lora.items()}, other / "layers.safetensors")
    flux = {key.replace("unet.", "transformer."): value for key, value in lora.items()}
    save_file(flux, other / "flux.safetensors")
    (other / "broken.safetensors").write_text("no weights")
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # of Stable Diffusion 1.5, say
    matrices = {
        "lora_down.weight": torch.ones(4, 320),
        "lora_up.weight": torch.ones(320, 4),
        "alpha": torch.tensor(4.0),
    }
    save_file({f"{kohya}.{name}": value for name, value in matrices.items()}, other / "kohya.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"{layer}.lora_A.weight": torch.ones(4, 768), f"{layer}.lora_B.weight": torch.ones(768, 4)}
    save_file({**lora, **text}, other / "text.safetensors")
    save_file({key: value for key, value in lora.items() if "lora_A" in key}, other / "half.safetensors")
    save_file({key: value * math.nan for key, value in lora.items()}, other / "nan.safetensors")
    pictures = tmp_path / "pictures"
    pictures.mkdir(), Image.new("RGB", (8, 8)).save(pictures / "one.png")
    for more, parts in {
        ("--lora", f"x={tmp_path / 'nowhere'}"): ["--lora x", "does not exist"],
        ("--lora", "x=no/where"): ["x=no/where is no LoRA that can be read", "hub id"],
        ("--lora", f"x={empty}"): ["--lora x", "no .safetensors or .bin"],
        ("--lora", f"x={several}"): ["several LoRA files", "one.safetensors, two.safetensors"],
        ("--lora", str(shared / "a")): ["pass NAME=PATH"],
        ("--lora", f"base={shared / 'a'}"): ["the name base is taken"],
        ("--lora", f"x={other / 'wider.safetensors'}"): ["another architecture", "don't make the weight"],
        ("--lora", f"x={other / 'layers.safetensors'}"): ["another architecture", "unet has no layer", "attn9"],
        ("--lora", f"x={other / 'flux.safetensors'}"): ["no weights for an SDXL pipeline", "transformer.", "Kohya"],
        ("--lora", f"x={other / 'kohya.safetensors'}"): ["another architecture", "(320, 4)", "(64, 64)", "attn1.to_q"],
        ("--lora", f"x={other / 'text.safetensors'}"): ["another architecture", "(768, 4)", "base's text_encoder"],
        ("--lora", f"x={other / 'half.safetensors'}"): ["damaged", "no pair of matrices"],
        ("--lora", f"x={other / 'nan.safetensors'}"): ["not finite"],
        ("--lora", f"x={shared / 'a'}", "--lora", f"X={shared / 'b'}"): ["the name x is taken"],
        ("--lora_scale", "nan"): ["--lora_scale nan"],
        ("--reference_images", str(pictures), "--subject_clip_model", str(tmp_path / "no" / "model")): [
            "--subject_clip_model",
            "does not exist",
        ],
        ("--reference_images", str(pictures), "--subject_clip_model", str(empty)): ["has no config.json"],
        ("--lora", f"x={other / 'broken.safetensors'}"): ["is no LoRA that can be read"],
        ("--reward", "beauty"): ["unknown reward 'beauty'", "aesthetic, clip"],
        ("--reward_model", CLIP): ["--reward_model without --reward"],
        ("--prompts", str(captions)): ["no field 'text'", "['caption']"],
        ("--prompts", str(empty)): ["is not a file"],
        ("--image_column", "image"): ["--image_column needs", "--dataset_name"],
        ("--reference_images", str(empty)): ["has no images"],
        ("--subject_vision_model", "a/b"): ["--subject_vision_model needs --reference_images"],
        ("--num_inference_steps", "4", "2000"): ["not 2000"],
        ("--resolution", "33"): ["--resolution 33"],
    }.items():
        message = error_of(flags(shared, tmp_path / "out", *more), capsys)
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_one_of_several_files_can_be_named_and_training_folders_are_unambiguous(shared, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights_kohya.safetensors")
    shutil.copy(shared / "a" / "pytorch_lora_weights.safetensors", tmp_path)
    assert evaluate.find_lora(f"x={tmp_path}").lora == (str(tmp_path), "pytorch_lora_weights.safetensors")
    assert evaluate.find_lora("x=me/mine:my.safetensors").lora == ("me/mine", "my.safetensors")
    path = shared / "a" / "pytorch_lora_weights.safetensors"
    assert evaluate.find_lora(f"x={path}") == evaluate.Model("x", (str(shared / "a"), path.name))


# ---- Fidelity ----


def test_data_fidelity_equals_plain_loops():
    generator = torch.Generator().manual_seed(0)
    samples, data = (torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1 for count in (4, 3))
    distance, diversity, sharpness = fidelity.data_fidelity(samples, iter(data), 0.25)
    nearest = [min(((sample - image) ** 2).mean().item() for image in data) for sample in samples]
    torch.testing.assert_close(distance, torch.tensor(nearest))
    assert diversity.mean().item() == pytest.approx(mean_pairwise_distance(samples), rel=1e-4)
    torch.testing.assert_close(sharpness, fidelity.sharpness(samples) / 0.25)
    assert math.isnan(fidelity.data_fidelity(samples[:1], data, 1.0)[1])


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
