#!/usr/bin/env python
"""Online Pairwise Sample Optimization (PSO) of a few-step distilled model (arXiv 2410.03190).

Each epoch samples images for a batch of prompts, scores them with a reward, pairs the best with the worst image of
every prompt and raises the likelihood of the one against the other: sample, score, pair, update. What is trained is a
LoRA that the pipeline's `load_lora_weights` loads.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.data.prompts import epoch_prompts, load_prompts
from pso_utils.errors import UserError
from pso_utils.families import Conditioning, Deployment, Family
from pso_utils.families.denoising import NoisedPairs, pair_gains
from pso_utils.families.loading import ModelInfo
from pso_utils.keyed_rng import keyed_noise, keyed_permutation, keyed_seed, keyed_uniform
from pso_utils.losses import OFFLINE_METRICS, ONLINE_METRICS, PAIR_SETTINGS, offline_pso_loss, online_pso_loss
from pso_utils.mdp import WEIGHTINGS, forward_weights, log_prob, sample_trajectory
from pso_utils.rewards import Rewards, RewardSpec, parse_rewards, score_metrics, select_pairs, within_group_deviation
from pso_utils.run import arguments, hub, models
from pso_utils.run.accelerator import make_accelerator, on_main_process, one_line_errors
from pso_utils.run.averaging import Average
from pso_utils.run.checkpoints import Checkpoints, TrainingState, checkpoint_to_resume
from pso_utils.run.logs import start_logs
from pso_utils.run.optimizer import make_optimizer, optimizer_step, reduce_gradients
from pso_utils.run.result import save_card_and_pictures, save_lora
from pso_utils.run.validation import Validation
from pso_utils.schedules import Schedule


logger = get_logger(__name__)


# ---- Objectives ----


class Objective(NamedTuple):
    """flags: which of the objectives' flags it reads; the others are refused. defaults: what they are unless given, by
    weighting; the first one is the default weighting, "" is none. metrics: the names of its loss's."""

    flags: Sequence[str]
    defaults: dict[str, dict[str, float]]
    metrics: Sequence[str]


OBJECTIVES = {
    "transition": Objective(
        ["beta", "clip_range", "train_timesteps"], {"": {"beta": 50.0, "clip_range": 0.1}}, ONLINE_METRICS
    ),
    "denoising": Objective(
        ["weighting", "beta", "target_anchor"],
        {weighting: PAIR_SETTINGS[weighting] for weighting in ("x0", "mdp", "epsilon")},
        (*OFFLINE_METRICS, "base_distance"),
    ),
}


def defaults_text(flag: str) -> str:
    """A flag's default under each objective and weighting, for the help."""
    return arguments.list_defaults(
        flag,
        [
            (" ".join(filter(None, (name, weighting))), values)
            for name, objective in OBJECTIVES.items()
            for weighting, values in objective.defaults.items()
        ],
    )


def set_objective_defaults(args, schedule: Schedule) -> Tensor | None:
    """Fills in the flags of the objective that were not given; returns the weights [M] of the steps that the denoising
    objective may draw.

    Raises:
        UserError: a flag of another objective, or a weighting that does not fit the schedule or has no defaults here.
    """
    arguments.refuse_flags_of_others(args, "objective", {name: own.flags for name, own in OBJECTIVES.items()})
    objective, weights = OBJECTIVES[args.objective], None
    if "weighting" in objective.flags:
        args.weighting = args.weighting or next(iter(objective.defaults))
        weights = forward_weights(schedule, args.weighting)
    with_default = [flag for flag in objective.flags if flag not in ("weighting", "train_timesteps")]
    arguments.fill_defaults(args, with_default, objective.defaults.get(args.weighting or "", {}))
    return weights


# ---- Flags ----


EXAMPLE = (
    "accelerate launch train_pso_online.py --pretrained_model_name_or_path stabilityai/sdxl-turbo --resolution 512"
    " --num_inference_steps 4 --prompts prompts.txt --reward pickscore --output_dir turbo-lora"
)


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__, example=EXAMPLE)
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    arguments.add_prompt_arguments(parser)
    group = parser.add_argument_group("online PSO")
    arguments.add_online_reward_arguments(group)
    add, positive_int, positive_float = group.add_argument, arguments.positive_int, arguments.positive_float
    add("--objective", choices=OBJECTIVES, default="transition", help="transition: the paper's, the likelihood of the "
        "sampled transitions. denoising: samples are drawn as deployed, by any sampler and at one step too, and are "
        "trained on as pairs of images at the schedule's noise levels.")  # fmt: skip
    add("--samples_per_prompt", type=arguments.bounded(int, 2), default=2, help="K: images to pick a pair from.")
    add("--sample_batch_size", type=positive_int, default=2, help="Prompts sampled at once on each process, K "
        "images of each.")  # fmt: skip
    add("--sample_batches_per_epoch", type=positive_int, default=8, help="Batches of prompts in an epoch, on each "
        "process.")  # fmt: skip
    add("--num_inner_epochs", type=positive_int, default=1, help="Passes over the pairs of an epoch.")
    add("--train_timesteps", type=positive_int, help="transition: how many of the N - 1 stochastic steps each pair is "
        "trained on, drawn at random for each pair. Default: all.")  # fmt: skip
    add("--train_batch_size", type=positive_int, default=2, help="Pairs in a call of the model, on each process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of pairs in an optimizer step.")
    add("--num_train_epochs", type=positive_int, default=100, help="Outer epochs, unless --max_train_steps is given.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps to stop after. One optimizer step is "
        "gradient_accumulation_steps x train_batch_size pairs on each process x train_timesteps.")  # fmt: skip
    add("--beta", type=positive_float, help="Strength of the preference: the loss is -log sigmoid(beta (value of "
        "target - value of reference)), the value being a log-ratio of likelihoods (transition) or the fall of a "
        f"denoising error (denoising). Default: {defaults_text('beta')}.")  # fmt: skip
    add("--clip_range", type=arguments.bounded(float, 0, low_included=False, high=0.999), help="transition: the "
        "likelihood ratios are clamped to 1 - clip_range .. 1 + clip_range. Default: 0.1.")  # fmt: skip
    add("--weighting", choices=WEIGHTINGS, help="denoising: of the squared error of the clean latents, as offline. mdp "
        "leaves out the last step. Default: x0.")  # fmt: skip
    add("--target_anchor", type=arguments.non_negative_float, help="denoising: weight of relu(growth of the target's "
        f"error), which keeps samples on the data. Default: {defaults_text('target_anchor')}.")  # fmt: skip
    add("--max_tie_epochs", type=positive_int, default=3, help="Stop after so many epochs of nothing but ties.")
    arguments.add_lora_arguments(parser)
    arguments.add_optimizer_arguments(parser)
    add("--use_ema", action="store_true", help="Validate and save an exponential moving average of the LoRA; the LoRA "
        "itself goes to not_averaged/ in --output_dir.")  # fmt: skip
    arguments.add_run_arguments(parser, output_dir="pso-online-lora")
    return parser.parse_args(argv)


class Plan(NamedTuple):
    """What the flags and the files tell, checked before a model is loaded."""

    prompts: list[str]
    rewards: list[RewardSpec]
    model: ModelInfo
    checkpoint: Path | None  # to resume from; None: a new run


def check_arguments(args) -> Plan:
    arguments.check_output_dir(args.output_dir)
    arguments.check_logging_dir(args)
    arguments.check_packages(args)
    arguments.check_idle_flags(args)
    prompts = load_prompts(
        args.prompts,
        dataset_name=args.dataset_name,
        caption_column=args.caption_column,
        max_train_samples=args.max_train_samples,
        config_name=args.dataset_config_name,
        split=args.dataset_split,
        cache_dir=args.cache_dir,
        num_workers=args.dataloader_num_workers,
    )
    reward_specs = parse_rewards(args.reward, args.reward_model)
    info = models.check_model(args)
    lora_targets = models.check_lora(args, info)
    is_transition = args.objective == "transition"
    schedule = models.training_schedule(args, info, stochastic=is_transition)
    set_objective_defaults(args, schedule)
    models.check_eta(args, info, is_used=is_transition or args.weighting == "mdp")
    stochastic_steps = schedule.num_steps - 1
    models.deployment(args, info)
    if args.train_timesteps is not None and args.train_timesteps > stochastic_steps:
        raise UserError(
            f"--train_timesteps {args.train_timesteps}: a schedule of {stochastic_steps + 1} steps has"
            f" {stochastic_steps} to train on (the last adds no noise): pass at most {stochastic_steps}"
        )
    return Plan(prompts, reward_specs, info, checkpoint_to_resume(args, info, lora_targets))


# ---- Sample, score, pair ----


class Pairs(NamedTuple):
    """P pairs, all of this process; `latents[:, 0]` are the target's, `latents[:, 1]` the reference's: the latents of
    its trajectory, or the last ones alone."""

    latents: Tensor  # [P, 2, N + 1 or 1, C, h, w], float32
    conditioning: Conditioning  # of P prompts


def sample(
    family: Family,
    conditioning: Conditioning,
    keys: list[tuple[int, ...]],
    *,
    schedule: Schedule | None,
    deployment: Deployment,
    progress: Callable[[], object],
) -> Tensor:
    """Latents [B, N + 1, C, h, w] of trajectories over the `schedule`, or without one the last latents [B, 1, C, h, w]
    of what the pipeline draws at `deployment`, of B prompts, each with the noise of its key."""
    if schedule is None:
        seeds = [keyed_seed(key) for key in keys]
        latents = family.draw_latents(conditioning, seeds, deployment=deployment, batch_size=len(seeds))
        progress()
        return latents.unsqueeze(1)
    shape = family.latent_shape(deployment.height, deployment.width)
    noise = keyed_noise(keys, (schedule.num_steps + 1, *shape))
    return sample_trajectory(schedule, partial(family.predict, conditioning=conditioning), noise, progress)


def draw_step_index(keys: list[tuple[int, ...]], *, num_steps: int, num_trained: int) -> Tensor:
    """`num_trained` different stochastic steps [P, T] for each key, ascending; the last step, N - 1, has no noise."""
    return keyed_noise(keys, (num_steps - 1,)).argsort(dim=1)[:, :num_trained].sort(dim=1).values


def draw_noise_levels(keys: list[tuple[int, ...]], inner_epoch: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise [P, *shape], and uniform draws [P] of a noise level, for each key in this inner epoch."""
    # the samples of a prompt have the keys (*key, 0) on
    keys = [(*key, -1 - inner_epoch) for key in keys]
    return keyed_noise(keys, shape), keyed_uniform([(*key, 0) for key in keys])


def score_samples(family: Family, rewards: Rewards, latents: Tensor, prompts: list[str]) -> Tensor:
    """Scores [R, P, K] of the images of the latents [P, K, C, h, w], K of each of P prompts."""
    images = family.decode_latents(latents.flatten(0, 1))
    scores = rewards(images, [prompt for prompt in prompts for _ in range(latents.shape[1])])
    return scores.unflatten(1, latents.shape[:2])


# ---- Update ----


class Minibatch(NamedTuple):
    """The pairs of an optimizer step."""

    index: Tensor  # [b], which of this process's pairs; b may be 0
    count: int  # pairs on all processes
    inner_epoch: int


def draw_minibatches(
    seed: int, epoch: int, inner_epoch: int, num_pairs: list[int], *, rank: int, per_rank: int
) -> Iterator[Minibatch]:
    """An inner epoch's minibatches: a permutation of the pairs of each process, of which there are `num_pairs` by rank,
    cut after every `per_rank`. The last ones may be smaller, and nothing carries over."""
    order = keyed_permutation((seed, epoch, -1 - inner_epoch), num_pairs[rank])
    for start in range(0, max(num_pairs), per_rank):
        count = sum(min(max(total - start, 0), per_rank) for total in num_pairs)
        yield Minibatch(order[start : start + per_rank], count, inner_epoch)


def microbatches(minibatch: Minibatch, batch_size: int) -> list[Tensor]:
    """The pairs [b] of each call of the model; none where this process has no pairs."""
    return [index for index in minibatch.index.split(batch_size) if len(index)]


def pair_log_probs(family: Family, schedule: Schedule, pairs: Pairs, index: Tensor, step_index: Tensor) -> Tensor:
    """Log-probabilities [2, b] of the transitions of the pairs `index` [b], targets and references, at the steps
    `step_index` [b].

    One call of the model: the b targets and the b references are one batch of 2b.
    """
    latents = pairs.latents[index].transpose(0, 1).flatten(0, 1)  # [2b, N + 1, C, h, w]
    step_index = step_index.repeat(2)
    at = step_index[:, None, None, None, None]
    sample, next_sample = (torch.take_along_dim(latents, at + n, dim=1).squeeze(1) for n in (0, 1))
    steps = schedule.at(step_index)
    conditioning = pairs.conditioning.rows(index.repeat(2))
    model_output = family.predict(steps.columns.input_scale * sample, steps.timesteps, conditioning)
    return log_prob(steps, model_output, sample, next_sample).view(2, -1)


def noised_pairs(pairs: Pairs, index: Tensor, noise: Tensor, uniform: Tensor) -> NoisedPairs:
    """The images of the pairs `index` [b] with these draws of all pairs, noise [P, C, h, w] and uniform [P]."""
    latents = pairs.latents[index, :, -1].transpose(0, 1)
    return NoisedPairs(latents, noise[index], uniform[index], pairs.conditioning.rows(index.repeat(2)))


# ---- The run ----


def run(args):
    prompts, reward_specs, info, checkpoint = check_arguments(args)
    accelerator = make_accelerator(args)
    logger.setLevel("INFO")
    repo_id = hub.create_hub_repository(accelerator, args)

    # The models
    family = models.load_family(args, accelerator, info)
    parameters = models.add_trained_lora(args, accelerator, family)
    embed = models.make_prompt_cache(args, family)
    rewards = models.load_run_rewards(args, accelerator, reward_specs)
    objective, is_transition = OBJECTIVES[args.objective], args.objective == "transition"
    schedule = models.training_schedule(args, info, stochastic=is_transition, device=accelerator.device)
    deployment = models.deployment(args, info)
    weights = set_objective_defaults(args, schedule)
    objective_settings = {flag: getattr(args, flag) for flag in objective.flags if getattr(args, flag) is not None}
    num_trained = (args.train_timesteps or schedule.num_steps - 1) if is_transition else 1
    size = (args.resolution, args.resolution)
    latent_shape = family.latent_shape(*size)

    # Sizes: prompts of an epoch on one process and on all, pairs of an optimizer step on one process
    prompts_per_rank = args.sample_batch_size * args.sample_batches_per_epoch
    epoch_size = prompts_per_rank * accelerator.num_processes
    pairs_per_rank = args.train_batch_size * args.gradient_accumulation_steps
    epoch_steps = math.ceil(prompts_per_rank / pairs_per_rank) * args.num_inner_epochs
    max_train_steps = args.max_train_steps or args.num_train_epochs * epoch_steps
    max_epochs = args.num_train_epochs if args.max_train_steps is None else math.inf

    optimizer, lr_scheduler = make_optimizer(args, accelerator, parameters, max_train_steps)
    state = TrainingState()
    checkpoints = Checkpoints(
        accelerator, family, state, optimizer, lr_scheduler, args=args, max_train_steps=max_train_steps
    )
    checkpoints.load(checkpoint)
    average = Average(parameters, state, is_used=args.use_ema)
    is_resumed = checkpoint is not None
    log = start_logs(accelerator, args, "pso_online", state, resumed=is_resumed)
    validate = Validation(
        args,
        accelerator,
        family,
        embed,
        prompts=args.validation_prompts or list(dict.fromkeys(prompts))[:4],
        deployment=deployment,
        batch_size=args.sample_batch_size * args.samples_per_prompt,
        rewards=rewards,
        log=log,
    )
    if args.cache_prompts:
        embed.encode_all([*prompts, *validate.prompts], accelerator)
    if validate.is_due(state):
        with average.applied():
            validate(state)

    logger.info(
        f"{len(prompts)} prompts; epochs of {epoch_size} prompts x {args.samples_per_prompt} samples and at most"
        f" {epoch_steps} optimizer steps; {args.objective} at timesteps {schedule.timesteps.tolist()}, {num_trained} of"
        " them for each pair and pass; " + ", ".join(f"{flag} {value}" for flag, value in objective_settings.items())
    )
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    updates = bar(total=max_train_steps, initial=state.global_step, desc="updates", unit="step")
    while state.epoch < max_epochs and state.global_step < max_train_steps:
        checkpoints.keep()
        first_step, start_time = state.global_step, time.perf_counter()
        first_index = accelerator.process_index * prompts_per_rank
        prompt_indices = range(first_index, first_index + prompts_per_rank)  # among the epoch's, on all processes
        drawn_prompts = epoch_prompts(prompts, seed=args.seed, epoch=state.epoch, count=epoch_size)
        own_prompts = [drawn_prompts[prompt_index] for prompt_index in prompt_indices]
        conditioning = family.collate(embed(own_prompts), *size)
        batches = [slice(n, n + args.sample_batch_size) for n in range(0, prompts_per_rank, args.sample_batch_size)]

        # Sample
        sampling = bar(total=len(batches) * (schedule.num_steps if is_transition else 1), desc="sampling", leave=False)
        trajectories = []
        for batch in batches:
            keys = [
                (args.seed, state.epoch, prompt, k)
                for prompt in prompt_indices[batch]
                for k in range(args.samples_per_prompt)
            ]
            latents = sample(
                family,
                conditioning.rows(batch).repeat_interleave(args.samples_per_prompt),
                keys,
                schedule=schedule if is_transition else None,
                deployment=deployment,
                progress=sampling.update,
            )
            trajectories.append(latents.unflatten(0, (-1, args.samples_per_prompt)))
            checkpoints.stop_if_interrupted()
        trajectories = torch.cat(trajectories)  # [P, K, N + 1 or 1, C, h, w], of the P prompts of this process
        sampling.close()

        # Score the images that the trajectories end in
        scores = []
        with family.parts_loaded(), rewards.loaded():
            for batch in batches:
                scores.append(score_samples(family, rewards, trajectories[batch, :, -1], own_prompts[batch]))
        scores = torch.cat(scores, dim=1)  # [R, P, K]

        # Pair two samples of each prompt, unless they tie; the others are not needed any more. Every process selects
        # for the prompts of all and keeps its own.
        all_scores = accelerator.gather(scores.transpose(0, 1).contiguous().to(accelerator.device))
        all_scores = all_scores.transpose(0, 1).cpu()
        selection_weights = rewards.weights / within_group_deviation(all_scores)
        selection = select_pairs(all_scores, selection_weights, args.reward_combination)
        num_pairs = (~selection.tie).view(accelerator.num_processes, -1).sum(dim=1).tolist()  # by rank
        own = slice(first_index, first_index + prompts_per_rank)
        sample_index = torch.stack([selection.target, selection.reference], dim=1)[own]
        paired = (~selection.tie[own]).nonzero().flatten()  # which of the own prompts have a pair
        sample_index, paired = sample_index[paired].to(accelerator.device), paired.to(accelerator.device)
        pairs = Pairs(trajectories[paired[:, None], sample_index], conditioning.rows(paired))
        del trajectories
        epoch_metrics = {
            "epoch": state.epoch,
            "ties": epoch_size - sum(num_pairs),
            "tie_epochs": state.tie_epochs,
            **score_metrics(rewards.names, rewards.weights, all_scores, selection),
            "images_per_second": epoch_size * args.samples_per_prompt / (time.perf_counter() - start_time),
        }
        state.tie_epochs = 0 if sum(num_pairs) else state.tie_epochs + 1
        if state.tie_epochs >= args.max_tie_epochs:
            if state.global_step > 0:
                checkpoints.save()
            raise UserError(
                f"{state.tie_epochs} epochs in a row had nothing but ties (--max_tie_epochs): the reward tells no"
                " samples of a prompt apart; use another --reward or --reward_combination, or more --samples_per_prompt"
            )

        # Update
        minibatches = [
            minibatch._replace(index=minibatch.index.to(accelerator.device))
            for inner_epoch in range(args.num_inner_epochs)
            for minibatch in draw_minibatches(
                args.seed, state.epoch, inner_epoch, num_pairs, rank=accelerator.process_index, per_rank=pairs_per_rank
            )
        ]
        is_cut_short = len(minibatches) > max_train_steps - state.global_step
        minibatches = minibatches[: max_train_steps - state.global_step]

        keys = [(args.seed, state.epoch, prompt_indices[row]) for row in paired.tolist()]
        if is_transition:
            step_index = draw_step_index(keys, num_steps=schedule.num_steps, num_trained=num_trained)
            step_index = step_index.to(accelerator.device)  # [P, T]
            # The base's log-probabilities do not change while the LoRA is trained, so one pass serves all inner epochs.
            # Its batches are those of the first one: the same rounding on both sides keeps a new LoRA's ratios at
            # exactly 1.
            base_log_prob = torch.zeros(2, *step_index.shape, device=accelerator.device)
            with torch.no_grad(), family.without_lora():
                for minibatch in minibatches[: math.ceil(max(num_pairs) / pairs_per_rank)]:
                    for index in microbatches(minibatch, args.train_batch_size):
                        for column in range(num_trained):
                            at = step_index[index, column]
                            base_log_prob[:, index, column] = pair_log_probs(family, schedule, pairs, index, at)
        else:
            draws = [draw_noise_levels(keys, n, latent_shape) for n in range(args.num_inner_epochs)]
            draws = [(noise.to(accelerator.device), uniform.to(accelerator.device)) for noise, uniform in draws]

        for minibatch in minibatches:
            optimizer.zero_grad(set_to_none=False)
            sums = dict.fromkeys(objective.metrics, torch.zeros((), device=accelerator.device))
            count = minibatch.count * num_trained
            for index in microbatches(minibatch, args.train_batch_size):
                for column in range(num_trained):
                    if is_transition:
                        policy_log_prob = pair_log_probs(family, schedule, pairs, index, step_index[index, column])
                        log_ratio = policy_log_prob - base_log_prob[:, index, column]
                        loss, metrics = online_pso_loss(*log_ratio, beta=args.beta, clip_range=args.clip_range)
                    else:
                        noised = noised_pairs(pairs, index, *draws[minibatch.inner_epoch])
                        gains, drift = pair_gains(family, schedule, weights, noised)
                        loss, metrics = offline_pso_loss(*gains, beta=args.beta, target_anchor=args.target_anchor)
                        metrics["base_distance"] = drift.detach().mean(dim=0)
                    accelerator.backward(loss.sum() / count)
                    sums = {name: total + metrics[name].sum() for name, total in sums.items()}
            sums = reduce_gradients(accelerator, parameters, sums)
            metrics = {name: total / count for name, total in sums.items()}
            metrics |= optimizer_step(
                accelerator, optimizer, lr_scheduler, parameters, max_grad_norm=args.max_grad_norm
            )
            average.step()
            state.global_step += 1
            log(state.global_step, metrics | epoch_metrics)  # the epoch's own go with its first optimizer step
            epoch_metrics = {}
            updates.update()
            updates.set_postfix(loss=metrics["loss"], accuracy=metrics["pair_accuracy"])
            checkpoints.stop_if_interrupted()
        state.epoch += 1

        # The state is complete between two epochs, so this is where a checkpoint can be taken: before the validation,
        # which a resumed run makes up for
        if checkpoints.is_due(first_step) and not is_cut_short:
            checkpoints.save()
        is_last = state.epoch >= max_epochs or state.global_step >= max_train_steps
        if validate.is_due(state) and not is_last:
            with average.applied():
                validate(state)
    updates.close()

    if args.use_ema:
        on_main_process(accelerator, lambda: family.save_lora(Path(args.output_dir, "not_averaged")))
    average.take_over()
    save_lora(args, accelerator, family, info=info, deployment=deployment)
    validate(state)
    names = ["reward_combination", "samples_per_prompt", "learning_rate", "rank", "seed"]
    settings = {
        "method": "online PSO",
        "objective": args.objective,
        "reward": ", ".join(args.reward),
        "optimizer steps": state.global_step,
        "trained timesteps": schedule.timesteps.tolist(),
        **objective_settings,
        **{name: getattr(args, name) for name in names},
        **({"average": "exponential moving"} if args.use_ema else {}),
        **models.card_settings(args, schedule),
    }
    save_card_and_pictures(args, accelerator, validate, state, info=info, settings=settings, repo_id=repo_id)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
