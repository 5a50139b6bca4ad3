"""Command-line flags that the scripts share, with the checks that need nothing but the flags.

Names and meanings are those of diffusers' training examples wherever these have the flag, and so are the defaults, but
for seven: --learning_rate (1e-5, not 1e-4), --adam_weight_decay (1e-6, not 1e-2) and --lr_warmup_steps (0, not 500)
are the PSO release's; --rank (16, not 4) is its rank for DMD2; --train_batch_size (2 online, 4 offline, not 16), since
a pair is two images and, with the base, four model outputs; --num_train_epochs (1 offline, not 100), since a preference
data set has hundreds of thousands of pairs; --seed (0, not none), since a run is to be repeatable.
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pso_utils.errors import UserError
from pso_utils.families.lora_export import DEFAULT_SAVE_DTYPE, SAVE_DTYPES
from pso_utils.families.quantize import QUANTIZATIONS
from pso_utils.rewards import COMBINATIONS
from pso_utils.run.accelerator import REWARD_DTYPES
from pso_utils.schedules import SCHEDULERS


DEFAULT_RANK = 16  # of a new LoRA
LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, unless it is none: then the help itself says what happens."""

    def _get_help_string(self, action):
        is_none = action.default is None or action.default is False or action.default == []
        return action.help if is_none else super()._get_help_string(action)


# What takes the place of other trainers' flags: diffusers' examples, kohya's scripts
FLAGS_ELSEWHERE = {
    "validation_prompt": "pass --validation_prompts",
    "sample_prompts": "pass --validation_prompts",
    "validation_epochs": "pass --validation_steps",
    "sample_every_n_steps": "pass --validation_steps",
    "save_every_n_steps": "pass --checkpointing_steps",
    "save_every_n_epochs": "pass --checkpointing_steps",
    "max_train_epochs": "pass --num_train_epochs",
    "network_dim": "pass --rank",
    "network_alpha": "pass --lora_alpha",
    "network_weights": "pass --lora_path",
    "unet_lr": "pass --learning_rate",
    "text_encoder_lr": "text encoders are not trained; drop it",
    "train_text_encoder": "text encoders are not trained; drop it",
    "snr_gamma": "pass --weighting, which weighs the noise levels",
    "min_snr_gamma": "pass --weighting, which weighs the noise levels",
    "loss_type": "pass --loss",
    "beta_dpo": "pass --beta",
    "with_prior_preservation": "pass --task concept, whose --class_anchor keeps the class",
    "num_class_images": "pass --num_reference_images",
    "class_data_dir": "references are drawn by the model: pass --class_prompt and --num_reference_images",
    "cache_latents_to_disk": "pass --cache_latents",
    "cache_text_encoder_outputs": "pass --cache_prompts",
    "caption_extension": "captions are .txt files; drop it",
    "output_name": "pass --output_dir",
    "xformers": "pass --enable_xformers_memory_efficient_attention",
    "optimizer_type": "the optimizer is AdamW, or with --use_8bit_adam bitsandbytes'; drop it",
}


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose usage and errors are one line: some eighty flags would bury the message. `example` is the end of
    its help."""

    def __init__(self, *, example: str | None = None, **kwargs):
        settings = {"usage": "%(prog)s [flags]", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**settings, epilog=example and f"Example: {example}", **kwargs)

    def parse_args(self, args=None, namespace=None):
        """Flags that there are not are an error that says what to pass instead."""
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._instead_of(unknown)}")
        return args

    def _instead_of(self, unknown: list[str]) -> str:
        for flag in (text.partition("=")[0] for text in unknown if text.startswith("--")):
            name = flag.removeprefix("--").replace("-", "_")
            remedy = FLAGS_ELSEWHERE.get(name)
            if remedy is not None and all(own in self._option_string_actions for own in re.findall(r"--\w+", remedy)):
                return f"; {remedy}"
            close = difflib.get_close_matches(f"--{name}", self._option_string_actions, 1)
            if close:
                return f"; did you mean {close[0]}?"
        return ""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def bounded(kind, low, *, low_included=True, high=None, high_included=True):
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


def json_object(text: str) -> dict:
    """An argparse type: a JSON object, or a file with one."""
    try:
        value = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"is neither a JSON object nor a file with one: {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text[:80]!r}")
    return value


def prompt(text: str) -> str:
    """An argparse type: text that tokenizers take."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python's stand-ins for bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"is not UTF-8 text: {text!r}") from None
    return text


positive_int = bounded(int, 1)
non_negative_int = bounded(int, 0)
positive_float = bounded(float, 0, low_included=False)
non_negative_float = bounded(float, 0)


def add_model_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="The pipeline: a hub id or a local diffusers folder.")
    add("--pretrained_vae_model_name_or_path", help="VAE to use instead of the pipeline's: a hub id or a folder.")
    add("--distilled_unet", help="Whole distilled denoiser to use instead of the pipeline's: a local file, `repo:file` "
        "(.safetensors, or .bin read with weights_only), or a diffusers folder with its own config.")  # fmt: skip
    add("--distilled_transformer", help="The same for families whose denoiser is a transformer.")
    add("--distillation_lora", help="Distillation LoRA to fuse before the trained LoRA is added: a local file or "
        "`repo:file` (LCM-LoRA, Hyper-SD, TCD, Qwen-Image-Lightning).")  # fmt: skip
    add("--distillation_lora_scale", type=positive_float, help="What it is fused with. Default: 1.")
    add("--max_sequence_length", type=positive_int, help="Tokens of a prompt. Default: as the family is deployed.")
    add("--revision", help="Revision of the pipeline on the hub.")
    add("--variant", help="Variant of the pipeline's files, such as fp16.")
    add("--cache_dir", help="Folder for what is downloaded.")
    add("--resolution", type=positive_int, default=1024, help="Height and width of the images, in pixels.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Precision of the frozen weights and the "
        "autocast; the trained LoRA, transitions and stored latents are float32. Default: accelerate's.")  # fmt: skip
    add("--quantize", choices=QUANTIZATIONS, help="Hold the linear layers of the frozen denoiser's blocks in 4 (nf4) "
        "or 8 bits (int8), by bitsandbytes.")  # fmt: skip
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products on Ampere GPUs and later.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: slower, in less memory.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention.")
    add("--enable_vae_tiling", action="store_true", help="Decode images in tiles, for large resolutions.")
    add("--vae_batch_size", type=positive_int, default=1, help="Images that the VAE takes at once.")
    add("--offload", action="store_true", help="Keep text encoders, VAE and reward models off the accelerator except "
        "where they are used.")  # fmt: skip


def add_schedule_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("schedule").add_argument
    add("--scheduler_config", type=json_object, metavar="FILE|JSON", help="Values that replace those of the pipeline's "
        "scheduler_config.json: a JSON object, or a file with one.")  # fmt: skip
    add("--scheduler", choices=SCHEDULERS, help="Convert the pipeline's scheduler: trailing, no clip_sample, 1000 "
        "original steps. Default: the pipeline's own.")  # fmt: skip
    add("--timestep_spacing", choices=["trailing", "leading", "linspace"], help="Override the scheduler's spacing.")
    add("--original_inference_steps", type=positive_int, help="The grid of LCM and TCD that the model was distilled "
        "on: 50 for LCM-LoRA. Default of --scheduler lcm: 50 for models with a guidance embedding (LCM's own), else "
        "1000.")  # fmt: skip
    add("--num_inference_steps", type=positive_int, default=4, help="Steps of the distilled schedule.")
    add("--timesteps", type=non_negative_int, nargs="+", help="The schedule's timesteps themselves, instead of "
        "--num_inference_steps (LCM, TCD and Euler only).")  # fmt: skip
    add("--eta", type=non_negative_float, help="Stochasticity of DDIM (default 1.0), TCD (default 0.3) and of flow "
        "matching's transitions (default 1.0), whose deployment is the scheduler's own.")  # fmt: skip
    add("--guidance_scale", type=non_negative_float, help="Guidance embedding of models that take one (SDXL-LCM: "
        "default 8.0; FLUX.1-dev: 3.5; SANA-Sprint: 4.5). Others are tuned without guidance.")  # fmt: skip


def add_prompt_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--prompts", help="Text file with one prompt a line, .json or .jsonl with strings or captioned objects, or a "
        "folder of .txt files.")  # fmt: skip
    add("--dataset_name", help="Instead of --prompts: a data set of the hub, or a local folder, file or pattern of "
        "files.")  # fmt: skip
    add("--caption_column", default="text", help="Field of the JSON objects or column of the data set to read.")
    add_dataset_arguments(group, "prompts")


def add_dataset_arguments(group, samples: str):
    add = group.add_argument
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--dataset_split", default="train", help="Split of the data set.")
    add("--max_train_samples", type=positive_int, help=f"Use only the first so many {samples}.")
    add("--dataloader_num_workers", type=non_negative_int, default=0, help="Subprocesses that prepare the data set; 0: "
        "the main process.")  # fmt: skip


def add_reward_arguments(group, *, required: bool, purpose: str):
    """The flags of rewards that several programs have."""
    add = group.add_argument
    add("--reward", action="append", required=required, metavar="NAME[=WEIGHT]", help=f"{purpose} clip, pickscore, "
        "aesthetic, jpeg_compressibility, jpeg_incompressibility or your own module:function; repeatable.")  # fmt: skip
    add("--reward_model", action="append", metavar="[NAME=]MODEL", help="Hub id or local folder of a reward's model; "
        "of aesthetic HEAD or HEAD,CLIP.")  # fmt: skip
    add("--reward_batch_size", type=positive_int, default=8, help="Images that a reward scores at once.")
    add("--reward_dtype", choices=REWARD_DTYPES, help="Precision of the reward models. Default: theirs.")


def add_online_reward_arguments(group):
    add_reward_arguments(group, required=True, purpose="What samples are scored by:")
    group.add_argument("--reward_combination", choices=COMBINATIONS, default="sum", help="sum: by the weighted sum, "
        "each reward in units of its deviation among a prompt's samples. "
        "pareto: a target is at least as good in all and better in one, else the pair is a tie.")  # fmt: skip


def add_lora_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_path", help="A LoRA of one's own to go on from, with its rank, alpha and layers: a folder, a file, a "
        "hub id or `repo:file`. Default: a new one.")  # fmt: skip
    add("--rank", type=bounded(int, 1, high=8192), help=f"Rank of the LoRA matrices. Default: {DEFAULT_RANK}.")
    add("--lora_alpha", type=positive_float, help="Scale of the LoRA, as alpha / rank. Default: the rank.")
    add("--lora_target_modules", nargs="+", help="Names of the denoiser's layers that get LoRA. Default: the family's, "
        "for SDXL to_q to_k to_v to_out.0.")  # fmt: skip
    add_save_dtype_argument(add)


def add_save_dtype_argument(add: Callable):
    add("--save_dtype", choices=SAVE_DTYPES, help="Precision of the LoRA for ComfyUI and others, which is written "
        "beside the one for diffusers (that is float32). "
        f"Default: {DEFAULT_SAVE_DTYPE}.")  # fmt: skip


def add_optimizer_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("optimizer").add_argument
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


def add_run_arguments(parser: argparse.ArgumentParser, *, output_dir: str):
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=output_dir, help="Folder for the LoRA, the model card, images, checkpoints and logs.")
    add("--cache_prompts", action="store_true", help="Encode all prompts once, to disk; then the text encoders leave "
        "memory.")  # fmt: skip
    add("--seed", type=bounded(int, 0, high=2**32 - 1), default=0, help="Seed of everything that is drawn.")
    add("--checkpointing_steps", type=positive_int, help="Save a checkpoint every so many optimizer steps; online at "
        "the next epoch boundary. Default: a tenth of the run, at most 500.")  # fmt: skip
    add("--checkpointing_minutes", type=positive_float, default=30.0, help="Save one also when so many minutes have "
        "passed since the last one.")  # fmt: skip
    add("--checkpoints_total_limit", type=positive_int, default=3, help="Keep only so many of the newest checkpoints.")
    add("--resume_from_checkpoint", help="A checkpoint's path, or `latest` (a new run where there is none).")
    add("--validation_prompts", type=prompt, nargs="+", help="Prompts of the validation images. Default: the first "
        "four training prompts; of a concept its own and its class's.")  # fmt: skip
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
    add("--hub_public", action="store_true", help="Make the repository public. Default: private.")
    add("--hub_token", type=str.strip, help="Token for the hub, visible to whoever sees the command line: better set "
        "HF_TOKEN. Default: that, or the one that you are logged in with.")  # fmt: skip


def check_output_dir(output_dir: str) -> None:
    """Raises UserError unless `output_dir` is, or can be made, a folder that may be written to."""
    if not output_dir:
        raise UserError("--output_dir is empty: pass a folder")
    path = Path(output_dir).absolute()
    try:
        folder = next(folder for folder in [path, *path.parents] if folder.exists())
    except OSError as error:  # a name that is too long
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; pass another folder") from error
    if not folder.is_dir():
        raise UserError(f"--output_dir {output_dir}: {folder} is a file; pass a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: {folder} may not be written to; pass another folder")


def check_logging_dir(args: argparse.Namespace) -> None:
    """Raises UserError unless --logging_dir is inside --output_dir."""
    folder = Path(args.output_dir).resolve()
    if not Path(folder, args.logging_dir).resolve().is_relative_to(folder):
        raise UserError(f"--logging_dir {args.logging_dir} is not inside --output_dir: pass a folder's name, as logs")


def check_packages(args: argparse.Namespace) -> None:
    """Raises UserError where a flag needs a package that is not installed."""
    if args.report_to == "wandb" and getattr(args, "hub_token", None):
        raise UserError(
            "--hub_token with --report_to wandb would be recorded with the command line: set HF_TOKEN, or run `hf auth"
            " login`, and drop it"
        )
    needed = {
        "bitsandbytes": (
            f"--quantize {args.quantize}" if args.quantize else "--use_8bit_adam",
            args.quantize or args.use_8bit_adam,
        ),
        "xformers": ("--enable_xformers_memory_efficient_attention", args.enable_xformers_memory_efficient_attention),
        args.report_to: (f"--report_to {args.report_to}", args.report_to != "none"),
    }
    for package, (flag, is_asked) in needed.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs {package}: run `pip install {package}`, or drop the flag")


def refuse_flags_of_others(args: argparse.Namespace, choice: str, flags: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a flag that belongs to another value of the flag `choice` than the one in force; `flags` are
    those that each value reads, and are None unless given."""
    chosen = getattr(args, choice)
    for flag in dict.fromkeys(flag for own in flags.values() for flag in own):
        if getattr(args, flag) is not None and flag not in flags[chosen]:
            owners = " or ".join(value for value, own in flags.items() if flag in own)
            raise UserError(f"--{flag} goes with --{choice} {owners}, not {chosen}: drop it")


def fill_defaults(args: argparse.Namespace, flags: Iterable[str], defaults: Mapping[str, object]) -> None:
    """Gives those of `flags` that were not given their defaults; raises UserError where one has none."""
    for flag in flags:
        if getattr(args, flag) is None and flag not in defaults:
            raise UserError(f"--weighting {args.weighting} has no default --{flag} here: pass one")
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[flag])


def list_defaults(flag: str, named: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    """For the help: a flag's defaults, with the names of what they are for."""
    return "; ".join(f"{values[flag]:g} for {name}" for name, values in named if flag in values)


def check_idle_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that would do nothing in this run."""
    if not args.reward:
        for flag in ("reward_model", "reward_dtype"):
            if getattr(args, flag):
                raise UserError(f"--{flag} does nothing without --reward: pass that too, or drop it")
    if args.distillation_lora_scale and not args.distillation_lora:
        raise UserError("--distillation_lora_scale does nothing without --distillation_lora: pass that too, or drop it")
    for flag in ("hub_model_id", "hub_public", "hub_token"):
        if getattr(args, flag) and not args.push_to_hub:
            raise UserError(f"--{flag} does nothing without --push_to_hub: pass that too, or drop it")
    if args.validation_timesteps and args.validation_num_inference_steps:
        raise UserError("--validation_timesteps and --validation_num_inference_steps are two schedules: pass one")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps does nothing with --lr_scheduler constant: pass constant_with_warmup")
