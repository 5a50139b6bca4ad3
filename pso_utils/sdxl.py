"""The parts of a distilled SDXL: loading, conditioning, decoding, and the LoRA that is trained.

A `StableDiffusionXLPipeline` holds the parts and diffusers' own methods do the work, so that what is trained is what
the pipeline runs at inference.
"""

import logging
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from .mdp import convert_scheduler


DEFAULT_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KOHYA_WEIGHT_NAME = "pytorch_lora_weights_kohya.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin")

# What a UNet must share with the one that it replaces, since the text encoders, the VAE and the time ids stay.
_CONDITIONING_KEYS = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


# Where models come from ----------------------------------------------------------------------------------------------


def split_source(source: str) -> tuple[str, str | None]:
    """Splits a local file, `repo:file`, a folder or a hub id into (folder or hub id, file name or None)."""
    path = Path(source).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    if path.is_dir() or ":" not in source:
        return str(path) if path.is_dir() else source, None
    location, _, filename = source.rpartition(":")
    return location, filename


def fetch_file(location: str, filename: str, cache_dir: str | None = None) -> str:
    """The local path of a file in a folder or a hub repository; raises ValueError where there is none."""
    if Path(location).is_dir():
        path = Path(location, filename)
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return str(path)
    try:
        return hf_hub_download(location, filename, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"{location}:{filename} is neither here nor on the hub: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def check_exists(source: str, flag: str) -> None:
    """A path that is not there is an error; what may be a hub id (`name` or `user/name`) is left to the hub."""
    if Path(source).expanduser().exists():
        return
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) or source.endswith(WEIGHT_SUFFIXES):
        raise ValueError(f"{flag}: {source} does not exist; pass a local path or a hub id")


def _weight_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a .safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file ({first_line(error)})") from error


def empty_unet(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def _check_state_dict(source: str, unet: UNet2DConditionModel, found: dict[str, tuple[int, ...]]) -> None:
    expected = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    problems = [
        (sorted(expected.keys() - found.keys()), "missing"),
        (sorted(found.keys() - expected.keys()), "unknown"),
        (sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key]), "of another shape"),
    ]
    if any(keys for keys, _ in problems):
        listed = ", ".join(f"{len(keys)} keys {what} (first: {keys[0]})" for keys, what in problems if keys)
        raise ValueError(
            f"{source} is not a UNet of the base model's architecture: {listed}; pass weights in diffusers' format "
            "made from this base model, or the folder of a UNet with its own config.json"
        )


def _check_unet_config(source: str, config: dict, base_config: dict) -> None:
    for key in _CONDITIONING_KEYS:
        if config.get(key) != base_config.get(key):
            raise ValueError(
                f"{source} is not a UNet for this base model: its {key} is {config.get(key)}, the base model's is "
                f"{base_config.get(key)}; pass the base model that it was distilled from"
            )


def check_model_source(
    pretrained_model_name_or_path: str,
    *,
    vae: str | None = None,
    distilled_unet: str | None = None,
    distillation_lora: str | None = None,
) -> None:
    """Checks local files before any model is loaded; hub ids are left for `load_pipeline`.

    Raises:
        ValueError: a path is missing, the folder is not an SDXL pipeline, a file has an unknown extension or an
            unreadable header, or a local .safetensors UNet has not the base model's keys and shapes.
    """
    check_exists(pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    base, base_config = Path(pretrained_model_name_or_path).expanduser(), None
    if base.exists():
        if not (base / "model_index.json").is_file():
            raise ValueError(
                f"--pretrained_model_name_or_path: {base} has no model_index.json; pass the folder of a diffusers "
                "SDXL pipeline (for a UNet alone use --distilled_unet)"
            )
        class_name = StableDiffusionXLPipeline.load_config(str(base)).get("_class_name")
        if not str(class_name).startswith("StableDiffusionXL"):
            raise ValueError(
                f"--pretrained_model_name_or_path: {base} is a {class_name}; pass a StableDiffusionXLPipeline"
            )
        base_config = UNet2DConditionModel.load_config(str(base), subfolder="unet")
    if vae is not None:
        check_exists(vae, "--pretrained_vae_model_name_or_path")
        if Path(vae).exists() and not Path(vae, "config.json").is_file():
            raise ValueError(
                f"--pretrained_vae_model_name_or_path: {vae} has no config.json; pass an AutoencoderKL's folder"
            )
    for flag, source in (("--distilled_unet", distilled_unet), ("--distillation_lora", distillation_lora)):
        if source is None:
            continue
        location, filename = split_source(source)
        check_exists(location, flag)
        if filename is None:
            if flag == "--distilled_unet" and Path(location).is_dir():
                if not Path(location, "config.json").is_file():
                    raise ValueError(f"{flag}: {source} has no config.json; pass a UNet's folder or a weight file")
                if base_config is not None:
                    _check_unet_config(source, UNet2DConditionModel.load_config(location), base_config)
            continue
        if not filename.endswith(WEIGHT_SUFFIXES):
            raise ValueError(f"{flag}: {source} is neither {' nor '.join(WEIGHT_SUFFIXES)}; pass one of these")
        if Path(location).is_dir():
            path = fetch_file(location, filename)
            if filename.endswith(".safetensors"):
                shapes = _weight_shapes(path)
                if flag == "--distilled_unet" and base_config is not None:
                    _check_state_dict(source, empty_unet(base_config), shapes)


# Loading -------------------------------------------------------------------------------------------------------------


def read_weights(source: str, path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        _weight_shapes(path)
        return load_file(path)
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} cannot be read as weights alone; pass a .safetensors or .bin state dict") from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{source} holds no state dict of tensors; pass a .safetensors or .bin state dict")
    return state_dict


def _load_distilled_unet(source: str, base_config: dict, weight_dtype: torch.dtype, cache_dir: str | None):
    location, filename = split_source(source)
    if filename is None:
        unet = UNet2DConditionModel.from_pretrained(location, dtype=weight_dtype, cache_dir=cache_dir)
        _check_unet_config(source, unet.config, base_config)
        return unet
    state_dict = read_weights(source, fetch_file(location, filename, cache_dir))
    unet = empty_unet(base_config)
    _check_state_dict(source, unet, {key: tuple(value.shape) for key, value in state_dict.items()})
    unet.load_state_dict({key: value.to(weight_dtype) for key, value in state_dict.items()}, assign=True)
    return unet


def _fuse_distillation_lora(pipeline: StableDiffusionXLPipeline, source: str, cache_dir: str | None) -> None:
    """Adds a LoRA to the UNet's own weights: the policy that the trained LoRA starts from, and its reference."""
    location, filename = split_source(source)
    try:
        pipeline.load_lora_weights(location, weight_name=filename, adapter_name="distillation", cache_dir=cache_dir)
        if "distillation" not in getattr(pipeline.unet, "peft_config", {}):
            raise ValueError("it has no weights for this UNet")
        pipeline.fuse_lora(components=["unet"], safe_fusing=True)
    except Exception as error:  # of the hub, the network, the file's format, the shapes: each library has its own
        raise ValueError(
            f"--distillation_lora: {source} does not load into the base model's UNet ({first_line(error)}); pass a "
            "LoRA made for this model, as a folder, a file or repo:file"
        ) from error
    pipeline.unload_lora_weights()


def _load_parts(base: str, **settings) -> StableDiffusionXLPipeline:
    try:
        return StableDiffusionXLPipeline.from_pretrained(base, **settings)
    except ValueError as error:  # no files of this variant, for instance
        hint = "drop --variant, or " if settings["variant"] else ""
        raise ValueError(
            f"{base} does not load ({first_line(error)}); {hint}pass a whole StableDiffusionXLPipeline"
        ) from error


def load_pipeline(
    pretrained_model_name_or_path: str,
    *,
    vae: str | None = None,
    distilled_unet: str | None = None,
    distillation_lora: str | None = None,
    scheduler: str | None = None,
    timestep_spacing: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> StableDiffusionXLPipeline:
    """Loads a frozen SDXL pipeline in evaluation mode, on the CPU.

    UNet and text encoders are in `weight_dtype` whatever they are stored in; the VAE too, except where its config says
    `force_upcast`: then it is float32. `distilled_unet` (a local file, `repo:file`, or the folder or hub id of a UNet
    with its own config) replaces the pipeline's UNet; `distillation_lora` (file, folder, `repo` or `repo:file`) is
    fused into it; `scheduler` and `timestep_spacing` convert the scheduler as `mdp.convert_scheduler` does. `revision`
    and `variant` are those of the pipeline.

    Raises:
        ValueError: a part cannot be loaded, or does not fit the base model.
    """
    source = {"revision": revision, "cache_dir": cache_dir}
    vae_source = {"subfolder": "vae", **source} if vae is None else {"cache_dir": cache_dir}
    parts = {}
    try:
        vae_config = AutoencoderKL.load_config(vae or pretrained_model_name_or_path, **vae_source)
        vae_dtype = torch.float32 if vae_config.get("force_upcast", True) else weight_dtype
        if distilled_unet is not None:
            base_config = UNet2DConditionModel.load_config(pretrained_model_name_or_path, subfolder="unet", **source)
            parts["unet"] = _load_distilled_unet(distilled_unet, base_config, weight_dtype, cache_dir)
        if vae is not None:
            parts["vae"] = AutoencoderKL.from_pretrained(vae, dtype=vae_dtype, cache_dir=cache_dir)
        pipeline = _load_parts(
            pretrained_model_name_or_path,
            **parts,
            variant=variant,
            dtype={"default": weight_dtype, "vae": vae_dtype},
            add_watermarker=False,
            **source,
        )
    except OSError as error:
        raise ValueError(
            f"a model is neither in a local folder nor to be had from the hub: {first_line(error)}"
        ) from error
    unet_config, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet_config.addition_embed_type != "text_time" or unet_config.in_channels != channels:
        raise ValueError(
            f"{pretrained_model_name_or_path} with these parts is not a text-to-image SDXL: its UNet takes "
            f"{unet_config.in_channels} channels and {unet_config.addition_embed_type} embeddings, its VAE makes "
            f"{channels} channels; pass parts that belong together"
        )
    if distillation_lora is not None:
        _fuse_distillation_lora(pipeline, distillation_lora, cache_dir)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.scheduler = convert_scheduler(pipeline.scheduler, scheduler, timestep_spacing)
    return pipeline


# Conditioning --------------------------------------------------------------------------------------------------------


class _FirstTruncation(logging.Filter):
    """Lets one warning through that a prompt is too long. diffusers gives one for every prompt and text encoder, with
    all that was cut off, and transformers adds one that foretells indexing errors."""

    warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Token indices sequence length is longer"):
            return False
        if not message.startswith("The following part of your input was truncated"):
            return True
        record.msg = message[:200] + ("…" if len(message) > 200 else "") + " (for further prompts this is not said)"
        record.args = ()
        first, self.warned = not self.warned, True
        return first


_first_truncation = _FirstTruncation()
for _name in (StableDiffusionXLPipeline.__module__, PreTrainedTokenizerBase.__module__):
    logging.getLogger(_name).addFilter(_first_truncation)


@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str], device) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompt_embeds` [B, S, D] and `pooled_prompt_embeds` [B, P] of B prompts, as the pipeline encodes them."""
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        list(prompts), device=device, do_classifier_free_guidance=False
    )
    return prompt_embeds, pooled_prompt_embeds.to(device)


class PromptEmbeddings:
    """Encodes each prompt once and keeps the last `max_size` of them in CPU memory (about 0.3 MB each for SDXL in half
    precision). Prompts are encoded singly, so that an embedding depends on its prompt alone, and not on what else
    was in the batch: a resumed run or another number of processes sees the same bits.

    With `store` (a `latent_cache.TensorCache`) they are kept on disk, too, by `key`, and the text encoders are only
    needed for prompts that are not there.
    """

    def __init__(self, pipeline, max_size: int = 4096, store=None, key: Callable[[str], str] | None = None):
        self.pipeline = pipeline
        self.max_size = max_size
        self.store, self.key = store, key
        self._cache: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that a call would have to encode: while there are none, the text encoders may be elsewhere."""
        stored = self.store is not None
        return [
            prompt
            for prompt in dict.fromkeys(prompts)
            if prompt not in self._cache and not (stored and self.store.path(self.key(prompt)).is_file())
        ]

    def __call__(self, prompts: Sequence[str], device) -> tuple[torch.Tensor, torch.Tensor]:
        """`prompt_embeds` [B, S, D] and `pooled_prompt_embeds` [B, P] on `device`."""
        rows = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._cache:
                self._cache[prompt] = self._read_or_encode(prompt, device)
            self._cache.move_to_end(prompt)
            rows[prompt] = self._cache[prompt]
            if len(self._cache) > self.max_size:
                self._cache.popitem(last=False)
        prompt_embeds, pooled_prompt_embeds = zip(*(rows[prompt] for prompt in prompts))
        return torch.stack(prompt_embeds).to(device), torch.stack(pooled_prompt_embeds).to(device)

    def _read_or_encode(self, prompt: str, device) -> tuple[torch.Tensor, torch.Tensor]:
        entry = None if self.store is None else self.store.get(self.key(prompt))
        if entry is None:
            prompt_embeds, pooled = (row[0].cpu() for row in encode_prompts(self.pipeline, [prompt], device))
            entry = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
            if self.store is not None:
                self.store.put(self.key(prompt), entry)
        return entry["prompt_embeds"], entry["pooled_prompt_embeds"]


def add_time_ids(pipeline, resolution: int, batch_size: int, device, dtype: torch.dtype) -> torch.Tensor:
    """SDXL's size and crop conditioning [B, 6] of an uncropped square image of `resolution` pixels."""
    size = (resolution, resolution)
    if pipeline.text_encoder_2 is not None:
        projection_dim = pipeline.text_encoder_2.config.projection_dim
    else:
        config = pipeline.unet.config
        projection_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    time_ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=projection_dim)
    return time_ids.to(device).repeat(batch_size, 1)


def crop_time_ids(original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, resolution: int) -> torch.Tensor:
    """SDXL's size and crop conditioning [B, 6], float32, of square crops of `resolution` pixels: each image's size
    before it was resized and its crop's corner after, both [B, 2] as (height, width) and (top, left)."""
    target_sizes = torch.full_like(original_sizes, resolution)
    return torch.cat([original_sizes, crop_top_lefts, target_sizes], dim=1).float()


def guidance_embedding(
    pipeline, guidance_scale: float, batch_size: int, device, dtype: torch.dtype
) -> torch.Tensor | None:
    """`timestep_cond` [B, time_cond_proj_dim] for a UNet that takes the guidance scale as an input, else None.

    Raises:
        ValueError: `guidance_scale` > 1 asks for classifier-free guidance, under which a sample's density is unknown.
    """
    embedding_dim = pipeline.unet.config.time_cond_proj_dim
    if embedding_dim is None:
        if guidance_scale > 1:
            raise ValueError(
                f"--guidance_scale {guidance_scale}: this UNet takes no guidance embedding (time_cond_proj_dim); use "
                "--guidance_scale 0, as distilled models are used"
            )
        return None
    scale = torch.tensor(guidance_scale - 1.0).repeat(batch_size)
    return pipeline.get_guidance_scale_embedding(scale, embedding_dim=embedding_dim).to(device=device, dtype=dtype)


def make_denoiser(
    unet, prompt_embeds, pooled_prompt_embeds, add_time_ids, timestep_cond=None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function (model_input [B, C, H, W], timesteps [B]) -> model_output [B, C, H, W], in the dtype in which the
    UNet returns it; the input is cast to the UNet's dtype."""
    added_cond_kwargs = {"text_embeds": pooled_prompt_embeds, "time_ids": add_time_ids}

    def denoise(model_input: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return unet(
            model_input.to(unet.dtype),
            timesteps,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
        )[0]

    return denoise


# Latents and images --------------------------------------------------------------------------------------------------


def latent_shape(pipeline, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of a square image's latents; ValueError where 8 or the VAE's factor does not divide the side."""
    multiple = math.lcm(8, pipeline.vae_scale_factor)
    if resolution < multiple or resolution % multiple:
        below = max(resolution // multiple, 1) * multiple
        raise ValueError(
            f"--resolution {resolution} is not a multiple of {multiple}; use {below} or {below + multiple}"
        )
    side = resolution // pipeline.vae_scale_factor
    return pipeline.unet.config.in_channels, side, side


@torch.no_grad()
def decode_latents(pipeline, latents: torch.Tensor, batch_size: int = 4) -> list[Image.Image]:
    """Decodes latents [B, C, H, W] to B images as the SDXL pipeline does, `batch_size` at a time.

    The VAE runs in float32 where its config says `force_upcast`, else in its own dtype.

    Raises:
        ValueError: an image is not finite.
    """
    vae = pipeline.vae
    if vae.config.force_upcast and vae.dtype != torch.float32:
        vae.to(torch.float32)
    latents = latents.to(device=vae.device, dtype=vae.dtype)
    mean, std = _latents_mean_and_std(vae, latents)
    latents = latents * std / vae.config.scaling_factor + mean
    images = []
    for part in latents.split(batch_size):
        image = vae.decode(part, return_dict=False)[0]
        if not torch.isfinite(image).all():
            if not torch.isfinite(part).all():
                reason = "the UNet's latents are not finite: lower --learning_rate, or use --mixed_precision bf16 or no"
            else:
                reason = (
                    f"the VAE overflows in {str(vae.dtype).removeprefix('torch.')}: use --mixed_precision bf16, or "
                    "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, or a VAE with force_upcast"
                )
            raise ValueError(f"decoded images are not finite: {reason}")
        images += pipeline.image_processor.postprocess(image, output_type="pil")
    return images


@torch.no_grad()
def encode_images(pipeline, pixels: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    """Latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1], `batch_size` at a time: the inverse of
    `decode_latents`. They are the mode of the VAE's posterior, so that an image has one latent, cached or not.

    Raises:
        ValueError: a latent is not finite.
    """
    vae = pipeline.vae
    if vae.config.force_upcast and vae.dtype != torch.float32:
        vae.to(torch.float32)
    pixels = pixels.to(device=vae.device, dtype=vae.dtype)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(batch_size)]).float()
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"encoded images are not finite: the VAE overflows in {str(vae.dtype).removeprefix('torch.')}: use "
            "--mixed_precision bf16 or no, or a VAE with force_upcast"
        )
    mean, std = _latents_mean_and_std(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / std


def _latents_mean_and_std(vae, latents: torch.Tensor) -> tuple:
    """`latents_mean` and `latents_std` of the VAE's config, [1, C, 1, 1], or 0 and 1 where it has none."""
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return 0.0, 1.0
    return tuple(torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))


# LoRA ----------------------------------------------------------------------------------------------------------------


def check_lora_targets(unet, target_modules: Sequence[str]) -> None:
    """Raises ValueError unless each target names a module of the UNet, which may be an `empty_unet`."""
    names = [name for name, _ in unet.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"--lora_target_modules: the UNet has no module {target}; use for instance "
                f"{' '.join(DEFAULT_LORA_TARGETS)}"
            )


def add_lora(
    unet,
    rank: int,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] = tuple(DEFAULT_LORA_TARGETS),
    seed: int | None = None,
) -> list[torch.nn.Parameter]:
    """Adds a float32 LoRA that starts as the identity (A gaussian, B zero) and returns its parameters.

    `lora_alpha` defaults to `rank`. With a `seed` the start depends on nothing else, and the global generator is left
    as it was.

    Raises:
        ValueError: a target names no module of the UNet, or a module that takes no LoRA.
    """
    check_lora_targets(unet, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(target_modules),
    )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # the CPU's alone: peft makes the matrices there
        try:
            unet.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"--lora_target_modules {' '.join(target_modules)}: {first_line(error)}") from error
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def lora_disabled(unet) -> Iterator[None]:
    """Runs the UNet as the reference model, without its LoRA; afterwards everything is as before, `requires_grad`
    included, which peft clears when it disables adapters and sets when it enables them."""
    parameters = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


def save_lora(unet, output_dir, kohya: bool = False) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata, as
    `pipeline.load_lora_weights(output_dir)` reads it; with `kohya`, Kohya's keys for ComfyUI and others in a second
    file, which `load_lora_weights(output_dir)` passes over."""
    state_dict = get_peft_model_state_dict(unet)
    metadata = _collate_lora_metadata({"unet": unet})
    for values in metadata.values():
        values.update({key: sorted(value) for key, value in values.items() if isinstance(value, set)})
    try:
        StableDiffusionXLPipeline.save_lora_weights(output_dir, unet_lora_layers=state_dict, **metadata)
    except SafetensorError as error:  # a full disk, for instance
        raise OSError(f"the LoRA cannot be written to {output_dir} ({first_line(error)})") from error
    if kohya:
        weights = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state_dict.items()})
        alpha = torch.tensor(float(unet.peft_config["default"].lora_alpha))
        # the converter writes the rank for alpha
        weights = {key: alpha.clone() if key.endswith(".alpha") else value for key, value in weights.items()}
        weights = {key: value.contiguous() for key, value in weights.items()}
        save_file(weights, Path(output_dir, KOHYA_WEIGHT_NAME), metadata={"format": "pt"})
