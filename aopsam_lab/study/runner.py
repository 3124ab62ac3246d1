"""Run methods on a data set, image by image, and keep every score as soon as it is known."""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import tqdm.auto

from aopsam_lab import cluster
from aopsam_lab.data import Dataset, open_dataset
from aopsam_lab.data.coco import found_masks
from aopsam_lab.data.sample import Sample
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.pipeline.run import LoadedModels
from aopsam_lab.study import score, settings, tables
from aopsam_lab.study.machine import MEMORY_VERSION, in_own_process, processor, provenance
from aopsam_lab.study.settings import REFERENCE, Pair, Setting, StudyConfig
from aopsam_lab.study.store import Store, make_key

MAIN_COMPARISON = StudyConfig()
STORE_NAME = "results.sqlite"
EXAMPLE_IMAGES = 3  # of the first images masks and prompts are kept as well, to be shown
MEMORY_IMAGES = 2
Job = tuple[int, Setting, dict[str, Any]]  # number of the image, setting, inputs of the row
# an image, and by method what was found on it: `masks`, COCO RLE, best first, and `prompts`, each
# [x, y, status] in the image frame
Example = tuple[Sample, dict[str, dict[str, list]]]


@dataclass(frozen=True)
class StudyResult:
    """What a study found."""

    per_image: pd.DataFrame  # see tables.per_image_table
    summary: pd.DataFrame  # see tables.summary_table
    differences: pd.DataFrame  # see tables.difference_table
    curves: pd.DataFrame  # see tables.curve_table
    provenance: dict[str, Any]  # parameters, data set, seeds, versions, weights, commit
    examples: list[Example]  # the first images
    n_scored: int  # rows scored in this run
    n_reused: int  # rows found in the store
    out: Path  # the folder for what is written of it


def run_study(config: StudyConfig = MAIN_COMPARISON, **changes: Any) -> StudyResult:
    """Score methods on a data set and sum them up; `changes` are other fields of the `config`."""
    config = replace(config, **changes)
    return run_settings(config, [Setting(name, name, config.params) for name in config.methods])


def run_settings(
    config: StudyConfig, asked: Sequence[Setting], reference: str = REFERENCE
) -> StudyResult:
    """Score settings, labels all different, on the images of a data set.

    They share embedding, PCM and decoded prompts. Times come from runs of each setting alone on
    the first `timed_images` images; the time columns of the other images are empty.
    """
    images = open_dataset(config.dataset, config.n_images, config.seed)
    images.require_masks()
    asked = [replace(setting, quality=config.quality) for setting in asked]
    methods = list(dict.fromkeys(setting.method for setting in asked))
    files = config.files(methods)
    models = files.load()
    wanted = {(float(iou), float(stable)) for iou, stable in config.thresholds}
    own = score.own_pair(models.sam, config.quality)
    pairs = sorted(wanted | {own}, reverse=True) if wanted else []  # strictest first
    connected = cluster.connected(config.scheduler, files, models)
    with Store(Path(config.out) / STORE_NAME) as store, store.turn(), connected as crew:
        study = _Run(config, images, models, store, pairs, crew)
        rows = study.rows(asked)
        peaks = study.peaks(asked) if config.memory else {}
    per_image = tables.per_image_table(rows)
    parameters = {
        **{name: getattr(config, name) for name in ("sam", "seed", "device")},
        "methods": methods,
        "dataset": images.name,
        "n_images": len(images),
        "timed_images": min(config.timed_images, len(images)),
        "thresholds": [f"{iou:g} / {stable:g}" for iou, stable in pairs],
        **asdict(config.params),
        **asdict(config.quality),
    }
    return StudyResult(
        per_image=per_image,
        summary=tables.summary_table(per_image, peaks),
        differences=tables.difference_table(per_image, reference),
        curves=tables.curve_table(rows),
        provenance={
            "parameters": parameters,
            "dataset": images.describe(),
            "seeds": {"dataset": config.seed, "bootstrap": tables.BOOTSTRAP_SEED},
            "weights": models.weights(),
            "scoring_code": settings.scoring_code(),
            **provenance(models.sam.device),
            "processor": study.machine,
            "workers": len(study.places),
            "timed_on": sorted(per_image["processor"].dropna().unique()),
        },
        examples=[
            (images[i], {row["method"]: row["detail"] for row in rows if row["image"] == name})
            for i, name in enumerate(images.ids[:EXAMPLE_IMAGES])
        ],
        n_scored=study.n_scored,
        n_reused=study.n_reused,
        out=Path(config.out),
    )


@dataclass
class _Run:
    """Scores settings on images, as far as the store does not have them."""

    config: StudyConfig
    images: Dataset
    models: LoadedModels
    store: Store
    pairs: list[Pair]
    crew: cluster.Here

    def __post_init__(self) -> None:
        found = found_masks(self.images) or {}
        self.found = [found.get(name) for name in self.images.ids]
        self.places = self.crew.ask(_place, self.images.alone(0))
        kinds = zip(*self.places, strict=True)
        self.device, self.machine = (" + ".join(sorted(set(kind))) for kind in kinds)

    def rows(self, asked: Sequence[Setting]) -> list[score.Row]:
        """Rows of settings on all images; an image's missing ones are stored in one transaction."""
        jobs = [(i, s, self._inputs(s, i)) for i in range(len(self.images)) for s in asked]
        missing, bar = self._missing(jobs, "scoring")
        by_image: dict[int, dict[Setting, dict]] = defaultdict(dict)
        for i, setting, inputs in missing:
            by_image[i][setting] = inputs
        sent = (
            (i, self.images.alone(i), {s: own[s]["timed"] for s in own}, self.pairs, self.found[i])
            for i, own in by_image.items()
        )
        here = type(self.crew) is cluster.Here  # so each row is shown
        work = partial(_score_image, bar=bar) if here else _score_image
        with bar:
            for (i, image, *_), rows in self.crew.each(work, sent):
                if isinstance(rows, Exception):
                    raise rows
                name, own = image.ids[0], by_image[i]
                self.store.add((own[s], name, s.method, row) for s, row in rows.items())
                bar.update(0 if here else len(rows))
        self.n_scored, self.n_reused = len(missing), bar.total - len(missing)
        return [
            {"image": self.images.ids[i], "method": s.label, **self.store.values(make_key(inputs))}
            for i, s, inputs in jobs
        ]

    def peaks(self, asked: Sequence[Setting]) -> dict[str, float]:
        """Peak memory of settings without a limit over the first images in MiB, by label."""
        first = [self.images.alone(i) for i in range(min(MEMORY_IMAGES, len(self.images)))]
        images = " ".join(image.sample_fingerprint(0) for image in first)
        about = self.models, self.device, self.machine, images
        jobs = [
            (0, s, settings.row_inputs(s, *about) | MEMORY_VERSION)
            for s in asked
            if s.max_prompts is None
        ]
        missing, bar = self._missing(jobs, "peak memory")
        sent = [(s, self.config.files([s.method]), first, inputs) for _, s, inputs in missing]
        with bar:
            for (setting, *_, own), peak in self.crew.each(in_own_process, sent):
                if isinstance(peak, Exception):
                    raise peak
                self.store.add([(own, "", setting.method, {"peak_mem_mb": peak})])
                bar.update()
        return {s.label: self.store.values(make_key(i))["peak_mem_mb"] for _, s, i in jobs}

    def _inputs(self, setting: Setting, i: int) -> dict[str, Any]:
        """All that a row of an image depends on."""
        fingerprint, found = self.images.sample_fingerprint(i), self.found[i]
        hashed = found and hashlib.sha256(b"|".join(rle["counts"] for rle in found)).hexdigest()
        timed = i < self.config.timed_images and setting.max_prompts is None
        place = self.device, self.machine if timed else None
        return settings.row_inputs(setting, self.models, *place, fingerprint) | {
            "found": hashed,
            "thresholds": self.pairs,
            "shown": i < EXAMPLE_IMAGES,
            "timed": timed,
        }

    def _missing(self, jobs: Sequence[Job], text: str) -> tuple[list[Job], tqdm.auto.tqdm]:
        """The jobs whose rows the store lacks, equal ones once; a progress bar over all jobs."""
        wanted = {make_key(job[2]): job for job in reversed(jobs)}
        missing = [job for key, job in wanted.items() if not self.store.values(key)][::-1]
        # papermill keeps what a notebook writes elsewhere among its errors
        plain = os.environ.get("AOPSAM_PROGRESS") == "text"
        style = {"file": sys.stdout, "ncols": 100} if plain else {"dynamic_ncols": True}
        style |= {"smoothing": 0.05, "unit": "row", "disable": not self.config.progress}
        style |= {"total": len(wanted), "initial": len(wanted) - len(missing), "desc": text}
        return missing, (tqdm.tqdm if plain else tqdm.auto.tqdm)(**style)


def _place(models: LoadedModels, image: Dataset) -> tuple[str, str]:
    """The kind of device and the processor of this process, which must be able to read an image."""
    _ = image[0]
    return models.sam.device.type, processor(models.sam.device)


def _score_image(
    models: LoadedModels, job: tuple, bar: tqdm.auto.tqdm | None = None
) -> dict[Setting, score.Row]:
    """Rows of settings on an image; the job is what `rows` sends."""
    i, image, asked, pairs, found = job
    sample, rows = image[0], {}
    about = pairs, found, i < EXAMPLE_IMAGES
    for setting, row in score.score_together(models, sample, list(asked), *about):
        if bar is not None:
            bar.set_postfix_str(f"{sample.id} {setting.label}", refresh=False)
            bar.update()
        rows[setting] = row
    timed = [setting for setting in asked if asked[setting]]
    encoded = encode(models.sam, sample.image) if timed else None
    for n in range(len(timed)):
        # each image begins with another setting: a slow moment meets all of them alike
        setting = timed[(i + n) % len(timed)]
        row = score.score(models, sample, setting, encoded)
        times = {name: row[name] for name in score.TIMES}
        rows[setting] |= {**times, "processor": processor(models.sam.device)}
    return rows
