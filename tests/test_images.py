"""The one opener of pictures: what becomes of every mode and format, and that it refuses by ValueError and OSError."""

import io
import os
import struct
import zlib
from pathlib import Path

import PIL.Image
import PIL.ImageFile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datalloy import sample
from datalloy.errors import EnvironmentFault
from datalloy.sample import FileImage, has_further_frames, open_image, to_rgb
from drawn import MemoryImage

SIZE = (24, 16)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is odd in damaged files


def encoded(picture: PIL.Image.Image, format: str, **options) -> MemoryImage:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return MemoryImage(file.getvalue())


def gradient(size: tuple[int, int] = SIZE) -> PIL.Image.Image:
    return PIL.Image.linear_gradient("L").resize(size).convert("RGB")


VALID = {
    "PNG": encoded(gradient(), "PNG"),
    "JPEG": encoded(gradient(), "JPEG"),
    "WEBP": encoded(gradient(), "WEBP", lossless=True),
    "GIF": encoded(gradient(), "GIF"),
    "BMP": encoded(gradient(), "BMP"),
    "TIFF": encoded(gradient(), "TIFF"),
}


def colours(picture: PIL.Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in picture.getcolors()}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, colour: int = 0) -> MemoryImage:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels, 9))
    return MemoryImage(b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b""))


# Formats and modes


@pytest.mark.parametrize("format", VALID)
def test_every_accepted_format_is_opened(format):
    picture = open_image(VALID[format])
    assert (picture.mode, picture.size) == ("RGB", SIZE)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("PA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 300, (1, 1, 1)),
        ("I;16", 40_000, (156, 156, 156)),
        ("I;16", 65_535, (255, 255, 255)),
        ("I;16B", 40_000, (156, 156, 156)),
        ("I", 40_000, (156, 156, 156)),
    ],
)
def test_every_mode_becomes_rgb_by_one_rule(mode, colour, expected):
    picture = to_rgb(PIL.Image.new(mode, (3, 2), colour))
    assert picture.mode == "RGB"
    assert colours(picture) == {expected}


def test_a_transparent_colour_of_a_palette_is_white():
    picture = PIL.Image.new("P", SIZE, 0)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((0, 0), 1)
    result = open_image(encoded(picture, "PNG", transparency=0))
    assert result.getpixel((0, 0)) == (200, 0, 0)
    assert result.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (PIL.Image.new("F", (2, 2), 0.5), "mode F has no agreed meaning"),
        (PIL.Image.new("LAB", (2, 2)), "mode LAB has no agreed meaning"),
        (PIL.Image.new("I", (2, 2), 70_000), "grey values from 70000 to 70000"),
        (PIL.Image.new("I", (2, 2), -1), "grey values from -1"),
    ],
)
def test_modes_without_an_agreed_meaning_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(picture)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"8BPS\x00\x01" + bytes(40),
        b"SIMPLE  =                    T".ljust(2880),
        b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0xff};\n",
        b"%PDF-1.4\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"\x00\x00\x01\x00\x01\x00\x10\x10" + bytes(40),
        encoded(gradient(), "PPM").data,
        encoded(gradient(), "TGA").data,
    ],
)
def test_rare_formats_are_refused(data):
    with pytest.raises(ValueError, match="it is no picture of the formats PNG, JPEG"):
        open_image(MemoryImage(data))


# Damage


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1000),
        b"question,answer\n",
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        VALID["PNG"].data[:-40],
        VALID["PNG"].data[:40] + b"\xff" + VALID["PNG"].data[41:],
        VALID["JPEG"].data[:200],
        png(4, 4).data,
    ],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError, match=r"cannot be decoded|is no picture"):
        open_image(MemoryImage(data))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*VALID]), st.data())
def test_a_picture_cut_anywhere_is_refused_or_whole(format, data):
    content = VALID[format].data
    cut = data.draw(st.integers(0, len(content) - 1))
    try:
        picture = open_image(MemoryImage(content[:cut]))
    except ValueError:
        return
    assert picture.tobytes() == open_image(VALID[format]).tobytes()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*VALID]), st.data())
def test_a_damaged_picture_is_opened_or_refused_by_a_value_error(format, data):
    content = bytearray(VALID[format].data)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(MemoryImage(bytes(content))).mode == "RGB"
    except ValueError:
        return


def test_a_process_that_loads_half_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(EnvironmentFault, match="LOAD_TRUNCATED_IMAGES is switched on"):
        open_image(VALID["PNG"])


def test_what_goes_wrong_inside_a_decoder_is_a_value_error_unless_memory_is_out(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda _: 1 / 0)
    with pytest.raises(ValueError, match="cannot be decoded: division by zero"):
        open_image(VALID["PNG"])

    def out_of_memory(_):
        raise MemoryError

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", out_of_memory)
    with pytest.raises(MemoryError):
        open_image(VALID["PNG"])


# Size


@pytest.mark.parametrize("pillows_limit", [None, 10**12, 89_478_485, 50_000_000])
@pytest.mark.parametrize("side", [8_001, 12_000, 20_000, 2**31 - 1])
def test_a_bomb_is_refused_before_a_pixel_is_decoded(side, pillows_limit, monkeypatch, recwarn):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pillows_limit)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    with pytest.raises(ValueError, match="pixels"):
        open_image(png(side, side, bytes(1000)))
    assert not recwarn.list


def test_a_picture_of_exactly_the_allowed_size_is_opened(monkeypatch):
    monkeypatch.setattr(sample, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1])
    assert open_image(VALID["PNG"]).size == SIZE
    monkeypatch.setattr(sample, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(ValueError, match=r"24x16 pixels, 1 to 383 are allowed"):
        open_image(VALID["PNG"])


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_a_pixel_is_refused(width, height):
    with pytest.raises(ValueError, match=r"pixels|decoded|no picture"):
        open_image(png(width, height))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1)])
def test_thin_pictures_are_opened_and_left_to_the_processor(width, height):
    assert open_image(encoded(PIL.Image.new("RGB", (width, height)), "PNG")).size == (width, height)


# Frames and EXIF


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_of_an_animation_is_used_and_told(format, options):
    frames = [PIL.Image.new("RGB", SIZE, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    animation = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert colours(open_image(animation)) == {(255, 0, 0)}
    assert has_further_frames(animation)
    assert not has_further_frames(VALID[format])


def test_what_is_no_picture_has_no_further_frames():
    assert not has_further_frames(MemoryImage(b"no picture"))


def with_orientation(orientation: int) -> MemoryImage:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(gradient(), "JPEG", exif=exif, quality=100)


def test_exif_orientation_is_applied():
    upright = open_image(VALID["JPEG"])
    turned = open_image(with_orientation(6))
    assert turned.size == upright.size[::-1]
    assert turned.getpixel((0, 0))[0] > turned.getpixel((turned.width - 1, 0))[0] + 100  # rows became columns
    assert open_image(with_orientation(1)).size == upright.size


@pytest.mark.parametrize("damage", [b"\xff" * 12, b"\x00" * 12, b"II*\x00\xff\xff\xff\x7f"])
def test_broken_exif_turns_nothing(damage):
    data = with_orientation(6).data
    start = data.index(b"Exif\x00\x00") + 6
    broken = data[:start] + damage + data[start + len(damage) :]
    assert open_image(MemoryImage(broken)).size == SIZE


# Files


def test_a_file_that_became_something_else_is_refused_when_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(VALID["PNG"].data)
    image = FileImage(tmp_path / "x.png")
    with pytest.raises(OSError, match="No such file"):
        image.read()
    image.path.symlink_to("secret.png")
    with pytest.raises(OSError, match="symbolic links"):
        image.read()
    image.path.unlink()
    os.mkfifo(image.path)
    with pytest.raises(OSError, match="is a named pipe"):
        image.read()
    image.path.unlink()
    image.path.write_bytes(VALID["PNG"].data)
    assert open_image(image).size == SIZE
    monkeypatch.setattr(sample, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(OSError, match="at most 10 are read"):
        image.read()


def test_a_device_is_never_read():
    with pytest.raises(OSError, match="is a device"):
        FileImage(Path("/dev/zero")).read()
