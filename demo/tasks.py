"""Writes the demo's drawings as offline training sets: what a user of `train_pso_lora_sdxl.py` brings along.

    python -m demo.tasks --output_dir outputs/tasks

preference.parquet  pairs in Pick-a-Pic's schema: Twemoji's drawing of a concept wins over another artist's (or that
                    of --winner)
ink/                the black ink drawings with a metadata.jsonl: a style that the UNet has not been trained on
concept/NAME/       a few views of each held-out concept, in Noto's style
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from demo.recipe.common import ARTISTS, STYLES, load_drawings


WINNER = "twemoji"
CONCEPT_STYLE = "noto"
SHIFTS = ((0, 0), (2, 1), (-2, 1), (1, -2), (-1, 2), (3, 0))  # pixels; the last two views are held out
TRAINING_VIEWS = 4


def to_image(pixels) -> Image.Image:
    """[3, H, W] in [-1, 1] to PIL."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def to_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def preference_pairs(winner: str = WINNER) -> Dataset:
    """Two pairs of each concept; every fourth has the class alone for its caption."""
    drawings, rng, rows = load_drawings(), np.random.default_rng(0), []
    losers = [artist for artist in ARTISTS if artist != winner]
    for index in range(len(drawings)):
        for loser in losers:
            images = [to_png(to_image(drawings.pixels[index, STYLES.index(style)])) for style in (winner, loser)]
            label = int(rng.integers(2))  # 1: the first image wins
            captions = drawings.classes if len(rows) % 4 == 3 else drawings.captions
            first, second = images if label else images[::-1]
            rows.append({"jpg_0": first, "jpg_1": second, "label_0": float(label), "caption": captions[index]})
    return Dataset.from_list(rows)


def write_image_folder(folder: Path, images: dict[str, tuple[Image.Image, str]]):
    """Images and their captions, by the file's name without .png, as the style task reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (image, caption) in images.items():
        image.save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_ink(folder: Path):
    drawings, images = load_drawings(), {}
    for index, name in enumerate(drawings.names):
        captions = drawings.classes if index % 4 == 3 else drawings.captions
        ink = to_image(drawings.pixels[index, STYLES.index("ink")])
        images[name.replace(" ", "_")] = (ink, captions[index])
    write_image_folder(folder, images)


def views(pixels) -> list[Image.Image]:
    """A drawing moved a little, every other time mirrored."""
    image = to_image(pixels)
    moved = [
        image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y), fillcolor="white") for x, y in SHIFTS
    ]
    return [ImageOps.mirror(view) if index % 2 else view for index, view in enumerate(moved)]


def concept_views(name: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """A held-out concept's views for training and for measuring."""
    drawings = load_drawings("held_out")
    all_views = views(drawings.pixels[drawings.names.index(name), STYLES.index(CONCEPT_STYLE)])
    return all_views[:TRAINING_VIEWS], all_views[TRAINING_VIEWS:]


def write_tasks(folder: Path, *, winner: str = WINNER):
    folder.mkdir(parents=True, exist_ok=True)
    preference_pairs(winner).to_parquet(folder / "preference.parquet")
    write_ink(folder / "ink")
    for name in load_drawings("held_out").names:
        views_folder = folder / "concept" / name.replace(" ", "_")
        views_folder.mkdir(parents=True, exist_ok=True)
        for index, view in enumerate(concept_views(name)[0]):
            view.save(views_folder / f"{index}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tasks"))
    parser.add_argument("--winner", choices=ARTISTS, default=WINNER, help="Whose drawings win.")
    args = parser.parse_args(argv)
    write_tasks(args.output_dir, winner=args.winner)


if __name__ == "__main__":
    main()
