"""Every method is one small object that proposes prompts, round by round; ``METHODS`` is the registry.

A method's ``start`` looks at an encoded picture and returns a :class:`Proposal`. The pipeline then asks it for rounds of
prompts, decodes and filters each the same way for every method, and shows it the masks that passed.

| name          | prompts                                                            | masks a prompt |
|---------------|--------------------------------------------------------------------|----------------|
| amg_s, amg_d  | 16 x 16 and 32 x 32 grid (paper's AMG-S, AMG-D)                    | 3 |
| oas_box       | YOLOv8 boxes, at most 100 (paper's OAS Box)                        | 1 |
| oas_point     | the centres of those boxes (paper's OAS Central Point)             | 3 |
| aop_no_as_af  | one point a component of the thresholded PCM (ablation)            | 3 |
| aop_no_af     | adaptive sampling only (ablation)                                  | 3 |
| aop           | adaptive sampling and filtering: AoP-SAM                           | 3 |
| aop_raw       | as aop, PEM and threshold by the paper's words to the letter       | 3 |
| aop_gated     | as aop, but a mask eliminates only prompts on it or beside it (ours) | 3 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from segment_anything.utils.amg import build_point_grid
from torch import Tensor
from torchvision.ops import nms

from aopsam_lab import asf
from aopsam_lab.asf import AsfParams
from aopsam_lab.predictor import CELL

if TYPE_CHECKING:
    from aopsam_lab.pipeline.decode import Encoded, Found
    from aopsam_lab.detector import Detector
    from aopsam_lab.predictor import PromptPredictor

# Chosen on training photographs: `python -m aopsam_lab.training.trials filtering`
FIRST = 0.3  # the share of the prompts, the strongest, that is decoded before any is eliminated
ROUNDS = 8  # in which prompts are decoded; after each, what its masks explain is eliminated
# Predicted IoU of a mask that may explain waiting prompts: a doubtful one explains what is not its
# own. Chosen for the first edition (commit 372a11b), not yet anew for MobileSAM.
REFERENCE_IOU = 0.5
MAX_BOXES = 100
BOX_NMS_THRESH = (
    0.7  # of two masks whose boxes have a higher IoU the surer one stays, as in segment_anything
)


@dataclass
class Models:
    """What a method may need beside SAM."""

    predictor: PromptPredictor | None = None
    detector: Detector | None = None


@dataclass
class Prompts:
    """m prompts, strongest first, image frame.

    points: (m, 2) float32 (x, y); of a box, its centre. boxes: (m, 4) x0 y0 x1 y1, or None for points. confidence: (m,).
    multimask: whether each is decoded to SAM's three masks or to its single one.
    """

    points: Tensor
    confidence: Tensor
    boxes: Tensor | None = None
    multimask: bool = True

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class Proposal:
    """All prompts at once, in one round. Subclasses propose in several and may eliminate waiting prompts in between.

    eliminated_by: (m,) long, the reference mask (row of ``pems``) that eliminated the prompt, -1 where none did.
    pem_value:     (m,) the PEM there, NaN where none did.
    pcm:           (4h, 4w) or None.
    pems:          list of (h, w) maps, one a reference mask.
    references:    list of (prompt, threshold), one a reference mask: the prompt that found it, and what its PEM must exceed.
    """

    prompts: Prompts
    pcm: Tensor | None = None
    eliminated_by: Tensor = field(init=False)
    pem_value: Tensor = field(init=False)
    pems: list[Tensor] = field(default_factory=list)
    references: list[tuple[int, float]] = field(default_factory=list)
    _done: bool = False

    def __post_init__(self) -> None:
        m, device = len(self.prompts), self.prompts.points.device
        self.eliminated_by = torch.full((m,), -1, dtype=torch.long, device=device)
        self.pem_value = torch.full((m,), float("nan"), device=device)

    def next_round(self) -> Tensor | None:
        """Indices (long) of the prompts to decode now, or None when there are none left."""
        if self._done or not len(self.prompts):
            return None
        self._done = True
        return torch.arange(len(self.prompts), device=self.prompts.points.device)

    def observe(self, found: Found, mask_threshold: float) -> None:
        """See which masks of this round's prompts passed the predicted-IoU and stability thresholds; a logit above
        ``mask_threshold`` is on the mask."""


@dataclass
class FilteredProposal(Proposal):
    """Adaptive filtering: the strongest ``first`` of the points are decoded, then in ``rounds - 1`` equal parts those of
    the others that no mask found so far eliminates.

    Of masks that are duplicates of each other, as the pipeline has it at the end, the surest one is compared with what waits.

    cells: (m, 2) long, each prompt's (row, column) on the h x w grid. grid: (h, w). side: of the model frame, in pixels.
    features: (2C, h', w'), see :func:`asf.elimination_features`, and valid: (h', w') bool, of the part of the grid, top left,
    that the prompts lie in: nothing is computed of padding.
    """

    cells: Tensor = None
    features: Tensor = None
    valid: Tensor = None
    grid: tuple[int, int] = None
    elimination: float = 1.3
    gated: bool = False
    floor: bool = True
    first: float = FIRST
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        m = len(self.prompts)
        self.waiting = torch.ones(m, dtype=torch.bool, device=self.prompts.points.device)
        start = math.ceil(self.first * m)
        more = self.rounds - 1
        # where each round ends among the prompts, strongest first
        self._ends = [start] + [
            start + math.ceil((m - start) * (i + 1) / more) for i in range(more)
        ]
        self._seen: list[
            tuple[Tensor, ...]
        ] = []  # of masks that may explain what waits: coverage, prompt, IoU, box

    def next_round(self) -> Tensor | None:
        if self._seen:
            self._eliminate(*(torch.cat(parts) for parts in zip(*self._seen)))
            self._seen.clear()
        while self._ends:
            chosen = self.waiting[: self._ends.pop(0)].nonzero()[:, 0]
            if len(chosen):
                self.waiting[chosen] = False
                return chosen
        return None

    def observe(self, found: Found, mask_threshold: float) -> None:
        if not len(found.iou) or not self.waiting.any():
            return
        sure = best_of_each(found.iou, found.prompt, len(self.prompts))
        sure = sure[found.iou[sure] >= REFERENCE_IOU]
        if not len(sure):
            return
        rows, columns = (
            CELL * side for side in self.valid.shape
        )  # masks have as many cells as the PCM
        coverage = asf.cell_coverage(
            asf.on_mask(found.low_res[:, :rows, :columns], sure, mask_threshold)
        )
        self._seen.append((coverage, found.prompt[sure], found.iou[sure], found.boxes[sure]))

    def _eliminate(self, coverage: Tensor, owners: Tensor, iou: Tensor, boxes: Tensor) -> None:
        coverage = coverage * self.valid
        large = asf.filled_cells(coverage, self.valid).flatten(1).any(1).nonzero()[:, 0]
        if not len(large):
            return
        distinct = large[nms(boxes[large].float(), iou[large], BOX_NMS_THRESH)]
        coverage, owners = coverage[distinct], owners[distinct]
        waiting = self.waiting.nonzero()[:, 0]
        pems = asf.elimination_maps(self.features, asf.reference_features(self.features, coverage))
        thresholds = asf.elimination_thresholds(
            pems, coverage, self.valid, self.elimination, self.floor
        )
        by, value = asf.eliminate(
            pems, thresholds, self.cells[waiting], asf.dilate(coverage) if self.gated else None
        )
        gone = by >= 0
        self.eliminated_by[waiting[gone]] = (
            len(self.pems) + by[gone]
        )  # after those of earlier rounds
        self.pem_value[waiting[gone]] = value[gone]
        self.waiting[waiting[gone]] = False
        whole = pems.new_full((len(pems), *self.grid), asf.NO_COSINE)
        whole[:, : pems.shape[1], : pems.shape[2]] = pems
        self.pems.extend(whole)
        self.references.extend(zip(owners.tolist(), thresholds.tolist()))


def best_of_each(iou: Tensor, prompt: Tensor, m: int) -> Tensor:
    """Indices of the mask with the highest predicted IoU (r,) of each of m prompts (r,): one reference a prompt (ours)."""
    highest = iou.new_zeros(m).scatter_reduce(0, prompt, iou, "amax")
    return (iou == highest[prompt]).nonzero()[:, 0]


class Method(Protocol):
    """name: its key in the registry. needs: "predictor", "detector" or "". uses: the ASF parameters it depends on."""

    name: str
    needs: str
    uses: tuple[str, ...]

    def start(self, encoded: Encoded, models: Models, params: AsfParams) -> Proposal: ...


@dataclass(frozen=True)
class Grid:
    """AMG's regular grid of ``side * side`` points over the picture, row by row, as segment_anything builds it."""

    name: str
    side: int
    needs: str = ""
    uses: tuple[str, ...] = ()

    def start(self, encoded: Encoded, models: Models, params: AsfParams) -> Proposal:
        h, w = encoded.image.shape[:2]
        grid = (
            torch.from_numpy(build_point_grid(self.side) * [w, h])
            .float()
            .to(encoded.embedding.device)
        )
        return Proposal(Prompts(grid, torch.ones(len(grid), device=grid.device)))


@dataclass(frozen=True)
class DetectorPrompts:
    """OAS: YOLOv8 boxes as prompts, or the centres of these boxes."""

    name: str
    as_points: bool
    needs: str = "detector"
    uses: tuple[str, ...] = ()

    def start(self, encoded: Encoded, models: Models, params: AsfParams) -> Proposal:
        boxes, scores = (
            torch.as_tensor(x, device=encoded.embedding.device)
            for x in models.detector.boxes(encoded.image, MAX_BOXES)
        )
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        if self.as_points:
            return Proposal(Prompts(centres, scores))
        return Proposal(Prompts(centres, scores, boxes, multimask=False))


@dataclass(frozen=True)
class Aop:
    """AoP-SAM and its ablations. sampling: adaptive, or one point a component. filtering: none, ours, gated, or literal:
    with the raw embedding and no lower bound of the threshold, the paper's words to the letter."""

    name: str
    adaptive_sampling: bool = True
    filtering: bool = True
    gated: bool = False
    literal: bool = False
    first: float = FIRST
    rounds: int = ROUNDS
    needs: str = "predictor"

    @property
    def uses(self) -> tuple[str, ...]:
        sampling = (
            ("smoothing", "confidence", "spacing") if self.adaptive_sampling else ("confidence",)
        )
        return sampling + (("elimination",) if self.filtering else ())

    def start(self, encoded: Encoded, models: Models, params: AsfParams) -> Proposal:
        h, w = encoded.embedding.shape[-2:]
        valid = asf.valid_cells(
            encoded.input_size,
            encoded.model_image.shape[-1],
            (CELL * h, CELL * w),
            encoded.embedding.device,
        )
        pcm = models.predictor.pcm(encoded.model_image, encoded.embedding, valid)
        return self._sample(encoded, pcm, valid, params)

    def _sample(
        self, encoded: Encoded, pcm: Tensor, pcm_valid: Tensor, params: AsfParams
    ) -> Proposal:
        if self.adaptive_sampling:
            cells, confidence = asf.sample_prompts(
                pcm, params.smoothing, params.confidence, params.spacing
            )
        else:
            cells, confidence = asf.component_prompts(pcm, params.confidence)
        # a smoothed map can peak just outside the picture; such a prompt would lie on padding
        inside = pcm_valid[cells[:, 0], cells[:, 1]]
        cells, confidence = cells[inside], confidence[inside]
        size, grid = encoded.model_image.shape[-1], encoded.embedding.shape[-2:]
        prompts = Prompts(
            encoded.to_image((cells.flip(1) + 0.5) * (size / pcm.shape[-1])), confidence
        )
        if not self.filtering:
            return Proposal(prompts, pcm)
        rows, columns = (
            -(-part // CELL) for part in asf.cells_on_picture(encoded.input_size, size, pcm.shape)
        )
        valid = asf.valid_cells(encoded.input_size, size, grid, pcm.device)[:rows, :columns]
        look, place = (x[0, :, :rows, :columns] for x in (encoded.embedding, encoded.image_pe))
        return FilteredProposal(
            prompts,
            pcm,
            cells=cells // CELL,
            features=asf.raw_features(look, valid)
            if self.literal
            else asf.elimination_features(look, place, valid),
            valid=valid,
            grid=tuple(grid),
            elimination=params.elimination,
            gated=self.gated,
            floor=not self.literal,
            first=self.first,
            rounds=self.rounds,
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Grid("amg_s", 16),
        Grid("amg_d", 32),
        DetectorPrompts("oas_box", as_points=False),
        DetectorPrompts("oas_point", as_points=True),
        Aop("aop_no_as_af", adaptive_sampling=False, filtering=False),
        Aop("aop_no_af", filtering=False),
        Aop("aop"),
        Aop("aop_raw", literal=True),
        Aop("aop_gated", gated=True),
    )
}


def method_named(name: str | Method) -> Method:
    """The registered method, or a ValueError that lists them all; a method itself as it is."""
    if not isinstance(name, str):
        return name
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
