#!/usr/bin/env python
"""Online Pairwise Sample Optimization (PSO) of a few-step distilled model (arXiv 2410.03190).

Each epoch samples images for a batch of prompts, scores them with a reward, pairs the best with the worst image of
every prompt and raises the likelihood of the one against the other: sample, score, pair, update. What is trained is a
LoRA that the pipeline's `load_lora_weights` loads.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils.data.prompt_cache import PromptCache
from pso_utils.data.prompts import epoch_prompts, load_prompts
from pso_utils.errors import UserError
from pso_utils.families import Conditioning, Family
from pso_utils.families.loading import ModelInfo
from pso_utils.keyed_rng import keyed_noise, keyed_permutation
from pso_utils.losses import ONLINE_METRICS, online_pso_loss
from pso_utils.mdp import log_prob, sample_trajectory
from pso_utils.rewards import Rewards, RewardSpec, parse_rewards, select_pairs
from pso_utils.run import arguments, hub, models
from pso_utils.run.accelerator import make_accelerator, one_line_errors
from pso_utils.run.checkpoints import Checkpoints, TrainingState, checkpoint_to_resume
from pso_utils.run.logs import start_logs
from pso_utils.run.optimizer import (
    make_optimizer,
    optimizer_step,
    reduce_gradients,
    zero_gradients,
)
from pso_utils.run.result import save_card_and_pictures, save_lora
from pso_utils.run.validation import Validation
from pso_utils.schedules import Schedule


logger = get_logger(__name__)


# ---- Flags ----


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    arguments.add_prompt_arguments(parser)
    group = parser.add_argument_group("online PSO")
    arguments.add_online_reward_arguments(group)
    add, positive_int, positive_float = group.add_argument, arguments.positive_int, arguments.positive_float
    add("--samples_per_prompt", type=arguments.bounded(int, 2), default=2, help="K: images to pick a pair from.")
    add("--sample_batch_size", type=positive_int, default=2, help="Prompts sampled at once on each process, K "
        "images of each.")  # fmt: skip
    add("--sample_batches_per_epoch", type=positive_int, default=8, help="Batches of prompts in an epoch, on each "
        "process.")  # fmt: skip
    add("--num_inner_epochs", type=positive_int, default=1, help="Passes over the pairs of an epoch.")
    add("--train_timesteps", type=positive_int, help="How many of the N - 1 stochastic steps each pair is trained on, "
        "drawn at random for each pair. Default: all.")  # fmt: skip
    add("--train_batch_size", type=positive_int, default=2, help="Pairs in a call of the model, on each process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of pairs in an optimizer step.")
    add("--num_train_epochs", type=positive_int, default=100, help="Outer epochs, unless --max_train_steps is given.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps to stop after. One optimizer step is "
        "gradient_accumulation_steps x train_batch_size pairs on each process x train_timesteps.")  # fmt: skip
    add("--beta", type=positive_float, default=50.0, help="Strength of the preference: the loss is "
        "-log sigmoid(beta (log-ratio of target - log-ratio of reference)).")  # fmt: skip
    add("--clip_range", type=arguments.bounded(float, 0, low_included=False, high=0.999), default=0.1, help="The "
        "likelihood ratios are clamped to 1 - clip_range .. 1 + clip_range.")  # fmt: skip
    add("--max_tie_epochs", type=positive_int, default=3, help="Stop after so many epochs of nothing but ties.")
    arguments.add_lora_arguments(parser)
    arguments.add_optimizer_arguments(parser)
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
    stochastic_steps = models.training_schedule(args, info.family, info.scheduler, stochastic=True).num_steps - 1
    models.deployment(args, info.family, info.scheduler)
    if args.train_timesteps is not None and args.train_timesteps > stochastic_steps:
        raise UserError(
            f"--train_timesteps {args.train_timesteps}: a schedule of {stochastic_steps + 1} steps has"
            f" {stochastic_steps} to train on (the last adds no noise): pass at most {stochastic_steps}"
        )
    return Plan(prompts, reward_specs, info, checkpoint_to_resume(args, info, lora_targets))


# ---- Sample, score, pair ----


class Pairs(NamedTuple):
    """P pairs, all of this process; `latents[:, 0]` is the target's trajectory, `latents[:, 1]` the reference's."""

    latents: Tensor  # [P, 2, N + 1, C, h, w], float32
    conditioning: Conditioning  # of P prompts
    step_index: Tensor  # [P, T], the steps that each pair is trained on


def draw_step_index(keys: list[tuple[int, ...]], *, num_steps: int, num_trained: int) -> Tensor:
    """`num_trained` different stochastic steps [P, T] for each key, ascending; the last step, N - 1, has no noise."""
    return keyed_noise(keys, (num_steps - 1,)).argsort(dim=1)[:, :num_trained].sort(dim=1).values


def score_samples(family: Family, rewards: Rewards, latents: Tensor, prompts: list[str]) -> Tensor:
    """Scores [R, P, K] of the images that the trajectories [P, K, N + 1, C, h, w] of P prompts end in."""
    images = family.decode_latents(latents[:, :, -1].flatten(0, 1))
    scores = rewards(images, [prompt for prompt in prompts for _ in range(latents.shape[1])])
    return scores.unflatten(1, latents.shape[:2])


def score_metrics(names: list[str], weights: Tensor, scores: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the weighted reward, and of each if there are several; scores [P, R, K]."""
    scores = scores.cpu().transpose(0, 1).flatten(1)  # [R, P * K]
    rows = {"reward": (weights[:, None] * scores).sum(dim=0)}
    if len(names) > 1:
        rows |= {f"reward/{name}": row for name, row in zip(names, scores)}
    means = {f"{name}_mean": row.mean().item() for name, row in rows.items()}
    return means | {f"{name}_std": row.std().item() for name, row in rows.items()}


# ---- Update ----


class Minibatch(NamedTuple):
    """The pairs of an optimizer step."""

    index: Tensor  # [b], which of this process's pairs; b may be 0
    count: int  # pairs on all processes


def draw_minibatches(
    seed: int, epoch: int, inner_epoch: int, num_pairs: list[int], *, rank: int, per_rank: int
) -> Iterator[Minibatch]:
    """An inner epoch's minibatches: a permutation of the pairs of each process, of which there are `num_pairs` by rank,
    cut after every `per_rank`. The last ones may be smaller, and nothing carries over."""
    order = keyed_permutation((seed, epoch, -1 - inner_epoch), num_pairs[rank])
    for start in range(0, max(num_pairs), per_rank):
        count = sum(min(max(total - start, 0), per_rank) for total in num_pairs)
        yield Minibatch(order[start : start + per_rank], count)


def microbatches(minibatch: Minibatch, batch_size: int) -> list[Tensor]:
    """The pairs [b] of each call of the model; none where this process has no pairs."""
    return [index for index in minibatch.index.split(batch_size) if len(index)]


def pair_log_probs(family: Family, schedule: Schedule, pairs: Pairs, index: Tensor, column: int) -> Tensor:
    """Log-probabilities [2, b] of the targets and references of the pairs `index` [b], each at step_index[:, column].

    One call of the model: the b targets and the b references are one batch of 2b.
    """
    latents = pairs.latents[index].transpose(0, 1).flatten(0, 1)  # [2b, N + 1, C, h, w]
    step_index = pairs.step_index[index, column].repeat(2)
    at = step_index[:, None, None, None, None]
    sample, next_sample = (torch.take_along_dim(latents, at + n, dim=1).squeeze(1) for n in (0, 1))
    steps = schedule.at(step_index)
    conditioning = pairs.conditioning.rows(index.repeat(2))
    model_output = family.predict(steps.columns.input_scale * sample, steps.timesteps, conditioning)
    return log_prob(steps, model_output, sample, next_sample).view(2, -1)


# ---- The run ----


def run(args):
    prompts, reward_specs, info, checkpoint = check_arguments(args)
    accelerator = make_accelerator(args)
    logger.setLevel("INFO")
    repo_id = hub.create_hub_repository(accelerator, args)

    # The models
    family = models.load_family(args, accelerator, info)
    parameters = models.add_trained_lora(args, accelerator, family)
    embed = PromptCache(family)
    rewards = models.load_run_rewards(args, accelerator, reward_specs)
    schedule = models.training_schedule(
        args, family, family.pipeline.scheduler, stochastic=True, device=accelerator.device
    )
    deployment = models.deployment(args, family, family.pipeline.scheduler)
    num_trained = args.train_timesteps or schedule.num_steps - 1
    size = (args.resolution, args.resolution)
    noise_shape = (schedule.num_steps + 1, *family.latent_shape(*size))

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
    if validate.is_due(state):
        validate(state)

    logger.info(
        f"{len(prompts)} prompts; epochs of {epoch_size} prompts x {args.samples_per_prompt} samples and at most"
        f" {epoch_steps} optimizer steps; steps at timesteps {schedule.timesteps.tolist()}, {num_trained} trained"
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
        sampling = bar(total=len(batches) * schedule.num_steps, desc="sampling", leave=False)
        trajectories = []  # of each batch of P prompts, [P, K, N + 1, C, h, w]
        for batch in batches:
            samples = [(prompt, k) for prompt in prompt_indices[batch] for k in range(args.samples_per_prompt)]
            noise = keyed_noise([(args.seed, state.epoch, *sample) for sample in samples], noise_shape)
            repeated = conditioning.rows(batch).repeat_interleave(args.samples_per_prompt)
            denoise = partial(family.predict, conditioning=repeated)
            latents = sample_trajectory(schedule, denoise, noise, sampling.update)
            trajectories.append(latents.unflatten(0, (-1, args.samples_per_prompt)))
            checkpoints.stop_if_interrupted()
        sampling.close()

        # Score, and keep a pair of each prompt: the rest of its samples is not needed any more
        kept, rows, scores = [], [], []
        with family.parts_loaded(), rewards.loaded():
            for batch, latents in zip(batches, trajectories):
                scores.append(score_samples(family, rewards, latents, own_prompts[batch]))  # [R, P, K]
                selection = select_pairs(scores[-1], rewards.weights, args.reward_combination)
                row = (~selection.tie).nonzero().flatten()
                targets, references = latents[row, selection.target[row]], latents[row, selection.reference[row]]
                kept.append(torch.stack([targets, references], dim=1))
                rows.append(row + batch.start)
        del trajectories, latents

        # Pair
        rows, scores = torch.cat(rows).to(accelerator.device), torch.cat(scores, dim=1).to(accelerator.device)
        step_index = draw_step_index(
            [(args.seed, state.epoch, prompt_index) for prompt_index in prompt_indices],
            num_steps=schedule.num_steps,
            num_trained=num_trained,
        ).to(accelerator.device)
        pairs = Pairs(torch.cat(kept), conditioning.rows(rows), step_index[rows])
        num_pairs = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()  # by rank
        scores = accelerator.gather(scores.transpose(0, 1).contiguous())
        epoch_metrics = {
            "epoch": state.epoch,
            "ties": epoch_size - sum(num_pairs),
            "tie_epochs": state.tie_epochs,
            **score_metrics(rewards.names, rewards.weights, scores),
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
            Minibatch(index.to(accelerator.device), count)
            for inner_epoch in range(args.num_inner_epochs)
            for index, count in draw_minibatches(
                args.seed, state.epoch, inner_epoch, num_pairs, rank=accelerator.process_index, per_rank=pairs_per_rank
            )
        ]
        is_cut_short = len(minibatches) > max_train_steps - state.global_step
        minibatches = minibatches[: max_train_steps - state.global_step]

        # The base's log-probabilities do not change while the LoRA is trained, so one pass serves all inner epochs. Its
        # batches are those of the first one: the same rounding on both sides keeps a new LoRA's ratios at exactly 1.
        base_log_prob = torch.zeros(2, *pairs.step_index.shape, device=accelerator.device)
        with torch.no_grad(), family.without_lora():
            for minibatch in minibatches[: math.ceil(max(num_pairs) / pairs_per_rank)]:
                for index in microbatches(minibatch, args.train_batch_size):
                    for column in range(num_trained):
                        base_log_prob[:, index, column] = pair_log_probs(family, schedule, pairs, index, column)

        for minibatch in minibatches:
            zero_gradients(parameters)
            sums = dict.fromkeys(ONLINE_METRICS, torch.zeros((), device=accelerator.device))
            count = minibatch.count * num_trained
            for index in microbatches(minibatch, args.train_batch_size):
                for column in range(num_trained):
                    policy_log_prob = pair_log_probs(family, schedule, pairs, index, column)
                    log_ratio = policy_log_prob - base_log_prob[:, index, column]
                    loss, metrics = online_pso_loss(*log_ratio, beta=args.beta, clip_range=args.clip_range)
                    accelerator.backward(loss.sum() / count)
                    sums = {name: total + metrics[name].sum() for name, total in sums.items()}
            sums = reduce_gradients(accelerator, parameters, sums)
            metrics = {name: total / count for name, total in sums.items()}
            metrics |= optimizer_step(
                accelerator, optimizer, lr_scheduler, parameters, max_grad_norm=args.max_grad_norm
            )
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
            validate(state)
    updates.close()

    save_lora(args, accelerator, family)
    validate(state)
    names = ["reward_combination", "beta", "clip_range", "samples_per_prompt", "learning_rate", "rank", "seed"]
    settings = {
        "method": "online PSO",
        "reward": ", ".join(args.reward),
        "optimizer steps": state.global_step,
        "trained timesteps": schedule.timesteps.tolist(),
        **{name: getattr(args, name) for name in names},
    }
    save_card_and_pictures(args, accelerator, validate, state, settings=settings, repo_id=repo_id)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
