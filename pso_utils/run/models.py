"""From the flags to the model: what its files tell before it is loaded, schedule and deployment, the loaded family."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from pso_utils.data.latent_cache import TensorCache
from pso_utils.data.prompt_cache import PromptCache
from pso_utils.errors import UserError, first_line
from pso_utils.families import Deployment, Family
from pso_utils.families.loading import ModelInfo, ModelSource, empty_denoiser, load_pipeline, read_model_info
from pso_utils.families.lora import check_lora_targets, load_lora, lora_file, read_lora_settings
from pso_utils.families.quantize import quantize
from pso_utils.rewards import Rewards, RewardSpec, load_rewards
from pso_utils.run.accelerator import REWARD_DTYPES, WEIGHT_DTYPES, mixed_precision
from pso_utils.run.arguments import DEFAULT_RANK
from pso_utils.schedules import Schedule, make_schedule, pipelines_pass_eta
from pso_utils.sources import source_state


logger = get_logger(__name__)

MODEL_SOURCES = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "distilled_unet",
                 "distilled_transformer", "distillation_lora"]  # fmt: skip
MODEL_FLAGS = ["revision", "variant", "scheduler_config", "scheduler", "timestep_spacing", "original_inference_steps",
               "guidance_scale", "max_sequence_length", "distillation_lora_scale", "quantize", "allow_tf32",
               "enable_vae_tiling", "enable_xformers_memory_efficient_attention"]  # fmt: skip


def model_settings(args: argparse.Namespace) -> dict:
    """All that images, latents and embeddings depend on beside LoRA, deployment, prompt and seed; JSON. After the
    configurations are read, which tells the commit of a model of the hub."""
    settings = {name: source_state(getattr(args, name), cache_dir=args.cache_dir) for name in MODEL_SOURCES}
    base = args.pretrained_model_name_or_path
    settings[MODEL_SOURCES[0]] = source_state(base, revision=args.revision, cache_dir=args.cache_dir)
    return settings | {name: getattr(args, name) for name in MODEL_FLAGS} | {"mixed_precision": mixed_precision(args)}


def model_source(args: argparse.Namespace) -> ModelSource:
    flags = [flag for flag in ("distilled_unet", "distilled_transformer") if getattr(args, flag)]
    if len(flags) > 1:
        raise UserError("--distilled_unet and --distilled_transformer are two denoisers: pass one")
    return ModelSource(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        vae=args.pretrained_vae_model_name_or_path,
        distilled_denoiser=getattr(args, flags[0]) if flags else None,
        distilled_flag=flags[0] if flags else None,
        distillation_lora=args.distillation_lora,
        distillation_lora_scale=args.distillation_lora_scale or 1.0,
        revision=args.revision,
        variant=args.variant,
        scheduler_config=args.scheduler_config,
        scheduler=args.scheduler,
        timestep_spacing=args.timestep_spacing,
        original_inference_steps=args.original_inference_steps,
        cache_dir=args.cache_dir,
    )


def base_model_name(args: argparse.Namespace) -> str:
    """The pipeline's hub id, or a local folder's name without its path."""
    path = Path(args.pretrained_model_name_or_path).expanduser()
    return path.resolve().name if path.exists() else args.pretrained_model_name_or_path


def check_model(args: argparse.Namespace) -> ModelInfo:
    """What the model's files tell, after checking the flags that depend on it, before it is loaded.

    Raises:
        UserError: files that are missing or don't belong together, a resolution that doesn't fit the VAE, guidance for
            a model that takes none, or another flag that the family does not take.
    """
    info = read_model_info(model_source(args))
    _check_family_flags(args, info.family)
    info.family.check_size(info.vae_config, info.denoiser_config, height=args.resolution, width=args.resolution)
    info.family.checked_guidance(info.denoiser_config, args.guidance_scale)
    return info


def _check_family_flags(args: argparse.Namespace, family: type[Family]) -> None:
    name = family.pipeline_class.__name__
    if args.max_sequence_length is not None and family.max_sequence_length is None:
        raise UserError(f"--max_sequence_length: a {name} takes none: drop it")
    if args.max_sequence_length is not None and args.max_sequence_length > family.longest_sequence:
        raise UserError(f"--max_sequence_length: a {name} takes at most {family.longest_sequence}")
    if getattr(args, "save_dtype", None) and family.lora_format is None:
        raise UserError(f"--save_dtype is for other tools, none of which is known to read a LoRA of a {name}: drop it")


def check_lora(args: argparse.Namespace, info: ModelInfo) -> list[str]:
    """The layers that get LoRA; fills in rank, alpha and layers of --lora_path, or the default rank. An empty denoiser
    takes seconds to make, and the family's own targets need no check.

    Raises:
        UserError: the denoiser has no such layer, or --lora_path cannot be read.
    """
    if args.lora_path is not None:
        given = [name for name in ("rank", "lora_alpha", "lora_target_modules") if getattr(args, name) is not None]
        if given:
            raise UserError(f"--{given[0]} is that of the LoRA in --lora_path: drop it")
        settings = read_lora_settings(lora_file(args.lora_path, args.cache_dir), part=info.family.denoiser_name)
        args.rank, args.lora_alpha, args.lora_target_modules = settings
    if args.rank is None:
        args.rank = DEFAULT_RANK
    if args.lora_target_modules is None:
        return info.family.default_lora_targets(info.denoiser_config)
    denoiser = empty_denoiser(info.family, info.denoiser_config)
    check_lora_targets(denoiser, args.lora_target_modules, info.family.lora_targets)
    return args.lora_target_modules


def training_schedule(
    args: argparse.Namespace, info: ModelInfo, *, stochastic: bool, device: str | torch.device = "cpu"
) -> Schedule:
    """The schedule that is trained on; `stochastic` as in `make_schedule`."""
    steps = None if args.timesteps else args.num_inference_steps
    return _make_schedule(args, info, steps, args.timesteps, eta=args.eta, stochastic=stochastic, device=device)


def _make_schedule(
    args: argparse.Namespace, info: ModelInfo, steps: int | None, timesteps: Sequence[int] | None, **settings
) -> Schedule:
    """`make_schedule` as the family's pipeline does, at the run's resolution."""
    if steps is not None:
        size = {"vae_config": info.vae_config, "height": args.resolution, "width": args.resolution}
        settings |= info.family.schedule_arguments(info.scheduler, steps, **size)
    return make_schedule(info.scheduler, steps, timesteps, **settings)


def deployment(args: argparse.Namespace, info: ModelInfo) -> Deployment:
    """How the result is drawn with: what the --validation_ flags say, else as trained.

    Raises:
        UserError: the scheduler cannot run it, or the pipeline hands no eta to it.
    """
    timesteps, steps = args.validation_timesteps, args.validation_num_inference_steps
    if timesteps is None and steps is None:
        timesteps, steps = args.timesteps, args.num_inference_steps
    if args.validation_eta is not None:
        return make_deployment(args, info, steps, timesteps, eta=args.validation_eta, flag="--validation_eta")
    eta = args.eta if pipelines_pass_eta(info.scheduler) else None
    return make_deployment(args, info, steps, timesteps, eta=eta)


def make_deployment(
    args: argparse.Namespace,
    info: ModelInfo,
    steps: int | None,
    timesteps: Sequence[int] | None,
    *,
    eta: float | None,
    flag: str = "--eta",
) -> Deployment:
    """The deployment with these steps or timesteps; `flag` is what gave the eta, for messages."""
    passes_eta, name = pipelines_pass_eta(info.scheduler), type(info.scheduler).__name__
    if eta is not None and not passes_eta:
        remedy = ""
        if "stochastic_sampling" in info.scheduler.config:
            remedy = "; --scheduler_config '{\"stochastic_sampling\": true}' deploys its eta 1, else it is 0"
        raise UserError(f"{flag} {eta}: pipelines hand none to {name}: drop it{remedy}")
    steps = None if timesteps else steps
    eta = _make_schedule(args, info, steps, timesteps, eta=eta, stochastic=False).eta
    return Deployment(steps, timesteps, eta if passes_eta else None, args.resolution, args.resolution)


def load_family(args: argparse.Namespace, accelerator: Accelerator, info: ModelInfo) -> Family:
    """The pipeline, frozen, as the flags say; its denoiser is still on the CPU.

    Text encoders and VAE are on the accelerator, unless --offload leaves them on the CPU.

    Raises:
        UserError: it cannot be loaded, or xformers cannot be used with it here.
    """
    pipeline = load_pipeline(model_source(args), weight_dtype=WEIGHT_DTYPES[accelerator.mixed_precision])
    if args.quantize:
        quantize(getattr(pipeline, info.family.denoiser_name), args.quantize, accelerator.device)
    family = info.family(
        pipeline,
        device=accelerator.device,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
        offload=args.offload,
        vae_batch_size=args.vae_batch_size,
    )
    family.origin = model_settings(args)
    if accelerator.device.type == "cpu" and family.denoiser.dtype != torch.float32:
        # PyTorch's contiguous bfloat16 convolutions have no fast path on CPUs without AVX-512: 30 times slower there
        family.denoiser.to(memory_format=torch.channels_last)
    if args.enable_xformers_memory_efficient_attention:
        try:
            family.denoiser.enable_xformers_memory_efficient_attention()
        except (ValueError, ModuleNotFoundError) as error:  # diffusers': there is no GPU, or no xformers
            raise UserError(
                f"--enable_xformers_memory_efficient_attention: {first_line(error)}; drop the flag (PyTorch's own"
                " attention is as lean)"
            ) from error
    if args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    if not args.offload:
        for module in (*family.text_encoders, pipeline.vae):
            module.to(accelerator.device)
    return family


def add_trained_lora(args: argparse.Namespace, accelerator: Accelerator, family: Family) -> list[Tensor]:
    """Puts the denoiser on the accelerator, with a LoRA; returns its parameters."""
    parameters = family.add_lora(
        rank=args.rank, lora_alpha=args.lora_alpha, target_modules=args.lora_target_modules, seed=args.seed
    )
    if args.lora_path is not None:
        load_lora(family.denoiser, family.denoiser_name, lora_file(args.lora_path, args.cache_dir))
        logger.info(f"--lora_path: rank {args.rank}, alpha {args.lora_alpha}, {' '.join(args.lora_target_modules)}")
    if args.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    # the device and autocast, without DistributedDataParallel
    accelerator.prepare_model(family.denoiser, evaluation_mode=True)
    return parameters


def card_settings(args: argparse.Namespace, schedule: Schedule) -> dict[str, object]:
    """What the model card says of how the model was held and sampled while training."""
    settings = {"mixed precision": mixed_precision(args)}
    if schedule.eta is not None:
        settings["eta while training"] = schedule.eta
    if args.quantize is not None:
        settings["quantize"] = args.quantize
    if args.lora_path is not None:
        settings["goes on from"] = Path(args.lora_path).name
    return settings


def check_eta(args: argparse.Namespace, info: ModelInfo, *, is_used: bool) -> None:
    """Raises UserError for an --eta that no transition of this run has; `is_used`: whether any is trained or weighs."""
    if args.eta is not None and not is_used and not pipelines_pass_eta(info.scheduler):
        raise UserError(
            "--eta is the noise of trained transitions, and this run has none: drop it, or pass --weighting mdp"
        )


def make_prompt_cache(args: argparse.Namespace, family: Family) -> PromptCache:
    """The cache of embeddings, with --cache_prompts on disk, too."""
    return PromptCache(
        family, store=TensorCache(Path(args.output_dir, "cache", "prompts")) if args.cache_prompts else None
    )


def load_run_rewards(args: argparse.Namespace, accelerator: Accelerator, specs: Sequence[RewardSpec]) -> Rewards:
    """`load_rewards` as the flags say."""
    return load_rewards(
        specs,
        device=accelerator.device,
        offload=args.offload,
        cache_dir=args.cache_dir,
        batch_size=args.reward_batch_size,
        dtype=REWARD_DTYPES.get(args.reward_dtype),
    )
