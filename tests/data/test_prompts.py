"""Reading training prompts, and dealing them out to epochs."""

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, Image

from pso_utils.data.prompts import epoch_prompts, load_prompts
from pso_utils.errors import UserError


def test_text_json_jsonl_and_datasets_give_the_same_prompts(tmp_path):
    prompts = ["red panda", "apple", "café ☕"]
    entries = [{"text": prompt, "id": index} for index, prompt in enumerate(prompts)]
    contents = {
        "prompts.txt": "\n".join(["", *prompts, "  "]),
        "strings.json": json.dumps(prompts),
        "objects.json": json.dumps(entries),
        "columns.json": json.dumps({"text": prompts}),
        "objects.jsonl": "\n".join(map(json.dumps, entries)) + "\n\n",
        "strings.jsonl": "\n".join(map(json.dumps, prompts)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert load_prompts(str(tmp_path / name)) == prompts, name
    (tmp_path / "data").mkdir()
    Dataset.from_list(entries).to_parquet(tmp_path / "data" / "train.parquet")
    dataset = load_prompts(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert dataset == prompts
    assert load_prompts(str(tmp_path / "prompts.txt"), max_train_samples=2) == prompts[:2]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "3", "must hold a list"),
        ("a.jsonl", '"apple"\n{"caption": "pear"}', "entry 2 has no field 'text'; pass --caption_column, one of"),
        ("a.jsonl", '"apple"\n{', "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": 3}', "a caption that is no string"),
        ("a.txt", "\n \n", "has no prompts in it"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_unreadable_prompts_are_a_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_prompts(str(tmp_path / name))


def test_a_missing_dataset_or_column_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="--dataset_name .*nowhere does not exist; pass a file, a folder"):
        load_prompts(dataset_name=str(tmp_path / "nowhere"))
    Dataset.from_dict({"caption": ["apple"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="no column 'text'; pass --caption_column"):
        load_prompts(dataset_name=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    contents = {"a.txt": "apple\r\n\r\n pear \r\n", "a.json": '["apple", "pear"]', "a.jsonl": '"apple"\r\n"pear"\r\n'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert load_prompts(str(tmp_path / name)) == ["apple", "pear"], name


def test_only_a_line_feed_ends_a_line(tmp_path):
    prompts = ["red\u2028panda", "apple\x85tree"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts), "utf-8")
    (tmp_path / "a.txt").write_text("\n".join(prompts), "utf-8")
    assert load_prompts(str(tmp_path / "a.jsonl")) == load_prompts(str(tmp_path / "a.txt")) == prompts


@pytest.fixture
def captions_and_broken_images(tmp_path):
    """A data set of three captions with a column of bytes that are no image."""
    rows = {"text": ["red panda", "apple", "pear"], "image": [{"bytes": b"no image", "path": None}] * 3}
    return Dataset.from_dict(rows).cast_column("image", Image())


def test_files_patterns_and_saved_data_sets_give_their_captions_without_their_images(
    captions_and_broken_images, tmp_path
):
    dataset = captions_and_broken_images
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.select([0]).to_parquet(tmp_path / "part-0.parquet")
    dataset.select([1, 2]).to_parquet(tmp_path / "part-1.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    dataset.remove_columns("image").to_json(tmp_path / "a.jsonl")
    for name in ["a.parquet", "part-*.parquet", "saved", "splits", "a.jsonl"]:
        prompts = load_prompts(dataset_name=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert prompts == dataset["text"][:], name


def test_a_data_sets_caption_that_is_no_string_is_an_error_with_its_row(tmp_path):
    Dataset.from_dict({"text": ["apple", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"row 1 \(counted from 0\) of --dataset_name .* is no string: None; pass another"
    ):
        load_prompts(dataset_name=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))


def test_every_pass_draws_every_prompt_once_in_another_order():
    prompts = [str(index) for index in range(7)]
    drawn = sum((epoch_prompts(prompts, seed=0, epoch=epoch, count=5) for epoch in range(14)), [])  # ten passes
    passes = [drawn[start : start + 7] for start in range(0, 70, 7)]
    assert all(Counter(draws) == Counter(prompts) for draws in passes)
    assert len({tuple(draws) for draws in passes}) == 10
    assert epoch_prompts(prompts, seed=0, epoch=2, count=20) == drawn[40:60]
    assert epoch_prompts(prompts, seed=1, epoch=0, count=7) != epoch_prompts(prompts, seed=0, epoch=0, count=7)
