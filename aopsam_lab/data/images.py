"""Image files by name, and any image as the pixels that a person sees."""

import glob
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = np.ndarray | Image.Image | str | os.PathLike
_DEPTHS = (8, 10, 12, 14, 16, 32)
# What photographs come in. Others run a program (EPS), or draw what is not theirs (WMF).
_PHOTOS = {
    *("JPEG", "MPO", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF"),
    *("DIB", "TGA", "SGI", "PCX", "ICO", "QOI"),
}
_SLACK = 1e-3  # how far resampled float pixels may leave [0, 1]


def read_image(image: ImageLike) -> np.ndarray:
    """Read an image as (H, W, 3) uint8, RGB, upright, over white; a new array.

    Args:
        image: a path or a Pillow image of any mode (of several frames the first); or an array H x
            W, or H x W x 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8, booleans,
            floats from 0 to 1, or larger integers. White of these is the largest value of the
            smallest usual depth that holds them all: cameras keep 10 to 14 bits in 16-bit files.
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
    return image_from_bytes(path.read_bytes(), path)


def image_from_bytes(data: bytes, name: str | os.PathLike) -> np.ndarray:
    """The content of an image file as `read_image` gives it; errors bear the name."""
    problem = f"{name} cannot be read as an image"
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            image.load()
            return _from_pillow(image)
    except UnidentifiedImageError:  # its own text names a buffer in memory
        raise ValueError(f"{problem}: its format is none of {', '.join(_formats())}.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{problem}: {error} Reduce it or cut it first.") from None
    except Exception as error:  # on damaged files Pillow raises struct.error, SyntaxError, ...
        raise ValueError(f"{problem}: {error}") from error


def _formats() -> list[str]:
    """The formats of _PHOTOS that this Pillow reads."""
    Image.init()
    return sorted(_PHOTOS & Image.OPEN.keys())


def _from_pillow(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"The image is empty: {image.width} x {image.height} pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip
        return _from_array(np.asarray(image))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts to RGBA only by way of LA
            image = image.convert("LA")
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _from_array(pixels: np.ndarray) -> np.ndarray:
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in (1, 2, 3, 4)):
        hint = " Move its channels last." if pixels.ndim == 3 and shape[0] in (1, 3, 4) else ""
        wanted = "H x W, or H x W x 1, 2, 3 or 4 channels"
        raise ValueError(f"An image array is {wanted}; this has shape {shape}.{hint}")
    if pixels.size == 0:
        raise ValueError(f"The image array is empty: shape {shape}.")
    pixels = _to_uint8(pixels if pixels.ndim == 3 else pixels[..., None])
    if pixels.shape[2] <= 2:  # grey -> R = G = B
        pixels = np.concatenate([pixels[..., :1].repeat(3, axis=2), pixels[..., 1:]], axis=2)
    return _over_white(pixels) if pixels.shape[2] == 4 else np.array(pixels, order="C")


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
        return np.round(np.clip(pixels, 0, 1).astype(np.float64) * 255).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high >= 2**32:
            raise ValueError(f"Integer pixels run from 0 to 2**32 - 1; these from {low} to {high}.")
        white = next(2**depth - 1 for depth in _DEPTHS if high < 2**depth)
        return np.round(pixels.astype(np.float64) * (255 / white)).astype(np.uint8)
    raise ValueError(f"Image arrays hold booleans, integers or floats, not {pixels.dtype}.")


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8, alpha not premultiplied -> (H, W, 3) uint8."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


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
