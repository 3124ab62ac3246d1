"""aopsam_lab: explore, measure and teach automatic prompting of Segment Anything.

    import aopsam_lab as aop
    seg = aop.segment("photo.jpg", method="aop")
    seg.plot()

Names are loaded on first use, so that ``import aopsam_lab`` stays quick.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "segment": "aopsam_lab.pipeline.run",
    "encode": "aopsam_lab.pipeline.decode",
    "explore": "aopsam_lab.widgets.explorer",
    "run_method": "aopsam_lab.pipeline.run",
    "AsfParams": "aopsam_lab.asf",
    "METHODS": "aopsam_lab.pipeline.methods",
    "Segmentation": "aopsam_lab.pipeline.segmentation",
    "load_sam": "aopsam_lab.sam.zoo",
    "load_predictor": "aopsam_lab.predictor",
    "load_detector": "aopsam_lab.detector",
    "run_study": "aopsam_lab.study.runner",
    "open_dataset": "aopsam_lab.data",
}
__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(list(globals()) + __all__)
