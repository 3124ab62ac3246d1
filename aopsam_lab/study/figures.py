"""Figures of a study. No backend is forced on the caller and no window opens."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aopsam_lab.masks import drawing
from aopsam_lab.study import tables
from aopsam_lab.study.paper import sweep_curve
from aopsam_lab.study.runner import Example
from aopsam_lab.study.settings import REFERENCE
from aopsam_lab.study.sweeps import SWEPT, pareto_front

# Colours of Okabe and Ito (2008), one for each family of methods. Markers tell the methods of a
# family apart, so nothing rests on colour alone.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, MUTED, RULE = "#1b1b1b", "#5f6368", "#d9dce0"
STYLES = {
    "amg_s": (BLUE, "s"),
    "amg_d": (BLUE, "D"),
    "oas_box": (RED, "s"),
    "oas_point": (RED, "o"),
    "aop_no_as_af": (GREEN, "v"),
    "aop_no_af": (GREEN, "^"),
    "aop": (GREEN, "o"),
    "aop_gated": (GREEN, "P"),
    "aop_raw": (GREEN, "X"),
}
OTHER_STYLE = ("#555555", "o")
SWEEP_STYLES = dict(zip(SWEPT, ((BLUE, "s"), (RED, "^"), (PINK, "D"), (GREEN, "o"))))
PAPER_LINE = {"color": INK, "lw": 1.3, "ls": (0, (4, 2.5)), "marker": ".", "ms": 6}
PROMPT_STYLES = {
    "kept": {"c": "#FFFFFF", "marker": "o", "edgecolors": "black", "linewidths": 0.6},
    "eliminated": {"c": "#E69F00", "marker": "x", "linewidths": 0.8},
}
CURVE_TITLES = {"miou": "mIoU %", "ar_1000": "AR@1000 %", "coverage": "coverage %"}
NICE = {"steps": [1, 2, 5, 10]}


def tradeoff_figure(summary: pd.DataFrame) -> Figure:
    """mIoU with its 95% interval against prompts decoded per image, one mark a method.

    Args:
        summary: as `tables.summary_table` returns it.
    """
    figure = _figure(7.6, 5.2)
    axes, keys = figure.subplots(), {}
    _prepare(axes, "mIoU in percent, with 95% intervals over images")
    _log_axis(axes, "prompts decoded per image (log scale)")
    # marks of almost as many prompts stand 3% apart: each interval can be seen
    x = summary["n_decoded"].clip(lower=0.5).to_numpy(dtype=float).copy()
    order = np.argsort(x, kind="stable")
    for lower, higher in itertools.pairwise(order):
        x[higher] = max(x[higher], 1.03 * x[lower])
    for at, row in zip(x, summary.itertuples(), strict=True):
        (colour, marker), first = STYLES.get(row.method, OTHER_STYLE), row.method == REFERENCE
        axes.vlines(at, 100 * row.miou_lo, 100 * row.miou_hi, color=colour, lw=1.3, alpha=0.55)
        face, order = (colour, 3) if first else ("white", 3.5)
        style = {"marker": marker, "c": face, "edgecolors": colour, "linewidths": 1.6}
        axes.scatter(at, 100 * row.miou, s=95 if first else 52, zorder=order, **style)
        keys[tables.title(row.method)] = _key(colour, marker, 0, filled=first)
    axes.margins(0.08)
    _legend(figure, keys, 4)
    return figure


def examples_figure(examples: Sequence[Example], methods: Sequence[str]) -> Figure:
    """A row an image: its ground truth, then the masks and prompts of each method."""
    heights = [example.image.shape[0] / example.image.shape[1] for example in examples]
    width, columns = 3.5, 1 + len(methods)
    figure = _figure(width * columns, width * sum(heights) + 0.5 * len(examples), dpi=110)
    shape = {"squeeze": False, "gridspec_kw": {"height_ratios": heights}}
    for row, example in zip(figure.subplots(len(examples), columns, **shape), examples):
        text = f"ground truth\n{len(example.truth)} masks"
        _draw(row[0], example.image, example.truth, text)
        for axes, method in zip(row[1:], methods):
            found = example.detail.get(method)
            if found is None:
                text = f"{tables.title(method)}\nnot run on this image"
                _draw(axes, example.image, [], text)
                continue
            states = [status for *_, status in found["prompts"]]
            decoded = sum(status not in ("eliminated", "not_reached") for status in states)
            text = f"{len(found['masks'])} masks, {decoded} prompts decoded"
            _draw(axes, example.image, found["masks"], f"{tables.title(method)}\n{text}")
            for status, style in PROMPT_STYLES.items():
                own = [(x, y) for x, y, state in found["prompts"] if state == status]
                axes.scatter(*np.reshape(own, (-1, 2)).T, s=11, **style)
    return figure


def threshold_figure(summary: pd.DataFrame) -> Figure:
    """mIoU, AR@1000 and, where at hand, coverage against masks kept, one line a method.

    Along a line thresholds grow looser from left to right. SAM's own are the filled mark, with the
    95% interval over images.

    Args:
        summary: as `thresholds.summary_of_curves` returns it.
    """
    panels = [name for name in CURVE_TITLES if name in summary]
    figure = _figure(1.2 + 3.9 * len(panels), 5.0)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _prepare(axes, CURVE_TITLES[name])
        _log_axis(axes, "masks kept per image (log scale)")
        for method, own in summary.groupby("method", sort=False):
            (colour, marker), first = STYLES.get(method, OTHER_STYLE), method == REFERENCE
            x, y = own["n_masks"].clip(lower=0.5).to_numpy(), 100 * own[name].to_numpy()
            width, opacity, order = (2.4, 1.0, 3) if first else (1.2, 0.75, 2)
            axes.plot(x, y, color=colour, lw=width, alpha=opacity, zorder=order)
            marked = own["own"].to_numpy(dtype=bool)
            low, high = (100 * own[f"{name}_{end}"].to_numpy()[marked] for end in ("lo", "hi"))
            axes.vlines(x[marked], low, high, color=colour, lw=1, alpha=0.45, zorder=1)
            faces = np.where(marked, colour, "white")
            style = {"marker": marker, "edgecolors": colour, "linewidths": 1.3, "zorder": 4}
            axes.scatter(x, y, s=46 if first else 30, c=faces, **style)
    keys = {
        tables.title(method): _key(
            *STYLES.get(method, OTHER_STYLE), 2.4 if method == REFERENCE else 1.2
        )
        for method in summary["method"].unique()
    }
    keys["filled: SAM's own thresholds, with 95% interval"] = _key(INK, "o", 0, filled=True)
    _legend(figure, keys, 4)
    return figure


def sweep_figure(table: pd.DataFrame) -> Figure:
    """A column of panels a parameter: mIoU, #P and prompts decoded; the paper's curves dashed.

    The band around mIoU is the 95% interval of its paired difference to the default setting, whose
    mark is filled. The paper's curves are of other images: their course compares, not their height.

    Args:
        table: as `sweeps.sweep_table` returns it.
    """
    names = list(table["parameter"].unique())
    figure = _figure(2.9 * len(names) + 0.5, 6.6)
    shape = {"sharey": "row", "sharex": "col", "gridspec_kw": {"height_ratios": (3, 3, 2)}}
    grid = figure.subplots(3, len(names), squeeze=False, **shape)
    keys = {"ours": _key(GREEN, "o", 1.8)}
    for column, letter, name in zip(grid.T, "abcd", names):
        own = table[table["parameter"] == name]
        x, miou = own["value"].to_numpy(), 100 * own["miou"].to_numpy()
        default = miou - 100 * own["miou_diff"].to_numpy()
        low, high = (default + 100 * own[f"miou_diff_{end}"].to_numpy() for end in ("lo", "hi"))
        column[0].fill_between(x, low, high, color=GREEN, alpha=0.16, lw=0)
        theirs = sweep_curve(name, x.min(), x.max())
        faces = np.where(own["is_default"], GREEN, "white")
        for axes, y, shown in zip(
            column, (miou, own["n_masks"], own["n_decoded"]), ("miou", "n_masks", None)
        ):
            _prepare(axes, f"({letter}) {name}" if shown == "miou" else "")
            axes.plot(x, y, color=GREEN, lw=1.8, zorder=2)
            axes.scatter(x, y, s=42, c=faces, edgecolors=GREEN, linewidths=1.6, zorder=3)
            if shown and len(theirs):
                (line,) = axes.plot(theirs["value"], theirs[shown], zorder=2.5, **PAPER_LINE)
                keys["the paper's, of other images"] = line
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5 if shown else 4, **NICE))
        column[2].set_xticks(x, [f"{value:g}" for value in x])
        column[2].set_xlabel(name, color=MUTED)
    for axes in grid[1:, 0]:
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 1))
    for axes, text in zip(grid[:, 0], ("mIoU %", "#P, masks kept", "prompts decoded")):
        axes.set_ylabel(text, color=MUTED)
    figure.align_ylabels(grid[:, 0])
    _legend(figure, keys, 2)
    return figure


def joint_figure(table: pd.DataFrame) -> Figure:
    """mIoU against total time per image, every setting a mark, the Pareto front joined.

    Args:
        table: as `sweeps.sweep_table` returns it.
    """
    table = table[np.isfinite(table["total_s"]) & np.isfinite(table["miou"])]
    figure = _figure(7.6, 4.7)
    axes = figure.subplots()
    _prepare(axes, "mIoU in percent against time")
    axes.set_xlabel("total time per image, ms", color=MUTED)
    if table.empty:
        where = {"transform": axes.transAxes, "ha": "center"}
        axes.text(0.5, 0.5, "no setting was timed", color=MUTED, **where)
        return figure
    x, y = 1000 * table["total_s"].to_numpy(), 100 * table["miou"].to_numpy()
    front, keys = pareto_front(x, y), {}
    for at, height, best, row in zip(x, y, front, table.itertuples(), strict=True):
        colour, marker = SWEEP_STYLES[row.parameter]
        keys[row.parameter] = _key(colour, marker, 0)
        style = {"c": colour if best else "white", "edgecolors": colour, "linewidths": 1.5}
        if not row.is_default:
            axes.scatter(at, height, s=46, marker=marker, zorder=3, **style)
            where = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{row.value:g}", (at, height), color=colour, **where)
    default = table["is_default"].to_numpy(dtype=bool)
    axes.scatter(x[default], y[default], s=90, marker="*", c=INK, zorder=4)
    order = np.flatnonzero(front)[np.argsort(x[front], kind="stable")]
    axes.step(x[order], y[order], where="post", color=INK, lw=1, alpha=0.6, zorder=1)
    axes.margins(0.12)
    keys["default"] = _key(INK, "*", 0, filled=True)
    keys["Pareto front"] = Line2D([], [], color=INK, lw=1, alpha=0.6)
    _legend(figure, keys, 6)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _figure(width: float, height: float, dpi: int = 150) -> Figure:
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
    return figure


def _prepare(axes: Axes, title: str) -> None:
    """The style of all figures: horizontal rules, no box, a heading on the left."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=10)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="both", which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.tick_params(axis="x", which="major", length=4, color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, **NICE))


def _log_axis(axes: Axes, text: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(text, color=MUTED)


def _key(colour: str, marker: str, width: float, filled: bool = False) -> Line2D:
    """A line with a mark for the legend; width 0: the mark alone."""
    style = {"mfc": colour if filled else "white", "mec": colour, "ms": 6, "mew": 1.4}
    return Line2D([], [], color=colour, lw=width, marker=marker, **style)


def _legend(figure: Figure, keys: dict[str, Line2D], columns: int) -> None:
    style = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 2.5}
    figure.legend(keys.values(), keys, loc="outside lower left", ncols=columns, **style)


def _draw(axes: Axes, image: np.ndarray, masks: list[dict], text: str) -> None:
    height, width = image.shape[:2]
    drawn = drawing.overlay(image, masks)
    axes.imshow(drawn, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    axes.set_title(text, fontsize=9, loc="left", color=INK)
