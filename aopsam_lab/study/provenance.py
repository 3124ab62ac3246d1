"""Where a result comes from: versions, processor, commit. Every report ends with it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aopsam_lab.study import PACKAGE_ROOT

PACKAGES = (
    "torch", "torchvision", "segment-anything", "mobilesam-mirror", "timm", "ultralytics",
    "ultralytics-opencv-headless", "numpy", "scipy", "pandas", "pillow", "opencv-python-headless",
    "pycocotools", "safetensors", "matplotlib", "papermill",
)  # fmt: skip
UNKNOWN = "unknown"


def provenance(device: torch.device) -> dict[str, Any]:
    """What no parameter says: time (UTC), commit, processor, versions."""
    installed = {
        own.name.lower().replace("_", "-"): own.version for own in metadata.distributions()
    }
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    commit, dirty = git_state(PACKAGE_ROOT)
    return {
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": dirty,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }


def processor(device: torch.device) -> str:
    """The model of the CPU or GPU, and of a CPU how many cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = _output("sysctl", "-n", "machdep.cpu.brand_string")  # macOS
    if platform.system() == "Linux":
        names = _output("grep", "-m1", "^model name", "/proc/cpuinfo") or ""
        model = names.partition(":")[2].strip()
    return f"{model or platform.processor() or platform.machine()}, {cores} cores"


def git_state(root: Path) -> tuple[str, bool | str]:
    """The commit of a checkout, and whether tracked files, results aside, differ; or UNKNOWN."""
    git = ("git", "-C", str(root))
    top = _output(*git, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:  # a repository around the folder is another one
        return UNKNOWN, UNKNOWN
    tracked = ("status", "--porcelain", "--untracked-files=no", "--", ".")
    changed = _output(*git, *tracked, ":!reports", ":!README.md")
    commit = _output(*git, "rev-parse", "HEAD")
    return commit or UNKNOWN, UNKNOWN if changed is None else bool(changed)


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
