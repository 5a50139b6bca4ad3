"""The evaluation's flags, and the plan that is made of them before a model is loaded."""

import argparse
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pso_utils.data.images import decode_image
from pso_utils.data.pairs import Table, load_images
from pso_utils.data.prompts import load_prompts
from pso_utils.data.readers import images_of_folder
from pso_utils.errors import UserError
from pso_utils.evaluate.loras import Model, check_lora, find_lora
from pso_utils.families import Deployment
from pso_utils.families.loading import ModelInfo, empty_parts
from pso_utils.rewards import RewardSpec, parse_rewards
from pso_utils.run import arguments
from pso_utils.run.models import MODEL_FLAGS, MODEL_SOURCES, check_model, make_deployment, model_source
from pso_utils.sources import check_exists


# A subject's measures: those of DreamBooth.
SUBJECT_FLAGS = {"CLIP-I": "--subject_clip_model", "DINO": "--subject_vision_model"}


# ---- Flags ----


def parse_args(argv=None) -> argparse.Namespace:
    # "resolve", for the one flag that means more here than in training
    parser = arguments.ArgumentParser(description="Compares LoRAs with their base.", conflict_handler="resolve")
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    positive_int, group = arguments.positive_int, parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--num_inference_steps", type=positive_int, nargs="+", default=[4], help="Steps, one number or several.")
    add("--lora", action="append", default=[], metavar="NAME=PATH", help="A LoRA to compare with the base: a folder, "
        "file, hub id or `repo:file`; may be repeated.")  # fmt: skip
    add("--lora_scale", type=float, default=1.0, help="How strongly the LoRAs are applied.")
    add("--prompts", help="Text file with one prompt a line, .json or .jsonl with strings or captioned objects, or a "
        "folder of .txt files.")  # fmt: skip
    add("--dataset_name", help="Instead of --prompts: a data set of the hub, or a local folder, file or pattern of "
        "files.")  # fmt: skip
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--dataset_split", default="train", help="Split of the data set.")
    add("--caption_column", default="text", help="Field of the JSON objects or column of the data set to read.")
    add("--image_column", help="The data set's images: measure the samples' fidelity to those of their prompt.")
    add("--max_prompts", type=positive_int, help="Use only the first so many prompts.")
    add("--images_per_prompt", type=positive_int, default=1, help="Images of each prompt, each from its own noise.")
    add("--seed", type=arguments.non_negative_int, default=0, help="Seed of the noise, and of nothing else.")
    add("--batch_size", type=positive_int, default=4, help="Images drawn at once on each process.")
    arguments.add_reward_arguments(group, required=False, purpose="Scores the images (NAME=-1: lower is better):")
    add("--reference_images", metavar="FOLDER", help="Pictures of a subject: measure the samples' similarity to them.")
    add("--subject_clip_model", default="openai/clip-vit-large-patch14", help="CLIP model of --reference_images.")
    add("--subject_vision_model", help="Another vision model of transformers for them, such as facebook/dino-vits16.")
    add("--num_report_prompts", type=positive_int, default=48, help="Prompts whose pictures report.html has.")
    add("--output_dir", default="evaluation", help="Folder for the results.")
    # what the functions shared with training read beside these
    parser.set_defaults(report_to="none", logging_dir="logs", use_8bit_adam=False)
    return parser.parse_args(argv)


# ---- The plan ----


class Setting(NamedTuple):
    label: str  # the number of steps, or the timesteps joined by "-"
    num_steps: int
    deployment: Deployment


class Sample(NamedTuple):
    prompt_index: int
    image_index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """What the flags ask for, checked."""

    info: ModelInfo
    models: list[Model]  # the base first
    settings: list[Setting]
    samples: list[Sample]  # of each model and setting: the images of a prompt, as many of each, side by side
    rewards: list[RewardSpec]  # those of --reward, and of `SUBJECT_FLAGS` those that compare samples to `references`
    references: list[Image.Image]  # a subject's pictures
    data: Table | None  # the prompts' own images, to which samples are compared; None: they are not
    output_dir: Path

    @property
    def rows(self) -> list[tuple[Model, Setting]]:
        """Those of the results."""
        return [(model, setting) for model in self.models for setting in self.settings]

    @property
    def images_per_prompt(self) -> int:
        return 1 + self.samples[-1].image_index

    @property
    def prompts(self) -> list[str]:
        """Of the samples. Where one is repeated in the list of prompts, its samples count as one prompt's."""
        return [sample.prompt for sample in self.samples]


def make_plan(args: argparse.Namespace) -> Plan:
    """Checks all that the flags and the files can tell, before a model is loaded; a UserError says what is wrong."""
    arguments.check_output_dir(args.output_dir)
    arguments.check_packages(args)
    models = find_models(args.lora, args.lora_scale)
    rewards = parse_rewards(args.reward, args.reward_model) if args.reward else []
    if args.lora_scale != 1.0 and not args.lora:
        raise UserError("--lora_scale does nothing without --lora: pass that too, or drop it")
    if args.gradient_checkpointing:
        raise UserError("--gradient_checkpointing is for training, and the evaluation does none: drop it")
    if args.reward_model and not rewards:
        raise UserError("--reward_model without --reward: pass --reward, too, or drop it")
    prompts, data = read_prompts(args)
    references, subject_models = find_subject(args)
    info = check_model(args)
    settings = make_settings(args, info)
    if args.lora:
        parts = empty_parts(model_source(args), info)
        for text, model in zip(args.lora, models[1:]):
            check_lora(text, model.lora, family=info.family, parts=parts, cache_dir=args.cache_dir)
    samples = [
        Sample(index, image, prompt, noise_seed(args.seed, index, image))
        for index, prompt in enumerate(prompts)
        for image in range(args.images_per_prompt)
    ]
    return Plan(info, models, settings, samples, rewards + subject_models, references, data, Path(args.output_dir))


def find_models(loras: list[str], scale: float) -> list[Model]:
    models = [Model("base"), *(find_lora(text, scale=scale) for text in loras)]
    # as folders, names that differ only in capitals are the same on some systems
    repeated = [name for name, count in Counter(model.name.casefold() for model in models).items() if count > 1]
    if repeated:
        raise UserError(f"--lora: the name {repeated[0]} is taken (capitals don't count): pass another NAME=PATH")
    if not math.isfinite(scale):
        raise UserError(f"--lora_scale {scale} is no finite number: pass, for instance, 0.5")
    return models


def find_subject(args: argparse.Namespace) -> tuple[list[Image.Image], list[RewardSpec]]:
    """A subject's pictures, and the models that compare samples to them."""
    if not args.reference_images:
        if args.subject_vision_model:
            raise UserError("--subject_vision_model needs --reference_images: pass a folder of the subject's pictures")
        return [], []
    folder = Path(args.reference_images).expanduser()
    references = [decode_image(file) for file in images_of_folder(folder, f"--reference_images {folder}")]
    models = {"CLIP-I": args.subject_clip_model, "DINO": args.subject_vision_model}
    specs = [RewardSpec(name, 1.0, model) for name, model in models.items() if model]
    for name, _, model in specs:
        check_exists(model, SUBJECT_FLAGS[name])
        if Path(model).expanduser().exists() and not Path(model, "config.json").expanduser().is_file():
            message = f"{model} has no config.json; pass a model's folder, with its image processor in it"
            raise UserError(f"{SUBJECT_FLAGS[name]}: {message}")
    return references, specs


def read_prompts(args: argparse.Namespace) -> tuple[list[str], Table | None]:
    source = {"dataset_name": args.dataset_name, "caption_column": args.caption_column, "cache_dir": args.cache_dir}
    source |= {"config_name": args.dataset_config_name, "split": args.dataset_split}
    if args.image_column is None:
        return load_prompts(args.prompts, max_train_samples=args.max_prompts, **source), None
    if args.dataset_name is None or args.prompts is not None:
        raise UserError("--image_column needs its prompts from --dataset_name alone: pass the data set, or drop it")
    data = load_images(image_column=args.image_column, **source)
    return data.captions()[: args.max_prompts], data


def make_settings(args: argparse.Namespace, info: ModelInfo) -> list[Setting]:
    settings = []
    for steps in [None] if args.timesteps else sorted(set(args.num_inference_steps)):
        label = str(steps) if steps else "-".join(map(str, args.timesteps))
        deployment = make_deployment(args, info, steps, args.timesteps, eta=args.eta)
        settings.append(Setting(label, steps or len(args.timesteps), deployment))
    return settings


def noise_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The seed of an image's generator: the same for every model and number of steps."""
    digest = hashlib.sha256(f"{seed},{prompt_index},{image_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch's seeds are signed


# ---- What is kept of the flags ----


def header(args: argparse.Namespace) -> dict:
    """What results.json begins with: the report's title, lines that say what was compared and how, and the flags."""
    base, loras = Path(args.pretrained_model_name_or_path).name, [text.partition("=")[0] for text in args.lora]
    title = f"{base} and its LoRAs {', '.join(loras)}" if len(loras) > 1 else " with ".join([base, *loras])
    flags, lines = vars(args), [f"base: {args.pretrained_model_name_or_path}"]
    lines += [f"{name}: {flags[name]}" for name in [*MODEL_SOURCES[1:], *MODEL_FLAGS, "eta", "mixed_precision"]
              if flags[name] not in (None, False)]  # fmt: skip
    lines += [f"{args.resolution} px", f"prompts: {args.prompts or args.dataset_name}", f"seed {args.seed}"]
    lines += [f"LoRA scale {args.lora_scale:g}"] if loras and args.lora_scale != 1 else []
    return {"title": title, "settings": lines, "flags": flags}
