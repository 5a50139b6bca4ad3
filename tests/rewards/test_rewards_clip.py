"""CLIP rewards against transformers' own CLIP logits; and what bad models say."""

import json
import os
from pathlib import Path

import pytest
import torch
from reward_inputs import MAX_LENGTH, PROMPTS, make_images, make_tokenizer, one_line, save_clip
from transformers import CLIPImageProcessorPil, CLIPModel

from pso_utils.errors import UserError
from pso_utils.rewards import CLIPReward, Rewards, RewardSpec, load_rewards, parse_rewards
from pso_utils.rewards import clip as clip_module


def test_clip_is_the_models_logit_without_its_scale(clip_dir):
    images = make_images(len(PROMPTS))
    scores = CLIPReward(clip_dir)(images, PROMPTS)

    model = CLIPModel.from_pretrained(clip_dir).eval()
    pixel_values = CLIPImageProcessorPil.from_pretrained(clip_dir)(images, return_tensors="pt")["pixel_values"]
    tokens = make_tokenizer()(
        PROMPTS, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(pixel_values=pixel_values, **tokens).logits_per_image / model.logit_scale.exp()
    assert scores.shape == (len(PROMPTS),) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, logits.diagonal(), rtol=1e-5, atol=1e-6)
    assert scores.unique().numel() == len(PROMPTS)


def test_clip_score_does_not_depend_on_the_batch(clip_dir):
    reward = CLIPReward(clip_dir)
    images = make_images(8)
    prompts = [PROMPTS[index % 3] for index in range(8)]  # padded to other lengths in other batches, and repeated
    alone = torch.cat([reward([image], [prompt]) for image, prompt in zip(images, prompts)])
    for batch_size in (3, 8):
        batches = Rewards([reward], [RewardSpec("clip", 1.0, None)], batch_size=batch_size)(images, prompts)
        torch.testing.assert_close(batches[0], alone, rtol=1e-5, atol=1e-6)
    reversed_scores = reward(images[::-1], prompts[::-1])
    torch.testing.assert_close(reversed_scores.flip(0), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokenizer_limit", [None, 6, 1000])
def test_long_prompts_are_truncated_at_the_lower_of_both_limits(tmp_path, tokenizer_limit):
    options = {} if tokenizer_limit is None else {"model_max_length": tokenizer_limit}
    reward = CLIPReward(save_clip(tmp_path, **options))
    limit = min(tokenizer_limit or MAX_LENGTH, MAX_LENGTH)
    input_ids = reward._tokenize(["cat " * 100])["input_ids"]
    assert input_ids.shape == (1, limit) and input_ids[0, -1] == reward.tokenizer.eos_token_id
    scores = reward(make_images(1) * 2, ["cat " * (limit - 2), "cat " * 100])
    torch.testing.assert_close(scores[0], scores[1])


def test_legacy_end_of_text_configs_are_understood(tmp_path, clip_dir):
    legacy = save_clip(tmp_path, eos_token_id=2)  # as in openai's own repositories
    images = make_images(2)
    torch.testing.assert_close(CLIPReward(legacy)(images, PROMPTS[:2]), CLIPReward(clip_dir)(images, PROMPTS[:2]))


def test_clip_is_float32_though_stored_in_half_precision(clip_dir, tmp_path):
    CLIPModel.from_pretrained(clip_dir).half().save_pretrained(tmp_path)
    for name in os.listdir(clip_dir):
        if "tokenizer" in name or "processor" in name:
            (tmp_path / name).write_bytes(open(os.path.join(clip_dir, name), "rb").read())
    reward = CLIPReward(str(tmp_path))
    assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    images = make_images(3)
    torch.testing.assert_close(
        reward(images, PROMPTS[:3]), CLIPReward(clip_dir)(images, PROMPTS[:3]), rtol=0, atol=2e-2
    )


def test_pickscore_uses_its_own_processor_where_there_is_one(clip_dir, tmp_path, monkeypatch):
    images = make_images(2)
    own = load_rewards(parse_rewards(["pickscore"], [clip_dir]))(images, PROMPTS[:2])
    torch.testing.assert_close(own[0], CLIPReward(clip_dir)(images, PROMPTS[:2]))

    CLIPModel.from_pretrained(clip_dir).save_pretrained(tmp_path)  # PickScore's repository holds the model alone
    monkeypatch.setattr(clip_module, "PICKSCORE_PROCESSOR", clip_dir)
    borrowed = load_rewards([RewardSpec("pickscore", 1.0, str(tmp_path))])(images, PROMPTS[:2])
    torch.testing.assert_close(borrowed, own)


def test_another_models_tokenizer_is_an_error(tmp_path):
    folder = save_clip(tmp_path, eos_token_id=5)
    with pytest.raises(UserError) as info:
        load_rewards([RewardSpec("clip", 1.0, folder)])
    message = one_line(info)
    assert "ends prompts with token" in message and "looks for 5" in message and "reward 'clip'" in message


def test_incomplete_weights_are_an_error(clip_dir, tmp_path):
    folder = save_clip(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    state_dict = {name: value for name, value in model.state_dict().items() if not name.startswith("text_projection")}
    model.save_pretrained(folder, state_dict=state_dict)
    with pytest.raises(UserError) as info:
        load_rewards(parse_rewards(["clip"], [folder]))
    assert "lack 1 tensors" in one_line(info) and "text_projection.weight" in one_line(info)


def test_a_reward_model_in_half_precision_scores_close_to_float32(clip_dir):
    images, specs = make_images(3), parse_rewards(["clip", "jpeg_compressibility"], [clip_dir])
    half, full = load_rewards(specs, dtype=torch.bfloat16), load_rewards(specs)
    assert half.rewards[0].model.dtype == torch.bfloat16
    scores = half(images, PROMPTS[:3])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full(images, PROMPTS[:3]), rtol=0, atol=3e-2)


def test_bad_model_folders_are_found_before_loading(clip_dir, tmp_path):
    def message():
        with pytest.raises(UserError) as info:
            parse_rewards(["clip"], [str(tmp_path)])
        return one_line(info)

    assert "config.json' cannot be read (FileNotFoundError" in message()
    (tmp_path / "config.json").write_text("{")
    assert "config.json' cannot be read (JSONDecodeError" in message()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    assert "type 'siglip'" in message()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "has no weights" in message()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "not a readable .safetensors file" in message()
    (tmp_path / "model.safetensors").write_bytes((Path(clip_dir) / "model.safetensors").read_bytes()[:-1])
    assert "not a readable .safetensors file" in message()
    CLIPModel.from_pretrained(clip_dir).save_pretrained(tmp_path)
    assert "no tokenizer" in message()
    make_tokenizer().save_pretrained(tmp_path)
    assert "no image processor" in message()
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    load_rewards(parse_rewards(["clip"], [str(tmp_path)]))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(CLIPReward, "__init__", offline)
    with pytest.raises(UserError) as info:
        load_rewards(parse_rewards(["clip"]))
    assert "cannot load 'openai/clip-vit-large-patch14'" in one_line(info) and "couldn't connect" in one_line(info)
    assert "--reward_model clip=FOLDER" in one_line(info)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_a_model_that_is_not_to_be_had_is_one_line(name):
    with pytest.raises(UserError) as info:
        load_rewards(parse_rewards([name], ["no-such/model"]))  # the tests run offline
    assert f"reward '{name}': cannot load 'no-such/model': OSError" in one_line(info)
    assert f"--reward_model {name}=FOLDER" in one_line(info)


def test_other_errors_of_loading_a_model_keep_their_traceback(monkeypatch):
    error = RuntimeError("size mismatch")

    def mismatched(*arguments, **options):
        raise error

    monkeypatch.setattr(CLIPReward, "__init__", mismatched)
    with pytest.raises(RuntimeError) as info:
        load_rewards(parse_rewards(["clip"]))
    assert info.value is error and info.traceback[-1].name == "mismatched"
