"""What a study scores, and all that a score depends on."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.files import code_fingerprint
from aopsam_lab.pipeline.methods import METHODS as OUR_METHODS
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.sam.zoo import load_sam, resolve_device, spec_of

# regular grids of other sides, to compare as many prompts with
GRIDS = {f"grid_{side}": Grid(f"grid_{side}", side) for side in (8, 10, 12, 14, 16, 20)}
METHODS = {**OUR_METHODS, **GRIDS}

# What scores. When one of these modules or one that they import changes, rows are scored anew.
SCORING_MODULES = (
    "aopsam_lab.pipeline.run",
    "aopsam_lab.pipeline.decode_cache",
    "aopsam_lab.study.scores",
)


@dataclass(frozen=True)
class Weights:
    """Which models to load: all that a process of its own needs to know. Paths as given; None: bundled."""

    sam: str = "mobile_sam"
    checkpoint: str | None = None
    predictor: str | None = None
    detector: str | None = None
    device: str = "auto"

    @classmethod
    def of(
        cls,
        sam: str,
        checkpoint: str | os.PathLike | None = None,
        predictor: str | os.PathLike | None = None,
        detector: str | os.PathLike | None = None,
        device: str = "auto",
    ) -> Weights:
        """From paths of any kind."""
        paths = (
            None if path is None else os.fspath(path) for path in (checkpoint, predictor, detector)
        )
        return cls(sam, *paths, device)


@dataclass(frozen=True)
class Models:
    """The models that the methods at hand need; None where none of them does."""

    sam: Sam
    predictor: Any | None
    detector: Any | None
    device: torch.device


@dataclass(frozen=True)
class Setting:
    """One method with its ASF parameters and its limit of prompts (None: none); `label` names its row."""

    label: str
    method: str
    params: AsfParams
    max_prompts: int | None = None

    def used_params(self) -> dict[str, float]:
        """The parameters that this method reads, by name."""
        return {name: float(getattr(self.params, name)) for name in METHODS[self.method].uses}


def check_methods(methods: list[str]) -> None:
    """Raises ValueError for a method that does not exist or stands twice, and for none at all."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}. Choose from {', '.join(METHODS)}.")
    if not methods:
        raise ValueError(f"methods is empty. Choose from {', '.join(METHODS)}.")
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods names one twice: {', '.join(methods)}.")


def load_models(weights: Weights, methods: list[str]) -> Models:
    """Load the SAM, and of the Prompt Predictor and the detector what the methods need."""
    device = resolve_device(weights.device)
    predictor = detector = None
    sam = load_sam(weights.sam, weights.checkpoint, device)
    needs = {METHODS[method].needs for method in methods}
    if "predictor" in needs:
        from aopsam_lab.predictor import load_predictor

        predictor = load_predictor(weights.sam, weights.predictor, device)
    if "detector" in needs:
        from aopsam_lab.detector import load_detector

        detector = load_detector(weights.detector, device)
    return Models(sam, predictor, detector, device)


def row_inputs(setting: Setting, models: Models, machine: str, image: str) -> dict[str, Any]:
    """All that could change a row of `setting` on the image (or images) with the fingerprint `image`.

    The machine (processor, threads) and torch's version are in it because every row holds times.
    """
    inputs: dict[str, Any] = {
        "code": scoring_code(),
        "method": setting.method,
        "params": setting.used_params(),
        "sam": dataclasses.asdict(spec_of(models.sam)),
        "max_prompts": setting.max_prompts,
        "image": image,
        "device": models.device.type,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    needed = METHODS[setting.method].needs
    if needed:
        inputs[needed] = getattr(models, needed).sha256
    return inputs


@functools.cache
def scoring_code() -> str:
    """A hash of the code behind SCORING_MODULES as this process runs it."""
    return code_fingerprint(SCORING_MODULES)


def weight_hashes(models: Models) -> dict[str, str]:
    """sha256 of the weights in use, by model."""
    spec = spec_of(models.sam)
    found = {f"SAM ({spec.name})": spec.sha256}
    if models.predictor is not None:
        found["Prompt Predictor"] = models.predictor.sha256
    if models.detector is not None:
        found["detector"] = models.detector.sha256
    return found


def package_environment() -> dict[str, str]:
    """This process's environment with the package importable, for processes started from it."""
    from aopsam_lab.study import PACKAGE_ROOT

    paths = [str(PACKAGE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
