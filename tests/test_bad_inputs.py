"""Hostile and broken inputs of all three programs: each ends with exit code 2 and one line that says what is wrong."""

import io
import json
import logging
import os
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from PIL import Image
from safetensors.torch import save_file
from script_runs import error_line, to_flags

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.evaluate import __main__ as evaluate


pytestmark = pytest.mark.usefixtures("fresh_state")

SURROGATE = '"a \\ud800 cat"'  # JSON for a string that UTF-8 has no bytes for
DEEP = "[" * 100_000
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


# ---- What is read ----


def picture(format_name: str = "PNG", size=(12, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format_name)
    return file.getvalue()


def pair(**changes) -> dict:
    return {"jpg_0": picture(), "jpg_1": picture(), "label_0": 1.0, "caption": "a cat"} | changes


def parquet(path: Path, rows: list[dict], **options) -> None:
    pq.write_table(pa.Table.from_pylist(rows, **options), path)


def header(path: Path, text: bytes, size: int | None = None) -> None:
    """A .safetensors file with this header and nothing else."""
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text)


def lora(path: Path, *, metadata: dict | None = None, rank: int = 2, dtype=torch.float32) -> None:
    weights = {f"{LAYER}.lora_A.weight": torch.zeros(rank, 64), f"{LAYER}.lora_B.weight": torch.zeros(64, rank)}
    save_file({name: value.to(dtype) for name, value in weights.items()}, path, metadata)


def copy_pipeline(source: Path, folder: Path, **changes: str) -> None:
    """A pipeline of links to another one's files, but for those that `changes` gives a text."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_dir():
            (folder / name).mkdir(parents=True)
        elif str(name) not in changes:
            (folder / name).symlink_to(path)
    for name, text in changes.items():
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_pipeline_dir) -> Path:
    """A folder with everything that the table names."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = {
        "style/metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\n',
        "good.txt": "a cat\n",
        "blank.txt": " \n\n",
        "surrogate.json": f"[{SURROGATE}]",
        "surrogate.jsonl": f'{{"text": {SURROGATE}}}\n',
        "deep.json": DEEP,
        "digits.json": f"[{'9' * 5000}]",
        "nested.json": '[["a cat"]]',
        "cut.jsonl": '{"text": "a cat"}\n{"text": "a d\n',
        "no_text.csv": "",
        "cut.csv": '"a\n',
        "rows.jsonl": "\n".join(json.dumps(row) for row in ({"text": "a"}, {"text": ["b"]})),
        "numbers.jsonl": '{"text": 5}\n',
        "not_a.parquet": "PAR1 but not really",
        "not_an.arrow": "ARROW1 but not really",
        "not_a.tar": "ustar but not really",
        "mixed/a.csv": "text\na\n",
        "mixed/a.jsonl": '{"text": "a"}\n',
        "saved/state.json": "{}",
        "saved_list/state.json": "[]",
        "splits/dataset_dict.json": '{"splits": ["train"]}',
        "nothing/notes.md": "",
        "no_caption/metadata.jsonl": '{"file_name": "a.png"}\n',
        "no_file/metadata.jsonl": '{"file_name": "b.png", "text": "a"}\n',
        "outside/metadata.jsonl": '{"file_name": "../picture.png", "text": "a"}\n',
        "no_json/metadata.jsonl": "file_name: a.png\n",
        "ends.py": "import sys\ndef score(images, prompts):\n    sys.exit(0)\n",
        "exits.py": "import sys\nsys.exit(0)\n",
        "a_model/config.json": '["clip"]',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("style/a.png", "no_caption/a.png", "no_file/a.png", "outside/a.png", "no_json/a.png", "picture.png"):
        (folder / name).write_bytes(picture())
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "utf16.jsonl").write_text('{"text": "a"}', encoding="utf-16")
    os.mkfifo(folder / "fifo.txt")

    (folder / "zero.parquet").touch()
    parquet(folder / "empty.parquet", [pair()][:0], schema=pa.Table.from_pylist([pair()]).schema)
    pq.write_table(pa.table({}), folder / "no_columns.parquet")
    parquet(folder / "pairs.parquet", [pair()] * 2)
    (folder / "cut.parquet").write_bytes((folder / "pairs.parquet").read_bytes()[:-9])
    parquet(folder / "labels.parquet", [pair(label_0="yes")])
    parquet(folder / "ties.parquet", [pair(label_0=0.5)] * 2)
    parquet(folder / "numbers.parquet", [pair(caption=5)])
    parquet(folder / "no_images.parquet", [pair(jpg_0=1.5)])
    parquet(folder / "eps.parquet", [pair(jpg_0=picture("EPS"))])
    parquet(folder / "outside.parquet", [pair(jpg_0="../secret.png")])
    parquet(folder / "url.parquet", [pair(jpg_0="reference://a::file:///refs.json")])
    with tarfile.open(folder / "other.tar", "w") as file:
        file.add(folder / "good.txt", "a.txt")
    for name, data in (("broken_picture", picture()[:40]), ("eps_picture", picture("EPS"))):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(data)

    rank = json.dumps({"unet.r": 10**9, "unet.lora_alpha": 10**9, "unet.target_modules": ["to_q"]})
    lora(folder / "huge_rank.safetensors", metadata={LORA_ADAPTER_METADATA_KEY: rank})
    lora(folder / "no_json.safetensors", metadata={LORA_ADAPTER_METADATA_KEY: "{"})
    lora(folder / "a_list.safetensors", metadata={LORA_ADAPTER_METADATA_KEY: "[1]"})
    header(folder / "huge_header.safetensors", b"{}", size=2**60)
    header(
        folder / "huge_shape.safetensors",
        b'{"a": {"dtype": "F32", "shape": [1000000000, 1000000000], "data_offsets": [0, 8]}}',
    )
    (folder / "empty.safetensors").touch()
    save_file({}, folder / "no_weights.safetensors")
    torch.save({"a": [1]}, folder / "list.bin")
    (folder / "text.bin").write_text("weights")

    pipeline = Path(tiny_pipeline_dir)
    unet = json.loads((pipeline / "unet" / "config.json").read_text())
    index = json.loads((pipeline / "model_index.json").read_text())
    pipelines = {
        "index_no_json": {"model_index.json": "{"},
        "index_list": {"model_index.json": "[]"},
        "index_class": {"model_index.json": json.dumps(index | {"_class_name": ["StableDiffusionXLPipeline"]})},
        "index_scheduler": {"model_index.json": json.dumps({k: v for k, v in index.items() if k != "scheduler"})},
        "index_os": {"model_index.json": json.dumps(index | {"scheduler": ["os", "system"]})},
        "unet_no_json": {"unet/config.json": "{"},
        "unet_text": {"unet/config.json": json.dumps(unet | {"block_out_channels": "wide"})},
        "scheduler_text": {"scheduler/scheduler_config.json": '{"num_train_timesteps": "many"}'},
        "weights_cut": {"unet/diffusion_pytorch_model.safetensors": "cut"},
    }
    for name, changes in pipelines.items():
        copy_pipeline(pipeline, folder / name, **changes)
    return folder


# ---- The table ----

# Program or offline task -> flags, in which {} is the folder of `inputs`; a part of the line.
BASE = "pretrained_model_name_or_path"
CAT = {"prompts": "{}/good.txt"}
BAD_INPUTS = {
    # Prompts
    ("online", "a folder of prompts"): ({"prompts": "{}/nothing"}, "has no .txt files in it"),
    ("online", "a FIFO"): ({"prompts": "{}/fifo.txt"}, "is not a file"),
    ("online", "another encoding"): ({"prompts": "{}/latin.txt"}, "is not UTF-8"),
    ("evaluate", "UTF-16"): ({"prompts": "{}/utf16.jsonl"}, "is not UTF-8"),
    ("evaluate", "blank prompts"): ({"prompts": "{}/blank.txt"}, "has no prompts in it"),
    ("online", "a surrogate in JSON"): ({"prompts": "{}/surrogate.json"}, "entry 1 has a caption with half a char"),
    ("evaluate", "a surrogate in JSONL"): ({"prompts": "{}/surrogate.jsonl"}, "half a character"),
    ("online", "a surrogate in a data set"): ({"prompts": None, "dataset_name": "{}/surrogate.jsonl"}, "surrogate"),
    ("online", "brackets without end"): ({"prompts": "{}/deep.json"}, "is not valid JSON"),
    ("evaluate", "a number of 5000 digits"): ({"prompts": "{}/digits.json"}, "is not valid JSON"),
    ("online", "a list in a list"): ({"prompts": "{}/nested.json"}, "is no string"),
    ("online", "a line that is cut off"): ({"prompts": "{}/cut.jsonl"}, "line 2 is not valid JSON"),
    ("evaluate", "captions of two types"): ({"prompts": "{}/rows.jsonl"}, "is no string"),
    ("online", "bytes of no encoding in a flag"): ({"validation_prompts": "a \udcff"}, "--validation_prompts"),
    ("concept", "a surrogate in a flag"): ({"class_prompt": "a \udcff"}, "--class_prompt"),
    # Data sets
    ("preference", "an empty file"): ({"dataset_name": "{}/zero.parquet"}, "zero.parquet"),
    ("preference", "a Parquet without rows"): ({"dataset_name": "{}/empty.parquet"}, "is empty, or has a file that is"),
    ("preference", "a stream without rows"): ({"dataset_name": "{}/empty.parquet", "streaming": True}, "is empty"),
    ("online", "a Parquet without rows"): ({"prompts": None, "dataset_name": "{}/empty.parquet"}, "is empty"),
    ("preference", "a Parquet without columns"): ({"dataset_name": "{}/no_columns.parquet"}, "no_columns.parquet"),
    ("preference", "a Parquet that is cut off"): ({"dataset_name": "{}/cut.parquet"}, "cannot read --dataset_name"),
    ("preference", "text that is called Parquet"): ({"dataset_name": "{}/not_a.parquet"}, "cannot read --dataset_name"),
    ("preference", "a stream of text"): ({"dataset_name": "{}/not_a.parquet", "streaming": True}, "cannot read"),
    ("evaluate", "text that is called arrow"): ({"prompts": None, "dataset_name": "{}/not_an.arrow"}, "cannot read"),
    ("preference", "text that is called tar"): ({"dataset_name": "{}/not_a.tar", "streaming": True}, "not_a.tar"),
    ("preference", "a tar of something else"): ({"dataset_name": "{}/other.tar"}, "has no column"),
    ("online", "an empty CSV"): ({"prompts": None, "dataset_name": "{}/no_text.csv"}, "no_text.csv"),
    ("online", "an open quote"): ({"prompts": None, "dataset_name": "{}/cut.csv"}, "cut.csv"),
    ("evaluate", "captions of numbers"): ({"prompts": None, "dataset_name": "{}/numbers.jsonl"}, "is no string: 5"),
    ("preference", "files of unlike formats"): ({"dataset_name": "{}/mixed/*"}, "files of unlike formats"),
    ("preference", "a pattern of nothing"): ({"dataset_name": "{}/nothing/*.parquet"}, "does not exist"),
    ("preference", "a saved data set without files"): ({"dataset_name": "{}/saved"}, "cannot read --dataset_name"),
    ("style", "a saved list"): ({"train_data_dir": None, "dataset_name": "{}/saved_list"}, "cannot read"),
    ("preference", "splits that are not there"): ({"dataset_name": "{}/splits"}, "cannot read --dataset_name"),
    ("preference", "a folder of no data"): ({"dataset_name": "{}/nothing"}, "cannot read --dataset_name"),
    ("preference", "labels of words"): ({"dataset_name": "{}/labels.parquet"}, "is 'yes'; a label is 1"),
    ("preference", "nothing but ties"): ({"dataset_name": "{}/ties.parquet"}, "is empty after dropping 2 ties"),
    ("preference", "a stream of ties"): (
        {"dataset_name": "{}/ties.parquet", "streaming": True}, "is empty after dropping 2 ties"),
    ("preference", "captions of numbers"): ({"dataset_name": "{}/numbers.parquet"}, "is no string: 5"),
    ("preference", "a winner alone"): ({"winner_column": "jpg_0"}, "--winner_column and --loser_column together"),
    ("preference", "no images"): ({"dataset_name": "{}/no_images.parquet"}, "a float is no image"),
    ("preference", "PostScript"): ({"dataset_name": "{}/eps.parquet"}, "not an image that Pillow reads"),
    ("preference", "somebody else's file"): (
        {"dataset_name": "{}/outside.parquet", "skip_broken_images": True}, "../secret.png leads out of"),
    ("preference", "a file system that runs code"): ({"dataset_name": "{}/url.parquet"}, "may name URLs of"),
    ("style", "no captions"): ({"train_data_dir": "{}/no_caption"}, "no_caption"),
    ("style", "a picture that is not there"): ({"train_data_dir": "{}/no_file"}, "no_file"),
    ("style", "a picture outside"): ({"train_data_dir": "{}/outside"}, "outside"),
    ("style", "metadata that are no JSON"): ({"train_data_dir": "{}/no_json"}, "no_json"),
    ("preference", "pictures without partners"): (
        {"dataset_name": None, "train_data_dir": "{}/style"}, "has no pairs: pass a folder with winner/ and loser/"),
    ("concept", "a file for a folder"): ({"instance_data_dir": "{}/picture.png"}, "is not a folder"),
    ("concept", "no pictures"): ({"instance_data_dir": "{}/nothing"}, "has no images in it"),
    ("concept", "a picture that is cut off"): (
        {"instance_data_dir": "{}/broken_picture", "num_reference_images": 1}, "broken image: "),
    ("evaluate", "PostScript called PNG"): ({"reference_images": "{}/eps_picture"}, "a.png: not an image that Pillow"),
    # Models
    ("online", "an index that is no JSON"): ({BASE: "{}/index_no_json"}, "index_no_json"),
    ("preference", "an index that is a list"): ({BASE: "{}/index_list"}, "index_list"),
    ("evaluate", "a class that is a list"): ({BASE: "{}/index_class"}, "index_class"),
    ("online", "no scheduler"): ({BASE: "{}/index_scheduler"}, "index_scheduler"),
    ("online", "a scheduler that is a program"): ({BASE: "{}/index_os"}, "no scheduler system"),
    ("style", "a configuration that is no JSON"): ({BASE: "{}/unet_no_json"}, "unet_no_json"),
    ("evaluate", "a scheduler of words"): ({BASE: "{}/scheduler_text"}, "scheduler_text"),
    ("online", "weights that are text"): ({BASE: "{}/weights_cut"}, "neither whole in a local folder"),
    ("online", "a header of an exabyte"): (
        {"distilled_unet": "{}/huge_header.safetensors"}, "not a readable .safetensors"),
    ("preference", "a shape of 10^18"): ({"distilled_unet": "{}/huge_shape.safetensors"}, "huge_shape.safetensors"),
    ("online", "weights of no bytes"): ({"distilled_unet": "{}/empty.safetensors"}, "not a readable .safetensors"),
    ("evaluate", "weights of nothing"): ({"distilled_unet": "{}/no_weights.safetensors"}, "keys missing"),
    ("online", "lists for weights"): ({"distilled_unet": "{}/list.bin"}, "holds no state dict of tensors"),
    ("style", "text for weights"): ({"distilled_unet": "{}/text.bin"}, "cannot be read as weights"),
    ("online", "a LoRA of rank 10^9"): ({"distillation_lora": "{}/huge_rank.safetensors"}, "claims rank 1000000000"),
    ("evaluate", "a LoRA of rank 10^9"): ({"lora": "x={}/huge_rank.safetensors"}, "claims rank 1000000000"),
    ("concept", "a LoRA of rank 10^9"): ({"lora_path": "{}/huge_rank.safetensors"}, "claims rank 1000000000"),
    ("evaluate", "LoRA metadata that are no JSON"): ({"lora": "x={}/no_json.safetensors"}, "no_json.safetensors"),
    ("evaluate", "LoRA metadata that are a list"): ({"lora": "x={}/a_list.safetensors"}, "a_list.safetensors"),
    ("evaluate", "a LoRA of an exabyte"): ({"lora": "x={}/huge_header.safetensors"}, "is no LoRA that can be read"),
    ("evaluate", "a LoRA of lists"): ({"lora": "x={}/list.bin"}, "list.bin"),
    # Rewards and the rest
    ("online", "a module that ends the program"): ({"reward": "exits:score"}, "importing exits ends the program"),
    ("online", "a reward that ends the program"): ({"reward": "ends:score"}, "ends the program (SystemExit: 0"),
    ("evaluate", "a reward model's list"): ({"reward": "clip", "reward_model": "{}/a_model"}, "cannot be read"),
    ("online", "a weight without end"): ({"reward": "jpeg_compressibility=1e999"}, "is not a finite number"),
    ("preference", "a name that is too long"): ({"output_dir": "x" * 300}, "--output_dir"),
    ("evaluate", "a folder under a device"): ({"output_dir": "/dev/null/x"}, "/dev/null is a file"),
}  # fmt: skip


@pytest.mark.parametrize("program, name", BAD_INPUTS, ids=lambda part: part.replace(" ", "-"))
def test_a_bad_input_is_one_line(program, name, inputs, tiny_pipeline_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # datasets logs to a stream of an earlier test
    monkeypatch.chdir(inputs)
    monkeypatch.syspath_prepend(inputs)
    own = {
        "online": CAT | {"reward": "jpeg_compressibility"},
        "evaluate": CAT | {"num_inference_steps": 2},
        "preference": {"dataset_name": "{}/pairs.parquet"},
        "style": {"train_data_dir": "{}/style"},
        "concept": {"instance_data_dir": "{}", "instance_prompt": "a cat", "class_prompt": "an animal"},
    }
    values = {"pretrained_model_name_or_path": tiny_pipeline_dir, "output_dir": tmp_path / "out", "resolution": 32}
    values |= own[program] | {"cache_dir": inputs / "cache"}
    if program != "evaluate":
        values |= {"report_to": "none", "num_validation_images": 0, "max_train_steps": 1, "num_inference_steps": 2}
    if program in ("preference", "style", "concept"):
        values["task"] = program
    changes, message = BAD_INPUTS[program, name]
    values = {
        key: value.format(inputs) if isinstance(value, str) else value for key, value in (values | changes).items()
    }
    mains = {"online": train_pso_online.main, "evaluate": evaluate.main}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stop:
        mains.get(program, train_pso_lora_sdxl.main)(to_flags(values))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in errors
    assert message in error_line(errors)
