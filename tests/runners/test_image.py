# SPDX-License-Identifier: Apache-2.0
"""Pixels equal transformers' PaliGemmaProcessor with its Pillow backend; what is not an image is refused in words."""

import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from gemma_tokenizer import build_tokenizer
from PIL import Image, ImageOps

from pgxport.errors import DiskError, InputError
from pgxport.runners.image import MAX_PIXELS, load_image, pixel_values

RESOLUTION = 56
ENCODED = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    """Smooth colours with noise, so that a wrong filter, axis or channel order shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11), np.cos(x / 9 - y / 6)][:channels], -1)
    grain = np.random.default_rng(width * height).integers(-40, 40, waves.shape)
    return Image.fromarray((waves * 80 + 128 + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str) -> Image.Image:
    if mode in ("RGBA", "LA", "PA"):
        return noise(83, 61, 4).convert(mode)
    if mode == "P with transparency":
        image = noise(83, 61).quantize(32)
        image.info["transparency"] = bytes([0, 100, 255] * 10)
        return image
    if mode == "RGB with transparency":
        image = noise(83, 61).quantize(4).convert("RGB")
        image.info["transparency"] = image.getpixel((40, 30))
        return image
    return noise(83, 61).convert(mode)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    images = siglip.SiglipImageProcessorPil(size={"height": RESOLUTION, "width": RESOLUTION}, do_convert_rgb=True)
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(folder))


def reference(processor, image: Image.Image) -> np.ndarray:
    return processor(images=image, text="<image>caption en", return_tensors="np")["pixel_values"][0]


def assert_same_pixels(processor, source: Image.Image | bytes, expected: Image.Image) -> None:
    ours, theirs = pixel_values(load_image(source), RESOLUTION), reference(processor, expected)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "P with transparency", "RGB with transparency"]
)
def test_every_mode_gives_the_reference_pixels(processor, mode):
    assert_same_pixels(processor, in_mode(mode), in_mode(mode))


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 60000), (60000, 1), (2, 3), (55, 56), (56, 56), (57, 56), (224, 224), (640, 11), (301, 899), (1500, 1200)],
)
def test_every_size_gives_the_reference_pixels(processor, size):
    assert_same_pixels(processor, encoded(noise(*size), "PNG"), noise(*size))


@pytest.mark.parametrize("kind", ENCODED)
def test_every_format_gives_the_reference_pixels(processor, kind):
    data = encoded(noise(90, 70), kind, **ENCODED[kind])
    assert_same_pixels(processor, data, Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_real_photos_give_the_reference_pixels(processor, name):
    photo = Image.fromarray(pytest.importorskip("sklearn.datasets").load_sample_image(name))
    assert_same_pixels(processor, photo, photo)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(40, 30), kind, exif=exif, **ENCODED[kind])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    loaded = load_image(data)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(load_image(loaded)), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped_to_white(kind):
    grey = np.asarray(noise(40, 30).convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for source in (deep, encoded(deep, kind), grey.astype(np.uint16) * 257):
        np.testing.assert_array_equal(np.asarray(load_image(source))[:, :, 0], grey)


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, 255), (np.int32, 65535), (np.float32, 1), (np.float32, 255)])
def test_a_32_bit_image_uses_the_smallest_usual_white_that_holds_it(dtype, white):
    grey = np.asarray(noise(40, 30).convert("L")).copy()
    grey[0, :2] = 0, 255
    levels = Image.fromarray((grey / 255 * white).round(6).astype(dtype))
    assert np.abs(np.asarray(load_image(levels))[:, :, 1].astype(int) - grey).max() <= (0 if white != 1 else 1)


@pytest.mark.parametrize("level", [np.nan, np.inf, 1e9])
def test_a_float_image_without_a_usual_white_is_refused(level):
    with pytest.raises(InputError, match="no usual white"):
        load_image(Image.fromarray(np.full((2, 2), level, np.float32)))


def test_arrays_and_files_and_bytes_are_the_same_image(tmp_path):
    image = noise(20, 10)
    image.save(tmp_path / "a.png")
    sources = [image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))
    assert load_image(np.eye(3, dtype=bool)).getpixel((1, 1)) == (255, 255, 255)
    assert load_image(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)  # transparent
    assert load_image(np.zeros((2, 2, 1), np.uint8)).size == (2, 2)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int64), np.zeros(4, np.uint8), np.zeros((2, 2, 2), np.uint8),
     np.zeros((0, 5), np.uint8), np.zeros((3, 2, 2, 3), np.uint8)],
)  # fmt: skip
def test_an_array_that_would_need_a_guess_is_refused(array):
    with pytest.raises(InputError, match="array"):
        load_image(array)


def test_the_first_frame_of_an_animation_is_the_image():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert load_image(data).getpixel((4, 4)) == (255, 0, 0), kind


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)])
def test_a_decompression_bomb_is_refused_from_its_header(size):
    load_image(encoded(noise(2, 2), "PNG"))  # the plugins are imported
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="megapixels"):
            load_image(png_header(*size))
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "TIFF"])
def test_a_bomb_in_another_format_is_refused_before_it_is_decoded(kind):
    if kind == "GIF":
        data = (
            b"GIF89a"
            + struct.pack("<HH", 65535, 65535)
            + b"\x80\0\0"
            + bytes(6)
            + b","
            + struct.pack("<HHHH", 0, 0, 1, 1)
            + bytes(20)
        )
    elif kind == "BMP":
        data = b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    elif kind == "TIFF":
        tags = [
            (256, 4, 1, 60000),
            (257, 4, 1, 60000),
            (258, 3, 1, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 8),
            (277, 3, 1, 1),
        ]
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    else:
        data = encoded(Image.new("L", (16383, 3950)), "WEBP", lossless=True, method=0)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="megapixels"):
            load_image(data)
    assert time.perf_counter() - start < 0.05


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ENCODED)
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    data = encoded(noise(64, 64), kind, **ENCODED[kind])
    path = tmp_path / f"cut.{kind.lower()}"
    for share in (0.02, 0.3, 0.6):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=r"cut\."):
            load_image(path)


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "an empty file"),
        (b"hello, this is text", "beginning with b'hello"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "brand 'avif'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"P6 1 1 255\n\0\0\0", "beginning with b'P6"),  # Pillow would read it; the allow-list does not
    ],
)
def test_what_is_not_an_image_is_named(tmp_path, data, seen):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError, match=seen) as refused:
        load_image(path)
    assert "photo.jpg" in str(refused.value)
    assert "convert it to PNG or JPEG" in str(refused.value)


def test_the_content_decides_not_the_extension(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(noise(9, 9), "PNG"))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(noise(9, 9)))


@pytest.mark.parametrize("path", ["nowhere/cat.jpg", "https://example.org/cat.jpg", "", "a\0b"])
def test_a_missing_file_is_an_input_error(path):
    with pytest.raises(InputError):
        load_image(path)


def test_a_folder_or_a_device_is_not_read(tmp_path):
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="folder or a device"):
            load_image(path)


def test_an_unreadable_file_is_a_disk_error(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(noise(2, 2), "PNG"))

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DiskError, match=r"cat\.png: cannot be read: Permission denied"):
        load_image(path)


@pytest.mark.parametrize("kind", ENCODED)
def test_a_damaged_file_is_an_image_or_a_clean_refusal(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = ENCODED[kind] | ({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {})
    data = encoded(noise(24, 18), kind, **options)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(350):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
                damaged[at] = rng.integers(256)
            try:
                image = load_image(bytes(damaged))
            except InputError:
                continue
            assert image.mode == "RGB"
            assert pixel_values(image, 14).shape == (3, 14, 14)
