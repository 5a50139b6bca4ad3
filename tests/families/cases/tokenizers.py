"""Tokenizers that are built offline."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

from tests.conftest import CAPTIONS


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
)


def _train_byte_level_bpe(special: Sequence[str] = (), template: str = "") -> Tokenizer:
    """Every byte is in its vocabulary, after the special tokens; each word of `template` is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000 if template else 320,  # 1000: more than all merges that there are
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CAPTIONS * 2, template], trainer)
    return tokenizer


def build_qwen_tokenizer(max_length: int = 512, *, template: str = "") -> Qwen2Tokenizer:
    """Byte-level BPE with every byte in its vocabulary, and a chat template; each word of `template` is one token."""
    tokenizer = _train_byte_level_bpe(template=template)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(tokenizer.get_vocab())]
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        additional_special_tokens=special[1:],
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def build_gemma_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """BPE over words that begin with a space's mark, trained on `texts`; other characters are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(texts * 2, trainers.BpeTrainer(vocab_size=800, show_progress=False))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(tokenizer.get_vocab())]
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def build_mistral_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> before every text."""
    tokenizer = _train_byte_level_bpe(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **tokens)


def build_t5_tokenizer(max_length: int = 512) -> T5Tokenizer:
    """Unigram, with every ASCII letter and digit in its vocabulary."""
    letters = [chr(code) for code in range(128) if chr(code).isalnum()]
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, initial_alphabet=letters, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 2, trainer)
    vocab = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)
