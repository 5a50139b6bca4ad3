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
from PIL import Image

from demo.measures import draw_prompts, grid, load_model, paired, stack_pixels
from demo.recipe.common import DEMO, load_drawings
from demo.tasks import concept_views
from pso_utils.evaluate.fidelity import ReferenceSimilarity, closest_distance, diversity
from pso_utils.evaluate.loras import Model, applied, find_lora
from pso_utils.families import Family
from pso_utils.rewards import CLIPReward
from pso_utils.run.accelerator import one_line_errors


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
    return parser.parse_args(argv)


@dataclass
class ConceptMeasures:
    scores: dict[str, torch.Tensor]  # [B] each; more is better in all
    class_diversity: float  # mean distance between the class prompt's images
    images: list[Image.Image]  # the first of the instance prompt's, then the first of the class prompt's


class ConceptBenchmark:
    """Held-out views of a concept, which images are measured against.

    Args:
        instance_prompt: as in training; by default `sks` and the concept's class.
    """

    def __init__(self, concept: str, instance_prompt: str | None = None):
        drawings = load_drawings("held_out")
        self.class_prompt = drawings.classes[drawings.names.index(concept)]
        self.instance_prompt = instance_prompt or f"sks {self.class_prompt}"
        self.views = concept_views(concept)[1]
        self.clip = CLIPReward(str(DEMO / "emoji-clip"))
        self.similarity = ReferenceSimilarity(self.clip, self.views)

    def measure(self, family: Family, num_images: int, *, seed: int, steps: int = 4) -> ConceptMeasures:
        """Draws both prompts, each from the noise of `seed`, `seed` + 1, ... whatever the model."""
        instance, of_class = (
            draw_prompts(family, [prompt] * num_images, steps=steps, seed=seed)
            for prompt in (self.instance_prompt, self.class_prompt)
        )
        scores = {
            "image cosine": self.similarity(instance, [self.instance_prompt] * num_images),
            "closeness": -closest_distance(stack_pixels(instance), stack_pixels(self.views)),
            "class clip": self.clip(of_class, [self.class_prompt] * num_images),
        }
        class_diversity = diversity(stack_pixels(of_class)).mean().item()
        return ConceptMeasures(scores, class_diversity, instance[:PICTURED] + of_class[:PICTURED])


def run(args):
    models = [Model("base"), *map(find_lora, args.lora)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    benchmark, family = ConceptBenchmark(args.concept, args.instance_prompt), load_model()
    results, base, rows = [], None, [benchmark.views]
    for model in models:
        with applied(family.pipeline, model):
            measures = benchmark.measure(family, args.num_images, seed=args.seed)
        base = base or measures
        row = {"model": model.name, **{key: value.mean().item() for key, value in measures.scores.items()}}
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


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(__file__):
        run(args)


if __name__ == "__main__":
    main()
