"""The one opener of images: every mode, orientation and damage, in training, evaluation and image-to-image alike."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_data import load, write

from common.errors import UsageError
from common.images import ImageError, open_image
from common.judging.image_sets import open_file

RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, 0)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "array, mode",
    [(RAMP, "F"), (RAMP * 255, "F"), (RAMP * 65535, "I"), (RAMP * 255, "I"), (RAMP * 65535, "I;16")],
    ids=["shares", "float-8", "int-16", "int-8", "16"],
)
def test_wide_grays_are_scaled_not_clipped(array, mode):
    kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    found = np.asarray(open_image(saved(Image.fromarray(array.astype(kind)), "TIFF")), int)
    assert np.abs(found - np.round(RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("array", [RAMP - 0.5, RAMP * 1e6, RAMP * np.float32("nan")], ids=["negative", "huge", "nan"])
def test_values_that_are_no_grays_are_refused(array):
    with pytest.raises(ImageError, match="values"):
        open_image(saved(Image.fromarray(array), "TIFF"))


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_what_is_transparent_lies_on_white(kind, options):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 1], pixels[:2, :, 3] = 200, 255
    found = np.asarray(open_image(saved(Image.fromarray(pixels), kind, **options)))
    assert (found[:2] == (0, 200, 0)).all() and (found[2:] == 255).all()


def test_what_is_transparent_by_a_colour_a_palette_or_half_lies_on_white():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 0, 0, 250])
    for kind in ("PNG", "GIF"):
        assert np.asarray(open_image(saved(palette, kind, transparency=1))).min() == 255
        assert np.asarray(open_image(saved(palette, kind)))[0, 0].tolist() == [0, 0, 250]
    gray = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 128)])
    assert np.abs(np.asarray(open_image(saved(gray, "PNG")), int) - 127).max() <= 1
    rgb = Image.new("RGB", (2, 2), (1, 2, 3))
    assert np.asarray(open_image(saved(rgb, "PNG", transparency=(1, 2, 3)))).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(upright))


def test_damaged_or_large_metadata_does_not_matter():
    image = Image.new("RGB", (8, 8), (200, 30, 30))
    tags = struct.pack("<H", 2) + struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 10, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + struct.pack("<Iii", 0, -1, 0)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    files = [saved(image, "JPEG", exif=exif), saved(image, "PNG", pnginfo=text)]
    files += [saved(image, "PNG", icc_profile=b"\0" * 2_000_000), saved(image, "JPEG", exif=b"Exif\0\0broken")]
    for file in files:
        assert open_image(file).size == (8, 8)


@pytest.mark.parametrize("mode, color", [("1", 1), ("L", 250), ("CMYK", 5), ("YCbCr", (250, 128, 128))])
def test_other_modes_become_rgb(mode, color):
    color = (color,) * 4 if mode == "CMYK" else color
    assert np.asarray(open_image(saved(Image.new(mode, (4, 4), color), "TIFF"))).min() >= 240


def test_bombs_and_damages_are_sentences(tmp_path, monkeypatch):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="too many"):
        open_image(tmp_path / "bomb.png")
    monkeypatch.setattr("common.images.MAX_PIXELS", 15)
    with pytest.raises(ImageError, match="4x4 pixels are too many"):
        open_image(saved(Image.new("L", (4, 4)), "PNG"))
    for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(UsageError, match="x.png can't be read as an image"):
            open_file(write(tmp_path / "x.png", content))
    with pytest.raises(UsageError, match="gone.png"):
        open_file(tmp_path / "gone.png")


def test_training_evaluation_and_init_image_open_alike(tmp_path):
    """They are the one function: a transparent picture is the same in a data set and where it is judged."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12] = (200, 30, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "a")
    trained = load(tmp_path)[0, 0, 0]["pixel_values"]
    judged = np.asarray(open_file(tmp_path / "a.png"))
    assert np.array_equal(((trained + 1) * 127.5).round().numpy().transpose(1, 2, 0), judged)
    assert judged[0, 0].tolist() == [255, 255, 255]
    import inference

    assert inference.open_image is open_image
