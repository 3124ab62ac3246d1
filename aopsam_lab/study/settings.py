"""What a study scores, and all that a score depends on."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.detector import load_detector
from aopsam_lab.fingerprint import code_fingerprint
from aopsam_lab.pipeline.methods import METHODS as OUR_METHODS
from aopsam_lab.pipeline.methods import Grid
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.zoo import load_sam, spec_of
from aopsam_lab.study import PACKAGE_ROOT

# regular grids of other sides, to compare as many prompts with
GRIDS = {f"grid_{side}": Grid(f"grid_{side}", side) for side in (8, 10, 12, 14, 16, 20)}
METHODS = {**OUR_METHODS, **GRIDS}

# The code that a score or a time depends on: rows made with other code are scored anew.
SCORING_CODE = (
    "asf.py", "data/images.py", "detector.py", "evaluator.py", "masks/fullsize.py", "masks/rle.py",
    "pipeline/batching.py", "pipeline/decode.py", "pipeline/decode_cache.py",
    "pipeline/loose_cache.py", "pipeline/methods.py", "pipeline/run.py", "predictor.py",
    "recall.py", "sam/image_decoder.py", "sam/mobile.py", "sam/shared.py", "sam/zoo.py",
    "study/score.py",
)  # fmt: skip


DEFAULT_METHODS = (
    "amg_s", "amg_d", "oas_box", "oas_point", "aop_no_as_af", "aop_no_af", "aop", "aop_gated",
    "aop_raw",
)  # fmt: skip
REFERENCE = "aop"  # the method that the others are compared with
Pair = tuple[float, float]  # predicted IoU, stability score
THRESHOLDS: tuple[Pair, ...] = (
    (0.88, 0.95), (0.82, 0.92), (0.75, 0.88), (0.65, 0.80), (0.50, 0.70),
)  # fmt: skip


@dataclass(frozen=True)
class StudyConfig:
    """All that a study is asked for.

    Args:
        sam: a SAM's name; checkpoint: its weights, None for the bundled or official ones.
        methods: names in METHODS.
        dataset: as `open_dataset` takes it; n_images: at most so many, None for all; seed: which.
        timed_images: on how many of the first images each method also runs alone, to be timed.
        device: "auto", "cpu" or "cuda".
        smoothing, confidence, spacing, elimination: as in AsfParams.
        out: folder of the results. Scores in its `results.sqlite` are not computed again, unless
            something they depend on has changed.
        predictor, detector: paths of weights; None: the bundled ones.
        thresholds: pairs (predicted IoU, stability score) at which masks are filtered as well.
        memory: whether to measure peak memory, in a process for each method.
        progress: whether to show progress bars.

    Raises:
        ValueError: for methods that do not exist, stand twice or are none; for parameters out of
            range.
    """

    sam: str = "mobile_sam"
    methods: tuple[str, ...] = DEFAULT_METHODS
    dataset: str | os.PathLike = "photos"
    n_images: int | None = 12
    timed_images: int = 3  # runs that share nothing are what a study mostly costs
    seed: int = 0
    device: str = "auto"
    smoothing: float = 2.0
    confidence: float = 0.2
    spacing: float = 6.0
    elimination: float = 1.3
    out: str | os.PathLike = "reports/main_comparison"
    checkpoint: str | os.PathLike | None = None
    predictor: str | os.PathLike | None = None
    detector: str | os.PathLike | None = None
    thresholds: tuple[Pair, ...] = THRESHOLDS
    memory: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        object.__setattr__(self, "methods", methods)
        check_methods(methods)
        _ = self.params

    @property
    def params(self) -> AsfParams:
        """The four parameters of adaptive sampling and filtering."""
        names = (field.name for field in dataclasses.fields(AsfParams))
        return AsfParams(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class LoadedModels:
    """The models that the methods at hand need; None where none of them does."""

    sam: Sam
    predictor: Any | None
    detector: Any | None

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self.sam.device


@dataclass(frozen=True)
class Setting:
    """One method with its parameters and its limit of prompts (None: none); label names its row."""

    label: str
    method: str
    params: AsfParams
    max_prompts: int | None = None

    def used_params(self) -> dict[str, float]:
        """The parameters that this method reads, by name."""
        return {name: float(getattr(self.params, name)) for name in METHODS[self.method].uses}


def check_methods(methods: tuple[str, ...]) -> None:
    """Raise ValueError for a method that does not exist or stands twice, and for none at all."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}. Choose from {', '.join(METHODS)}.")
    if not methods:
        raise ValueError(f"methods is empty. Choose from {', '.join(METHODS)}.")
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods names one twice: {', '.join(methods)}.")


def load_models(config: StudyConfig, methods: Iterable[str]) -> LoadedModels:
    """Load the SAM, and of the Prompt Predictor and the detector what the methods need."""
    sam = load_sam(config.sam, config.checkpoint, config.device)
    needs = {METHODS[method].needs for method in methods}
    predictor = detector = None
    if "predictor" in needs:
        predictor = load_predictor(config.sam, config.predictor, sam.device)
    if "detector" in needs:
        detector = load_detector(config.detector, sam.device)
    return LoadedModels(sam, predictor, detector)


def row_inputs(setting: Setting, models: LoadedModels, machine: str, image: str) -> dict[str, Any]:
    """All that could change a row of `setting`.

    Args:
        setting, models: what is run.
        machine: the processor. With the threads and torch's version it is in, as rows hold times.
        image: the fingerprint of the image, or of several.
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
    """A hash of SCORING_CODE as this process runs it."""
    return code_fingerprint(SCORING_CODE)


def weight_hashes(models: LoadedModels) -> dict[str, str]:
    """The sha256 of the weights in use, by model."""
    spec = spec_of(models.sam)
    others = {"Prompt Predictor": models.predictor, "detector": models.detector}
    found = {name: model.sha256 for name, model in others.items() if model is not None}
    return {f"SAM ({spec.name})": spec.sha256, **found}


def package_environment() -> dict[str, str]:
    """This process's environment with the package importable, for processes started from it."""
    paths = [str(PACKAGE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
