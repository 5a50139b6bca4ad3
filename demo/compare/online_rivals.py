"""Other ways of learning from scored samples than `train_pso_online.py --objective denoising`, by its flags and

python -m demo.compare.online_rivals --form FORM ...

--form group   PSO of a prompt's best and worst samples in one sigmoid; of one each it is the script's pair
--form nft     DiffusionNFT's implicit policies (arXiv 2509.16117), of all samples, at the distilled levels
"""

import argparse
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import train_pso_online as online
from pso_utils.data.prompts import epoch_prompts
from pso_utils.families.denoising import NoisedPairs, pair_gains, predict_pairs
from pso_utils.losses import denoising_error
from pso_utils.run import models
from pso_utils.run.accelerator import make_accelerator, one_line_errors
from pso_utils.run.optimizer import make_optimizer, optimizer_step


def parse_args(argv=None):
    """The flags of `train_pso_online.py` and the own ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--form", choices=("group", "nft"), required=True)
    parser.add_argument("--num_kept", type=int, default=1, help="m: of each prompt the m best and the m worst.")
    parser.add_argument("--base_anchor", type=float, default=0.0, help="Of the distance from the base's predictions.")
    own, rest = parser.parse_known_args(argv)
    args = online.parse_args(["--objective", "denoising", *rest])
    vars(args).update(vars(own))
    return args


# ---- Losses, of groups of K samples that share a prompt, a noise level and its noise ----


def group_advantages(scores: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The m best and m worst of the K samples [P, 2m], as indices, and their advantages [P, 2m]: the scores [P, K]
    minus the kept ones' mean, scaled to a sum of absolute values of 2, so that a pair's are 1 and -1; 0 in a tie."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.cat([order[:, :num_kept], order[:, -num_kept:]], dim=1)
    advantages = scores.gather(1, kept)
    advantages = advantages - advantages.mean(dim=1, keepdim=True)
    size = advantages.abs().sum(dim=1, keepdim=True)
    return kept, torch.where(size > 0, 2 * advantages / size, 0.0)


def group_pso_loss(gains: Tensor, advantages: Tensor, *, beta: float, target_anchor: float) -> Tensor:
    """[P]: -log sigmoid(beta sum_i A_i gain_i) + target_anchor sum_i max(A_i, 0) relu(-gain_i), gains and advantages
    [K, P]; a tie's is constant."""
    anchor = (advantages.clamp(min=0) * F.relu(-gains)).sum(dim=0)
    return -F.logsigmoid(beta * (advantages * gains).sum(dim=0)) + target_anchor * anchor


def nft_loss(
    latents: Tensor, predicted: Tensor, old: Tensor, optimality: Tensor, weight: Tensor, *, beta: float
) -> Tensor:
    """[P]: the mean over the K samples of (r d(f+) + (1 - r) d(f-)) / beta with f+ = (1 - beta) f_old + beta f_theta
    and f- = (1 + beta) f_old - beta f_theta.

    Args:
        latents, predicted, old: [K, P, C, h, w], the samples, f_theta and f_old.
        optimality: [K, P], r in [0, 1].
        weight: [P], of the squared error.
    """
    positive = denoising_error(latents, (1 - beta) * old + beta * predicted, weight)
    negative = denoising_error(latents, (1 + beta) * old - beta * predicted, weight)
    return ((optimality * positive + (1 - optimality) * negative) / beta).mean(dim=0)


def optimality(scores: Tensor) -> Tensor:
    """NFT's r [P, K] in [0, 1] of scores [P, K]: half of 1 + the advantage, in units of the group's deviation, cut to
    -1 .. 1."""
    deviation = scores.std(dim=1, keepdim=True)
    advantages = (scores - scores.mean(dim=1, keepdim=True)) / torch.where(deviation > 0, deviation, 1.0)
    return 0.5 + 0.5 * advantages.clamp(-1, 1)


# ---- The run, on one process ----


def run(args):
    prompts, reward_specs, info, _ = online.check_arguments(args)
    accelerator = make_accelerator(args)
    family = models.load_family(args, accelerator, info)
    parameters = models.add_trained_lora(args, accelerator, family)
    embed = models.make_prompt_cache(args, family)
    rewards = models.load_run_rewards(args, accelerator, reward_specs)
    schedule = models.training_schedule(args, info, stochastic=False, device=accelerator.device)
    deployment = models.deployment(args, info)
    weights = online.set_objective_defaults(args, schedule)
    optimizer, lr_scheduler = make_optimizer(args, accelerator, parameters, args.max_train_steps)
    count, size = args.sample_batch_size * args.sample_batches_per_epoch, (args.resolution, args.resolution)
    predict = partial(predict_pairs, family, schedule)
    step = epoch = 0
    while step < args.max_train_steps:
        drawn_prompts = epoch_prompts(prompts, seed=args.seed, epoch=epoch, count=count)
        conditioning = family.collate(embed(drawn_prompts), *size)
        latents, scores = [], []
        for start in range(0, count, args.sample_batch_size):
            batch = slice(start, start + args.sample_batch_size)
            indices = range(count)[batch]
            keys = [(args.seed, epoch, prompt, k) for prompt in indices for k in range(args.samples_per_prompt)]
            repeated = conditioning.rows(batch).repeat_interleave(args.samples_per_prompt)
            drawn = online.sample(
                family, repeated, keys, schedule=None, deployment=deployment, progress=lambda: None
            ).unflatten(0, (-1, args.samples_per_prompt))[:, :, -1]
            latents.append(drawn)
            scores.append(online.score_samples(family, rewards, drawn, drawn_prompts[batch])[0])
        latents, scores = torch.cat(latents), torch.cat(scores).to(accelerator.device)  # [P, K, ...]
        print(f"epoch {epoch}: reward {scores.mean():.4f}", flush=True)
        if args.form == "group":
            kept, factors = group_advantages(scores, args.num_kept)
            latents = latents[torch.arange(count)[:, None], kept]
        else:
            factors = optimality(scores)
        old_parameters = [parameter.detach().clone() for parameter in parameters]
        keys = [(args.seed, epoch, prompt) for prompt in range(count)]
        for inner_epoch in range(min(args.num_inner_epochs, args.max_train_steps - step)):
            noise, uniform = online.draw_noise_levels(keys, inner_epoch, latents.shape[2:])
            optimizer.zero_grad(set_to_none=False)
            for index in torch.arange(count).split(args.train_batch_size):
                group = latents[index].transpose(0, 1)  # [K, b, C, h, w]
                repeated = conditioning.rows(index.repeat(len(group)))
                pairs = NoisedPairs(group, noise[index], uniform[index], repeated)
                factor = factors[index].T
                if args.form == "group":
                    gains, drift = pair_gains(family, schedule, weights, pairs)
                    loss = group_pso_loss(gains, factor, beta=args.beta, target_anchor=args.target_anchor)
                    loss = loss + args.base_anchor * drift.mean(dim=0)
                else:
                    step_index = (pairs.uniform * len(weights)).long()
                    weight = weights[step_index]
                    with torch.no_grad(), parameters_of(parameters, old_parameters):
                        old = predict(pairs, step_index)
                    predicted = predict(pairs, step_index)
                    loss = nft_loss(group, predicted, old, factor, weight, beta=args.beta)
                    if args.base_anchor:
                        with torch.no_grad(), family.without_lora():
                            base = predict(pairs, step_index)
                        loss = loss + args.base_anchor * denoising_error(base, predicted, weight).mean(dim=0)
                accelerator.backward(loss.sum() / count)
            optimizer_step(accelerator, optimizer, lr_scheduler, parameters, max_grad_norm=args.max_grad_norm)
            step += 1
            if step % args.checkpointing_steps == 0:
                folder = Path(args.output_dir, f"checkpoint-{step}")
                family.save_lora(folder)
                (folder / "manifest.json").write_text(json.dumps({"global_step": step}))
        epoch += 1
    family.save_lora(args.output_dir)


@contextmanager
@torch.no_grad()
def parameters_of(parameters: list[Tensor], values: list[Tensor]):
    """Within this the parameters have these values."""
    current = [parameter.detach().clone() for parameter in parameters]
    try:
        torch._foreach_copy_(parameters, values)
        yield
    finally:
        torch._foreach_copy_(parameters, current)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
