"""Image files by name, and any image as the pixels that a person sees."""

import glob
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = np.ndarray | Image.Image | str | os.PathLike
_DEPTHS = (8, 10, 12, 14, *range(16, 33))
# What photographs come in. Others run a program (EPS), or draw what is not theirs (WMF).
_PHOTOS = {
    *("JPEG", "MPO", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF"),
    *("DIB", "TGA", "SGI", "PCX", "ICO", "QOI"),
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # what a file of it begins with
_STACK = "{} holds {} images: number {}, from 0, is read. frame= (--frame) chooses another."
_PART = 1 << 22  # numbers scaled at a time: as float64 all of a large image need much memory
_SLACK = 1e-3  # how far resampled float pixels may leave [0, 1]


def read_image(image: ImageLike, frame: int = 0) -> np.ndarray:
    """Read an image as (H, W, 3) uint8, RGB, upright, over white; a new array.

    Args:
        image: a path or a Pillow image of any mode; or an array H x W, or H x W x 1 (grey), 2
            (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8, booleans, floats from 0 to 1, or
            larger integers. White of these is the largest value of the smallest usual depth that
            holds them all: cameras keep 10 to 14 bits in 16-bit files. Alpha has its own depth.
        frame: which image of a file that holds several, from 0.
    """
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, (str, os.PathLike)):
        kind = type(image).__name__
        raise ValueError(f"An image is a NumPy array, a Pillow image or a path, not a {kind}.")
    path = Path(image)
    if not path.exists():
        raise FileNotFoundError(f"There is no image file {path}.")
    if not path.is_file():  # a pipe would be waited for, a device read for ever
        kind = "a folder" if path.is_dir() else "a pipe or device"
        raise ValueError(f"{path} is {kind}, not an image file.")
    # Pillow 13 maps an uncompressed TIFF opened by name into memory, and scrambles grey and CMYK
    # ones that are turned by 90 degrees. From bytes it does not.
    return image_from_bytes(path.read_bytes(), path, frame)


def image_from_bytes(data: bytes, name: str | os.PathLike, frame: int = 0) -> np.ndarray:
    """The content of an image file as `read_image` gives it; errors and warnings bear the name."""
    problem = f"{name} cannot be read as an image"
    try:
        if data[:4] in _TIFF and (pixels := _from_tiff(data, name, frame)) is not None:
            return _from_array(pixels)
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            image.seek(frame)
            count = getattr(image, "n_frames", 1)
            if count > 1 and image.format != "MPO":  # whose others are previews
                warnings.warn(_STACK.format(name, count, frame), stacklevel=2)
            codecs = str([tile.args for tile in image.tile])
            image.load()
            if image.mode in ("RGB", "RGBA") and re.search(";16|65535", codecs):
                # Pillow keeps the upper 8 bits, which are dark where a camera has 10 to 14
                every, only = np.frombuffer(data, np.uint8), (frame, frame + 1)
                bgr = cv2.imdecodemulti(every, cv2.IMREAD_UNCHANGED, range=only)[1][0]
                rgb = bgr[..., [2, 1, 0, 3][: len(image.mode)]]
                return _from_array(_upright(rgb, image.getexif().get(0x0112)))
            return _from_pillow(image)
    except UnidentifiedImageError:  # its own text names a buffer in memory
        reason = f"its format is none of {', '.join(_formats())}, or a rare or too large kind of it"
        raise ValueError(f"{problem}: {reason}.") from None
    except Image.DecompressionBombError as error:
        advice = "Reduce it, cut it, or pass its pixels as an array."
        raise ValueError(f"{problem}: {error} {advice}") from None
    except Exception as error:  # on damaged files Pillow raises struct.error, SyntaxError, ...
        raise ValueError(f"{problem}: {error}") from error


def _formats() -> list[str]:
    """The formats of _PHOTOS that this Pillow reads."""
    Image.init()
    return sorted(_PHOTOS & Image.OPEN.keys())


def _from_tiff(data: bytes, name: str | os.PathLike, frame: int) -> np.ndarray | None:
    """All bits of a TIFF's grey or RGB bands, upright; None for what Pillow shall read."""
    try:
        pages = tifffile.TiffFile(io.BytesIO(data)).pages
        page, count = pages[frame].aspage(), len(pages)
        bands, axes, extra = page.samplesperpixel, page.axes, page.extrasamples[:1]
        limit = 2 * (Image.MAX_IMAGE_PIXELS or page.nbytes)  # Pillow's own, in pixels
        is_bomb = max(page.imagewidth * page.imagelength, page.nbytes / 8) > limit
        is_known = page.photometric in (1, 2) and axes in ("YX", "YXS", "SYX")
        if is_bomb or not is_known or extra == (1,):  # 1: alpha is multiplied with the colours
            return None
        pixels = page.asarray().transpose([axes.index(axis) for axis in "YXS" if axis in axes])
    except Exception:  # a compression that it does not know, or damage, which Pillow will name
        return None
    colours = 3 if bands > 2 else 1
    used = colours + (extra == (2,))  # 2: alpha as it is here
    if count > 1:
        warnings.warn(_STACK.format(name, count, frame), stacklevel=2)
    if bands > used:
        warnings.warn(f"{name} has {bands} bands: the first {colours} are read.", stacklevel=2)
    return _upright(np.atleast_3d(pixels)[..., :used], page.tags.valueof(0x0112))


def _upright(pixels: np.ndarray, exif: int | None) -> np.ndarray:
    """Pixels turned and mirrored as EXIF's orientation, 1 to 8, says."""
    pixels = pixels.swapaxes(0, 1) if exif in (5, 6, 7, 8) else pixels
    return pixels[:: -1 if exif in (3, 4, 7, 8) else 1, :: -1 if exif in (2, 3, 6, 7) else 1]


def _from_pillow(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"The image is empty: {image.width} x {image.height} pixels.")
    if image.getexif().get(0x0112, 1) != 1:  # else Pillow copies the image nevertheless
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip
        return _from_array(np.asarray(image))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts to RGBA only by way of LA
            image = image.convert("LA")
        return _from_array(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_array(pixels: np.ndarray) -> np.ndarray:
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in (1, 2, 3, 4)):
        hint = " Move its channels last." if pixels.ndim == 3 and shape[0] in (1, 3, 4) else ""
        wanted = "H x W, or H x W x 1, 2, 3 or 4 channels"
        raise ValueError(f"An image array is {wanted}; this has shape {shape}.{hint}")
    if pixels.size == 0:
        raise ValueError(f"The image array is empty: shape {shape}.")
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    colours = 3 if pixels.shape[2] > 2 else 1
    colour, alpha = _to_uint8(pixels[..., :colours]), pixels[..., colours:]
    colour = colour.repeat(3, axis=2) if colours == 1 else colour  # grey -> R = G = B
    if not alpha.size:
        return np.array(colour, order="C")
    colour, alpha = colour.astype(np.uint32), _to_uint8(alpha).astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("The image array holds NaN or infinite pixels. Replace them first.")
        if low < -_SLACK or high > 1 + _SLACK:
            message = f"Float pixels run from 0 to 1; these from {low:g} to {high:g}"
            raise ValueError(f"{message}. Scale them, or pass 8-bit integers.")
        white = 1
    elif np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high >= 2**32:
            raise ValueError(f"Integer pixels run from 0 to 2**32 - 1; these from {low} to {high}.")
        white = next(2**depth - 1 for depth in _DEPTHS if high < 2**depth)
    else:
        raise ValueError(f"Image arrays hold booleans, integers or floats, not {pixels.dtype}.")
    parts = np.array_split(pixels, 1 + pixels.size // _PART)
    scaled = (np.clip(part.astype(np.float64), 0, white) * (255 / white) for part in parts)
    return np.concatenate([np.round(part).astype(np.uint8) for part in scaled])


def find_images(names: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Find image files by their names, folders and glob patterns; `**` is any folder below.

    Returns:
        The files in that order, each once, results of an earlier run only where they are named; and
        (name, reason) of names that give none.
    """
    formats = _formats()
    endings = {end for end, kind in Image.registered_extensions().items() if kind in formats}
    found: dict[Path, Path] = {}
    bad = []
    for name in names:
        path, reason = Path(name), ""
        try:
            if path.is_dir():
                reason = "no images in this folder"
                matches = [one for one in sorted(path.iterdir()) if one.suffix.lower() in endings]
            elif path.exists() or not glob.has_magic(name):
                found.setdefault(path.resolve(), path)  # where it is missing, reading it says so
                continue
            else:
                reason = "no file matches this pattern"
                matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            matches = [file for file in matches if file.is_file() and not _is_result(file)]
        except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links, ...
            bad.append((name, str(error)))
            continue
        if not matches:
            bad.append((name, reason))
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values()), bad


def _is_result(path: Path) -> bool:
    """Whether an earlier run wrote this image: its JSON lies beside it."""
    stem = re.sub("_(labels|overlay)[.]png$", "", path.name)
    return stem != path.name and path.with_name(f"{stem}.json").exists()
