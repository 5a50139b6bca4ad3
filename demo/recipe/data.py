"""Draws the emoji of four artwork sets at 32x32 px on white and writes them as Parquet in the `datasets` image format.

The artwork comes from npm packages, unpacked into one folder:

    for package in @iconify-json/{fluent-emoji-flat,noto,twemoji,fluent-emoji-high-contrast} emojibase-data@16; do
        npm pack $package
    done
    python -m demo.recipe.data --packages .
"""

import argparse
import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from .common import DATA


ARTWORK = {
    "fluent": "fluent-emoji-flat",
    "noto": "noto",
    "twemoji": "twemoji",
    "ink": "fluent-emoji-high-contrast",
}
# emojibase's subgroups that make up each of our classes
CLASSES = {
    "animal": "animal-mammal animal-bird animal-marine animal-bug animal-reptile animal-amphibian monkey-face cat-face",
    "food": "food-fruit food-vegetable food-prepared food-asian food-sweet drink",
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat "
    "face-glasses face-concerned face-negative face-costume",
    "vehicle": "transport-ground transport-air transport-water",
    "plant": "plant-flower plant-other",
    "clothes": "clothing",
}
SIZE = 32
TRAIN, HELD_OUT = 220, 12  # concepts; 350 took the teacher twice the steps


def read_json(packages: Path, package: str, member: str):
    """Reads one JSON file from an npm tarball."""
    archives = sorted(packages.glob(f"{package}-[0-9]*.tgz"))
    if not archives:
        raise SystemExit(f"{packages} holds no {package}-*.tgz: see this file's docstring for the packages to fetch.")
    with tarfile.open(archives[-1]) as archive:
        return json.load(archive.extractfile(f"package/{member}"))


def concept_classes(packages: Path) -> dict[str, str]:
    """Maps the artwork sets' names ("red-panda") to our classes ("animal")."""
    class_of = {subgroup: kind for kind, subgroups in CLASSES.items() for subgroup in subgroups.split()}
    subgroups = read_json(packages, "emojibase-data", "meta/groups.json")["subgroups"]
    concepts = {}
    for emoji in read_json(packages, "emojibase-data", "en/data.json"):
        kind = class_of.get(subgroups.get(str(emoji.get("subgroup"))))
        if kind:
            concepts[re.sub(r"[^a-z0-9]+", "-", emoji["label"].lower()).strip("-")] = kind
    return concepts


def draw(icons: dict, name: str) -> bytes:
    """Rasterizes one icon; returns a PNG, RGB on white."""
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE}" height="{SIZE}" '
        f'viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white")
    image = PILImage.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = PILImage.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    stored = io.BytesIO()
    canvas.convert("RGB").resize((SIZE, SIZE)).save(stored, "PNG", optimize=True)
    return stored.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="Folder with the npm tarballs.")
    packages = parser.parse_args().packages

    artwork = {
        style: read_json(packages, f"iconify-json-{package}", "icons.json") for style, package in ARTWORK.items()
    }
    classes = concept_classes(packages)
    names = sorted(set(classes).intersection(*(icons["icons"] for icons in artwork.values())))
    random.Random(0).shuffle(names)
    held_out = [name for name in names if classes[name] in ("animal", "food")][:HELD_OUT]
    splits = {"train": [name for name in names if name not in held_out][:TRAIN], "held_out": held_out}

    features = Features({key: Value("string") for key in ("text", "style", "name", "class")} | {"image": Image()})
    DATA.mkdir(exist_ok=True)
    for split, members in splits.items():
        rows = [
            {
                "image": {"bytes": draw(icons, name), "path": None},
                "text": f"{name.replace('-', ' ')} {classes[name]}",
                "style": style,
                "name": name.replace("-", " "),
                "class": classes[name],
            }
            for name in sorted(members)
            for style, icons in artwork.items()
        ]
        Dataset.from_list(rows, features=features).to_parquet(DATA / f"{split}.parquet")
        print(split, len(members), "concepts", dict(Counter(classes[name] for name in members)))


if __name__ == "__main__":
    main()
