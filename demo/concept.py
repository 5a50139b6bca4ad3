"""Measures a LoRA that was tuned to draw one new concept: does it draw it, and are its class and the rest still there?

    python -m demo.concept --concept snake --lora run=outputs/snake

Images are drawn for the instance prompt and for the class prompt, on the base's own noise, and held against views of
the concept that no training saw.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from demo.evaluate import BATCH, draw, grid, paired
from demo.measures import mean_pairwise_distance, to_pixels
from demo.recipe.common import DEMO, load_drawings
from demo.tasks import concept_views
from pso_utils.rewards import CLIPReward


PICTURED = 11  # images of each prompt that are shown


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


@dataclass
class ConceptMeasures:
    scores: dict[str, torch.Tensor]  # [B] each; more is better in all
    class_diversity: float  # mean pairwise distance of the class prompt's images
    images: list[Image.Image]  # the first of the instance prompt's, then the first of the class prompt's


class ConceptYardstick:
    """Held-out views of a concept, against which images are measured.

    Args:
        instance_prompt: as in training; by default `sks` and the concept's class.
    """

    def __init__(self, concept: str, instance_prompt: str | None = None):
        drawings = load_drawings("held_out")
        self.class_prompt = drawings.classes[drawings.names.index(concept)]
        self.instance_prompt = instance_prompt or f"sks {self.class_prompt}"
        self.views = concept_views(concept)[1]
        self.clip = CLIPReward(str(DEMO / "emoji-clip"))
        self.embeds = F.normalize(self.clip.embed_images(self.views), dim=1)

    def measure(self, pipeline, num_images: int, seed: int, steps: int = 4) -> ConceptMeasures:
        """Draws both prompts, each from the noise of `seed`, `seed` + 1, ... whatever the model."""
        instance = draw(pipeline, [self.instance_prompt] * num_images, steps, seed)
        of_class = draw(pipeline, [self.class_prompt] * num_images, steps, seed)
        batches = [instance[start : start + BATCH] for start in range(0, len(instance), BATCH)]
        cosine = torch.cat([F.normalize(self.clip.embed_images(batch), dim=1) for batch in batches]) @ self.embeds.T
        scores = {
            "image cosine": cosine.mean(dim=1),
            "closeness": -view_distance(to_pixels(instance), to_pixels(self.views)),
            "class clip": self.clip(of_class, [self.class_prompt] * num_images),
        }
        diversity = mean_pairwise_distance(to_pixels(of_class))
        return ConceptMeasures(scores, diversity, instance[:PICTURED] + of_class[:PICTURED])


def main(argv=None):
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    yardstick = ConceptYardstick(args.concept, args.instance_prompt)
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "emoji-turbo")
    pipeline.set_progress_bar_config(disable=True)

    results, base, rows = [], None, [yardstick.views]
    for lora in ["base=", *args.lora]:
        name, _, folder = lora.partition("=")
        if folder:
            pipeline.load_lora_weights(folder)
        measures = yardstick.measure(pipeline, args.num_images, args.seed)
        if folder:
            pipeline.unload_lora_weights()
        base = base or measures
        row = {"model": name, **{key: value.mean().item() for key, value in measures.scores.items()}}
        row["class diversity"] = measures.class_diversity
        row["paired"] = {key: paired(value, base.scores[key]) for key, value in measures.scores.items()}
        results.append(row)
        rows.append(measures.images)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    grid(rows).save(args.output_dir / "samples.png")
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
