"""Measures the demo's models, and LoRAs trained on them, on the same prompts and noise.

python -m demo.evaluate --teacher                               # the table of demo/README.md
python -m demo.evaluate --lora run=outputs/twemoji --steps 4    # a LoRA beside its base
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from demo.measures import KINDS, Yardstick, to_pixels
from demo.recipe.common import ARTISTS, DEMO, STYLES
from demo.rewards import twemoji
from pso_utils.mdp import convert_scheduler
from pso_utils.rewards import Rewards, load_rewards, parse_rewards


BATCH = 110


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
    args = parser.parse_args(argv)
    for lora in args.lora:
        name, _, folder = lora.partition("=")
        if not (name and Path(folder, "pytorch_lora_weights.safetensors").is_file()):
            parser.error(f"--lora {lora}: pass NAME=DIR, where DIR holds pytorch_lora_weights.safetensors")
    return args


def draw(pipeline, prompts: list[str], steps: int, seed: int) -> list[Image.Image]:
    """One image a prompt; image i starts from the noise of seed + i, whatever the model."""
    images = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        images += pipeline(
            prompt=batch,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        ).images
    return images


def grid(rows: list[list[Image.Image]], scale: int = 2) -> Image.Image:
    """Rows of equally large images as one picture."""
    width, height = (side * scale for side in rows[0][0].size)
    canvas = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (x * width, y * height))
    return canvas


def paired(tuned: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Gain of a reward over the base on the same prompts and noise."""
    gain = tuned - base
    error = (gain.std() / len(gain) ** 0.5).item()
    return {
        "gain": gain.mean().item(),
        "standard_errors": gain.mean().item() / error if error else 0.0,
        "base_deviations": (gain.mean() / base.std()).item(),
    }


def models(args, pipeline):
    """Yields (name, schedulers, steps), having put each model's UNet into the pipeline."""
    yield "base", args.scheduler, args.steps
    for lora in args.lora:
        name, _, folder = lora.partition("=")
        pipeline.load_lora_weights(folder)
        yield name, args.scheduler, args.steps
        pipeline.unload_lora_weights()
    if args.teacher:
        pipeline.unet = UNet2DConditionModel.from_pretrained(DEMO / "emoji-teacher")
        yield "teacher", args.scheduler, args.steps
        yield "teacher", ["ddim"], [20]


def table(results: list[dict]) -> str:
    columns = ["model", "scheduler", "steps", "prompts", "distance", "sharpness", "blurred", *ARTISTS]
    if "ink" in results[0]:
        columns += ["ink", "ink distance", "ink sharpness"]
    columns += ["clip", "twemoji reward", "diversity"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in results:
        cells = [row.get(column, "") for column in columns]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(STYLES if args.ink else ARTISTS)
    concepts = yardstick.concepts(args.num_images)
    clip: Rewards = load_rewards(parse_rewards(["clip"], [str(DEMO / "emoji-clip")]), batch_size=BATCH)
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)
    own_scheduler = pipeline.scheduler

    results, scores, pictures = [], {}, {}
    for name, schedulers, steps_list in models(args, pipeline):
        for scheduler in schedulers:
            pipeline.scheduler = convert_scheduler(own_scheduler, scheduler)  # the pipeline runs ddim with eta 0
            for steps in steps_list:
                for kind in args.kind:
                    prompts = yardstick.prompts(kind, concepts)
                    images = draw(pipeline, prompts, steps, args.seed)
                    measures = yardstick.measure(to_pixels(images), kind, concepts)
                    cell = (scheduler, steps, kind)
                    rewards = {"clip": clip(images, prompts)[0], "twemoji reward": twemoji(images, prompts)}
                    scores[name, *cell] = rewards
                    row = {"model": name, "scheduler": scheduler, "steps": steps, "prompts": kind}
                    row |= {"distance": measures.distance.mean().item(), "sharpness": measures.sharpness}
                    row |= {"blurred": measures.blurred.mean().item(), **measures.shares}
                    row |= {reward: values.mean().item() for reward, values in rewards.items()}
                    row["diversity"] = measures.diversity
                    if args.ink:
                        row["ink distance"] = measures.style_distances[:, STYLES.index("ink")].mean().item()
                        row["ink sharpness"] = yardstick.ratio_to(to_pixels(images), "ink")
                    if name not in ("base", "teacher"):
                        base = scores["base", *cell]
                        row["paired"] = {reward: paired(values, base[reward]) for reward, values in rewards.items()}
                    results.append(row)
                    pictures.setdefault(cell, []).append(images[:22])
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


if __name__ == "__main__":
    main()
