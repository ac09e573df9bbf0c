"""Opening an image, for training, evaluation and sampling alike: upright, RGB, of eight bits, whatever its file is.

Only Pillow's readers of IMAGE_FORMATS are used. What is transparent lies on white; grays of 16 bits and more are
scaled, not clipped; a broken tag or a large text beside the pixels does not matter; the first page or frame counts.
"""

import numpy as np
from PIL import Image, PngImagePlugin

# Pillow's other readers stay closed to data from strangers (EPS, for one, would start Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
IMAGE_EXTENSIONS = {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "gif", "tif", "tiff", "avif"}
MAX_PIXELS = 100_000_000
BACKGROUND = (255, 255, 255)  # under what is transparent
ORIENTATION = 0x0112  # of Exif
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of a text or profile in a PNG, unpacked: Pillow's 1 MB refuses pictures that carry the workflow they were made by.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26


class ImageError(ValueError):
    """A file that is no image, or one that can't be used; says why, not which."""


def open_image(file):
    """The RGB image in a path or binary file. Raises ImageError, whatever the file holds."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}x{image.height} pixels are too many")
            image.load()
            upright = UPRIGHT.get(_orientation(image))
            image = to_rgb(image)
            return image if upright is None else image.transpose(upright)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("it has too many pixels") from None
    except MemoryError:
        raise ImageError("it is too large") from None
    except Exception as error:  # broken bytes make Pillow's readers raise anything
        said = str(error).strip().splitlines()
        raise ImageError(said[0] if said else type(error).__name__) from error


def _orientation(image):
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # tags that are broken say nothing
        return None


def to_rgb(image):
    """A loaded Pillow image of any mode as RGB. Raises ImageError where its numbers are no grays."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grays(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _grays(values):
    """Grays of a wide type as uint8 (H, W): floats up to 1 are shares of white, integers have 8 or 16 bits."""
    if not np.isfinite(values).all() or values.min() < 0:
        raise ImageError("it has values that are no grays: negative ones, or infinite")
    most = values.max()
    if np.issubdtype(values.dtype, np.floating) and most <= 1:
        return np.round(values * 255).astype(np.uint8)
    if most > 65535:
        raise ImageError(f"its values go up to {most:g}: scale them to 8 or 16 bits")
    wide = values.dtype.itemsize == 2 or most > 255
    return (values / 257 if wide else values).round().astype(np.uint8)
