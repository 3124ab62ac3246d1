"""Run methods on a data set, image by image, and keep every score as soon as it is known."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tqdm.auto

from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.data.found import found_masks
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.study import score, tables, thresholds
from aopsam_lab.study.memory import MEMORY_VERSION, measure_peak
from aopsam_lab.study.provenance import processor, provenance
from aopsam_lab.study.settings import (
    REFERENCE,
    LoadedModels,
    Pair,
    Setting,
    StudyConfig,
    load_models,
    row_inputs,
    scoring_code,
    weight_hashes,
)
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
        differences: one row a method, its paired difference to the reference, see
            tables.DIFFERENCE_COLUMNS.
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
    config = dataclasses.replace(config, **changes)
    return run_settings(config, [Setting(name, name, config.params) for name in config.methods])


def run_settings(
    config: StudyConfig, settings: Sequence[Setting], reference: str = REFERENCE
) -> StudyResult:
    """Score settings on the images of a data set.

    Of each image the embedding, the PCM and every decoded prompt are computed once for all
    settings. That gives their scores but no times. Times come from runs of each setting alone on
    the first `timed_images` images; the time columns of the other images are empty.

    Args:
        config: what is asked for, its methods aside.
        settings: what is run, labels all different.
        reference: the label of the setting that the others are compared with.
    """
    images = open_dataset(config.dataset, config.n_images, config.seed)
    methods = list(dict.fromkeys(setting.method for setting in settings))
    models = load_models(config, methods)
    own = thresholds.own_pair(spec_of(models.sam))
    pairs = thresholds.with_own(config.thresholds, own) if config.thresholds else []
    n_timed = min(config.timed_images, len(images))
    unlimited = [setting for setting in settings if setting.max_prompts is None]
    with Store(Path(config.out) / STORE_NAME) as store:
        study = _Run(config, images, models, store, pairs)
        rows = study.rows(settings, len(images), together=True)
        timed = study.rows(unlimited, n_timed, together=False)
        peaks = study.peaks(unlimited) if config.memory else {}
        examples = study.examples(settings)
    seconds = {
        (row["image"], row["method"]): {name: row[name] for name in score.TIMES} for row in timed
    }
    rows = [row | seconds.get((row["image"], row["method"]), {}) for row in rows]
    per_image = tables.per_image_table(rows)
    main = next((s for s in settings if s.label == reference), settings[0])
    asked = {
        "sam": config.sam,
        "methods": methods,
        "dataset": images.name,
        "n_images": len(images),
        "timed_images": n_timed,
        **({"thresholds": [f"{iou:g} / {stable:g}" for iou, stable in pairs]} if pairs else {}),
        "seed": config.seed,
        "device": config.device,
        **dataclasses.asdict(main.params),
    }
    return StudyResult(
        per_image=per_image,
        summary=tables.summary_table(per_image, peaks),
        differences=tables.difference_table(per_image, reference),
        curves=thresholds.curve_table(rows, own),
        provenance={
            "parameters": asked,
            "dataset": images.describe(),
            "seeds": {"dataset": config.seed, "bootstrap": tables.BOOTSTRAP_SEED},
            "weights": weight_hashes(models),
            "scoring_code": scoring_code(),
            **provenance(models.device),
        },
        examples=examples,
        n_scored=study.n_scored,
        n_reused=study.n_reused,
        out=Path(config.out),
    )


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
        self.pairs = list(pairs)
        self.found = found_masks(images) or {}
        self.machine = processor(models.device)
        self.n_scored = self.n_reused = 0

    def rows(self, settings: Sequence[Setting], n_images: int, together: bool) -> list[score.Row]:
        """Rows of settings on the first images.

        The rows that an image still lacks are stored in one transaction where settings run
        together: they never depend on where an earlier run was stopped.
        """
        jobs = [
            (i, setting, self._inputs(setting, i, together))
            for i in range(n_images)
            for setting in settings
        ]
        wanted, missing = self._missing(jobs)
        compute = self._score_together if together else self._score_alone
        text = "scoring together" if together else "scoring"
        with self._bar(len(wanted), len(missing), text) as bar:
            for n, (i, own) in enumerate(itertools.groupby(missing, key=lambda job: job[0])):
                compute(i, {setting: inputs for _, setting, inputs in own}, bar, n == 0)
        self.n_scored += len(missing)
        self.n_reused += len(wanted) - len(missing)
        return [
            {"image": self.images.ids[i], "method": setting.label, **self.store.values(key)}
            for i, setting, key in ((i, s, make_key(inputs)) for i, s, inputs in jobs)
        ]

    def peaks(self, settings: Sequence[Setting]) -> dict[str, float]:
        """Peak memory of each setting over the first few images in MiB, by label."""
        first = range(min(MEMORY_IMAGES, len(self.images)))
        images = " ".join(map(self.images.sample_fingerprint, first))
        version = {"memory_version": MEMORY_VERSION}
        jobs = [
            (0, s, row_inputs(s, self.models, self.machine, images) | version) for s in settings
        ]
        wanted, missing = self._missing(jobs)
        shown = [self.images[i].image for i in first] if missing else []
        at_once = MEMORY_AT_ONCE if self.models.device.type == "cpu" else 1
        bar = self._bar(len(wanted), len(missing), "peak memory")
        with bar, ThreadPoolExecutor(at_once) as pool:
            found = pool.map(lambda job: measure_peak(job[1], self.config, shown), missing)
            for (_, setting, inputs), peak in zip(missing, found):
                self.store.add([(inputs, "", setting.method, {"peak_mem_mb": peak}, None)])
                bar.update()
        return {s.label: self.store.values(make_key(i))["peak_mem_mb"] for _, s, i in jobs}

    def examples(self, settings: Sequence[Setting]) -> list[Example]:
        """The first images with what every setting found."""
        examples = []
        for i in range(min(EXAMPLE_IMAGES, len(self.images))):
            sample, detail = self.images[i], {}
            for setting in settings:
                found = self.store.detail(make_key(self._inputs(setting, i, together=True)))
                found["masks"] = [
                    {"size": found["size"], "counts": counts.encode("ascii")}
                    for counts in found["masks"]
                ]
                detail[setting.label] = found
            examples.append(Example(sample.id, sample.image, sample.rles, detail))
        return examples

    def _inputs(self, setting: Setting, i: int, together: bool) -> dict[str, Any]:
        """All that a row of an image depends on."""
        fingerprint = self.images.sample_fingerprint(i)
        inputs = row_inputs(setting, self.models, self.machine, fingerprint)
        if self._found(i) is not None:
            inputs["found"] = score.masks_fingerprint(self._found(i))
        return inputs | ({"together": True, "thresholds": self.pairs} if together else {})

    def _found(self, i: int) -> list[dict] | None:
        return self.found.get(self.images.ids[i])

    def _missing(self, jobs: Sequence[Job]) -> tuple[dict[str, Job], list[Job]]:
        """Jobs by key, equal ones once; and those of them that the store does not have."""
        wanted: dict[str, Job] = {}
        for job in jobs:
            wanted.setdefault(make_key(job[2]), job)
        return wanted, [job for key, job in wanted.items() if key not in self.store]

    def _score_alone(self, i: int, inputs: dict[Setting, dict], bar: Any, warm_up: bool) -> None:
        """Settings take turns in being the first, so that a slow while meets them all alike."""
        sample, settings = self.images[i], list(inputs)
        if warm_up:
            encoded = encode(self.models.sam, sample.image)
            for setting in {setting.method: setting for setting in settings}.values():
                few = dataclasses.replace(setting, max_prompts=WARM_UP_PROMPTS)
                score.run(self.models, encoded, few)
        encoded, start = encode(self.models.sam, sample.image), i % len(settings)
        for setting in settings[start:] + settings[:start]:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            row = score.score(self.models, sample, setting, self._found(i), encoded)
            self.store.add([(inputs[setting], sample.id, setting.method, row, None)])
            bar.update()

    def _score_together(self, i: int, inputs: dict[Setting, dict], bar: Any, _: bool) -> None:
        sample, rows = self.images[i], []
        found = score.score_together(self.models, sample, list(inputs), self.pairs, self._found(i))
        for setting, row, detail in found:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            kept = detail if i < EXAMPLE_IMAGES else None
            rows.append((inputs[setting], sample.id, setting.method, row, kept))
            bar.update()
        self.store.add(rows)

    def _bar(self, total: int, missing: int, text: str) -> tqdm.auto.tqdm:
        """A progress bar: a widget in a notebook, text in a terminal.

        With AOPSAM_PROGRESS=text it is text on standard output: so a notebook that papermill runs
        shows its progress in the terminal, and does not keep it among the errors.
        """
        plain = os.environ.get("AOPSAM_PROGRESS") == "text"
        style = {"file": sys.stdout, "ncols": 100} if plain else {"dynamic_ncols": True}
        style |= {"smoothing": 0.05, "unit": "row", "disable": not self.config.progress}
        bar = tqdm.tqdm if plain else tqdm.auto.tqdm
        return bar(total=total, initial=total - missing, desc=text, **style)
