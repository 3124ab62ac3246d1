"""Figures of a study. No backend is forced on the caller and no window opens."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aopsam_lab.masks import drawing
from aopsam_lab.study import tables
from aopsam_lab.study.paper import sweep_curve
from aopsam_lab.study.runner import Example
from aopsam_lab.study.settings import REFERENCE
from aopsam_lab.study.sweeps import DEFAULT, SWEPT, label, pareto_front

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

    Marks of almost the same number of prompts are drawn 3% apart: each interval can be seen.

    Args:
        summary: as `tables.summary_table` returns it.
    """
    figure = _figure(7.6, 4.7)
    axes = figure.subplots()
    _prepare(axes, "mIoU in percent, with 95% intervals over images")
    _log_axis(axes, "prompts decoded per image (log scale)")
    x = _apart(summary["n_decoded"].clip(lower=0.5).to_numpy())
    y, low, high = (100 * summary[name].to_numpy() for name in ("miou", "miou_lo", "miou_hi"))
    labels = []
    for i, method in enumerate(summary["method"]):
        (colour, marker), first = STYLES.get(method, OTHER_STYLE), method == REFERENCE
        if np.isfinite([low[i], high[i]]).all():
            axes.vlines(x[i], low[i], high[i], color=colour, lw=1.3, alpha=0.55, zorder=2)
        size, face, order = (95, colour, 3) if first else (52, "white", 3.5)
        style = {"marker": marker, "c": face, "edgecolors": colour, "linewidths": 1.6}
        axes.scatter(x[i], y[i], s=size, zorder=order, **style)
        labels.append((tables.title(method), colour, first))
    ends = np.concatenate([low, high, y])
    ends = ends[np.isfinite(ends)]
    if len(ends):
        margin = max(0.12 * np.ptp(ends), 1.0)
        axes.set_ylim(max(ends.min() - margin, 0), ends.max() + margin)
        axes.set_xlim(x.min() / 1.7, x.max() * 2.2)
    _label_marks(figure, axes, labels, np.column_stack([x, y]), np.column_stack([x, low, x, high]))
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
    front, names, keys = pareto_front(x, y), [], {}
    for i, row in enumerate(table.itertuples()):
        colour, marker = SWEEP_STYLES[row.parameter]
        keys[row.parameter] = _key(colour, marker, 0)
        names.append((label(row.parameter, row.value), colour, False))
        if row.is_default:
            names[-1] = (DEFAULT, INK, True)
            axes.scatter(x[i], y[i], s=90, marker="*", c=INK, zorder=4)
        else:
            style = {"c": colour if front[i] else "white", "edgecolors": colour, "linewidths": 1.5}
            axes.scatter(x[i], y[i], s=46, marker=marker, zorder=3, **style)
    order = np.flatnonzero(front)[np.argsort(x[front], kind="stable")]
    axes.step(x[order], y[order], where="post", color=INK, lw=1, alpha=0.6, zorder=1)
    axes.margins(0.12)
    keys[DEFAULT] = _key(INK, "*", 0, filled=True)
    keys["Pareto front"] = Line2D([], [], color=INK, lw=1, alpha=0.6)
    _legend(figure, keys, 6)
    # equal settings lie on one point: one name
    defaults = np.flatnonzero(table["is_default"])
    named = list({(x[i], y[i]): i for i in (*order, *defaults)}.values())
    marks = [*named, *(i for i in range(len(x)) if i not in named)]
    fx, fy = x[order], y[order]
    level = np.column_stack([fx[:-1], fy[:-1], fx[1:], fy[:-1]])
    upright = np.column_stack([fx[1:], fy[:-1], fx[1:], fy[1:]])
    lines = np.concatenate([level, upright])
    _label_marks(figure, axes, [names[i] for i in named], np.column_stack([x, y])[marks], lines)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def place_labels(
    sizes: np.ndarray, marks: np.ndarray, obstacles: np.ndarray, bounds: Sequence[float]
) -> np.ndarray:
    """Where to put labels so that they cover neither each other nor any obstacle.

    Labels are placed one by one, each at the nearest free of a ring of places around its mark;
    where none is free, at the one that covers least. All in one unit, y upwards.

    Args:
        sizes: (n, 2), width and height of each label.
        marks: (n, 2), the centre of each label's mark.
        obstacles: (m, 4), x0 y0 x1 y1 of what must stay visible.
        bounds: x0 y0 x1 y1 to stay in.

    Returns:
        (n, 2), the lower left corner of each label.
    """
    taken, corners = list(obstacles), np.zeros((len(sizes), 2))
    for i in np.argsort(-marks[:, 1], kind="stable"):
        low = marks[i] + _offsets(*sizes[i])
        high = low + sizes[i]
        others = np.reshape(taken, (-1, 4))
        shared = np.minimum(high[:, None], others[:, 2:]) - np.maximum(low[:, None], others[:, :2])
        outside = np.maximum(bounds[:2] - low, 0) + np.maximum(high - bounds[2:], 0)
        cost = shared.clip(min=0).prod(axis=2).sum(axis=1) + 1e3 * outside.sum(axis=1)
        best = np.argmin(cost + 1e-3 * np.arange(len(cost)))
        corners[i] = low[best]
        taken.append([*low[best], *high[best]])
    return corners


def _offsets(width: float, height: float) -> np.ndarray:
    """Places to try for a label's lower left corner, from its mark, best first."""
    places = []
    for gap in (1.0, 1.8, 2.8, 4.0):
        side, step = 0.75 * height * gap, 0.9 * height * gap
        for y in (-height / 2, step - height / 2, -step - height / 2):
            places += [(side, y), (-side - width, y)]
        places += [(-width / 2, step), (-width / 2, -step - height)]
    return np.array(places)


def _label_marks(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, str, bool]],
    marks: np.ndarray,
    lines: np.ndarray,
) -> None:
    """Name marks beside them; a thin line leads to names that had to move away.

    Args:
        figure, axes: where; nothing else is drawn later.
        labels: text, colour and whether it is bold, one for each of the first marks.
        marks: (n, 2) x, y in the axes' data.
        lines: (m, 4) x0 y0 x1 y1 of lines that no label may cover, in the axes' data.
    """
    figure.draw_without_rendering()  # the layout has to be known before pixels can be
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = []
    for name, colour, bold in labels:
        style = {"color": colour, "fontweight": "bold" if bold else "normal"}
        texts.append(axes.text(0, 0, name, fontsize=9, va="bottom", zorder=4, **style))
        texts[-1].set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([[extent.width, extent.height] for extent in extents])
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    marks, radius = to_pixels(marks), 6 * figure.dpi / 72
    known = lines[np.isfinite(lines).all(axis=1)].reshape(-1, 2)
    ends = np.sort(to_pixels(known).reshape(-1, 2, 2), axis=1) + [[-2, -2], [2, 2]]
    obstacles = np.concatenate([np.hstack([marks - radius, marks + radius]), ends.reshape(-1, 4)])
    bounds = axes.get_window_extent(renderer).extents
    corners = place_labels(sizes, marks[: len(sizes)], obstacles, bounds)
    for text, corner, size, mark in zip(texts, corners, sizes, marks):
        text.set_position(to_data(corner))
        nearest = np.clip(mark, corner, corner + size)
        if np.hypot(*(nearest - mark)) > 2.2 * radius:
            way = to_data([nearest, mark])
            axes.plot(*way.T, color=text.get_color(), lw=0.6, alpha=0.7, zorder=1)


def _apart(x: np.ndarray) -> np.ndarray:
    """Positions for a log axis, each at least 3% above the next lower one."""
    positions, order = x.astype(float), np.argsort(x, kind="stable")
    for lower, higher in zip(order[:-1], order[1:]):
        positions[higher] = max(positions[higher], 1.03 * positions[lower])
    return positions


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
