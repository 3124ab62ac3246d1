"""The official weights: where they are, and how they are fetched, checked and kept.

Meta publishes no sha256; those here are what many public projects quote for the same addresses.
"""

import os
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "AOPSAM_CACHE"
_SAM = "https://dl.fbaipublicfiles.com/segment_anything"


@dataclass(frozen=True)
class OfficialFile:
    """One file; the size is in bytes."""

    url: str
    sha256: str
    size: int
    licence: str = "Apache-2.0"

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[-1]


OFFICIAL = {
    "vit_b": OfficialFile(
        f"{_SAM}/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375_042_383,
    ),
    "vit_l": OfficialFile(
        f"{_SAM}/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1_249_524_607,
    ),
    "vit_h": OfficialFile(
        f"{_SAM}/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2_564_550_879,
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


def download(name: str) -> Path:
    """Fetch a file of OFFICIAL into the cache folder, unless it is there; return its path."""
    if name not in OFFICIAL:
        names = ", ".join(OFFICIAL)
        raise ValueError(f"There are no official weights {name!r}. Choose one of {names}.")
    import pooch
    from requests import RequestException

    wanted, path = OFFICIAL[name], kept_file(name)
    pooch.get_logger().setLevel("WARNING")
    known_hash = f"sha256:{wanted.sha256}"
    try:
        pooch.retrieve(wanted.url, known_hash, path.name, path.parent, progressbar=True)
    except RequestException as error:
        advice = f"Try again later, or put the file, fetched by other means, at {path}."
        raise ConnectionError(f"{wanted.url} could not be fetched ({error}). {advice}") from error
    return path
