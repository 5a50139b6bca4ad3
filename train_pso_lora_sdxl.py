#!/usr/bin/env python
"""Offline Pairwise Sample Optimization (PSO) of a few-step distilled model (arXiv 2410.03190).

Trains a LoRA on pairs of a target and a reference image, noised to the distilled schedule's own timesteps: the target's
denoising error falls against the reference's, relative to the model that it started from. Where a pair comes from is
the task. preference: the winner and the loser of one prompt. style: an image with a caption, and the model's own sample
of the caption. concept: an image of one thing, and the model's own sample of its class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.data.images import draw_noise, draw_reference_uniform, draw_timestep_uniform
from pso_utils.data.latent_cache import (
    LatentBatch,
    LatentCache,
    TensorCache,
    encoded_minibatches,
)
from pso_utils.data.loader import PairLoader
from pso_utils.data.pairs import Stream, Table
from pso_utils.data.prompt_cache import PromptCache
from pso_utils.data.references import ReferenceLatents, References
from pso_utils.errors import UserError
from pso_utils.families import Conditioning, Deployment, Family
from pso_utils.families.loading import ModelInfo
from pso_utils.losses import (
    HINGE_METRICS,
    OFFLINE_METRICS,
    denoising_error,
    hinge_pso_loss,
    offline_pso_loss,
)
from pso_utils.mdp import WEIGHTINGS, add_noise, diffusion_inputs, forward_weights, predict
from pso_utils.rewards import RewardSpec, parse_rewards
from pso_utils.run import arguments, hub, models
from pso_utils.run.accelerator import make_accelerator, on_main_process, one_line_errors
from pso_utils.run.checkpoints import Checkpoints, TrainingState, checkpoint_to_resume
from pso_utils.run.logs import start_logs
from pso_utils.run.model_card import scheduler_code
from pso_utils.run.optimizer import (
    make_optimizer,
    optimizer_step,
    reduce_gradients,
    zero_gradients,
)
from pso_utils.run.pairs import add_pair_arguments, check_task_flags, open_source
from pso_utils.run.result import save_card_and_pictures, save_lora
from pso_utils.run.validation import Validation
from pso_utils.schedules import Schedule


logger = get_logger(__name__)


# ---- Losses ----


class Pairs(NamedTuple):
    """b pairs at one noise level each, on the accelerator, as k rows of b: the targets, their references (k = 2) and,
    with --class_anchor, the references once more, with the class prompt (k = 3). The diffusion loss takes the targets
    alone (k = 1)."""

    latents: Tensor  # [k, b, C, h, w], clean
    noise: Tensor  # [b, C, h, w], shared by a pair
    uniform: Tensor  # [b], in [0, 1): which timestep
    conditioning: Conditioning  # of k * b


def predict_pairs(family: Family, schedule: Schedule, pairs: Pairs, step_index: Tensor) -> Tensor:
    """Predicted clean latents [k, b, C, h, w] of the noised pairs, by one call of the model for all of them."""
    rows = len(pairs.latents)
    steps = schedule.at(step_index.repeat(rows))
    sample = add_noise(steps, pairs.latents.flatten(0, 1), pairs.noise.repeat(rows, 1, 1, 1))
    model_output = family.predict(steps.columns.input_scale * sample, steps.timesteps, pairs.conditioning)
    return predict(steps, model_output, sample)[0].unflatten(0, (rows, -1))


def weighted_errors(clean: Tensor, predicted: Tensor, weight: Tensor) -> Tensor:
    """`denoising_error` [k, b] of clean latents [k, b, C, h, w], with the weight [b] of each pair's noise level."""
    return denoising_error(clean.flatten(0, 1), predicted.flatten(0, 1), weight.repeat(len(clean))).view(len(clean), -1)


def sigmoid_loss(family: Family, schedule: Schedule, weights: Tensor, pairs: Pairs, args) -> tuple[Tensor, dict]:
    """PSO: one call of the model without gradient and LoRA, one with both."""
    step_index = (pairs.uniform * len(weights)).long()
    weight = weights[step_index]
    with torch.no_grad(), family.without_lora():
        base_predicted = predict_pairs(family, schedule, pairs, step_index)
    predicted = predict_pairs(family, schedule, pairs, step_index)
    gains = weighted_errors(pairs.latents, base_predicted, weight) - weighted_errors(pairs.latents, predicted, weight)
    settings = {"beta": args.beta, "target_anchor": args.target_anchor, "reference_weight": args.reference_weight}
    loss, metrics = offline_pso_loss(*gains[:2], **settings)
    if args.class_anchor:
        # under the mdp weighting, the KL divergence of the class prompt's transitions from the base's
        class_drift = weighted_errors(base_predicted, predicted, weight)[2]
        loss = loss + args.class_anchor * class_drift
        metrics["class_drift"] = class_drift.detach()
    return loss, metrics


def hinge_loss(family: Family, schedule: Schedule, weights: Tensor, pairs: Pairs, args) -> tuple[Tensor, dict]:
    """The release's hinge, without the base: one call of the model."""
    step_index = (pairs.uniform * len(weights)).long()
    predicted = predict_pairs(family, schedule, pairs, step_index)
    errors = weighted_errors(pairs.latents, predicted, weights[step_index])
    settings = {"reference_weight": args.reference_weight, "prior_loss_weight": args.prior_loss_weight}
    return hinge_pso_loss(*errors, beta=args.beta, **settings)


def diffusion_loss(family: Family, schedule: Schedule, weights: Tensor, pairs: Pairs, args) -> tuple[Tensor, dict]:
    """PSO's rival: the plain diffusion loss on the targets, over all training timesteps."""
    timesteps = (pairs.uniform * len(schedule.train_alpha)).long()
    inputs = diffusion_inputs(schedule, pairs.latents[0], pairs.noise, timesteps)
    model_output = family.predict(inputs.model_input, inputs.timesteps, pairs.conditioning)
    loss = ((model_output - inputs.target) ** 2).flatten(1).mean(1)
    return loss, {}


class Loss(NamedTuple):
    """All that a loss is. To add one's own, write its function and an entry of `LOSSES`; flags that no other loss has
    are added in `add_loss_arguments`, without a default.

    function: (family, schedule, weights [M] of the steps that may be drawn, pairs, args) -> the loss of each pair [b]
        and its metrics by name, [b] each.
    flags: which of the losses' flags it reads; the others are refused, and these are in the log and the model card.
        Without `weighting`, all of the schedule's steps may be drawn.
    metrics: the names of its metrics (`loss` is one anyway), for a process that has no pairs and adds zeros.
    defaults: weighting -> what the flags are unless given; the first one that fits the schedule is the default
        weighting. None: by task, `TASK_DEFAULTS`.
    takes_references: whether pairs have references; else it takes the targets alone.
    method: what the model card calls it.
    """

    function: Callable[[Family, Schedule, Tensor, Pairs, object], tuple[Tensor, dict[str, Tensor]]]
    flags: Sequence[str]
    metrics: Sequence[str]
    defaults: dict[str, dict[str, float]] | None
    takes_references: bool = True
    method: str = "offline PSO"


LOSSES = {
    "sigmoid": Loss(
        sigmoid_loss,
        flags=["weighting", "beta", "target_anchor", "reference_weight", "class_anchor"],
        metrics=OFFLINE_METRICS,
        defaults=None,
    ),
    "hinge": Loss(
        hinge_loss,
        flags=["weighting", "beta", "reference_weight", "prior_loss_weight"],
        metrics=HINGE_METRICS,
        # The release's, but for its reference_weight of 0.1, with which the hinge is regression onto the target.
        defaults={"epsilon": {"beta": 5.0, "reference_weight": 0.5, "prior_loss_weight": 0.5}},
    ),
    "diffusion": Loss(
        diffusion_loss,
        flags=[],
        metrics=[],
        defaults={},
        takes_references=False,
        method="plain diffusion loss",
    ),
}
LOSS_FLAGS = list(dict.fromkeys(flag for loss in LOSSES.values() for flag in loss.flags))

# What the flags of PSO's loss are unless given, by task and weighting: a task's own weighting comes first, the others
# are for who asks for them. demo/README.md has what was tried. A beta is right where beta times the difference of gains
# that a fully learnt pair shows is some 3 to 15: with more, the loss saturates before the samples change.
TASK_DEFAULTS = {
    "preference": {
        "mdp": {"beta": 30.0, "target_anchor": 60.0, "reference_weight": 1.0},
        "x0": {"beta": 10.0, "target_anchor": 10.0, "reference_weight": 1.0},
        "epsilon": {"beta": 200.0, "target_anchor": 200.0, "reference_weight": 1.0},
    },
    "style": {"x0": {"beta": 2.0, "target_anchor": 2.0, "reference_weight": 0.05}},
    "concept": {"x0": {"beta": 2.0, "target_anchor": 2.0, "reference_weight": 0.2}},
}
CLASS_ANCHOR = 10.0  # of concepts, whatever the weighting


def set_loss_defaults(args, schedule: Schedule) -> Tensor:
    """Fills in the flags of the loss that were not given; returns the weights [M] of the steps that may be drawn.

    Raises:
        UserError: a flag of another loss, or a weighting that does not fit the schedule or has no defaults here.
    """
    loss = LOSSES[args.loss]
    for flag in LOSS_FLAGS:
        if getattr(args, flag) is not None and flag not in loss.flags:
            owners = " or ".join(name for name, other in LOSSES.items() if flag in other.flags)
            raise UserError(f"--{flag} goes with --loss {owners}, not {args.loss}: drop it")
    if "weighting" not in loss.flags:
        return forward_weights(schedule, "x0")
    by_weighting = TASK_DEFAULTS[args.task] if loss.defaults is None else loss.defaults
    if args.weighting is None:
        args.weighting = next((name for name in by_weighting if fits_schedule(schedule, name)), None)
    if args.weighting is None:
        raise UserError(f"--loss {args.loss} has no default --weighting for this schedule: pass one")
    weights = forward_weights(schedule, args.weighting)
    defaults = {"reference_weight": 1.0, "target_anchor": 0.0} | by_weighting.get(args.weighting, {})
    defaults["class_anchor"] = CLASS_ANCHOR if args.task == "concept" else 0.0
    for flag in loss.flags:
        if getattr(args, flag) is None and flag not in defaults:
            raise UserError(f"--weighting {args.weighting} has no default --{flag} for --task {args.task}: pass one")
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[flag])
    return weights


def fits_schedule(schedule: Schedule, weighting: str) -> bool:
    try:
        forward_weights(schedule, weighting)
    except UserError:
        return False
    return True


# ---- Flags ----


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    add_pair_arguments(parser)
    add_loss_arguments(parser)
    arguments.add_lora_arguments(parser)
    arguments.add_optimizer_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="pso-lora")
    args = parser.parse_args(argv)
    check_task_flags(parser, args)
    return args


def defaults_text(flag: str) -> str:
    """A flag's default of each loss and task, for the help."""
    named = [(f"hinge, {weighting}", values) for weighting, values in LOSSES["hinge"].defaults.items()]
    for task, by_weighting in TASK_DEFAULTS.items():
        named += [(f"{task}, {weighting}", values) for weighting, values in by_weighting.items()]
    return "; ".join(f"{values[flag]:g} for {name}" for name, values in named if flag in values)


def add_loss_arguments(parser):
    group = parser.add_argument_group("offline PSO")
    add, positive_int, non_negative_float = group.add_argument, arguments.positive_int, arguments.non_negative_float
    add("--loss", choices=LOSSES, default="sigmoid", help="sigmoid: PSO, relative to the base. hinge: without the "
        "base, as released for concepts. diffusion: the plain diffusion loss on the targets, PSO's rival.")  # fmt: skip
    add("--weighting", choices=WEIGHTINGS, help="Of the squared error of the clean latents: epsilon (alpha/sigma)^2, "
        "x0 1, mdp the exact KL divergence of the transitions. Default: mdp for preference (x0 where it does not fit "
        "the schedule), x0 for style and concept; epsilon for the hinge.")  # fmt: skip
    add("--beta", type=arguments.positive_float, help="Strength of the preference. Default: "
        f"{defaults_text('beta')}.")  # fmt: skip
    add("--target_anchor", type=non_negative_float, help="sigmoid: weight of relu(growth of the target's error), which "
        f"keeps samples on the data. Default: {defaults_text('target_anchor')}; 0 for other weightings.")  # fmt: skip
    add("--class_anchor", type=non_negative_float, help="concept, sigmoid: weight of the squared distance that the "
        "class prompt's predictions move away from the base's; keeps the class as it is. Default: "
        f"{CLASS_ANCHOR:g}.")  # fmt: skip
    add("--reference_weight", type=non_negative_float, help="The reference's weight. sigmoid: 1 is PSO; less repels "
        "less. hinge: kappa; the release's 0.1 is, with its other values, plain regression onto the target. Default: "
        f"{defaults_text('reference_weight')}; 1 for other weightings.")  # fmt: skip
    add("--prior_loss_weight", type=non_negative_float, help="hinge: lambda, the weight of regression onto the "
        f"references. Default: {defaults_text('prior_loss_weight')}.")  # fmt: skip
    add("--train_batch_size", type=positive_int, default=4, help="Pairs in a call of the model, on each process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of pairs in an optimizer step.")
    add("--num_train_epochs", type=positive_int, default=1, help="Passes over the pairs, unless --max_train_steps is "
        "given.")  # fmt: skip
    add("--max_train_steps", type=positive_int, help="Optimizer steps to stop after. One optimizer step is "
        "gradient_accumulation_steps x train_batch_size pairs on each process, one timestep of each.")  # fmt: skip
    arguments.add_reward_arguments(group, required=False, purpose="Scores the validation images:")
    add("--early_stopping_patience", type=positive_int, help="Stop after so many validations without a better "
        "--reward; the result is the best LoRA, not the last. Default: never.")  # fmt: skip


class Plan(NamedTuple):
    """What the flags and the files tell, checked before a model is loaded."""

    source: Table | Stream  # of the targets or pairs
    rewards: list[RewardSpec]
    model: ModelInfo
    checkpoint: Path | None  # to resume from; None: a new run


def check_arguments(args) -> Plan:
    arguments.check_output_dir(args.output_dir)
    arguments.check_packages(args)
    arguments.check_idle_flags(args)
    if args.early_stopping_patience and not args.reward:
        raise UserError("--early_stopping_patience needs a --reward to tell which validation is the best")
    if args.early_stopping_patience and args.num_validation_images == 0:
        raise UserError("--early_stopping_patience needs validation images: raise --num_validation_images")
    reward_specs = parse_rewards(args.reward, args.reward_model) if args.reward else []
    source = open_source(args)
    info = models.check_model(args)
    lora_targets = models.check_lora(args, info)
    set_loss_defaults(args, models.training_schedule(args, info.family, info.scheduler, stochastic=False))
    models.deployment(args, info.family, info.scheduler)
    return Plan(source, reward_specs, info, checkpoint_to_resume(args, info, lora_targets))


# ---- Pairs of latents ----


def make_references(
    args,
    accelerator: Accelerator,
    family: Family,
    source: Table | Stream,
    *,
    embed: PromptCache,
    deployment: Deployment,
) -> References | None:
    """The images that the model draws for targets without a reference: one of each caption (style), or
    --num_reference_images of the class (concept)."""
    if source.has_references or not LOSSES[args.loss].takes_references:
        return None
    captions = source.captions() if args.task == "style" else [args.class_prompt] * args.num_reference_images

    @torch.no_grad()
    def draw(captions, seeds):
        conditioning = family.collate(embed(captions), deployment.height, deployment.width)
        settings = {"deployment": deployment, "batch_size": args.sample_batch_size}
        if args.reference_policy == "current":
            return family.decode_latents(family.draw_latents(conditioning, seeds, **settings))
        with family.without_lora():
            return family.decode_latents(family.draw_latents(conditioning, seeds, **settings))

    names = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant"]
    names += ["distilled_unet", "distillation_lora", "reference_policy"]
    settings = {name: getattr(args, name) for name in names} | deployment._asdict()
    settings |= {"scheduler": scheduler_code(family.pipeline.scheduler), "guidance_scale": family.guidance_scale}
    settings["mixed_precision"] = accelerator.mixed_precision
    folder = Path(args.output_dir, "references")
    batch_size = args.sample_batch_size
    return References(accelerator, folder, captions, draw, settings=settings, seed=args.seed, batch_size=batch_size)


def reference_indices(args, epoch: int, ids: Sequence[str], index_of_id: dict[str, int], num_references: int):
    """Which of the references each record is paired with: its caption's (style), or any (concept)."""
    if args.task == "style":
        return [index_of_id[record_id] for record_id in ids]
    return (draw_reference_uniform(ids, seed=args.seed, epoch=epoch) * num_references).long().tolist()


def make_pairs(
    args, family: Family, embed: PromptCache, batch: LatentBatch, references: Tensor | None, *, epoch: int
) -> Pairs:
    """A microbatch as it is trained on: with its references [b, C, h, w] (None for the diffusion loss), each record's
    draws of this epoch, and the conditioning of all its rows."""
    latents, captions = [batch.targets], list(batch.captions)
    if references is not None:
        latents.append(references)
        captions += batch.captions
    if args.class_anchor:
        latents.append(references)
        captions += [args.class_prompt] * len(batch.ids)
    conditioning = family.collate(
        embed(captions),
        args.resolution,
        args.resolution,
        original_sizes=batch.original_sizes.repeat(len(latents), 1),
        crop_top_lefts=batch.crop_top_lefts.repeat(len(latents), 1),
    )
    draws = {"seed": args.seed, "epoch": epoch}
    noise = draw_noise(batch.ids, batch.targets.shape[1:], **draws).to(family.device)
    uniform = draw_timestep_uniform(batch.ids, **draws).to(family.device)
    return Pairs(torch.stack(latents), noise, uniform, conditioning)


# ---- The run ----


@dataclass
class OfflineState(TrainingState):
    """`TrainingState` with the records that are done, and the best validation for early stopping."""

    position: int = 0  # records of the epoch that are done
    num_broken: int = 0  # records that were left out so far for a broken image
    best_reward: float = -math.inf
    best_step: int = -1
    best_lora: dict[str, Tensor] | None = None  # here, so that a resumed run has that of its own checkpoint
    worse_validations: int = 0  # in a row, since the best
    recent_gains: list[list[float]] = field(default_factory=list)  # of targets and references, of the last steps
    was_warned: bool = False  # of repulsion


REPULSION_WINDOW, REPULSION_LIMIT = 20, 0.7  # optimizer steps; demo/README.md has where runs left the data


def repulsion(recent_gains: list[list[float]], reference_weight: float) -> dict[str, float]:
    """`repulsion`: how much of the margin that the pairs of the last steps show comes from the references' errors
    growing, and not from the targets' falling. A target's error can fall to 0, where the prediction is on the data; a
    reference's can grow without end, in any direction. Empty until there are enough steps, and without a margin.

    Args:
        recent_gains: of each step, the gains of its targets and of its references, added up.
    """
    targets, references = (sum(gains) for gains in zip(*recent_gains))
    margin = targets - reference_weight * references
    if len(recent_gains) < REPULSION_WINDOW or margin <= 0:
        return {}
    return {"repulsion": -reference_weight * references / margin}


def watch_repulsion(args, state: OfflineState, sums: dict[str, float]) -> dict[str, float]:
    """`repulsion` with the gains of a step added, for losses that have them; warns once where it is high."""
    if not {"target_gain", "reference_gain"} <= sums.keys():
        return {}
    gains = [sums["target_gain"], sums["reference_gain"]]
    state.recent_gains = [*state.recent_gains, gains][-REPULSION_WINDOW:]
    values = repulsion(state.recent_gains, 1.0 if args.reference_weight is None else args.reference_weight)
    is_high = args.task == "preference" and values.get("repulsion", -math.inf) > REPULSION_LIMIT
    if is_high and not state.was_warned:
        state.was_warned = True
        logger.warning(
            f"repulsion is {values['repulsion']:.2f}, above {REPULSION_LIMIT}: the losers are pushed away more than the"
            " winners are approached, and samples may leave the data. Lower --learning_rate, or raise --target_anchor"
        )
    return values


def keep_best(args, accelerator: Accelerator, family: Family, state: OfflineState, values: dict[str, float]) -> bool:
    """Keeps the LoRA, and saves it to output_dir/best, if its validation's reward is the best so far; True if it is
    time to stop. `values` are empty where a resumed run has not validated yet: what it goes on with did."""
    if not (args.early_stopping_patience and values):
        return False
    reward = values["validation/reward_mean"]
    if reward > state.best_reward:
        state.best_reward, state.best_step, state.worse_validations = reward, state.global_step, 0
        lora = get_peft_model_state_dict(family.denoiser)
        state.best_lora = {key: value.to("cpu", copy=True) for key, value in lora.items()}
        on_main_process(accelerator, lambda: family.save_lora(Path(args.output_dir, "best")))
    elif state.best_step != state.global_step:
        state.worse_validations += 1
    return state.worse_validations >= args.early_stopping_patience


def default_validation_prompts(args, source: Table | Stream) -> list[str]:
    """Four captions of the training set; of a concept, its prompt and its class's."""
    if args.task == "concept":
        return [args.instance_prompt, args.class_prompt]
    if isinstance(source, Table):
        return list(dict.fromkeys(source.captions()))[:4]
    return list(dict.fromkeys(record.caption for record in source.first(4)))


def run(args):
    source, reward_specs, info, checkpoint = check_arguments(args)
    accelerator = make_accelerator(args)
    logger.setLevel("INFO")
    repo_id = hub.create_hub_repository(accelerator, args)

    # The models
    family = models.load_family(args, accelerator, info)
    parameters = models.add_trained_lora(args, accelerator, family)
    store = TensorCache(Path(args.output_dir, "cache", "prompts")) if args.cache_latents else None
    embed = PromptCache(family, store=store)
    rewards = models.load_run_rewards(args, accelerator, reward_specs)
    schedule = models.training_schedule(
        args, family, family.pipeline.scheduler, stochastic=False, device=accelerator.device
    )
    deployment = models.deployment(args, family, family.pipeline.scheduler)
    entry = LOSSES[args.loss]
    weights = set_loss_defaults(args, schedule)
    loss_settings = {flag: getattr(args, flag) for flag in entry.flags}
    metric_names = list(entry.metrics)
    if args.class_anchor:
        metric_names.append("class_drift")
    else:
        loss_settings.pop("class_anchor", None)  # of concepts alone

    # The pairs
    minibatch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    loader = PairLoader(
        source,
        resolution=args.resolution,
        train_batch_size=args.train_batch_size,
        minibatch_size=minibatch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        num_workers=args.dataloader_num_workers,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        skip_broken_images=args.skip_broken_images,
    )
    references = make_references(args, accelerator, family, source, embed=embed, deployment=deployment)
    reference_latents = ReferenceLatents(references, family, is_cached=args.cache_latents, random_flip=args.random_flip)
    index_of_id = {record_id: index for index, record_id in enumerate(source.ids())} if args.task == "style" else {}
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(len(source) / minibatch_size)
    max_epochs = args.num_train_epochs if args.max_train_steps is None else math.inf

    optimizer, lr_scheduler = make_optimizer(args, accelerator, parameters, max_train_steps)
    state = OfflineState()
    checkpoints = Checkpoints(
        accelerator, family, state, optimizer, lr_scheduler, args=args, max_train_steps=max_train_steps
    )
    checkpoints.load(checkpoint)
    is_resumed = checkpoint is not None
    log = start_logs(accelerator, args, "pso_lora_sdxl", state, resumed=is_resumed)
    if isinstance(source, Table) and source.num_ties:
        logger.info(f"{source.num_ties} ties are left out, {len(source)} pairs are kept")
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    refresh_steps = args.reference_refresh_steps or max_train_steps + 1
    if references is not None:
        if args.reference_policy == "current":
            references.drop_after(state.global_step)
        drawing = bar(total=len(references.own_indices), desc="references")
        reference_latents.refresh(state.global_step - state.global_step % refresh_steps, drawing.update)
        drawing.close()
    prompts = args.validation_prompts or default_validation_prompts(args, source)
    minibatches = partial(encoded_minibatches, family, loader)
    if args.cache_latents:
        # those of the references, too: a refresh embeds them again
        more_prompts = [*prompts, *([] if references is None else references.captions)]
        cache = LatentCache(Path(args.output_dir, "cache", "latents"), accelerator, family, loader)
        all_prompts = [*more_prompts, *source.captions()]
        embed(all_prompts[accelerator.process_index :: accelerator.num_processes])
        cache.fill()
        family.free_text_encoders()
        family.keep_vae_offloaded()
        logger.info("--cache_latents: the text encoders are gone, and the VAE is on the CPU except where it is used")
        minibatches = cache.minibatches
    validate = Validation(
        args,
        accelerator,
        family,
        embed,
        prompts=prompts,
        deployment=deployment,
        batch_size=args.sample_batch_size,
        rewards=rewards,
        log=log,
    )
    stop = False
    if validate.is_due(state):
        validate(state)
        stop = keep_best(args, accelerator, family, state, validate.values)

    logger.info(
        f"steps of {minibatch_size} pairs at timesteps {schedule.timesteps.tolist()}; loss {args.loss}"
        + "".join(f", {flag} {value}" for flag, value in loss_settings.items())
    )
    updates = bar(total=max_train_steps, initial=state.global_step, desc="updates", unit="step")
    while state.epoch < max_epochs and state.global_step < max_train_steps and not stop:
        first_step, start = state.global_step, state.position
        for minibatch in minibatches(state.epoch, state.position):
            # Prepare: what is offloaded moves at most once a minibatch
            prepared, num_broken = [], 0
            with family.parts_loaded():
                for batch in minibatch.microbatches:
                    num_broken += batch.num_broken
                    if not batch.ids:
                        continue
                    of_targets = batch.references
                    if not entry.takes_references:
                        of_targets = None
                    elif references is not None:
                        num_references = len(references.captions)
                        indices = reference_indices(args, state.epoch, batch.ids, index_of_id, num_references)
                        of_targets = reference_latents(indices, batch.flipped.tolist())
                    prepared.append(make_pairs(args, family, embed, batch, of_targets, epoch=state.epoch))
            counts = {"pairs": sum(len(pairs.noise) for pairs in prepared), "broken": num_broken}
            counts = {name: torch.tensor(float(n), device=accelerator.device) for name, n in counts.items()}

            # Update. How many pairs all processes have is known after the reduction only (images may be broken), so
            # until then the losses are divided by the nominal number, and afterwards the gradients are set right
            zero_gradients(parameters)
            sums = dict.fromkeys(["loss", *metric_names], torch.zeros((), device=accelerator.device))
            for pairs in prepared:
                loss, metrics = entry.function(family, schedule, weights, pairs, args)
                if metrics.keys() | {"loss"} != sums.keys():
                    raise ValueError(f"--loss {args.loss} returns {sorted(metrics)}, its entry has {metric_names}")
                accelerator.backward(loss.sum() / minibatch_size)
                metrics["loss"] = loss.detach()
                sums = {name: total + metrics[name].sum() for name, total in sums.items()}
            sums = reduce_gradients(accelerator, parameters, sums | counts)
            state.position = minibatch.end
            num_pairs, num_broken = sums.pop("pairs"), sums.pop("broken")
            state.num_broken += int(num_broken)
            if num_pairs == 0:
                continue
            for parameter in parameters:
                parameter.grad.mul_(minibatch_size / num_pairs)
            metrics = {name: total / num_pairs for name, total in sums.items()} | {"pairs": num_pairs}
            metrics |= watch_repulsion(args, state, sums)
            metrics |= optimizer_step(
                accelerator, optimizer, lr_scheduler, parameters, max_grad_norm=args.max_grad_norm
            )
            state.global_step += 1
            log(state.global_step, {"epoch": state.epoch, "broken": state.num_broken, **metrics})
            updates.update()
            updates.set_postfix(loss=metrics["loss"])
            checkpoints.stop_if_interrupted()

            if references is not None and state.global_step % refresh_steps == 0:
                if state.global_step < max_train_steps:
                    reference_latents.refresh(state.global_step)
            is_last = state.global_step >= max_train_steps
            if checkpoints.is_due(state.global_step - 1) and not is_last:
                checkpoints.save()  # before the validation, which a resumed run makes up for
            if validate.is_due(state) and not is_last:
                validate(state)
                stop = keep_best(args, accelerator, family, state, validate.values)
            if stop or is_last:
                break
        else:
            if state.global_step == first_step and start == 0:
                raise UserError(f"{source.name} has no pair without a broken image: see --skip_broken_images")
            state.epoch, state.position = state.epoch + 1, 0
    updates.close()
    if isinstance(source, Stream) and source.num_ties:
        logger.info(f"{source.num_ties} ties were left out in the latest pass")
    if state.num_broken:
        logger.info(f"{state.num_broken} times a pair was left out because an image is broken (--skip_broken_images)")

    save_lora(args, accelerator, family)
    validate(state)
    keep_best(args, accelerator, family, state, validate.values)
    if args.early_stopping_patience and state.best_lora is not None and state.best_step != state.global_step:
        logger.info(f"the best LoRA was that of step {state.best_step}: it is the result")
        set_peft_model_state_dict(family.denoiser, state.best_lora)
        state.global_step = state.best_step
        save_lora(args, accelerator, family)
    settings = {
        "method": entry.method,
        "optimizer steps": state.global_step,
        "trained timesteps": "all" if args.loss == "diffusion" else schedule.timesteps.tolist(),
        "task": args.task,
        "loss": args.loss,
        **loss_settings,
        **{name: getattr(args, name) for name in ("learning_rate", "rank", "seed")},
    }
    save_card_and_pictures(args, accelerator, validate, state, settings=settings, repo_id=repo_id)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
