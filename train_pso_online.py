#!/usr/bin/env python
"""Online Pairwise Sample Optimization (PSO) of a few-step distilled SDXL (arXiv 2410.03190).

Each epoch samples images for a batch of prompts, scores them with a reward, pairs the best with the worst image of
every prompt and raises the likelihood of the one against the other: sample, score, pair, update. What is trained is a
LoRA that `StableDiffusionXLPipeline.load_lora_weights` loads.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from pso_utils import arguments, training, validation
from pso_utils.checkpoints import save_checkpoint
from pso_utils.losses import online_pso_loss
from pso_utils.mdp import (
    Schedule,
    gaussian_log_prob,
    keyed_noise,
    sample_trajectory,
    scale_model_input,
    transition,
)
from pso_utils.prompts import epoch_prompts, load_prompts
from pso_utils.rewards import COMBINATIONS, RewardSpec, load_rewards, parse_rewards, select_pairs
from pso_utils.sdxl import DEFAULT_LORA_TARGETS, latent_shape, lora_disabled, save_lora


logger = get_logger(__name__)


# ---- Flags ----


def parse_args(argv=None):
    parser = arguments.ArgumentParser(description=__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_schedule_arguments(parser)
    arguments.add_prompt_arguments(parser)
    add = parser.add_argument_group("online PSO").add_argument
    positive_int, positive_float = arguments.positive_int, arguments.positive_float
    add("--reward", action="append", required=True, metavar="NAME[=WEIGHT]", help="clip, pickscore, "
        "jpeg_compressibility, jpeg_incompressibility or your own module:function; may be repeated.")  # fmt: skip
    add("--reward_model", action="append", metavar="[NAME=]MODEL", help="Hub id or local folder of a reward's model.")
    add("--reward_combination", choices=COMBINATIONS, default="sum", help="sum: by the weighted sum. pareto: a target "
        "is at least as good in all and better in one, else the pair is a tie.")  # fmt: skip
    add("--reward_batch_size", type=positive_int, default=8, help="Images that a reward scores at once.")
    add("--samples_per_prompt", type=arguments.bounded(int, 2), default=2, help="K: images to pick a pair from.")
    add("--sample_batch_size", type=positive_int, default=2, help="Prompts sampled at once on each process, K "
        "images of each.")  # fmt: skip
    add("--sample_batches_per_epoch", type=positive_int, default=8, help="Batches of prompts in an epoch, on each "
        "process.")  # fmt: skip
    add("--num_inner_epochs", type=positive_int, default=1, help="Passes over the pairs of an epoch.")
    add("--train_timesteps", type=positive_int, help="How many of the N - 1 stochastic steps each pair is trained on, "
        "drawn at random for each pair. Default: all.")  # fmt: skip
    add("--train_batch_size", type=positive_int, default=2, help="Pairs in a UNet call, on each process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches of pairs in an optimizer step.")
    add("--num_train_epochs", type=positive_int, default=100, help="Outer epochs, unless --max_train_steps is given.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps to stop after. One optimizer step is "
        "gradient_accumulation_steps x train_batch_size pairs on each process x train_timesteps.")  # fmt: skip
    add("--beta", type=positive_float, default=50.0, help="Strength of the preference: the loss is "
        "-log sigmoid(beta (log-ratio of target - log-ratio of reference)).")  # fmt: skip
    add("--clip_range", type=arguments.bounded(float, 0, low_included=False, high=0.999), default=0.1, help="The "
        "likelihood ratios are clamped to 1 - clip_range .. 1 + clip_range.")  # fmt: skip
    add("--max_tie_epochs", type=positive_int, default=3, help="Stop after so many epochs of nothing but ties.")
    arguments.add_lora_arguments(parser, DEFAULT_LORA_TARGETS)
    arguments.add_optimizer_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="pso-online-lora")
    return parser.parse_args(argv)


def check_arguments(args) -> tuple[list[str], list[RewardSpec], Path | None]:
    """Checks all that the flags and the files can tell, before a model is loaded.

    Returns:
        the prompts, the rewards to load, and the checkpoint to resume from (None: a new run).
    """
    arguments.check_shared_arguments(args)
    prompts = load_prompts(
        args.prompts,
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.caption_column,
        args.max_train_samples,
        args.cache_dir,
        args.dataloader_num_workers,
    )
    reward_specs = parse_rewards(args.reward, args.reward_model)
    training.check_model_files(args)
    training.check_lora_flags(args)
    scheduler = training.load_scheduler(args)
    stochastic_steps = training.training_schedule(args, scheduler).num_steps - 1
    training.deployment_settings(args, scheduler)
    if args.train_timesteps is not None and args.train_timesteps > stochastic_steps:
        raise ValueError(
            f"--train_timesteps {args.train_timesteps}: a schedule of {stochastic_steps + 1} steps has"
            f" {stochastic_steps} to train on (the last adds no noise): pass at most {stochastic_steps}"
        )
    return prompts, reward_specs, training.checkpoint_to_resume(args)


# ---- Sample, score, pair ----


class Pairs(NamedTuple):
    """P pairs; `latents[:, 0]` is the target's trajectory, `latents[:, 1]` the reference's."""

    latents: Tensor  # [P, 2, N + 1, C, H, W], float32
    prompt_embeds: Tensor  # [P, S, D]
    pooled_prompt_embeds: Tensor  # [P, E]
    step_index: Tensor  # [P, T], the steps that each pair is trained on
    scores: Tensor  # [P, R, K], of all K samples
    tie: Tensor  # [P], 1 for a pair to drop


def sample_latents(
    schedule: Schedule, denoiser: training.Denoiser, prompt_embeds: Tensor, pooled: Tensor, noise: Tensor, progress
) -> Tensor:
    """K trajectories [P, K, N + 1, C, H, W] of each of P prompts, in one batch, from noise [P * K, N + 1, C, H, W]."""
    num_samples = len(noise) // len(prompt_embeds)
    denoise = denoiser(prompt_embeds.repeat_interleave(num_samples, 0), pooled.repeat_interleave(num_samples, 0))
    return sample_trajectory(schedule, denoise, noise, progress).unflatten(0, (len(prompt_embeds), num_samples))


def score_samples(score: Callable, decode: Callable, latents: Tensor, prompts: list[str]) -> Tensor:
    """Scores [R, P, K] of the images that the trajectories [P, K, N + 1, C, H, W] of P prompts end in."""
    images = decode(latents[:, :, -1].flatten(0, 1))
    scores = score(images, [prompt for prompt in prompts for _ in range(latents.shape[1])])
    return scores.unflatten(1, latents.shape[:2])


def choose_pairs(
    latents: Tensor, prompt_embeds: Tensor, pooled: Tensor, step_index: Tensor, scores: Tensor, weights: Tensor, rule
) -> Pairs:
    """Keeps a pair of each prompt's trajectories [P, K, N + 1, C, H, W], by their scores [R, P, K]."""
    selection = select_pairs(scores, weights, rule)
    prompt = torch.arange(len(latents))
    both = torch.stack([latents[prompt, selection.target], latents[prompt, selection.reference]], dim=1)
    pairs = Pairs(both, prompt_embeds, pooled, step_index, scores.transpose(0, 1).contiguous(), selection.tie.long())
    return Pairs(*(tensor.to(latents.device) for tensor in pairs))


def draw_step_index(seed: int, epoch: int, slots: range, num_steps: int, num_trained: int) -> Tensor:
    """`num_trained` different stochastic steps [P, T] for each slot, ascending; the last step, N - 1, has no noise."""
    draws = keyed_noise([(seed, epoch, slot) for slot in slots], (num_steps - 1,))
    return draws.argsort(dim=1)[:, :num_trained].sort(dim=1).values


def score_metrics(names: list[str], weights: Tensor, scores: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the weighted reward, and of each if there are several; scores [P, R, K]."""
    scores = scores.cpu().transpose(0, 1).flatten(1)  # [R, P * K]
    rows = {"reward": (weights[:, None] * scores).sum(dim=0)}
    if len(names) > 1:
        rows |= {f"reward/{name}": row for name, row in zip(names, scores)}
    means = {f"{name}_mean": row.mean().item() for name, row in rows.items()}
    return means | {f"{name}_std": row.std().item() for name, row in rows.items()}


# ---- Update ----

UPDATE_METRICS = [
    "loss",
    "pair_accuracy",
    "target_log_ratio",
    "reference_log_ratio",
    "target_clipped_low",
    "target_clipped_high",
    "reference_clipped_low",
    "reference_clipped_high",
]


def pair_log_probs(schedule: Schedule, denoiser: training.Denoiser, pairs: Pairs, index: Tensor, column: int) -> Tensor:
    """Log-probabilities [2, b] of the targets and references of the pairs `index` [b], each at step_index[:, column].

    One UNet call: the b targets and the b references are one batch of 2b.
    """
    latents = pairs.latents[index].transpose(0, 1).flatten(0, 1)  # [2b, N + 1, C, H, W]
    step_index, row = pairs.step_index[index, column].repeat(2), torch.arange(len(latents), device=latents.device)
    sample, next_sample = latents[row, step_index], latents[row, step_index + 1]
    denoise = denoiser(pairs.prompt_embeds[index].repeat(2, 1, 1), pairs.pooled_prompt_embeds[index].repeat(2, 1))
    model_output = denoise(scale_model_input(schedule, sample, step_index), schedule.timesteps[step_index])
    mean, std, _ = transition(schedule, model_output, sample, step_index)
    return gaussian_log_prob(next_sample, mean, std).view(2, -1)


def groups_of_pairs(seed: int, epoch: int, num_inner_epochs: int, num_pairs: int, group_size: int) -> list[Tensor]:
    """The pairs of each optimizer step: for every inner epoch a permutation, cut into groups of `group_size`.

    An inner epoch's last group may be smaller. Nothing carries over.
    """
    keys = [(seed, epoch, -1 - inner_epoch) for inner_epoch in range(num_inner_epochs)]  # slots have keys from 0 on
    orders = keyed_noise(keys, (num_pairs,)).argsort(dim=1)
    return [group for order in orders for group in order.split(group_size) if len(group)]


def micro_batches(group: Tensor, accelerator: Accelerator, batch_size: int) -> list[Tensor]:
    """This process's contiguous share of a group, in batches; none where there are fewer pairs than processes."""
    share = torch.tensor_split(group, accelerator.num_processes)[accelerator.process_index]
    return [batch for batch in share.split(batch_size) if len(batch)]


@torch.no_grad()
def reference_log_probs(
    accelerator: Accelerator, unet, log_probs: Callable, pairs: Pairs, groups: list[Tensor], batch_size: int
) -> Tensor:
    """Log-probabilities [2, P, T] of the P pairs at their T trained steps under the reference model (LoRA off).

    They don't change while the LoRA is trained, so one pass serves all inner epochs. Its batches are `groups`', the
    first inner epoch's: the same rounding on both sides keeps a new LoRA's ratios at exactly 1.
    """
    results = torch.zeros(2, *pairs.step_index.shape, device=accelerator.device)
    if not groups:
        return results
    with lora_disabled(unet):
        for group in groups:
            for index in micro_batches(group, accelerator, batch_size):
                for column in range(pairs.step_index.shape[1]):
                    results[:, index, column] = log_probs(pairs, index, column)
    return accelerator.reduce(results, "sum")  # each pair is one process's, and zero on the others


def accumulate_gradients(
    accelerator: Accelerator,
    parameters: list[Tensor],
    log_probs: Callable,
    pairs: Pairs,
    reference_log_prob: Tensor,
    group: Tensor,
    args,
) -> dict[str, float]:
    """Leaves in the parameters the gradient of the mean loss of a group's pairs, on all processes, and trained steps.

    There is no DistributedDataParallel: ties and clipped pairs give the processes unlike numbers of backward passes,
    and its hooks wait for each other in every one. Instead each process adds up its own, be they none, weighted by the
    whole group's count, and `reduce_gradients` sums them in one call per optimizer step, in which every process takes
    part. So a backward pass can be skipped anywhere, and nothing can hang.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # not None: a process without pairs steps like the others
    num_columns = pairs.step_index.shape[1]
    count = len(group) * num_columns
    sums = torch.zeros(len(UPDATE_METRICS), device=accelerator.device)
    for index in micro_batches(group, accelerator, args.train_batch_size):
        for column in range(num_columns):
            log_ratio = log_probs(pairs, index, column) - reference_log_prob[:, index, column]
            loss, pair_accuracy, *clipped, has_gradient = online_pso_loss(*log_ratio, args.beta, args.clip_range)
            if has_gradient.any():
                accelerator.backward(loss.sum() / count)
            sums += torch.stack([value.detach().sum() for value in (loss, pair_accuracy, *log_ratio, *clipped)])
    sums = training.reduce_gradients(accelerator, parameters, sums)
    return dict(zip(UPDATE_METRICS, (sums / count).tolist()))


# ---- The run ----


def run(args):
    prompts, reward_specs, checkpoint = check_arguments(args)
    accelerator = training.make_accelerator(args)
    logger.setLevel("INFO")
    repo_id = training.create_hub_repository(accelerator, args)

    # The models, as functions of tensors
    pipeline, parameters = training.load_models(args, accelerator)
    functions = training.make_functions(args, accelerator, pipeline)
    embed, denoiser, decode, _, guidance_scale = functions
    home = "cpu" if args.offload else accelerator.device
    rewards = load_rewards(reward_specs, home, args.cache_dir, args.reward_batch_size)
    score = training.offloaded(rewards, accelerator.device, args.offload)
    schedule = training.training_schedule(args, pipeline.scheduler, accelerator.device)
    num_trained = args.train_timesteps or schedule.num_steps - 1
    noise_shape = (schedule.num_steps + 1, *latent_shape(pipeline, args.resolution))
    log_probs = partial(pair_log_probs, schedule, denoiser)

    # Sizes: prompts of an epoch on one process and on all, pairs of an optimizer step
    share_size = args.sample_batch_size * args.sample_batches_per_epoch
    epoch_size = share_size * accelerator.num_processes
    group_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    epoch_steps = math.ceil(epoch_size / group_size) * args.num_inner_epochs
    max_train_steps = args.max_train_steps or args.num_train_epochs * epoch_steps
    max_epochs = args.num_train_epochs if args.max_train_steps is None else math.inf

    optimizer, lr_scheduler = training.make_optimizer(args, accelerator, parameters, max_train_steps)
    state = training.TrainingState()
    accelerator.register_for_checkpointing(state)
    if checkpoint is not None:
        logger.info(f"resuming from {checkpoint}")
        accelerator.load_state(str(checkpoint))
    training.initialize_grad_scaler(accelerator)
    log = training.start_logs(accelerator, args, "pso_online", state.global_step, resumed=checkpoint is not None)
    settings = {**training.deployment_settings(args, pipeline.scheduler), "guidance_scale": guidance_scale}
    validation_prompts = args.validation_prompts or list(dict.fromkeys(prompts))[:4]
    images_at_once = args.sample_batch_size * args.samples_per_prompt
    validate = validation.Validation(
        args, accelerator, pipeline, validation_prompts, settings, images_at_once, embed, decode, score, rewards, log
    )
    if checkpoint is None:
        validate(state)

    logger.info(
        f"{len(prompts)} prompts; epochs of {epoch_size} prompts x {args.samples_per_prompt} samples and at most"
        f" {epoch_steps} optimizer steps; steps at timesteps {schedule.timesteps.tolist()}, {num_trained} trained"
    )
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    updates = bar(total=max_train_steps, initial=state.global_step, desc="updates", unit="step")
    while state.epoch < max_epochs and state.global_step < max_train_steps:
        first_step, start_time = state.global_step, time.perf_counter()
        slot_prompts = epoch_prompts(prompts, args.seed, state.epoch, epoch_size)  # a slot numbers an epoch's prompts
        slots = range(accelerator.process_index * share_size, (accelerator.process_index + 1) * share_size)
        share_prompts = [slot_prompts[slot] for slot in slots]
        embeds = embed(share_prompts)

        # Sample
        sampling = bar(total=args.sample_batches_per_epoch * schedule.num_steps, desc="sampling", leave=False)
        trajectories = []
        for start in range(0, share_size, args.sample_batch_size):
            batch = slice(start, start + args.sample_batch_size)
            keys = [(args.seed, state.epoch, slot, k) for slot in slots[batch] for k in range(args.samples_per_prompt)]
            noise = keyed_noise(keys, noise_shape, accelerator.device)
            batch_embeds = (tensor[batch] for tensor in embeds)
            trajectories.append(sample_latents(schedule, denoiser, *batch_embeds, noise, sampling.update))
        sampling.close()
        latents = torch.cat(trajectories)

        # Score, all batches at once: with --offload, VAE and rewards move once an epoch
        scores = score_samples(score, decode, latents, share_prompts)

        # Pair
        step_index = draw_step_index(args.seed, state.epoch, slots, schedule.num_steps, num_trained)
        pairs = choose_pairs(latents, *embeds, step_index, scores, rewards.weights, args.reward_combination)
        pairs = accelerator.gather(pairs)
        del trajectories, latents  # of the samples that are in no pair
        epoch_metrics = {
            "epoch": state.epoch,
            "ties": int(pairs.tie.sum()),
            "tie_epochs": state.tie_epochs,
            **score_metrics(rewards.names, rewards.weights, pairs.scores),
            "images_per_second": epoch_size * args.samples_per_prompt / (time.perf_counter() - start_time),
        }
        pairs = Pairs(*(tensor[pairs.tie == 0] for tensor in pairs))
        if training.count_tie_epochs(state, len(pairs.tie)) >= args.max_tie_epochs:
            if state.global_step > 0:
                save_checkpoint(accelerator, args.output_dir, state.global_step, args.checkpoints_total_limit)
            raise training.only_ties(state.tie_epochs)

        # Update
        groups = groups_of_pairs(args.seed, state.epoch, args.num_inner_epochs, len(pairs.tie), group_size)
        done_early = len(groups) > max_train_steps - state.global_step
        groups = groups[: max_train_steps - state.global_step]
        first_pass = groups[: math.ceil(len(pairs.tie) / group_size)]
        batch_size = args.train_batch_size
        reference = reference_log_probs(accelerator, pipeline.unet, log_probs, pairs, first_pass, batch_size)
        for group in groups:
            metrics = accumulate_gradients(accelerator, parameters, log_probs, pairs, reference, group, args)
            metrics |= training.optimizer_step(accelerator, optimizer, lr_scheduler, parameters, args.max_grad_norm)
            state.global_step += 1
            log(state.global_step, metrics | epoch_metrics)  # the epoch's own go with its first optimizer step
            epoch_metrics = {}
            updates.update()
            updates.set_postfix(loss=metrics["loss"], accuracy=metrics["pair_accuracy"])
        state.epoch += 1

        # The state is complete between two epochs, so this is where a checkpoint can be taken
        if training.passed_multiple(args.validation_steps, first_step, state.global_step):
            validate(state)
        if training.passed_multiple(args.checkpointing_steps, first_step, state.global_step) and not done_early:
            save_checkpoint(accelerator, args.output_dir, state.global_step, args.checkpoints_total_limit)
    updates.close()

    # Saved before anything is drawn with it, so that a failure there loses nothing
    if accelerator.is_main_process:
        save_lora(pipeline.unet, args.output_dir, args.output_kohya_format)
    validate(state)
    images = validate.save_before_and_after(state)
    if accelerator.is_main_process:
        facts = ["reward_combination", "beta", "clip_range", "samples_per_prompt", "learning_rate", "rank", "seed"]
        facts = {name: getattr(args, name) for name in facts}
        facts = {"method": "online PSO", "reward": ", ".join(args.reward), "optimizer steps": state.global_step} | facts
        prompt = validate.prompts[0]
        training.write_model_card(args, pipeline.scheduler, settings, prompt, images, repo_id, facts)
        if repo_id is not None:
            training.push_folder(repo_id, args)
        logger.info(f"the LoRA and its model card are in {args.output_dir}")
    accelerator.end_training()


def main(argv=None):
    args = parse_args(argv)
    with training.one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
