"""What a study scores, and all that a score depends on."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from aopsam_lab.asf import AsfParams
from aopsam_lab.files import code_fingerprint
from aopsam_lab.pipeline.methods import METHODS as OUR_METHODS
from aopsam_lab.pipeline.methods import TITLES, Grid, Method
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles
from aopsam_lab.pipeline.types import MaskParams
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.study import PACKAGE_ROOT

# regular grids of other sides, to compare as many prompts with
GRIDS = {f"grid_{side}": Grid(f"grid_{side}", side) for side in (8, 10, 12, 14, 16, 20)}
METHODS: dict[str, Method] = {**OUR_METHODS, **GRIDS}
# What scores. When it or a module that it imports changes, rows are scored anew.
SCORING_MODULES = ("aopsam_lab.study.score",)
REFERENCE = "aop"  # the method that the others are compared with
Pair = tuple[float, float]  # predicted IoU, stability score
THRESHOLDS: tuple[Pair, ...] = (
    (0.88, 0.95), (0.82, 0.92), (0.75, 0.88), (0.65, 0.80), (0.50, 0.70),
)  # fmt: skip


@dataclass(frozen=True)
class StudyConfig:
    """All that a study is asked for; ValueError for bad methods and parameters."""

    sam: str = "mobile_sam"
    methods: tuple[str, ...] = tuple(TITLES)
    dataset: str | os.PathLike = "photos"
    n_images: int | None = 12  # at most so many; None: all
    timed_images: int = 3  # on how many of the first each method also runs alone, to be timed
    seed: int = 0  # which images
    device: str = "auto"
    smoothing: float = 2.0
    confidence: float = 0.2
    spacing: float = 6.0
    elimination: float = 1.3
    quality: MaskParams = MaskParams()
    out: str | os.PathLike = "reports/main_comparison"  # scores in it are not computed again
    checkpoint: str | os.PathLike | None = None  # None: bundled or official weights
    predictor: str | os.PathLike | None = None
    detector: str | os.PathLike | None = None
    thresholds: tuple[Pair, ...] = THRESHOLDS  # at which masks are filtered as well
    memory: bool = True  # whether to measure peak memory, in a process for each method
    progress: bool = True  # whether to show progress bars
    # in which processes: a dask client, a scheduler's address, how many here; None: in this one
    scheduler: Any = None

    def __post_init__(self) -> None:
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods)
        object.__setattr__(self, "methods", methods)
        unknown = [method for method in methods if method not in METHODS]
        if unknown or not methods:
            wrong = f"There is no method {unknown[0]!r}." if unknown else "methods is empty."
            raise ValueError(f"{wrong} Choose from {', '.join(METHODS)}.")
        if len(set(methods)) < len(methods):
            raise ValueError(f"methods names one twice: {', '.join(methods)}.")
        _ = self.params  # which are in range, or it raises

    @property
    def params(self) -> AsfParams:
        """The four parameters of adaptive sampling and filtering."""
        return AsfParams(self.smoothing, self.confidence, self.spacing, self.elimination)

    def files(self, methods: Iterable[str]) -> ModelFiles:
        """The models that methods need."""
        own = self.sam, self.checkpoint, self.predictor, self.detector, self.device
        return ModelFiles(*own, frozenset(METHODS[method].needs for method in methods))


@dataclass(frozen=True)
class Setting:
    """One method with its parameters and its limit of prompts (None: none); label names its row."""

    label: str
    method: str
    params: AsfParams
    max_prompts: int | None = None
    quality: MaskParams = MaskParams()


def row_inputs(
    setting: Setting, models: LoadedModels, device: str, machine: str | None, image: str
) -> dict[str, Any]:
    """All that could change a row, made on a device, on the image with the fingerprint `image`.

    The machine counts for times alone: of scores it is None.
    """
    method = METHODS[setting.method]
    used = getattr(models, method.needs) if method.needs else None
    return {
        "code": scoring_code(),
        "method": setting.method,
        "params": {name: float(getattr(setting.params, name)) for name in method.uses},
        "quality": dataclasses.asdict(setting.quality),
        "sam": dataclasses.asdict(spec_of(models.sam)),
        "max_prompts": setting.max_prompts,
        "image": image,
        "device": device,
        "machine": machine,
        "torch": torch.__version__,
        "weights": used and used.sha256,
    }


@functools.cache
def scoring_code() -> str:
    """A hash of SCORING_MODULES and what they import, as this process runs it."""
    return code_fingerprint(SCORING_MODULES)


def package_environment() -> dict[str, str]:
    """This process's environment with the package importable, for processes started from it."""
    paths = filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
