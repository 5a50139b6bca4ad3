"""From the flags to the model: what its files tell before it is loaded, schedule and deployment, the loaded family."""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.families import Deployment, Family
from pso_utils.families.loading import ModelInfo, ModelSource, empty_denoiser, load_pipeline, read_model_info
from pso_utils.families.lora import check_lora_targets
from pso_utils.rewards import Rewards, RewardSpec, load_rewards
from pso_utils.run.accelerator import REWARD_DTYPES, WEIGHT_DTYPES, mixed_precision
from pso_utils.schedules import Schedule, make_schedule
from pso_utils.sources import source_state


MODEL_SOURCES = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "distilled_unet",
                 "distillation_lora"]  # fmt: skip
MODEL_FLAGS = ["revision", "variant", "scheduler", "timestep_spacing", "original_inference_steps", "guidance_scale",
               "allow_tf32", "enable_vae_tiling", "enable_xformers_memory_efficient_attention"]  # fmt: skip


def model_settings(args: argparse.Namespace) -> dict:
    """All that images, latents and embeddings depend on beside LoRA, deployment, prompt and seed; JSON. After the
    configurations are read, which tells the commit of a model of the hub."""
    settings = {name: source_state(getattr(args, name), cache_dir=args.cache_dir) for name in MODEL_SOURCES}
    base = args.pretrained_model_name_or_path
    settings[MODEL_SOURCES[0]] = source_state(base, revision=args.revision, cache_dir=args.cache_dir)
    return settings | {name: getattr(args, name) for name in MODEL_FLAGS} | {"mixed_precision": mixed_precision(args)}


def model_source(args: argparse.Namespace) -> ModelSource:
    return ModelSource(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        vae=args.pretrained_vae_model_name_or_path,
        distilled_denoiser=args.distilled_unet,
        distillation_lora=args.distillation_lora,
        revision=args.revision,
        variant=args.variant,
        scheduler=args.scheduler,
        timestep_spacing=args.timestep_spacing,
        original_inference_steps=args.original_inference_steps,
        cache_dir=args.cache_dir,
    )


def check_model(args: argparse.Namespace) -> ModelInfo:
    """What the model's files tell, after checking the flags that depend on it, before it is loaded.

    Raises:
        UserError: files that are missing or don't belong together, a resolution that doesn't fit the VAE, or guidance
            for a model that takes none.
    """
    info = read_model_info(model_source(args))
    info.family.check_size(info.vae_config, args.resolution, args.resolution)
    info.family.checked_guidance(info.denoiser_config, args.guidance_scale)
    return info


def check_lora(args: argparse.Namespace, info: ModelInfo) -> list[str]:
    """The layers that get LoRA. An empty denoiser takes seconds to make, and the family's own targets need no check.

    Raises:
        UserError: the denoiser has no such layer.
    """
    if args.lora_target_modules is None:
        return info.family.lora_targets
    denoiser = empty_denoiser(info.family, info.denoiser_config)
    check_lora_targets(denoiser, args.lora_target_modules, info.family.lora_targets)
    return args.lora_target_modules


def training_schedule(
    args: argparse.Namespace,
    family: Family | type[Family],
    scheduler: SchedulerMixin,
    *,
    stochastic: bool,
    device: str | torch.device = "cpu",
) -> Schedule:
    """The schedule that is trained on; `stochastic` as in `make_schedule`."""
    steps = None if args.timesteps else args.num_inference_steps
    arguments = {} if steps is None else family.schedule_arguments(scheduler, steps, args.resolution, args.resolution)
    return make_schedule(
        scheduler, steps, args.timesteps, eta=args.eta, stochastic=stochastic, device=device, **arguments
    )


def deployment(args: argparse.Namespace, family: Family | type[Family], scheduler: SchedulerMixin) -> Deployment:
    """How the result is drawn with: what the --validation_ flags say, else as trained.

    Raises:
        UserError: the scheduler cannot run it.
    """
    timesteps, steps = args.validation_timesteps, args.validation_num_inference_steps
    if timesteps is None and steps is None:
        timesteps, steps = args.timesteps, args.num_inference_steps
    steps = None if timesteps else steps
    eta = args.eta if args.validation_eta is None else args.validation_eta
    arguments = {} if steps is None else family.schedule_arguments(scheduler, steps, args.resolution, args.resolution)
    eta = make_schedule(scheduler, steps, timesteps, eta=eta, stochastic=False, **arguments).eta
    return Deployment(steps, timesteps, eta, args.resolution, args.resolution)


def load_family(args: argparse.Namespace, accelerator: Accelerator, info: ModelInfo) -> Family:
    """The pipeline, frozen, as the flags say; its denoiser is still on the CPU.

    Text encoders and VAE are on the accelerator, unless --offload leaves them on the CPU.

    Raises:
        UserError: it cannot be loaded, or xformers cannot be used with it here.
    """
    pipeline = load_pipeline(model_source(args), weight_dtype=WEIGHT_DTYPES[accelerator.mixed_precision])
    family = info.family(
        pipeline,
        device=accelerator.device,
        guidance_scale=args.guidance_scale,
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
    if args.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    # the device and autocast, without DistributedDataParallel
    accelerator.prepare_model(family.denoiser, evaluation_mode=True)
    return parameters


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
