#!/usr/bin/env python
"""Compares LoRAs with their base: the same prompts and noise under every model, scored by any rewards.

Writes results.json, results.md, scores.parquet (a line for each image), grids, and report.html to look at. Images that
are there already are not drawn again unless a setting has changed.
"""

import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import free_memory
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pso_utils import arguments, fidelity, report, score_statistics, sdxl, training
from pso_utils.images import decode_image, pixels_of, transform_pair
from pso_utils.mdp import make_schedule
from pso_utils.pairs import Table, load_images
from pso_utils.prompts import load_prompts
from pso_utils.rewards import CLIPImages, RewardError, Rewards, RewardSpec, load_rewards, parse_rewards
from pso_utils.validation import deployment_pipeline, draw_latents, pipeline_settings


logger = get_logger(__name__)

BASE = "base"
ADAPTER = "evaluated"
REWARD_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRID_PROMPTS = 8
CARD_IMAGES = 4


# ---- Flags ----


def parse_args(argv=None):
    # "resolve", for the one flag that means more here than in training
    parser = arguments.ArgumentParser(description=__doc__.splitlines()[0], conflict_handler="resolve")
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    positive_int = arguments.positive_int
    add = parser.add_argument_group("evaluation").add_argument
    add("--num_inference_steps", type=positive_int, nargs="+", default=[4], help="Steps, one number or several.")
    add("--lora", action="append", default=[], metavar="NAME=PATH", help="A LoRA to compare with the base: a folder, "
        "file, hub id or `repo:file`; may be repeated.")  # fmt: skip
    add("--lora_scale", type=float, default=1.0, help="How strongly the LoRAs are applied.")
    add("--prompts", help="Text file with one prompt a line, or .json or .jsonl with strings or captioned objects.")
    add("--dataset_name", help="Instead of --prompts: a dataset of the hub or a local folder.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset.")
    add("--caption_column", default="text", help="Field of the JSON objects or column of the dataset to read.")
    add("--image_column", help="The dataset's images: measure the samples' fidelity to those of their prompt.")
    add("--max_prompts", type=positive_int, help="Use only the first so many prompts.")
    add("--images_per_prompt", type=positive_int, default=1, help="Images of each prompt, each from its own noise.")
    add("--seed", type=arguments.non_negative_int, default=0, help="Seed of the noise, and of nothing else.")
    add("--batch_size", type=positive_int, default=4, help="Images drawn at once on each process.")
    add("--reward", action="append", default=[], metavar="NAME", help="clip, pickscore, aesthetic, "
        "jpeg_compressibility, jpeg_incompressibility, imscore:NAME or your own module:function; may be repeated. "
        "NAME=-1 says that lower is better.")  # fmt: skip
    add("--reward_model", action="append", metavar="[NAME=]MODEL", help="Hub id or local folder of a reward's model; "
        "of aesthetic HEAD or HEAD,CLIP.")  # fmt: skip
    add("--reward_batch_size", type=positive_int, default=8, help="Images that a reward scores at once.")
    add("--reward_dtype", choices=REWARD_DTYPES, help="Precision of the reward models. Default: theirs.")
    add("--reference_images", metavar="FOLDER", help="Pictures of a subject: measure the samples' similarity to them.")
    add("--subject_clip_model", default="openai/clip-vit-large-patch14", help="CLIP model of --reference_images.")
    add("--subject_vision_model", help="Another vision model of transformers for them, such as facebook/dino-vits16.")
    add("--num_report_prompts", type=positive_int, default=48, help="Prompts whose pictures report.html has.")
    add("--output_dir", default="evaluation", help="Folder for the results.")
    # what the functions shared with training read beside these
    parser.set_defaults(report_to="none", logging_dir="logs", use_8bit_adam=False)
    return parser.parse_args(argv)


class Model(NamedTuple):
    """The base, or a LoRA on it, as (folder or hub id, file name or None)."""

    name: str
    lora: tuple[str, str | None] | None = None


class Setting(NamedTuple):
    label: str  # the number of steps, or the timesteps joined by "-"
    num_steps: int
    arguments: dict  # num_inference_steps, timesteps and eta, as the pipeline takes them


class Sample(NamedTuple):
    prompt_index: int
    image_index: int
    prompt: str
    seed: int


@dataclass
class Plan:
    """What the flags ask for, checked."""

    models: list[Model]
    settings: list[Setting]
    samples: list[Sample]
    rewards: list[RewardSpec]
    data: Table | None  # the prompts' own images
    references: list[Image.Image]

    @property
    def rows(self) -> list[tuple[Model, Setting]]:
        return [(model, setting) for model in self.models for setting in self.settings]


def check_arguments(args) -> Plan:
    """Checks all that the flags and the files can tell, before a model is loaded."""
    arguments.check_shared_arguments(args)
    models = [Model(BASE), *(find_lora(text) for text in args.lora)]
    # as folders, names that differ only in capitals are the same on some systems
    repeated = [name for name, count in Counter(model.name.casefold() for model in models).items() if count > 1]
    if repeated:
        raise ValueError(f"--lora: the name {repeated[0]} is taken (capitals don't count): pass another NAME=PATH")
    if not math.isfinite(args.lora_scale):
        raise ValueError(f"--lora_scale {args.lora_scale} is no finite number: pass, for instance, 0.5")
    rewards = parse_rewards(args.reward, args.reward_model) if args.reward else []
    if args.reward_model and not rewards:
        raise ValueError("--reward_model without --reward: pass --reward, too, or drop it")
    prompts, data = read_prompts(args)
    references = fidelity.load_reference_images(args.reference_images) if args.reference_images else []
    if args.subject_vision_model and not references:
        raise ValueError("--subject_vision_model needs --reference_images: pass a folder with the subject's pictures")
    if references:
        check_vision_model("--subject_clip_model", args.subject_clip_model)
        if args.subject_vision_model:
            check_vision_model("--subject_vision_model", args.subject_vision_model)
    training.check_model_files(args)
    scheduler = training.load_scheduler(args)
    settings = []
    for steps in [None] if args.timesteps else sorted(set(args.num_inference_steps)):
        schedule = make_schedule(scheduler, steps, args.timesteps, args.eta, stochastic=False)
        label = str(steps) if steps else "-".join(map(str, args.timesteps))
        values = {"num_inference_steps": steps, "timesteps": args.timesteps, "eta": schedule.eta}
        settings.append(Setting(label, schedule.num_steps, values))
    if args.lora:
        empty_models = read_empty_models(args)
        for text, model in zip(args.lora, models[1:]):
            check_lora(text, model, empty_models, args.cache_dir)
    samples = [
        Sample(index, image, prompt, noise_seed(args.seed, index, image))
        for index, prompt in enumerate(prompts)
        for image in range(args.images_per_prompt)
    ]
    return Plan(models, settings, samples, rewards, data, references)


def check_vision_model(flag: str, model: str):
    sdxl.check_exists(model, flag)
    folder = Path(model).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{flag}: {model} has no config.json; pass a model's folder, with its image processor in it")


def read_prompts(args) -> tuple[list[str], Table | None]:
    if args.image_column is None:
        source = (args.prompts, args.dataset_name, args.dataset_config_name, args.dataset_split, args.caption_column)
        return load_prompts(*source, args.max_prompts, args.cache_dir), None
    if args.dataset_name is None or args.prompts is not None:
        raise ValueError("--image_column needs its prompts from --dataset_name alone: pass the data set, or drop it")
    data = load_images(
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        dataset_split=args.dataset_split,
        image_column=args.image_column,
        caption_column=args.caption_column,
        cache_dir=args.cache_dir,
    )
    return data.captions()[: args.max_prompts], data


def noise_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The seed of an image's generator: the same for every model and number of steps."""
    digest = hashlib.sha256(f"{seed},{prompt_index},{image_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch's seeds are signed


# ---- LoRAs ----


def find_lora(text: str) -> Model:
    """Reads `NAME=PATH`; in a folder, takes the file that the training scripts write, or else its only one."""
    name, _, source = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name) or not source:
        raise ValueError(f"--lora {text}: pass NAME=PATH, with a NAME of letters, digits, '.', '+' and '-'")
    location, filename = sdxl.split_source(source)
    sdxl.check_exists(location, f"--lora {name}")
    if filename is None and Path(location).is_dir():
        files = sorted(path.name for path in Path(location).iterdir() if path.suffix in sdxl.WEIGHT_SUFFIXES)
        if not files:
            raise ValueError(f"--lora {name}: {location} has no .safetensors or .bin file: pass a LoRA's folder")
        if len(files) > 1 and LORA_WEIGHT_NAME_SAFE not in files:
            raise ValueError(
                f"--lora {name}: {location} has several LoRA files: pass one of them, {name}={Path(location, files[0])}"
                f" for instance (there are {', '.join(files)})"
            )
        filename = LORA_WEIGHT_NAME_SAFE if LORA_WEIGHT_NAME_SAFE in files else files[0]
    return Model(name, (location, filename))


def read_empty_models(args) -> dict[str, torch.nn.Module]:
    """The UNet and the text encoders, by the prefixes that their LoRAs have, from their configurations alone: without
    weights and memory."""
    base, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    location, filename = sdxl.split_source(args.distilled_unet) if args.distilled_unet else (base, "")
    if args.distilled_unet and filename is None:
        unet_config = UNet2DConditionModel.load_config(location, cache_dir=args.cache_dir)
    else:
        unet_config = UNet2DConditionModel.load_config(base, subfolder="unet", **source)
    models = {"unet": sdxl.empty_unet(unet_config)}
    for part, encoder in {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}.items():
        config = CLIPTextConfig.from_pretrained(base, subfolder=part, **source)
        with torch.device("meta"):
            models[part] = encoder(config)
    return models


def lora_matrices(part: str, model: torch.nn.Module, state_dict: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> its matrices, `A` and `B`, of a part of the pipeline, whatever the names' spelling; as diffusers reads
    them."""
    own = {key.removeprefix(f"{part}."): value for key, value in state_dict.items() if key.startswith(f"{part}.")}
    if part == "unet":
        own = convert_unet_state_dict_to_peft(own)
    elif own:
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        if not hasattr(model, "text_model"):  # transformers 5 has one level less
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, value in own.items():
        if match := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key):
            matrices.setdefault(match[1], {})[match[2]] = value
    return matrices


def check_lora(text: str, model: Model, empty_models: dict[str, torch.nn.Module], cache_dir: str | None):
    """Holds a LoRA's names and shapes against the base's: diffusers itself only warns of layers that it does not know.

    Raises:
        ValueError: it cannot be read, was made for another architecture, or is damaged.
    """
    location, filename = model.lora
    try:
        state_dict, _ = StableDiffusionXLPipeline.lora_state_dict(
            location, weight_name=filename, unet_config=empty_models["unet"].config, cache_dir=cache_dir
        )
        parts = {part: lora_matrices(part, empty, state_dict) for part, empty in empty_models.items()}
    except Exception as error:  # of the hub, the network, the file's format: each library has its own
        raise ValueError(
            f"--lora {text} is no LoRA that can be read ({' '.join(str(error).split())[:300]}); pass NAME=PATH with a "
            "folder, a file, a hub id or repo:file"
        ) from error
    if not any(parts.values()):
        first = f"its first name is {min(state_dict)}" if state_dict else "it is empty"
        raise ValueError(
            f"--lora {text} has no weights for an SDXL pipeline ({first}): pass a LoRA of this architecture, written "
            "by save_lora_weights or with Kohya's names"
        )
    for part, layers in parts.items():
        modules = dict(empty_models[part].named_modules())
        for name, matrices in layers.items():
            shapes = {side: tuple(matrix.shape) for side, matrix in matrices.items()}
            weight = getattr(modules.get(name), "weight", None)
            if weight is None:
                raise ValueError(
                    f"--lora {text} is of another architecture: the base's {part} has no layer {name}; pass the base "
                    "model that it was trained on"
                )
            if shapes.keys() != {"A", "B"} or shapes["A"][0] != shapes["B"][1]:
                raise ValueError(f"--lora {text} is damaged: layer {name} of its {part} has no pair of matrices")
            if (shapes["B"][0], shapes["A"][1]) != tuple(weight.shape[:2]):
                raise ValueError(
                    f"--lora {text} is of another architecture: its matrices {shapes['B']} and {shapes['A']} don't "
                    f"make the weight {tuple(weight.shape)} of {name} in the base's {part}; pass the base model that "
                    "it was trained on"
                )
            if not all(matrix.isfinite().all() for matrix in matrices.values()):
                raise ValueError(f"--lora {text} has weights that are not finite, in {name}: its training diverged")


def load_lora(pipeline, model: Model, scale: float, cache_dir: str | None):
    location, filename = model.lora
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of every LoRA that leaves the text encoders as they are
    try:
        pipeline.load_lora_weights(location, weight_name=filename, adapter_name=ADAPTER, cache_dir=cache_dir)
    finally:
        diffusers_logging.set_verbosity(verbosity)
    pipeline.set_adapters(ADAPTER, scale)


# ---- Drawing ----


def source_state(source: str | None):
    """What changes when a model's files do: their names, sizes and times; of a hub's model its name."""
    if source is None:
        return None
    path = Path(*filter(None, sdxl.split_source(source)))
    if not path.exists():
        return source
    suffixes = (".json", *sdxl.WEIGHT_SUFFIXES)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class Images:
    """The images on disk, one PNG each, with a key: a hash of all that it depends on."""

    def __init__(self, args):
        self.folder = Path(args.output_dir, "images")
        sources = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "distilled_unet"]
        flags = ["revision", "variant", "scheduler", "timestep_spacing", "guidance_scale", "resolution", "allow_tf32"]
        flags += ["enable_vae_tiling", "enable_xformers_memory_efficient_attention"]
        self.shared = {name: source_state(getattr(args, name)) for name in [*sources, "distillation_lora"]}
        self.shared |= {name: getattr(args, name) for name in flags}
        self.shared["mixed_precision"] = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.lora_scale = args.lora_scale

    def path(self, model: Model, setting: Setting, sample: Sample) -> Path:
        name = f"{sample.prompt_index:05d}-{sample.image_index:02d}.png"
        return self.folder / model.name / f"steps-{setting.label}" / name

    def model_key(self, model: Model) -> list:
        if model.lora is None:
            return [self.shared]
        location, filename = model.lora
        # a folder or file, or of the hub `repo:file`
        source = str(Path(location, filename or "")) if Path(location).exists() else ":".join(filter(None, model.lora))
        return [self.shared, source_state(source), self.lora_scale]

    def key(self, model_key: list, setting: Setting, sample: Sample) -> str:
        text = json.dumps([model_key, setting.arguments, sample.prompt, sample.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def is_drawn(self, path: Path, key: str) -> bool:
        try:
            with Image.open(path) as image:
                own_key = image.info.get("key")
                image.verify()  # its check sums, to the end
        except (OSError, SyntaxError):  # the latter of verify
            return False
        return own_key == key

    def write(self, images: Sequence[Image.Image], entries: Sequence[tuple[Sample, Path, str]], seconds: float):
        """Writes the PNGs of a batch: whole or not at all, and all at once, for a run that is killed. A batch of which
        some are there would go on with fewer images, whose bits may be others."""
        for image, (sample, path, key) in zip(images, entries):
            info = PngInfo()
            info.add_text("key", key)
            info.add_itxt("prompt", sample.prompt)
            info.add_text("seconds", str(seconds))
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path.with_suffix(".partial"), format="PNG", pnginfo=info)
        for _, path, _ in entries:
            os.replace(path.with_suffix(".partial"), path)

    def read(self, model: Model, setting: Setting, samples: Sequence[Sample]) -> list[Image.Image]:
        images = []
        for sample in samples:
            with Image.open(self.path(model, setting, sample)) as image:
                images.append(image.convert("RGB"))
        return images

    def seconds(self, model: Model, setting: Setting, samples: Sequence[Sample]) -> float:
        """The median, over which the first batch's warming up does not show."""
        values = []
        for sample in samples:
            with Image.open(self.path(model, setting, sample)) as image:
                values.append(float(image.info["seconds"]))
        return float(np.median(values))


def batches_of(items: Sequence, size: int, accelerator: Accelerator) -> Iterator[Sequence]:
    """This process's batches. They are the same batches whatever the number of processes, and so are their images'
    bits."""
    for start in range(accelerator.process_index * size, len(items), accelerator.num_processes * size):
        yield items[start : start + size]


def pending_batches(args, accelerator: Accelerator, plan: Plan, images: Images, model: Model) -> list[tuple]:
    """This process's batches of a model that are not all drawn, as (setting, [(sample, path, key), ...])."""
    pending, model_key = [], images.model_key(model)
    for setting in plan.settings:
        for batch in batches_of(plan.samples, args.batch_size, accelerator):
            entries = [(s, images.path(model, setting, s), images.key(model_key, setting, s)) for s in batch]
            missing = [entry for entry in entries if not images.is_drawn(*entry[1:])]
            if missing:
                pending.append((setting, missing))
    return pending


@torch.no_grad()
def draw_images(args, accelerator: Accelerator, pipeline, plan: Plan, images: Images, pending: dict[str, list]):
    functions = training.make_functions(args, accelerator, pipeline)
    total = sum(len(entries) for batches in pending.values() for _, entries in batches)
    bar = tqdm(total=total, desc="drawing", unit="image", disable=not accelerator.is_local_main_process)
    for model in plan.models:
        if not pending[model.name]:
            continue
        bar.set_postfix(model=model.name)
        if model.lora is not None:
            load_lora(pipeline, model, args.lora_scale, args.cache_dir)
        embed = functions.embed
        if any(getattr(encoder, "peft_config", None) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)):
            embed = training.make_functions(args, accelerator, pipeline).embed  # the LoRA changes the embeddings, too
        drawer = deployment_pipeline(pipeline)
        for setting, entries in pending[model.name]:
            samples = [sample for sample, _, _ in entries]
            embeds = embed([sample.prompt for sample in samples])
            values = setting.arguments | {"guidance_scale": functions.guidance_scale}
            start = time.perf_counter()
            latents = draw_latents(
                drawer,
                *embeds,
                [sample.seed for sample in samples],
                len(samples),
                **pipeline_settings(values, args.resolution),
            )
            drawn = functions.decode(latents)
            seconds = (time.perf_counter() - start) / len(samples)
            images.write(drawn, entries, seconds)
            bar.update(len(samples))
        if model.lora is not None:
            pipeline.unload_lora_weights()
    bar.close()


# ---- Scoring ----


class Measure(NamedTuple):
    name: str
    kind: str  # "reward", "subject" or "data"
    higher_is_better: bool


def score_or_nan(reward: Rewards, images: list[Image.Image], prompts: list[str], failures: list[str]) -> torch.Tensor:
    """Scores [B]; of a batch that fails, each image's own, NaN where that fails too."""
    try:
        return reward(images, prompts)[0]
    except RewardError as error:
        if len(images) == 1:
            failures.append(str(error))
            return torch.tensor([math.nan])
    scores = [score_or_nan(reward, [image], [prompt], failures) for image, prompt in zip(images, prompts)]
    return torch.cat(scores)


def score_images(args, accelerator: Accelerator, plan: Plan, images: Images, reward: Rewards) -> np.ndarray:
    """Scores [rows, images] of this process's images, 0 for the others'; NaN where the reward fails."""
    (name,) = reward.names
    scores, failures = np.zeros((len(plan.rows), len(plan.samples))), []
    batches = list(batches_of(range(len(plan.samples)), args.reward_batch_size, accelerator))
    total = len(plan.rows) * sum(map(len, batches))
    bar = tqdm(total=total, desc=f"scoring {name}", unit="image", disable=not accelerator.is_local_main_process)
    for row, (model, setting) in enumerate(plan.rows):
        for indices in batches:
            samples = [plan.samples[index] for index in indices]
            batch = images.read(model, setting, samples), [sample.prompt for sample in samples]
            scores[row, list(indices)] = score_or_nan(reward, *batch, failures).numpy()
            bar.update(len(samples))
    bar.close()
    if failures:
        logger.warning(f"{len(failures)} images were not scored: {failures[0]}", main_process_only=False)
    return scores


def load_reward(args, plan: Plan, spec: RewardSpec | str, device) -> Rewards:
    """A reward of --reward, or by its name one of the subject's, alone on the device."""
    dtype = REWARD_DTYPES.get(args.reward_dtype)
    if isinstance(spec, RewardSpec):
        return load_rewards([spec], device, args.cache_dir, args.reward_batch_size, dtype)
    if spec == "CLIP-I":
        flag, model, embedder = "--subject_clip_model", args.subject_clip_model, CLIPImages
    else:
        flag, model, embedder = "--subject_vision_model", args.subject_vision_model, fidelity.VisionImages
    try:
        embedder = embedder(os.path.expanduser(model), cache_dir=args.cache_dir)
    except Exception as error:  # of transformers, the hub, the file's format
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{flag} {model} cannot be loaded ({message}): pass a local folder or a hub id") from error
    reward = fidelity.ReferenceSimilarity(embedder, plan.references).to(device, dtype)
    return Rewards([reward], [RewardSpec(spec, 1.0, None)], args.reward_batch_size)


def data_pixels(args, data: Table, rows: Sequence[int]) -> Iterator[torch.Tensor]:
    """The data's images [3, H, W] in [-1, 1], in the middle, at the samples' size."""
    for row in rows:
        try:
            image = decode_image(data.record(row).target, data.folder)
        except ValueError as error:
            raise ValueError(f"row {row} of {data.name}, --image_column {args.image_column}: {error}") from error
        yield transform_pair(image, None, args.resolution).target


def sum_over_processes(accelerator: Accelerator, values: np.ndarray) -> np.ndarray:
    if accelerator.num_processes == 1:  # Apple's GPUs have no float64
        return values
    return accelerator.reduce(torch.from_numpy(values).to(accelerator.device), "sum").cpu().numpy()


def groups_by_prompt(plan: Plan) -> dict[str, list[int]]:
    """Prompt -> the images drawn for it, be it repeated in the list of prompts or not."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(plan.samples):
        groups.setdefault(sample.prompt, []).append(index)
    return groups


def rows_of_captions(data: Table) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(data.captions()):
        rows.setdefault(caption, []).append(row)
    return rows


@torch.no_grad()
def measure_data_sharpness(args, accelerator: Accelerator, pipeline, plan: Plan) -> float:
    """Sharpness of the VAE's reconstructions of the data, each prompt's weighing as much as its samples do."""
    functions = training.make_functions(args, accelerator, pipeline)
    groups, rows, total = groups_by_prompt(plan), rows_of_captions(plan.data), np.zeros(1)
    for prompt in list(groups)[accelerator.process_index :: accelerator.num_processes]:
        values = []
        for pixels in data_pixels(args, plan.data, rows[prompt]):
            (image,) = functions.decode(functions.encode(pixels[None]))
            values.append(fidelity.sharpness(pixels_of(image)).item())
        total += len(groups[prompt]) * np.mean(values)
    return float(sum_over_processes(accelerator, total)[0]) / len(plan.samples)


def measure_data(args, accelerator: Accelerator, plan: Plan, images: Images, data_sharpness: float) -> np.ndarray:
    """`fidelity.DATA_MEASURES` [3, rows, images] of this process's prompts, 0 for the others'."""
    groups, caption_rows = groups_by_prompt(plan), rows_of_captions(plan.data)
    scores = np.zeros((len(fidelity.DATA_MEASURES), len(plan.rows), len(plan.samples)))
    mine = list(groups)[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(mine, desc="comparing with the data", unit="prompt", disable=not accelerator.is_local_main_process)
    for prompt in bar:
        indices = groups[prompt]
        samples = [plan.samples[index] for index in indices]
        for row, (model, setting) in enumerate(plan.rows):
            pixels = torch.stack([pixels_of(image) for image in images.read(model, setting, samples)])
            data = data_pixels(args, plan.data, caption_rows[prompt])
            scores[:, row, indices] = fidelity.data_fidelity(pixels, data, data_sharpness).numpy()
    return scores


def score_all(
    args, accelerator: Accelerator, plan: Plan, images: Images, data_sharpness: float | None
) -> tuple[list[Measure], np.ndarray]:
    """All measures and their scores [measures, rows, images], on every process.

    Raises:
        RewardError: a reward that fails on every image.
    """
    measures, scores = [], []
    subject = ["CLIP-I", *(["DINO"] if args.subject_vision_model else [])] if plan.references else []
    for spec in [*plan.rewards, *subject]:
        reward = load_reward(args, plan, spec, accelerator.device)
        values = sum_over_processes(accelerator, score_images(args, accelerator, plan, images, reward))
        if np.isnan(values).all():
            raise RewardError(f"reward '{reward.names[0]}' failed on every image; the warning above says how")
        kind = "reward" if isinstance(spec, RewardSpec) else "subject"
        measures.append(Measure(reward.names[0], kind, bool(reward.weights[0] > 0)))
        scores.append(values)
        del reward  # one reward model at a time
        free_memory()
    if plan.data is not None:
        values = sum_over_processes(accelerator, measure_data(args, accelerator, plan, images, data_sharpness))
        for (name, higher_is_better), own in zip(fidelity.DATA_MEASURES.items(), values):
            if not np.isnan(own).all():  # no diversity among single images
                measures.append(Measure(name, "data", higher_is_better))
                scores.append(own)
    return measures, np.stack(scores) if scores else np.zeros((0, len(plan.rows), len(plan.samples)))


# ---- Results ----


def without_nan(value):
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(args, plan: Plan, images: Images, measures: list[Measure], scores: np.ndarray) -> dict:
    """results.json: everything that the tables show; scores [measures, rows, images]."""
    numbers = {prompt: number for number, prompt in enumerate(groups_by_prompt(plan))}
    prompts = np.array([numbers[sample.prompt] for sample in plan.samples])
    rows = []
    for index, (model, setting) in enumerate(plan.rows):
        seconds = images.seconds(model, setting, plan.samples)
        row = {"model": model.name, "steps": setting.label, "num_steps": setting.num_steps, "scores": {}}
        row |= {"seconds_per_image": seconds, "images_per_second": 1 / seconds}
        base = plan.rows.index((plan.models[0], setting))
        for measure, values in zip(measures, scores):
            score = score_statistics.summarize(values[index], prompts)
            if model.lora is not None:
                score |= score_statistics.compare(values[index], values[base], prompts, measure.higher_is_better)
            row["scores"][measure.name] = score
        rows.append(row)
    base = Path(args.pretrained_model_name_or_path).name
    loras = [model.name for model in plan.models[1:]]
    title = f"{base} and its LoRAs {', '.join(loras)}" if len(loras) > 1 else " with ".join([base, *loras])
    facts = [f"base: {args.pretrained_model_name_or_path}"]
    shown = ("pretrained_vae_model_name_or_path", "distilled_unet", "distillation_lora", "scheduler", "eta",
             "guidance_scale", "mixed_precision")  # fmt: skip
    facts += [f"{flag}: {value}" for flag in shown if (value := getattr(args, flag)) is not None]
    facts += [f"{args.resolution} px", f"prompts: {args.prompts or args.dataset_name}", f"seed {args.seed}"]
    if loras and args.lora_scale != 1:
        facts.append(f"LoRA scale {args.lora_scale:g}")
    return without_nan(
        {
            "title": title,
            "facts": facts,
            "num_prompts": 1 + plan.samples[-1].prompt_index,
            "images_per_prompt": args.images_per_prompt,
            "measures": [measure._asdict() for measure in measures],
            "rows": rows,
            "flags": vars(args),
        }
    )


def write_parquet(path: Path, plan: Plan, images: Images, measures: list[Measure], scores: np.ndarray):
    lines = []
    for row, (model, setting) in enumerate(plan.rows):
        for index, sample in enumerate(plan.samples):
            file = images.path(model, setting, sample).relative_to(path.parent)
            line = {"model": model.name, "steps": setting.label, **sample._asdict(), "file": file.as_posix()}
            own = scores[:, row, index].tolist()
            lines.append(line | {m.name: None if math.isnan(value) else value for m, value in zip(measures, own)})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)


def card_means(
    plan: Plan, measures: list[Measure], scores: np.ndarray, num_prompts: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """steps -> model -> measure -> the mean of each prompt's images, for the first prompts; NaN if one failed."""
    per_prompt = 1 + plan.samples[-1].image_index
    means = scores.reshape(len(measures), len(plan.rows), -1, per_prompt).mean(axis=3) if measures else scores
    table: dict = {}
    for row, (model, setting) in enumerate(plan.rows):
        own = {measure.name: means[place, row, :num_prompts].tolist() for place, measure in enumerate(measures)}
        table.setdefault(setting.label, {})[model.name] = own
    return table


def write_results(args, plan: Plan, images: Images, measures: list[Measure], scores: np.ndarray):
    folder = Path(args.output_dir)
    results = summarize(args, plan, images, measures, scores)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    table = report.markdown_table(results)
    (folder / "results.md").write_text(table, encoding="utf-8")
    write_parquet(folder / "scores.parquet", plan, images, measures, scores)

    per_prompt, samples = args.images_per_prompt, plan.samples
    by_label = {setting.label: setting for setting in plan.settings}
    by_name = {model.name: model for model in plan.models}
    firsts = samples[::per_prompt]
    grids = {}
    (folder / "grids").mkdir(exist_ok=True)
    for earlier in [*(folder / "grids").glob("steps-*.png"), folder / "steps.png"]:  # of other numbers of steps
        earlier.unlink(missing_ok=True)
    for label, setting in by_label.items():
        shown = firsts[:GRID_PROMPTS]
        rows = {model.name: images.read(model, setting, shown) for model in plan.models}
        grids[label] = report.model_grid(rows, [sample.prompt for sample in shown])
        grids[label].save(folder / "grids" / f"steps-{label}.png")
    plot = report.steps_plot(results) if len(plan.settings) > 1 and measures else None
    if plot is not None:
        plot.save(folder / "steps.png")

    def pictures(label: str, name: str, prompt: int) -> list[Image.Image]:
        own = samples[prompt * per_prompt : (prompt + 1) * per_prompt][:CARD_IMAGES]
        return images.read(by_name[name], by_label[label], own)

    prompts = [sample.prompt for sample in firsts[: args.num_report_prompts]]
    means = without_nan(card_means(plan, measures, scores, len(prompts)))
    page = report.html_report(results, prompts, means, grids, plot, pictures)
    (folder / "report.html").write_text(page, encoding="utf-8")
    print(table)


# ---- The run ----


def run(args):
    plan = check_arguments(args)
    accelerator = training.make_accelerator(args)
    logger.setLevel("INFO")
    images = Images(args)
    pending = {model.name: pending_batches(args, accelerator, plan, images, model) for model in plan.models}
    data_sharpness = None
    if any(pending.values()) or plan.data is not None:
        pipeline = training.load_base(args, accelerator)
        pipeline.unet.to(accelerator.device)  # deployed as it is, without autocast
        if any(pending.values()):
            draw_images(args, accelerator, pipeline, plan, images, pending)
        if plan.data is not None:
            data_sharpness = measure_data_sharpness(args, accelerator, pipeline, plan)
        del pipeline
        free_memory()
    accelerator.wait_for_everyone()
    measures, scores = score_all(args, accelerator, plan, images, data_sharpness)
    if accelerator.is_main_process:
        write_results(args, plan, images, measures, scores)
        logger.info(f"the report is {Path(args.output_dir, 'report.html')}")
    accelerator.end_training()


def main(argv=None):
    args = parse_args(argv)
    with training.one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
