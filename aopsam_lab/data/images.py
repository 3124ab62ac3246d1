"""Any picture -> the pixels that a person sees."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_DEPTHS = (8, 10, 12, 14, 16, 32)
_SLACK = 1e-3  # how far resampled float pixels may leave [0, 1]


def read_image(image: np.ndarray | Image.Image | str | os.PathLike) -> np.ndarray:
    """A picture as H x W x 3 uint8, RGB, upright; a new array.

    A path is read with Pillow (the first frame of several); from a file or a Pillow image
      - the EXIF orientation is applied;
      - transparency of any kind (alpha, palette, colour key) is laid over white;
      - palette, 1-bit, grey, CMYK, YCbCr, HSV and LAB become RGB. Colour profiles are not applied.
    An array is H x W, or H x W x 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha):
      - uint8 as it is, booleans as black and white, floats from 0 (black) to 1 (white);
      - integers beyond 8 bits, here and in files, by the smallest usual depth (8, 10, 12, 14, 16 or 32 bits) that
        holds the largest value: cameras and microscopes keep 10 to 14 bits in 16-bit files, which the full range would
        leave nearly black (our choice).

    Raises FileNotFoundError for a path where there is no file, and ValueError for a file that is no picture or is
    damaged, an array of another shape or type, an empty one, NaN or infinite pixels, floats outside [0, 1] and negative
    integers.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_file(Path(image))
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ValueError(
        f"An image is a NumPy array, a Pillow image or a path, not a {type(image).__name__}."
    )


def _from_file(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"There is no image file {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image file.")
    return image_from_bytes(path.read_bytes(), path)


def image_from_bytes(data: bytes, name: str | os.PathLike) -> np.ndarray:
    """An image file's bytes as `read_image` gives them.

    Args:
        data: the file's content.
        name: the file's name, for the error message.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ValueError: where the bytes are no image or a damaged one.
    """
    # Opened by its name, an uncompressed TIFF is memory-mapped, and Pillow 13 maps grey and CMYK
    # ones turned by 90 degrees with their sides swapped, which scrambles them.
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            return _from_pillow(opened)
    except UnidentifiedImageError:  # its own text names a buffer in memory
        raise ValueError(
            f"{name} cannot be read as an image: its format is none that Pillow knows."
        ) from None
    except Exception as error:  # Pillow raises struct.error, SyntaxError and others
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _from_pillow(picture: Image.Image) -> np.ndarray:
    if 0 in picture.size:
        raise ValueError(f"The image is empty: {picture.width} x {picture.height} pixels.")
    picture = ImageOps.exif_transpose(picture)
    if (
        picture.mode.startswith("I") or picture.mode == "F"
    ):  # 16 or 32 bits: Pillow's own conversion would clip
        return _from_array(np.asarray(picture))
    if picture.has_transparency_data:
        if picture.mode == "La":  # premultiplied grey converts to RGBA only by way of LA
            picture = picture.convert("LA")
        return _over_white(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _from_array(pixels: np.ndarray) -> np.ndarray:
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in (1, 2, 3, 4)):
        hint = " Move its channels last." if pixels.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise ValueError(
            f"An image array is H x W, or H x W x 1, 2, 3 or 4 channels; this has shape {shape}.{hint}"
        )
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
            raise ValueError(
                f"Float pixels run from 0 to 1; these run from {low:g} to {high:g}. Scale them, or pass 8-bit integers."
            )
        return np.round(np.clip(pixels, 0, 1).astype(np.float64) * 255).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high >= 2**32:
            raise ValueError(
                f"Integer pixels run from 0 to {2**32 - 1} at most; these run from {low} to {high}."
            )
        white = next(2**depth - 1 for depth in _DEPTHS if high < 2**depth)
        return np.round(pixels.astype(np.float64) * (255 / white)).astype(np.uint8)
    raise ValueError(f"Image arrays hold booleans, integers or floats, not {pixels.dtype}.")


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """H x W x 4 uint8, alpha not premultiplied -> H x W x 3 uint8."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def find_images(names: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Image files that files, folders and glob patterns name.

    Args:
        names: a file is taken whatever its ending. Of a folder, the files directly in it count
            whose ending Pillow knows, but no results of an earlier run. A pattern may hold `**`.

    Returns:
        The files, in the order of the names, each once; and (name, reason) of each name without.
    """
    endings = set(Image.registered_extensions())
    found: dict[Path, Path] = {}
    bad = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in endings]
            matches = [p for p in inside if not _is_result(p)]
            reason = "no images in this folder"
        elif path.exists() or not glob.has_magic(name):
            matches = [path]  # where it is missing, reading it says so
            reason = ""
        else:
            matching = map(Path, sorted(glob.glob(name, recursive=True)))
            matches = [p for p in matching if p.is_file() and not _is_result(p)]
            reason = "no file matches this pattern"
        if not matches:
            bad.append((name, reason))
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values()), bad


def _is_result(path: Path) -> bool:
    """Whether an earlier run wrote this image: its JSON lies beside it."""
    for ending in ("_labels.png", "_overlay.png"):
        if path.name.endswith(ending):
            return path.with_name(path.name.removesuffix(ending) + ".json").exists()
    return False
