"""Figures of a study. No backend is forced on the caller and no window opens."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aopsam_lab.masks import drawing
from aopsam_lab.pipeline.methods import TITLES
from aopsam_lab.study import tables
from aopsam_lab.study.paper import published
from aopsam_lab.study.runner import Example
from aopsam_lab.study.settings import REFERENCE
from aopsam_lab.study.sweeps import SWEPT, pareto_front

# Colours of Okabe and Ito (2008), one for each family of methods. Markers tell the methods of a
# family apart, so nothing rests on colour alone.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, MUTED, RULE = "#1b1b1b", "#5f6368", "#d9dce0"
COLOURS = {"amg": BLUE, "oas": RED, "aop": GREEN}
MARKERS = dict(zip([*TITLES, "AoP-SAM, chosen"], "sDsov^oPXs", strict=True))
SWEEP_STYLES = dict(zip(SWEPT, ((BLUE, "s"), (RED, "^"), (PINK, "D"), (GREEN, "o")), strict=True))
PAPER_LINE = {"color": INK, "lw": 1.3, "ls": (0, (4, 2.5)), "marker": ".", "ms": 6}
PROMPT_STYLES = {
    "kept": {"c": "#FFFFFF", "marker": "o", "edgecolors": "black", "linewidths": 0.6},
    "eliminated": {"c": "#E69F00", "marker": "x", "linewidths": 0.8},
}
CURVE_TITLES = {"miou": "mIoU %", "ar_1000": "AR@1000 %", "coverage": "coverage %"}
NICE = {"steps": [1, 2, 5, 10]}


def tradeoff_figure(summary: pd.DataFrame) -> Figure:
    """Draw mIoU with its 95% interval against prompts decoded per image, one mark a method."""
    figure, [[axes]] = panels(7.6, 5.2)
    title = "mIoU in percent, with 95% intervals over images"
    prepare(axes, title, "prompts decoded per image (log scale)", log=True)
    last = 0.0
    for row in summary.sort_values("n_decoded", kind="stable").itertuples():
        colour, marker = style_of(row.method)
        # marks of almost as many prompts stand 3% apart: each interval can be seen
        last = max(row.n_decoded, 0.5, 1.03 * last)
        axes.vlines(last, 100 * row.miou_lo, 100 * row.miou_hi, color=colour, lw=1.3, alpha=0.55)
        size, face, order = (95, colour, 3) if row.method == REFERENCE else (52, "white", 3.5)
        style = {"marker": marker, "c": face, "edgecolors": colour, "linewidths": 1.6}
        name = tables.title(row.method)
        axes.scatter(last, 100 * row.miou, s=size, zorder=order, label=name, **style)
    axes.margins(0.08)
    legend(figure, axes, 4)
    return figure


def examples_figure(examples: Sequence[Example], methods: Sequence[str]) -> Figure:
    """Draw a row an image: its ground truth, then the masks and prompts of each method."""
    heights = [sample.image.shape[0] / sample.image.shape[1] for sample, _ in examples]
    width, columns = 3.5, 1 + len(methods)
    size = width * columns, width * sum(heights) + 0.5 * len(examples)
    figure, rows = panels(*size, len(examples), columns, dpi=110, height_ratios=heights)
    for row, (sample, found) in zip(rows, examples, strict=True):
        colours = drawing.mask_colours(sample.rles)
        text = f"ground truth\n{len(sample.rles)} masks; grey on the right: no match"
        _draw(row[0], sample.image, sample.rles, colours, text)
        for axes, method in zip(row[1:], methods, strict=True):
            masks, prompts = found[method]["masks"], found[method]["prompts"]
            decoded = sum(status not in ("eliminated", "not_reached") for *_, status in prompts)
            text = f"{len(masks)} masks, {decoded} prompts decoded"
            matched = drawing.matched_colours(masks, sample.rles, colours)
            _draw(axes, sample.image, masks, matched, f"{tables.title(method)}\n{text}")
            for status, style in PROMPT_STYLES.items():
                own = [(x, y) for x, y, state in prompts if state == status]
                axes.scatter(*np.reshape(own, (-1, 2)).T, s=11, **style)
    return figure


def curve_figure(summary: pd.DataFrame, x: str = "n_masks", text: str = "masks kept") -> Figure:
    """Draw the columns of CURVE_TITLES against `x`, a line a method; at SAM's thresholds filled."""
    names = [name for name in CURVE_TITLES if name in summary]
    summary = summary.assign(**{x: summary[x].clip(lower=0.5)})
    figure, grid = panels(1.2 + 3.9 * len(names), 5.0, 1, len(names))
    for axes, name in zip(grid[0], names, strict=True):
        prepare(axes, CURVE_TITLES[name], f"{text} per image (log scale)", log=True)
        for method, own in summary.groupby("method", sort=False):
            colour, marker = style_of(method)
            width, size, order = (2.4, 7, 3) if method == REFERENCE else (1.2, 5.5, 2)
            style = {"marker": marker, "ms": size, "mew": 1.3, "color": colour, "zorder": order}
            line = {"mfc": "white", "lw": width, "label": tables.title(method)}
            axes.plot(own[x], 100 * own[name], **line, **style)
            for row in own[own["own"]].to_dict("records"):
                axes.plot(row[x], 100 * row[name], lw=0, **style)
                low, high = 100 * row[f"{name}_lo"], 100 * row[f"{name}_hi"]
                axes.vlines(row[x], low, high, color=colour, lw=1, alpha=0.45, zorder=1)
        if summary["own"].any():
            axes.plot([], "o", color=INK, label="filled: SAM's own thresholds, with 95% interval")
    legend(figure, axes, 4)
    return figure


def sweep_figure(table: pd.DataFrame) -> Figure:
    """Draw mIoU, #P and prompts decoded in a column a parameter; the paper's curves are dashed.

    The band is the 95% interval of the paired difference to the default, whose mark is filled.
    """
    names, sweeps = list(table["parameter"].unique()), published("parameter_sweeps")
    size = 2.9 * len(names) + 0.5, 6.6, 3, len(names)
    figure, grid = panels(*size, sharey="row", sharex="col", height_ratios=(3, 3, 2))
    rows = {"miou": "mIoU %", "n_masks": "#P, masks kept", "n_decoded": "prompts decoded"}
    letters = dict(zip(SWEPT, "abcd", strict=True))
    for column, name in zip(grid.T, names, strict=True):
        own = table[table["parameter"] == name].assign(miou=lambda rows: 100 * rows["miou"])
        x, default = own["value"], own["is_default"].astype(bool)
        low, high = (
            own["miou"] + 100 * (own[f"miou_diff_{end}"] - own["miou_diff"]) for end in ("lo", "hi")
        )
        column[0].fill_between(x, low, high, color=GREEN, alpha=0.16, lw=0)
        theirs = sweeps[(sweeps["parameter"] == name) & sweeps["value"].between(x.min(), x.max())]
        for axes, shown in zip(column, rows, strict=True):
            top, bottom = shown == "miou", shown == "n_decoded"
            prepare(axes, f"({letters[name]}) {name}" if top else "", name if bottom else "")
            axes.plot(x, own[shown], "o-", color=GREEN, mfc="white", lw=1.8, mew=1.6, label="ours")
            axes.plot(x[default], own[shown][default], "o", color=GREEN)
            if shown in theirs and len(theirs):
                label = "the paper's, of other images"
                axes.plot(theirs["value"], theirs[shown], label=label, **PAPER_LINE)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if bottom else 5, **NICE))
        column[2].set_xticks(x, [f"{value:g}" for value in x])
    for axes in grid[1:, 0]:
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 1))
    for axes, text in zip(grid[:, 0], rows.values(), strict=True):
        axes.set_ylabel(text, color=MUTED)
    figure.align_ylabels(grid[:, 0])
    legend(figure, grid[0, 0], 2)
    return figure


def joint_figure(table: pd.DataFrame) -> Figure:
    """Draw mIoU against total time per image, every setting a mark, the Pareto front joined."""
    table = table[np.isfinite(table["total_s"]) & np.isfinite(table["miou"])]
    figure, [[axes]] = panels(7.6, 4.7)
    prepare(axes, "mIoU in percent against time", "total time per image, ms")
    if table.empty:
        axes.text(0.5, 0.5, "no setting was timed", color=MUTED, ha="center")
        return figure
    table = table.assign(x=1000 * table["total_s"], y=100 * table["miou"])
    table["front"] = pareto_front(table["x"].to_numpy(), table["y"].to_numpy())
    table["lift"] = np.where(table["x"].rank(method="first") % 2, 5, -12)  # neighbours stay apart
    for name, own in table[~table["is_default"].astype(bool)].groupby("parameter", sort=False):
        colour, marker = SWEEP_STYLES[name]
        style = {"marker": marker, "edgecolors": colour, "linewidths": 1.5, "zorder": 3}
        faces = np.where(own["front"], colour, "white")
        axes.scatter(own["x"], own["y"], s=46, c=faces, label=name, **style)
        for row in own.itertuples():
            where = {"xytext": (5, row.lift), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{row.value:g}", (row.x, row.y), color=colour, **where)
    default, front = table[table["is_default"]], table[table["front"]].sort_values("x")
    axes.scatter(default["x"], default["y"], s=90, marker="*", c=INK, zorder=4, label="default")
    style = {"where": "post", "color": INK, "lw": 1, "alpha": 0.6, "zorder": 1}
    axes.step(front["x"], front["y"], label="Pareto front", **style)
    axes.margins(0.12)
    legend(figure, axes, 6)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, dpi: int = 150, **shape: Any
) -> tuple[Figure, np.ndarray]:
    """An empty figure, sizes in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
    return figure, figure.subplots(rows, columns, squeeze=False, **shape)


def style_of(method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    return COLOURS.get(method[:3].lower(), MUTED), MARKERS.get(method, "o")


def prepare(axes: Axes, title: str, text: str = "", log: bool = False) -> None:
    """The style of all figures: horizontal rules, no box, a heading on the left, a label below."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=10)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="both", which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.tick_params(axis="x", which="major", length=4, color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, **NICE))
    axes.set_xlabel(text, color=MUTED)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """A legend below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    style = {"ncols": columns, "frameon": False, "fontsize": 8.5, "labelcolor": INK}
    figure.legend(handles, labels, loc="outside lower left", handlelength=2.5, **style)


def _draw(axes: Axes, image: np.ndarray, masks: list[dict], colours: np.ndarray, text: str) -> None:
    height, width = image.shape[:2]
    drawn = drawing.overlay(image, masks, colours=colours)
    axes.imshow(drawn, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    axes.set_title(text, fontsize=9, loc="left", color=INK)
