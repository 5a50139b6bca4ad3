"""Images of any kind as RGB, a pair of them as tensors with one size, crop and flip for both, and a record's draws."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pso_utils.errors import UserError
from pso_utils.keyed_rng import Key, keyed_noise, keyed_uniform


# ---- Decoding ----


class BrokenImage(UserError):
    """An image that is missing, unreadable or cut off; the message names its file, if it has one."""


def decode_image(image, folder: str | Path = "") -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation; transparency is laid on white, 16 bits are scaled to 8.

    Args:
        image: bytes, a path or URL, {"bytes": ..., "path": ...} (either may be None), or a PIL image.
        folder: where a relative path starts.

    Raises:
        BrokenImage: there is no image, or it cannot be read to its end.
    """
    path = None
    if isinstance(image, dict):
        path, data = image.get("path"), image.get("bytes")
        image = path if data is None else data
    elif isinstance(image, str | Path):
        path = image
    file = f"{path}: " if path else ""
    if image is None:
        raise BrokenImage(f"{file}there is no image")
    if not isinstance(image, bytes | str | Path | Image.Image):
        raise BrokenImage(f"{file}a {type(image).__name__} is no image; pass a column of image bytes or paths")
    try:
        if isinstance(image, str | Path):
            image = read_file(image, folder)
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        image.load()
        image = upright(image)
    except UnidentifiedImageError:
        raise BrokenImage(f"{file}not an image that Pillow reads") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated classes for damaged files, fsspec for URLs
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BrokenImage(f"{file}{reason}") from error
    return to_rgb(image)


def read_file(path: str | Path, folder: str | Path) -> bytes:
    if "://" in str(path):  # of a streamed data set
        with fsspec.open(str(path), "rb") as file:
            return file.read()
    return Path(folder, path).read_bytes()


def upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises as many classes for damaged metadata, around which the pixels are good
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The RGB version of a PIL image of any mode: transparency is laid on white, 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit grayscale: `convert` would clip it at 255
        values = np.asarray(image).astype(np.float32)
        if image.mode != "I" or values.max() > 255:
            values /= 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- A record's draws: functions of (seed, epoch, record) alone ----

# The third number of a key says what is drawn. It is negative, because the keys of other modules' draws have an index
# there, and two draws with one key would be equal. -2 is the order of an epoch (`pairs`).
_AUGMENTATION, _NOISE, _TIMESTEP, _REFERENCE = -1, -3, -4, -5


class Augmentation(NamedTuple):
    """`flip`: mirror the images first. `crop`: where the crop lies between the top and the bottom, and between the left
    and the right end of its room, each in [0, 1]; None for the centre."""

    flip: bool = False
    crop: tuple[float, float] | None = None


PLAIN = Augmentation()


def draw_augmentation(
    record_id: str, *, seed: int, epoch: int, center_crop: bool = False, random_flip: bool = False
) -> Augmentation:
    """A record's flip and crop in an epoch."""
    flip, top, left = keyed_uniform(_keys(seed, epoch, _AUGMENTATION, [record_id]), (3,))[0].tolist()
    return Augmentation(random_flip and flip < 0.5, None if center_crop else (top, left))


def draw_noise(record_ids: Sequence[str], shape: Sequence[int], *, seed: int, epoch: int) -> Tensor:
    """Each record's noise in an epoch, [B, *shape]."""
    return keyed_noise(_keys(seed, epoch, _NOISE, record_ids), shape)


def draw_timestep_uniform(record_ids: Sequence[str], *, seed: int, epoch: int) -> Tensor:
    """[B], uniform in [0, 1): which timestep each record is trained at in an epoch."""
    return keyed_uniform(_keys(seed, epoch, _TIMESTEP, record_ids))


def draw_reference_uniform(record_ids: Sequence[str], *, seed: int, epoch: int) -> Tensor:
    """[B], uniform in [0, 1): which of several references each record is paired with in an epoch."""
    return keyed_uniform(_keys(seed, epoch, _REFERENCE, record_ids))


def _keys(seed: int, epoch: int, purpose: int, record_ids: Sequence[str]) -> list[Key]:
    return [(seed, epoch, purpose, *map(int, record_id.split("-"))) for record_id in record_ids]


# ---- From images to tensors ----


def pixels_of(image: Image.Image) -> Tensor:
    """An image as [3, H, W], float32 in [-1, 1]."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float() / 127.5 - 1


class PairPixels(NamedTuple):
    """Pixels [3, H, W], float32 in [-1, 1]; sizes in pixels, (height, width), of the target."""

    target: Tensor
    reference: Tensor | None
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]  # in the resized and flipped image


def transform_pair(
    target: Image.Image, reference: Image.Image | None, *, resolution: int, augmentation: Augmentation = PLAIN
) -> PairPixels:
    """Square pixels of `resolution` from two RGB images, as diffusers' SDXL examples make them: the shorter side is
    resized to `resolution`, the images are flipped, then cropped.

    A reference of another size is resized to the target's first, so that both have the size and crop conditioning of
    the target.
    """
    if reference is not None and reference.size != target.size:
        reference = reference.resize(target.size, Image.Resampling.LANCZOS)
    shorter = min(target.size)
    width, height = (resolution if side == shorter else int(resolution * side / shorter) for side in target.size)
    room = (height - resolution, width - resolution)
    if augmentation.crop is None:
        top, left = (int(round(side / 2)) for side in room)
        left = room[1] - left if augmentation.flip else left  # the mirrored crop, also where the room is odd
    else:
        top, left = (min(int(fraction * (side + 1)), side) for fraction, side in zip(augmentation.crop, room))

    def pixels(image: Image.Image) -> Tensor:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = ImageOps.mirror(image) if augmentation.flip else image
        return pixels_of(image.crop((left, top, left + resolution, top + resolution)))

    reference_pixels = None if reference is None else pixels(reference)
    return PairPixels(pixels(target), reference_pixels, (target.height, target.width), (top, left))
