"""Images of any kind as RGB, a pair of them as tensors with one size, crop and flip for both, and a record's draws."""

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.keyed_rng import Key, keyed_noise, keyed_uniform


# ---- Decoding ----

# Not all that Pillow knows: for EPS it starts Ghostscript, and others' readers are seldom looked at
Image.init()
FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
)
SCHEMES = ("hf", "http", "https", "s3", "gs")
MAX_PIXELS = 2**27  # 400 MB as RGB
MAX_FILE_SIZE = 2**30  # bytes

# What the operating system says of a path that leads to no file, in contrast to a disk or a network that fails
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}


class BrokenImage(UserError):
    """An image that is missing, unreadable, too large or cut off; the message names its file, if it has one."""


def decode_image(image, folders: Sequence[Path] | None = None) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation; transparency is laid on white, 16 bits and floats are
    scaled to 8 bits.

    Args:
        image: bytes, a path or URL, {"bytes": ..., "path": ...} (either may be None), or a PIL image.
        folders: those that a path of a data set's row may lead into; a relative one starts in the first. None: the
            path is the user's own.

    Raises:
        BrokenImage: there is no image, or it cannot be read to its end.
        UserError: a path or URL that a row may not name, or that cannot be reached.
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
    if isinstance(image, str | Path):
        image = read_bytes(image, folders)
    with _broken_images(file):
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        check_size(image)
        image.load()
        image = upright(image)
    return to_rgb(image)


def image_size(path: str, folders: Sequence[Path]) -> tuple[int, int]:
    """The sides of a file's image as they are stored, by its header alone; errors as of `decode_image`."""
    with _unreadable_files(path), regular_file(path, folders).open("rb") as file, _broken_images(f"{path}: "):
        image = Image.open(file, formats=FORMATS)
        check_size(image)
        return image.size


def check_size(image: Image.Image):
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}; make it smaller")


@contextmanager
def _broken_images(file: str) -> Iterator[None]:
    """What decoders raise within this is a `BrokenImage` whose message begins with `file`."""
    try:
        yield
    except UnidentifiedImageError:
        raise BrokenImage(f"{file}not an image that Pillow reads as one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated classes for damaged files
        raise BrokenImage(f"{file}{str(error) or type(error).__name__}") from error


def read_bytes(path: str | Path, folders: Sequence[Path] | None) -> bytes:
    """What a path or URL leads to; `folders` and errors as in `decode_image`."""
    with _unreadable_files(path):
        if "://" in str(path):
            return read_url(str(path), folders)
        file = regular_file(path, folders)
        size = file.stat().st_size
        if size > MAX_FILE_SIZE:
            raise BrokenImage(f"{path}: {size} bytes are more than {MAX_FILE_SIZE}; make it smaller")
        return file.read_bytes()


@contextmanager
def _unreadable_files(path: str | Path) -> Iterator[None]:
    """What the operating system says of a path that leads to no file is a `BrokenImage`, another failure of it a
    `UserError`."""
    try:
        yield
    except ValueError as error:  # a zero byte or a surrogate in the path
        raise BrokenImage(f"{str(path)!r}: {error}") from error
    except OSError as error:
        if error.errno in _NO_FILE:
            raise BrokenImage(f"{path}: {error.strerror}") from error
        raise UserError(f"{path} cannot be read ({first_line(error)}): mend that, then go on") from error


def regular_file(path: str | Path, folders: Sequence[Path] | None) -> Path:
    """Where a path leads, links followed; a FIFO or a device could be read without end."""
    file = Path(os.path.realpath(os.path.join(*(folders or [])[:1], path)))
    if folders is not None and not any(file.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise UserError(
            f"{path} leads out of {folders[0]}: the rows of a data set may name files in its own folder alone, links"
            " followed; copy the images there"
        )
    if not stat.S_ISREG(file.stat().st_mode):
        raise BrokenImage(f"{path}: not a regular file")
    return file


def read_url(url: str, folders: Sequence[Path] | None) -> bytes:
    """What a URL leads to, or a file in a zip archive, as `datasets` names those of zipped folders."""
    member, _, location = url.rpartition("::")
    is_allowed = not member or (member.startswith("zip://") and "::" not in member)  # others run code
    if "://" in location:
        is_allowed = is_allowed and location.partition("://")[0] in SCHEMES
    else:
        location = str(regular_file(location, folders))
        is_allowed = is_allowed and "::" not in location
    if not is_allowed:
        raise UserError(
            f"{url}: the rows of a data set may name URLs of {', '.join(SCHEMES)} alone, and files in zip archives;"
            " store the images themselves in it"
        )
    try:
        with fsspec.open(f"{member}::{location}" if member else url, "rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
    except Exception as error:  # each file system has its own for an outage, for which no image is to blame
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # which fsspec says of a server that is down, too
        is_missing = isinstance(error, FileNotFoundError)
        if is_missing and not (url.startswith("http") and is_outage(cause)):
            raise BrokenImage(f"{url}: there is no such file") from error
        raise UserError(f"{url} cannot be read ({first_line(cause)}): mend that, then go on") from error
    if len(data) > MAX_FILE_SIZE:
        raise BrokenImage(f"{url}: more than {MAX_FILE_SIZE} bytes; make it smaller")
    return data


def is_outage(cause: Exception) -> bool:
    """Whether this, from an HTTP client, tells of a server that does not answer, or not as it should."""
    return not isinstance(cause, FileNotFoundError) and getattr(cause, "status", None) not in (404, 410)


def upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises as many classes for damaged metadata, around which the pixels are good
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The RGB version of a PIL image of any mode: transparency is laid on white, 16 bits and floats are scaled to 8
    bits, floats from [0, 1] where none is above 1."""
    if image.mode.startswith("I") or image.mode == "F":  # grayscale that `convert` would clip at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        if image.mode == "F" and values.max() <= 1:
            values *= 255
        elif image.mode.startswith("I;") or values.max() > 255:
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

    # The crop alone is scaled: the whole of an image of 1 x 3000 pixels would take gigabytes
    first = room[1] - left if augmentation.flip else left  # in the image that is not flipped
    corners = np.array([[first, top], [first + resolution, top + resolution]])
    box = (corners * target.size / [width, height]).clip(0, target.size).flatten().tolist()

    def pixels(image: Image.Image) -> Tensor:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
        return pixels_of(ImageOps.mirror(image) if augmentation.flip else image)

    reference_pixels = None if reference is None else pixels(reference)
    return PairPixels(pixels(target), reference_pixels, (target.height, target.width), (top, left))
