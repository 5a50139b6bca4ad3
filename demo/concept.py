"""Measures a LoRA that was tuned to draw one new concept: does it draw it, and are its class and the rest still there?

    python -m demo.concept --concept snake --lora run=outputs/snake

Images are drawn for the instance prompt and for the class prompt, on the base's own noise, and held against views of
the concept that no training saw.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline

from demo.evaluate import BATCH, draw, grid, paired
from demo.measures import mean_pairwise_distance, to_pixels
from demo.recipe.common import DEMO, load_drawings
from demo.tasks import concept_views
from pso_utils.rewards import CLIPReward


def parse_args(argv=None):
    held_out = load_drawings("held_out").names
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", choices=held_out, default="snake")
    parser.add_argument("--instance_prompt", help="As in training. Default: `sks` and the concept's class.")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=DIR", help="May be given several times.")
    parser.add_argument("--num_images", type=int, default=330)
    parser.add_argument("--seed", type=int, default=1_000_000, help="Of the noise; training's seeds are far smaller.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/concept"))
    args = parser.parse_args(argv)
    for lora in args.lora:
        name, _, folder = lora.partition("=")
        if not (name and Path(folder, "pytorch_lora_weights.safetensors").is_file()):
            parser.error(f"--lora {lora}: pass NAME=DIR, where DIR holds pytorch_lora_weights.safetensors")
    return args


def view_distance(pixels: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Mean squared error [B] of images [B, 3, H, W] in [-1, 1] to the closest of the views [V, 3, H, W]."""
    return (pixels[:, None] - views).square().mean(dim=(2, 3, 4)).amin(dim=1)


def main(argv=None):
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    drawings = load_drawings("held_out")
    class_prompt = drawings.classes[drawings.names.index(args.concept)]
    instance_prompt = args.instance_prompt or f"sks {class_prompt}"
    views = concept_views(args.concept)[1]
    clip = CLIPReward(str(DEMO / "emoji-clip"))
    embeds = F.normalize(clip.embed_images(views), dim=1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)

    results, base, rows = [], None, []
    for lora in ["base=", *args.lora]:
        name, _, folder = lora.partition("=")
        if folder:
            pipeline.load_lora_weights(folder)
        instance = draw(pipeline, [instance_prompt] * args.num_images, 4, args.seed)
        of_class = draw(pipeline, [class_prompt] * args.num_images, 4, args.seed)
        if folder:
            pipeline.unload_lora_weights()
        batches = [instance[start : start + BATCH] for start in range(0, len(instance), BATCH)]
        cosine = torch.cat([F.normalize(clip.embed_images(batch), dim=1) for batch in batches]) @ embeds.T
        scores = {
            "image cosine": cosine.mean(dim=1),
            "closeness": -view_distance(to_pixels(instance), to_pixels(views)),  # so that more is better in both
            "class clip": clip(of_class, [class_prompt] * len(of_class)),
        }
        base = base or scores
        row = {"model": name, **{key: value.mean().item() for key, value in scores.items()}}
        row["class diversity"] = mean_pairwise_distance(to_pixels(of_class))
        row["paired"] = {key: paired(value, base[key]) for key, value in scores.items()}
        results.append(row)
        rows += [instance[:11] + of_class[:11]]
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    grid([views, *rows]).save(args.output_dir / "samples.png")
    print("| model | image cosine | s.e. | pixel distance | s.e. | class clip | ratio | class diversity | ratio |")
    print(f"|{'---|' * 9}")
    for row in results:
        gains = {key: f"{gain['standard_errors']:+.1f}" for key, gain in row["paired"].items()}
        clip_ratio = row["class clip"] / results[0]["class clip"]
        diversity_ratio = row["class diversity"] / results[0]["class diversity"]
        print(
            f"| {row['model']} | {row['image cosine']:.3f} | {gains['image cosine']} | {-row['closeness']:.3f} | "
            f"{gains['closeness']} | {row['class clip']:.3f} | {clip_ratio:.2f} | {row['class diversity']:.3f} | "
            f"{diversity_ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
