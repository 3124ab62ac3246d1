"""The official weights: where they are, and how they are fetched, checked and kept.

They lie in one folder, `AOPSAM_CACHE` in the environment or the system's cache folder. A file takes
its own name there only once its sha256 is right. Meta publishes no sha256; those here are what many
public projects quote for the same addresses.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "AOPSAM_CACHE"
ATTEMPTS = 4  # connections for one file before a person is asked to try again
_BLOCK = 1 << 16
_SAM = "https://dl.fbaipublicfiles.com/segment_anything"


@dataclass(frozen=True)
class OfficialFile:
    """One file: its address, its sha256, its size in bytes, its licence."""

    url: str
    sha256: str
    size: int
    licence: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[-1]


OFFICIAL = {
    "vit_b": OfficialFile(
        f"{_SAM}/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375_042_383,
        "Apache-2.0",
    ),
    "vit_l": OfficialFile(
        f"{_SAM}/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1_249_524_607,
        "Apache-2.0",
    ),
    "vit_h": OfficialFile(
        f"{_SAM}/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2_564_550_879,
        "Apache-2.0",
    ),
    "yolov8n": OfficialFile(
        "https://github.com/ultralytics/assets/releases/download/v8.4.0/yolov8n.pt",
        "f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36",
        6_549_796,
        "AGPL-3.0",
    ),
}


def cache_folder() -> Path:
    """Where the weights lie: `AOPSAM_CACHE`, else the system's cache folder for aopsam_lab."""
    import pooch  # here, as most runs download nothing

    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(pooch.os_cache("aopsam_lab"))


def kept_file(name: str) -> Path:
    """The path that an official file has, or would have, in the cache folder."""
    return cache_folder() / OFFICIAL[name].name


def command(name: str) -> str:
    """What to type to fetch a file."""
    return f"python -m aopsam_lab download {name}"


def download(name: str, progress: bool = True) -> Path:
    """Fetch an official file into the cache folder, unless it is there; check its sha256.

    An interrupted download goes on where it stopped, in this call or a later one. Where another
    process fetches the same file, this one waits for it.

    Args:
        name: a key of OFFICIAL.
        progress: whether to show a bar.

    Returns:
        Its path.

    Raises:
        ValueError: there is no such file, or the server's is not the official one.
        ConnectionError: it cannot be fetched.
        OSError: the folder cannot be written or lacks the room.
    """
    if name not in OFFICIAL:
        names = ", ".join(OFFICIAL)
        raise ValueError(f"There are no official weights {name!r}. Choose one of {names}.")
    import pooch
    from filelock import FileLock

    wanted, path = OFFICIAL[name], kept_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with FileLock(path.with_name(path.name + ".lock")):
        if path.exists() and pooch.file_hash(str(path)) != wanted.sha256:
            path.unlink()  # it was changed after it had come
        if path.exists():
            return path
        _check_room(part, wanted)
        pooch.get_logger().setLevel("WARNING")
        while True:
            resumed = part.exists()
            try:
                pooch.retrieve(
                    wanted.url,
                    f"sha256:{wanted.sha256}",
                    fname=path.name,
                    path=str(path.parent),
                    downloader=_resuming(part, wanted.size, progress),
                )
                return path
            except ValueError as error:  # pooch has removed what came
                # the fault may lie in the earlier part: once more, from the beginning
                if not resumed:
                    raise ValueError(
                        f"{wanted.url} did not give the official {path.name}: its sha256 is not "
                        f"{wanted.sha256}. Nothing was kept. Try again later or from another "
                        "network."
                    ) from error


def _check_room(part: Path, wanted: OfficialFile) -> None:
    needed = wanted.size - _size(part)
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(
            f"{wanted.name} needs {needed / 1e6:,.0f} MB and {part.parent} has {free / 1e6:,.0f} "
            f"MB free. Make room, or set {CACHE_VARIABLE} to a folder on another disk."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resuming(part: Path, size: int, progress: bool) -> Callable[..., None]:
    """A downloader for pooch that gathers bytes in `part`, over connections and processes."""

    def fetch(url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        import requests
        from tqdm.auto import tqdm

        if _size(part) > size:
            part.unlink()
        look = {"unit": "B", "unit_scale": True, "desc": part.stem, "dynamic_ncols": True}
        with tqdm(total=size, initial=_size(part), disable=not progress, **look) as bar:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    _fetch_rest(url, part, size, bar)
                    break
                except requests.RequestException as error:
                    answer = error.response
                    if attempt < ATTEMPTS and answer is None:  # a server that answers "no" means it
                        continue
                    reason = type(error).__name__
                    if answer is not None:
                        reason = f"HTTP {answer.status_code}"
                    raise ConnectionError(
                        f"{url} could not be fetched ({reason}; {_size(part):,} of {size:,} bytes "
                        "are here). Run the same again and it goes on from there, or put the file, "
                        f"fetched by other means, at {part.with_suffix('')}."
                    ) from error
        os.replace(part, output_file)

    return fetch


def _fetch_rest(url: str, part: Path, size: int, bar: Any) -> None:
    """One connection: append to `part` what it lacks of `size` bytes."""
    import requests

    have = _size(part)
    if have == size:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, stream=True, headers=headers, timeout=(15, 60)) as response:
        response.raise_for_status()
        given = response.headers.get("Content-Range", "")
        resumed = response.status_code == 206 and given.startswith(f"bytes {have}-")
        if not resumed:
            have = 0  # this server begins at the beginning
        bar.update(have - bar.n)
        with part.open("ab" if resumed else "wb") as file:
            for block in response.iter_content(_BLOCK):
                file.write(block)
                bar.update(len(block))
    if _size(part) < size:
        raise requests.ConnectionError(f"{url} ended early")


def ask_to_download(name: str) -> bool:
    """Ask the person at a terminal whether to fetch a file now; False where nobody is there."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    wanted = OFFICIAL[name]
    size = f"{wanted.size / 1e6:,.0f} MB"
    question = f"{name} needs {wanted.name} ({size}, {wanted.licence}) from {wanted.url}."
    print(question, "Fetch it now? [y/N]", end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
