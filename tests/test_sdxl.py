import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pso_utils import sdxl


PROMPTS = ["red panda animal", "apple food"]


def draw(pipeline, **kwargs):
    """What the diffusers pipeline draws: images [B, H, W, 3] in [0, 1], or latents."""
    options = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **{**options, **kwargs}).images


def randomize_lora(unet, seed=1):
    """LoRA matrices that change the model visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def pipeline(tiny_pipeline_dir):
    return sdxl.load_pipeline(tiny_pipeline_dir)


@pytest.fixture
def pipeline_copy(tiny_pipeline_dir, tmp_path) -> Path:
    """A pipeline folder that the test may spoil."""
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"))


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("force_upcast", [False, True])
def test_every_part_has_the_dtype_asked_for(tmp_path, stored, weight_dtype, force_upcast):
    source = conftest.build_pipeline()
    source.vae.register_to_config(force_upcast=force_upcast)
    source.to(stored).save_pretrained(tmp_path)
    pipeline = sdxl.load_pipeline(str(tmp_path), weight_dtype=weight_dtype)
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
    other = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir, add_watermarker=False)
    assert np.array_equal(draw(pipeline), draw(other))


def save_weights(state_dict, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)
    return str(path)


@pytest.mark.parametrize("filename", ["unet.safetensors", "unet.bin"])
@pytest.mark.parametrize("as_repo_file", [False, True])
def test_distilled_unet_from_a_file(tiny_pipeline_dir, tmp_path, filename, as_repo_file):
    distilled = conftest.build_pipeline(seed=5).unet
    source = save_weights(distilled.half().state_dict(), tmp_path / filename)
    source = f"{tmp_path}:{filename}" if as_repo_file else source
    sdxl.check_model_source(tiny_pipeline_dir, distilled_unet=source)
    unet = sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=source).unet
    for key, value in distilled.state_dict().items():
        assert torch.equal(unet.state_dict()[key], value.float())


def test_distilled_unet_from_a_folder_with_its_own_config(tiny_pipeline_dir, tmp_path):
    distilled = conftest.build_pipeline(seed=5, time_cond_proj_dim=16).unet
    distilled.save_pretrained(tmp_path)
    sdxl.check_model_source(tiny_pipeline_dir, distilled_unet=str(tmp_path))
    pipeline = sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=str(tmp_path))
    assert pipeline.unet.config.time_cond_proj_dim == 16
    embedding = sdxl.guidance_embedding(pipeline, 8.0, 2, "cpu", torch.float32)
    assert embedding.shape == (2, 16)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    hook = pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    pipeline(PROMPTS, latents=latents, num_inference_steps=1, guidance_scale=8.0, output_type="latent")
    hook.remove()
    (_, timestep), kwargs, (output,) = calls[0]
    assert torch.equal(kwargs["timestep_cond"], embedding)
    time_ids = sdxl.add_time_ids(pipeline, 32, 2, "cpu", torch.float32)
    denoise = sdxl.make_denoiser(pipeline.unet, *sdxl.encode_prompts(pipeline, PROMPTS, "cpu"), time_ids, embedding)
    with torch.no_grad():
        assert torch.equal(denoise(latents, timestep.repeat(2)), output)


@pytest.mark.parametrize("filename", ["unet.safetensors", "unet.bin"])
def test_distilled_unet_of_another_architecture_is_one_clear_error(tiny_pipeline_dir, tmp_path, filename):
    other = conftest.build_pipeline(layers_per_block=2).unet
    source = save_weights(other.state_dict(), tmp_path / filename)
    with pytest.raises(ValueError, match=r"\d+ keys unknown \(first: "):
        sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=source)
    if filename.endswith(".safetensors"):
        with pytest.raises(ValueError, match=r"\d+ keys unknown \(first: "):
            sdxl.check_model_source(tiny_pipeline_dir, distilled_unet=source)
    wide = save_weights(conftest.build_pipeline(block_out_channels=(32, 128)).unet.state_dict(), tmp_path / filename)
    with pytest.raises(ValueError, match=r"keys of another shape \(first: "):
        sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=wide)


def test_distilled_unet_folder_of_another_architecture_is_one_clear_error(tiny_pipeline_dir, tmp_path):
    conftest.build_pipeline(cross_attention_dim=64).unet.save_pretrained(tmp_path)
    for function in (sdxl.check_model_source, sdxl.load_pipeline):
        with pytest.raises(ValueError, match="cross_attention_dim is 64, the base model's is 128"):
            function(tiny_pipeline_dir, distilled_unet=str(tmp_path))


def test_pickle_that_is_not_weights_is_refused_and_not_run(tiny_pipeline_dir, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Payload()}, tmp_path / "unet.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=str(tmp_path / "unet.bin"))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "unet.bin").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=str(tmp_path / "unet.bin"))
    torch.save([1, 2], tmp_path / "unet.bin")
    with pytest.raises(ValueError, match="no state dict of tensors"):
        sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=str(tmp_path / "unet.bin"))


@pytest.mark.parametrize("form", ["folder", "file", "repo:file"])
def test_distillation_lora_is_fused_into_the_unet_and_unloaded(tiny_pipeline_dir, tmp_path, form):
    pipeline = sdxl.load_pipeline(tiny_pipeline_dir)
    sdxl.add_lora(pipeline.unet, 4, 8)
    randomize_lora(pipeline.unet)
    sdxl.save_lora(pipeline.unet, tmp_path)
    name = "pytorch_lora_weights.safetensors"
    source = {"folder": str(tmp_path), "file": str(tmp_path / name), "repo:file": f"{tmp_path}:{name}"}[form]
    sdxl.check_model_source(tiny_pipeline_dir, distillation_lora=source)
    fused = sdxl.load_pipeline(tiny_pipeline_dir, distillation_lora=source)
    base = sdxl.load_pipeline(tiny_pipeline_dir)
    assert fused.unet.state_dict().keys() == base.unet.state_dict().keys()
    assert not hasattr(fused.unet, "peft_config")
    np.testing.assert_allclose(draw(fused), draw(pipeline), atol=1e-5)
    assert np.abs(draw(fused) - draw(base)).max() > 1e-3
    assert sdxl.add_lora(fused.unet, 2)


def test_distillation_lora_for_another_model_is_one_clear_error(tiny_pipeline_dir, tmp_path):
    other = conftest.build_pipeline(block_out_channels=(32, 128))
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    sdxl.save_lora(other.unet, tmp_path)
    with pytest.raises(ValueError, match="--distillation_lora: .* does not load into the base model's UNet") as error:
        sdxl.load_pipeline(tiny_pipeline_dir, distillation_lora=str(tmp_path))
    assert "\n" not in str(error.value)


def test_check_model_source_names_what_is_wrong(tiny_pipeline_dir, pipeline_copy, tmp_path):
    check = sdxl.check_model_source
    check("stabilityai/sdxl-turbo", distilled_unet="tianweiy/DMD2:dmd2_sdxl_4step_unet_fp16.bin")
    check(tiny_pipeline_dir, vae="madebyollin/sdxl-vae-fp16-fix", distillation_lora="latent-consistency/lcm-lora-sdxl")
    for name in ("/no/such/folder", "./missing", "a/b/c"):
        with pytest.raises(ValueError, match="does not exist"):
            check(name)
    with pytest.raises(ValueError, match="no model_index.json"):
        check(str(tmp_path))
    with pytest.raises(ValueError, match="--distilled_unet: .*missing.safetensors does not exist"):
        check(tiny_pipeline_dir, distilled_unet="missing.safetensors")
    (tmp_path / "unet.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="neither .safetensors nor .bin"):
        check(tiny_pipeline_dir, distilled_unet=str(tmp_path / "unet.ckpt"))
    (tmp_path / "unet.safetensors").write_bytes(b"garbage")
    for flag in ("distilled_unet", "distillation_lora"):
        with pytest.raises(ValueError, match="not a readable .safetensors"):
            check(tiny_pipeline_dir, **{flag: str(tmp_path / "unet.safetensors")})
    with pytest.raises(ValueError, match="no config.json"):
        check(tiny_pipeline_dir, distilled_unet=str(tmp_path))
    index = pipeline_copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusionPipeline"))
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline"):
        check(str(pipeline_copy))


def test_parts_that_do_not_belong_together_are_one_clear_error(tiny_pipeline_dir, tmp_path):
    conftest.build_pipeline().vae.from_config({"latent_channels": 16, "norm_num_groups": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="UNet takes 4 channels .* VAE makes 16 channels"):
        sdxl.load_pipeline(tiny_pipeline_dir, vae=str(tmp_path))


@pytest.mark.parametrize("part", [None, "vae", "distilled_unet", "distillation_lora"])
def test_missing_model_is_one_clear_error(tiny_pipeline_dir, part):
    base, parts = ("nobody/no-such", {}) if part is None else (tiny_pipeline_dir, {part: "nobody/no-such"})
    with pytest.raises(ValueError, match="nobody/no-such") as error:
        sdxl.load_pipeline(base, **parts)
    assert "\n" not in str(error.value)


# Conditioning --------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_and_independently_of_their_batch(pipeline, monkeypatch):
    encoded = []
    encode = sdxl.encode_prompts
    monkeypatch.setattr(
        sdxl,
        "encode_prompts",
        lambda pipeline, prompts, device: encoded.extend(prompts) or encode(pipeline, prompts, device),
    )
    embeddings = sdxl.PromptEmbeddings(pipeline, max_size=2)
    assert embeddings.missing(["a", "b", "a"]) == ["a", "b"]
    prompt_embeds, pooled = embeddings(["a", "b", "a"], "cpu")
    assert prompt_embeds.shape == (3, 24, 128) and pooled.shape == (3, 128)
    assert torch.equal(prompt_embeds[0], prompt_embeds[2]) and not torch.equal(prompt_embeds[0], prompt_embeds[1])
    assert encoded == ["a", "b"]
    again, _ = embeddings(["b", "c", "d", "a"], "cpu")
    assert encoded == ["a", "b", "c", "d", "a"] and torch.equal(again[3], prompt_embeds[0])
    torch.testing.assert_close(encode(pipeline, ["a", "b"], "cpu")[0], prompt_embeds[:2])


def test_denoiser_gives_bit_for_bit_the_pipelines_model_output(pipeline):
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    draw(pipeline)
    hook.remove()
    time_ids = sdxl.add_time_ids(pipeline, 32, 2, "cpu", torch.float32)
    assert time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    denoise = sdxl.make_denoiser(pipeline.unet, *sdxl.encode_prompts(pipeline, PROMPTS, "cpu"), time_ids)
    for (model_input, timestep), (output,) in calls:
        with torch.no_grad():
            assert torch.equal(denoise(model_input, timestep.repeat(2)), output)


def test_guidance_without_a_guidance_embedding_is_an_error(pipeline):
    assert sdxl.guidance_embedding(pipeline, 0.0, 2, "cpu", torch.float32) is None
    with pytest.raises(ValueError, match="--guidance_scale 0"):
        sdxl.guidance_embedding(pipeline, 7.5, 2, "cpu", torch.float32)


# Latents and images --------------------------------------------------------------------------------------------------


def test_latent_shape(pipeline):
    assert sdxl.latent_shape(pipeline, 32) == (4, 8, 8)
    assert sdxl.latent_shape(pipeline, 64) == (4, 16, 16)
    for resolution in (0, 4, 36):
        with pytest.raises(ValueError, match="multiple of 8"):
            sdxl.latent_shape(pipeline, resolution)


@pytest.mark.parametrize(
    "statistics", [{}, {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.9, 1.1, 0.5, 2.0]}]
)
def test_decoding_gives_the_pipelines_images(pipeline, statistics):
    pipeline.vae.register_to_config(**statistics)
    latents = draw(pipeline, output_type="latent")
    expected = draw(pipeline, output_type="pil")
    assert all(map(np.array_equal, sdxl.decode_latents(pipeline, latents, batch_size=2), expected))
    for image, other in zip(sdxl.decode_latents(pipeline, latents, batch_size=1), expected):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1  # batches of 1 round differently


def test_force_upcast_decodes_in_float32(pipeline):
    latents = draw(pipeline, output_type="latent")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    sdxl.decode_latents(pipeline, latents)
    assert pipeline.vae.dtype == torch.float32


def test_images_that_are_not_finite_raise_with_the_remedy(pipeline):
    latents = torch.zeros(2, 4, 8, 8)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="sdxl-vae-fp16-fix"):
        sdxl.decode_latents(pipeline, latents)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latents are not finite"):
        sdxl.decode_latents(pipeline, latents, batch_size=2)


# LoRA ----------------------------------------------------------------------------------------------------------------


def test_new_lora_is_the_identity_float32_and_reproducible(tiny_pipeline_dir):
    pipelines = [sdxl.load_pipeline(tiny_pipeline_dir, weight_dtype=torch.bfloat16) for _ in range(2)]
    images = draw(pipelines[0])
    state = torch.get_rng_state()
    parameters = [sdxl.add_lora(pipeline.unet, 4, seed=3) for pipeline in pipelines]
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in parameters[0]} == {torch.float32}
    assert {name.split(".")[-3] for name, p in pipelines[0].unet.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert all(map(torch.equal, *parameters))
    assert np.array_equal(draw(pipelines[0]), images)
    assert pipelines[0].unet.dtype == torch.bfloat16


def test_lora_target_that_matches_nothing_is_an_error(pipeline):
    with pytest.raises(ValueError, match="no module to_x"):
        sdxl.add_lora(pipeline.unet, 4, 4, ["to_q", "to_x"])
    with pytest.raises(ValueError, match="--lora_target_modules conv_act"):
        sdxl.add_lora(pipeline.unet, 4, 4, ["conv_act"])


def test_lora_disabled_is_the_base_model_and_leaves_training_undisturbed(pipeline):
    latents = torch.randn(2, 4, 8, 8)
    conditions = (
        *sdxl.encode_prompts(pipeline, PROMPTS, "cpu"),
        sdxl.add_time_ids(pipeline, 32, 2, "cpu", torch.float32),
    )
    denoise = sdxl.make_denoiser(pipeline.unet, *conditions)
    timesteps = torch.tensor([999, 499])
    base = denoise(latents, timesteps)
    parameters = sdxl.add_lora(pipeline.unet, 4)
    randomize_lora(pipeline.unet)
    expected = torch.autograd.grad(denoise(latents, timesteps).square().mean(), parameters)
    output = denoise(latents, timesteps)
    with torch.no_grad(), sdxl.lora_disabled(pipeline.unet):
        assert torch.equal(denoise(latents, timesteps), base)
    assert not torch.equal(output, base)
    output.square().mean().backward()
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, expected))
    with pytest.raises(RuntimeError), sdxl.lora_disabled(pipeline.unet):
        raise RuntimeError
    assert torch.equal(denoise(latents, timesteps), output)
    parameters[0].requires_grad_(False)
    with sdxl.lora_disabled(pipeline.unet):
        pass
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)


@pytest.mark.parametrize("lora_alpha", [4, 8, 2.5])
@pytest.mark.parametrize("weight_name", [None, sdxl.KOHYA_WEIGHT_NAME])
@pytest.mark.parametrize("target_modules", [sdxl.DEFAULT_LORA_TARGETS, ["to_k", "proj_in", "ff.net.0.proj", "conv1"]])
def test_saved_lora_gives_the_same_images_in_a_fresh_pipeline(
    tiny_pipeline_dir, tmp_path, pipeline, lora_alpha, weight_name, target_modules
):
    sdxl.add_lora(pipeline.unet, 4, lora_alpha, target_modules)
    base = draw(pipeline)
    randomize_lora(pipeline.unet)
    expected = draw(pipeline)
    assert np.abs(expected - base).max() > 1e-3
    sdxl.save_lora(pipeline.unet, tmp_path, kohya=True)
    fresh = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline_dir, add_watermarker=False)
    fresh.load_lora_weights(str(tmp_path), **({} if weight_name is None else {"weight_name": weight_name}))
    assert np.array_equal(draw(fresh), expected)


def test_saved_lora_files_hold_every_weight_in_float32(tmp_path, pipeline):
    sdxl.add_lora(pipeline.unet, 4, 8)
    randomize_lora(pipeline.unet)
    sdxl.save_lora(pipeline.unet, tmp_path, kohya=True)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    state_dict = get_peft_model_state_dict(pipeline.unet)
    assert saved.keys() == {f"unet.{key}" for key in state_dict}
    assert all(torch.equal(saved[f"unet.{key}"], value) for key, value in state_dict.items())
    kohya = load_file(tmp_path / sdxl.KOHYA_WEIGHT_NAME)
    assert all(key.startswith("lora_unet_") for key in kohya) and len(kohya) == len(saved) * 3 // 2


def test_meta_unet_is_fully_materialized(tiny_pipeline_dir, tmp_path):
    source = save_weights(conftest.build_pipeline(seed=5).unet.state_dict(), tmp_path / "unet.safetensors")
    unet = sdxl.load_pipeline(tiny_pipeline_dir, distilled_unet=source).unet
    assert isinstance(unet, UNet2DConditionModel)
    assert not any(value.is_meta for value in [*unet.parameters(), *unet.buffers()])
