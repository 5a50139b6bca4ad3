"""`python -m pso_utils.convert`: the file of a run's end, of a checkpoint and of a LoRA file."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import error_line, to_flags

import train_pso_lora_sdxl
from pso_utils import convert
from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.sana_sprint import SanaSprint
from tests.conftest import build_pipeline
from tests.families.cases import find_case


LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_pipeline_dir, tmp_path_factory):
    """A run of two steps, with a checkpoint after the first, and the run's own file for other tools."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("convert")
    (folder / "images").mkdir()
    for index in range(2):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
    flags = {"pretrained_model_name_or_path": tiny_pipeline_dir, "output_dir": folder / "panda", "task": "concept"}
    flags |= {"instance_data_dir": folder / "images", "instance_prompt": "a sks panda", "class_prompt": "a panda"}
    flags |= {"resolution": 32, "rank": 2, "lora_alpha": 3.0, "learning_rate": 1e-2, "max_train_steps": 2}
    flags |= {"checkpointing_steps": 1, "num_reference_images": 2, "num_validation_images": 0, "report_to": "none"}
    flags |= {"scheduler": "euler", "validation_num_inference_steps": 2, "train_batch_size": 1}
    train_pso_lora_sdxl.main(to_flags(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "panda"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of its folder, of the same name, that the test may spoil."""
    return shutil.copytree(trained, tmp_path / "panda")


def main(*arguments):
    convert.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit):
        main(*arguments)
    return error_line(capsys.readouterr().err)


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_ends_with_the_file_and_its_metadata(trained, tiny_pipeline_dir):
    expected = {
        "ss_sd_model_name": tiny_pipeline_dir.rpartition("/")[2],
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "modelspec.trigger_phrase": "a sks panda",
        "modelspec.resolution": "32x32",
        "modelspec.usage_hint": "sampler euler, scheduler sgm_uniform, steps 2, CFG 1.0",
    }
    found = metadata(trained / "panda.safetensors")
    assert {key: found[key] for key in expected} == expected
    weights = load_file(trained / "panda.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert {value.item() for key, value in weights.items() if key.endswith(".alpha")} == {3.0}
    card = (trained / "README.md").read_text()
    assert "Put `panda.safetensors` into `models/loras`" in card and "| sampler | euler |" in card


def test_converting_a_run_writes_the_same_file(run, capsys):
    file = run / "panda.safetensors"
    weights, says = load_file(file), metadata(file)
    file.unlink()
    main(run)
    assert str(file) in capsys.readouterr().out and metadata(file) == says
    again = load_file(file)
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    main(run, "--save_dtype", "bf16")
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_a_checkpoints_file_is_beside_it_and_the_checkpoint_stays_whole(run):
    names = {path.name for path in (run / "checkpoint-1").iterdir()}
    main(run / "checkpoint-1")
    assert {path.name for path in (run / "checkpoint-1").iterdir()} == names
    ours, last = load_file(run / "panda-1.safetensors"), load_file(run / "panda.safetensors")
    assert ours.keys() == last.keys() and any(not torch.equal(ours[key], last[key]) for key in ours)
    assert metadata(run / "panda-1.safetensors")["modelspec.trigger_phrase"] == "a sks panda"


def test_a_file_alone_needs_its_base_and_says_nothing_of_the_sampler(run, tiny_pipeline_dir, tmp_path, capsys):
    alone = tmp_path / "mine.safetensors"
    shutil.copy(run / LORA, alone)
    assert "pass --base, a hub id or a folder" in refused(capsys, alone)
    main(alone, "--base", tiny_pipeline_dir)
    ours, expected = load_file(tmp_path / "mine-converted.safetensors"), load_file(run / "panda.safetensors")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)
    assert "modelspec.usage_hint" not in metadata(tmp_path / "mine-converted.safetensors")
    main(alone, "--base", tiny_pipeline_dir, "--output", tmp_path / "other.safetensors")
    assert load_file(tmp_path / "other.safetensors").keys() == ours.keys()


def test_a_base_that_has_moved_is_named_and_the_flags_still_count(run, tiny_pipeline_dir, tmp_path, capsys):
    for manifest in run.glob("checkpoint-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(tiny_pipeline_dir, "/nowhere"))
    line = refused(capsys, run)
    assert "/nowhere" in line and "--base" in line
    main(run, "--base", tiny_pipeline_dir)
    assert "sgm_uniform, steps 2" in metadata(run / "panda.safetensors")["modelspec.usage_hint"]


def test_another_base_is_one_clear_error(run, tmp_path, capsys):
    build_pipeline(cross_attention_dim=128, block_out_channels=(16, 32)).save_pretrained(tmp_path / "other")
    assert "is no LoRA of this model" in refused(capsys, run, "--base", tmp_path / "other")


def test_a_family_that_no_tool_reads_is_one_clear_error(tmp_path, capsys):
    find_case("sana_sprint").build().save_pretrained(tmp_path / "sana")
    family = SanaSprint(load_pipeline(ModelSource(str(tmp_path / "sana"))))
    family.add_lora(rank=2)
    family.save_lora(tmp_path)
    line = refused(capsys, tmp_path, "--base", tmp_path / "sana")
    assert "no tool but diffusers is known to read a LoRA of a SanaSprintPipeline" in line
    line = refused(capsys, tmp_path, "--base", tmp_path / "sana", "--save_dtype", "fp16")
    assert "none of which is known to read a LoRA of a SanaSprintPipeline: drop it" in line


def test_what_is_no_lora_is_one_clear_error(run, tmp_path, capsys):
    assert "does not exist: pass a run's --output_dir" in refused(capsys, tmp_path / "none")
    assert f"has no {LORA}" in refused(capsys, tmp_path)
    assert "pass another file, whose name ends in .safetensors" in refused(capsys, run, "--output", run / LORA)
    assert "pass another file, whose name ends in .safetensors" in refused(capsys, run, "--output", run / "x.bin")
    (run / LORA).unlink()
    assert f"pass {run / 'checkpoint-1'}" in refused(capsys, run)
    (tmp_path / LORA).write_bytes(b"nothing")
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    assert "is no LoRA that can be read" in refused(capsys, tmp_path)
    with safe_open(run / "checkpoint-1" / LORA, "pt") as file:
        says, weights = file.metadata(), load_file(run / "checkpoint-1" / LORA)
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / LORA, metadata=says)
    assert "has something else than the two matrices of each layer" in refused(capsys, tmp_path)
