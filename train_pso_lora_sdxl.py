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

from pso_utils.data.latent_cache import LatentCache
from pso_utils.data.loader import PairLoader
from pso_utils.data.minibatches import TrainingPairs
from pso_utils.data.pairs import Stream, Table
from pso_utils.errors import UserError
from pso_utils.families import Family
from pso_utils.families.denoising import NoisedPairs, pair_gains, predict_pairs
from pso_utils.families.loading import ModelInfo
from pso_utils.losses import (
    HINGE_METRICS,
    OFFLINE_METRICS,
    PAIR_SETTINGS,
    denoising_error,
    hinge_pso_loss,
    offline_pso_loss,
)
from pso_utils.mdp import WEIGHTINGS, diffusion_inputs, forward_weights
from pso_utils.rewards import RewardSpec, parse_rewards
from pso_utils.run import arguments, hub, models
from pso_utils.run.accelerator import make_accelerator, on_main_process, one_line_errors
from pso_utils.run.checkpoints import Checkpoints, TrainingState, checkpoint_to_resume
from pso_utils.run.logs import start_logs
from pso_utils.run.optimizer import make_optimizer, optimizer_step, reduce_gradients
from pso_utils.run.pairs import add_pair_arguments, check_task_flags, draw_references, open_source
from pso_utils.run.result import save_card_and_pictures, save_lora
from pso_utils.run.validation import Validation
from pso_utils.schedules import Schedule


logger = get_logger(__name__)


# ---- Losses ----


def sigmoid_loss(family: Family, schedule: Schedule, weights: Tensor, pairs: NoisedPairs, args) -> tuple[Tensor, dict]:
    """PSO: one call of the model without gradient and LoRA, one with both."""
    gains, drift = pair_gains(family, schedule, weights, pairs)
    settings = {"beta": args.beta, "target_anchor": args.target_anchor, "reference_weight": args.reference_weight}
    loss, metrics = offline_pso_loss(*gains[:2], **settings)
    if args.class_anchor:
        # under the mdp weighting, the KL divergence of the class prompt's transitions from the base's
        loss = loss + args.class_anchor * drift[2]
        metrics["class_drift"] = drift[2].detach()
    return loss, metrics


def hinge_loss(family: Family, schedule: Schedule, weights: Tensor, pairs: NoisedPairs, args) -> tuple[Tensor, dict]:
    """The release's hinge, without the base: one call of the model."""
    step_index = (pairs.uniform * len(weights)).long()
    predicted = predict_pairs(family, schedule, pairs, step_index)
    errors = denoising_error(pairs.latents, predicted, weights[step_index])
    settings = {"reference_weight": args.reference_weight, "prior_loss_weight": args.prior_loss_weight}
    return hinge_pso_loss(*errors, beta=args.beta, **settings)


def diffusion_loss(
    family: Family, schedule: Schedule, weights: Tensor, pairs: NoisedPairs, args
) -> tuple[Tensor, dict]:
    """PSO's rival: the plain diffusion or flow-matching loss on the targets, over all training timesteps."""
    uniform = pairs.uniform
    if args.timestep_sampling == "logit_normal":
        uniform = torch.special.ndtri(uniform).sigmoid()
    timesteps = (uniform * len(schedule.train_alpha)).long()
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
        Without `weighting` it is "x0": all of the schedule's steps may be drawn.
    metrics: the names of its metrics (`loss` is one anyway), for a process that has no pairs and adds zeros.
    defaults: weighting -> what the flags are unless given; the first one that fits the schedule is the default
        weighting. None: by task, `TASK_DEFAULTS`.
    takes_references: whether pairs have references; else it takes the targets alone.
    method: what the model card calls it.
    """

    function: Callable[[Family, Schedule, Tensor, NoisedPairs, object], tuple[Tensor, dict[str, Tensor]]]
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
        # Their weighting is the error of what the model predicts: flow matching's velocity, else the noise.
        defaults=dict.fromkeys(
            ["velocity", "epsilon"], {"beta": 5.0, "reference_weight": 0.5, "prior_loss_weight": 0.5}
        ),
    ),
    "diffusion": Loss(
        diffusion_loss,
        flags=["timestep_sampling"],
        metrics=[],
        defaults={"x0": {"timestep_sampling": "uniform"}},
        takes_references=False,
        method="plain diffusion loss",
    ),
}

# What the flags of PSO's loss are unless given, by task and weighting: a task's own weighting comes first, the others
# are for who asks for them.
TASK_DEFAULTS = {
    "preference": {weighting: {**settings, "reference_weight": 1.0} for weighting, settings in PAIR_SETTINGS.items()},
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
    arguments.refuse_flags_of_others(args, "loss", {name: own.flags for name, own in LOSSES.items()})
    by_weighting = TASK_DEFAULTS[args.task] if loss.defaults is None else loss.defaults
    if "weighting" in loss.flags and args.weighting is None:
        args.weighting = next((name for name in by_weighting if fits_schedule(schedule, name)), None)
        if args.weighting is None:
            raise UserError(f"--loss {args.loss} has no default --weighting for this schedule: pass one")
    if args.loss == "diffusion" and schedule.train_alpha is None:
        raise UserError(f"--loss diffusion: {schedule.scheduler_name} has no training timesteps to draw: pass sigmoid")
    weighting = args.weighting or "x0"
    weights = forward_weights(schedule, weighting)
    defaults = {"reference_weight": 1.0, "target_anchor": 0.0} | by_weighting.get(weighting, {})
    defaults["class_anchor"] = CLASS_ANCHOR if args.task == "concept" else 0.0
    arguments.fill_defaults(args, [flag for flag in loss.flags if flag != "weighting"], defaults)
    return weights


def fits_schedule(schedule: Schedule, weighting: str) -> bool:
    try:
        forward_weights(schedule, weighting)
    except UserError:
        return False
    return True


# ---- Flags ----


EXAMPLE = (
    "accelerate launch train_pso_lora_sdxl.py --pretrained_model_name_or_path stabilityai/sdxl-turbo --resolution 512"
    " --num_inference_steps 4 --task style --train_data_dir drawings --output_dir turbo-style-lora"
)


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__, example=EXAMPLE)
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
    return arguments.list_defaults(flag, named)


def add_loss_arguments(parser):
    group = parser.add_argument_group("offline PSO")
    add, positive_int, non_negative_float = group.add_argument, arguments.positive_int, arguments.non_negative_float
    add("--loss", choices=LOSSES, default="sigmoid", help="sigmoid: PSO, relative to the base. hinge: without the "
        "base, as released for concepts. diffusion: the plain diffusion loss on the targets, PSO's rival.")  # fmt: skip
    add("--weighting", choices=WEIGHTINGS, help="Of the squared error of the clean latents: epsilon (alpha/sigma)^2, "
        "x0 1, velocity 1/sigma^2 (flow matching), mdp the exact KL divergence of the transitions. Default: mdp for "
        "preference (x0 where it does not fit the schedule), x0 for style and concept; of the hinge velocity for flow "
        "matching, else epsilon.")  # fmt: skip
    add("--timestep_sampling", choices=["uniform", "logit_normal"], help="diffusion: how training timesteps are drawn. "
        "Default: uniform.")  # fmt: skip
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
    arguments.check_logging_dir(args)
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
    set_loss_defaults(args, models.training_schedule(args, info, stochastic=False))
    models.check_eta(args, info, is_used=args.weighting == "mdp")
    models.deployment(args, info)
    return Plan(source, reward_specs, info, checkpoint_to_resume(args, info, lora_targets))


# ---- The run ----


@dataclass
class OfflineState(TrainingState):
    """`TrainingState` with the records that are done, and the best validation for early stopping."""

    position: int = 0  # records of the epoch that are done
    num_processes: int = 1  # among which they were dealt out
    num_broken: int = 0  # records that were left out so far for a broken image
    best_reward: float = -math.inf
    best_step: int = -1
    best_lora: dict[str, Tensor] | None = None  # here, so that a resumed run has that of its own checkpoint
    worse_validations: int = 0  # in a row, since the best
    recent_gains: list[list[float]] = field(default_factory=list)  # of targets and references, of the last steps
    was_warned: bool = False  # of repulsion


def check_stream_position(source: Table | Stream, state: OfflineState, num_processes: int) -> None:
    """Raises UserError where a run would go on within an epoch of a stream that was split among other processes: it
    would have some records again and others never."""
    if isinstance(source, Stream) and state.position and state.num_processes != num_processes:
        raise UserError(
            f"{source.name} --streaming: this epoch was begun by {state.num_processes} processes, and cannot go on with"
            f" {num_processes}: resume with {state.num_processes}, or drop --resume_from_checkpoint"
        )
    state.num_processes = num_processes


REPULSION_WINDOW, REPULSION_LIMIT = 20, 0.7  # optimizer steps; demo/README.md has where runs left the data


def watch_repulsion(args, state: OfflineState, sums: dict[str, float]) -> dict[str, float]:
    """`repulsion`, with the gains of this step's targets and references, which `sums` has of losses that have gains:
    how much of the margin that the pairs of the last steps show comes from the references' errors growing, and not from
    the targets' falling. A target's error can fall to 0, where the prediction is on the data; a reference's can grow
    without end, in any direction. Empty until there are enough steps, and without a margin. Warns once where it is
    high."""
    if not {"target_gain", "reference_gain"} <= sums.keys():
        return {}
    state.recent_gains = [*state.recent_gains, [sums["target_gain"], sums["reference_gain"]]][-REPULSION_WINDOW:]
    reference_weight = 1.0 if args.reference_weight is None else args.reference_weight
    target_gain, reference_gain = (sum(gains) for gains in zip(*state.recent_gains))
    margin = target_gain - reference_weight * reference_gain
    if len(state.recent_gains) < REPULSION_WINDOW or margin <= 0:
        return {}
    repulsion = -reference_weight * reference_gain / margin
    if args.task == "preference" and repulsion > REPULSION_LIMIT and not state.was_warned:
        state.was_warned = True
        logger.warning(
            f"repulsion is {repulsion:.2f}, above {REPULSION_LIMIT}: the losers are pushed away more than the"
            " winners are approached, and samples may leave the data. Lower --learning_rate, or raise --target_anchor"
        )
    return {"repulsion": repulsion}


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
    embed = models.make_prompt_cache(args, family)
    rewards = models.load_run_rewards(args, accelerator, reward_specs)
    schedule = models.training_schedule(args, info, stochastic=False, device=accelerator.device)
    deployment = models.deployment(args, info)
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
    references = None
    if entry.takes_references and not source.has_references:
        references = draw_references(args, accelerator, family, source, embed=embed, deployment=deployment)
    max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(len(source) / minibatch_size)
    max_epochs = args.num_train_epochs if args.max_train_steps is None else math.inf

    optimizer, lr_scheduler = make_optimizer(args, accelerator, parameters, max_train_steps)
    state = OfflineState()
    checkpoints = Checkpoints(
        accelerator, family, state, optimizer, lr_scheduler, args=args, max_train_steps=max_train_steps
    )
    checkpoints.load(checkpoint)
    check_stream_position(source, state, accelerator.num_processes)
    is_resumed = checkpoint is not None
    log = start_logs(accelerator, args, "pso_lora_sdxl", state, resumed=is_resumed)
    if isinstance(source, Table) and source.num_ties:
        logger.info(f"{source.num_ties} ties are left out, {len(source)} pairs are kept")
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    refresh_steps = args.reference_refresh_steps or max_train_steps + 1
    if references is not None:
        if args.reference_policy == "current":
            references.images.drop_after(state.global_step)
        drawing = bar(total=len(references.images.own_indices), desc="references")
        references.refresh(state.global_step - state.global_step % refresh_steps, drawing.update)
        drawing.close()
    prompts = args.validation_prompts or default_validation_prompts(args, source)
    cache = None
    if args.cache_latents:
        cache = LatentCache(Path(args.output_dir, "cache", "latents"), accelerator, family, loader)
        cache.fill()
        family.keep_vae_offloaded()
        logger.info("--cache_latents: the VAE is on the CPU except where it is used")
    if args.cache_prompts:
        # those of the references, too: a refresh embeds them again
        more_prompts = [*prompts, *([] if references is None else references.images.captions)]
        embed.encode_all([*more_prompts, *source.captions()], accelerator)
    training_pairs = TrainingPairs(
        family=family,
        loader=loader,
        embed=embed,
        cache=cache,
        references=references,
        takes_references=entry.takes_references,
        class_prompt=args.class_prompt if args.class_anchor else None,
    )
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
    is_done = state.global_step >= max_train_steps
    if validate.is_due(state):
        validate(state)
        is_done |= keep_best(args, accelerator, family, state, validate.values)

    logger.info(
        f"steps of {minibatch_size} pairs at timesteps {schedule.timesteps.tolist()}; loss {args.loss}"
        + "".join(f", {flag} {value}" for flag, value in loss_settings.items())
    )
    updates = bar(total=max_train_steps, initial=state.global_step, desc="updates", unit="step")
    while state.epoch < max_epochs and not is_done:
        first_step, start = state.global_step, state.position
        for minibatch in training_pairs.minibatches(state.epoch, state.position):
            num_own = sum(len(pairs.noise) for pairs in minibatch.microbatches)
            counts = {"pairs": num_own, "broken": minibatch.num_broken}
            counts = {name: torch.tensor(float(n), device=accelerator.device) for name, n in counts.items()}

            # How many pairs all processes have is known after the reduction only (images may be broken), so until then
            # the losses are divided by the nominal number, and afterwards the gradients are set right
            optimizer.zero_grad(set_to_none=False)
            sums = dict.fromkeys(["loss", *metric_names], torch.zeros((), device=accelerator.device))
            for pairs in minibatch.microbatches:
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

            is_done = state.global_step >= max_train_steps
            if references is not None and state.global_step % refresh_steps == 0 and not is_done:
                references.refresh(state.global_step)
            if checkpoints.is_due(state.global_step - 1) and not is_done:
                checkpoints.save()  # before the validation, which a resumed run makes up for
            if validate.is_due(state) and not is_done:
                validate(state)
                is_done = keep_best(args, accelerator, family, state, validate.values)
            if is_done:
                break
        if not is_done:  # the epoch is over
            if state.global_step == first_step and start == 0:
                raise UserError(f"{source.name} has no pair without a broken image: see --skip_broken_images")
            state.epoch, state.position = state.epoch + 1, 0
    updates.close()
    if isinstance(source, Stream) and source.num_ties:
        logger.info(f"{source.num_ties} ties were left out in the latest pass")
    if state.num_broken:
        logger.info(f"{state.num_broken} times a pair was left out because an image is broken (--skip_broken_images)")

    save_lora(args, accelerator, family, info=info, deployment=deployment)
    validate(state)
    keep_best(args, accelerator, family, state, validate.values)
    if args.early_stopping_patience and state.best_lora is not None and state.best_step != state.global_step:
        logger.info(f"the best LoRA was that of step {state.best_step}: it is the result")
        set_peft_model_state_dict(family.denoiser, state.best_lora)
        state.global_step = state.best_step
        save_lora(args, accelerator, family, info=info, deployment=deployment)
    settings = {
        "method": entry.method,
        "optimizer steps": state.global_step,
        "trained timesteps": "all" if args.loss == "diffusion" else schedule.timesteps.tolist(),
        "task": args.task,
        "loss": args.loss,
        **loss_settings,
        **{name: getattr(args, name) for name in ("learning_rate", "rank", "seed")},
        **models.card_settings(args, schedule),
    }
    save_card_and_pictures(args, accelerator, validate, state, info=info, settings=settings, repo_id=repo_id)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
