"""Peak memory of a method, measured in a process of its own.

On a CPU it is the peak resident size while the method runs, encoder included, minus the resident size once models and
pictures are loaded and nothing has run (ours; the paper does not say how it measured). On CUDA it is
`torch.cuda.max_memory_allocated`, weights included. Both in MiB.

A process of its own, because memory that one method has freed may be handed to the next without showing, and because
the peak of a process only ever grows.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aopsam_lab.study.settings import Setting, Weights, load_models, package_environment

MIB = 2**20
MEMORY_VERSION = 1  # raise it when the way of measuring changes


def measure_peak(setting: Setting, weights: Weights, images: Sequence[np.ndarray]) -> float:
    """Start a process, run the method on each image, return the peak in MiB.

    images: H x W x 3 uint8 each. Raises RuntimeError, with the process's last words, where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="aopsam_memory_") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        for i, image in enumerate(images):
            np.save(Path(folder, f"{i}.npy"), image)
        request.write_text(
            json.dumps(
                {
                    "method": setting.method,
                    "params": dataclasses.asdict(setting.params),
                    "max_prompts": setting.max_prompts,
                    "weights": dataclasses.asdict(weights),
                    "images": [str(Path(folder, f"{i}.npy")) for i in range(len(images))],
                    "answer": str(answer),
                }
            )
        )
        command = [sys.executable, "-m", "aopsam_lab.study.memory", str(request)]
        run = subprocess.run(command, capture_output=True, text=True, env=package_environment())
        if run.returncode or not answer.exists():
            raise RuntimeError(
                f"Measuring the memory of {setting.method} failed: {run.stderr.strip()[-800:]}"
            )
        return float(json.loads(answer.read_text()))


def main(request_file: str) -> None:
    """The measuring process."""
    import torch

    from aopsam_lab.asf import AsfParams
    from aopsam_lab.pipeline.decode import encode
    from aopsam_lab.pipeline.run import run_method

    request = json.loads(Path(request_file).read_text())
    method, params = request["method"], AsfParams(**request["params"])
    models = load_models(Weights(**request["weights"]), [method])
    images = [np.load(path) for path in request["images"]]
    gc.collect()
    cuda = models.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(models.device)
    before = _start_peak()
    for image in images:
        encoded = encode(models.sam, image)
        run_method(
            models.sam,
            encoded,
            method,
            models.predictor,
            models.detector,
            params,
            max_prompts=request["max_prompts"],
        )
    peak = torch.cuda.max_memory_allocated(models.device) if cuda else _peak() - before
    Path(request["answer"]).write_text(json.dumps(max(peak, 0) / MIB))


def _start_peak() -> int:
    """Forget the peak so far where the system can (Linux); the resident size from which growth counts, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM, the peak resident size
        return _status("VmRSS")
    except OSError:
        return _peak_ever()


def _peak() -> int:
    """The peak resident size since _start_peak, in bytes."""
    try:
        return _status("VmHWM")
    except OSError:
        return _peak_ever()


def _peak_ever() -> int:
    """The peak since the process began, in bytes: where it cannot be reset, a peak while loading hides smaller ones."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1])
