"""Peak memory, measured in a process of its own: what one method frees may serve the next.

On a CPU it is what comes on top of loaded models and images, on CUDA all that is allocated.
"""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from aopsam_lab.study.score import encode, run
from aopsam_lab.study.settings import Setting, StudyConfig, load_models, package_environment

MIB = 2**20
MEMORY_VERSION = {"memory_version": 1}  # raise it when the way of measuring changes


def in_own_process(setting: Setting, config: StudyConfig, images: Sequence[np.ndarray]) -> float:
    """`measure_peak` in a new process; RuntimeError where it fails."""
    command = [sys.executable, "-m", "aopsam_lab.study.memory"]
    request = pickle.dumps((setting, config, images))
    done = subprocess.run(command, input=request, capture_output=True, env=package_environment())
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-800:]
        raise RuntimeError(f"Measuring memory failed: {words}")
    return float(done.stdout.split()[-1])


def measure_peak(setting: Setting, config: StudyConfig, images: Sequence[np.ndarray]) -> float:
    """The peak of a setting on images (H x W x 3 uint8) in this process, in MiB."""
    models = load_models(config, [setting.method])

    def work() -> None:
        for image in images:
            run(models, encode(models.sam, image), setting)

    return peak_while(models.sam.device, work)


def peak_while(device: torch.device, work: Callable[[], object]) -> float:
    """The peak memory while `work` runs, in MiB."""
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


if __name__ == "__main__":
    print(measure_peak(*pickle.load(sys.stdin.buffer)))
