"""Where the pairs of offline training come from: the flags of each task, the source that they name, and the references
that the model draws itself."""

import argparse
import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from pso_utils.data.pairs import (
    Stream,
    Table,
    check_images,
    load_image_folder,
    load_images,
    load_pair_folder,
    load_preference_pairs,
)
from pso_utils.data.prompt_cache import PromptCache
from pso_utils.data.references import ReferenceLatents, References
from pso_utils.errors import UserError
from pso_utils.families import Deployment, Family
from pso_utils.run import arguments


logger = logging.getLogger(__name__)

SHUFFLE_BUFFER_SIZE = 1000
KEPT_AREA = 0.75  # of an image that the crop to a square may leave without a word

TASK_FLAGS = {
    "image_columns": ["preference"],
    "label_column": ["preference"],
    "winner_column": ["preference"],
    "loser_column": ["preference"],
    "streaming": ["preference"],
    "shuffle_buffer_size": ["preference"],
    "dataset_name": ["preference", "style"],
    "dataset_config_name": ["preference", "style"],
    "dataset_split": ["preference", "style"],
    "max_train_samples": ["preference", "style"],
    "caption_column": ["preference", "style"],
    "image_column": ["style"],
    "train_data_dir": ["preference", "style"],
    "instance_data_dir": ["concept"],
    "class_prompt": ["concept"],
    "num_reference_images": ["concept"],
    "reference_policy": ["style", "concept"],
    "reference_refresh_steps": ["style", "concept"],
    "class_anchor": ["concept"],
}


def add_pair_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("pairs")
    add, positive_int = group.add_argument, arguments.positive_int
    add("--task", choices=SOURCES, required=True, help="Where the pairs come from.")
    arguments.add_dataset_arguments(group, "pairs")
    add("--dataset_name", help="preference, style: a data set of the hub, or a local folder, file or pattern of files "
        "(Parquet, arrow, JSONL, CSV, WebDataset).")  # fmt: skip
    add("--image_columns", nargs=2, default=["jpg_0", "jpg_1"], metavar="COLUMN", help="preference: the two images.")
    add("--label_column", default="label_0", help="preference: 1 where the first image won, 0 the second, 0.5 a tie.")
    add("--winner_column", help="preference: the winner's image, instead of two images and a label.")
    add("--loser_column", help="preference: the loser's image.")
    add("--train_data_dir", help="style: a folder of images with NAME.txt beside NAME.jpg, or with a metadata.jsonl "
        "(file_name and captions). preference: a folder with winner/ and loser/, files of one name a pair, captions "
        "beside the winners; or with a pairs.jsonl (winner, loser, caption).")  # fmt: skip
    add("--image_column", default="image", help="style: the image column of --dataset_name.")
    add("--caption_column", help="The caption column. Default: caption for preference, text for style.")
    add("--streaming", action="store_true", help="preference: read the data set while training, without keeping it.")
    add("--shuffle_buffer_size", type=positive_int, help="Records among which a stream is shuffled. Default: "
        f"{SHUFFLE_BUFFER_SIZE}.")  # fmt: skip
    add("--instance_data_dir", help="concept: a folder of images of one thing, with or without captions beside them.")
    add("--instance_prompt", type=arguments.prompt, help="The prompt of a folder's images that have no caption of "
        "their own, such as `a photo of sks dog`.")  # fmt: skip
    add(
        "--class_prompt", type=arguments.prompt, help="concept: the prompt of the references, such as `a photo of dog`."
    )
    add("--num_reference_images", type=positive_int, default=20, help="concept: how many references are drawn.")
    add("--reference_policy", choices=["initial", "current"], default="initial", help="style, concept: references are "
        "drawn with the LoRA off, or with it as trained so far.")  # fmt: skip
    add("--reference_refresh_steps", type=positive_int, help="style, concept: draw references anew every so many "
        "optimizer steps. Default: never.")  # fmt: skip
    add("--sample_batch_size", type=positive_int, default=4, help="Reference or validation images drawn at once.")
    add("--center_crop", action="store_true", help="Crop images at their centre instead of at random.")
    add("--random_flip", action="store_true", help="Mirror every other pair, both of its images.")
    add("--skip_broken_images", action="store_true", help="Count and leave out pairs with a broken image.")
    add("--cache_latents", action="store_true", help="Encode images once, to disk; the VAE leaves the accelerator. "
        "Takes --center_crop.")  # fmt: skip


def check_task_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuses the flags of another task, and fills in what depends on the task."""
    for flag, tasks in TASK_FLAGS.items():
        if getattr(args, flag) != parser.get_default(flag) and args.task not in tasks:
            parser.error(f"--{flag} goes with --task {' or '.join(tasks)}, not {args.task}: drop it")
    if args.caption_column is None:
        args.caption_column = "caption" if args.task == "preference" else "text"


def open_source(args: argparse.Namespace) -> Table | Stream:
    """The source that the flags name, checked as far as can be without decoding an image.

    Raises:
        UserError: flags that do not go together, or a source that cannot be read.
    """
    if args.task == "concept" and args.instance_prompt is not None and args.instance_prompt == args.class_prompt:
        raise UserError(
            "--instance_prompt and --class_prompt are the same: pass the class without the thing's own word"
        )
    if args.reference_policy == "current" and args.reference_refresh_steps is None:
        raise UserError(
            "--reference_policy current draws with the LoRA as trained so far, and before training there is none: pass"
            " --reference_refresh_steps, too"
        )
    if args.cache_latents and not args.center_crop:
        raise UserError("--cache_latents encodes an image once, and a random crop is new each time: add --center_crop")
    if args.cache_prompts and args.streaming:
        raise UserError(
            "--cache_prompts takes prompts that are known from the start, not --streaming: drop one of them"
        )
    if args.cache_latents and args.streaming:
        raise UserError("--cache_latents keeps on disk what --streaming is to spare it: drop one of them")
    if args.shuffle_buffer_size is not None and not args.streaming:
        raise UserError(
            "--shuffle_buffer_size does nothing without --streaming: a table is shuffled as a whole; drop it"
        )
    if args.streaming and args.max_train_steps is None:
        raise UserError("--streaming does not tell how many pairs there are: pass --max_train_steps")
    if args.instance_prompt is not None and args.dataset_name is not None:
        raise UserError("--instance_prompt is for a folder's images without a caption, not --dataset_name: drop it")
    source = SOURCES[args.task](args)
    if args.dataset_name is None:
        sizes = check_images(source, skip_broken_images=args.skip_broken_images)
        num_cropped = sum(min(size) < KEPT_AREA * max(size) for size in sizes)
        if num_cropped:
            logger.warning(
                f"{num_cropped} of {len(sizes)} images lose more than {1 - KEPT_AREA:.0%} of their area to the crop to"
                " a square: crop them yourself where that cuts off what counts"
            )
    return source


def dataset_settings(args: argparse.Namespace) -> dict:
    return {
        "config_name": args.dataset_config_name,
        "split": args.dataset_split,
        "streaming": args.streaming,
        "cache_dir": args.cache_dir,
        "num_workers": args.dataloader_num_workers,
    }


def preference_source(args: argparse.Namespace) -> Table | Stream:
    check_one_source(args)
    if args.train_data_dir is not None:
        for flag in ("winner_column", "loser_column", "streaming"):
            if getattr(args, flag):
                raise UserError(f"--{flag} is for --dataset_name, and does nothing with --train_data_dir: drop it")
        limit = {"max_train_samples": args.max_train_samples}
        return load_pair_folder(args.train_data_dir, flag="--train_data_dir", caption=args.instance_prompt, **limit)
    return load_preference_pairs(
        args.dataset_name,
        caption_column=args.caption_column,
        winner_column=args.winner_column,
        loser_column=args.loser_column,
        image_columns=args.image_columns,
        label_column=args.label_column,
        max_train_samples=args.max_train_samples,
        shuffle_buffer_size=args.shuffle_buffer_size or SHUFFLE_BUFFER_SIZE,
        **dataset_settings(args),
    )


def style_source(args: argparse.Namespace) -> Table:
    check_one_source(args)
    settings = {"caption_column": args.caption_column, "max_train_samples": args.max_train_samples}
    if args.train_data_dir is None:
        return load_images(args.dataset_name, image_column=args.image_column, **settings, **dataset_settings(args))
    settings |= {"cache_dir": args.cache_dir, "num_workers": args.dataloader_num_workers}
    return load_image_folder(args.train_data_dir, flag="--train_data_dir", caption=args.instance_prompt, **settings)


def check_one_source(args: argparse.Namespace):
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise UserError(
            f"--task {args.task}: pass either --dataset_name NAME or --train_data_dir FOLDER, to say where the images"
            " are"
        )


def concept_source(args: argparse.Namespace) -> Table:
    for flag in ("instance_data_dir", "instance_prompt", "class_prompt"):
        if getattr(args, flag) is None:
            raise UserError(f"--task concept needs --{flag}")
    return load_image_folder(
        args.instance_data_dir, flag="--instance_data_dir", caption=args.instance_prompt, is_flat=True
    )


SOURCES = {"preference": preference_source, "style": style_source, "concept": concept_source}


def draw_references(
    args: argparse.Namespace,
    accelerator: Accelerator,
    family: Family,
    source: Table | Stream,
    *,
    embed: PromptCache,
    deployment: Deployment,
) -> ReferenceLatents:
    """The images that the model draws for targets that come alone: one of each caption (style), or
    --num_reference_images of the class (concept)."""
    captions = source.captions() if args.task == "style" else [args.class_prompt] * args.num_reference_images

    @torch.no_grad()
    def draw(captions, seeds):
        conditioning = family.collate(embed(captions), deployment.height, deployment.width)
        settings = {"deployment": deployment, "batch_size": args.sample_batch_size}
        if args.reference_policy == "current":
            return family.decode_latents(family.draw_latents(conditioning, seeds, **settings))
        with family.without_lora():
            return family.decode_latents(family.draw_latents(conditioning, seeds, **settings))

    settings = {"model": family.origin, "reference_policy": args.reference_policy, **deployment._asdict()}
    images = References(
        accelerator,
        Path(args.output_dir, "references"),
        captions,
        draw,
        settings=settings,
        seed=args.seed,
        batch_size=args.sample_batch_size,
    )
    return ReferenceLatents(
        images,
        family,
        record_ids=source.ids() if args.task == "style" else None,
        is_cached=args.cache_latents,
        random_flip=args.random_flip,
    )
