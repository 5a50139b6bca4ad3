"""Images of every kind become RGB, and pairs of them tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pso_utils.data import images
from pso_utils.data.images import (
    Augmentation,
    BrokenImage,
    decode_image,
    draw_augmentation,
    draw_noise,
    draw_reference_uniform,
    draw_timestep_uniform,
    pixels_of,
    to_rgb,
    transform_pair,
)
from pso_utils.errors import UserError


def encode(image: Image.Image, format_name: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_bytes_paths_dicts_and_pil_images_decode_alike(tmp_path):
    image = gradient(6, 4)
    data = encode(image)
    (tmp_path / "a.png").write_bytes(data)
    path = tmp_path / "a.png"
    sources = [data, str(path), path, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, image]
    sources += [{"bytes": data, "path": "elsewhere.png"}, path.as_uri()]
    for source in sources:
        decoded = decode_image(source)
        assert decoded.mode == "RGB" and decoded.tobytes() == image.tobytes()
    assert decode_image("a.png", tmp_path).tobytes() == image.tobytes()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    for format_name in ["PNG", "JPEG"]:
        image = decode_image(encode(gradient(32, 16), format_name, exif=exif))
        assert image.size == (16, 32)
        red, green, _ = image.getpixel((15, 0))  # the top right corner was the top left one
        assert red < 30 and green < 30


def test_damaged_exif_does_not_cost_the_image():
    assert decode_image(encode(gradient(8, 4), "JPEG", exif=b"Exif\0\0nonsense")).size == (8, 4)


def test_transparency_is_laid_on_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for data in [encode(rgba), encode(palette, transparency=1), encode(palette, "GIF", transparency=1)]:
        image = decode_image(data)
        assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]
    gray = Image.new("LA", (1, 1), (0, 128))
    assert decode_image(encode(gray)).getpixel((0, 0)) == (127, 127, 127)


def test_gray_palette_cmyk_and_binary_images_are_converted():
    assert decode_image(encode(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (1, 1), (10, 200, 30)).quantize(4)
    assert decode_image(encode(palette)).getpixel((0, 0)) == (10, 200, 30)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(np.subtract(decode_image(encode(cmyk, "TIFF")).getpixel((4, 4)), (255, 0, 0))).max() < 3


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    for format_name in ["PNG", "TIFF"]:
        image = decode_image(encode(Image.fromarray(values), format_name))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 100], [200, 255]])


@pytest.mark.parametrize(
    "broken, message",
    [
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        ({"bytes": b"", "path": "a.png"}, "a.png: not an image"),
        (b"no image", "^not an image that Pillow reads$"),
        (encode(gradient(64, 64), "JPEG")[:-200], "truncated"),
        (encode(gradient(64, 64), "PNG")[:-100], "truncated|broken"),
        ("nowhere/a.png", "nowhere/a.png: No such file"),
        (3, "a int is no image"),
    ],
)
def test_broken_images_are_one_kind_of_error(broken, message):
    with pytest.raises(BrokenImage, match=message):
        decode_image(broken)


def test_only_pillows_errors_make_an_image_a_broken_one(monkeypatch):
    assert issubclass(BrokenImage, UserError)

    def bug(image):
        raise AttributeError("a bug of ours")

    monkeypatch.setattr(images, "to_rgb", bug)
    with pytest.raises(AttributeError, match="a bug of ours"):
        decode_image(encode(gradient(4, 4)))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_give_an_rgb_image_or_a_broken_one(format_name):
    """Whatever is damaged: nothing but `BrokenImage` is caught by --skip_broken_images."""
    data, rng = encode(gradient(40, 30), format_name), np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        damaged[rng.integers(8, len(data), size=rng.integers(1, 6))] = rng.integers(0, 256)
        try:
            assert decode_image(damaged.tobytes()).mode == "RGB"
        except BrokenImage:
            pass


def test_pixels_of_an_image_of_any_mode_are_those_of_its_rgb_version():
    rgba = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (pixels_of(rgba) == 1).all() and to_rgb(rgba).mode == "RGB"


def test_pixels_are_the_shorter_side_resized_and_the_centre_cropped():
    image = gradient(60, 40)
    pair = transform_pair(image, None, resolution=20)
    expected = image.resize((30, 20), Image.Resampling.LANCZOS).crop((5, 0, 25, 20))
    np.testing.assert_array_equal(((pair.target + 1) * 127.5).round().permute(1, 2, 0), np.asarray(expected))
    assert pair.target.dtype == torch.float32 and pair.reference is None
    assert (pair.original_size, pair.crop_top_left) == ((40, 60), (0, 5))


def test_black_is_minus_one_and_white_is_one():
    black, white = (Image.new("RGB", (3, 3), color) for color in ("black", "white"))
    pair = transform_pair(black, white, resolution=3)
    assert (pair.target == -1).all() and (pair.reference == 1).all()


def test_identical_images_stay_identical_under_every_crop_and_flip():
    image = gradient(50, 31)
    for seed in range(20):
        augmentation = draw_augmentation("0", seed=seed, epoch=0, random_flip=True)
        pair = transform_pair(image, image, resolution=16, augmentation=augmentation)
        assert torch.equal(pair.target, pair.reference)
        red, green = pair.target[0], pair.target[1]
        assert (red[0, 0] > red[0, -1]) == augmentation.flip and green[0, 0] < green[-1, 0]


def test_the_reference_takes_the_targets_size_and_crop():
    target, reference = gradient(60, 40), gradient(40, 90)
    augmentation = Augmentation(crop=(0.0, 1.0))
    pair = transform_pair(target, reference, resolution=20, augmentation=augmentation)
    resized = reference.resize(target.size, Image.Resampling.LANCZOS)
    assert torch.equal(pair.reference, transform_pair(resized, None, resolution=20, augmentation=augmentation).target)
    assert pair.original_size == (40, 60)
    assert (pair.target - pair.reference).abs().max() < 0.1  # both gradients span the target's frame


def test_the_crops_place_is_that_in_the_flipped_image():
    image = gradient(60, 40)
    pair = transform_pair(image, None, resolution=20, augmentation=Augmentation(flip=True, crop=(0.0, 0.0)))
    assert pair.crop_top_left == (0, 0)
    red = (pair.target[0] + 1) / 2
    assert red[0, 0] > 0.98 and abs(red[0, -1] - 1 / 3) < 0.05  # the right end of the unflipped image
    top_left = transform_pair(
        gradient(40, 60), None, resolution=20, augmentation=Augmentation(crop=(1.0, 0.5))
    ).crop_top_left
    assert top_left == (10, 0)


@pytest.mark.parametrize("width", [60, 61, 67])
def test_the_centres_crop_of_a_mirrored_image_is_the_mirrored_crop(width):
    """So that a cache of both ways round holds what training asks for."""
    image = gradient(width, 40)
    plain = transform_pair(image, None, resolution=40)
    flipped = transform_pair(image, None, resolution=40, augmentation=Augmentation(flip=True))
    assert torch.equal(flipped.target, plain.target.flip(-1))
    assert flipped.crop_top_left[1] == width - 40 - plain.crop_top_left[1]


def test_augmentations_are_functions_of_seed_epoch_and_record():
    keys = [("1", 0, 0), ("1", 1, 0), ("1", 0, 1), ("2", 0, 0), ("1-2", 0, 0)]
    assert len({draw_augmentation(record_id, seed=seed, epoch=epoch) for record_id, seed, epoch in keys}) == 5
    first = {"record_id": "1", "seed": 0, "epoch": 0}
    assert draw_augmentation(**first) == draw_augmentation(**first)
    assert draw_augmentation(**first, center_crop=True) == Augmentation(False, None)
    many = [draw_augmentation(str(row), seed=0, epoch=0, random_flip=True) for row in range(400)]
    assert 150 < sum(draw.flip for draw in many) < 250
    crops = torch.tensor([draw.crop for draw in many])
    assert crops.min() >= 0 and crops.max() <= 1 and ((crops.mean(0) - 0.5).abs() < 0.06).all()


def test_a_records_draws_do_not_depend_on_the_batch_and_differ_by_purpose():
    ids, key = [str(row) for row in range(300)], {"seed": 3, "epoch": 1}
    uniform = {draw: draw(ids, **key) for draw in (draw_timestep_uniform, draw_reference_uniform)}
    for draw, values in uniform.items():
        assert torch.equal(values[5:6], draw(["5"], **key)) and not torch.equal(values, draw(ids, seed=3, epoch=2))
        assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.06
    assert not torch.equal(*uniform.values())
    noise = draw_noise(ids, (4, 2, 2), **key)
    assert noise.shape == (300, 4, 2, 2) and torch.equal(noise[5:6], draw_noise(["5"], (4, 2, 2), **key))
    # As drawn since the first release: runs can be repeated and resumed with later versions
    values = [
        *draw_augmentation("3-17", seed=1, epoch=2).crop,
        *draw_noise(["3-17"], (2,), seed=1, epoch=2)[0].tolist(),
    ]
    values += [draw(["3-17"], seed=1, epoch=2).item() for draw in (draw_timestep_uniform, draw_reference_uniform)]
    assert values == pytest.approx([0.1505083, 0.7638577, -0.0183650, -0.7293751, 0.9110577, 0.9528170], abs=1e-6)
