"""Each distilled timestep's share of the gradient's norm, under each weighting, at a fresh LoRA or a trained one.

python -m demo.gradient_shares --task preference --lora run=outputs/preference
"""

import argparse

import torch
from torch import Tensor

from demo.compare.rows import CLASS_PROMPT, INSTANCE_PROMPT
from demo.compare.tasks import CONCEPT
from demo.measures import draw_prompts, load_model, stack_pixels
from demo.recipe.common import ARTISTS, STYLES, load_drawings
from demo.tasks import WINNER, concept_views
from pso_utils.evaluate.loras import Model, applied, find_lora
from pso_utils.families import Family
from pso_utils.families.denoising import NoisedPairs
from pso_utils.families.lora import lora_layers
from pso_utils.keyed_rng import keyed_noise, keyed_permutation
from pso_utils.mdp import WEIGHTINGS, forward_weights
from pso_utils.run.accelerator import one_line_errors
from pso_utils.schedules import make_schedule
from train_pso_lora_sdxl import TASK_DEFAULTS, sigmoid_loss


def task_images(task: str, family: Family, num_pairs: int, *, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Targets and references [B, 3, 32, 32], and captions, as the task pairs them, with samples of `family`."""
    drawings, views = load_drawings(), stack_pixels(concept_views(CONCEPT)[0])
    index = keyed_permutation((seed,), len(drawings))[:num_pairs]
    captions = [drawings.captions[concept] for concept in index.tolist()]
    if task == "preference":
        losers = [STYLES.index(artist) for artist in ARTISTS if artist != WINNER]
        reference_styles = torch.tensor(losers)[torch.arange(len(index)) % len(losers)]
        return drawings.pixels[index, STYLES.index(WINNER)], drawings.pixels[index, reference_styles], captions
    if task == "style":
        targets, prompts = drawings.pixels[index, STYLES.index("ink")], captions
    else:
        targets = views[torch.arange(len(index)) % len(views)]
        captions, prompts = [INSTANCE_PROMPT] * len(index), [CLASS_PROMPT] * len(index)
    return targets, stack_pixels(draw_prompts(family, prompts, steps=4, seed=seed)), captions


def gradient_shares(family: Family, pairs: NoisedPairs, task: str, weighting: str) -> dict[int, float]:
    """Timestep -> its share, for PSO's loss with the task's defaults and without class anchor."""
    schedule = make_schedule(family.pipeline.scheduler, 4, stochastic=False)
    weights, defaults, norms = forward_weights(schedule, weighting), TASK_DEFAULTS[task], []
    settings = argparse.Namespace(**defaults.get(weighting, next(iter(defaults.values()))), class_anchor=0.0)
    parameters = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
    for step in range(len(weights)):
        at_step = pairs._replace(uniform=torch.full((len(pairs.noise),), (step + 0.5) / len(weights)))
        loss, _ = sigmoid_loss(family, schedule, weights, at_step, settings)
        gradients = torch.autograd.grad(loss.mean(), parameters)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    shares = torch.stack(norms) / torch.stack(norms).sum()
    return dict(zip(schedule.timesteps.tolist(), shares.tolist()))


def run(args):
    model, family = find_lora(args.lora) if args.lora else Model("fresh"), load_model()
    targets, references, captions = task_images(args.task, family, args.num_pairs, seed=args.seed)
    latents = family.encode_images(torch.cat([targets, references])).unflatten(0, (2, -1))
    noise = keyed_noise([(args.seed, index) for index in range(len(captions))], latents.shape[2:])
    conditioning = family.collate(family.encode_prompts(captions * 2), 32, 32)
    pairs = NoisedPairs(latents, noise, torch.zeros(len(noise)), conditioning)
    with applied(family.pipeline, model):
        if model.lora is None:
            family.add_lora(rank=16, seed=0)
        family.lora_layers = lora_layers(family.denoiser)
        for name, parameter in family.denoiser.named_parameters():
            parameter.requires_grad_("lora_" in name)
        for weighting in (name for name, entry in WEIGHTINGS.items() if not entry.is_flow):
            shares = gradient_shares(family, pairs, args.task, weighting)
            print(f"{weighting}: " + ", ".join(f"{share:.3f} at {timestep}" for timestep, share in shares.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASK_DEFAULTS, default="preference")
    parser.add_argument("--lora", metavar="NAME=DIR", help="Default: a fresh LoRA of rank 16.")
    parser.add_argument("--num_pairs", type=int, default=64, help="Each is noised to every timestep.")
    parser.add_argument("--seed", type=int, default=0, help="Of pairs, noise and references.")
    with one_line_errors(__file__):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
