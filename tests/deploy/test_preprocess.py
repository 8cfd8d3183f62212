"""Decoding and preprocessing: the same pixels as open_clip's transform, and clear words for bad files."""

import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from deploy import preprocess
from deploy.errors import ImageError, VerifyError
from deploy.preprocess import Preprocessing, decode_image

CONFIGS = {
    "ViT-B-16": {"size": 224},
    "tiny": {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "bilinear": {"size": (64, 64), "interpolation": "bilinear"},
    "wide": {"size": (48, 96)},
    "tall-bilinear": {"size": (96, 40), "interpolation": "bilinear"},
    "squash": {"size": 64, "resize_mode": "squash"},
    "longest": {"size": 64, "resize_mode": "longest", "fill_color": 7},
}
ODD_SIZES = [(1, 1), (1, 2), (1, 97), (97, 1), (400, 1), (3, 2), (63, 65), (64, 64), (65, 64), (224, 223)]
ODD_SIZES += [(641, 479), (479, 641), (900, 7), (7, 900), (127, 31)]


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    rng = np.random.default_rng(seed)
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), np.uint8), mode=mode)


def both(image: Image.Image, **cfg: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (open_clip's, ours) for one RGB image."""
    cfg_object = PreprocessCfg(**cfg)
    ours = Preprocessing.from_open_clip_cfg(dataclasses.asdict(cfg_object))([image])[0]
    return image_transform_v2(cfg_object, is_train=False)(image).numpy(), ours


def encoded(image: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_open_clip_on_every_odd_size(name: str) -> None:
    """Every value is the same float32 as open_clip's, for each resize mode, down to 1×1."""
    worst = 0.0
    for width, height in ODD_SIZES:
        if name == "longest" and 64 * min(width, height) / max(width, height) < 0.5:
            continue  # open_clip itself fails there: a side is rounded to 0
        expected, found = both(picture(width, height), **CONFIGS[name])
        assert expected.shape == found.shape
        worst = max(worst, float(np.abs(expected - found).max()))

    print(f"{name}: max |difference| {worst} over {len(ODD_SIZES)} sizes")
    assert worst == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(1, 90))
def test_equals_open_clip_on_any_size(width: int, height: int, target_height: int, target_width: int) -> None:
    """No combination of picture and model size makes a difference."""
    expected, found = both(picture(width, height), size=(target_height, target_width))

    assert np.array_equal(expected, found)


def test_longest_survives_pictures_that_open_clip_cannot_resize() -> None:
    """Where open_clip would round a side to 0 pixels, one is kept."""
    (found,) = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, resize_mode="longest")([picture(1, 400)])

    assert found.shape == (3, 64, 64)


def test_the_window_of_an_extremely_long_picture_differs_by_at_most_a_grey_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computing only what the crop keeps moves no value by more than 1/255."""
    model, worst = Preprocessing((64, 64), (0.0,) * 3, (1.0,) * 3), 0.0
    for width, height in [(5000, 2), (3, 4001), (1, 999), (2000, 37)]:
        image = picture(width, height)
        whole = model([image])
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "_MAX_RESIZED_PIXELS", 1)
            worst = max(worst, float(np.abs(model([image]) - whole).max()))

    print(f"window: max |difference| {worst * 255:.3g} grey levels")
    assert worst <= 1.01 / 255


def test_an_extremely_long_picture_needs_little_memory() -> None:
    """3,000,000×1 pixels, which would be 36 GB on the way, pass in a process that may have 2 GB."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from PIL import Image
from deploy.preprocess import Preprocessing
pixels = Preprocessing((64, 64), (0, 0, 0), (1, 1, 1))([Image.new("RGB", (3_000_000, 1), (255, 0, 0))])
assert pixels.shape == (1, 3, 64, 64) and (pixels[0, 0] == 1).all() and (pixels[0, 1:] == 0).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_reads_back_and_says_the_same_to_hugging_face(name: str, tmp_path: Path) -> None:
    """preprocessor_config.json restores the preprocessing, and has the keys of CLIPImageProcessor."""
    model = Preprocessing.from_open_clip_cfg(dataclasses.asdict(PreprocessCfg(**CONFIGS[name])))
    model.save(tmp_path / "preprocessor_config.json")
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())

    assert model == Preprocessing.load(tmp_path / "preprocessor_config.json")
    assert config["image_processor_type"] == "CLIPImageProcessor"
    assert list(model.mean) == config["image_mean"]
    assert {"height": model.size[0], "width": model.size[1]} == config["crop_size"]


def test_reads_a_config_that_hugging_face_wrote(tmp_path: Path) -> None:
    """The file of openai/clip-vit-base-patch32, as published, gives open_clip's own numbers."""
    path = tmp_path / "preprocessor_config.json"
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    path.write_text(
        json.dumps(
            {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
            | {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": std}
            | {"size": 224}
        )
    )

    assert Preprocessing.load(path) == Preprocessing.from_open_clip_cfg(dataclasses.asdict(PreprocessCfg()))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": 0}', '{"crop_size": "x"}'])
def test_a_broken_config_is_named(content: str, tmp_path: Path) -> None:
    """The error names the file and what to do."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)

    with pytest.raises(VerifyError, match=r"preprocessor_config\.json cannot be used.*again"):
        Preprocessing.load(path)


def test_only_decoded_images_are_accepted() -> None:
    """A picture that is not RGB is refused rather than converted in another way than decode_image does."""
    with pytest.raises(ImageError, match="found mode RGBA"):
        Preprocessing((8, 8), (0,) * 3, (1,) * 3)([picture(9, 9, "RGBA")])


# Decoding. Each case gives a file and the RGB image that a person sees in it.


def over_white(rgba: Image.Image) -> np.ndarray:
    """Blend with white by definition, in float64."""
    pixels = np.asarray(rgba).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def grey_16() -> np.ndarray:
    """Return a 30×40 ramp from black to white in 16 bits."""
    return np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)


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


def test_every_kind_of_file_gives_the_same_values_as_open_clip() -> None:
    """From the decoded RGB on, all modes are equal to open_clip's transform, bit by bit."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "grayscale": encoded(picture(93, 71, "L")),
        "16 bit": encoded(Image.fromarray(grey_16())),
        "palette": encoded(picture(93, 71).quantize(16), transparency=3),
        "RGBA": encoded(picture(93, 71, "RGBA")),
        "LA": encoded(picture(93, 71, "LA")),
        "CMYK": encoded(picture(93, 71, "CMYK"), "JPEG"),
        "EXIF": encoded(picture(93, 71), "JPEG", exif=exif),
        "gif": encoded(picture(93, 71).quantize(200), "GIF"),
        "webp": encoded(picture(93, 71, "RGBA"), "WEBP"),
        "bmp": encoded(picture(93, 71), "BMP"),
        "bilevel": encoded(picture(93, 71, "L").convert("1")),
    }
    for name, data in files.items():
        expected, found = both(decode_image(data), size=64)
        print(f"{name}: max |difference| {np.abs(expected - found).max()}")
        assert np.array_equal(expected, found), name


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
