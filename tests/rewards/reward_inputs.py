"""What rewards are tested with: a tiny CLIP model's folder, images, and a message that must be one line."""

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


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


def make_images(count, size=(40, 32), seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize(size) for array in coarse]


def one_line(error_info):
    message = str(error_info.value)
    assert "\n" not in message
    return message
