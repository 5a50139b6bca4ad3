"""What caches and references are kept by."""

import json

import pytest

import train_pso_online
from pso_utils.run.models import model_settings


@pytest.mark.parametrize(
    "change",
    [
        {"mixed_precision": "bf16"},
        {"max_sequence_length": 7},
        {"variant": "fp16"},
        {"guidance_scale": 2.0},
        {"quantize": "nf4"},
        {"scheduler": "ddim"},
        {"distilled_unet": "unet.safetensors"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_precision_length_or_part_is_another_model(tiny_pipeline_dir, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet.safetensors").touch()
    args = train_pso_online.parse_args(["--pretrained_model_name_or_path", tiny_pipeline_dir, "--reward", "clip"])
    settings = model_settings(args)
    assert model_settings(args) == settings == json.loads(json.dumps(settings))
    assert len(settings["pretrained_model_name_or_path"]) > 10  # files
    for name, value in change.items():
        assert getattr(args, name) != value
        setattr(args, name, value)
    assert model_settings(args) != settings
