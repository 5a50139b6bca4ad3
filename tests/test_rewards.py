"""Rewards against transformers' own CLIP logits, PIL's own files and brute-force loops; and what bad input says."""

import io
import itertools
import json
import math
import os
import sys
import types
from importlib.machinery import PathFinder

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pso_utils import rewards as rewards_module
from pso_utils.rewards import (
    IMSCORE,
    REWARDS,
    CLIPReward,
    RewardError,
    Rewards,
    RewardSpec,
    load_rewards,
    parse_rewards,
    register_reward,
    select_pairs,
    to_rgb,
)


try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

MAX_LENGTH = 12
PROMPTS = ["cat", "a red cat on a mat", "", "a prompt that is much longer than the text encoder's twelve tokens"]


def make_tokenizer(**kwargs):
    """A byte-level BPE tokenizer of CLIP's own layout: bytes, bytes that end a word, merges, start, end (largest)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [("c", "a"), ("ca", "t</w>")], **kwargs)


def save_clip(folder, eos_token_id=None, seed=0, **tokenizer_options):
    tokenizer = make_tokenizer(**tokenizer_options)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_config = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=8))
    with torch.no_grad():  # the default initialisation gives embeddings that hardly depend on the input
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """The current folder, with what importing from it does to `sys` undone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def make_images(count, size=(40, 32), seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize(size) for array in coarse]


def one_line(error_info):
    message = str(error_info.value)
    assert "\n" not in message
    return message


# ---- CLIP ----


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
        batches = Rewards([reward], [RewardSpec("clip", 1.0, None)], batch_size)(images, prompts)
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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_images_of_other_modes_score_as_their_rgb_version(clip_dir, mode):
    (image,) = make_images(1)
    reward = CLIPReward(clip_dir)
    converted = image.convert(mode)
    torch.testing.assert_close(reward([converted], ["cat"]), reward([converted.convert("RGB")], ["cat"]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((90, 10, 10, 0), (0, 0, 2, 2))  # a hidden colour under the transparent half
    if mode == "P":
        image = image.quantize(4)
        assert image.mode == "P"
    rgb = to_rgb(image.convert(mode) if mode == "LA" else image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == (255, 255, 255) and rgb.getpixel((3, 1)) == (0, 0, 0)


def test_half_transparent_parts_are_blended_with_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


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
    monkeypatch.setattr(rewards_module, "PICKSCORE_PROCESSOR", clip_dir)
    borrowed = load_rewards([RewardSpec("pickscore", 1.0, str(tmp_path))])(images, PROMPTS[:2])
    torch.testing.assert_close(borrowed, own)


def test_another_models_tokenizer_is_an_error(tmp_path):
    folder = save_clip(tmp_path, eos_token_id=5)
    with pytest.raises(RewardError) as info:
        load_rewards([RewardSpec("clip", 1.0, folder)])
    message = one_line(info)
    assert "ends prompts with token" in message and "looks for 5" in message and "reward 'clip'" in message


def test_incomplete_weights_are_an_error(clip_dir, tmp_path):
    folder = save_clip(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    state_dict = {name: value for name, value in model.state_dict().items() if not name.startswith("text_projection")}
    model.save_pretrained(folder, state_dict=state_dict)
    with pytest.raises(RewardError) as info:
        load_rewards(parse_rewards(["clip"], [folder]))
    assert "lack 1 tensors" in one_line(info) and "text_projection.weight" in one_line(info)


def test_a_reward_model_in_half_precision_scores_close_to_float32(clip_dir):
    images, specs = make_images(3), parse_rewards(["clip", "jpeg_compressibility"], [clip_dir])
    half, full = load_rewards(specs, dtype=torch.bfloat16), load_rewards(specs)
    assert half.rewards[0].model.dtype == torch.bfloat16
    scores = half(images, PROMPTS[:3])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full(images, PROMPTS[:3]), rtol=0, atol=3e-2)


# ---- Aesthetic ----

LINEAR_HEAD = {"weight": (1, 8), "bias": (1,)}
LAYERS = zip((0, 2, 4, 6, 7), ((8, 16), (16, 12), (12, 6), (6, 4), (4, 1)))  # as published, with dropout at 1, 3, 5
DEEP_HEAD = {
    f"layers.{number}.{name}": shape
    for number, (width, outputs) in LAYERS
    for name, shape in {"weight": (outputs, width), "bias": (outputs,)}.items()
}


def save_head(path, shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(head, path) if path.suffix == ".safetensors" else torch.save(head, path)
    return head


@pytest.mark.parametrize("shapes", [LINEAR_HEAD, DEEP_HEAD], ids=["linear", "perceptron"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_published_formula(clip_dir, tmp_path, shapes, suffix):
    path = tmp_path / f"sac+logos+ava1{suffix}"
    head = save_head(path, shapes)
    images = make_images(3) + [make_images(1, seed=9)[0].convert("RGBA")]
    scores = load_rewards(parse_rewards(["aesthetic"], [f"aesthetic={path},{clip_dir}"]))(images, [""] * 4)[0]

    model = CLIPModel.from_pretrained(clip_dir).eval()
    rgb = [image.convert("RGB") for image in images]
    pixel_values = CLIPImageProcessorPil.from_pretrained(clip_dir)(rgb, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedding = model.visual_projection(model.vision_model(pixel_values).pooler_output)
        values = embedding / embedding.norm(dim=-1, keepdim=True)
        if shapes is LINEAR_HEAD:
            expected = values @ head["weight"].T + head["bias"]
        else:
            perceptron = torch.nn.Sequential(
                torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 12), torch.nn.Dropout(0.2),
                torch.nn.Linear(12, 6), torch.nn.Dropout(0.1), torch.nn.Linear(6, 4), torch.nn.Linear(4, 1),
            )  # fmt: skip
            perceptron.load_state_dict({name.removeprefix("layers."): value for name, value in head.items()})
            expected = perceptron.eval()(values)
    torch.testing.assert_close(scores, expected.squeeze(1), rtol=1e-4, atol=1e-4)
    assert scores.unique().numel() == 4


@pytest.mark.parametrize(
    "source, part",
    [
        ("nowhere.pth", "no file 'nowhere.pth'"),
        ("some/repository", "aesthetic=HEAD,CLIP"),  # which of its files is the head?
        ("{head},{folder}", "has no config.json"),
    ],
)
def test_a_missing_part_of_aesthetic_is_found_before_loading(tmp_path, source, part):
    save_head(tmp_path / "head.pth", LINEAR_HEAD)
    with pytest.raises(RewardError) as info:
        parse_rewards(["aesthetic"], [f"aesthetic={source.format(head=tmp_path / 'head.pth', folder=tmp_path)}"])
    assert part in one_line(info) and "reward 'aesthetic'" in one_line(info)


def test_a_head_of_another_clip_is_an_error(clip_dir, tmp_path):
    save_head(tmp_path / "head.pth", {"weight": (1, 768), "bias": (1,)})
    with pytest.raises(RewardError) as info:
        load_rewards(parse_rewards(["aesthetic"], [f"aesthetic={tmp_path / 'head.pth'},{clip_dir}"]))
    assert "(1, 768)" in one_line(info) and "embedding of 8" in one_line(info)


def test_aesthetic_takes_a_file_of_the_hub():
    assert parse_rewards(["aesthetic"])[0].model == "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
    assert parse_rewards(["aesthetic"], ["a/b:c.pth,d/e"])[0].model == "a/b:c.pth,d/e"


# ---- imscore ----


class StandIn(torch.nn.Module):
    """The interface of imscore's scorers; brightness, so that the range of the pixels matters."""

    def __init__(self, source):
        super().__init__()
        self.source, self.weight = source, torch.nn.Parameter(torch.ones(()))

    @classmethod
    def from_pretrained(cls, source, cache_dir=None):
        return cls(source)

    def score(self, pixels, prompts):
        assert not self.training and len(pixels) == len(prompts) and 0 <= pixels.min() <= pixels.max() <= 1
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return (self.weight * pixels.mean(dim=(1, 2, 3)) + lengths)[:, None]  # [B, 1], as ImageReward's


@pytest.fixture
def imscore(monkeypatch):
    """Stands where `imscore.hps.model` would, with everything found that the real ones need."""
    module = types.ModuleType("imscore.hps.model")
    module.HPSv2 = StandIn
    for name in ("imscore", "imscore.hps", "torchvision"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "imscore.hps.model", module)
    find_spec = rewards_module.importlib.util.find_spec
    known = ("imscore", "torchvision")
    monkeypatch.setattr(
        rewards_module.importlib.util, "find_spec", lambda name, *rest: name in known or find_spec(name, *rest)
    )


def test_imscore_is_given_pixels_from_0_to_1_and_its_logits_are_the_scores(imscore):
    (spec,) = specs = parse_rewards(["imscore:HPSv2=2"])
    assert spec == RewardSpec("imscore:HPSv2", 2.0, "RE-N-Y/hpsv21")
    rewards = load_rewards(specs)
    assert rewards.rewards[0].model.source == "RE-N-Y/hpsv21"
    images = [Image.new("RGB", (8, 8), (51, 51, 51)), Image.new("RGBA", (8, 8), (0, 0, 0, 0))]
    torch.testing.assert_close(rewards(images, ["", "ab"]), torch.tensor([[0.2, 3.0]]))  # transparent is white
    images[1] = images[1].resize((16, 8))  # of another size
    torch.testing.assert_close(rewards(images, ["", "ab"]), torch.tensor([[0.2, 3.0]]))
    own = parse_rewards(["imscore:HPSv2"], ["imscore:HPSv2=me/mine"])
    assert load_rewards(own, dtype=torch.bfloat16).rewards[0].model.weight.dtype == torch.bfloat16
    assert own[0].model == "me/mine"


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(rewards_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardError) as info:
        parse_rewards(["imscore:ImageReward"])
    assert "needs imscore and torchvision" in one_line(info) and "pip install imscore torchvision" in one_line(info)


def test_every_scorer_of_imscore_is_known_and_no_other():
    assert {f"imscore:{name}" for name in IMSCORE} <= REWARDS.keys()
    with pytest.raises(RewardError) as info:
        parse_rewards(["imscore:HPS2"])
    assert "did you mean 'imscore:HPSv2'?" in one_line(info)


# ---- JPEG ----


def test_jpeg_rewards_are_the_size_of_the_file_and_its_negative(tmp_path):
    images = make_images(3, size=(64, 64)) + [make_images(1, seed=5)[0].convert("RGBA")]
    sizes = []
    for image in images:
        image.convert("RGB").save(tmp_path / "image.jpg", quality=95)
        sizes.append(os.path.getsize(tmp_path / "image.jpg") / 1000)
    scores = load_rewards(parse_rewards(["jpeg_incompressibility", "jpeg_compressibility=0.1"]))(images, [""] * 4)
    torch.testing.assert_close(scores, torch.tensor([sizes, [-size for size in sizes]]))
    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(buffer, format="JPEG", quality=95)
    rewards = load_rewards(parse_rewards(["jpeg_compressibility"]))
    plain, detailed = rewards([Image.new("RGB", (64, 64), "red"), noise], ["", ""])[0]
    assert plain > detailed


# ---- The command line ----


def test_specs_are_parsed(clip_dir):
    assert parse_rewards(["pickscore", "jpeg_compressibility=-0.1"]) == [
        RewardSpec("pickscore", 1.0, "yuvalkirstain/PickScore_v1"),
        RewardSpec("jpeg_compressibility", pytest.approx(-0.1), None),
    ]
    assert parse_rewards(["clip"]) == [RewardSpec("clip", 1.0, "openai/clip-vit-large-patch14")]
    assert parse_rewards(["clip=2", "jpeg_compressibility"], [clip_dir])[0] == RewardSpec("clip", 2.0, clip_dir)
    assert parse_rewards(["clip", "pickscore"], [f"pickscore={clip_dir}", "clip=org/model.v1"]) == [
        RewardSpec("clip", 1.0, "org/model.v1"),
        RewardSpec("pickscore", 1.0, clip_dir),
    ]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    folder = save_clip(tmp_path / "rank=16")
    assert parse_rewards(["clip"], [folder])[0].model == folder


def test_a_home_folder_is_expanded(clip_dir, monkeypatch):
    monkeypatch.setenv("HOME", os.path.dirname(clip_dir))
    assert parse_rewards(["clip"], ["~/" + os.path.basename(clip_dir)])[0].model == clip_dir


@pytest.mark.parametrize(
    "specs, models, parts",
    [
        ([], None, ["no reward is given", "clip, jpeg_compressibility"]),
        (["clp"], None, ["unknown reward 'clp'", "did you mean 'clip'?", "pickscore", "module:function"]),
        (["beauty"], None, ["unknown reward 'beauty'.", "jpeg_incompressibility"]),
        (["clip=high"], None, ["weight 'high' of reward 'clip'", "clip=0.5"]),
        (["clip="], None, ["weight '' of reward 'clip'"]),
        (["clip=nan"], None, ["finite"]),
        (["clip=inf"], None, ["finite"]),
        (["clip=1e39"], None, ["finite"]),
        (["clip=0"], None, ["other than 0"]),
        (["clip", "clip=2"], None, ["'clip' is given twice"]),
        (["clip"], ["./nowhere"], ["reward 'clip'", "no folder './nowhere'", "hub id"]),
        (["clip"], ["clip=/no/where/at/all"], ["no folder '/no/where/at/all'"]),
        (["clip"], [__file__], ["is a file", "pass the folder"]),
        (["clip"], ["pickscore=a/b"], ["'pickscore' is none of the rewards", "one of clip"]),
        (["pickscore"], ["pikscore=a/b"], ["did you mean 'pickscore'?"]),
        (["clip", "pickscore"], ["a/b"], ["NAME=MODEL", "clip, pickscore"]),
        (["clip"], ["a/b", "clip=c/d"], ["two models"]),
        (["jpeg_compressibility"], ["a/b"], ["take no model", "drop --reward_model"]),
        (["jpeg_compressibility"], ["jpeg_compressibility=a/b"], ["take no model", "drop --reward_model"]),
    ],
)
def test_bad_flags_say_what_to_pass(specs, models, parts):
    with pytest.raises(RewardError) as info:
        parse_rewards(specs, models)
    for part in parts:
        assert part in one_line(info)


def test_bad_model_folders_are_found_before_loading(clip_dir, tmp_path):
    def message():
        with pytest.raises(RewardError) as info:
            parse_rewards(["clip"], [str(tmp_path)])
        return one_line(info)

    assert "has no config.json" in message()
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in message()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    assert "type 'siglip'" in message()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "has no weights" in message()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no tokenizer" in message()
    make_tokenizer().save_pretrained(tmp_path)
    assert "no image processor" in message()
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    specs = parse_rewards(["clip"], [str(tmp_path)])  # the files are there; that they are broken shows on loading
    with pytest.raises(RewardError) as info:
        load_rewards(specs)
    assert "cannot load" in one_line(info) and "--reward_model clip=FOLDER" in one_line(info)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(CLIPReward, "__init__", offline)
    with pytest.raises(RewardError) as info:
        load_rewards(parse_rewards(["clip"]))
    assert "cannot load 'openai/clip-vit-large-patch14'" in one_line(info) and "couldn't connect" in one_line(info)


# ---- The user's own ----


def test_a_module_in_the_current_folder_is_a_reward(own_modules):
    (own_modules / "my_reward.py").write_text(
        "def score(images, prompts):\n"
        "    return [len(prompt) + image.width / 100 for image, prompt in zip(images, prompts)]\n"
    )
    specs = parse_rewards(["my_reward:score=0.5", "jpeg_compressibility"])
    rewards = load_rewards(specs, batch_size=2)
    assert rewards.names == ["my_reward:score", "jpeg_compressibility"] and rewards.weights.tolist() == [0.5, 1.0]
    scores = rewards(make_images(3), ["", "a", "bb"])
    torch.testing.assert_close(scores[0], torch.tensor([0.4, 1.4, 2.4]))


def test_a_module_beside_the_script_is_a_reward(own_modules, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("beside")
    (folder / "beside_reward.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(folder / "train.py"), raising=False)
    assert load_rewards(parse_rewards(["beside_reward:score"]))(make_images(2), ["", ""]).tolist() == [[1.0, 1.0]]


def test_a_module_in_a_package_is_a_reward(own_modules):
    (own_modules / "my_package").mkdir()
    (own_modules / "my_package" / "__init__.py").touch()
    (own_modules / "my_package" / "inner.py").write_text("def score(images, prompts):\n    return [2] * len(images)\n")
    assert load_rewards(parse_rewards(["my_package.inner:score"]))(make_images(1), [""]).tolist() == [[2.0]]


def test_the_current_folder_does_not_shadow_installed_packages(own_modules):
    (own_modules / "tokenizers.py").touch()
    (own_modules / "plain_reward.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    parse_rewards(["plain_reward:score"])
    assert not PathFinder.find_spec("tokenizers", sys.path).origin.startswith(str(own_modules))


@pytest.mark.parametrize(
    "source, spec, parts",
    [
        (None, "absent:score", ["no module 'absent'", "absent.py"]),
        (None, "absent.inner:score", ["no module 'absent.inner'", "absent/inner.py"]),
        ("import not_there\n", "broken:score", ["importing broken failed", "ModuleNotFoundError", "'not_there'"]),
        ("import broken_too\n", "broken:score", ["importing broken failed", "'broken_too'"]),
        ("def score(\n", "broken:score", ["importing broken failed", "SyntaxError"]),
        ("1 / 0\n", "broken:score", ["importing broken failed", "ZeroDivisionError: division by zero"]),
        ("raise SystemExit(2)\n", "broken:score", ["importing broken failed", "SystemExit"]),
        ("def score(images, prompts): ...\n", "broken:scor", ["has no 'scor'", "did you mean 'score'?"]),
        ("import math\n", "broken:score", ["has no 'score'", "no function"]),
        ("score = 3\n", "broken:score", ["is a int, not a function", "(images, prompts)"]),
        ("def score(images): ...\n", "broken:score", ["score(images)", "must take (images, prompts)"]),
        (
            "def score(images, prompts): ...\n",
            "broken.py:score",
            ["is not module:function", "without folders and .py"],
        ),
        (None, "folder/broken.py:score", ["is not module:function", "without folders and .py"]),
        (None, "broken:", ["is not module:function"]),
        (None, ":score", ["is not module:function"]),
    ],
)
def test_a_module_that_cannot_be_used_says_why(own_modules, source, spec, parts):
    if source is not None:
        (own_modules / "broken.py").write_text(source)
    with pytest.raises(RewardError) as info:
        parse_rewards([spec])
    for part in parts:
        assert part in one_line(info)


# ---- Scoring ----


def make_rewards(*functions, batch_size=8):
    return Rewards(functions, [RewardSpec(f"mine:f{i}", 1.0, None) for i in range(len(functions))], batch_size)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda values: torch.tensor(values, dtype=torch.float64),
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True),
        lambda values: [torch.tensor(value) for value in values],
        lambda values: [np.float64(value) for value in values],
        lambda values: np.array(values, dtype=np.int64),
    ],
)
def test_lists_arrays_and_tensors_are_scores(convert):
    scores = make_rewards(lambda images, prompts: convert([float(len(prompt)) for prompt in prompts]))(
        make_images(3), ["", "a", "bb"]
    )
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [[0.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    "result, parts",
    [
        (1.0, ["returned shape []"]),
        ([1.0], ["returned shape [1]"]),
        (torch.zeros(3, 1), ["returned shape [3, 1]"]),
        ([1.0, math.nan, math.inf], ["returned nan for the prompt 'b'", "2 of 3"]),
        (torch.tensor([0.0, 1.0, 1e300], dtype=torch.float64), ["returned inf for the prompt 'c'", "1 of 3"]),
        (None, ["returned None"]),
        (["a", "b", "c"], ["returned a list of str"]),
        ([[1.0], [1.0, 2.0], [3.0]], ["returned a list of list"]),
        ({"score": 1}, ["returned a dict"]),
        (np.array([1j, 1, 1]), ["returned a ndarray"]),
    ],
)
def test_other_results_are_errors_that_say_what_to_return(result, parts):
    with pytest.raises(RewardError) as info:
        make_rewards(lambda images, prompts: result)(make_images(3), ["a", "b", "c"])
    for part in [*parts, "reward 'mine:f0'", "float tensor of shape [3]"]:
        assert part in one_line(info)


def test_an_exception_of_a_reward_is_one_line_with_its_place():
    def score(images, prompts):
        raise KeyError("first line\nsecond line")

    with pytest.raises(RewardError) as info:
        make_rewards(score)(make_images(1), [""])
    assert "reward 'mine:f0' raised KeyError" in one_line(info) and "(test_rewards.py:" in one_line(info)
    assert isinstance(info.value.__cause__, KeyError)


def test_an_interrupt_is_not_swallowed():
    def score(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_rewards(score)(make_images(1), [""])


def test_rewards_are_scored_in_batches_in_order_and_without_gradient():
    sizes = []

    def score(images, prompts):
        sizes.append((len(images), len(prompts)))
        assert not torch.is_grad_enabled()
        return [float(prompt) for prompt in prompts]

    rewards = make_rewards(score, lambda images, prompts: [-float(prompt) for prompt in prompts], batch_size=3)
    scores = rewards(make_images(7), [str(index) for index in range(7)])
    assert sizes == [(3, 3), (3, 3), (1, 1)]
    assert scores.tolist() == [list(range(7)), [-index for index in range(7)]]
    assert rewards([], []).shape == (2, 0)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        rewards(make_images(2), ["a"])


def test_to_moves_what_can_be_moved(clip_dir):
    class Movable:
        device = None

        def __call__(self, images, prompts):
            return [0.0] * len(images)

        def to(self, device):
            self.device = device

    movable, clip = Movable(), CLIPReward(clip_dir)
    rewards = make_rewards(lambda images, prompts: [0.0] * len(images), movable, clip)
    assert rewards.to("meta") is rewards
    assert movable.device == "meta" and clip.model.device.type == "meta"


def test_a_reward_is_added_by_one_registration(monkeypatch):
    monkeypatch.setattr(rewards_module, "REWARDS", dict(REWARDS))
    checked = []

    @register_reward("darkness", default_model="some/model", check_model=checked.append)
    def darkness(model, cache_dir):
        return lambda images, prompts: [float(len(f"{model}{cache_dir}"))] * len(images)

    specs = parse_rewards(["darkness=2"])
    assert specs == [RewardSpec("darkness", 2.0, "some/model")] and not checked
    assert load_rewards(specs, cache_dir="cache")(make_images(1), [""]).item() == len("some/modelcache")
    parse_rewards(["darkness"], [os.path.dirname(__file__)])
    assert checked == [os.path.dirname(__file__)]
    with pytest.raises(ValueError, match="taken"):
        register_reward("darkness")


# ---- Pairs ----


def brute_force(scores, weights, combination):
    num_rewards, num_prompts, num_samples = scores.shape
    pairs = []
    for prompt in range(num_prompts):
        sample = [[scores[r, prompt, k].item() for r in range(num_rewards)] for k in range(num_samples)]
        total = [sum(w.item() * s for w, s in zip(weights, values)) for values in sample]
        best = None
        for i, j in itertools.product(range(num_samples), repeat=2):
            signed = [
                (math.copysign(1, w) * a, math.copysign(1, w) * b) for w, a, b in zip(weights, sample[i], sample[j])
            ]
            if combination == "sum":
                wins = total[i] > total[j]
            else:
                wins = all(a >= b for a, b in signed) and any(a > b for a, b in signed)
            if wins and (best is None or total[i] - total[j] > best[0]):
                best = (total[i] - total[j], i, j)
        pairs.append(best and best[1:])
    return pairs


@pytest.mark.parametrize("combination", ["sum", "pareto"])
@pytest.mark.parametrize("num_samples", [2, 3, 6])
@pytest.mark.parametrize("weights", [[1.0], [-2.0], [1.0, 0.1], [1.0, -0.5, 3.0]])
@pytest.mark.parametrize("levels", [2, 5, None])
def test_pairs_equal_the_brute_force(combination, num_samples, weights, levels):
    generator = torch.Generator().manual_seed(len(weights) * 100 + num_samples)
    shape = (len(weights), 200, num_samples)
    if levels is None:
        scores = torch.randn(shape, generator=generator)
    else:  # few levels: many equal scores
        scores = torch.randint(levels, shape, generator=generator).float()
    weights = torch.tensor(weights)
    selection = select_pairs(scores, weights, combination)
    expected = brute_force(scores, weights, combination)
    assert selection.target.dtype == selection.reference.dtype == torch.long and selection.tie.dtype == torch.bool
    assert selection.tie.tolist() == [pair is None for pair in expected]
    kept = [prompt for prompt, pair in enumerate(expected) if pair is not None]
    found = [(selection.target[prompt].item(), selection.reference[prompt].item()) for prompt in kept]
    assert found == [expected[prompt] for prompt in kept]


def test_two_samples_are_ordered_by_their_score():
    selection = select_pairs(torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]]), torch.tensor([1.0]))
    assert selection.target.tolist()[:2] == [1, 0] and selection.reference.tolist()[:2] == [0, 1]
    assert selection.tie.tolist() == [False, False, True]


def test_pareto_wants_every_reward_and_sum_their_weighted_sum():
    scores = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]], [[1.0, 5.0], [1.0, 1.0], [2.0, 2.0]]])
    weights = torch.tensor([1.0, 1.0])
    assert select_pairs(scores, weights, "sum").tie.tolist() == [False, False, True]
    assert select_pairs(scores, weights, "sum").target.tolist()[:2] == [1, 0]
    pareto = select_pairs(scores, weights, "pareto")
    assert pareto.tie.tolist() == [True, False, True] and pareto.target[1] == 0
    # A negative weight turns its reward round: what was a conflict agrees.
    turned = select_pairs(scores, torch.tensor([1.0, -1.0]), "pareto")
    assert turned.tie.tolist() == [False, False, True] and turned.target.tolist()[:2] == [0, 0]


def test_equal_samples_tie_wherever_they_stand():
    # 33 samples of 9 rewards: long enough for a vectorised reduction with a remainder.
    weights = torch.linspace(0.1, 1.7, 9)
    scores = torch.randn(9, 50, 1, generator=torch.Generator().manual_seed(0)).expand(9, 50, 33)
    for combination in ("sum", "pareto"):
        assert select_pairs(scores, weights, combination).tie.all()


@pytest.mark.parametrize(
    "scores, weights, combination, message",
    [
        (torch.zeros(1, 2, 1), [1.0], "sum", "at least 2 samples"),
        (torch.zeros(2, 2), [1.0, 1.0], "sum", "at least 2 samples"),
        (torch.zeros(2, 2, 2), [1.0], "sum", "one weight for each reward"),
        (torch.zeros(1, 2, 2), [1.0], "best", "pass one of sum, pareto"),
    ],
)
def test_bad_selections_are_named(scores, weights, combination, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(scores, torch.tensor(weights), combination)
