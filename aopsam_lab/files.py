"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write_atomically(
    path: str | os.PathLike, data: bytes | str | Iterable[bytes | memoryview]
) -> Path:
    """Write `data` (text as UTF-8; pieces one after another) to `path`, making its folder.

    The bytes go to a hidden file beside it that then takes its name: no reader, and no run that is killed, ever meets
    half of it. Returns the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if isinstance(data, str):
            data = data.encode("utf-8")
        with beside.open("wb") as file:
            file.writelines([data] if isinstance(data, (bytes, bytearray, memoryview)) else data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
