"""The machine: what a method takes of its memory, and where a result comes from.

Peak memory is measured in a process of its own, as what one method frees may serve the next. On a
CPU it is what comes on top of loaded models and images, on CUDA all that is allocated.
"""

import gc
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aopsam_lab.data import Dataset
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles
from aopsam_lab.study import PACKAGE_ROOT
from aopsam_lab.study.score import encode, run
from aopsam_lab.study.settings import Setting, package_environment

MIB = 2**20
MEMORY_VERSION = {"memory_version": 1}  # raise it when the way of measuring changes
PACKAGES = (
    "torch", "torchvision", "segment-anything", "mobilesam-mirror", "timm", "ultralytics",
    "ultralytics-opencv-headless", "numpy", "scipy", "pandas", "pillow", "opencv-python-headless",
    "pycocotools", "safetensors", "matplotlib", "papermill",
)  # fmt: skip
UNKNOWN = "unknown"


def in_own_process(_: LoadedModels, job: tuple[Setting, ModelFiles, list[Dataset], Any]) -> float:
    """The peak memory of a setting on images, each a data set, in a new process, in MiB."""
    command = [sys.executable, "-m", "aopsam_lab.study.machine"]
    request = pickle.dumps((*job[:2], [image[0].image for image in job[2]]))
    done = subprocess.run(command, input=request, capture_output=True, env=package_environment())
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-800:]
        raise RuntimeError(f"Measuring memory failed: {words}")
    return float(done.stdout.split()[-1])


def peak_while(device: torch.device, work: Callable[[], object]) -> float:
    """The peak memory while `work` runs in this process, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / MIB
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak so far
    before = _resident("VmRSS")
    work()
    return max(_resident("VmHWM") - before, 0) / MIB


def _resident(field: str) -> int:
    """The resident size now (VmRSS) or its peak (VmHWM) in bytes; without /proc the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def provenance(device: torch.device) -> dict[str, Any]:
    """What no parameter says: time (UTC), commit, processor, versions."""
    found = {own.name.lower().replace("_", "-"): own.version for own in metadata.distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
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
    """The model of the GPU, or of the CPU, and how much of it this process may use and uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = _output("sysctl", "-n", "machdep.cpu.brand_string")  # macOS
    if platform.system() == "Linux":
        names = _output("grep", "-m1", "^model name", "/proc/cpuinfo") or ""
        model = names.partition(":")[2].strip()
    model = model or platform.processor() or platform.machine()
    return f"{model}, {cores} cores, threads: {torch.get_num_threads()}"


def git_state(root: Path) -> tuple[str, bool | str]:
    """The commit of a checkout, and whether tracked files, results aside, differ; or UNKNOWN."""
    git = ("git", "-C", str(root))
    top, _, commit = (_output(*git, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if not top or Path(top).resolve() != root:  # a repository around the folder is another one
        return UNKNOWN, UNKNOWN
    tracked = ("status", "--porcelain", "--untracked-files=no", "--", ".")
    changed = _output(*git, *tracked, ":!reports", ":!README.md")
    return commit, UNKNOWN if changed is None else bool(changed)


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    setting, files, images = pickle.load(sys.stdin.buffer)
    models = files.load()

    def work() -> None:
        """Run the setting on all images."""
        for image in images:
            run(models, encode(models.sam, image), setting)

    print(peak_while(models.sam.device, work))
