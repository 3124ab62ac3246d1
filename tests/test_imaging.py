import io
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import EpsImagePlugin, Image, ImageCms

from aopsam_lab.data.images import find_images, read_image

RGB = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
DEEP = np.array([[0, 257, 65535], [128 * 257, 1000, 30000]], np.uint16)


def on_disk(tmp_path, picture: Image.Image, name: str, **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def grey3(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def test_an_array_a_picture_and_a_path_give_the_same_image(tmp_path):
    path = on_disk(tmp_path, Image.fromarray(RGB), "a.png")
    for image in (RGB, Image.fromarray(RGB), path, str(path)):
        seen = read_image(image)
        assert seen.dtype == np.uint8 and seen.flags["C_CONTIGUOUS"] and seen.flags["WRITEABLE"]
        assert np.array_equal(seen, RGB)
    read_image(RGB)[:] = 0
    assert RGB.any(), "the result is a new array"


@pytest.mark.parametrize("image", [GREY, GREY[..., None], GREY > 100])
def test_grey_and_one_bit_become_rgb(image):
    expected = grey3(image.reshape(5, 7) * np.uint8(255 if image.dtype == bool else 1))
    assert np.array_equal(read_image(image), expected)
    assert np.array_equal(read_image(Image.fromarray(image.reshape(5, 7))), expected)


def test_alpha_lies_over_white():
    # 51 / 255 = 0.2
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 255, 51]]], np.uint8)
    grey_alpha = np.array([[[10, 255], [10, 0], [0, 51]]], np.uint8)
    for pixels, mode, expected in (
        (rgba, "RGBA", [[[10, 20, 30], [255, 255, 255], [204, 224, 255]]]),
        (grey_alpha, "LA", [[[10] * 3, [255] * 3, [204] * 3]]),
    ):
        picture = Image.fromarray(pixels, mode=mode)
        assert read_image(pixels).tolist() == read_image(picture).tolist() == expected
        premultiplied = read_image(picture.convert(mode.replace("A", "a")))
        assert np.abs(premultiplied.astype(int) - expected).max() <= 3


def test_a_palette_becomes_rgb_and_what_is_transparent_white(tmp_path):
    picture = Image.new("P", (3, 1))
    picture.putpalette([200, 0, 0, 0, 150, 0, 0, 0, 90])
    picture.putdata([0, 1, 2])
    opaque = [[[200, 0, 0], [0, 150, 0], [0, 0, 90]]]
    path = on_disk(tmp_path, picture, "p.gif")
    assert read_image(picture).tolist() == read_image(path).tolist() == opaque
    path = on_disk(tmp_path, picture, "p.png", transparency=1)
    assert read_image(path).tolist() == [[[200, 0, 0], [255, 255, 255], [0, 0, 90]]]
    path = on_disk(tmp_path, picture, "partly.png", transparency=bytes([255, 0, 51]))
    assert read_image(path).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 222]]]
    # a colour that stands for transparency
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    path = on_disk(tmp_path, picture, "key.png", transparency=(4, 5, 6))
    assert read_image(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_cmyk_becomes_rgb(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], np.uint8)
    colours = colours.repeat(8, 0).repeat(8, 1)
    picture = Image.fromarray(colours).convert("CMYK")
    assert np.array_equal(read_image(picture), colours)
    path = on_disk(tmp_path, picture, "ink.jpg", quality=100)
    assert np.abs(read_image(path).astype(int) - colours).max() < 12
    assert np.array_equal(read_image(on_disk(tmp_path, picture, "ink.tif")), colours)


def test_other_colour_spaces_become_rgb():
    smooth = Image.new("RGB", (4, 4), (120, 90, 60))
    profiles = map(ImageCms.createProfile, ("sRGB", "LAB"))
    lab = ImageCms.profileToProfile(smooth, *profiles, outputMode="LAB")
    for picture in (smooth.convert("YCbCr"), smooth.convert("HSV"), lab):
        assert np.abs(read_image(picture).astype(int) - (120, 90, 60)).max() <= 3


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    path = on_disk(tmp_path, Image.fromarray(DEEP), name)
    with Image.open(path) as picture:
        assert picture.mode == "I;16"
    expected = grey3(np.array([[0, 1, 255], [128, 4, 117]], np.uint8))
    for image in (path, DEEP, DEEP.astype(">u2")):
        assert np.array_equal(read_image(image), expected)
    path = on_disk(tmp_path, Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "float.tif")
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]


def test_a_big_endian_tiff_is_read(tmp_path):
    header = b"MM\x00*\x00\x00\x00\x08"
    entries = [(256, 3, 3), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1), (278, 3, 2), (279, 4, 12)]
    directory = len(entries).to_bytes(2, "big")
    for tag, kind, value in entries:
        directory += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big")
        directory += value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
    path = tmp_path / "big.tif"
    path.write_bytes(header + directory + b"\0\0\0\0" + DEEP.astype(">u2").tobytes())
    assert np.array_equal(read_image(path), read_image(DEEP))


@pytest.mark.parametrize(
    ("top", "white"), [(4095, 4095), (1023, 1023), (3000, 4095), (255, 255), (4096, 16383)]
)
def test_sixteen_bits_that_hold_fewer_are_scaled_by_their_depth(top, white):
    deep = np.array([[0, top // 2, top]], np.uint16)
    expected = [round(value * 255 / white) for value in (0, top // 2, top)]
    assert read_image(deep)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("top", [65536, 70_000, 300_000, 2**31 - 1, 2**32 - 1])
def test_more_than_sixteen_bits_are_scaled_by_the_bits_that_the_largest_needs(top):
    white = 2 ** len(f"{top:b}") - 1
    seen = read_image(np.array([[0, top // 3, top]], np.int64))[0, :, 0]
    assert seen.tolist() == [round(v * 255 / white) for v in (0, top // 3, top)] and seen[2] > 127


@pytest.mark.parametrize("top", [1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tif", "lzw.tif", "zip.tif", "ppm"])
def test_deep_files_are_read_as_arrays_of_the_same_numbers(tmp_path, kind, channels, top):
    if channels not in {"png": (1, 3, 4), "tif": (1, 3, 4), "ppm": (3,)}.get(kind, (1, 3)):
        return  # OpenCV writes none, or alpha as a fourth band
    numbers = np.random.default_rng(0).integers(0, top + 1, (8, 9, channels)).astype(np.uint16)
    numbers[0, 0, :3] = top
    if channels == 4:
        numbers[..., 3] = 65535  # opaque, and colours keep their own depth
        numbers[0, 1, 3] = 0
    path, compression = tmp_path / f"deep.{kind}", {"lzw.tif": 5, "zip.tif": 8}.get(kind)
    if kind == "tif":
        extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        tifffile.imwrite(
            path, numbers, photometric="rgb" if channels > 1 else "minisblack", **extra
        )
    else:
        options = [cv2.IMWRITE_TIFF_COMPRESSION, compression] if compression else []
        cv2.imwrite(
            str(path), numbers[..., [2, 1, 0, 3][:channels]] if channels > 1 else numbers, options
        )
    expected = np.round(numbers[..., :3].astype(float) * 255 / top).astype(np.uint8)
    if channels == 4:
        expected[0, 1] = 255
    assert np.array_equal(read_image(path), np.broadcast_to(expected, (8, 9, 3)))
    if channels > 1:
        assert np.array_equal(read_image(numbers), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    ("bands", "photometric", "extra"), [(4, "rgb", 1), (4, "minisblack", 3), (8, "minisblack", 7)]
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_of_many_bands_the_first_three_are_read_and_that_is_said(
    tmp_path, dtype, bands, photometric, extra, planar
):
    numbers = np.random.default_rng(0).integers(0, 256, (6, 7, bands), dtype=np.uint8)
    numbers[0, 0] = 255
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    data = (numbers.astype(float) * scale).astype(dtype)
    data = data.transpose(2, 0, 1) if planar == "separate" else data
    options = {"photometric": photometric, "planarconfig": planar}
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, data, extrasamples=["unspecified"] * extra, **options)
    with pytest.warns(UserWarning, match=f"scene.tif has {bands} bands: the first 3 are read"):
        assert np.array_equal(read_image(path), numbers[..., :3])


@pytest.mark.parametrize("kind", ["tif", "deep.tif", "gif"])
def test_of_a_stack_the_first_is_read_that_is_said_and_another_can_be_chosen(tmp_path, kind):
    path = tmp_path / f"stack.{kind}"
    pages = [np.full((5, 6), 51 * i, np.uint8) for i in range(5)]
    if kind == "gif":
        first, *others = map(Image.fromarray, pages)
        first.save(path, save_all=True, append_images=others)
    else:
        stack = np.stack(pages)
        deep = stack.astype(np.uint16) * 257
        deep[:, 0, 0] = 65535
        tifffile.imwrite(path, deep if kind == "deep.tif" else stack, photometric="minisblack")
    with pytest.warns(UserWarning, match="stack.*holds 5 images: number 0, from 0, is read"):
        assert (read_image(path)[1:] == 0).all()
    with pytest.warns(UserWarning, match="number 3"):
        assert (read_image(path, frame=3)[1:] == 153).all()
    with pytest.raises(ValueError, match="stack.* cannot be read"):
        read_image(path, frame=5)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_colour_is_turned_upright_like_shallow(tmp_path, orientation, kind):
    shallow = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    shallow[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = read_image(on_disk(tmp_path, Image.fromarray(shallow), f"a.{kind}", exif=exif))
    deep, path = shallow.astype(np.uint16) * 257, tmp_path / f"deep.{kind}"
    if kind == "tif":
        tag = (0x0112, "H", 1, orientation, False)
        tifffile.imwrite(path, deep, photometric="rgb", extratags=[tag])
    else:
        data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        whole = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        path.write_bytes(data[:33] + whole + data[33:])
    assert np.array_equal(read_image(path), expected)


@settings(deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 4])))
)
def test_other_types_mean_the_same_picture(pixels):
    pixels[0, 0] = 255  # so that the depth is told from the largest value
    expected = read_image(pixels)
    assert expected.shape == (*pixels.shape[:2], 3)
    unit = pixels / 255
    integers = pixels.astype(np.uint16) * 257, pixels.astype(np.int64)
    for same in (*integers, unit, unit.astype(np.float32)):
        assert np.array_equal(read_image(same), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["turned.png", "turned.tif", "deep.png", "deep.tif"])
def test_photographs_are_turned_upright_as_exif_says(tmp_path, orientation, name):
    upright = np.array([[10, 20, 30], [40, 50, 255]], np.uint8)
    # how a camera stores it: by so many quarter turns, and perhaps mirrored
    ways = ((0, 0), (0, 1), (2, 0), (2, 1), (3, 1), (1, 0), (1, 1), (3, 0))
    turns, mirrored = ways[orientation - 1]
    stored = np.rot90(upright, turns)
    stored = np.ascontiguousarray(stored[:, ::-1] if mirrored else stored)
    if name.startswith("deep"):
        stored = stored.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = on_disk(tmp_path, Image.fromarray(stored), name, exif=exif)
    assert np.array_equal(read_image(path), grey3(upright))
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        assert np.array_equal(read_image(picture), grey3(upright))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), "channels last"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 4)), "empty"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.full((2, 2), np.inf), "infinite"),
        (np.full((2, 2), 200.0), "from 0 to 1"),
        (np.full((2, 2), -5), "from 0 to"),
        (np.full((2, 2), 1j), "complex"),
        (np.full((2, 2), "a"), "not <U1"),
        (None, "NoneType"),
        ([[1, 2], [3, 4]], "list"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image)


def test_files_that_are_no_images_are_refused_by_name(tmp_path):
    whole = on_disk(tmp_path, Image.effect_noise((64, 64), 99), "whole.jpg").read_bytes()
    damaged = {"text.png": b"hello", "none.png": b"", "half.jpg": whole[:2000]}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image file .*absent.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)


def header_of_a_png(side: int) -> bytes:
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    crc = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + crc


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tif", "deep.tif", "bands.tif"])
def test_a_header_that_declares_a_huge_image_is_refused_before_memory_is_taken(tmp_path, kind):
    side, path = 100_000 if kind != "gif" else 65535, tmp_path / f"bomb.{kind}"
    if kind == "png":
        path.write_bytes(header_of_a_png(side) + b"\0\0\0\x40IDAT" + b"\0" * 68)
    elif kind.endswith("tif"):
        shape = {"deep.tif": (3,), "bands.tif": (8,)}.get(kind, ())
        dtype = np.uint16 if kind == "deep.tif" else np.uint8
        kind_of = {
            "photometric": "rgb" if shape == (3,) else "minisblack",
            "planarconfig": "contig",
        }
        tifffile.imwrite(path, np.zeros((2, 2, *shape), dtype), **(kind_of if shape else {}))
        with tifffile.TiffFile(path, mode="r+") as file:
            for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                file.pages[0].tags[name].overwrite(side)
    else:
        data = bytearray(on_disk(tmp_path, Image.fromarray(RGB), f"a.{kind}").read_bytes())
        place, width = (18, 4) if kind == "bmp" else (6, 2)
        data[place : place + 2 * width] = side.to_bytes(width, "little") * 2
        path.write_bytes(data)
    tracemalloc.start()
    words = "too large kind" if kind == "bands.tif" else "Reduce it, cut it, or pass its pixels"
    with pytest.raises(ValueError, match=f"bomb.{kind} .*{words}"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_an_image_of_more_pixels_than_pillow_reads_is_refused_with_advice(tmp_path, monkeypatch):
    path = on_disk(tmp_path, Image.fromarray(RGB), "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RGB.size // 6)  # and Pillow refuses its double
    with pytest.raises(ValueError, match="Reduce it, cut it, or pass its pixels as an array"):
        read_image(path)
    assert np.array_equal(read_image(RGB), RGB)


def test_a_postscript_file_starts_no_program_whatever_its_name(tmp_path, monkeypatch):
    def run(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = on_disk(tmp_path, Image.fromarray(RGB), "photo.eps").rename(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo.png cannot be read as an image: its format is"):
        read_image(path)
    on_disk(tmp_path, Image.fromarray(RGB), "other.eps")
    assert find_images([str(tmp_path)])[0] == [path]
