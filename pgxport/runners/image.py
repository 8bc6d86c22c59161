# SPDX-License-Identifier: Apache-2.0
"""Turn whatever a user calls an image into upright 8-bit RGB, then into the array the vision encoder reads."""

import io
from functools import cache
from pathlib import Path

import numpy as np

# The plugins are imported to keep `Image.open` from importing
# all of them: no EPS, no Ghostscript, no format we never test.
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401

from pgxport.bundle.manifest import Pixels
from pgxport.errors import DiskError, InputError

PALIGEMMA = Pixels()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Decoded, the limit is 192 MB of RGB. A 20 KB PNG can announce a gigapixel; the header alone decides.
MAX_PIXELS = 64_000_000
# The largest honest file: MAX_PIXELS of uncompressed 16-bit RGBA.
MAX_BYTES = 8 * MAX_PIXELS

# EXIF tag 0x0112: what undoes it. `ImageOps.exif_transpose` does the same,
# then rewrites the whole EXIF block, which odd cameras' tags make fail.
ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """Open an image as upright 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Args:
        source: A file, its bytes, a Pillow image, or an array [H, W] or [H, W, 1|3|4] of bool, uint8 or uint16.

    Raises:
        InputError: It is missing, not one of FORMATS, damaged, or larger than MAX_PIXELS.
        DiskError: It exists and cannot be read.

    >>> load_image(np.full((2, 3), 65535, np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    """
    if isinstance(source, np.ndarray):
        name, image = "the array", _from_array(source)
    elif isinstance(source, Image.Image):
        name, image = "the image", source
    elif isinstance(source, bytes):
        name = f"the image ({len(source)} bytes)"
        image = _open(name, source)
    else:
        name = str(source)
        image = _open(name, read_picture(Path(source)))

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: {width} × {height} is {width * height / 1e6:.0f} megapixels, more than the {MAX_PIXELS / 1e6:.0f} "
            f"pgx decodes; scale it down first, the model sees at most 896 × 896"
        )
    if width * height == 0:
        raise InputError(f"{name}: {width} × {height} has no pixels; give an image of at least 1 × 1")
    try:
        image.load()
        return _rgb(_upright(image))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a decoder handed hostile bytes raises anything, from OSError to struct.error
        cause = str(error) or type(error).__name__
        raise InputError(
            f"{name}: {image.format or image.mode} of {width} × {height} cannot be decoded: {cause}; "
            f"the file is truncated or damaged, fetch or save it again"
        ) from error


def pixel_values(image: Image.Image, resolution: int, pixels: Pixels = PALIGEMMA) -> np.ndarray:
    """An RGB image as float32 [3, R, R], resized without keeping its aspect; by default in [-1, 1], as PaliGemma was trained.

    >>> pixel_values(Image.new("RGB", (60, 10), "white"), 14).shape
    (3, 14, 14)
    """
    resized = np.asarray(image.resize((resolution, resolution), Image.Resampling[pixels.resample.upper()]))  # [R, R, 3]
    return np.stack([levels[resized[..., channel]] for channel, levels in enumerate(_levels(pixels))])


@cache
def _levels(pixels: Pixels) -> np.ndarray:
    """What the encoder reads for each level of each channel, float32 [3, 256].

    In the reference's order of rounding: the rescaling in float64, the rest in float32.
    """
    rescaled = (np.arange(256) * pixels.rescale).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (pixels.mean, pixels.std))
    return (rescaled - mean) / std


def read_picture(path: Path) -> bytes:
    """An image file's bytes, not yet looked at.

    Raises:
        InputError: it is missing, no file, or larger than MAX_BYTES.
        DiskError: it exists and cannot be read.
    """
    try:
        if not path.is_file():
            state = "is a folder or a device" if path.exists() else "does not exist"
            raise InputError(f"{path}: {state}; give the path of an image file (pgx downloads nothing: save a URL first)")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(
                f"{path}: {size / 1e6:.0f} MB, more than the {MAX_BYTES / 1e6:.0f} MB pgx reads; scale it down first"
            )
        return path.read_bytes()
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}; check the permissions and the disk") from error


def _open(name: str, data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name}: {error}; pgx decodes at most {MAX_PIXELS / 1e6:.0f} megapixels, scale it down first"
        ) from error
    except Exception as error:  # see load_image
        raise InputError(
            f"{name}: not a readable {', '.join(FORMATS)} image but {_seen(data)}; convert it to PNG or JPEG first"
        ) from error


def _seen(data: bytes) -> str:
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        return f"HEIC, AVIF or video (brand {data[8:12].decode('latin-1')!r})"
    if b"<svg" in data[:1024].lower():
        return "SVG, a drawing without pixels"
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF")):
        return "EPS or PDF, a program rather than pixels"
    return f"{len(data)} bytes beginning with {data[:8]!r}"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    drawable = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not drawable or array.dtype not in (np.bool_, np.uint8, np.uint16):
        # Floats are refused: whether white is 1 or 255 would be a guess.
        raise InputError(
            f"the array is {array.dtype} {list(array.shape)}; give uint8, [H, W] or [H, W, 3], "
            f"for floats in [0, 1]: (x * 255).round().astype(np.uint8)"
        )
    if array.size == 0:
        raise InputError(f"the array {list(array.shape)} has no pixels; give an image of at least 1 × 1")
    if array.dtype != np.uint8:
        array = _eight_bits(array, 1 if array.dtype == np.bool_ else 65535)
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(image: Image.Image) -> Image.Image:
    turn = ORIENTATION.get(image.getexif().get(0x0112, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # On purpose not what transformers does: `convert("RGB")` clips at 255, so a 16-bit photo turns white.
        values = np.asarray(image)
        image = Image.fromarray(_eight_bits(values, _white(values, image.mode)))
    if "transparency" in image.info or image.mode.endswith(("A", "a")):
        # The colour under a transparent pixel is arbitrary.
        # White is what transformers' Pillow backend puts there.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info.clear()  # the orientation would otherwise be applied again by the next reader
    return rgb


def _white(values: np.ndarray, mode: str) -> float:
    """The level of white: defined for 16 bits; for 32-bit integers and floats the smallest usual one that holds the values."""
    if mode not in ("I", "F"):
        return 65535
    top = float(values.max())
    usual = (1, 255, 65535) if mode == "F" else (255, 65535, 2**31 - 1)
    for white in usual:
        if top <= white:
            return white
    raise InputError(f"its levels reach {top:g}, no usual white ({', '.join(map(str, usual))}); save it as 8-bit or 16-bit PNG")


def _eight_bits(values: np.ndarray, white: float) -> np.ndarray:
    return (np.clip(values / np.float32(white), 0, 1) * 255 + 0.5).astype(np.uint8)
