"""The LoRA for other tools: against the names that ComfyUI and Kohya's scripts read, written out below, and against
diffusers, which reads the same file."""

import os
import re
from copy import deepcopy

import pytest
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from family_inputs import one_line, randomize_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pso_utils.errors import UserError
from pso_utils.families import FAMILIES, find_family, lora_export
from pso_utils.families.loading import ModelSource, load_pipeline, read_model_info
from pso_utils.families.lora_export import SAVE_DTYPES, export_lora, export_name
from pso_utils.families.stable_diffusion import StableDiffusion
from tests.families.cases import CASES, find_case
from tests.families.test_every_family import draw, load_plain


# No tool reads SANA's. Of the others another case has all layers, but for LCM's guidance embedding: no tool's model has
# one, and diffusers does not read it back.
LEFT_OUT = {"sana_sprint", "sd3_without_t5", "flux_schnell", "sd21", "lcm"}
RANK, ALPHA = 4, 6.0


# ---- What the tools read ----
#
# For each layer by diffusers' name, where N is a number: the weight of ComfyUI's model that it goes to, and "[n]" for
# the n-th part of what that model holds fused. From ComfyUI's comfy/lora.py and comfy/utils.py. A UNet's are in all of
# its tools by diffusers' name, where "." is "_"; for them see `unet_layers`.

FLUX_EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_BLOCKS = {
    **{
        f"transformer_blocks.N.attn.{ours}": f"double_blocks.N.{stream}_attn.qkv[{part}]"
        for stream, names in (("img", "to_q to_k to_v"), ("txt", "add_q_proj add_k_proj add_v_proj"))
        for part, ours in enumerate(names.split())
    },
    "transformer_blocks.N.attn.to_out.0": "double_blocks.N.img_attn.proj",
    "transformer_blocks.N.attn.to_add_out": "double_blocks.N.txt_attn.proj",
}
FLUX = {
    **FLUX_EMBEDDERS,
    **FLUX_BLOCKS,
    **{
        f"time_text_embed.{ours}.linear_{number}": f"{theirs}.{layer}"
        for ours, theirs in (
            ("timestep_embedder", "time_in"),
            ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    },
    "transformer_blocks.N.norm1.linear": "double_blocks.N.img_mod.lin",
    "transformer_blocks.N.norm1_context.linear": "double_blocks.N.txt_mod.lin",
    "transformer_blocks.N.ff.net.0.proj": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.net.2": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.net.0.proj": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.net.2": "double_blocks.N.txt_mlp.2",
    "single_transformer_blocks.N.attn.to_q": "single_blocks.N.linear1[0]",
    "single_transformer_blocks.N.attn.to_k": "single_blocks.N.linear1[1]",
    "single_transformer_blocks.N.attn.to_v": "single_blocks.N.linear1[2]",
    "single_transformer_blocks.N.proj_mlp": "single_blocks.N.linear1[3]",
    "single_transformer_blocks.N.norm.linear": "single_blocks.N.modulation.lin",
    "single_transformer_blocks.N.proj_out": "single_blocks.N.linear2",
}
FLUX2 = {
    **FLUX_EMBEDDERS,
    **FLUX_BLOCKS,
    "transformer_blocks.N.ff.linear_in": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.linear_out": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.linear_in": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.linear_out": "double_blocks.N.txt_mlp.2",
    "single_transformer_blocks.N.attn.to_qkv_mlp_proj": "single_blocks.N.linear1",
    "single_transformer_blocks.N.attn.to_out": "single_blocks.N.linear2",
}
# ComfyUI's map of diffusers' names does not have these; its own are read with "diffusion_model." before them
FLUX2_OWN = {
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
}
SD3 = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}.linear_{number}": f"{theirs}.mlp.{2 * number - 2}"
        for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder"))
        for number in (1, 2)
    },
    **{
        f"transformer_blocks.N.{ours}": f"joint_blocks.N.{theirs}.qkv[{part}]"
        for theirs, names in (
            ("x_block.attn", "attn.to_q attn.to_k attn.to_v"),
            ("x_block.attn2", "attn2.to_q attn2.to_k attn2.to_v"),
            ("context_block.attn", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        )
        for part, ours in enumerate(names.split())
    },
    "transformer_blocks.N.attn.to_out.0": "joint_blocks.N.x_block.attn.proj",
    "transformer_blocks.N.attn2.to_out.0": "joint_blocks.N.x_block.attn2.proj",
    "transformer_blocks.N.attn.to_add_out": "joint_blocks.N.context_block.attn.proj",
    **{
        f"transformer_blocks.N.{ours}": f"joint_blocks.N.{theirs}"
        for block, suffix in (("x_block", ""), ("context_block", "_context"))
        for ours, theirs in (
            (f"norm1{suffix}.linear", f"{block}.adaLN_modulation.1"),
            (f"ff{suffix}.net.0.proj", f"{block}.mlp.fc1"),
            (f"ff{suffix}.net.2", f"{block}.mlp.fc2"),
        )
    },
}
AURAFLOW = {
    "context_embedder": "cond_seq_linear",
    "pos_embed.proj": "init_x_linear",
    "norm_out.linear": "modF.1",
    "proj_out": "final_linear",
    "time_step_proj.linear_1": "t_embedder.mlp.0",
    "time_step_proj.linear_2": "t_embedder.mlp.2",
    **{
        f"joint_transformer_blocks.N.attn.{ours}": f"double_layers.N.attn.{theirs}"
        for ours, theirs in (
            *(("to_q", "w2q"), ("to_k", "w2k"), ("to_v", "w2v"), ("to_out.0", "w2o")),
            *(("add_q_proj", "w1q"), ("add_k_proj", "w1k"), ("add_v_proj", "w1v"), ("to_add_out", "w1o")),
        )
    },
    **{
        f"single_transformer_blocks.N.attn.{ours}": f"single_layers.N.attn.{theirs}"
        for ours, theirs in (("to_q", "w1q"), ("to_k", "w1k"), ("to_v", "w1v"), ("to_out.0", "w1o"))
    },
    **{
        f"{ours}.{layer}": f"{theirs}.{name}"
        for ours, theirs in (
            ("joint_transformer_blocks.N.ff", "double_layers.N.mlpX"),
            ("joint_transformer_blocks.N.ff_context", "double_layers.N.mlpC"),
            ("single_transformer_blocks.N.ff", "single_layers.N.mlp"),
        )
        for layer, name in (("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"))
    },
    "joint_transformer_blocks.N.norm1.linear": "double_layers.N.modX.1",
    "joint_transformer_blocks.N.norm1_context.linear": "double_layers.N.modC.1",
    "single_transformer_blocks.N.norm1.linear": "single_layers.N.modCX.1",
}
Z_IMAGE = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    **{
        f"{blocks}.N.attention.{ours}": f"{blocks}.N.attention.{theirs}"
        for blocks in ("layers", "context_refiner", "noise_refiner")
        for ours, theirs in (("to_q", "qkv[0]"), ("to_k", "qkv[1]"), ("to_v", "qkv[2]"), ("to_out.0", "out"))
    },
    **{
        f"{blocks}.N.{layer}": f"{blocks}.N.{layer}"
        for blocks in ("layers", "context_refiner", "noise_refiner")
        for layer in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    },
}
KREA2 = {
    **{
        f"{ours}.N.{layer}": f"{theirs}.N.{name}"
        for ours, theirs in (
            ("transformer_blocks", "blocks"),
            ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks"),
            ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks"),
        )
        for layer, name in (
            *(("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"), ("attn.to_v", "attn.wv")),
            *(("attn.to_gate", "attn.gate"), ("attn.to_out.0", "attn.wo")),
            *(("ff.gate", "mlp.gate"), ("ff.up", "mlp.up"), ("ff.down", "mlp.down")),
        )
    },
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
}
# Of these ComfyUI's own model has diffusers' names
QWEN_IMAGE = {
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
    *(
        f"transformer_blocks.N.attn.{layer}"
        for layer in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    ),
    *(
        f"transformer_blocks.N.{stream}_{layer}"
        for stream in ("img", "txt")
        for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
    ),
}
ERNIE_IMAGE = {
    *("x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "adaLN_modulation.1"),
    *("final_norm.linear", "final_linear"),
    *(f"layers.N.self_attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"layers.N.mlp.{layer}" for layer in ("gate_proj", "up_proj", "linear_fc2")),
}
TRANSFORMERS = {
    "flux_dev": FLUX,
    "flux2_klein": FLUX2,
    "sd3": SD3,
    "auraflow": AURAFLOW,
    "z_image": Z_IMAGE,
    "krea2": KREA2,
    "qwen_image": {name: name for name in QWEN_IMAGE},
    "ernie_image": {name: name for name in ERNIE_IMAGE},
}
OWN_NAMES = {"flux2_klein": FLUX2_OWN}
# What diffusers itself does not read back from such a file: it loses the last digit, or knows no mixed names
UNREADABLE = {
    "sdxl": {"add_embedding.linear_1", "add_embedding.linear_2"},
    "flux2_klein": set(FLUX2_OWN),
}


def sgm_layers(config) -> dict[str, str]:
    """Layers of a UNet by diffusers' name, with those of the original model, whose blocks count on: the names that
    ComfyUI's `unet_to_diffusers` and Kohya's `make_unet_conversion_map` tell, for any number of blocks and resnets."""
    resnet = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    attention = ["proj_in", "proj_out"]
    attention += [
        f"transformer_blocks.0.{layer}"
        for layer in (
            *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ff.net.0.proj", "ff.net.2"),
        )
    ]
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }

    def add(ours: str, index: int, theirs: str, *, has_attention: bool):
        names.update({f"{ours}.resnets.{index}.{layer}": f"{theirs}.0.{name}" for layer, name in resnet.items()})
        if has_attention:
            names.update({f"{ours}.attentions.{index}.{layer}": f"{theirs}.1.{layer}" for layer in attention})

    each = config.layers_per_block
    for block, kind in enumerate(config.down_block_types):
        for index in range(each):
            count = (each + 1) * block + index + 1
            add(f"down_blocks.{block}", index, f"input_blocks.{count}", has_attention="Attn" in kind)
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(each + 1) * (block + 1)}.0.op"
    for block, kind in enumerate(config.up_block_types):
        for index in range(each + 1):
            count = (each + 1) * block + index
            add(f"up_blocks.{block}", index, f"output_blocks.{count}", has_attention="Attn" in kind)
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{count}.{1 + ('Attn' in kind)}.conv"
    names |= {f"mid_block.attentions.0.{layer}": f"middle_block.1.{layer}" for layer in attention}
    for index in (0, 1):
        names |= {f"mid_block.resnets.{index}.{layer}": f"middle_block.{2 * index}.{resnet[layer]}" for layer in resnet}
    return names


def tool_keys(case, layers) -> dict[str, tuple[str, str]]:
    """Layer -> how its keys in a file begin, and the weight of the tool's model that they go to."""
    if case.name not in TRANSFORMERS:
        known = sgm_layers(case.loaded.unet.config)
        return {layer: (f"lora_unet_{layer.replace('.', '_')}", known[layer]) for layer in layers}
    keys = {}
    for layer in layers:
        own = OWN_NAMES.get(case.name, {}).get(layer)
        block = re.search(r"(?<=blocks\.|layers\.)\d+|(?<=refiner\.)\d+", layer)
        pattern = layer if block is None else f"{layer[: block.start()]}N{layer[block.end() :]}"
        weight = own or TRANSFORMERS[case.name][pattern].replace("N", block[0] if block else "N")
        keys[layer] = (f"diffusion_model.{own}" if own else f"transformer.{layer}", weight)
    return keys


def patches(file: dict[str, torch.Tensor], keys: dict[str, tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Layer -> what a tool adds to its weight: alpha / rank up @ down, where the file has an alpha. Every tensor of the
    file is some layer's."""
    added, unused = {}, set(file)
    for layer, (key, _) in keys.items():
        up, down = next(
            (f"{key}.{up}.weight", f"{key}.{down}.weight")
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A"))
            if f"{key}.{up}.weight" in file
        )
        alpha = file.get(f"{key}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / len(file[down])
        added[layer] = scale * file[up].flatten(1) @ file[down].flatten(1)
        unused -= {up, down, f"{key}.alpha"}
    assert not unused
    return added


# ---- Every family ----


@pytest.fixture(scope="module", params=[name for name in CASES if name not in LEFT_OUT])
def case(request, tmp_path_factory):
    case = find_case(request.param)
    case.folder = tmp_path_factory.mktemp(request.param)
    case.build().save_pretrained(case.folder)
    case.source = ModelSource(str(case.folder), scheduler_config=case.SCHEDULER_CONFIG)
    case.info = read_model_info(case.source)
    case.loaded = load_pipeline(case.source)
    return case


def trained(case, leave_out=()):
    """A family with a LoRA on every layer that can have one, and the layers' names."""
    family = case.info.family(deepcopy(case.loaded))
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, module in family.denoiser.named_modules() if isinstance(module, kinds)]
    layers = [layer for layer in layers if layer not in leave_out]
    family.add_lora(rank=RANK, lora_alpha=ALPHA, target_modules=layers, seed=0)
    randomize_lora(family.denoiser)
    with torch.no_grad():
        for parameter in family.denoiser.parameters():
            if parameter.requires_grad:
                parameter *= 0.1
    return family, layers


def export(family, folder, save_dtype: str = "fp32", name: str = "tool.safetensors"):
    tool_format = family.tool_format(family.denoiser.config)
    settings = {"part": family.denoiser_name, "save_dtype": save_dtype, "details": {}}
    export_lora(folder / LORA_WEIGHT_NAME_SAFE, folder / name, tool_format, **settings)
    return folder / name


def test_tools_add_to_every_layer_what_the_trained_model_adds(case, tmp_path):
    family, layers = trained(case)
    family.save_lora(tmp_path)
    keys = tool_keys(case, layers)
    assert len({key for key, _ in keys.values()}) == len({weight for _, weight in keys.values()}) == len(layers)
    added = patches(load_file(export(family, tmp_path)), keys)
    for layer in layers:
        expected = family.denoiser.get_submodule(layer).get_delta_weight("default").detach().flatten(1)
        assert torch.allclose(added[layer], expected, rtol=1e-5, atol=1e-7), layer


def test_diffusers_draws_from_the_file_what_it_draws_from_its_own(case, tmp_path):
    """Though the folder has both."""
    family, _ = trained(case, leave_out=UNREADABLE.get(case.name, ()))
    family.save_lora(tmp_path)
    plain, size = load_plain(case), (case.STEPS[0], *case.SIZES[0])
    images = {"base": draw(case, plain, *size)}
    tolerances = {"fp32": 1e-4, "fp16": 0.02}
    names = {dtype: export(family, tmp_path, dtype, f"{dtype}.safetensors").name for dtype in tolerances}
    for label, weight_name in {"diffusers": None, **names}.items():
        plain.load_lora_weights(tmp_path, weight_name=weight_name)
        images[label] = draw(case, plain, *size)
        plain.unload_lora_weights()
    moved = abs(images["diffusers"] - images["base"]).max()
    assert moved > 1e-3
    for dtype, tolerance in tolerances.items():
        assert abs(images[dtype] - images["diffusers"]).max() <= tolerance * moved, dtype


def test_every_family_but_sanas_has_a_format():
    formats = {name: find_family(name, name).lora_format for name in FAMILIES}
    assert [name for name, tool_format in formats.items() if tool_format is None] == ["SanaSprintPipeline"]


def test_stable_diffusion_is_told_from_its_second_version():
    names = [StableDiffusion.tool_format({"cross_attention_dim": dim}).base_version for dim in (768, 1024)]
    assert names == ["sd_v1", "sd_v2"]


# ---- The file ----


def lora_file(folder, value: float = 0.5, **metadata):
    """A LoRA of one layer of SDXL, of rank 2 and alpha 1."""
    settings = {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["conv_in"]} | metadata
    matrices = {"A": torch.full((2, 4, 3, 3), 0.5), "B": torch.full((8, 2, 1, 1), value)}
    weights = {f"unet.conv_in.lora_{side}.weight": matrix for side, matrix in matrices.items()}
    lora = {"lora_adapter_metadata": str(settings).replace("'", '"')}
    save_file(weights, folder / LORA_WEIGHT_NAME_SAFE, metadata=lora)
    return folder / LORA_WEIGHT_NAME_SAFE


def sdxl_settings(**settings):
    return {"part": "unet", "save_dtype": "fp16", "details": {}} | settings


SDXL_FORMAT = find_family("StableDiffusionXLPipeline", "").lora_format


def test_the_metadata_names_what_tools_show(tmp_path):
    source = lora_file(tmp_path)
    os.utime(source, (0, 0))
    details = {"ss_sd_model_name": "someone/turbo", "modelspec.trigger_phrase": None}
    export_lora(source, tmp_path / "panda.safetensors", SDXL_FORMAT, **sdxl_settings(details=details))
    with safe_open(tmp_path / "panda.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_output_name": "panda",
        "ss_sd_model_name": "someone/turbo",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "panda",
        "modelspec.date": "1970-01-01T00:00:00",
    }
    assert expected.items() <= metadata.items() and "modelspec.trigger_phrase" not in metadata


@pytest.mark.parametrize("save_dtype", SAVE_DTYPES)
def test_the_weights_have_the_precision_that_was_asked_for(tmp_path, save_dtype):
    destination = tmp_path / "panda.safetensors"
    export_lora(lora_file(tmp_path), destination, SDXL_FORMAT, **sdxl_settings(save_dtype=save_dtype))
    assert {value.dtype for value in load_file(destination).values()} == {SAVE_DTYPES[save_dtype]}


def test_values_beyond_float16_are_one_clear_error_and_an_earlier_file_stands(tmp_path):
    destination = tmp_path / "panda.safetensors"
    destination.write_text("mine")
    source = lora_file(tmp_path, value=1e5)
    with pytest.raises(UserError, match="pass --save_dtype bf16 or fp32") as info:
        export_lora(source, destination, SDXL_FORMAT, **sdxl_settings())
    assert one_line(info) and destination.read_text() == "mine"
    export_lora(source, destination, SDXL_FORMAT, **sdxl_settings(save_dtype="bf16"))


def test_a_full_disk_is_one_clear_error_and_an_earlier_file_stands(tmp_path, monkeypatch):
    destination = tmp_path / "panda.safetensors"
    destination.write_text("mine")

    def write(weights, path, **settings):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_export, "save_file", write)
    with pytest.raises(UserError, match="cannot be written .*No space.*; make room there") as info:
        export_lora(lora_file(tmp_path), destination, SDXL_FORMAT, **sdxl_settings())
    assert one_line(info) and destination.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {destination.name, LORA_WEIGHT_NAME_SAFE}


def test_a_lora_of_unlike_ranks_is_refused(tmp_path):
    source = lora_file(tmp_path, **{"unet.rank_pattern": {"conv_in": 2}})
    with pytest.raises(UserError, match="does not say rank, alpha and layers of one LoRA") as info:
        export_lora(source, tmp_path / "panda.safetensors", SDXL_FORMAT, **sdxl_settings())
    assert one_line(info).startswith(str(source))


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
@pytest.mark.parametrize("name", ["a", "z", "checkpoint", "pytorch_lora_weights", "my_pytorch_lora_weights"])
def test_diffusers_loads_its_own_file_from_the_folder_whatever_the_runs_name(tmp_path, monkeypatch, name, order):
    """In every pipeline that there is a family for: the folder is listed in either order."""
    folder = tmp_path / name
    folder.mkdir()
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: order(listdir(path)))
    for pipeline_class in {find_family(name, name).pipeline_class for name in FAMILIES}:
        key = f"{find_family(pipeline_class.__name__, name).denoiser_name}.x.lora_A.weight"
        save_file({key: torch.ones(1, 1)}, folder / LORA_WEIGHT_NAME_SAFE)
        save_file({key: torch.zeros(1, 1)}, folder / export_name(folder))
        loaded = pipeline_class.lora_state_dict(folder)
        loaded = loaded[0] if isinstance(loaded, tuple) else loaded
        assert [value.item() for value in loaded.values()] == [1.0], pipeline_class
