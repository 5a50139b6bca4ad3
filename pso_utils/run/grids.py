"""Pictures of many images, for people to look at."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def fit_tile(image: Image.Image, smallest: int = 96, largest: int = 512) -> Image.Image:
    """Enlarges a tiny image by a whole factor, without blur, and shrinks a large one."""
    if image.width < smallest:
        factor = math.ceil(smallest / image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width > largest:
        return image.resize((largest, image.height * largest // image.width), Image.Resampling.LANCZOS)
    return image


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2, **tile) -> Image.Image:
    """The images in rows of `columns`, on white."""
    tiles = [fit_tile(image, **tile) for image in images]
    width, height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(tiles):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def before_and_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], prompts: Sequence[str], columns: int
) -> Image.Image:
    """Both sets of images side by side, a row for each prompt, from the same noise at the same place."""
    margin, line, gap = 8, 20, 24
    font = ImageFont.load_default(size=13)
    # Eight 512 px images a row would make a picture that no page shows; the full size is in the validation grids.
    rows = [
        [image_grid(images[start : start + columns], columns, largest=256) for images in (before, after)]
        for start in range(0, len(before), columns)
    ]
    width, height = rows[0][0].size
    picture = Image.new("RGB", (2 * margin + 2 * width + gap, line + margin + len(rows) * (height + line)), "white")
    draw = ImageDraw.Draw(picture)
    for side, label in enumerate(("before", "after")):
        draw.text((margin + side * (width + gap), 4), label, fill="black", font=font)
    for index, (row, prompt) in enumerate(zip(rows, prompts)):
        top = line + index * (height + line)
        for side, grid in enumerate(row):
            picture.paste(grid, (margin + side * (width + gap), top))
        caption = shorten(prompt or "(no prompt)", 2 * width + gap, font)
        draw.text((margin, top + height + 1), caption, fill="dimgray", font=font)
    return picture


def shorten(text: str, width: int, font) -> str:
    """`text` in one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # a letter is wider than a pixel, and measuring a text of 20,000 letter by letter takes minutes
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
