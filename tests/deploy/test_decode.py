"""Decoding: the RGB image that a person sees, whatever the file, and clear words for bad files."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deploy.decode import decode_image
from deploy.errors import ImageError
from tests.deploy.pictures import encoded, grey_16, picture


def over_white(rgba: Image.Image) -> np.ndarray:
    """Blend with white by definition, in float64."""
    pixels = np.asarray(rgba).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def test_8_bit_grayscale_becomes_three_equal_channels() -> None:
    """Grey stays grey."""
    grey = picture(41, 29, "L")

    assert np.array_equal(np.asarray(grey)[..., None].repeat(3, 2), np.asarray(decode_image(encoded(grey))))


@pytest.mark.parametrize(
    ("format_name", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")]
)
def test_16_bit_grayscale_is_scaled_not_clipped(format_name: str, dtype: str) -> None:
    """White is white and the middle is the middle; Pillow's own conversion makes nearly all of it white."""
    found = np.asarray(decode_image(encoded(Image.fromarray(grey_16().astype(dtype)), format_name))).astype(
        int
    )

    assert np.abs(found - np.round(grey_16() / 257)[..., None]).max() <= 1
    assert (found.min(), found.max()) == (0, 255)


def test_16_bit_grayscale_with_a_see_through_grey_shows_white_there() -> None:
    """PNG can declare one grey as transparent; also in 16 bits."""
    values = grey_16()
    values[:10] = 1234
    found = np.asarray(decode_image(encoded(Image.fromarray(values), transparency=1234)))

    assert (found[:10] == 255).all()
    assert found[12:20].max() < 200


def test_palette_colours_and_palette_transparency() -> None:
    """A palette image shows its colours, and white where its palette entry is transparent."""
    indexed = picture(33, 21).quantize(16)
    plain = decode_image(encoded(indexed))
    see_through = decode_image(encoded(indexed, transparency=3))
    holes = np.asarray(indexed) == 3

    assert np.array_equal(np.asarray(indexed.convert("RGB")), np.asarray(plain))
    assert (np.asarray(see_through)[holes] == 255).all()
    assert np.array_equal(np.asarray(plain)[~holes], np.asarray(see_through)[~holes])


def test_palette_with_partial_alpha() -> None:
    """A tRNS table of several levels is blended over white."""
    indexed = picture(33, 21).quantize(4)
    found = np.asarray(decode_image(encoded(indexed, transparency=bytes([0, 80, 160, 255]))))
    alpha = np.array([0, 80, 160, 255], np.uint8)[np.asarray(indexed)]
    rgba = Image.fromarray(np.dstack([np.asarray(indexed.convert("RGB")), alpha]))

    assert np.abs(found - over_white(rgba)).max() <= 1.5


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    """A transparent picture looks as it does on a white page, not on black."""
    image = picture(31, 17, mode)

    assert np.abs(np.asarray(decode_image(encoded(image))) - over_white(image.convert("RGBA"))).max() <= 1.5


def test_rgb_png_with_a_transparent_colour() -> None:
    """The declared colour becomes white."""
    image = picture(8, 8)
    colour = image.getpixel((2, 3))

    assert decode_image(encoded(image, transparency=colour)).getpixel((2, 3)) == (255, 255, 255)


def test_cmyk_jpeg_shows_its_colours() -> None:
    """A printer's JPEG decodes to the colours that Pillow converts it to."""
    data = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=95)

    assert np.abs(np.asarray(decode_image(data)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("as_file", [True, False])
def test_exif_rotation_is_applied_once(orientation: int, as_file: bool) -> None:
    """A photo taken sideways stands upright, from a file or an opened image, and decoding it again too."""
    image, exif = picture(16, 48), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    found = decode_image(data if as_file else Image.open(io.BytesIO(data)))
    turned = image if orientation == 1 else image.transpose(TURNS[orientation])

    assert np.array_equal(np.asarray(turned), np.asarray(found))
    assert np.array_equal(np.asarray(found), np.asarray(decode_image(found)))


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture() -> None:
    """EXIF that cannot be read is passed over."""
    data = encoded(picture(20, 20), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")

    assert decode_image(data).size == (20, 20)


def test_sources_may_be_bytes_paths_and_images(tmp_path: Path) -> None:
    """The same file gives the same picture, whichever way it is handed over."""
    path = tmp_path / "näme with 'quotes' 🐈.png"
    path.write_bytes(encoded(picture(12, 9)))
    ways = [path, str(path), path.read_bytes(), Image.open(path)]

    assert len({decode_image(way).tobytes() for way in ways}) == 1


def test_a_callers_image_is_left_alone() -> None:
    """Decoding returns an image of its own."""
    mine = picture(10, 10)
    decode_image(mine).putpixel((0, 0), (1, 2, 3))

    assert mine == picture(10, 10)


# Bad files: what the person who sent them is told.


def jpeg() -> bytes:
    """Return an ordinary photo's bytes."""
    return encoded(picture(200, 150), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"this is a text file that someone called .jpg\n", "not an image"),
        (jpeg()[: len(jpeg()) // 2], "cut short"),
        (jpeg()[:300], "damaged|cut short|not an image"),
        (encoded(picture(200, 150))[:2000], "cut short|damaged"),
        (encoded(picture(1, 1)), "too small: 1 × 1 pixels, at least 2"),
        (encoded(picture(1, 50)), "too small: 1 × 50 pixels, at least 2"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "neither 8 nor 16 bits"),
    ],
)
def test_bad_files_get_a_reason_in_plain_words(data: bytes, reason: str, tmp_path: Path) -> None:
    """The reason is one sentence that says what is wrong, the same from bytes and from a path."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError) as caught:
            decode_image(source)

        assert any(part in caught.value.reason for part in reason.split("|")), caught.value.reason
        assert "\n" not in caught.value.reason


def png_header(side: int) -> bytes:
    """Return the start of a PNG of side × side pixels, without any of them."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 1 << 20) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9000, 11000, 30000])
def test_an_image_of_30000_by_30000_is_refused_before_it_is_decoded(side: int) -> None:
    """A small file that unpacks to gigabytes is told by its header, below and above Pillow's own limits."""
    with pytest.raises(ImageError, match=r"too many pixels.* 80,000,000"):
        decode_image(png_header(side))


def test_limits_can_be_changed() -> None:
    """Both limits are the caller's to set."""
    assert decode_image(encoded(picture(1, 1)), min_side_pixels=1).size == (1, 1)
    with pytest.raises(ImageError, match="20 × 20, at most 399"):
        decode_image(encoded(picture(20, 20)), max_pixels=399)


def test_a_file_that_is_gone_or_may_not_be_read(tmp_path: Path) -> None:
    """A deleted file, a folder and a locked file each have their own reason."""
    locked = tmp_path / "locked.png"
    locked.write_bytes(encoded(picture(5, 5)))
    locked.chmod(0)
    cases = {tmp_path / "gone.jpg": "does not exist", tmp_path: "a folder"}
    if os.geteuid() != 0:  # root may read everything
        cases[locked] = "permission denied"
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=reason):
            decode_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it finds in damaged metadata
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    """Whatever bytes are cut out or overwritten, the result is an RGB image or an ImageError."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO"]))
    content = bytearray(encoded(picture(32, 32), kind))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        mode = decode_image(bytes(content), max_pixels=1_000_000).mode
    except ImageError:
        return

    assert mode == "RGB"


def test_upright_reference() -> None:
    """The table of turns in this file is Pillow's own reading of the EXIF standard."""
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.open(io.BytesIO(encoded(picture(4, 6), exif=exif)))

        assert ImageOps.exif_transpose(image).tobytes() == picture(4, 6).transpose(turn).tobytes()
