"""Run methods on a data set, image by image, and keep every score as soon as it is known."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tqdm.auto

from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.data.found import found_masks
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.study import score, settings, tables, thresholds
from aopsam_lab.study.memory import MEMORY_VERSION, measure_peak
from aopsam_lab.study.provenance import processor, provenance
from aopsam_lab.study.settings import REFERENCE, LoadedModels, Pair, Setting, StudyConfig
from aopsam_lab.study.store import Store, make_key

MAIN_COMPARISON = StudyConfig()
STORE_NAME = "results.sqlite"
WARM_UP_PROMPTS = 64  # decoded before the first time is taken
EXAMPLE_IMAGES = 3  # of the first images masks and prompts are kept as well, to be shown
MEMORY_IMAGES = 2
MEMORY_AT_ONCE = 2  # on a CPU; a process takes long to start, and is not timed
Job = tuple[int, Setting, dict[str, Any]]  # number of the image, setting, inputs of the row


@dataclass(frozen=True)
class Example:
    """One image shown in a report.

    Args:
        id: its name in the data set.
        image: H x W x 3 uint8.
        truth: its ground truth, COCO RLE.
        detail: by method, `masks` (COCO RLE, best first) and `prompts` (a list of [x, y, status],
            image frame).
    """

    id: str
    image: np.ndarray
    truth: list[dict]
    detail: dict[str, dict]


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Args:
        per_image: one row an image and method, see tables.PER_IMAGE_COLUMNS.
        summary: one row a method, see tables.SUMMARY_COLUMNS.
        differences: one row a method, see tables.DIFFERENCE_COLUMNS.
        curves: one row an image, method and pair of thresholds, see thresholds.CURVE_COLUMNS.
        provenance: parameters, data set, seeds, versions, weights, processor, commit.
        examples: the first images with ground truth, masks and prompts.
        n_scored: rows scored in this run; n_reused: rows found in the store.
        out: the folder for what is written of it.
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


def run_study(config: StudyConfig = MAIN_COMPARISON, **changes: Any) -> StudyResult:
    """Score methods on the images of a data set and sum them up.

    Args:
        config: what is asked for.
        **changes: fields of StudyConfig that are to be others than in `config`.

    Raises:
        ValueError: as StudyConfig, `load_sam` and `open_dataset` raise it.
    """
    config = replace(config, **changes)
    return run_settings(config, [Setting(name, name, config.params) for name in config.methods])


def run_settings(
    config: StudyConfig, asked: Sequence[Setting], reference: str = REFERENCE
) -> StudyResult:
    """Score settings on the images of a data set.

    Of each image the embedding, the PCM and every decoded prompt are computed once for all
    settings. That gives their scores but no times. Times come from runs of each setting alone on
    the first `timed_images` images; the time columns of the other images are empty.

    Args:
        config: what is asked for, its methods aside.
        asked: what is run, labels all different.
        reference: the label of the setting that the others are compared with.
    """
    images = open_dataset(config.dataset, config.n_images, config.seed)
    methods = list(dict.fromkeys(setting.method for setting in asked))
    models = settings.load_models(config, methods)
    own = thresholds.own_pair(spec_of(models.sam))
    pairs = thresholds.with_own(config.thresholds, own) if config.thresholds else []
    n_timed = min(config.timed_images, len(images))
    unlimited = [setting for setting in asked if setting.max_prompts is None]
    with Store(Path(config.out) / STORE_NAME) as store:
        study = _Run(config, images, models, store, pairs)
        rows = study.rows(asked, len(images), together=True)
        timed = study.rows(unlimited, n_timed, together=False)
        peaks = study.peaks(unlimited) if config.memory else {}
    times = {(r["image"], r["method"]): {name: r[name] for name in score.TIMES} for r in timed}
    rows = [row | times.get((row["image"], row["method"]), {}) for row in rows]
    per_image = tables.per_image_table(rows)
    main = next((setting for setting in asked if setting.label == reference), asked[0])
    parameters = {
        "sam": config.sam,
        "methods": methods,
        "dataset": images.name,
        "n_images": len(images),
        "timed_images": n_timed,
        **({"thresholds": [f"{iou:g} / {stable:g}" for iou, stable in pairs]} if pairs else {}),
        "seed": config.seed,
        "device": config.device,
        **asdict(main.params),
    }
    return StudyResult(
        per_image=per_image,
        summary=tables.summary_table(per_image, peaks),
        differences=tables.difference_table(per_image, reference),
        curves=thresholds.curve_table(rows, own),
        provenance={
            "parameters": parameters,
            "dataset": images.describe(),
            "seeds": {"dataset": config.seed, "bootstrap": tables.BOOTSTRAP_SEED},
            "weights": settings.weight_hashes(models),
            "scoring_code": settings.scoring_code(),
            **provenance(models.device),
        },
        examples=_examples(images, rows),
        n_scored=study.n_scored,
        n_reused=study.n_reused,
        out=Path(config.out),
    )


def _examples(images: Dataset, rows: Sequence[score.Row]) -> list[Example]:
    """The first images with what every setting found."""
    examples = []
    for i in range(min(EXAMPLE_IMAGES, len(images))):
        sample, detail = images[i], {}
        size = list(sample.image.shape[:2])
        for row in (row for row in rows if row["image"] == sample.id):
            counts = [counts.encode("ascii") for counts in row["detail"]["masks"]]
            masks = [{"size": size, "counts": own} for own in counts]
            detail[row["method"]] = {"masks": masks, "prompts": row["detail"]["prompts"]}
        examples.append(Example(sample.id, sample.image, sample.rles, detail))
    return examples


class _Run:
    """Scores settings on images, as far as the store does not have them."""

    def __init__(
        self,
        config: StudyConfig,
        images: Dataset,
        models: LoadedModels,
        store: Store,
        pairs: Sequence[Pair],
    ) -> None:
        self.config, self.images, self.models, self.store = config, images, models, store
        self.pairs, self.found = list(pairs), found_masks(images) or {}
        self.machine = processor(models.device)
        self.n_scored = self.n_reused = 0

    def rows(self, asked: Sequence[Setting], n_images: int, together: bool) -> list[score.Row]:
        """Rows of settings on the first images.

        What an image lacks is stored in one transaction where settings run together: rows never
        depend on where an earlier run was stopped.
        """
        jobs = [(i, s, self._inputs(s, i, together)) for i in range(n_images) for s in asked]
        compute = self._score_together if together else self._score_alone
        missing, bar = self._missing(jobs, "scoring together" if together else "scoring")
        with bar:
            for n, (i, own) in enumerate(itertools.groupby(missing, key=lambda job: job[0])):
                compute(i, {setting: inputs for _, setting, inputs in own}, bar, n == 0)
        self.n_scored += len(missing)
        self.n_reused += bar.total - len(missing)
        return [
            {"image": self.images.ids[i], "method": s.label, **self.store.values(make_key(inputs))}
            for i, s, inputs in jobs
        ]

    def peaks(self, asked: Sequence[Setting]) -> dict[str, float]:
        """Peak memory of each setting over the first few images in MiB, by label."""
        first = range(min(MEMORY_IMAGES, len(self.images)))
        images = " ".join(map(self.images.sample_fingerprint, first))
        jobs = [
            (0, s, settings.row_inputs(s, self.models, self.machine, images) | MEMORY_VERSION)
            for s in asked
        ]
        missing, bar = self._missing(jobs, "peak memory")
        shown = [self.images[i].image for i in first] if missing else []
        at_once = MEMORY_AT_ONCE if self.models.device.type == "cpu" else 1
        with bar, ThreadPoolExecutor(at_once) as pool:
            found = pool.map(lambda job: measure_peak(job[1], self.config, shown), missing)
            for (_, setting, inputs), peak in zip(missing, found, strict=True):
                self.store.add([(inputs, "", setting.method, {"peak_mem_mb": peak})])
                bar.update()
        return {s.label: self.store.values(make_key(i))["peak_mem_mb"] for _, s, i in jobs}

    def _inputs(self, setting: Setting, i: int, together: bool) -> dict[str, Any]:
        """All that a row of an image depends on."""
        fingerprint = self.images.sample_fingerprint(i)
        inputs = settings.row_inputs(setting, self.models, self.machine, fingerprint)
        if self._found(i) is not None:
            inputs["found"] = score.masks_fingerprint(self._found(i))
        if together:
            inputs |= {"together": True, "thresholds": self.pairs, "shown": i < EXAMPLE_IMAGES}
        return inputs

    def _found(self, i: int) -> list[dict] | None:
        return self.found.get(self.images.ids[i])

    def _missing(self, jobs: Sequence[Job], text: str) -> tuple[list[Job], tqdm.auto.tqdm]:
        """Jobs that the store does not have, equal ones once; a progress bar over all.

        The bar is a widget in a notebook, text in a terminal. With AOPSAM_PROGRESS=text it is text
        on standard output: so a notebook that papermill runs does not keep it among the errors.
        """
        wanted = {make_key(job[2]): job for job in reversed(jobs)}
        missing = [job for key, job in wanted.items() if self.store.values(key) is None][::-1]
        plain = os.environ.get("AOPSAM_PROGRESS") == "text"
        style = {"file": sys.stdout, "ncols": 100} if plain else {"dynamic_ncols": True}
        style |= {"smoothing": 0.05, "unit": "row", "disable": not self.config.progress}
        bar = (tqdm.tqdm if plain else tqdm.auto.tqdm)(
            total=len(wanted), initial=len(wanted) - len(missing), desc=text, **style
        )
        return missing, bar

    def _score_alone(self, i: int, inputs: dict[Setting, dict], bar: Any, warm_up: bool) -> None:
        """Each image begins with another setting: a slow while of the machine meets all alike."""
        sample, asked = self.images[i], list(inputs)
        if warm_up:
            encoded = encode(self.models.sam, sample.image)
            for setting in {setting.method: setting for setting in asked}.values():
                few = replace(setting, max_prompts=WARM_UP_PROMPTS)
                score.run(self.models, encoded, few)
        encoded, start = encode(self.models.sam, sample.image), i % len(asked)
        for setting in asked[start:] + asked[:start]:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            row = score.score(self.models, sample, setting, self._found(i), encoded)
            self.store.add([(inputs[setting], sample.id, setting.method, row)])
            bar.update()

    def _score_together(self, i: int, inputs: dict[Setting, dict], bar: Any, _: bool) -> None:
        sample, rows, shown = self.images[i], [], i < EXAMPLE_IMAGES
        found = score.score_together(
            self.models, sample, list(inputs), self.pairs, self._found(i), shown
        )
        for setting, row in found:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            rows.append((inputs[setting], sample.id, setting.method, row))
            bar.update()
        self.store.add(rows)
