"""From what the model flags name to a frozen pipeline, and what is said of what cannot be loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from family_inputs import batch, draw, one_line, plain_pipeline, randomize_lora
from peft import LoraConfig
from safetensors.torch import save_file

from pso_utils.errors import UserError
from pso_utils.families import lora
from pso_utils.families.loading import ModelSource, load_pipeline, read_model_info
from pso_utils.families.sdxl import SDXL
from pso_utils.schedules import make_schedule
from tests.conftest import build_pipeline


LORA_NAME = "pytorch_lora_weights.safetensors"


def save_weights(state_dict, path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)
    return str(path)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- Loading ----


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("force_upcast", [False, True])
def test_every_part_has_the_dtype_asked_for(tmp_path, stored, weight_dtype, force_upcast):
    source = build_pipeline()
    source.vae.register_to_config(force_upcast=force_upcast)
    source.to(stored).save_pretrained(tmp_path)
    pipeline = load_pipeline(ModelSource(str(tmp_path)), weight_dtype=weight_dtype)
    for part, dtype in {
        pipeline.unet: weight_dtype,
        pipeline.text_encoder: weight_dtype,
        pipeline.text_encoder_2: weight_dtype,
        pipeline.vae: torch.float32 if force_upcast else weight_dtype,
    }.items():
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())
    if force_upcast:
        weight = pipeline.vae.decoder.conv_in.weight
        assert torch.equal(weight, source.vae.decoder.conv_in.weight.float())


def test_loaded_pipeline_draws_what_diffusers_pipeline_draws(tiny_pipeline_dir, pipeline):
    assert np.array_equal(draw(pipeline), draw(plain_pipeline(tiny_pipeline_dir)))


def test_the_family_is_that_of_the_pipelines_class(tiny_pipeline_dir, pipeline, pipeline_copy):
    assert read_model_info(ModelSource(tiny_pipeline_dir)).family is SDXL
    edit_json(pipeline_copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    source = ModelSource(str(pipeline_copy))
    assert read_model_info(source).family is SDXL
    loaded = load_pipeline(source)
    assert type(loaded) is StableDiffusionXLPipeline and np.array_equal(draw(loaded), draw(pipeline))


def test_the_configurations_are_those_of_what_is_loaded(tiny_pipeline_dir, tmp_path):
    source = build_pipeline(time_cond_proj_dim=16)
    source.unet.save_pretrained(tmp_path / "unet")
    source.vae.register_to_config(scaling_factor=0.5, force_upcast=True)
    source.vae.save_pretrained(tmp_path / "vae")
    source = ModelSource(tiny_pipeline_dir, vae=str(tmp_path / "vae"), distilled_denoiser=str(tmp_path / "unet"))
    info, pipeline = read_model_info(source), load_pipeline(source)
    assert info.denoiser_config["time_cond_proj_dim"] == pipeline.unet.config.time_cond_proj_dim == 16
    assert info.vae_config["scaling_factor"] == pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.scheduler.config == info.scheduler.config


# ---- The scheduler ----


@pytest.mark.parametrize("time_cond_proj_dim, steps", [(None, 1000), (16, 50)])
def test_converting_to_lcm_takes_the_grid_that_the_denoiser_was_distilled_on(
    tiny_pipeline_dir, tmp_path, time_cond_proj_dim, steps
):
    build_pipeline(time_cond_proj_dim=time_cond_proj_dim).unet.save_pretrained(tmp_path)
    settings = {"scheduler": "lcm", "distilled_denoiser": str(tmp_path)}
    source = ModelSource(tiny_pipeline_dir, **settings)
    for scheduler in (read_model_info(source).scheduler, load_pipeline(source).scheduler):
        assert isinstance(scheduler, LCMScheduler) and scheduler.config.original_inference_steps == steps
    timesteps = make_schedule(scheduler, 4).timesteps.tolist()
    assert timesteps == ([999, 749, 499, 249] if steps == 1000 else [999, 759, 499, 259])
    given = ModelSource(tiny_pipeline_dir, original_inference_steps=100, **settings)
    assert read_model_info(given).scheduler.config.original_inference_steps == 100


def test_without_a_conversion_the_scheduler_stays_the_pipelines(pipeline_copy):
    edit_json(pipeline_copy / "scheduler" / "scheduler_config.json", original_inference_steps=40)
    edit_json(pipeline_copy / "unet" / "config.json", time_cond_proj_dim=16)
    scheduler = read_model_info(ModelSource(str(pipeline_copy))).scheduler
    assert isinstance(scheduler, LCMScheduler) and scheduler.config.original_inference_steps == 40
    given = ModelSource(str(pipeline_copy), original_inference_steps=100)
    assert read_model_info(given).scheduler.config.original_inference_steps == 100


def test_other_conversions_are_those_of_the_schedules_module(tiny_pipeline_dir):
    source = ModelSource(tiny_pipeline_dir, scheduler="ddim", timestep_spacing="leading")
    for scheduler in (read_model_info(source).scheduler, load_pipeline(source).scheduler):
        assert isinstance(scheduler, DDIMScheduler) and scheduler.config.timestep_spacing == "leading"
        assert scheduler.config.beta_schedule == "scaled_linear"  # the pipeline's noise levels
    with pytest.raises(UserError, match="original_inference_steps has no effect on DDIMScheduler"):
        read_model_info(ModelSource(tiny_pipeline_dir, scheduler="ddim", original_inference_steps=50))


# ---- A denoiser instead of the pipeline's ----


@pytest.mark.parametrize("filename", ["unet.safetensors", "unet.bin"])
@pytest.mark.parametrize("as_repo_file", [False, True])
def test_distilled_denoiser_from_a_file_is_fully_materialised(tiny_pipeline_dir, tmp_path, filename, as_repo_file):
    distilled = build_pipeline(seed=5).unet
    name = save_weights(distilled.half().state_dict(), tmp_path / filename)
    name = f"{tmp_path}:{filename}" if as_repo_file else name
    source = ModelSource(tiny_pipeline_dir, distilled_denoiser=name)
    read_model_info(source)
    unet = load_pipeline(source).unet
    assert isinstance(unet, UNet2DConditionModel)
    assert not any(value.is_meta for value in [*unet.parameters(), *unet.buffers()])
    for key, value in distilled.state_dict().items():
        assert torch.equal(unet.state_dict()[key], value.float())


def test_distilled_denoiser_from_a_folder_with_its_own_config(tiny_pipeline_dir, tmp_path):
    distilled = build_pipeline(seed=5, time_cond_proj_dim=16).unet
    distilled.save_pretrained(tmp_path)
    pipeline = load_pipeline(ModelSource(tiny_pipeline_dir, distilled_denoiser=str(tmp_path)))
    assert pipeline.unet.config.time_cond_proj_dim == 16
    assert all(torch.equal(pipeline.unet.state_dict()[key], value) for key, value in distilled.state_dict().items())
    family = SDXL(pipeline)
    assert batch(family)["timestep_cond"].shape == (2, 16) and family.guidance_scale == 8


@pytest.mark.parametrize("filename", ["unet.safetensors", "unet.bin"])
def test_distilled_denoiser_of_another_architecture_is_one_clear_error(tiny_pipeline_dir, tmp_path, filename):
    functions = [load_pipeline, read_model_info] if filename.endswith(".safetensors") else [load_pipeline]
    deep, wide = build_pipeline(layers_per_block=2), build_pipeline(block_out_channels=(32, 128))
    source = ModelSource(tiny_pipeline_dir, distilled_denoiser=str(tmp_path / filename))
    for unet, message in (
        (deep.unet, r"\d+ keys unknown \(first: "),
        (wide.unet, r"keys of another shape \(first: "),
        (torch.nn.Linear(1, 1), r"\d+ keys missing \(first: .*, 2 keys unknown \(first: bias\)"),
    ):
        save_weights(unet.state_dict(), tmp_path / filename)
        for function in functions:
            with pytest.raises(UserError, match=message) as info:
                function(source)
            one_line(info)


# ---- A distillation LoRA ----


def test_distillation_lora_is_fused_into_the_denoiser_and_unloaded(tiny_pipeline_dir, tmp_path, pipeline, family):
    base, names = draw(pipeline), pipeline.unet.state_dict().keys()
    family.add_lora(rank=4, lora_alpha=8)
    randomize_lora(family.denoiser)
    family.save_lora(tmp_path)
    state_dicts = []
    for name in (str(tmp_path), str(tmp_path / LORA_NAME), f"{tmp_path}:{LORA_NAME}"):
        source = ModelSource(tiny_pipeline_dir, distillation_lora=name)
        read_model_info(source)
        fused = load_pipeline(source)
        assert fused.unet.state_dict().keys() == names and not hasattr(fused.unet, "peft_config")
        state_dicts.append(fused.unet.state_dict())
    assert all(torch.equal(state_dict[key], state_dicts[0][key]) for state_dict in state_dicts for key in names)
    fused_family, images = SDXL(fused), draw(fused)
    np.testing.assert_allclose(images, draw(pipeline), atol=1e-5)
    assert np.abs(images - base).max() > 1e-3
    assert fused_family.add_lora(rank=2)
    randomize_lora(fused.unet)
    with fused_family.without_lora():
        assert np.array_equal(draw(fused), images)  # the base is the fused model


def test_distillation_lora_for_another_model_is_one_clear_error(tiny_pipeline_dir, tmp_path):
    other = build_pipeline(block_out_channels=(32, 128))
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    lora.save_lora(StableDiffusionXLPipeline, "unet", other.unet, tmp_path)
    save_weights({"te.lora_A.weight": torch.zeros(1)}, tmp_path / "nothing.safetensors")
    for name in (str(tmp_path), str(tmp_path / "nothing.safetensors")):
        with pytest.raises(UserError, match="--distillation_lora: .* does not load into the base model") as info:
            load_pipeline(ModelSource(tiny_pipeline_dir, distillation_lora=name))
        assert "pass a LoRA made for this model" in one_line(info)


# ---- Pickles ----


class Payload:
    """Code that a pickle would run on being read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickle_that_is_not_weights_is_refused_and_not_run(tiny_pipeline_dir, tmp_path):
    source = ModelSource(tiny_pipeline_dir, distilled_denoiser=str(tmp_path / "unet.bin"))
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "unet.bin")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_pipeline(source)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "unet.bin").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_pipeline(source)
    torch.save([1, 2], tmp_path / "unet.bin")
    with pytest.raises(UserError, match="no state dict of tensors"):
        load_pipeline(source)


def test_pickles_in_folders_and_loras_are_not_run(tiny_pipeline_dir, pipeline_copy, tmp_path):
    payload = {"x": Payload(tmp_path / "ran")}
    torch.save(payload, tmp_path / "lora.bin")
    shutil.copy(pipeline_copy / "unet" / "config.json", tmp_path)
    torch.save(payload, tmp_path / "diffusion_pytorch_model.bin")
    (pipeline_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(payload, pipeline_copy / "unet" / "diffusion_pytorch_model.bin")
    for source in (
        ModelSource(tiny_pipeline_dir, distillation_lora=str(tmp_path / "lora.bin")),
        ModelSource(tiny_pipeline_dir, distilled_denoiser=str(tmp_path)),
        ModelSource(str(pipeline_copy)),
    ):
        with pytest.raises(UserError) as info:
            load_pipeline(source)
        one_line(info)
        assert not (tmp_path / "ran").exists()


# ---- What is refused ----


def spoil_class(folder: Path, tmp_path: Path) -> dict:
    edit_json(folder / "model_index.json", _class_name="KandinskyPipeline")
    return {}


def spoil_json(folder: Path, tmp_path: Path) -> dict:
    (folder / "unet" / "config.json").write_text("{")
    return {}


def spoil_scheduler(folder: Path, tmp_path: Path) -> dict:
    edit_json(folder / "model_index.json", scheduler=["diffusers", "MagicScheduler"])
    return {}


def drop_scheduler(folder: Path, tmp_path: Path) -> dict:
    shutil.rmtree(folder / "scheduler")
    return {}


def drop_index(folder: Path, tmp_path: Path) -> dict:
    (folder / "model_index.json").unlink()
    return {}


def no_config(folder: Path, tmp_path: Path) -> dict:
    return {"distilled_denoiser": str(tmp_path)}


def no_vae_config(folder: Path, tmp_path: Path) -> dict:
    return {"vae": str(tmp_path)}


def other_denoiser(folder: Path, tmp_path: Path) -> dict:
    build_pipeline(cross_attention_dim=64).unet.save_pretrained(tmp_path)
    return {"distilled_denoiser": str(tmp_path)}


def checkpoint_file(folder: Path, tmp_path: Path) -> dict:
    (tmp_path / "unet.ckpt").write_bytes(b"")
    return {"distilled_denoiser": str(tmp_path / "unet.ckpt")}


def garbage_denoiser(folder: Path, tmp_path: Path) -> dict:
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    return {"distilled_denoiser": str(tmp_path / "x.safetensors")}


def garbage_lora(folder: Path, tmp_path: Path) -> dict:
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    return {"distillation_lora": str(tmp_path / "x.safetensors")}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_class, "is a KandinskyPipeline; pass one of StableDiffusionPipeline, "),
        (spoil_json, "pipeline, unet: no configuration can be read"),
        (spoil_scheduler, "no scheduler MagicScheduler; upgrade it"),
        (drop_scheduler, "pipeline, scheduler: no configuration can be read"),
        (drop_index, "no model_index.json; pass the folder of a diffusers pipeline"),
        (no_config, "--distilled_unet: .* has no config.json"),
        (no_vae_config, "--pretrained_vae_model_name_or_path: .* has no config.json"),
        (other_denoiser, "cross_attention_dim is 64, the base model's is 128"),
        (checkpoint_file, "--distilled_unet: .* is neither .safetensors nor .bin"),
        (garbage_denoiser, "not a readable .safetensors"),
        (garbage_lora, "not a readable .safetensors"),
        (lambda *_: {"distilled_denoiser": "missing.safetensors"}, "--distilled_unet: .*missing.safetensors does not"),
        (lambda *_: {"distillation_lora": "./missing"}, "--distillation_lora: .*missing does not exist"),
        (lambda *_: {"vae": "./missing"}, "--pretrained_vae_model_name_or_path: ./missing does not exist"),
        (lambda folder, _: {"distilled_denoiser": f"{folder}:no.bin"}, "no.bin does not exist"),
        (lambda *_: {"scheduler": "pndm"}, "unknown scheduler 'pndm'"),
        (lambda *_: {"distilled_denoiser": "nobody/no-such"}, "nobody/no-such: no configuration can be read"),
        (lambda *_: {"vae": "nobody/no-such"}, "nobody/no-such: no configuration can be read"),
    ],
)
def test_what_the_files_tell_is_refused_before_loading_and_by_loading(pipeline_copy, tmp_path, spoil, message):
    source = ModelSource(str(pipeline_copy), **spoil(pipeline_copy, tmp_path))
    for function in (read_model_info, load_pipeline):
        with pytest.raises(UserError, match=message) as info:
            function(source)
        one_line(info)


@pytest.mark.parametrize(
    "base, message",
    [
        *((base, f"--pretrained_model_name_or_path: {base} does not exist") for base in ("/no/such", "./no", "a/b/c")),
        ("nobody/no-such", "nobody/no-such: no configuration can be read"),
    ],
)
def test_a_base_model_that_is_not_there_is_one_clear_error(base, message):
    for function in (read_model_info, load_pipeline):
        with pytest.raises(UserError, match=message) as info:
            function(ModelSource(base))
        one_line(info)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_cut_off_are_one_clear_error(pipeline_copy, part):
    path = pipeline_copy / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="a model is neither whole in a local folder nor") as info:
        load_pipeline(ModelSource(str(pipeline_copy)))
    one_line(info)


def test_a_denoiser_of_other_shapes_than_its_configuration_is_one_clear_error(tiny_pipeline_dir, tmp_path):
    build_pipeline().unet.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", block_out_channels=[32, 128])
    with pytest.raises(UserError, match=f"with {tmp_path} does not load .*; pass a whole pipeline") as info:
        load_pipeline(ModelSource(tiny_pipeline_dir, distilled_denoiser=str(tmp_path)))
    one_line(info)


def test_files_on_the_hub_are_left_to_loading(tiny_pipeline_dir):
    for settings in (
        {"distilled_denoiser": "nobody/no-such:unet.bin"},
        {"distillation_lora": "nobody/no-such"},
        {"distillation_lora": "nobody/no-such:lora.safetensors"},
    ):
        source = ModelSource(tiny_pipeline_dir, **settings)
        read_model_info(source)
        with pytest.raises(UserError, match="nobody/no-such") as info:
            load_pipeline(source)
        one_line(info)


def test_a_variant_that_is_missing_is_one_clear_error(tiny_pipeline_dir, pipeline_copy):
    with pytest.raises(UserError, match="drop --variant, or pass a whole pipeline") as info:
        load_pipeline(ModelSource(tiny_pipeline_dir, variant="fp16"))
    one_line(info)
    for path in pipeline_copy.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    load_pipeline(ModelSource(str(pipeline_copy), variant="fp16"))
    with pytest.raises(UserError) as info:
        load_pipeline(ModelSource(str(pipeline_copy)))
    assert "--variant" not in one_line(info)
