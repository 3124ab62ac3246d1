"""Run methods on a data set, image by image, and keep every score as soon as it is known."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.evaluator import evaluate
from aopsam_lab.pipeline import encode, run_method
from aopsam_lab.rle import encode_rle
from aopsam_lab.segmentation import Segmentation
from aopsam_lab.study import tables
from aopsam_lab.study.memory import MEMORY_VERSION, measure_peak
from aopsam_lab.study.provenance import processor, provenance
from aopsam_lab.study.settings import (
    Models,
    Setting,
    Weights,
    check_methods,
    load_models,
    row_inputs,
    scoring_code,
    weight_hashes,
)
from aopsam_lab.study.store import Store, make_key

DEFAULT_METHODS = ("amg_s", "amg_d", "oas_box", "oas_point", "aop_no_as_af", "aop_no_af", "aop", "aop_gated")
STORE_NAME = "results.sqlite"
EXAMPLE_IMAGES = 3  # of the first images masks and prompts are kept as well, to be shown
MEMORY_IMAGES = 2


@dataclass(frozen=True)
class Example:
    """One image shown in a report: its pixels, its truths (COCO RLE), and what each method made of it.

    detail: by method, `masks` (COCO RLE, best first) and `prompts` (a list of [x, y, status], image frame).
    """

    id: str
    image: Any
    truths: list[dict]
    detail: dict[str, dict]


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    per_image:   one row an image and method, see tables.PER_IMAGE_COLUMNS.
    summary:     one row a method, see tables.SUMMARY_COLUMNS.
    differences: one row a method, its paired difference to the reference, see tables.DIFFERENCE_COLUMNS.
    provenance:  parameters, data set, seeds, versions, weights, processor, commit.
    examples:    the first images with truth, masks and prompts.
    n_scored:    rows scored in this run; n_reused: rows found in the store.
    out:         the folder for what is written of it.
    """

    per_image: pd.DataFrame
    summary: pd.DataFrame
    differences: pd.DataFrame
    provenance: dict[str, Any]
    examples: list[Example]
    n_scored: int
    n_reused: int
    out: Path

    def save(self, name: str = "main_comparison") -> dict[str, Path]:
        """Write the tables as CSV, the figure as PNG and the provenance as JSON to `out`; their paths by name."""
        from aopsam_lab.study.output import save_result

        return save_result(self, name)


def run_study(
    sam: str = "tiny",
    methods: Sequence[str] = DEFAULT_METHODS,
    dataset: str | os.PathLike = "scenes",
    n_images: int | None = 24,
    seed: int = 0,
    device: str = "auto",
    smoothing: float = 2.0,
    confidence: float = 0.2,
    spacing: float = 6.0,
    elimination: float = 1.3,
    out: str | os.PathLike = "reports/main_comparison",
    checkpoint: str | os.PathLike | None = None,
    predictor: str | os.PathLike | None = None,
    detector: str | os.PathLike | None = None,
    memory: bool = True,
    progress: bool = True,
) -> StudyResult:
    """Score `methods` on `n_images` of `dataset` and sum them up.

    sam, device, checkpoint: as load_sam. predictor, detector: weights other than the bundled ones. dataset, n_images,
    seed: as open_dataset. The four ASF parameters: as AsfParams. out: the folder whose results.sqlite keeps the scores;
    what is there is not scored again unless something it depends on has changed. memory: whether to measure peak
    memory, which starts a process for each method. progress: whether to show bars.

    Each image is encoded once; the methods then take turns on it, each image starting with another one, so that
    whatever slows the machine for a while meets them all alike. Before the first time is taken each method runs once
    unmeasured.

    Raises ValueError for unknown methods or values out of range, and what load_sam and open_dataset raise.
    """
    methods = [methods] if isinstance(methods, str) else list(methods)
    check_methods(methods)
    params = AsfParams(smoothing=smoothing, confidence=confidence, spacing=spacing, elimination=elimination)
    settings = [Setting(method, method, params) for method in methods]
    weights = Weights(
        sam, *(None if path is None else os.fspath(path) for path in (checkpoint, predictor, detector)), device
    )
    images = open_dataset(dataset, n_images, seed)
    models = load_models(weights, methods)
    with Store(Path(out) / STORE_NAME) as store:
        study = Study(models, images, store, progress)
        rows, n_scored = study.score(settings)
        peaks = study.memory(settings, weights) if memory else {}
        examples = study.examples(settings)
    per_image = tables.per_image_table(rows)
    return StudyResult(
        per_image=per_image,
        summary=tables.summary_table(per_image, peaks),
        differences=tables.difference_table(per_image),
        provenance={
            "parameters": {
                "sam": sam,
                "methods": methods,
                "dataset": images.name,
                "n_images": len(images),
                "seed": seed,
                "device": device,
                **dataclasses.asdict(params),
            },
            "dataset": images.describe(),
            "seeds": {"dataset": seed, "bootstrap": tables.BOOTSTRAP_SEED},
            "weights": weight_hashes(models),
            "scoring_code": scoring_code(),
            **provenance(models.device),
        },
        examples=examples,
        n_scored=n_scored,
        n_reused=len(rows) - n_scored,
        out=Path(out),
    )


class Study:
    """Models, images and a store: scores settings on images and keeps what it finds."""

    def __init__(self, models: Models, images: Dataset, store: Store, progress: bool) -> None:
        self.models, self.images, self.store = models, images, store
        self.machine = processor(models.device)
        self.bar = progress_bar(progress)

    def inputs(self, setting: Setting, i: int) -> dict[str, Any]:
        return row_inputs(setting, self.models, self.machine, self.images.sample_fingerprint(i))

    def score(self, settings: Sequence[Setting]) -> tuple[list[dict[str, Any]], int]:
        """Rows of all settings on all images, the missing ones scored and stored now; and how many those were."""
        wanted = [(i, setting) for i in range(len(self.images)) for setting in settings]
        missing = [(i, setting) for i, setting in wanted if make_key(self.inputs(setting, i)) not in self.store]
        with self.bar(total=len(wanted), initial=len(wanted) - len(missing), desc="scoring", unit="row") as bar:
            for n, i in enumerate(dict.fromkeys(i for i, _ in missing)):
                pending = [setting for j, setting in missing if j == i]
                self._score_image(i, pending[i % len(pending) :] + pending[: i % len(pending)], warm_up=n == 0, bar=bar)
        rows = []
        for i, setting in wanted:
            values = self.store.scores(make_key(self.inputs(setting, i)))
            rows.append({"image": self.images.ids[i], "method": setting.label, **values})
        return rows, len(missing)

    def _score_image(self, i: int, settings: Sequence[Setting], warm_up: bool, bar: Any) -> None:
        sample = self.images[i]
        truths = encode_rle(sample.masks)
        if warm_up:
            encoded = encode(self.models.sam, sample.image)
            for setting in settings:
                self._run(encoded, setting)
        encoded = encode(self.models.sam, sample.image)
        for setting in settings:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            found = self._run(encoded, setting)
            detail = _detail(found) if i < EXAMPLE_IMAGES else None
            self.store.add_scores(self.inputs(setting, i), sample.id, setting.method, _values(found, truths), detail)
            bar.update()

    def _run(self, encoded: Any, setting: Setting) -> Segmentation:
        models = self.models
        return run_method(models.sam, encoded, setting.method, models.predictor, models.detector, setting.params)

    def memory(self, settings: Sequence[Setting], weights: Weights) -> dict[str, float]:
        """Peak memory of each setting over the first few images (MiB), measured where the store has none."""
        n = min(MEMORY_IMAGES, len(self.images))
        fingerprint = " ".join(self.images.sample_fingerprint(i) for i in range(n))
        wanted = {
            setting.label: {
                **row_inputs(setting, self.models, self.machine, fingerprint),
                "memory_version": MEMORY_VERSION,
            }
            for setting in settings
        }
        missing = [setting for setting in settings if self.store.memory(make_key(wanted[setting.label])) is None]
        pictures = [self.images[i].image for i in range(n)] if missing else []
        with self.bar(total=len(settings), initial=len(settings) - len(missing), desc="peak memory") as bar:
            for setting in missing:
                bar.set_postfix_str(setting.label)
                self.store.add_memory(wanted[setting.label], setting.method, measure_peak(setting, weights, pictures))
                bar.update()
        return {label: self.store.memory(make_key(inputs)) for label, inputs in wanted.items()}

    def examples(self, settings: Iterable[Setting]) -> list[Example]:
        examples = []
        for i in range(min(EXAMPLE_IMAGES, len(self.images))):
            sample = self.images[i]
            detail = {s.label: self.store.detail(make_key(self.inputs(s, i))) for s in settings}
            for found in detail.values():
                found["masks"] = [
                    {"size": found["size"], "counts": counts.encode("ascii")} for counts in found["masks"]
                ]
            examples.append(Example(sample.id, sample.image, encode_rle(sample.masks), detail))
        return examples


def progress_bar(show: bool = True) -> Callable[..., Any]:
    """A tqdm bar that fits: a widget in a notebook, text in a terminal.

    With AOPSAM_PROGRESS=text in the environment it is always text, on standard output: so a notebook that papermill
    runs shows its progress in the terminal, and does not keep it among the errors.
    """
    if os.environ.get("AOPSAM_PROGRESS") == "text":
        from tqdm import tqdm

        where = {"file": sys.stdout, "ncols": 100}
    else:
        from tqdm.auto import tqdm

        where = {"dynamic_ncols": True}

    def bar(**arguments: Any) -> Any:
        return tqdm(disable=not show, smoothing=0.05, **where, **arguments)

    return bar


def _values(found: Segmentation, truths: list[dict]) -> dict[str, Any]:
    """What is stored of one image and method."""
    score = evaluate(truths, found.masks)
    return {
        "miou": score.miou if score.n_truth else None,  # JSON has no NaN
        "miou_best": score.miou_best if score.n_truth else None,
        "n_truth": score.n_truth,
        "n_masks": len(found.masks),
        "n_sampled": int(found.n_sampled),
        "n_decoded": int(found.n_decoded),
        "n_eliminated": int(found.n_eliminated),
        "encode_s": float(found.seconds["encode"]),
        "inf_lat_s": float(found.seconds["infer"]),
        "mask_lat_s": float(found.seconds["mask"]),
        "total_s": float(found.seconds["total"]),
    }


def _detail(found: Segmentation) -> dict[str, Any]:
    """Masks and prompts of one image and method, as JSON can hold them."""
    prompts = found.prompts
    return {
        "size": list(found.image.shape[:2]),
        "masks": [mask["counts"].decode("ascii") for mask in found.masks],
        "prompts": [
            [round(float(x), 2), round(float(y), 2), str(status)]
            for x, y, status in zip(prompts["x"], prompts["y"], prompts["status"])
        ],
    }
