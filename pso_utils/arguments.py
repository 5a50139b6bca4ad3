"""Command-line flags that the training scripts share, with the checks that need nothing but the flags.

Names, meanings and defaults are those of diffusers' training examples wherever these have the flag.
"""

import argparse
import importlib.util
import math
import os
from pathlib import Path

import torch


LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage of some eighty flags would bury the message."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def bounded(kind, low, low_included=True, high=None, high_included=True):
    """An argparse type: a finite number of `kind` (int or float) of at least, or above, `low` and at most, or below,
    `high`."""
    name = {int: "a whole number", float: "a number"}[kind]
    limits = f"of at least {low}" if low_included else f"above {low}"
    if high is None:
        high, high_included = math.inf, False
    else:
        limits += f", at most {high}" if high_included else f", below {high}"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        included = (value == low and low_included) or (value == high and high_included)
        if value is None or not (low < value < high or included):
            raise argparse.ArgumentTypeError(f"must be {name} {limits}, not {text!r}")
        return value

    return convert


positive_int = bounded(int, 1)
non_negative_int = bounded(int, 0)
positive_float = bounded(float, 0, low_included=False)
non_negative_float = bounded(float, 0)


def add_model_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True, help="SDXL pipeline: a hub id or a local diffusers folder.")
    add("--pretrained_vae_model_name_or_path", help="VAE to use instead of the pipeline's: a hub id or a folder.")
    add("--distilled_unet", help="Whole distilled UNet to use instead of the pipeline's: a local file, `repo:file` "
        "(.safetensors, or .bin read with weights_only), or a diffusers folder with its own config.")  # fmt: skip
    add("--distillation_lora", help="Distillation LoRA to fuse before the trained LoRA is added: a local file or "
        "`repo:file` (LCM-LoRA, Hyper-SD, TCD).")  # fmt: skip
    add("--revision", help="Revision of the pipeline on the hub.")
    add("--variant", help="Variant of the pipeline's files, such as fp16.")
    add("--cache_dir", help="Folder for what is downloaded.")
    add("--resolution", type=positive_int, default=1024, help="Height and width of the images, in pixels.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Precision of the frozen weights and of the UNet's "
        "autocast; the trained LoRA, transitions and stored latents stay float32. Default: accelerate's.")  # fmt: skip
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products on Ampere GPUs and later.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: slower, in less memory.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention.")
    add("--enable_vae_slicing", action="store_true", help="Decode images one by one.")
    add("--enable_vae_tiling", action="store_true", help="Decode images in tiles, for large resolutions.")
    add("--vae_batch_size", type=positive_int, default=1, help="Images that the VAE decodes at once.")
    add("--offload", action="store_true", help="Keep text encoders, VAE and reward models off the accelerator except "
        "where they are used.")  # fmt: skip


def add_schedule_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("schedule")
    add = group.add_argument
    add("--scheduler", choices=["lcm", "euler_ancestral", "euler", "tcd", "ddim"], help="Convert the pipeline's "
        "scheduler: trailing, no clip_sample, 1000 original steps. Default: the pipeline's own.")  # fmt: skip
    add("--timestep_spacing", choices=["trailing", "leading", "linspace"], help="Override the scheduler's spacing.")
    add("--num_inference_steps", type=positive_int, default=4, help="Steps of the distilled schedule.")
    add("--timesteps", type=non_negative_int, nargs="+", help="The schedule's timesteps themselves, instead of "
        "--num_inference_steps (LCM, TCD and Euler only).")  # fmt: skip
    add("--eta", type=non_negative_float, help="Stochasticity of DDIM (default 1.0) and TCD (default 0.3).")
    add("--guidance_scale", type=non_negative_float, help="Guidance embedding of UNets that take one "
        "(time_cond_proj_dim, such as SDXL-LCM's; default 8.0). Others are tuned without guidance (0.0).")  # fmt: skip


def add_prompt_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--prompts", help="Text file with one prompt a line, or .json or .jsonl with strings or captioned objects.")
    add("--dataset_name", help="Instead of --prompts: a dataset of the hub or a local folder.")
    add("--caption_column", default="text", help="Field of the JSON objects or column of the dataset to read.")
    add_dataset_arguments(group, "prompts")


def add_dataset_arguments(group, samples: str):
    add = group.add_argument
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset.")
    add("--max_train_samples", type=positive_int, help=f"Use only the first so many {samples}.")
    add("--dataloader_num_workers", type=non_negative_int, default=0, help="Subprocesses that prepare the dataset; 0: "
        "the main process.")  # fmt: skip


def add_lora_arguments(parser: argparse.ArgumentParser, targets: list[str]):
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--rank", type=positive_int, default=16, help="Rank of the LoRA matrices.")
    add("--lora_alpha", type=positive_float, help="Scale of the LoRA, as alpha / rank. Default: the rank.")
    add("--lora_target_modules", nargs="+", default=targets, help="Names of the UNet's layers that get LoRA.")
    add("--output_kohya_format", action="store_true", help="Also save the LoRA with Kohya's keys, for ComfyUI.")


def add_optimizer_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--learning_rate", type=non_negative_float, default=1e-5, help="Learning rate after warm-up.")
    add("--scale_lr", action="store_true", help="Multiply it by accumulation steps, batch size and processes.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Learning rate schedule.")
    add("--lr_warmup_steps", type=non_negative_int, default=0, help="Optimizer steps of warm-up, where it has one.")
    add("--use_8bit_adam", action="store_true", help="Use bitsandbytes' AdamW8bit.")
    add("--adam_beta1", type=bounded(float, 0, high=1, high_included=False), default=0.9, help="AdamW's beta1.")
    add("--adam_beta2", type=bounded(float, 0, high=1, high_included=False), default=0.999, help="AdamW's beta2.")
    add("--adam_weight_decay", type=non_negative_float, default=1e-6, help="AdamW's weight decay.")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon.")
    add("--max_grad_norm", type=positive_float, default=1.0, help="Clip the gradient to this norm.")


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str):
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output_dir", default=output_dir, help="Folder for the LoRA, the model card, images, checkpoints and logs.")
    add("--seed", type=bounded(int, 0, high=2**32 - 1), default=0, help="Seed of everything that is drawn.")
    add("--checkpointing_steps", type=positive_int, default=500, help="Save a checkpoint every so many optimizer "
        "steps; online at the next epoch boundary.")  # fmt: skip
    add("--checkpoints_total_limit", type=positive_int, help="Keep only so many of the newest checkpoints.")
    add("--resume_from_checkpoint", help="A checkpoint's path, or `latest` (a new run where there is none).")
    add("--validation_prompts", nargs="+", help="Prompts of the validation images. Default: the first four training "
        "prompts; of a concept its own and its class's.")  # fmt: skip
    add("--num_validation_images", type=non_negative_int, default=4, help="Images per validation prompt, always from "
        "the same noise; 0: no validation.")  # fmt: skip
    add("--validation_steps", type=positive_int, default=100, help="Validate every so many optimizer steps "
        "(online at the next epoch boundary), and before and after the run.")  # fmt: skip
    add("--validation_num_inference_steps", type=positive_int, help="Steps at deployment. Default: as trained.")
    add("--validation_timesteps", type=non_negative_int, nargs="+", help="Timesteps at deployment. Default: as "
        "trained (none, if --validation_num_inference_steps is given).")  # fmt: skip
    add("--validation_eta", type=non_negative_float, help="DDIM's or TCD's eta at deployment. Default: as trained.")
    add("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="Tracker.")
    add("--logging_dir", default="logs", help="Folder for TensorBoard's files, inside --output_dir.")
    add("--push_to_hub", action="store_true", help="Upload the result to the hub.")
    add("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")
    add("--hub_token", help="Token for the hub. Default: the one that you are logged in with.")


def check_shared_arguments(args: argparse.Namespace):
    """Checks what can be known from the shared flags and the installed packages, before anything is loaded.

    Raises:
        ValueError: a flag that cannot work here, with what to pass, install or drop instead.
    """
    output_dir = Path(args.output_dir)
    folder = next(folder for folder in [output_dir.absolute(), *output_dir.absolute().parents] if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"--output_dir {args.output_dir}: {folder} is a file; pass a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {args.output_dir}: {folder} may not be written to; pass another folder")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes: run `pip install bitsandbytes`, or drop the flag")
    if args.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            raise ValueError(
                "--enable_xformers_memory_efficient_attention needs a CUDA GPU and there is none here: drop the flag"
            )
        if importlib.util.find_spec("xformers") is None:
            raise ValueError(
                "--enable_xformers_memory_efficient_attention needs xformers: run `pip install xformers`, or drop the"
                " flag (PyTorch's own attention is as lean)"
            )
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(
            f"--report_to {args.report_to} needs {args.report_to}: run `pip install {args.report_to}`, or pass"
            " --report_to none"
        )
    for launcher in ["DEEPSPEED", "FSDP", "MEGATRON_LM"]:
        if os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate is configured for {launcher}, which is not supported: run `accelerate config` and choose"
                " one process or multi-GPU without it"
            )
