"""Images equal the reference bit for bit; unusual files are handled, or refused with their names."""

import functools
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from ross_jax.config import UserError
from ross_jax.data.images import (
    Decoder,
    ImageConfig,
    ImageError,
    decode,
    decode_official,
    encoder_image_config,
    preprocess,
)
from ross_jax.models.ross import RossConfig, normalise

GOLDEN = Path(__file__).parents[1] / "golden" / "image_preprocessing"
RECORDS = json.loads((GOLDEN / "records.json").read_text())
SLICES = load_file(GOLDEN / "slices.safetensors")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sha256(channels_last: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(channels_last.transpose(2, 0, 1)).tobytes()).hexdigest()


def golden_pixels(record: dict, decoder: Decoder = decode) -> np.ndarray:
    """Pixels uint8[size, size, 3] that a run gives to the processor's encoder."""
    processor = RECORDS["processors"][record["processor"]]
    kind, mean, std = record["processor"].rstrip("0123456789"), processor["image_mean"], processor["image_std"]
    size = processor["crop_size"]["height"]
    config = encoder_image_config(kind, size, tuple(mean), tuple(std), record["mode"])
    return preprocess(decoder((GOLDEN / f"{record['image']}.png").read_bytes(), record["image"]), config)


@functools.cache
def normaliser(processor: str, dtype=jnp.float32):
    """Compiled function that normalises images as a training step does."""
    values = RECORDS["processors"].get(processor, DINOV2)
    config = RossConfig(image_mean=tuple(values["image_mean"]), image_std=tuple(values["image_std"]))
    return jax.jit(lambda images: normalise(config, images, dtype))


DINOV2 = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize("decoder", [decode, decode_official])
@pytest.mark.parametrize("record", RECORDS["records"], ids=lambda r: "-".join((r["processor"], r["mode"], r["image"])))
def test_equals_reference(record, decoder):
    pixels = golden_pixels(record, decoder)
    values = np.asarray(normaliser(record["processor"])(pixels))
    assert pixels.dtype == np.uint8 and values.dtype == np.float32
    assert sha256(pixels) == record["sha256_uint8_chw"]
    assert sha256(values) == record["sha256_float32_chw"]
    name = f"{record['processor']}/{record['mode']}/{record['image']}"
    index = SLICES[f"{record['processor']}/index"]
    np.testing.assert_array_equal(values[index][:, index].transpose(2, 0, 1), SLICES[f"{name}/strided32"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("processor", ["siglip384", "clip336", "dinov2"])
def test_every_value_is_normalised_as_processors_do(processor, dtype):
    """Normalised values equal the processors' bit for bit: scaled in float64, then float32."""
    settings = RECORDS["processors"].get(processor, DINOV2)
    mean, std = np.float32(settings["image_mean"]), np.float32(settings["image_std"])
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1).reshape(1, 2, 8, 16, 3)
    expected = ((pixels * np.float64(1 / 255)).astype(np.float32) - mean) / std
    values = normaliser(processor, dtype)(pixels)
    assert values.dtype == dtype and np.asarray(values).tobytes() == expected.astype(dtype).tobytes()


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes a square image with half-pixel centres and without antialiasing."""
    where = np.clip((np.arange(size) + 0.5) * len(image) / size - 0.5, 0, len(image) - 1)
    low = np.floor(where).astype(int)
    high, share = np.minimum(low + 1, len(image) - 1), where - low
    rows = image[low] * (1 - share)[:, None, None] + image[high] * share[:, None, None]
    return rows[:, low] * (1 - share)[None, :, None] + rows[:, high] * share[None, :, None]


@pytest.mark.parametrize(("processor", "size"), [("siglip384", 432), ("clip336", 384)])
def test_uint8_image_holds_what_the_autoencoder_sees(processor, size):
    image = "photo_astronaut_120x90"
    record = next(r for r in RECORDS["records"] if (r["processor"], r["mode"], r["image"]) == (processor, "pad", image))
    pixels = golden_pixels(record)
    values = bilinear(pixels / 127.5 - 1, size)
    index = SLICES[f"{processor}/pad/{image}/images_vae_index"]
    expected = SLICES[f"{processor}/pad/{image}/images_vae_strided32"]
    # The reference has float32 weights, hence the tolerance.
    np.testing.assert_allclose(values[index][:, index].transpose(2, 0, 1), expected, atol=2e-5)


# Modes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 10, "shortest_edge": 9}, "below size"),
        ({"size": 10, "std": (1.0, 0.0, 1.0)}, "must be positive"),
        ({"size": 10, "resample": 9}, "resample 9"),
    ],
)
def test_configs_that_make_no_image(values, message):
    with pytest.raises(ValueError, match=message):
        ImageConfig(**values)


def test_modes_show_what_they_should():
    thirds = np.zeros((100, 300, 3), np.uint8)
    thirds[:, :100], thirds[:, 100:200], thirds[:, 200:] = RED, GREEN, BLUE
    image = Image.fromarray(thirds)

    def run(mode, shortest_edge=None):
        return preprocess(image, ImageConfig(30, mode=mode, shortest_edge=shortest_edge, resample=0))

    assert (run("crop") == GREEN).all()
    assert (run("square", 30) == GREEN).all()
    squashed = run("square")
    assert [tuple(squashed[15, x]) for x in (5, 15, 25)] == [RED, GREEN, BLUE]
    padded = run("pad")
    assert [tuple(padded[15, x]) for x in (5, 15, 25)] == [RED, GREEN, BLUE]
    assert (padded[[0, 9, 20, 29]] == 127).all()


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_an_odd_margin_is_larger_after_the_crop(size):
    pixels = np.arange(20, dtype=np.uint8).reshape(size[1], size[0], 1).repeat(3, axis=2)
    cropped = preprocess(Image.fromarray(pixels), ImageConfig(4, mode="crop", resample=0))
    np.testing.assert_array_equal(cropped, pixels[:4, :4])  # like CLIPImageProcessor


@pytest.mark.parametrize("mode", ["pad", "square", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (7, 5)])
@pytest.mark.parametrize("shortest_edge", [None, 40])
def test_every_shape_becomes_the_square(mode, size, shortest_edge):
    pixels = preprocess(Image.new("RGB", size, RED), ImageConfig(32, mode=mode, shortest_edge=shortest_edge))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_padded_is_resized_as_by_the_reference(data):
    """Padded images have the pixels of `expand2square` and one resize, for every filter, mean colour and shape."""
    width, height, size = (data.draw(st.integers(1, 90)) for _ in range(3))
    mean = data.draw(st.tuples(*[st.floats(0, 1)] * 3))
    resample = data.draw(st.sampled_from(Image.Resampling))
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), np.uint8)
    side, image = max(width, height), Image.fromarray(pixels)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((size, size), resample))
    np.testing.assert_array_equal(preprocess(image, ImageConfig(size, mean, resample=resample)), expected)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_extreme_aspect_ratio_is_refused(mode):
    image = Image.new("RGB", (200_000, 1))
    with pytest.raises(ImageError, match=r"strip\.png: 200000 x 1 would become"):
        preprocess(image, ImageConfig(384, mode=mode), "strip.png")


# Files


def plain(mode: str, colour) -> bytes:
    return encode(Image.new(mode, (8, 6), colour))


def sixteen_bit(value: int) -> bytes:
    return encode(Image.fromarray(np.full((6, 8), value, np.uint16)))


def palette_with_transparency() -> bytes:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([*BLUE, *GREEN])
    return encode(image, transparency=1)


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 6), colour) for colour in (GREEN, RED)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def chunk(kind: bytes, content: bytes, damage: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ damage
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunk(*values) -> bytes:
    """A green PNG with one more chunk after its header."""
    data = plain("RGB", GREEN)
    return data[:33] + chunk(*values) + data[33:]


def with_segment(marker: int, content: bytes) -> bytes:
    """A green JPEG with one more segment at its beginning."""
    data = encode(Image.new("CMYK", (8, 6), (255, 0, 255, 0)), "JPEG", quality=100)
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


HANDLED = {
    "png_damaged_exif": (with_chunk(b"eXIf", b"II*\0", 1), GREEN),
    "png_much_text": (with_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))), GREEN),
    "png_cut_resolution": (with_chunk(b"pHYs", b"1"), GREEN),
    "jpeg_cut_profile": (with_segment(0xE2, b"ICC_PROFILE\0"), GREEN),
    "jpeg_cut_header": (with_segment(0xE0, b"JFIF\0"), GREEN),
    "rgb": (plain("RGB", GREEN), GREEN),
    "rgba": (plain("RGBA", (*GREEN, 0)), GREEN),
    "grey": (plain("L", 77), (77, 77, 77)),
    "grey_alpha": (plain("LA", (77, 9)), (77, 77, 77)),
    "bilevel": (plain("1", 1), WHITE),
    "palette": (palette_with_transparency(), GREEN),
    "grey_16_bit": (sixteen_bit(128 * 257), (128, 128, 128)),
    "grey_16_bit_rounds": (sixteen_bit(129), (1, 1, 1)),
    "white_16_bit": (sixteen_bit(65535), WHITE),
    "cmyk": (encode(Image.new("CMYK", (8, 6), (255, 0, 255, 0)), "JPEG", quality=100), GREEN),
    "gif": (animation("GIF"), GREEN),
    "webp": (animation("WEBP"), GREEN),
    "tiff": (encode(Image.new("RGB", (8, 6), GREEN), "TIFF"), GREEN),
    "bmp": (encode(Image.new("RGB", (8, 6), GREEN), "BMP"), GREEN),
    "array": (np.full((6, 8, 3), GREEN, np.uint8), GREEN),
    "grey_array": (np.full((6, 8, 1), 77, np.uint8), (77, 77, 77)),
}


@pytest.mark.parametrize("name", HANDLED)
def test_handled(name):
    data, colour = HANDLED[name]
    image = decode(data, name)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    lossy = 2 if name == "cmyk" or "jpeg" in name else 0
    np.testing.assert_allclose(np.asarray(image), np.broadcast_to(colour, (6, 8, 3)), atol=lossy)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    stored_as = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> transposition that it undoes
    stored = upright.transpose(Image.Transpose(stored_as[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(decode_official(data, "x")), np.asarray(stored))


def bomb() -> bytes:
    """A small PNG whose header says 20000 x 20000."""
    data = bytearray(plain("L", 0))
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + bytes(data[24:29])
    data[12:29], data[29:33] = header, struct.pack(">I", zlib.crc32(header))
    return bytes(data)


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
REFUSED = {
    "empty": (b"", "empty, or no image"),
    "text": (b"404", "no image that Pillow can read"),
    "page": (b"<html>404</html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer.*git lfs pull"),
    "truncated_jpeg": (encode(NOISE, "JPEG")[:1500], "broken image"),
    "truncated_png": (encode(NOISE)[:5000], "broken image"),
    "bomb": (bomb(), "decompression bomb"),
    "float": (encode(Image.new("F", (4, 4)), "TIFF"), "32-bit samples"),
    "int": (encode(Image.new("I", (4, 4)), "TIFF"), "32-bit samples"),
    "array": (np.zeros((4, 4, 7), np.uint8), "broken image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    data, message = REFUSED[name]
    with pytest.raises(ImageError, match=f"folder/{name}: .*{message}"):
        decode(data, f"folder/{name}")
    assert issubclass(ImageError, UserError)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data):
    source = bytearray(encode(NOISE.resize((16, 16)), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    for decoder in (decode, decode_official):
        try:
            assert decoder(bytes(source), "x").mode == "RGB"
        except ImageError as error:
            assert str(error).startswith("x: ")
