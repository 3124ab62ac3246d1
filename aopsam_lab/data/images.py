"""Image files by name, and any image as the pixels that a person sees."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = np.ndarray | Image.Image | str | os.PathLike
SLACK = 1e-3  # how far resampled float pixels may leave [0, 1]
RESULTS = ("_labels.png", "_overlay.png")  # what an earlier run wrote


def read_image(image: ImageLike) -> np.ndarray:
    """Read an image as (H, W, 3) uint8, RGB, upright; a new array.

    Transparency of any kind is laid over white. Colour profiles are not applied.

    Args:
        image: a path or a Pillow image of any mode (of several frames the first); or an array H x
            W, or H x W x 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of uint8, booleans,
            floats from 0 to 1, or larger integers of 16 bits, white 65535, unless all are below
            256.

    Raises:
        OSError: there is no such file.
        ValueError: what is given is no image, is damaged, empty or out of range.
    """
    if isinstance(image, (str, os.PathLike)):
        # Pillow 13 maps an uncompressed TIFF opened by name into memory, and scrambles grey and
        # CMYK ones that are turned by 90 degrees. From bytes it does not.
        return image_from_bytes(Path(image).read_bytes(), image)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    kind = type(image).__name__
    raise ValueError(f"An image is a NumPy array, a Pillow image or a path, not a {kind}.")


def image_from_bytes(data: bytes, name: str | os.PathLike) -> np.ndarray:
    """The content of an image file as `read_image` gives it; errors bear the name."""
    problem = f"{name} cannot be read as an image"
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _from_pillow(image)
    except UnidentifiedImageError:  # its own text names a buffer in memory
        raise ValueError(f"{problem}: its format is none that Pillow knows.") from None
    except Exception as error:  # on damaged files Pillow raises struct.error, SyntaxError, ...
        raise ValueError(f"{problem}: {error}") from error


def _from_pillow(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"The image is empty: {image.width} x {image.height} pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip
        return _from_array(np.asarray(image))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts to RGBA only by way of LA
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _from_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (2, 3, 4)):
        wanted = "H x W, or H x W x 1, 2, 3 or 4 channels"
        raise ValueError(f"An image array is {wanted}; this has shape {pixels.shape}.")
    if pixels.size == 0:
        raise ValueError(f"The image array is empty: shape {pixels.shape}.")
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"Image arrays hold booleans, integers or floats, not {pixels.dtype}.")
    if pixels.dtype != np.uint8:
        low, high, white = pixels.min(), pixels.max(), 1
        if pixels.dtype.kind in "ui":
            white = 255 if high < 256 else 65535
        if not -SLACK <= low <= high <= white + SLACK:  # so NaN are refused, too
            raise ValueError(
                "Float pixels run from 0 to 1, integers from 0 to 255 or 65535; these run from "
                f"{low} to {high}."
            )
        pixels = np.round(pixels.astype(float).clip(0, white) * (255 / white)).astype(np.uint8)
    return _from_pillow(Image.fromarray(pixels))


def find_images(names: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Find image files.

    Args:
        names: files, whatever their ending; folders, of which the files directly in them whose
            ending Pillow knows; glob patterns, which may hold `**`. Results of an earlier run are
            not taken from folders and patterns.

    Returns:
        The files in that order, each once; and (name, reason) of names that give none.
    """
    endings = set(Image.registered_extensions())
    found: dict[Path, Path] = {}
    bad = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = [file for file in sorted(path.iterdir()) if file.suffix.lower() in endings]
        elif path.exists() or not glob.has_magic(name):
            found.setdefault(path.resolve(), path)  # where it is missing, reading it says so
            continue
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        matches = [file for file in matches if file.is_file() and not file.name.endswith(RESULTS)]
        if not matches:
            bad.append((name, "no images in this folder or pattern"))
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values()), bad
