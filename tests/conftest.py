"""A random tiny SDXL pipeline, built offline, for tests that need the architecture and not its quality."""

import json
import logging
import os
import signal


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core is faster than two threads each

# a shell's background jobs ignore these, and what is ignored stays ignored in the programs under test
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402


CAPTIONS = ["red panda animal", "apple food", "grinning face", "sailboat vehicle", "t-shirt clothes", "cactus plant"]


def build_tokenizer(max_length: int = 24) -> CLIPTokenizer:
    """A byte-level BPE tokenizer trained on a handful of captions; every byte, and every byte that ends a word, is in
    its vocabulary, so that no text is unknown."""
    bytes_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=bytes_alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 2, trainer)
    tokens = ["<|startoftext|>", "<|endoftext|>"] + bytes_alphabet + [byte + "</w>" for byte in bytes_alphabet]
    tokens += sorted(set(tokenizer.get_vocab()) - set(tokens))
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length=max_length)


def build_pipeline(seed: int = 0, **unet_config) -> StableDiffusionXLPipeline:
    """SDXL's architecture at 32 px (4 x 8 x 8 latents) with random weights; `unet_config` overrides the UNet's."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "cross_attention_dim": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 128 + 6 * 8,
            **unet_config,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        force_upcast=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=128, **text_config)),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
        unet=unet,
        scheduler=LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=1000
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> str:
    """The folder of a random tiny SDXL pipeline, float32, saved by `save_pretrained`."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    build_pipeline().save_pretrained(folder)
    return str(folder)


def pytest_collection_modifyitems(items):
    """Fast tests first: what trains for long runs after all others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def fresh_state():
    """For tests that run a training script."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture
def denoiser_calls(monkeypatch) -> list[tuple[bool, bool, int]]:
    """Every call of the trained denoiser as (with gradient, LoRA on, batch size)."""
    from pso_utils.run import models

    calls, add_trained_lora = [], models.add_trained_lora

    def add_and_count(args, accelerator, family):
        parameters = add_trained_lora(args, accelerator, family)

        def count(module, inputs, output):
            calls.append((torch.is_grad_enabled(), not family.lora_layers[0].disable_adapters, len(inputs[0])))

        family.denoiser.register_forward_hook(count)
        return parameters

    monkeypatch.setattr(models, "add_trained_lora", add_and_count)
    return calls


@pytest.fixture
def encoded_images(monkeypatch) -> list[int]:
    """How many images each `Family.encode_images` gets."""
    from pso_utils.families import Family

    calls, encode_images = [], Family.encode_images

    def encode_and_count(self, pixels):
        calls.append(len(pixels))
        return encode_images(self, pixels)

    monkeypatch.setattr(Family, "encode_images", encode_and_count)
    return calls
