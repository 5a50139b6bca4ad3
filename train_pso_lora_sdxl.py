#!/usr/bin/env python
"""Offline Pairwise Sample Optimization (PSO) of a few-step distilled SDXL (arXiv 2410.03190).

Trains a LoRA on pairs of a target and a reference image, noised to the distilled schedule's own timesteps: the target's
denoising error falls against the reference's, relative to the model that it started from. Where a pair comes from is
the task. preference: the winner and the loser of one prompt. style: an image with a caption, and the model's own sample
of the caption. concept: an image of one thing, and the model's own sample of its class.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import free_memory
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils import arguments, training, validation
from pso_utils.checkpoints import save_checkpoint
from pso_utils.images import draw_noise, draw_reference_places, draw_timestep_places
from pso_utils.losses import denoising_error, hinge_pso_loss, offline_pso_loss
from pso_utils.mdp import (
    WEIGHTINGS,
    Schedule,
    add_noise,
    check_weighting,
    diffusion_inputs,
    forward_weight,
    num_weighted_steps,
    predict_original_sample,
    scale_model_input,
)
from pso_utils.model_card import scheduler_code
from pso_utils.pairs import (
    PairBatch,
    PairLoader,
    Stream,
    Table,
    load_images,
    load_instance_images,
    load_preference_pairs,
)
from pso_utils.references import References
from pso_utils.rewards import RewardSpec, load_rewards, parse_rewards
from pso_utils.sdxl import DEFAULT_LORA_TARGETS, crop_time_ids, latent_shape, lora_disabled, save_lora


logger = get_logger(__name__)


# ---- Flags ----

# What the flags of a task are unless given, by weighting: the first one is the task's own, the others are for who asks
# for them. demo/README.md has what was tried. A beta is right where beta times the difference of gains that a fully
# learnt pair shows is some 3 to 15: with more, the loss saturates before the samples change.
TASK_DEFAULTS = {
    "preference": {
        "mdp": {"beta": 30.0, "target_anchor": 60.0, "reference_weight": 1.0},
        "x0": {"beta": 10.0, "target_anchor": 10.0, "reference_weight": 1.0},
        "epsilon": {"beta": 200.0, "target_anchor": 200.0, "reference_weight": 1.0},
    },
    "style": {"x0": {"beta": 2.0, "target_anchor": 2.0, "reference_weight": 0.05}},
    "concept": {"x0": {"beta": 2.0, "target_anchor": 2.0, "reference_weight": 0.2, "class_anchor": 10.0}},
}
# The release's, but for its reference_weight of 0.1, with which the hinge is regression onto the target.
HINGE_DEFAULTS = {"beta": 5.0, "reference_weight": 0.5}


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    pairs = parser.add_argument_group("pairs")
    add = pairs.add_argument
    positive_int, non_negative_float = arguments.positive_int, arguments.non_negative_float
    add("--task", choices=TASK_DEFAULTS, required=True, help="Where the pairs come from.")
    arguments.add_dataset_arguments(pairs, "pairs")
    add("--dataset_name", help="preference, style: a data set of the hub, or a local folder, file or pattern of files "
        "(Parquet, arrow, JSONL, CSV, WebDataset).")  # fmt: skip
    add("--image_columns", nargs=2, default=["jpg_0", "jpg_1"], metavar="COLUMN", help="preference: the two images.")
    add("--label_column", default="label_0", help="preference: 1 where the first image won, 0 the second, 0.5 a tie.")
    add("--winner_column", help="preference: the winner's image, instead of two images and a label.")
    add("--loser_column", help="preference: the loser's image.")
    add("--train_data_dir", help="style: a folder of images with a metadata.jsonl (file_name and captions).")
    add("--image_column", default="image", help="style: the image column of --dataset_name.")
    add("--caption_column", help="The caption column. Default: caption for preference, text for style.")
    add("--streaming", action="store_true", help="preference: read the data set while training, without keeping it.")
    add("--shuffle_buffer_size", type=positive_int, default=1000, help="Records among which a stream is shuffled.")
    add("--instance_data_dir", help="concept: a folder of images of one thing.")
    add("--instance_prompt", help="concept: their prompt, such as `a photo of sks dog`.")
    add("--class_prompt", help="concept: the prompt of the references, such as `a photo of dog`.")
    add("--num_reference_images", type=positive_int, default=20, help="concept: how many references are drawn.")
    add("--reference_policy", choices=["initial", "current"], default="initial", help="style, concept: references are "
        "drawn with the LoRA off, or with it as trained so far.")  # fmt: skip
    add("--reference_refresh_steps", type=positive_int, help="style, concept: draw references anew every so many "
        "optimizer steps. Default: never.")  # fmt: skip
    add("--sample_batch_size", type=positive_int, default=4, help="Reference or validation images drawn at once.")
    add("--center_crop", action="store_true", help="Crop images at their centre instead of at random.")
    add("--random_flip", action="store_true", help="Mirror every other pair, both of its images.")
    add("--skip_broken_images", action="store_true", help="Count and leave out pairs with a broken image.")
    add("--cache_latents", action="store_true", help="Encode images and prompts once, to disk; the text encoders leave "
        "memory and the VAE the accelerator. Takes --center_crop.")  # fmt: skip
    add = parser.add_argument_group("offline PSO").add_argument
    add("--loss", choices=LOSSES, default="sigmoid", help="sigmoid: PSO with the reference model. hinge: without "
        "it, as released for concepts. diffusion: the plain diffusion loss on the targets, PSO's rival.")  # fmt: skip
    add("--weighting", choices=WEIGHTINGS, help="Of the squared error of the clean latents: epsilon (alpha/sigma)^2, "
        "x0 1, mdp the exact KL divergence of the transitions.")  # fmt: skip
    add("--beta", type=arguments.positive_float, help="Strength of the preference.")
    add("--target_anchor", type=non_negative_float, help="sigmoid: weight of relu(growth of the target's error); about "
        "beta / 2 keeps the samples on the data.")  # fmt: skip
    add("--class_anchor", type=non_negative_float, help="concept, sigmoid: weight of the squared distance that "
        "the class prompt's predictions move away from the reference model's; keeps the class as it is.")  # fmt: skip
    add("--reference_weight", type=non_negative_float, help="The reference's share. sigmoid: 1 is PSO; less repels "
        "less. hinge: kappa, by default 0.5; the release's 0.1 is, with its other values, plain regression onto the "
        "target.")  # fmt: skip
    add("--prior_loss_weight", type=non_negative_float, default=0.5, help="hinge: lambda, the weight of regression "
        "onto the references.")  # fmt: skip
    add("--log_gradient_shares", action="store_true", help="Log each timestep's share of the gradient's norm; costs a "
        "backward pass for each.")  # fmt: skip
    add("--train_batch_size", type=positive_int, default=4, help="Pairs in a UNet call, on each process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of pairs in an optimizer step.")
    add("--num_train_epochs", type=positive_int, default=1, help="Passes over the pairs, unless --max_train_steps is "
        "given.")  # fmt: skip
    add("--max_train_steps", type=positive_int, help="Optimizer steps to stop after. One optimizer step is "
        "gradient_accumulation_steps x train_batch_size pairs on each process, one timestep of each.")  # fmt: skip
    add("--reward", action="append", metavar="NAME[=WEIGHT]", help="Scores the validation images: clip, pickscore, "
        "jpeg_compressibility, jpeg_incompressibility or your own module:function; may be repeated.")  # fmt: skip
    add("--reward_model", action="append", metavar="[NAME=]MODEL", help="Hub id or local folder of a reward's model.")
    add("--reward_batch_size", type=positive_int, default=8, help="Images that a reward scores at once.")
    add("--early_stopping_patience", type=positive_int, help="Stop after so many validations without a better "
        "--reward; the result is the best LoRA, not the last.")  # fmt: skip
    arguments.add_lora_arguments(parser, DEFAULT_LORA_TARGETS)
    arguments.add_optimizer_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="pso-lora")
    args = parser.parse_args(argv)
    for flag, tasks in OWN_FLAGS.items():
        if getattr(args, flag) != parser.get_default(flag) and args.task not in tasks:
            parser.error(f"--{flag} goes with --task {' or '.join(tasks)}, not {args.task}: drop it")
    if args.caption_column is None:
        args.caption_column = "caption" if args.task == "preference" else "text"
    args.offload |= args.cache_latents  # the VAE is only used for validation and for new references
    return args


def fits_schedule(weighting: str, schedule: Schedule) -> bool:
    try:
        check_weighting(schedule, weighting)
    except ValueError:
        return False
    return True


def set_loss_defaults(args, schedule: Schedule):
    """Fills in the flags of the loss that were not given.

    Raises:
        ValueError: the weighting does not fit the schedule, or has no defaults for the task.
    """
    if args.loss == "diffusion":
        return
    by_weighting = {"epsilon": HINGE_DEFAULTS} if args.loss == "hinge" else TASK_DEFAULTS[args.task]
    if args.weighting is None:
        args.weighting = next(weighting for weighting in by_weighting if fits_schedule(weighting, schedule))
    check_weighting(schedule, args.weighting)
    defaults = by_weighting.get(args.weighting, {"beta": None, "reference_weight": 1.0})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.beta is None:
        raise ValueError(f"--weighting {args.weighting} has no default --beta for --task {args.task}: pass one")
    args.target_anchor, args.class_anchor = args.target_anchor or 0.0, args.class_anchor or 0.0


def check_arguments(args) -> tuple[Table | Stream, list[RewardSpec], Path | None]:
    """Checks all that the flags and the files can tell, before a model is loaded.

    Returns:
        the source of the targets or pairs, the rewards to load, and the checkpoint to resume from (None: a new run).
    """
    arguments.check_shared_arguments(args)
    if args.reference_policy == "current" and args.reference_refresh_steps is None:
        raise ValueError(
            "--reference_policy current draws with the LoRA as trained so far, and before training there is none: pass"
            " --reference_refresh_steps, too"
        )
    if args.cache_latents and not args.center_crop:
        raise ValueError("--cache_latents encodes an image once, and a random crop is new each time: add --center_crop")
    if args.cache_latents and args.streaming:
        raise ValueError("--cache_latents keeps on disk what --streaming is to spare it: drop one of them")
    if args.class_anchor and args.loss != "sigmoid":
        raise ValueError(f"--class_anchor goes with --loss sigmoid, not {args.loss}: drop it")
    if args.streaming and args.max_train_steps is None:
        raise ValueError("--streaming does not tell how many pairs there are: pass --max_train_steps")
    if args.early_stopping_patience and not args.reward:
        raise ValueError("--early_stopping_patience needs a --reward to tell which validation is the best")
    if args.early_stopping_patience and args.num_validation_images == 0:
        raise ValueError("--early_stopping_patience needs validation images: raise --num_validation_images")
    reward_specs = parse_rewards(args.reward, args.reward_model) if args.reward else []
    source = SOURCES[args.task](args)
    training.check_model_files(args)
    training.check_lora_flags(args)
    scheduler = training.load_scheduler(args)
    schedule = training.training_schedule(args, scheduler, stochastic=False)
    set_loss_defaults(args, schedule)
    training.deployment_settings(args, scheduler)
    return source, reward_specs, training.checkpoint_to_resume(args)


# ---- Where the pairs come from ----

OWN_FLAGS = {
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
    "train_data_dir": ["style"],
    "instance_data_dir": ["concept"],
    "instance_prompt": ["concept"],
    "class_prompt": ["concept"],
    "num_reference_images": ["concept"],
    "reference_policy": ["style", "concept"],
    "reference_refresh_steps": ["style", "concept"],
    "class_anchor": ["concept"],
}


def preference_source(args) -> Table | Stream:
    if args.dataset_name is None:
        raise ValueError("--task preference needs --dataset_name, a data set of winners and losers")
    return load_preference_pairs(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.caption_column,
        args.winner_column,
        args.loser_column,
        tuple(args.image_columns),
        args.label_column,
        args.max_train_samples,
        args.streaming,
        args.cache_dir,
        args.dataloader_num_workers,
        args.shuffle_buffer_size,
    )


def style_source(args) -> Table:
    return load_images(
        args.dataset_name,
        args.train_data_dir,
        args.dataset_config_name,
        args.dataset_split,
        args.image_column,
        args.caption_column,
        args.max_train_samples,
        cache_dir=args.cache_dir,
        num_workers=args.dataloader_num_workers,
    )


def concept_source(args) -> Table:
    for flag in ("instance_data_dir", "instance_prompt", "class_prompt"):
        if getattr(args, flag) is None:
            raise ValueError(f"--task concept needs --{flag}")
    return load_instance_images(args.instance_data_dir, args.instance_prompt)


SOURCES = {"preference": preference_source, "style": style_source, "concept": concept_source}


# ---- Update ----


class Pairs(NamedTuple):
    """b pairs at one noise level each, on the accelerator, as k rows of b: the targets, their references (k = 2) and,
    with --class_anchor, the references once more, with the class prompt (k = 3). The diffusion loss takes the targets
    alone (k = 1)."""

    latents: Tensor  # [k, b, C, H, W], clean
    noise: Tensor  # [b, C, H, W], shared by a pair
    place: Tensor  # [b], uniform in [0, 1): which timestep
    prompt_embeds: Tensor  # [k, b, S, D]
    pooled_prompt_embeds: Tensor  # [k, b, E]
    time_ids: Tensor  # [b, 6], the target's


def predict_pairs(schedule: Schedule, denoiser: training.Denoiser, pairs: Pairs, step_index: Tensor) -> Tensor:
    """Predicted clean latents [k, b, C, H, W] of the noised pairs, by one UNet call for all of them."""
    rows = len(pairs.latents)
    step_index = step_index.repeat(rows)
    sample = add_noise(schedule, pairs.latents.flatten(0, 1), pairs.noise.repeat(rows, 1, 1, 1), step_index)
    embeds, pooled = pairs.prompt_embeds.flatten(0, 1), pairs.pooled_prompt_embeds.flatten(0, 1)
    denoise = denoiser(embeds, pooled, pairs.time_ids.repeat(rows, 1))
    model_output = denoise(scale_model_input(schedule, sample, step_index), schedule.timesteps[step_index])
    return predict_original_sample(schedule, model_output, sample, step_index).unflatten(0, (rows, -1))


def weighted_errors(weight: Tensor, clean: Tensor, predicted: Tensor) -> Tensor:
    """`denoising_error` [k, b] of clean latents [k, b, C, H, W], with the weight [b] of each pair's noise level."""
    return denoising_error(clean.flatten(0, 1), predicted.flatten(0, 1), weight.repeat(len(clean))).view(len(clean), -1)


class StepLoss(NamedTuple):
    """The loss of each pair, the timestep's number that it was drawn at, and what is logged; all [b]."""

    loss: Tensor
    step_index: Tensor
    metrics: dict[str, Tensor]


def sigmoid_loss(args, unet, schedule: Schedule, denoiser, pairs: Pairs) -> StepLoss:
    """PSO: one UNet call without gradient and LoRA, one with both."""
    step_index = (pairs.place * num_weighted_steps(schedule, args.weighting)).long()
    errors = partial(weighted_errors, forward_weight(schedule, step_index, args.weighting))
    with torch.no_grad(), lora_disabled(unet):
        reference_model = predict_pairs(schedule, denoiser, pairs, step_index)
    predicted = predict_pairs(schedule, denoiser, pairs, step_index)
    gains = errors(pairs.latents, reference_model) - errors(pairs.latents, predicted)
    loss, pair_accuracy, saturated, anchored = offline_pso_loss(
        *gains[:2], args.beta, args.target_anchor, args.reference_weight
    )
    metrics = {"target_gain": gains[0], "reference_gain": gains[1], "pair_accuracy": pair_accuracy}
    metrics |= {"saturated": saturated, "anchored": anchored}
    if args.class_anchor:
        # under the mdp weighting, the KL divergence of the class prompt's transitions from the reference model's
        metrics["class_drift"] = errors(reference_model, predicted)[2]
        loss = loss + args.class_anchor * metrics["class_drift"]
    return StepLoss(loss, step_index, metrics)


def hinge_loss(args, unet, schedule: Schedule, denoiser, pairs: Pairs) -> StepLoss:
    """The release's reference-free hinge: one UNet call."""
    step_index = (pairs.place * num_weighted_steps(schedule, args.weighting)).long()
    predicted = predict_pairs(schedule, denoiser, pairs, step_index)
    errors = weighted_errors(forward_weight(schedule, step_index, args.weighting), pairs.latents, predicted)
    loss, pair_accuracy, active = hinge_pso_loss(*errors, args.beta, args.reference_weight, args.prior_loss_weight)
    metrics = {"target_error": errors[0], "reference_error": errors[1], "pair_accuracy": pair_accuracy}
    return StepLoss(loss, step_index, metrics | {"active": active})


def diffusion_loss(args, unet, schedule: Schedule, denoiser, pairs: Pairs) -> StepLoss:
    """PSO's rival: the plain diffusion loss on the targets, over all training timesteps."""
    timesteps = (pairs.place * schedule.scheduler.config.num_train_timesteps).long()
    inputs = diffusion_inputs(schedule, pairs.latents[0], pairs.noise, timesteps)
    denoise = denoiser(pairs.prompt_embeds[0], pairs.pooled_prompt_embeds[0], pairs.time_ids)
    error = (denoise(inputs.model_input, inputs.timesteps).float() - inputs.target) ** 2
    return StepLoss(error.flatten(1).mean(1), torch.zeros_like(timesteps), {})


LOSSES = {"sigmoid": sigmoid_loss, "hinge": hinge_loss, "diffusion": diffusion_loss}
LOSS_FLAGS = {  # what the model card says of a loss
    "sigmoid": ["weighting", "beta", "target_anchor", "reference_weight", "class_anchor"],
    "hinge": ["weighting", "beta", "reference_weight", "prior_loss_weight"],
    "diffusion": [],
}
METRICS = {
    "sigmoid": ["target_gain", "reference_gain", "pair_accuracy", "saturated", "anchored"],
    "hinge": ["target_error", "reference_error", "pair_accuracy", "active"],
    "diffusion": [],
}


def accumulate_gradients(
    accelerator: Accelerator,
    parameters: list[Tensor],
    step_loss: Callable[[Pairs], StepLoss],
    batches: Iterator[tuple[Pairs | None, int]],
    group_size: int,
    names: list[str],
    num_shares: int = 0,
) -> tuple[dict[str, float], list[float]]:
    """Leaves in the parameters the gradient of the mean loss over a group's sound pairs on all processes.

    As in the online script there is no DistributedDataParallel: processes have unlike numbers of pairs, be they none,
    and their gradients are summed in one call. How many pairs there were is only known after it.

    Args:
        batches: pairs (None: none in this batch), and how many records had a broken image.
        group_size: nominal; the loss is scaled by it until the count is known.
        names: of the loss's metrics.
        num_shares: 0, or among how many timesteps the gradient is shared out.

    Returns:
        the means of loss and metrics, with the sums `pairs` and `broken`; the timesteps' shares of the gradient's norm.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # not None: a process without pairs steps like the others
    sums = torch.zeros(3 + len(names), device=accelerator.device)  # pairs, broken, loss and metrics
    shares = torch.zeros(num_shares, sum(p.numel() for p in parameters), device=accelerator.device)
    for pairs, num_broken in batches:
        sums[1] += num_broken
        if pairs is None:
            continue
        loss, step_index, metrics = step_loss(pairs)
        for number in step_index.unique().tolist() if num_shares else []:
            part = loss[step_index == number].sum() / group_size
            if accelerator.scaler is not None:  # else fp16 gradients underflow; the scale is the same for all shares
                part = accelerator.scaler.scale(part)
            gradients = torch.autograd.grad(part, parameters, retain_graph=True)
            shares[number] += torch.cat([gradient.flatten() for gradient in gradients])
        accelerator.backward(loss.sum() / group_size)
        sums[0] += len(loss)
        sums[2:] += torch.stack([value.detach().sum() for value in (loss, *(metrics[name] for name in names))])
    sums = training.reduce_gradients(accelerator, parameters, sums)
    num_pairs, num_broken, *means = sums.tolist()
    for parameter in parameters:
        parameter.grad.mul_(group_size / max(num_pairs, 1))
    metrics = {name: value / max(num_pairs, 1) for name, value in zip(["loss", *names], means)}
    norms = accelerator.reduce(shares, "sum").norm(dim=1) if num_shares else torch.zeros(0)
    return metrics | {"pairs": num_pairs, "broken": num_broken}, (norms / norms.sum().clamp(min=1e-30)).tolist()


# ---- References and latents ----


def make_references(args, source, accelerator, pipeline, settings: dict, embed, decode) -> References | None:
    """The images that the model draws for targets without a reference: one of each caption (style), or
    --num_reference_images of the class (concept)."""
    if source.has_references or args.loss == "diffusion":
        return None
    captions = source.captions() if args.task == "style" else [args.class_prompt] * args.num_reference_images
    deployment = validation.deployment_pipeline(pipeline)
    settings = validation.pipeline_settings(settings, args.resolution)

    @torch.no_grad()
    def draw(captions, seeds):
        lora = nullcontext() if args.reference_policy == "current" else lora_disabled(pipeline.unet)
        with lora:
            latents = validation.draw_latents(deployment, *embed(captions), seeds, args.sample_batch_size, **settings)
        return decode(latents)

    model = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant"]
    model += ["distilled_unet", "distillation_lora", "reference_policy"]
    facts = {name: getattr(args, name) for name in model} | settings
    facts |= {"scheduler": scheduler_code(pipeline.scheduler), "mixed_precision": accelerator.mixed_precision}
    folder = Path(args.output_dir, "references")
    return References(accelerator, folder, captions, draw, facts, args.seed, args.sample_batch_size)


def reference_pixels(args, references: References, places: dict[str, int], epoch: int, batch: PairBatch) -> Tensor:
    """The references [b, 3, H, W] of a batch's targets, mirrored as these are: of their captions (style), or any."""
    if args.task == "style":
        indices = [places[record_id] for record_id in batch.ids]
    else:
        drawn = draw_reference_places(args.seed, epoch, batch.ids)
        indices = (drawn * len(references.captions)).long().tolist()
    pixels = references.pixels(indices)
    return torch.where(batch.flipped[:, None, None, None], pixels.flip(-1), pixels)


def make_pairs(args, device, noise_shape, embed, encode, reference_pixels, epoch: int, batch: PairBatch):
    """A batch as (pairs on the accelerator, or None without a sound record; how many are broken)."""
    if not batch.ids:
        return None, batch.num_broken
    pixels, captions = [batch.target_pixels], [batch.captions]
    if args.loss != "diffusion":
        pixels += [batch.reference_pixels if batch.reference_pixels is not None else reference_pixels(epoch, batch)]
        captions += [batch.captions]
    latents = encode(torch.cat(pixels)).unflatten(0, (len(pixels), -1))
    if args.class_anchor:
        latents = torch.cat([latents, latents[1:]])
        captions += [[args.class_prompt] * len(batch.ids)]
    embeds = (tensor.unflatten(0, (len(captions), -1)) for tensor in embed([c for row in captions for c in row]))
    draw = (args.seed, epoch, batch.ids)
    tensors = (
        latents,
        draw_noise(*draw, noise_shape),
        draw_timestep_places(*draw),
        *embeds,
        crop_time_ids(batch.original_sizes, batch.crop_top_lefts, args.resolution),
    )
    return Pairs(*(tensor.to(device) for tensor in tensors)), batch.num_broken


def fill_cache(args, accelerator, pipeline, loader: PairLoader, references: References | None, embed, encode, prompts):
    """Encodes all images, both ways round with --random_flip, and all prompts, each process its share; then the text
    encoders go."""
    has_pairs = loader.source.has_references and args.loss != "diffusion"
    drawn = references.captions if references is not None else []
    count = (len(loader.source) * (1 + has_pairs) + len(drawn)) * (1 + args.random_flip)
    shape = latent_shape(pipeline, args.resolution)
    embeds, pooled = embed(prompts[:1])
    # the references', too: a refresh embeds them again, and a target with a broken image has one as well
    prompts = list(dict.fromkeys([*prompts, *drawn, *loader.source.captions()]))
    size = count * 4 * math.prod(shape) + len(prompts) * (embeds[0].nbytes + pooled[0].nbytes)
    logger.info(f"the cache will hold {count} latents and {len(prompts)} prompts: up to {size / 1e6:.1f} MB on disk")
    mine = slice(accelerator.process_index, None, accelerator.num_processes)

    def encode_both_ways(pixels: Tensor):
        encode(pixels)
        if args.random_flip:
            encode(pixels.flip(-1))

    bar = partial(tqdm, disable=not accelerator.is_local_main_process, desc="encoding", leave=False)
    for prompt in prompts[mine]:
        embed([prompt])
    for group in bar(loader.groups(0), total=math.ceil(len(loader.source) / loader.group_size)):
        for batch in group.batches:
            if batch.ids:
                images = [batch.target_pixels, batch.reference_pixels] if has_pairs else [batch.target_pixels]
                encode_both_ways(torch.cat(images))
    indices = range(len(drawn))[mine]
    for start in range(0, len(indices), args.sample_batch_size):
        encode_both_ways(references.pixels(indices[start : start + args.sample_batch_size]))
    accelerator.wait_for_everyone()
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    free_memory()


# ---- The run ----


@dataclass
class OfflineState(training.TrainingState):
    """`TrainingState` with the place in the epoch, and the best validation for early stopping."""

    position: int = 0  # records of the epoch that are done
    num_broken: int = 0  # records that were left out so far for a broken image
    best_reward: float = -math.inf
    best_step: int = -1
    best_lora: dict[str, Tensor] | None = None  # here, so that a resumed run has that of its own checkpoint
    worse_validations: int = 0  # in a row, since the best


def keep_best(args, accelerator, unet, state: OfflineState, values: dict[str, float]) -> bool:
    """Keeps the LoRA, and saves it to output_dir/best, if its validation's reward is the best so far; True if it is
    time to stop. `values` are empty where a resumed run has not validated yet: what it goes on with did."""
    if not (args.early_stopping_patience and values):
        return False
    reward = values["validation/reward_mean"]
    if reward > state.best_reward:
        state.best_reward, state.best_step, state.worse_validations = reward, state.global_step, 0
        state.best_lora = {key: value.to("cpu", copy=True) for key, value in get_peft_model_state_dict(unet).items()}
        if accelerator.is_main_process:
            Path(args.output_dir, "best").mkdir(exist_ok=True)
            save_lora(unet, Path(args.output_dir, "best"))
        accelerator.wait_for_everyone()
    elif state.best_step != state.global_step:
        state.worse_validations += 1
    return state.worse_validations >= args.early_stopping_patience


def run(args):
    source, reward_specs, checkpoint = check_arguments(args)
    accelerator = training.make_accelerator(args)
    logger.setLevel("INFO")
    repo_id = training.create_hub_repository(accelerator, args)

    # The models, as functions of tensors
    pipeline, parameters = training.load_models(args, accelerator)
    cache_folder = Path(args.output_dir, "cache") if args.cache_latents else None
    functions = training.make_functions(args, accelerator, pipeline, cache_folder)
    embed, denoiser, decode, encode, guidance_scale = functions
    home = "cpu" if args.offload else accelerator.device
    rewards = load_rewards(reward_specs, home, args.cache_dir, args.reward_batch_size)
    score = training.offloaded(rewards, accelerator.device, args.offload)
    schedule = training.training_schedule(args, pipeline.scheduler, accelerator.device, stochastic=False)
    settings = {**training.deployment_settings(args, pipeline.scheduler), "guidance_scale": guidance_scale}

    # The pairs
    group_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    loader = PairLoader(
        source,
        args.resolution,
        args.train_batch_size,
        group_size,
        args.seed,
        accelerator.num_processes,
        accelerator.process_index,
        args.dataloader_num_workers,
        args.center_crop,
        args.random_flip,
        skip_broken_images=args.skip_broken_images,
    )
    references = make_references(args, source, accelerator, pipeline, settings, embed, decode)
    places = {} if isinstance(source, Stream) else {record_id: index for index, record_id in enumerate(source.ids())}
    draw_pixels = partial(reference_pixels, args, references, places)
    shape = latent_shape(pipeline, args.resolution)
    to_pairs = partial(make_pairs, args, accelerator.device, shape, embed, encode, draw_pixels)
    names = METRICS[args.loss] + ["class_drift"] * bool(args.class_anchor)
    step_loss = partial(LOSSES[args.loss], args, pipeline.unet, schedule, denoiser)
    log_shares = args.log_gradient_shares and args.loss != "diffusion"  # which is not trained at the schedule's steps
    num_shares = num_weighted_steps(schedule, args.weighting) if log_shares else 0
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(len(source) / group_size)
    max_epochs = args.num_train_epochs if args.max_train_steps is None else math.inf

    optimizer, lr_scheduler = training.make_optimizer(args, accelerator, parameters, max_train_steps)
    state = OfflineState()
    accelerator.register_for_checkpointing(state)
    if checkpoint is not None:
        logger.info(f"resuming from {checkpoint}")
        accelerator.load_state(str(checkpoint))
    training.initialize_grad_scaler(accelerator)
    log = training.start_logs(accelerator, args, "pso_lora_sdxl", state.global_step, resumed=checkpoint is not None)
    if isinstance(source, Table) and source.num_ties:
        logger.info(f"{source.num_ties} ties are left out, {len(source)} pairs are kept")
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    refresh_steps = args.reference_refresh_steps or max_train_steps + 1
    if references is not None:
        if args.reference_policy == "current":
            references.drop_after(state.global_step)
        drawing = bar(total=math.ceil(len(references.captions) / accelerator.num_processes), desc="references")
        references.refresh(state.global_step - state.global_step % refresh_steps, drawing.update)
        drawing.close()
    prompts = args.validation_prompts or validation_prompts(args, source)
    if args.cache_latents:
        more_prompts = prompts + [args.class_prompt] * bool(args.class_anchor)
        fill_cache(args, accelerator, pipeline, loader, references, embed, encode, more_prompts)
    validate = validation.Validation(
        args, accelerator, pipeline, prompts, settings, args.sample_batch_size, embed, decode, score, rewards, log
    )
    if checkpoint is None:
        validate(state)
        keep_best(args, accelerator, pipeline.unet, state, validate.values)

    logger.info(f"steps of {group_size} pairs at timesteps {schedule.timesteps.tolist()}")
    updates = bar(total=max_train_steps, initial=state.global_step, desc="updates", unit="step")
    stop = False
    while state.epoch < max_epochs and state.global_step < max_train_steps and not stop:
        first_step, start = state.global_step, state.position
        for group in loader.groups(state.epoch, state.position):
            batches = (to_pairs(state.epoch, batch) for batch in group.batches)
            metrics, shares = accumulate_gradients(
                accelerator, parameters, step_loss, batches, group_size, names, num_shares
            )
            state.position = group.end
            state.num_broken += int(metrics.pop("broken"))
            if metrics["pairs"] == 0:
                continue
            metrics |= training.optimizer_step(accelerator, optimizer, lr_scheduler, parameters, args.max_grad_norm)
            metrics |= {f"gradient_share/{t:g}": share for t, share in zip(schedule.timesteps.tolist(), shares)}
            state.global_step += 1
            log(state.global_step, {"epoch": state.epoch, "broken": state.num_broken, **metrics})
            updates.update()
            updates.set_postfix(loss=metrics["loss"])

            if references is not None and state.global_step % refresh_steps == 0:
                if state.global_step < max_train_steps:
                    references.refresh(state.global_step)
            if state.global_step % args.validation_steps == 0:
                validate(state)
                stop = keep_best(args, accelerator, pipeline.unet, state, validate.values)
            stop = stop or state.global_step >= max_train_steps
            if state.global_step % args.checkpointing_steps == 0 and not stop:
                save_checkpoint(accelerator, args.output_dir, state.global_step, args.checkpoints_total_limit)
            if stop:
                break
        else:
            if state.global_step == first_step and start == 0:
                raise ValueError(f"{source.name} has no pair of sound images: see --skip_broken_images")
            state.epoch, state.position = state.epoch + 1, 0
    updates.close()
    if isinstance(source, Stream) and source.num_ties:
        logger.info(f"{source.num_ties} ties were left out in the latest pass")
    if state.num_broken:
        logger.info(f"{state.num_broken} times a pair was left out because an image is broken (--skip_broken_images)")

    # Saved before anything is drawn with it, so that a failure there loses nothing
    if accelerator.is_main_process:
        save_lora(pipeline.unet, args.output_dir, args.output_kohya_format)
    validate(state)
    keep_best(args, accelerator, pipeline.unet, state, validate.values)
    if args.early_stopping_patience and state.best_lora is not None and state.best_step != state.global_step:
        logger.info(f"the best LoRA was that of step {state.best_step}: it is the result")
        set_peft_model_state_dict(pipeline.unet, state.best_lora)
        state.global_step = state.best_step
        if accelerator.is_main_process:
            save_lora(pipeline.unet, args.output_dir, args.output_kohya_format)
    images = validate.save_before_and_after(state)
    if accelerator.is_main_process:
        facts = ["task", "loss", *LOSS_FLAGS[args.loss], "learning_rate", "rank", "seed"]
        facts = {name: getattr(args, name) for name in facts}
        method = "plain diffusion loss" if args.loss == "diffusion" else "offline PSO"
        facts = {"method": method, "optimizer steps": state.global_step, **facts}
        prompt = validate.prompts[0]
        training.write_model_card(args, pipeline.scheduler, settings, prompt, images, repo_id, facts)
        if repo_id is not None:
            training.push_folder(repo_id, args)
        logger.info(f"the LoRA and its model card are in {args.output_dir}")
    accelerator.end_training()


def validation_prompts(args, source: Table | Stream) -> list[str]:
    """Four captions of the training set; of a concept, its prompt and its class's."""
    if args.task == "concept":
        return [args.instance_prompt, args.class_prompt]
    if isinstance(source, Table):
        return list(dict.fromkeys(source.captions()))[:4]
    return list(dict.fromkeys(record.caption for record in source.first(4)))


def main(argv=None):
    args = parse_args(argv)
    with training.one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
