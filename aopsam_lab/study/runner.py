"""Run methods on a data set, image by image, and keep every score as soon as it is known."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from aopsam_lab.asf import AsfParams
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.data.coco import found_masks
from aopsam_lab.pipeline.decode_cache import DecodeCache, LooseRun, PcmCache
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.study import scores, tables
from aopsam_lab.study import thresholds as curves
from aopsam_lab.study.memory import MEMORY_VERSION, measure_peak
from aopsam_lab.study.provenance import processor, provenance
from aopsam_lab.study.scores import TIMES
from aopsam_lab.study.settings import (
    GRIDS,
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
from aopsam_lab.study.thresholds import THRESHOLDS, Pair

DEFAULT_METHODS = (
    "amg_s", "amg_d", "oas_box", "oas_point", "aop_no_as_af", "aop_no_af", "aop", "aop_gated",
    "aop_raw",
)  # fmt: skip
TIMED_IMAGES = 3  # runs that share nothing are what a study mostly costs
WARM_UP_PROMPTS = 64  # decoded before the first time is taken
STORE_NAME = "results.sqlite"
EXAMPLE_IMAGES = 3  # of the first images masks and prompts are kept as well, to be shown
MEMORY_IMAGES = 2
MEMORY_AT_ONCE = (
    2  # processes whose memory is measured side by side: each takes long to start, and is not timed
)


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
    curves:      one row an image, method and pair of thresholds, see thresholds.CURVE_COLUMNS;
                 empty where no thresholds were asked for.
    provenance:  parameters, data set, seeds, versions, weights, processor, commit.
    examples:    the first images with truth, masks and prompts.
    n_scored:    rows scored in this run; n_reused: rows found in the store.
    out:         the folder for what is written of it.
    """

    per_image: pd.DataFrame
    summary: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    provenance: dict[str, Any]
    examples: list[Example]
    n_scored: int
    n_reused: int
    out: Path

    def save(
        self, name: str = "main_comparison", shown: Sequence[str] | None = None
    ) -> dict[str, Path]:
        """Write the tables as CSV, the figures as PNG and the provenance as JSON to `out`; their paths by name.

        shown: the methods whose masks are drawn; None: AoP-SAM's and the dense grid's.
        """
        from aopsam_lab.study.output import SHOWN_METHODS, save_result

        return save_result(self, name, shown or SHOWN_METHODS)


def run_study(
    sam: str = "mobile_sam",
    methods: Sequence[str] = DEFAULT_METHODS,
    dataset: str | os.PathLike = "photos",
    n_images: int | None = 12,
    timed_images: int = TIMED_IMAGES,
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
    thresholds: Sequence[Pair] = THRESHOLDS,
    memory: bool = True,
    progress: bool = True,
) -> StudyResult:
    """Score `methods` on `n_images` of `dataset` and sum them up.

    sam, device, checkpoint: as load_sam. predictor, detector: weights other than the bundled ones. dataset, n_images,
    seed: as open_dataset. The four ASF parameters: as AsfParams. out: the folder whose results.sqlite keeps the scores;
    what is there is not scored again unless something it depends on has changed. memory: whether to measure peak
    memory, which starts a process for each method. progress: whether to show bars.
    timed_images, thresholds: as run_settings.

    Raises ValueError for unknown methods or values out of range, and what load_sam and open_dataset raise.
    """
    methods = [methods] if isinstance(methods, str) else list(methods)
    check_methods(methods)
    params = AsfParams(
        smoothing=smoothing, confidence=confidence, spacing=spacing, elimination=elimination
    )
    weights = Weights.of(sam, checkpoint, predictor, detector, device)
    settings = [Setting(method, method, params) for method in methods]
    return run_settings(
        settings, weights, dataset, n_images, seed, out, timed_images=timed_images,
        thresholds=thresholds, memory=memory, progress=progress,
    )  # fmt: skip


def run_settings(
    settings: Sequence[Setting],
    weights: Weights,
    dataset: str | os.PathLike,
    n_images: int | None,
    seed: int,
    out: str | os.PathLike,
    reference: str = tables.REFERENCE,
    timed_images: int = TIMED_IMAGES,
    thresholds: Sequence[Pair] = (),
    memory: bool = True,
    progress: bool = True,
) -> StudyResult:
    """Score settings on a data set; `run_study` says what the arguments are that both have.

    reference: the label of the setting that the others are compared to.
    timed_images: of each image the embedding, the confidence map and every decoded prompt are
    computed once and serve all settings, which gives their scores but no times. Times come from
    runs of each setting alone, with nothing shared, on that many of the first images. The time
    columns of other images are empty, and means of times are over the timed images. On them the
    settings take turns, each image starting with another one, so that whatever slows the machine
    for a while meets them all alike; before the first time is taken each method decodes a few
    prompts unmeasured.
    thresholds: pairs (predicted IoU, stability score) at which masks are filtered as well, for
    `curves`; empty for none.
    """
    images = open_dataset(dataset, n_images, seed)
    models = load_models(weights, list(dict.fromkeys(setting.method for setting in settings)))
    pairs = curves.pairs_with_own(thresholds, spec_of(models.sam)) if thresholds else []
    with Store(Path(out) / STORE_NAME) as store:
        study = Study(models, images, store, progress, pairs)
        rows = study.score_together(settings)
        unlimited = [setting for setting in settings if setting.max_prompts is None]
        timed = study.score(unlimited, min(timed_images, len(images)))
        rows = _with_times(rows, timed)
        peaks = study.memory(unlimited, weights) if memory else {}
        examples = study.examples(settings)
    per_image = tables.per_image_table(rows)
    return StudyResult(
        per_image=per_image,
        summary=tables.summary_table(per_image, peaks),
        differences=tables.difference_table(per_image, reference),
        curves=curves.curve_table(rows, curves.own_pair(spec_of(models.sam))),
        provenance={
            "parameters": {
                "sam": weights.sam,
                "methods": list(dict.fromkeys(setting.method for setting in settings)),
                "dataset": images.name,
                "n_images": len(images),
                "timed_images": min(timed_images, len(images)),
                **curves.described(pairs),
                "seed": seed,
                "device": weights.device,
                **dataclasses.asdict(
                    next((s for s in settings if s.label == reference), settings[0]).params
                ),
            },
            "dataset": images.describe(),
            "seeds": {"dataset": seed, "bootstrap": tables.BOOTSTRAP_SEED},
            "weights": weight_hashes(models),
            "scoring_code": scoring_code(),
            **provenance(models.device),
        },
        examples=examples,
        n_scored=study.n_scored,
        n_reused=study.n_reused,
        out=Path(out),
    )


def _with_times(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without times, filled from the rows of the same image and setting that were timed."""
    times = {(row["image"], row["method"]): {key: row[key] for key in TIMES} for row in timed}
    return [{**row, **times.get((row["image"], row["method"]), {})} for row in rows]


class Study:
    """Models, images and a store: scores settings on images and keeps what it finds.

    pairs: thresholds at which masks are filtered as well, see `run_settings`.
    """

    def __init__(
        self,
        models: Models,
        images: Dataset,
        store: Store,
        progress: bool,
        pairs: Sequence[Pair] = (),
    ) -> None:
        self.models, self.images, self.store, self.pairs = models, images, store, list(pairs)
        self.sam_masks = found_masks(images)
        self.machine = processor(models.device)
        self.bar = progress_bar(progress)
        self.n_scored = self.n_reused = 0

    def inputs(self, setting: Setting, i: int, together: bool = False) -> dict[str, Any]:
        inputs = row_inputs(setting, self.models, self.machine, self.images.sample_fingerprint(i))
        if self.sam_masks is not None:
            inputs["found"] = scores.masks_fingerprint(self.sam_masks[self.images.ids[i]])
        if together:
            inputs |= {"together": True, "thresholds": self.pairs}
        return inputs

    def score(
        self, settings: Sequence[Setting], n_images: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows of all settings, each run alone and timed, on the first images (None: on all)."""
        return self._rows(
            settings, len(self.images) if n_images is None else n_images, together=False
        )

    def score_together(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Rows of all settings on all images, without times, whatever settings have in common computed once.

        An image's rows are stored in one transaction, so that they never depend on where an earlier run was stopped.
        """
        return self._rows(settings, len(self.images), together=True)

    def _rows(
        self, settings: Sequence[Setting], n_images: int, together: bool
    ) -> list[dict[str, Any]]:
        wanted = [
            (i, setting, make_key(self.inputs(setting, i, together)))
            for i in range(n_images)
            for setting in settings
        ]
        missing = {
            key: (i, setting) for i, setting, key in wanted if key not in self.store
        }  # equal settings: once
        total = len({key for _, _, key in wanted})
        text = "scoring together" if together else "scoring"
        with self.bar(total=total, initial=total - len(missing), desc=text, unit="row") as bar:
            for n, i in enumerate(dict.fromkeys(i for i, _ in missing.values())):
                pending = [setting for j, setting in missing.values() if j == i]
                if together:
                    self._score_image_together(i, pending, bar)
                else:
                    self._score_image(
                        i, pending[i % len(pending) :] + pending[: i % len(pending)], n == 0, bar
                    )
        self.n_scored += len(missing)
        self.n_reused += total - len(missing)
        return [
            {"image": self.images.ids[i], "method": s.label, **self.store.scores(key)}
            for i, s, key in wanted
        ]

    def _score_image(self, i: int, settings: Sequence[Setting], warm_up: bool, bar: Any) -> None:
        sample = self.images[i]
        if warm_up:
            encoded = encode(self.models.sam, sample.image)
            for setting in {setting.method: setting for setting in settings}.values():
                self._run(encoded, replace(setting, max_prompts=WARM_UP_PROMPTS))
        encoded = encode(self.models.sam, sample.image)
        for setting in settings:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            found = self._run(encoded, setting)
            values = scores.row_values(found, sample.rles, self._sam_masks(i))
            self.store.add_scores(self.inputs(setting, i), sample.id, setting.method, values)
            bar.update()

    def _score_image_together(self, i: int, settings: Sequence[Setting], bar: Any) -> None:
        sample = self.images[i]
        truths, sam_masks = sample.rles, self._sam_masks(i)
        encoded = encode(self.models.sam, sample.image)
        sam, shared = self.models.sam, {}
        if self.pairs:
            cache = DecodeCache(sam, encoded, curves.loosest(self.pairs))
        else:
            cache = DecodeCache(sam, encoded)
        if self.models.predictor is not None:
            shared["predictor"] = PcmCache(self.models.predictor, encoded)
        rows, unlimited = [], {}
        for setting in sorted(settings, key=lambda setting: setting.max_prompts is not None):
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            which = (setting.method, setting.params)
            values, detail = unlimited.get(which, (None, None))
            # a limit that is not reached changes nothing
            if values is None or values["n_decoded"] > setting.max_prompts:
                decode = LooseRun(cache) if self.pairs else cache
                found = self._run(encoded, setting, decode=decode, **shared)
                values = scores.row_values(found, truths, sam_masks)
                values = {key: value for key, value in values.items() if key not in TIMES}
                if self.pairs:
                    values["curve"] = [
                        {"thresholds": pair, **scores.mask_scores(truths, kept, sam_masks)}
                        for pair, kept in zip(self.pairs, decode.masks_at(self.pairs))
                    ]
                detail = scores.detail(found) if i < EXAMPLE_IMAGES else None
            if setting.max_prompts is None:
                unlimited[which] = values, detail
            rows.append(
                (self.inputs(setting, i, together=True), sample.id, setting.method, values, detail)
            )
            bar.update()
        self.store.add_together(rows)

    def _sam_masks(self, i: int) -> list[dict] | None:
        return None if self.sam_masks is None else self.sam_masks[self.images.ids[i]]

    def _run(self, encoded: Any, setting: Setting, **shared: Any) -> Segmentation:
        models = self.models
        arguments = {"predictor": models.predictor, "detector": models.detector, **shared}
        method = GRIDS.get(setting.method, setting.method)
        return run_method(
            models.sam,
            encoded,
            method,
            params=setting.params,
            max_prompts=setting.max_prompts,
            **arguments,
        )

    def memory(self, settings: Sequence[Setting], weights: Weights) -> dict[str, float]:
        """Peak memory of each setting over the first few images (MiB), measured once and stored."""
        first = range(min(MEMORY_IMAGES, len(self.images)))
        fingerprint = " ".join(map(self.images.sample_fingerprint, first))

        def memory_inputs(setting: Setting) -> dict[str, Any]:
            return {
                **row_inputs(setting, self.models, self.machine, fingerprint),
                "memory_version": MEMORY_VERSION,
            }

        wanted = {setting.label: memory_inputs(setting) for setting in settings}
        missing = {
            key: setting
            for setting in settings
            if self.store.memory(key := make_key(wanted[setting.label])) is None
        }.values()  # equal settings: once
        pictures = [self.images[i].image for i in first] if missing else []
        total = len({make_key(inputs) for inputs in wanted.values()})

        def peak_of(setting: Setting) -> float:
            return measure_peak(setting, weights, pictures)

        at_once = MEMORY_AT_ONCE if self.models.device.type == "cpu" else 1
        with (
            self.bar(total=total, initial=total - len(missing), desc="peak memory") as bar,
            ThreadPoolExecutor(at_once) as pool,
        ):
            for setting, peak in zip(missing, pool.map(peak_of, missing)):
                self.store.add_memory(wanted[setting.label], setting.method, peak)
                bar.update()
        return {label: self.store.memory(make_key(inputs)) for label, inputs in wanted.items()}

    def examples(self, settings: Iterable[Setting]) -> list[Example]:
        examples = []
        for i in range(min(EXAMPLE_IMAGES, len(self.images))):
            sample = self.images[i]
            detail = {
                setting.label: self.store.detail(make_key(self.inputs(setting, i, together=True)))
                for setting in settings
            }
            for found in detail.values():
                found["masks"] = [
                    {"size": found["size"], "counts": counts.encode("ascii")}
                    for counts in found["masks"]
                ]
            examples.append(Example(sample.id, sample.image, sample.rles, detail))
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
