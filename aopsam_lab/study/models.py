"""reports/models.html: how good the bundled models are, with their learning curves and examples (ours)."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from aopsam_lab import drawing
from aopsam_lab.data import open_dataset
from aopsam_lab.decoding import encode
from aopsam_lab.detector import load_detector
from aopsam_lab.files import write_atomically
from aopsam_lab.imaging import read_image
from aopsam_lab.pipeline import run_method
from aopsam_lab.predictor import WEIGHTS, load_predictor
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.study import figures, quality
from aopsam_lab.study.output import TABLE_STYLE, html_table, to_csv
from aopsam_lab.study.page import STYLE, provenance_list
from aopsam_lab.study.provenance import provenance
from aopsam_lab.training.card import read_curve

CURVES = {  # card: title and the columns drawn
    "tiny_sam.md": ("tiny SAM: training IoU", {"box": "box", "click": "one click, best of three"}),
    "predictor_tiny.md": ("Prompt Predictor: recall, held out", {f"recall_{k}": f"{k} strongest" for k in (32, 64, 128)}),
    "detector.md": ("detector: held out", {"mAP50": "mAP50", "recall": "recall"}),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SOURCES = {
    "predictor": f"predictor, {quality.TOP} strongest", "predictor_all": "predictor, default confidence", "grid_8": "8 x 8 grid",
    "grid_16": "16 x 16 grid", "grid_32": "32 x 32 grid", "detector": "detector's box centres",
}  # fmt: skip
PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "camera", "coins")  # scikit-image ships them
EXAMPLES = 12
COLUMNS = {
    "dataset": "Pictures", "n_images": "n", "n_truth": "Truths", "box": "Box", "click_1": "1 click, best of 3",
    "click_2": "2 clicks", "click_3": "3", "click_4": "4", "click_5": "5", "spearman": "Spearman",
    "recall_predictor": f"Predictor, {quality.TOP}", "recall_predictor_all": "all", "recall_grid_8": "Grid 8 x 8",
    "recall_grid_16": "16 x 16", "recall_grid_32": "32 x 32", "recall_detector": "Detector",
}  # fmt: skip


def learning_curves(weights: Path = WEIGHTS) -> Figure:
    """One panel a model, from the tables in the cards beside the weights."""
    figure = Figure(figsize=(11.7, 3.1), dpi=150, layout="constrained", facecolor="white")
    for axes, (name, (title, columns)) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        rows = read_curve(weights / name)
        x = "step" if "step" in rows[0] else "epoch"
        for colour, (column, label) in zip(COLOURS, columns.items()):
            axes.plot([row[x] for row in rows], [row[column] for row in rows], color=colour, lw=1.4, label=label)
        _finish(axes, title, x)
    return figure


def quality_figure(summary: pd.DataFrame, pairs: dict[str, np.ndarray], prompts: dict[str, pd.DataFrame]) -> Figure:
    """Clicks to IoU, calibration, and for each data set recall by object size."""
    n = len(pairs)
    figure = Figure(figsize=(3.9 * max(2, n), 6.4), dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(2, max(2, n), squeeze=False)
    for axes in grid[0, 2:]:
        axes.set_axis_off()
    for axes in grid[1, n:]:
        axes.set_axis_off()
    clicks = [f"click_{k}" for k in range(1, quality.CLICKS + 1)]
    for colour, (name, values) in zip(COLOURS, pairs.items()):
        row = summary.set_index("dataset").loc[name]
        grid[0, 0].plot(range(1, len(clicks) + 1), row[clicks].astype(float), "o-", color=colour, ms=4, lw=1.4, label=name)
        steps = quality.calibration(values)
        grid[0, 1].plot(steps["predicted"], steps["true"], "o-", color=colour, ms=4, lw=1.4, label=name)
    grid[0, 1].plot([0, 1], [0, 1], color=figures.MUTED, lw=0.8, ls="--")
    grid[0, 0].set_xticks(range(1, len(clicks) + 1))
    _finish(grid[0, 0], "Mean IoU after each click", "clicks")
    _finish(grid[0, 1], "Calibration: mean true IoU", "predicted IoU")
    for axes, (name, table) in zip(grid[1], prompts.items()):
        by_size = quality.recall_by_size(table)
        for colour, (column, label) in zip(COLOURS, SOURCES.items()):
            axes.plot(range(len(by_size)), by_size[column], "o-", color=colour, ms=4, lw=1.4, label=label)
        axes.set_xticks(range(len(by_size)), [f"{c}\n{k}" for c, k in zip(by_size.index, by_size["n"])], fontsize=7)
        _finish(axes, f"{name}: truths with a prompt on them", "share of the picture, number of truths", legend=axes is grid[1, 0])
    return figure


def prompts_figure(curves: dict[str, pd.DataFrame]) -> Figure:
    """One panel a data set of ``quality.miou_by_prompts``: AoP-SAM's mIoU by the prompts decoded, and the grids'."""
    figure = Figure(figsize=(3.9 * max(2, len(curves)), 3.3), dpi=150, layout="constrained", facecolor="white")
    styles = {"amg": ("grids, 16 x 16 and 32 x 32", COLOURS[1], "s--"), "aop": ("AoP-SAM, at most so many", COLOURS[0], "o-")}
    for axes, (name, table) in zip(figure.subplots(1, max(2, len(curves)), squeeze=False)[0], curves.items()):
        for kind, (label, colour, line) in styles.items():
            rows = table[table["method"].str.startswith(kind)]
            axes.plot(rows["n_decoded"], 100 * rows["miou"], line, color=colour, ms=4, lw=1.4, label=label)
        axes.set_xscale("log", base=2)
        ticks = (32, 64, 128, 256, 512, 1024)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        _finish(axes, f"{name}: mIoU %", "prompts decoded, mean of the pictures", legend=axes is figure.axes[0], top=None)
    for axes in figure.axes[len(curves) :]:
        axes.set_axis_off()
    return figure


def _finish(axes, title: str, x: str, legend: bool = True, top: float | None = 1) -> None:
    figures.clean(axes)
    if top is not None:
        axes.set_ylim(0, top)
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=figures.INK)
    axes.set_xlabel(x, fontsize=8.5, color=figures.MUTED)
    if legend:
        axes.legend(fontsize=7, frameon=False)


def example_pictures(scenes: int) -> list[tuple[str, np.ndarray]]:
    """scikit-image's photographs and evaluation scenes from the hundredth on, (name, H x W x 3 uint8)."""
    import skimage.data

    photos = [(name, read_image(getattr(skimage.data, name)())) for name in PHOTOGRAPHS]
    images = open_dataset("scenes", 100 + scenes)
    return photos + [(images.ids[100 + i], images[100 + i].image) for i in range(scenes)]


def example_strip(sam, predictor, image: np.ndarray) -> tuple[bytes, dict[str, int]]:
    """PNG of picture, PCM with prompts, and masks side by side; and the counts of the prompts' fates."""
    found = run_method(sam, encode(sam, image), "aop", predictor)
    figure = Figure(figsize=(9, 3 * image.shape[0] / image.shape[1]), dpi=80, facecolor="white")
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    axes = figure.subplots(1, 3)
    scale = found.model_size / found.pcm.shape[1]
    h, w = (round(side / scale) for side in found.input_size)
    axes[0].imshow(image)
    axes[1].imshow(image)
    extent = (0, image.shape[1], image.shape[0], 0)
    axes[1].imshow(found.pcm[:h, :w], extent=extent, cmap="magma", alpha=0.75, vmin=0, vmax=1)
    kept = found.prompts["status"] == "kept"
    axes[1].scatter(found.prompts["x"][kept], found.prompts["y"][kept], s=7, c="white", edgecolors="black", linewidths=0.4)
    axes[2].imshow(drawing.overlay(image, found.masks))
    for ax in axes:
        ax.set_axis_off()
    return figures.png(figure), found.prompts["status"].value_counts().to_dict()


def write_models_report(
    reports: str | Path,
    weights: str | Path = WEIGHTS,
    n_images: int = 200,
    photos: Sequence[str | Path] = (),
    n_compared: int = 30,
    progress=iter,
) -> Path:
    """Measure the models in the folder ``weights`` on the first evaluation scenes and on all of each folder of photographs.

    n_compared: first pictures of each on which AoP-SAM with a fifth of the prompts is compared with the 32 x 32 grid; 0: none.
    Writes ``models.html`` and ``models/*`` into ``reports``; returns the page's path.
    """
    weights = Path(weights)
    datasets = [("scenes", open_dataset("scenes", n_images))]
    datasets += [(f"{Path(path).resolve().parent.name}/{Path(path).resolve().name}", open_dataset(path)) for path in photos]
    sam = load_sam("tiny", weights / "tiny_sam.safetensors", "cpu")
    predictor = load_predictor("tiny", weights / "predictor_tiny.safetensors", "cpu")
    detector = load_detector(weights / "detector.safetensors", "cpu")
    rows, budgets, curves, pairs, prompts = [], [], {}, {}, {}
    for name, images in datasets:
        prompted, pairs[name], prompts[name] = quality.measure(sam, predictor, detector, images, progress)
        rows.append(quality.summary_row(name, prompted, pairs[name], prompts[name]))
        if n_compared:
            table = quality.against_grid(sam, predictor, images, n_compared, progress)
            budgets.append(quality.budget_row(name, table))
            curves[name] = quality.miou_by_prompts(table)
    summary = pd.DataFrame(rows)
    by_size = pd.concat([quality.recall_by_size(t).reset_index(names="size").assign(dataset=k) for k, t in prompts.items()])
    folder = Path(reports) / "models"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "models.csv", to_csv(summary))
    write_atomically(folder / "recall_by_size.csv", to_csv(by_size))
    if budgets:
        write_atomically(folder / "budget.csv", to_csv(pd.DataFrame(budgets)))
        by_prompts = pd.concat([table.assign(dataset=name) for name, table in curves.items()])
        write_atomically(folder / "miou_by_prompts.csv", to_csv(by_prompts))
        write_atomically(folder / "miou_by_prompts.png", figures.png(prompts_figure(curves)))
    write_atomically(folder / "learning_curves.png", figures.png(learning_curves(weights)))
    write_atomically(folder / "models.png", figures.png(quality_figure(summary, pairs, prompts)))
    strips = []
    for name, image in example_pictures(EXAMPLES - len(PHOTOGRAPHS)):
        picture, fates = example_strip(sam, predictor, image)
        write_atomically(folder / f"{name}.jpg", _jpeg(picture))
        text = f"{name}: " + ", ".join(f"{n} {fate.replace('_', ' ')}" for fate, n in fates.items())
        strips.append(f'<figure><img src="models/{name}.jpg" alt="{html.escape(name)}: picture, PCM, masks">'
                      f"<figcaption>{html.escape(text)}</figcaption></figure>")
    facts = provenance(sam.device)
    write_atomically(folder / "models.json", json.dumps(facts, indent=2) + "\n")
    shown = summary[list(COLUMNS)].rename(columns=COLUMNS)
    for column in shown.columns[3:]:
        shown[column] = [f"{v:.3f}" for v in shown[column]]
    budget = _budget_section(pd.DataFrame(budgets)) if budgets else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>aopsam_lab: the bundled models</title>
<style>{STYLE}{TABLE_STYLE}
.strips {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1.5rem 2rem; }}</style>
</head>
<body>
<header>
<h1>The bundled models, measured</h1>
<p class="lead">A tiny SAM, its Prompt Predictor and a detector, all trained here. How good are their masks from given
prompts, and how many of the true objects do their prompts reach?</p>
<p><a href="index.html">All reports</a></p>
</header>
<main>
<h2>Masks and prompts</h2>
<div class="results">{html_table(shown)}</div>
<p class="muted">Mean IoU over all truths at the pictures' own resolution. One click at the pole of inaccessibility gives three
masks, of which the best counts; further clicks, each where the mask is most wrong, give one. Spearman: rank correlation of
predicted and true IoU over the three masks of every first click. Then the share of truths with at least one prompt on them.</p>
<figure><img src="models/models.png" alt="Clicks to IoU, calibration of the predicted IoU, recall by object size"></figure>
{budget}<h2>Learning curves</h2>
<figure><img src="models/learning_curves.png" alt="Learning curves of the three models"></figure>
<h2>Examples</h2>
<p>Picture; Prompt Confidence Map with the prompts whose masks were kept; masks. AoP-SAM with its default settings.</p>
<div class="strips">{"".join(strips)}</div>
<h2>Provenance</h2>
{provenance_list(facts)}
</main>
</body>
</html>
"""
    return write_atomically(Path(reports) / "models.html", page)


def _budget_section(table: pd.DataFrame) -> str:
    shown = table[["dataset", "n_images"]].rename(columns={"dataset": "Pictures", "n_images": "n"})
    for column, title in {"aop": "AoP-SAM mIoU %", "amg_d": "AMG-D mIoU %"}.items():
        shown[title] = [f"{100 * v:.1f}" for v in table[column]]
    shown["Prompts decoded"] = [f"{v:.0f}" for v in table["n_decoded"]]
    interval = table[["lead", "lead_lo", "lead_hi"]].itertuples(index=False)
    shown["AMG-D's lead"] = [f"{100 * lead:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" for lead, low, high in interval]
    shown["of it on truths without a prompt"] = [f"{100 * v:+.1f}" for v in table["missed"]]
    return f"""<h2>Everything, with a fifth of the grid's prompts</h2>
<div class="results">{html_table(shown)}</div>
<p class="muted">AoP-SAM with at most {quality.BUDGET} prompts decoded, weak candidates too (confidence {quality.WEAK.confidence:g}, else its default
settings), against the 32 x 32 grid's 1,024, on the first pictures of each set; the lead with its paired 95% bootstrap interval, and
what truths on which AoP-SAM decoded no prompt contribute to it. The rest lies in truths that have prompts: where a click's mask is in
doubt, more clicks on the same object find a better one.</p>
<figure><img src="models/miou_by_prompts.png" alt="mIoU by the number of prompts decoded, AoP-SAM and the grids"></figure>
"""


def _jpeg(png: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(stream, format="JPEG", quality=85, optimize=True)
    return stream.getvalue()
