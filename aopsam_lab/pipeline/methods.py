"""Every method is one small object that proposes prompts; METHODS is the registry.

To add a method: write a class with `name`, `needs`, `uses` and `start`, and list it in METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from segment_anything.utils.amg import build_point_grid

from aopsam_lab import asf
from aopsam_lab.pipeline.types import Encoded, MaskParams, Models, Prompts, Proposal
from aopsam_lab.predictor import CELL

MAX_BOXES = 100


class Method(Protocol):
    """What proposes prompts."""

    @property
    def name(self) -> str:
        """Its key in METHODS."""

    @property
    def needs(self) -> str:
        """The model it needs beside SAM: "predictor", "detector", or "" for none."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the fields of AsfParams that count."""

    def start(self, encoded: Encoded, models: Models, params: asf.AsfParams) -> Proposal:
        """Propose prompts on an image; the pipeline asks the proposal for rounds of them."""


@dataclass(frozen=True)
class Grid:
    """A grid of side * side points over the image, as segment_anything builds it."""

    name: str
    side: int
    needs: str = ""
    uses: tuple[str, ...] = ()

    def start(self, encoded: Encoded, models: Models, params: asf.AsfParams) -> Proposal:
        """See Method."""
        height, width = encoded.image.shape[:2]
        points = (build_point_grid(self.side) * [width, height]).astype("float32")
        points = torch.from_numpy(points).to(encoded.embedding.device)
        return Proposal(Prompts(points, torch.ones_like(points[:, 0])))


@dataclass(frozen=True)
class DetectorPrompts:
    """At most MAX_BOXES boxes of YOLOv8 as prompts, or their centres."""

    name: str
    as_points: bool
    needs: str = "detector"
    uses: tuple[str, ...] = ()

    def start(self, encoded: Encoded, models: Models, params: asf.AsfParams) -> Proposal:
        """See Method."""
        found, device = models.detector.boxes(encoded.image, MAX_BOXES), encoded.embedding.device
        boxes, scores = (torch.as_tensor(x, device=device) for x in found)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        if self.as_points:
            return Proposal(Prompts(centres, scores))
        return Proposal(Prompts(centres, scores, boxes, multimask=False))


@dataclass(frozen=True)
class Aop:
    """AoP-SAM and its ablations."""

    name: str
    adaptive_sampling: bool = True  # or one point a component of the PCM
    filtering: bool = True  # whether prompts are eliminated
    literal: bool = False  # by the raw embedding, and without a lower bound of the threshold
    gated: bool = False  # only prompts on a mask or beside it
    first: float = asf.FIRST  # see FilteredProposal
    rounds: int = asf.ROUNDS
    needs: str = "predictor"

    @property
    def uses(self) -> tuple[str, ...]:
        """See Method."""
        sampling = ("smoothing", "confidence", "spacing")
        used = sampling if self.adaptive_sampling else ("confidence",)
        return (*used, "elimination") if self.filtering else used

    def start(self, encoded: Encoded, models: Models, params: asf.AsfParams) -> Proposal:
        """See Method."""
        size, (h, w) = encoded.model_image.shape[-1], encoded.embedding.shape[-2:]
        device = encoded.embedding.device
        valid = asf.valid_cells(encoded.input_size, size, (CELL * h, CELL * w), device)
        pcm = models.predictor.pcm(encoded.model_image, encoded.embedding, valid)
        if self.adaptive_sampling:
            sampling = params.smoothing, params.confidence, params.spacing
            cells, confidence = asf.sample_prompts(pcm, *sampling)
        else:
            cells, confidence = asf.component_prompts(pcm, params.confidence)
        # a smoothed map can peak just outside the image, on padding
        inside = valid[cells[:, 0], cells[:, 1]]
        cells, confidence = cells[inside], confidence[inside]
        points = encoded.to_image((cells.flip(1) + 0.5) * (size / pcm.shape[-1]))
        prompts = Prompts(points, confidence)
        if not self.filtering:
            return Proposal(prompts, pcm)
        # the cells of the embedding that hold one on the image: nothing is computed of the others
        rows, columns = (-(-int(valid.any(dim).sum()) // CELL) for dim in (1, 0))
        valid = asf.valid_cells(encoded.input_size, size, (h, w), device)[:rows, :columns]
        look, place = (x[0, :, :rows, :columns] for x in (encoded.embedding, encoded.image_pe))
        if self.literal:
            features = asf.raw_features(look, valid)
        else:
            features = asf.elimination_features(look, place, valid)
        return asf.FilteredProposal(
            prompts,
            pcm,
            cells=cells // CELL,
            features=features,
            valid=valid,
            grid=(h, w),
            elimination=params.elimination,
            gated=self.gated,
            floor=not self.literal,
            first=self.first,
            rounds=self.rounds,
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Grid("amg_s", 16),  # the paper's AMG-S
        Grid("amg_d", 32),  # AMG-D
        DetectorPrompts("oas_box", as_points=False),  # OAS Box
        DetectorPrompts("oas_point", as_points=True),  # OAS Central Point
        Aop("aop_no_as_af", adaptive_sampling=False, filtering=False),  # the ablation
        Aop("aop_no_af", filtering=False),
        Aop("aop"),
        # its `first` was chosen on training photographs: reports/training/filtering.csv
        Aop("aop_raw", literal=True, first=0.5),
        Aop("aop_gated", gated=True),
    )
}
# as reports and the explorer write them, in this order
TITLES = {
    "amg_s": "AMG-S",
    "amg_d": "AMG-D",
    "oas_box": "OAS Box",
    "oas_point": "OAS Central Point",
    "aop_no_as_af": "AoP-SAM without AS, AF",
    "aop_no_af": "AoP-SAM without AF",
    "aop": "AoP-SAM",
    "aop_gated": "AoP-SAM gated (ours)",
    "aop_raw": "AoP-SAM, literal",
}


def method_named(name: str | Method, quality: MaskParams = MaskParams()) -> Method:
    """The registered method of a name, a method itself as it is; a grid of `quality`'s points."""
    if isinstance(name, str) and name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name] if isinstance(name, str) else name
    if isinstance(method, Grid):
        return replace(method, side=quality.points_per_side or method.side)
    return method
