"""Where a result comes from: versions, weights, processor, commit. Every report ends with it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "segment-anything", "mobilesam-mirror", "timm", "ultralytics", "ultralytics-opencv-headless", "numpy",
    "scipy", "pandas", "pillow", "opencv-python-headless", "pycocotools", "safetensors", "matplotlib", "papermill",
)  # fmt: skip
UNKNOWN = "unknown"


def provenance(device: torch.device) -> dict[str, Any]:
    """What no parameter says: time (UTC), commit, whether the tree differs from it, versions, processor."""
    commit, dirty = git_state(Path(__file__).resolve().parents[2])
    return {
        "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": dirty,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor(device: torch.device) -> str:
    """The model of the CPU or GPU that `device` is, and of a CPU how many cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores"


def git_state(root: Path) -> tuple[str, bool | str]:
    """(commit, whether tracked files differ from it, reports aside); "unknown" where `root` is no git checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:  # a repository around us is not ours
        return UNKNOWN, UNKNOWN
    commit = _git(root, "rev-parse", "HEAD")
    # Writing the reports changes tracked files: that is the result, not the code that made it.
    changed = _git(
        root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports", ":!README.md"
    )
    return commit or UNKNOWN, UNKNOWN if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        run = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        )
        if run.returncode == 0:
            return run.stdout.strip()
    return platform.processor() or platform.machine()
