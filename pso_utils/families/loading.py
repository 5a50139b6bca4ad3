"""From what the model flags name to a frozen pipeline; first what its configuration files alone tell."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import SafetensorError

from pso_utils.errors import UserError, first_line
from pso_utils.families import Family, find_family
from pso_utils.families.lora import lora_metadata
from pso_utils.schedules import convert_scheduler
from pso_utils.sources import (
    WEIGHT_SUFFIXES,
    check_exists,
    fetch_file,
    read_weights,
    split_source,
    weight_shapes,
)


@dataclass(frozen=True)
class ModelSource:
    """What the model flags name.

    Attributes:
        pretrained_model_name_or_path: a hub id or a diffusers folder.
        vae: instead of the pipeline's, of the same class.
        distilled_denoiser: a local file, `repo:file`, or the folder or hub id of a denoiser with its own config, which
            replaces the pipeline's.
        distilled_flag: what named it, distilled_unet or distilled_transformer, to be held against the family.
        distillation_lora, distillation_lora_scale: a file, a folder, `repo` or `repo:file`, fused into the denoiser
            with this scale.
        revision, variant: of the pipeline.
        scheduler_config: values that replace those of the pipeline's own scheduler_config.json.
        scheduler, timestep_spacing, original_inference_steps: as `schedules.convert_scheduler` takes them.
        cache_dir: for what is downloaded.
    """

    pretrained_model_name_or_path: str
    vae: str | None = None
    distilled_denoiser: str | None = None
    distilled_flag: str | None = None
    distillation_lora: str | None = None
    distillation_lora_scale: float = 1.0
    revision: str | None = None
    variant: str | None = None
    scheduler_config: dict | None = None
    scheduler: str | None = None
    timestep_spacing: str | None = None
    original_inference_steps: int | None = None
    cache_dir: str | None = None

    @property
    def files(self) -> dict:
        """Arguments of `from_pretrained` and `load_config` for the pipeline's own parts."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}


# ---- Configuration files ----


class ModelInfo(NamedTuple):
    """What the configuration files tell."""

    family: type[Family]
    denoiser_config: dict  # of the one that is trained
    vae_config: dict
    scheduler: SchedulerMixin  # converted as the source says
    absent_parts: tuple[str, ...]  # of the pipeline: the unused ones, and those that it was saved without


def read_config(model_class, location: str, subfolder: str | None = None, **files) -> dict:
    """A part's configuration; raises UserError where there is none to be read."""
    part = f"{location}, {subfolder}" if subfolder else location
    try:
        config = model_class.load_config(location, subfolder=subfolder, **files)
    except OSError as error:
        raise UserError(
            f"{part}: no configuration can be read ({first_line(error)}); pass a whole diffusers folder, or a hub id"
            " that can be reached from here"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{part}: its configuration is no JSON object; pass a whole diffusers folder")
    return config


def read_model_info(source: ModelSource) -> ModelInfo:
    """Checks what the source names, as far as local files and configurations tell, before a model is loaded.

    Raises:
        UserError: a path or a configuration is missing, the pipeline is of no known family, a file has an unknown
            extension or an unreadable header, a denoiser is not of the base's architecture, or the scheduler cannot be
            converted as asked.
    """
    base = source.pretrained_model_name_or_path
    check_exists(base, "--pretrained_model_name_or_path")
    folder = Path(base).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"--pretrained_model_name_or_path: {base} has no model_index.json; pass the folder of a diffusers pipeline "
            "(for a denoiser alone use --distilled_unet or --distilled_transformer)"
        )
    model_index = read_config(DiffusionPipeline, base, **source.files)
    pipeline_class, scheduler = model_index.get("_class_name"), model_index.get("scheduler")
    is_pair = isinstance(scheduler, list) and len(scheduler) == 2 and isinstance(scheduler[1], str)
    if not isinstance(pipeline_class, str) or not is_pair:
        raise UserError(f"{base}: its model_index.json does not name the classes of the pipeline and of its scheduler")
    family = find_family(pipeline_class, base)
    family.check_pipeline(model_index)
    own_flag = f"distilled_{family.denoiser_name}"
    if source.distilled_flag not in (None, own_flag):
        name = family.pipeline_class.__name__
        raise UserError(f"--{source.distilled_flag}: a {name} has a {family.denoiser_name}: pass --{own_flag}")
    base_config = read_config(family.denoiser_class, base, family.denoiser_name, **source.files)
    denoiser_config = _check_distilled_denoiser(source, family, base_config)
    if source.distillation_lora is not None:
        path = _check_weight_file("--distillation_lora", source.distillation_lora)
        if path is not None and path.suffix == ".safetensors":
            lora_metadata(str(path))

    scheduler = _read_scheduler(source, model_index)
    scheduler = _converted(source, family, denoiser_config, scheduler)
    missing = [name for name, value in model_index.items() if value == [None, None]]
    absent_parts = (*family.unused_parts, *missing)
    return ModelInfo(family, denoiser_config, _read_vae_config(source, family), scheduler, absent_parts)


def _read_scheduler(source: ModelSource, model_index: dict) -> SchedulerMixin:
    """The pipeline's own, with the source's `scheduler_config`."""
    base, (_, name) = source.pretrained_model_name_or_path, model_index["scheduler"]
    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None:
        raise UserError(f"{base}: this diffusers has no scheduler {name}; upgrade it, or pass another pipeline")
    config, own = read_config(scheduler_class, base, "scheduler", **source.files), source.scheduler_config or {}
    if own.get("_class_name", name) != name:
        raise UserError(f"--scheduler_config is a {own['_class_name']}'s, the pipeline has a {name}: see --scheduler")
    unknown = sorted(key for key in own if not key.startswith("_") and key not in signature(scheduler_class).parameters)
    if unknown:
        raise UserError(f"--scheduler_config: {name} has no {unknown[0]}; pass what it takes, as JSON")
    try:
        return scheduler_class.from_config({**config, **own})
    except (TypeError, ValueError) as error:  # diffusers', for values of another kind
        raise UserError(f"{base}, scheduler: its configuration makes no {name} ({first_line(error)})") from error


def _read_vae_config(source: ModelSource, family: type[Family]) -> dict:
    base_config = read_config(family.vae_class, source.pretrained_model_name_or_path, "vae", **source.files)
    if source.vae is None:
        return base_config
    check_exists(source.vae, "--pretrained_vae_model_name_or_path")
    if Path(source.vae).exists() and not Path(source.vae, "config.json").is_file():
        raise UserError(
            f"--pretrained_vae_model_name_or_path: {source.vae} has no config.json; pass an "
            f"{family.vae_class.__name__}'s folder"
        )
    config, name = read_config(family.vae_class, source.vae, cache_dir=source.cache_dir), family.vae_class.__name__
    if config.get("_class_name", name) != name or config.get("latent_channels") != base_config.get("latent_channels"):
        raise UserError(
            f"--pretrained_vae_model_name_or_path: {source.vae} is a {config.get('_class_name')} of"
            f" {config.get('latent_channels')} channels; pass an {name} of {base_config.get('latent_channels')}"
        )
    return config


def _converted(source: ModelSource, family: type[Family], denoiser_config: dict, scheduler: SchedulerMixin):
    original_inference_steps = source.original_inference_steps
    if original_inference_steps is None and source.scheduler == "lcm":
        original_inference_steps = family.original_inference_steps(denoiser_config)
    scheduler = convert_scheduler(
        scheduler,
        source.scheduler,
        timestep_spacing=source.timestep_spacing,
        original_inference_steps=original_inference_steps,
    )
    if family.only_scheduler not in (None, type(scheduler)):
        name, only = family.pipeline_class.__name__, family.only_scheduler.__name__
        raise UserError(f"--scheduler: a {name} runs {only} alone, not {type(scheduler).__name__}: drop the flag")
    values = {key: value for key, value in family.scheduler_values.items() if key in scheduler.config}
    for key, value in values.items():
        if (source.scheduler_config or {}).get(key, value) != value:
            raise UserError(f"--scheduler_config: a {family.pipeline_class.__name__} sets {key} to {value}: drop it")
    scheduler.register_to_config(**values)
    return scheduler


def _check_weight_file(flag: str, name: str) -> Path | None:
    """The local file that `name` is, if it is one, after checking its extension."""
    location, filename = split_source(name)
    check_exists(location, flag)
    if filename is None:
        return None
    if not filename.endswith(WEIGHT_SUFFIXES):
        raise UserError(f"{flag}: {name} is neither {' nor '.join(WEIGHT_SUFFIXES)}; pass one of these")
    if not Path(location).is_dir():
        return None
    path = fetch_file(location, filename)
    if filename.endswith(".safetensors"):
        weight_shapes(path)  # for its header
    return Path(path)


def _check_distilled_denoiser(source: ModelSource, family: type[Family], base_config: dict) -> dict:
    """The configuration of the denoiser that is trained."""
    name, flag = source.distilled_denoiser, f"--distilled_{family.denoiser_name}"
    if name is None:
        return base_config
    location, filename = split_source(name)
    path = _check_weight_file(flag, name)
    if filename is not None:
        if path is not None and path.suffix == ".safetensors":
            _check_state_dict(name, empty_denoiser(family, base_config), weight_shapes(str(path)))
        return base_config
    if Path(location).is_dir() and not Path(location, "config.json").is_file():
        raise UserError(f"{flag}: {name} has no config.json; pass a denoiser's folder or a weight file")
    config = read_config(family.denoiser_class, location, cache_dir=source.cache_dir)
    _check_denoiser_config(name, family, config, base_config)
    return config


def empty_denoiser(family: type[Family], config: dict) -> ModelMixin:
    """A denoiser without weights and memory."""
    with torch.device("meta"):
        return family.denoiser_class.from_config(config)


def empty_parts(source: ModelSource, info: ModelInfo) -> dict[str, torch.nn.Module]:
    """The denoiser and the text encoders, by their names in the pipeline, without weights and memory.

    Raises:
        UserError: a text encoder's configuration cannot be read.
    """
    parts = {info.family.denoiser_name: empty_denoiser(info.family, info.denoiser_config)}
    base = source.pretrained_model_name_or_path
    for part, (model_class, config_class) in info.family.text_encoder_classes.items():
        if part in info.absent_parts:
            continue
        try:
            config = config_class.from_pretrained(base, subfolder=part, **source.files)
        except OSError as error:
            raise UserError(f"{base}, {part}: no configuration can be read ({first_line(error)})") from error
        with torch.device("meta"):
            parts[part] = model_class(config)
    return parts


def _check_state_dict(name: str, denoiser: ModelMixin, found: dict[str, tuple[int, ...]]) -> None:
    expected = {key: tuple(value.shape) for key, value in denoiser.state_dict().items()}
    problems = [
        (sorted(expected.keys() - found.keys()), "missing"),
        (sorted(found.keys() - expected.keys()), "unknown"),
        (sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key]), "of another shape"),
    ]
    if any(keys for keys, _ in problems):
        listed = ", ".join(f"{len(keys)} keys {what} (first: {keys[0]})" for keys, what in problems if keys)
        raise UserError(
            f"{name} is not a denoiser of the base model's architecture: {listed}; pass weights in diffusers' format "
            "made from this base model, or the folder of a denoiser with its own config.json"
        )


def _check_denoiser_config(name: str, family: type[Family], config: dict, base_config: dict) -> None:
    for key in family.conditioning_keys:
        if config.get(key) != base_config.get(key):
            raise UserError(
                f"{name} is not a denoiser for this base model: its {key} is {config.get(key)}, the base model's is "
                f"{base_config.get(key)}; pass the base model that it was distilled from"
            )


# ---- Loading ----


def load_pipeline(source: ModelSource, *, weight_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Loads the pipeline, frozen, in evaluation mode, on the CPU, with the parts and the scheduler that `source` names.

    Denoiser and text encoders are in `weight_dtype` whatever they are stored in; the VAE too, except where its config
    says `force_upcast` and the family's pipeline heeds it: then it is float32.

    Raises:
        UserError: a part cannot be loaded, or does not fit the base model.
    """
    info = read_model_info(source)
    parts = dict.fromkeys(info.absent_parts)
    is_upcast = info.family.upcasts_vae and info.vae_config.get("force_upcast", True)
    vae_dtype = torch.float32 if is_upcast else weight_dtype
    try:
        if source.distilled_denoiser is not None:
            parts[info.family.denoiser_name] = _load_distilled_denoiser(source, info, weight_dtype)
        if source.vae is not None:
            parts["vae"] = info.family.vae_class.from_pretrained(
                source.vae, dtype=vae_dtype, cache_dir=source.cache_dir
            )
        pipeline = info.family.pipeline_class.from_pretrained(
            source.pretrained_model_name_or_path,
            **parts,
            variant=source.variant,
            dtype={"default": weight_dtype, "vae": vae_dtype},
            **source.files,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"a model is neither whole in a local folder nor to be had from the hub: {first_line(error)}"
        ) from error
    except ValueError as error:  # no files of this variant, or other shapes than the configuration's
        names = [source.pretrained_model_name_or_path, source.vae, source.distilled_denoiser]
        names = " with ".join(name for name in names if name is not None)
        hint = "drop --variant, or " if source.variant else ""
        raise UserError(f"{names} does not load ({first_line(error)}); {hint}pass a whole pipeline") from error
    if source.distillation_lora is not None:
        _fuse_distillation_lora(pipeline, info.family.denoiser_name, source)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.scheduler = info.scheduler
    return pipeline


def _load_distilled_denoiser(source: ModelSource, info: ModelInfo, weight_dtype: torch.dtype) -> ModelMixin:
    location, filename = split_source(source.distilled_denoiser)
    if filename is None:
        denoiser_class = info.family.denoiser_class
        return denoiser_class.from_pretrained(location, dtype=weight_dtype, cache_dir=source.cache_dir)
    state_dict = read_weights(fetch_file(location, filename, source.cache_dir))
    denoiser = empty_denoiser(info.family, info.denoiser_config)
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    _check_state_dict(source.distilled_denoiser, denoiser, shapes)
    kept = set(denoiser._keep_in_fp32_modules or [])  # as `from_pretrained` keeps them
    for key, value in state_dict.items():
        state_dict[key] = value.to(weight_dtype if kept.isdisjoint(key.split(".")) else torch.float32)
    denoiser.load_state_dict(state_dict, assign=True)
    return denoiser


def _fuse_distillation_lora(pipeline: DiffusionPipeline, part: str, source: ModelSource) -> None:
    """Adds a LoRA to the denoiser's own weights: the policy that the trained LoRA starts from, and its base."""
    location, filename = split_source(source.distillation_lora)
    try:
        if filename is not None and filename.endswith(".safetensors"):
            lora_metadata(fetch_file(location, filename, source.cache_dir))
        pipeline.load_lora_weights(
            location, weight_name=filename, adapter_name="distillation", cache_dir=source.cache_dir
        )
        if "distillation" not in getattr(getattr(pipeline, part), "peft_config", {}):
            raise ValueError("it has no weights for this denoiser")
        pipeline.fuse_lora(components=[part], lora_scale=source.distillation_lora_scale, safe_fusing=True)
    except Exception as error:  # of the hub, the network, the file's format, the shapes: each library has its own
        raise UserError(
            f"--distillation_lora: {source.distillation_lora} does not load into the base model ({first_line(error)});"
            " pass a LoRA made for this model, as a folder, a file or repo:file"
        ) from error
    pipeline.unload_lora_weights()
