"""What the flags and files can tell is told before a model is loaded."""

import math

import pytest
import torch
from evaluation_runs import CLIP, error_of, flags
from PIL import Image
from safetensors.torch import load_file, save_file


pytestmark = pytest.mark.usefixtures("fresh_state")


def test_bad_flags_are_one_line_before_a_model_is_loaded(shared, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pso_utils.run.models.load_pipeline", load)
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
        ("--lora", f"x={other / 'wider.safetensors'}"): ["another architecture", "don't make the base's weight"],
        ("--lora", f"x={other / 'layers.safetensors'}"): [
            "another architecture",
            "no such layer",
            "unet, down_blocks",
            "attn9",
        ],
        ("--lora", f"x={other / 'flux.safetensors'}"): [
            "no weights for the base's architecture, SDXL",
            "transformer.",
            "Kohya",
        ],
        ("--lora", f"x={other / 'kohya.safetensors'}"): ["another architecture", "(320, 4)", "(64, 64)", "attn1.to_q"],
        ("--lora", f"x={other / 'text.safetensors'}"): ["another architecture", "(768, 4)", "text_encoder, "],
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
        ("--prompts", str(empty)): ["has no .txt files in it"],
        ("--image_column", "image"): ["--image_column needs", "--dataset_name"],
        ("--reference_images", str(empty)): ["has no images"],
        ("--subject_vision_model", "a/b"): ["--subject_vision_model needs --reference_images"],
        ("--num_inference_steps", "4", "2000"): ["not 2000"],
        ("--resolution", "33"): ["--resolution 33"],
    }.items():
        message = error_of(flags(shared, tmp_path / "out", *more), capsys)
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()
