"""Each prompt is encoded once, to the same bits whatever it is encoded with."""

import pytest
import torch

from pso_utils.data.latent_cache import TensorCache
from pso_utils.data.prompt_cache import BATCH_SIZE, PromptCache
from pso_utils.families.sdxl import SDXL
from tests.conftest import build_pipeline


PROMPTS = [
    "red panda animal",
    "apple food",
    "grinning face",
    "",
    "sailboat vehicle",
    "a cactus plant in t-shirt",
    "fox",
]


@pytest.fixture(scope="module")
def family():
    return SDXL(build_pipeline())


@pytest.fixture
def encoded(family, monkeypatch) -> list[list[str]]:
    """The prompts of every call of the text encoders."""
    calls, encode_prompts = [], SDXL.encode_prompts

    def encode_and_record(self, prompts):
        calls.append(list(prompts))
        return encode_prompts(self, prompts)

    monkeypatch.setattr(SDXL, "encode_prompts", encode_and_record)
    return calls


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_prompts_are_encoded_once_in_batches_of_one_size(family, encoded):
    embed, prompts = PromptCache(family), [f"prompt {number}" for number in range(BATCH_SIZE + 3)]
    rows = embed([*prompts, *prompts[:4]])
    assert [len(batch) for batch in encoded] == [BATCH_SIZE, BATCH_SIZE]
    assert encoded[0] + encoded[1][:3] == prompts
    assert_equal(rows[len(prompts) :], rows[:4])
    assert_equal(embed(prompts[::-1]), rows[: len(prompts)][::-1])
    assert len(encoded) == 2
    embed([prompts[2], "another"])
    assert set(encoded[2]) == {"another"} and len(encoded[2]) == BATCH_SIZE
    assert embed([]) == [] and len(encoded) == 3


def test_a_prompts_bits_do_not_depend_on_what_it_is_encoded_with(family):
    together = PromptCache(family)(PROMPTS)
    alone = [PromptCache(family)([prompt])[0] for prompt in PROMPTS]
    assert_equal(alone, together)
    expected = family.encode_prompts(PROMPTS[:1])[0]
    for name, tensor in expected.items():
        assert together[0][name].shape == tensor.shape and together[0][name].device.type == "cpu"
        torch.testing.assert_close(together[0][name], tensor)


def test_what_is_kept_is_limited_by_bytes_and_the_oldest_goes_first(family, encoded):
    size = PromptCache(family)(["a"])[0].nbytes
    embed = PromptCache(family, max_bytes=3 * size)
    encoded.clear()
    rows = embed(["a", "b", "c"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in rows[0].values())  # no view of a batch
    embed(["a"])  # used last, now
    assert len(encoded) == 1
    embed(["d"])  # "b" goes
    assert_equal(embed(["a", "c", "d"]), [rows[0], rows[2], embed(["d"])[0]])
    assert len(encoded) == 2
    assert_equal(embed(["b"]), rows[1:2])
    assert [batch[0] for batch in encoded] == ["a", "d", "b"]
    # More prompts at once than are kept, and a prompt that is larger than the limit
    assert_equal(embed(PROMPTS), PromptCache(family)(PROMPTS))
    assert_equal(PromptCache(family, max_bytes=1)(PROMPTS), embed(PROMPTS))


def test_a_store_serves_without_text_encoders_and_tells_them_apart(family, encoded, tmp_path):
    store = TensorCache(tmp_path)
    rows = PromptCache(family, store=store)(PROMPTS)
    assert len(encoded) == 1
    assert_equal(PromptCache(family, store=store)(PROMPTS), rows)
    assert len(encoded) == 1

    other = SDXL(build_pipeline(seed=1))
    other.origin = {"pretrained_model_name_or_path": [["text_encoder/model.safetensors", 1, 2]]}
    embed = PromptCache(other, store=store)
    others = embed(PROMPTS)
    assert len(encoded) == 2 and not torch.equal(others[0]["prompt_embeds"], rows[0]["prompt_embeds"])
    other.free_text_encoders()
    embed = PromptCache(family, max_bytes=1, store=store)
    for prompt, row in zip(PROMPTS, rows):  # dropped from memory, read again
        assert_equal(embed([prompt]), [row])
    assert len(encoded) == 2


def test_a_store_tells_lengths_apart(family, encoded, tmp_path, monkeypatch):
    for length in (256, 512, 256):
        monkeypatch.setattr(family, "max_sequence_length", length)
        PromptCache(family, store=TensorCache(tmp_path))(PROMPTS)
    assert len(encoded) == 2


def test_prompts_that_are_stored_are_read_after_the_text_encoders_have_gone(tmp_path):
    family = SDXL(build_pipeline())
    embed = PromptCache(family, max_bytes=1, store=TensorCache(tmp_path))
    rows = embed(PROMPTS)
    family.free_text_encoders()
    assert_equal(embed(PROMPTS), rows)
