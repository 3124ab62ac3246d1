"""aopsam_lab: explore, measure and teach automatic prompting of Segment Anything.

    import aopsam_lab as aop
    seg = aop.segment("photo.jpg", method="aop")
    seg.plot()

A name is loaded on first use, so that ``import aopsam_lab`` stays quick; ``__init__.pyi`` tells
editors the same names.
"""

import importlib

_EXPORTS = {
    "AsfParams": "aopsam_lab.asf",
    "MaskParams": "aopsam_lab.pipeline.types",
    "METHODS": "aopsam_lab.pipeline.methods",
    "Segmentation": "aopsam_lab.pipeline.segmentation",
    "encode": "aopsam_lab.pipeline.decode",
    "explore": "aopsam_lab.widgets.explorer",
    "load_detector": "aopsam_lab.detector",
    "load_predictor": "aopsam_lab.predictor",
    "load_sam": "aopsam_lab.sam.zoo",
    "open_dataset": "aopsam_lab.data",
    "plot": "aopsam_lab.pipeline.show",
    "run_method": "aopsam_lab.pipeline.run",
    "run_study": "aopsam_lab.study.runner",
    "save": "aopsam_lab.pipeline.show",
    "segment": "aopsam_lab.pipeline.run",
}
__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(list(globals()) + __all__)
