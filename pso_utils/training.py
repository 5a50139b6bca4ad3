"""What the training scripts share around their loops: checks of the model's files, set-up, optimizer, trackers."""

import contextlib
import json
import logging
import math
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import offload_models
from huggingface_hub import create_repo, upload_folder
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.checkpoints import (
    MetricsLog,
    check_checkpoint_lora,
    check_checkpoint_optimizer,
    find_checkpoint,
    register_lora_hooks,
)
from pso_utils.latent_cache import LatentCache, TensorCache, fingerprint, text_key
from pso_utils.mdp import Schedule, convert_scheduler, make_schedule
from pso_utils.model_card import save_model_card
from pso_utils.sdxl import (
    DEFAULT_LORA_TARGETS,
    PromptEmbeddings,
    add_lora,
    add_time_ids,
    check_lora_targets,
    check_model_source,
    decode_latents,
    empty_unet,
    encode_images,
    first_line,
    guidance_embedding,
    load_pipeline,
    make_denoiser,
    split_source,
)


WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (prompt_embeds [B, S, D], pooled_prompt_embeds [B, E][, time_ids [B, 6]]) -> denoise(model_input, timesteps) ->
# model_output
Denoiser = Callable[..., Callable[[Tensor, Tensor], Tensor]]


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Ends the program with `error: ...` on one line and exit code 2 for what the user can mend.

    That is a ValueError raised by this project's own code (`pso_utils` and the file `script`) or an OSError (no such
    repository, disk full), or the accelerator out of memory. Any other exception, and a ValueError from inside a
    library, keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = [
            frame.f_globals.get("__name__", "").startswith("pso_utils") or frame.f_code.co_filename == script
            for frame in frames
        ]
        if isinstance(error, ValueError) and not isinstance(error, OSError) and not ours[-1]:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            where = [frame.f_code.co_name for frame, own in zip(frames, ours) if own][-1:]
            message = (
                f"out of memory in {''.join(where)}: make the batch sizes smaller, or pass --gradient_checkpointing,"
                f" --offload, --enable_vae_tiling, --mixed_precision bf16 or fp16 ({message})"
            )
        for bar in sorted(tqdm._instances, key=lambda bar: -abs(bar.pos)):  # the inner ones first
            bar.close()  # so that the message has a line of its own
        print("error:", message, file=sys.stderr, flush=True)
        raise SystemExit(2) from error


# ---- Early checks, on configuration files alone ----


def read_config(model_class, location: str, subfolder: str | None = None, **source) -> dict:
    """A part's configuration; raises ValueError where there is none to be read."""
    try:
        return model_class.load_config(location, subfolder=subfolder, **source)
    except OSError as error:
        part = f"{location}, {subfolder}" if subfolder else location
        raise ValueError(
            f"{part}: no configuration can be read ({first_line(error)}); pass a whole diffusers folder, or a hub id"
            " that can be reached from here"
        ) from error


def read_unet_config(args) -> dict:
    """The configuration of the UNet that is to be trained."""
    location, filename = split_source(args.distilled_unet) if args.distilled_unet else (None, None)
    if args.distilled_unet and filename is None:
        return read_config(UNet2DConditionModel, location, cache_dir=args.cache_dir)
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    return read_config(UNet2DConditionModel, args.pretrained_model_name_or_path, "unet", **source)


def check_model_files(args):
    """Checks the model's files, and the flags that depend on its configuration.

    Raises:
        ValueError: files that are missing or don't belong together, a resolution that doesn't fit the VAE, or guidance
            for a UNet that takes none.
    """
    base, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    check_model_source(
        base,
        vae=args.pretrained_vae_model_name_or_path,
        distilled_unet=args.distilled_unet,
        distillation_lora=args.distillation_lora,
    )
    if args.pretrained_vae_model_name_or_path is None:
        vae_config = read_config(AutoencoderKL, base, "vae", **source)
    else:
        vae_config = read_config(AutoencoderKL, args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
    multiple = math.lcm(8, 2 ** (len(vae_config["block_out_channels"]) - 1))  # 8: what the pipeline itself asks for
    if args.resolution % multiple:
        below = max(args.resolution // multiple, 1) * multiple
        raise ValueError(
            f"--resolution {args.resolution} is not a multiple of {multiple}: pass {below} or {below + multiple}"
        )
    if (args.guidance_scale or 0) > 1 and read_unet_config(args).get("time_cond_proj_dim") is None:
        raise ValueError(
            f"--guidance_scale {args.guidance_scale}: the UNet takes no guidance embedding (time_cond_proj_dim), and"
            " PSO tunes without classifier-free guidance: drop the flag"
        )


def check_lora_flags(args):
    """Raises ValueError unless the UNet has the layers of --lora_target_modules."""
    if args.lora_target_modules != DEFAULT_LORA_TARGETS:  # an empty SDXL takes seconds to make, and has the default's
        check_lora_targets(empty_unet(read_unet_config(args)), args.lora_target_modules)


def load_scheduler(args) -> SchedulerMixin:
    """The pipeline's scheduler, converted as the flags say, from its configuration alone."""
    base, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    _, class_name = read_config(StableDiffusionXLPipeline, base, **source)["scheduler"]
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None:
        raise ValueError(f"{base}: this diffusers has no scheduler {class_name}; upgrade it, or pass another pipeline")
    scheduler = scheduler_class.from_config(read_config(scheduler_class, base, "scheduler", **source))
    return convert_scheduler(scheduler, args.scheduler, args.timestep_spacing)


def training_schedule(args, scheduler: SchedulerMixin, device="cpu", stochastic: bool = True) -> Schedule:
    """The schedule that is trained on."""
    steps = None if args.timesteps else args.num_inference_steps
    return make_schedule(scheduler, steps, args.timesteps, args.eta, device, stochastic)


def deployment_settings(args, scheduler: SchedulerMixin) -> dict:
    """The deployment's `num_inference_steps` or `timesteps`, and `eta` (None where the scheduler takes none): what the
    --validation_ flags say, else as trained.

    Raises:
        ValueError: the scheduler cannot run them.
    """
    timesteps, steps = args.validation_timesteps, args.validation_num_inference_steps
    if timesteps is None and steps is None:
        timesteps, steps = args.timesteps, args.num_inference_steps
    steps = None if timesteps else steps
    eta = args.eta if args.validation_eta is None else args.validation_eta
    eta = make_schedule(scheduler, steps, timesteps, eta, stochastic=False).eta
    return {"num_inference_steps": steps, "timesteps": timesteps, "eta": eta}


def checkpoint_to_resume(args) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, checked against the flags; None for a new run.

    Raises:
        ValueError: it is missing, incomplete or of another LoRA or optimizer, or a new run would write over an earlier
            one's.
    """
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
        check_checkpoint_lora(checkpoint, args.rank, lora_alpha, args.lora_target_modules)
        check_checkpoint_optimizer(checkpoint, args.use_8bit_adam, mixed_precision(args))
    elif args.resume_from_checkpoint is None and any(Path(args.output_dir).glob("checkpoint-*[0-9]/manifest.json")):
        raise ValueError(
            f"--output_dir {args.output_dir} has the checkpoints of an earlier run: pass --resume_from_checkpoint"
            " latest to go on with it, or another --output_dir"
        )
    return checkpoint


# ---- Set-up ----


@dataclass
class TrainingState:
    """What a checkpoint keeps beside LoRA, optimizer and learning rate. Draws are keyed by it, so no generator is."""

    epoch: int = 0  # the next outer epoch
    global_step: int = 0  # optimizer steps done
    tie_epochs: int = 0  # epochs of nothing but ties in a row
    validated_step: int = -1  # the last step at which validation images were drawn

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        self.__dict__.update(state)


def mixed_precision(args) -> str:
    """That of --mixed_precision, else of accelerate's configuration."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def make_accelerator(args) -> Accelerator:
    """The accelerator, with output folder, logging, seeds and TF32 set up.

    Raises:
        ValueError: fp16 without a GPU, or a distributed set-up other than plain data parallel.
    """
    precision = mixed_precision(args)
    if precision not in WEIGHT_DTYPES:
        raise ValueError(f"mixed precision {precision} is not supported: pass --mixed_precision no, bf16 or fp16")
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: on a CPU pass --mixed_precision bf16 or no")
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    distributed = accelerator.distributed_type.value
    if distributed != "NO" and not distributed.startswith("MULTI_"):
        raise ValueError(f"accelerate's {distributed} is not supported: use one process or plain multi-GPU")
    # accelerate would divide the loss by the accumulation steps of its own config; the scripts weigh their own losses.
    accelerator.gradient_accumulation_steps = 1

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    if not accelerator.is_local_main_process:
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def load_base(args, accelerator: Accelerator) -> StableDiffusionXLPipeline:
    """The pipeline, frozen, as the flags say; its UNet is still on the CPU.

    Text encoders and VAE are on the accelerator, unless --offload leaves them on the CPU.
    """
    pipeline = load_pipeline(
        args.pretrained_model_name_or_path,
        vae=args.pretrained_vae_model_name_or_path,
        distilled_unet=args.distilled_unet,
        distillation_lora=args.distillation_lora,
        scheduler=args.scheduler,
        timestep_spacing=args.timestep_spacing,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        weight_dtype=WEIGHT_DTYPES[accelerator.mixed_precision],
    )
    unet = pipeline.unet
    if accelerator.device.type == "cpu" and unet.dtype != torch.float32:
        # PyTorch's contiguous bfloat16 convolutions have no fast path on CPUs without AVX-512: 30 times slower there
        unet.to(memory_format=torch.channels_last)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.enable_vae_slicing:
        pipeline.vae.enable_slicing()
    if args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    if not args.offload:
        for module in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
            module.to(accelerator.device)
    return pipeline


def load_models(args, accelerator: Accelerator) -> tuple[StableDiffusionXLPipeline, list[Tensor]]:
    """`load_base`, its UNet on the accelerator with a LoRA that checkpoints save, and the LoRA's parameters."""
    pipeline = load_base(args, accelerator)
    unet = pipeline.unet
    parameters = add_lora(unet, args.rank, args.lora_alpha, args.lora_target_modules, seed=args.seed)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    accelerator.prepare_model(unet, evaluation_mode=True)  # the device and autocast, without DistributedDataParallel
    register_lora_hooks(accelerator, unet)
    return pipeline, parameters


class ModelFunctions(NamedTuple):
    """The model's parts as functions of tensors, moved to the accelerator only while used, if --offload."""

    embed: Callable  # prompts -> (prompt_embeds [B, S, D], pooled_prompt_embeds [B, E])
    denoiser: Denoiser
    decode: Callable  # latents [B, C, H, W] -> images
    encode: Callable  # images [B, 3, H, W] in [-1, 1] -> latents
    guidance_scale: float


def make_functions(
    args, accelerator: Accelerator, pipeline: StableDiffusionXLPipeline, cache_folder: Path | None = None
) -> ModelFunctions:
    """With a `cache_folder`, `embed` and `encode` keep on disk what they made, and read it from there."""
    device, embeddings = accelerator.device, PromptEmbeddings(pipeline)
    if cache_folder is not None:
        text_encoders = fingerprint(pipeline.text_encoder, pipeline.text_encoder_2)
        key = partial(text_key, text_encoders)
        embeddings = PromptEmbeddings(pipeline, store=TensorCache(cache_folder / "prompts"), key=key)
    guidance_scale = args.guidance_scale
    if guidance_scale is None:  # 8: what SDXL-LCM's model card uses
        guidance_scale = 0.0 if pipeline.unet.config.time_cond_proj_dim is None else 8.0

    def embed(prompts):
        offload = args.offload and bool(embeddings.missing(prompts))
        with offload_models(pipeline.text_encoder, pipeline.text_encoder_2, device=device, offload=offload):
            return embeddings(prompts, device)

    def denoiser(prompt_embeds, pooled_prompt_embeds, time_ids=None):
        batch = {"batch_size": len(prompt_embeds), "device": device, "dtype": prompt_embeds.dtype}
        timestep_cond = guidance_embedding(pipeline, guidance_scale, **batch)
        if time_ids is None:  # an uncropped square
            time_ids = add_time_ids(pipeline, args.resolution, **batch)
        time_ids = time_ids.to(device, prompt_embeds.dtype)
        return make_denoiser(pipeline.unet, prompt_embeds, pooled_prompt_embeds, time_ids, timestep_cond)

    def encode(pixels):
        with offload_models(pipeline.vae, device=device, offload=args.offload):
            return encode_images(pipeline, pixels, args.vae_batch_size).to(device)

    if cache_folder is not None:
        encode = LatentCache(cache_folder / "latents", encode, fingerprint(pipeline.vae))

    def decode(latents):
        with offload_models(pipeline.vae, device=device, offload=args.offload):
            return decode_latents(pipeline, latents, args.vae_batch_size)

    return ModelFunctions(embed, denoiser, decode, encode, guidance_scale)


def make_optimizer(args, accelerator: Accelerator, parameters: list[Tensor], num_training_steps: int):
    """AdamW (8-bit if asked) and its learning rate schedule, which counts optimizer steps.

    The schedule is registered for checkpoints instead of prepared: a prepared one steps once per process, which is
    right for a data loader that the processes share and wrong for a loop that counts optimizer steps.
    """
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    try:
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=num_training_steps,
        )
    except ValueError as error:  # polynomial: a learning rate below the one that it ends at
        raise ValueError(f"--lr_scheduler {args.lr_scheduler}: {error}; raise --learning_rate") from error
    accelerator.register_for_checkpointing(lr_scheduler)
    return accelerator.prepare_optimizer(optimizer), lr_scheduler


# ---- Optimizer steps ----


def initialize_grad_scaler(accelerator: Accelerator):
    """Lets a rank unscale fp16 gradients that it made no part of: GradScaler allocates its scale on its first use."""
    if accelerator.scaler is not None:
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))


def reduce_gradients(accelerator: Accelerator, parameters: list[Tensor], sums: Tensor) -> Tensor:
    """Sums the gradients of all processes, in place, and `sums` [M] (returned), with a single collective call.

    The parameters are float32 (LoRA is, whatever the model's dtype) and every one has a gradient.
    """
    flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), sums])
    *gradients, sums = accelerator.reduce(flat, "sum").split([*(p.numel() for p in parameters), len(sums)])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad.copy_(gradient.view_as(parameter))
    return sums


def optimizer_step(accelerator: Accelerator, optimizer, lr_scheduler, parameters: list[Tensor], max_grad_norm: float):
    """Clips the gradient and steps. Returns a dict with `lr`, and `grad_norm` before clipping, where it is finite.

    An fp16 gradient that overflowed is skipped, by all processes alike, and the scale lowered.

    Raises:
        ValueError: a gradient that is not finite, without a scaler or where no scale helps.
    """
    lr = lr_scheduler.get_last_lr()[0]
    grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    finite = grad_norm < float("inf")
    # A scale below 1: it is not the gradient that overflows but the forward pass, and every step would be skipped.
    if not finite and (accelerator.scaler is None or accelerator.scaler.get_scale() < 1):
        raise ValueError(
            "the gradient is not finite: lower --learning_rate or --beta, or pass --mixed_precision no; the latest"
            " checkpoint is from before it"
        )
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        lr_scheduler.step()
    return {"grad_norm": grad_norm, "lr": lr} if finite else {"lr": lr}


# ---- Trackers, offloading, intervals ----


def start_logs(accelerator: Accelerator, args, project: str, global_step: int, resumed: bool) -> Callable:
    """Starts the tracker and metrics.jsonl, and returns `log(step, values)`, which writes to both.

    A resumed run goes on where its checkpoint was taken: what was logged after `global_step` is dropped from
    metrics.jsonl and from TensorBoard, and wandb goes on with the run whose id `output_dir` keeps.
    """
    if args.report_to != "none":
        config = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                  for key, value in vars(args).items() if key != "hub_token"}  # fmt: skip
        init_kwargs = {"tensorboard": {"purge_step": global_step + 1 if resumed else 0}}
        if args.report_to == "wandb" and accelerator.is_main_process:
            id_file = Path(args.output_dir, "wandb_run_id.txt")
            if not (resumed and id_file.exists()):
                id_file.write_text(uuid.uuid4().hex[:12])
            init_kwargs = {"wandb": {"id": id_file.read_text().strip(), "resume": "allow", "dir": args.output_dir}}
        accelerator.init_trackers(project, config=None if resumed else config, init_kwargs=init_kwargs)
    metrics_log = MetricsLog(args.output_dir)
    if accelerator.is_main_process:
        metrics_log.rewind(global_step if resumed else -1)

    def log(step: int, values: dict):
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            metrics_log.append(step, values)

    return log


def offloaded(function, device, offload: bool) -> Callable:
    """`function` (which has `.to`), moved to `device` for each call and back to the CPU after it, if `offload`."""
    if not offload:
        return function

    def call(*inputs):
        function.to(device)
        try:
            return function(*inputs)
        finally:
            function.to("cpu")

    return call


def count_tie_epochs(state: TrainingState, num_pairs: int) -> int:
    """The number of epochs in a row, this one included, that had no pair."""
    state.tie_epochs = 0 if num_pairs else state.tie_epochs + 1
    return state.tie_epochs


def only_ties(tie_epochs: int) -> ValueError:
    return ValueError(
        f"{tie_epochs} epochs in a row had nothing but ties (--max_tie_epochs): the reward tells no samples of a prompt"
        " apart; use another --reward or --reward_combination, or more --samples_per_prompt"
    )


def passed_multiple(interval: int, before: int, after: int) -> bool:
    """Whether a count that went from `before` to `after` reached or passed a multiple of `interval`."""
    return after // interval > before // interval


# ---- The result ----


def write_model_card(args, scheduler: SchedulerMixin, settings: dict, prompt: str, images, repo_id: str | None, facts):
    """`settings` are the deployment's, `facts` the run's; see `save_model_card`."""
    save_model_card(
        args.output_dir,
        base_model=args.pretrained_model_name_or_path,
        scheduler=scheduler,
        prompt=prompt,
        hub_model_id=repo_id,
        training=facts,
        images=images,
        resolution=args.resolution,
        revision=args.revision,
        variant=args.variant,
        vae=args.pretrained_vae_model_name_or_path,
        distilled_unet=args.distilled_unet,
        distillation_lora=args.distillation_lora,
        **settings,
    )


def create_hub_repository(accelerator: Accelerator, args) -> str | None:
    """Creates the repository of --push_to_hub, before the hours of training; None if nothing is to be uploaded."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # of the hub, the network, the name's form: each library has its own
        raise ValueError(
            f"--push_to_hub: the repository {name} cannot be created ({first_line(error)}); log in with `hf auth login`"
            " or pass --hub_token, pass another --hub_model_id, or drop --push_to_hub"
        ) from error


def push_folder(repo_id: str, args):
    """Uploads the run's result; checkpoints and logs stay local."""
    ignored = ["checkpoint-*", f"{args.logging_dir}/*", "wandb*"]
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=ignored,
            token=args.hub_token,
        )
    except Exception as error:
        exclude = " ".join(f"'{pattern}'" for pattern in ignored)
        raise ValueError(
            f"the result is complete in {args.output_dir}, but it could not be uploaded ({first_line(error)}); do so by"
            f" `hf upload {repo_id} {args.output_dir} --exclude {exclude}`"
        ) from error
