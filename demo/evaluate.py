"""Measures the demo's models, and LoRAs trained on them, on the same prompts and noise.

python -m demo.evaluate --teacher                               # the table of demo/README.md
python -m demo.evaluate --lora run=outputs/twemoji --steps 4    # a LoRA beside its base
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from demo.measures import BATCH, KINDS, DrawingBenchmark, draw_prompts, grid, load_model, paired
from demo.recipe.common import ARTISTS, DEMO, STYLES
from demo.rewards import twemoji
from pso_utils.evaluate.loras import Model, applied, find_lora
from pso_utils.rewards import load_rewards, parse_rewards
from pso_utils.run.accelerator import one_line_errors


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME=DIR", help="A LoRA folder; may be given several times."
    )
    parser.add_argument("--teacher", action="store_true", help="Also measure the undistilled UNet.")
    parser.add_argument("--scheduler", nargs="+", choices=("lcm", "euler_ancestral"), default=["lcm"])
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ink", action="store_true", help="Hold the samples against the ink drawings too.")
    parser.add_argument("--num_images", type=int, default=440)
    parser.add_argument("--seed", type=int, default=1_000_000, help="Of the noise; training's seeds are far smaller.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
    return parser.parse_args(argv)


def models_to_draw(args) -> Iterator[tuple[Model, Path | None, str, list[int]]]:
    """Each model with its denoiser's folder (None: the distilled one), its scheduler and its numbers of steps."""
    models = [(model, None) for model in [Model("base"), *map(find_lora, args.lora)]]
    teacher = (Model("teacher"), DEMO / "emoji-teacher")
    for model, denoiser in [*models, teacher] if args.teacher else models:
        for scheduler in args.scheduler:
            yield model, denoiser, scheduler, args.steps
    if args.teacher:
        yield *teacher, "ddim", [20]  # with the pipeline's eta, 0


def table(results: list[dict]) -> str:
    columns = ["model", "scheduler", "steps", "prompts", "distance", "sharpness", "blurred", *ARTISTS]
    if "ink" in results[0]:
        columns += ["ink", "ink distance", "ink sharpness"]
    columns += ["clip", "twemoji reward", "diversity"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in results:
        values = [row.get(column, "") for column in columns]
        values = [f"{value:.3f}" if isinstance(value, float) else value for value in values]
        lines.append(f"| {' | '.join('' if value is None else str(value) for value in values)} |")
    return "\n".join(lines)


def run(args):
    models = list(models_to_draw(args))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    benchmark = DrawingBenchmark(STYLES if args.ink else ARTISTS)
    concepts = benchmark.concepts(args.num_images)
    clip = load_rewards(parse_rewards(["clip"], [str(DEMO / "emoji-clip")]), batch_size=BATCH)

    results, base_rewards, pictures = [], {}, {}
    for model, denoiser, scheduler, numbers_of_steps in models:
        family = load_model(denoiser, scheduler=scheduler)
        with applied(family.pipeline, model):
            for steps in numbers_of_steps:
                for kind in args.kind:
                    prompts = benchmark.prompts(kind, concepts)
                    images = draw_prompts(family, prompts, steps=steps, seed=args.seed)
                    rewards = {"clip": clip(images, prompts)[0], "twemoji reward": twemoji(images, prompts)}
                    row = {"model": model.name, "scheduler": scheduler, "steps": steps, "prompts": kind}
                    row |= benchmark.figures(images, kind, concepts)
                    row |= {reward: values.mean().item() for reward, values in rewards.items()}
                    setting = (scheduler, steps, kind)
                    if model.name == "base":
                        base_rewards[setting] = rewards
                    elif model.lora is not None:
                        base = base_rewards[setting]
                        row["paired"] = {reward: paired(values, base[reward]) for reward, values in rewards.items()}
                    results.append(row)
                    pictures.setdefault(setting, []).append(images[:22])
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    for (scheduler, steps, kind), rows in pictures.items():
        grid(rows).save(args.output_dir / f"{scheduler}_{steps}_{kind}.png")
    print(table(results))
    for row in results:
        for reward, gain in row.get("paired", {}).items():
            print(
                f"{row['model']} {row['scheduler']} {row['steps']} {row['prompts']}: {reward} {gain['gain']:+.4f}, "
                f"{gain['standard_errors']:.1f} paired standard errors, {gain['base_deviations']:.2f} base deviations"
            )


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
