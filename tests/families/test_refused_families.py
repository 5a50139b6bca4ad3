"""What cannot be tuned is told by the scripts in one line, from the configuration files alone."""

import json

import diffusers
import pytest
from PIL import Image

import train_pso_lora_sdxl
import train_pso_online
from pso_utils.evaluate import __main__ as evaluate
from pso_utils.families import FAMILIES, REFUSED
from tests.families.cases import find_case
from tests.script_runs import error_line, to_flags


VIDEOS = [
    "WanPipeline",
    "LTXPipeline",
    "HunyuanVideoPipeline",
    "CogVideoXPipeline",
    "MochiPipeline",
    "SanaVideoPipeline",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Z-Image without weights, a file of prompts, and a folder with an image."""
    folder = tmp_path_factory.mktemp("refused")
    find_case("z_image").build().save_pretrained(folder / "pipeline")
    weights = list((folder / "pipeline").rglob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        path.unlink()
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    (folder / "images" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a cat"}))
    return folder


@pytest.fixture
def told(folder, tmp_path, capsys):
    """told(main, pipeline class, **flags): the line with which a script ends."""
    index = folder / "pipeline" / "model_index.json"
    plain = index.read_text()

    def told(main=train_pso_online.main, pipeline_class="ZImagePipeline", **flags) -> str:
        index.write_text(json.dumps(json.loads(plain) | {"_class_name": pipeline_class}))
        flags = {"pretrained_model_name_or_path": folder / "pipeline", "output_dir": tmp_path / "output"} | flags
        flags = {"resolution": 32, **flags}
        if main is train_pso_lora_sdxl.main:
            flags |= {"task": "style", "train_data_dir": folder / "images"}
        else:
            flags |= {"prompts": folder / "prompts.txt", "reward": "jpeg_compressibility"}
        with pytest.raises(SystemExit) as exit:
            main(to_flags(flags))
        assert exit.value.code == 2
        return error_line(capsys.readouterr().err)

    yield told
    index.write_text(plain)


@pytest.mark.parametrize("pipeline_class", REFUSED)
def test_a_refused_family_is_told_with_the_reason(told, pipeline_class):
    line = told(pipeline_class=pipeline_class)
    assert f"is a {pipeline_class}, which cannot be tuned here: {REFUSED[pipeline_class]}; pass one of Stable" in line


@pytest.mark.parametrize("pipeline_class", VIDEOS)
def test_videos_are_refused(told, pipeline_class):
    assert f"is a {pipeline_class}, which cannot be tuned here: it draws videos" in told(pipeline_class=pipeline_class)


@pytest.mark.parametrize("pipeline_class", ["KandinskyV22Pipeline", "NobodysPipeline"])
def test_an_unknown_pipeline_is_told_what_can_be_passed(told, pipeline_class):
    assert f"is a {pipeline_class}; pass one of {', '.join(FAMILIES)}" in told(pipeline_class=pipeline_class)


def test_the_names_are_diffusers_own():
    for name in [*FAMILIES, *REFUSED, *VIDEOS]:
        assert hasattr(diffusers, name), name
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("main", [train_pso_online.main, train_pso_lora_sdxl.main, evaluate.main])
@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"scheduler": "lcm"},
            "has no alphas_cumprod to convert: --scheduler is for pipelines whose model was trained by",
        ),
        ({"timesteps": [999, 749, 499, 249]}, "takes no timesteps: pass num_inference_steps"),
        ({"resolution": 40}, "--resolution 40 is not a multiple of 16: pass 32 or 48"),
        ({"guidance_scale": 3.5}, "--guidance_scale 3.5: the model takes no guidance embedding, and PSO tunes without"),
        (
            {"distilled_unet": "nobody/weights"},
            "--distilled_unet: a ZImagePipeline has a transformer: pass --distilled_transformer",
        ),
        ({"max_sequence_length": 513}, "--max_sequence_length: a ZImagePipeline takes at most 512"),
    ],
)
def test_flags_that_do_not_fit_the_family_are_one_line(told, main, flags, message):
    assert message in told(main, **flags)


@pytest.mark.usefixtures("fresh_state")
def test_what_fits_goes_on_to_the_weights(told):
    assert "a model is neither whole in a local folder nor to be had from the hub" in told()
