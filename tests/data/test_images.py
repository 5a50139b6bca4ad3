"""Images of every kind become RGB, and pairs of them tensors."""

import errno
import io
import os
import zipfile

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
    image_size,
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
    sources += [{"bytes": data, "path": "elsewhere.png"}]
    for source in sources:
        decoded = decode_image(source)
        assert decoded.mode == "RGB" and decoded.tobytes() == image.tobytes()
    for row in ("a.png", str(path)):
        assert decode_image(row, [tmp_path]).tobytes() == image.tobytes()
    assert decode_image(str(path), [tmp_path / "own", tmp_path]).tobytes() == image.tobytes()  # of a cache


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
        (b"no image", "^not an image that Pillow reads as one of"),
        (encode(gradient(64, 64), "JPEG")[:-200], "truncated"),
        (encode(gradient(64, 64), "PNG")[:-100], "truncated|broken"),
        ("nowhere/a.png", "nowhere/a.png: No such file"),
        (3, "a int is no image"),
    ],
)
def test_broken_images_are_one_kind_of_error(broken, message):
    with pytest.raises(BrokenImage, match=message):
        decode_image(broken)


def test_a_row_names_no_file_outside_of_its_data_set(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "private.png").write_bytes(encode(gradient(4, 4)))
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    for path in ("../private.png", str(tmp_path / "private.png"), "link.png", "/dev/zero", "/etc/passwd"):
        with pytest.raises(UserError, match=f"{path} leads out of .*data: .*copy the images there") as caught:
            decode_image({"bytes": None, "path": path}, [folder])
        assert not isinstance(caught.value, BrokenImage)  # --skip_broken_images does not hide it


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "reference://k::file:///tmp/refs.json", "simplecache::http://host/a.png",
     "zip://a.png::file:///a.zip", "zip://a.png::zip://b.zip::https://host/c.zip", "reference://k::https://host/refs.json",
     "http://host/a.png::file:///a", "local://a", "HTTP://host/a.png", "git://a/b"],
)  # fmt: skip
def test_a_row_names_urls_of_the_web_and_of_storage_alone(url, monkeypatch):
    monkeypatch.setattr(images.fsspec, "open", lambda *args: pytest.fail("opened"))
    with pytest.raises(UserError, match="may name URLs of hf, http, https, s3, gs alone"):
        decode_image(url, [])


def test_a_zip_archive_outside_of_the_data_set_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encode(gradient(4, 4)))
    url = f"zip://a.png::{tmp_path / 'a.zip'}"
    assert decode_image(url, [tmp_path]).size == (4, 4)
    with pytest.raises(BrokenImage, match="No such file"):
        decode_image(f"zip://a.png::{tmp_path / 'b.zip'}", [tmp_path])
    with pytest.raises(UserError, match="leads out of"):
        decode_image(url, [tmp_path / "data"])


def test_what_cannot_be_reached_is_no_broken_image(monkeypatch):
    """--skip_broken_images would drop the rows of an outage for good."""

    def fails(error):
        def open_url(*args):
            raise error

        return open_url

    down = FileNotFoundError("https://host/a.png")  # what fsspec makes of a server that is down
    down.__cause__ = ConnectionError("no route to host")
    for error in (down, down.__cause__, TimeoutError("no answer")):
        monkeypatch.setattr(images.fsspec, "open", fails(error))
        with pytest.raises(UserError, match="https://host/a.png cannot be read .*no (route|answer)") as caught:
            decode_image("https://host/a.png", [])
        assert not isinstance(caught.value, BrokenImage)
    gone = FileNotFoundError("https://host/a.png")
    gone.__cause__ = FileNotFoundError("404")
    for error in (gone, gone.__cause__):
        monkeypatch.setattr(images.fsspec, "open", fails(error))
        with pytest.raises(BrokenImage, match="https://host/a.png: there is no such file"):
            decode_image("https://host/a.png", [])
    monkeypatch.setattr(images.Path, "stat", fails(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match="a.png cannot be read .*Input/output error") as caught:
        decode_image("a.png")
    assert not isinstance(caught.value, BrokenImage)


def test_a_url_is_read(monkeypatch):
    image, opened = gradient(4, 4), []
    monkeypatch.setattr(images.fsspec, "open", lambda *args: opened.append(args) or io.BytesIO(encode(image)))
    assert decode_image("hf://datasets/me/mine/a.png", []).tobytes() == image.tobytes()
    assert opened == [("hf://datasets/me/mine/a.png", "rb")]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse", "zero byte", "surrogate", "long", "loop"])
def test_what_is_no_regular_file_is_a_broken_image(tmp_path, kind):
    """A FIFO or /dev/zero would be read without end."""
    path = {"device": "/dev/zero", "zero byte": "a\0.png", "surrogate": "a\ud800.png", "long": "a" * 300}.get(
        kind, kind
    )
    if kind == "fifo":
        os.mkfifo(tmp_path / path)
    elif kind == "folder":
        (tmp_path / path).mkdir()
    elif kind == "loop":
        (tmp_path / path).symlink_to(tmp_path / path)
    elif kind == "sparse":
        with (tmp_path / path).open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(BrokenImage) as caught:
        decode_image(tmp_path / path if kind != "device" else path)
    str(caught.value).encode()  # can be printed


def test_formats_are_those_of_pictures_alone(tmp_path, monkeypatch):
    """Pillow starts Ghostscript for EPS."""
    eps = encode(gradient(4, 4), "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("Ghostscript is started"))
    for data in (eps, encode(gradient(4, 4), "PCX"), encode(gradient(4, 4), "TGA")):
        (tmp_path / "a.png").write_bytes(data)
        for read, source in ((decode_image, data), (image_size, "a.png")):
            with pytest.raises(BrokenImage, match="not an image that Pillow reads as one of .*JPEG.*PNG"):
                read(source, [tmp_path])


def test_too_many_pixels_are_a_broken_image(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode_image(encode(gradient(10, 10))).size == (10, 10)
    data = encode(gradient(10, 11))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BrokenImage, match="a.png: 10 x 11 pixels are more than 100"):
        decode_image({"bytes": data, "path": "a.png"})


def test_the_limit_of_pixels_is_below_pillows_own():
    size = (12_000, 12_000)  # 0.4 GB as RGB; Pillow refuses 179 million pixels
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BrokenImage, match="more than 134217728"):
        decode_image(encode(Image.new("1", size)))


def test_an_image_for_which_memory_runs_out_is_broken(monkeypatch):
    def load(self):
        raise MemoryError

    data = encode(gradient(4, 4))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BrokenImage, match="a.png: MemoryError"):
        decode_image({"bytes": data, "path": "a.png"})


def test_float_images_keep_their_greys():
    for values in ([[0.0, 0.5], [1.0, np.inf]], [[0.0, 127.5], [255.0, -np.inf]], [[0.0, 32896.0], [65535.0, -1.0]]):
        image = decode_image(encode(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF"))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 128], [255, 0]])


def test_a_long_thin_image_takes_little_memory(monkeypatch):
    """3000 x 1 pixels scaled as a whole to a shorter side of 1024 would be 3 million pixels wide."""
    sizes, resize = [], Image.Image.resize

    def record(self, size, *args, **kwargs):
        sizes.append(size)
        assert size == (1024, 1024)  # before the memory is taken
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", record)
    for size, crop_top_left in [((3000, 1), (0, 1535488)), ((1, 3000), (1535488, 0))]:
        pair = transform_pair(gradient(*size), None, resolution=1024)
        assert pair.target.shape == (3, 1024, 1024) and pair.crop_top_left == crop_top_left
    assert sizes == [(1024, 1024)] * 2


@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_is_that_of_the_scaled_image(flip):
    """Scaling no more than the crop gives what cropping the scaled image does, but for Pillow's rounding: it may take
    rows or columns first."""
    rng = np.random.default_rng(0)
    for width, height in [(61, 40), (40, 67), (33, 100), (20, 31), (16, 16), (7, 11)]:
        image = Image.fromarray(rng.integers(96, 160, (height, width, 3), dtype=np.uint8))
        pair = transform_pair(image, None, resolution=20, augmentation=Augmentation(flip, (0.3, 0.7)))
        scaled = image.resize([20 if side == min(image.size) else 20 * side // min(image.size) for side in image.size],
                              Image.Resampling.LANCZOS)  # fmt: skip
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else scaled
        top, left = pair.crop_top_left
        expected = pixels_of(scaled.crop((left, top, left + 20, top + 20)))
        assert (pair.target - expected).abs().max() < 1.5 / 127.5


def test_only_pillows_errors_make_an_image_a_broken_one(monkeypatch):
    assert issubclass(BrokenImage, UserError)

    def bug(*args):
        raise AttributeError("a bug of ours")

    for name in ("to_rgb", "regular_file", "read_url"):
        monkeypatch.setattr(images, name, bug)
    for source in (encode(gradient(4, 4)), "a.png", "https://host/a.png"):
        with pytest.raises(AttributeError, match="a bug of ours"):
            decode_image(source)


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
