"""Images of any kind as RGB, and a pair of them as tensors: one size, one crop and one flip for both."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .mdp import keyed_noise


INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# What a record's draws are for: a place in their keys, where the keys of other draws have a count from 0 on.
_AUGMENTATION, _NOISE, _TIMESTEP, _REFERENCE = -1, -3, -4, -5  # -2 is an epoch's order


# ---- Decoding ----


class BrokenImage(ValueError):
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
        return to_rgb(upright(image))
    except UnidentifiedImageError:
        raise BrokenImage(f"{file}not an image that Pillow reads") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated classes for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BrokenImage(f"{file}{reason}") from error


def read_file(path: str | Path, folder: str | Path) -> bytes:
    if "://" in str(path):  # of a streamed data set
        with fsspec.open(str(path), "rb") as file:
            return file.read()
    return Path(folder, path).read_bytes()


def upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around sound pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: `convert` would clip it at 255
        values = np.asarray(image).astype(np.float32)
        if image.mode != "I" or values.max() > 255:
            values /= 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- From images to tensors ----


class Augmentation(NamedTuple):
    """`flip`: mirror the images first. `crop`: the crop's place from the top and from the left, as fractions of the
    room that it has, in [0, 1]; None for the centre."""

    flip: bool = False
    crop: tuple[float, float] | None = None


PLAIN = Augmentation()


def draw_augmentation(
    seed: int, epoch: int, record_id: str, center_crop: bool = False, random_flip: bool = False
) -> Augmentation:
    """A record's flip and crop in an epoch: a function of (seed, epoch, record) alone."""
    flip, top, left = _draw_uniform(seed, epoch, _AUGMENTATION, [record_id], (3,))[0].tolist()
    return Augmentation(random_flip and flip < 0.5, None if center_crop else (top, left))


def draw_noise(seed: int, epoch: int, record_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Noise [B, *shape] of each record in an epoch: a function of (seed, epoch, record) alone, as the draws below."""
    return keyed_noise([_key(seed, epoch, _NOISE, record_id) for record_id in record_ids], shape)


def draw_timestep_places(seed: int, epoch: int, record_ids: Sequence[str]) -> Tensor:
    """Where among the timesteps each record is trained in an epoch, [B], uniform in [0, 1)."""
    return _draw_uniform(seed, epoch, _TIMESTEP, record_ids)


def draw_reference_places(seed: int, epoch: int, record_ids: Sequence[str]) -> Tensor:
    """Which of several references each record is paired with in an epoch, [B], uniform in [0, 1)."""
    return _draw_uniform(seed, epoch, _REFERENCE, record_ids)


def _draw_uniform(seed, epoch, purpose, record_ids, shape=()) -> Tensor:
    keys = [_key(seed, epoch, purpose, record_id) for record_id in record_ids]
    # from normal to uniform; float32 rounds a draw of more than five deviations to 1
    return torch.special.ndtr(keyed_noise(keys, shape)).clamp(max=1 - 2**-24)


def _key(seed: int, epoch: int, purpose: int, record_id: str) -> tuple[int, ...]:
    return (seed, epoch, purpose, *map(int, record_id.split("-")))


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as [3, H, W], float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


class PairPixels(NamedTuple):
    """Pixels [3, H, W], float32 in [-1, 1]; sizes in pixels, (height, width), of the target."""

    target: Tensor
    reference: Tensor | None
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]  # in the resized and flipped image


def transform_pair(
    target: Image.Image,
    reference: Image.Image | None,
    resolution: int,
    interpolation: str = "lanczos",
    augmentation: Augmentation = PLAIN,
) -> PairPixels:
    """Square pixels of `resolution` from two RGB images, as diffusers' SDXL examples make them: the shorter side is
    resized to `resolution`, the images are flipped, then cropped.

    A reference of another size is resized to the target's first, so that both have the size and crop conditioning of
    the target.
    """
    resample = INTERPOLATIONS[interpolation]
    if reference is not None and reference.size != target.size:
        reference = reference.resize(target.size, resample)
    shorter = min(target.size)
    width, height = (resolution if side == shorter else int(resolution * side / shorter) for side in target.size)
    room = (height - resolution, width - resolution)
    if augmentation.crop is None:
        top, left = (int(round(side / 2)) for side in room)
        left = room[1] - left if augmentation.flip else left  # the mirrored crop, also where the room is odd
    else:
        top, left = (min(int(place * (side + 1)), side) for place, side in zip(augmentation.crop, room))

    def pixels(image: Image.Image) -> Tensor:
        image = image.resize((width, height), resample)
        image = ImageOps.mirror(image) if augmentation.flip else image
        image = image.crop((left, top, left + resolution, top + resolution))
        return pixels_of(image)

    return PairPixels(
        pixels(target),
        None if reference is None else pixels(reference),
        (target.height, target.width),
        (top, left),
    )
