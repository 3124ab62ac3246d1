"""Figures of a study. Figure objects are built directly: no backend is forced on the caller and no window opens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aopsam_lab.masks import drawing
from aopsam_lab.study import tables

if TYPE_CHECKING:
    from aopsam_lab.study.runner import Example

# Colours of Okabe and Ito (2008), one for each family of methods; within a family the marker tells them apart, so
# nothing rests on colour alone.
STYLES = {
    "amg_s": ("#0072B2", "s"),
    "amg_d": ("#0072B2", "D"),
    "oas_box": ("#D55E00", "s"),
    "oas_point": ("#D55E00", "o"),
    "aop_no_as_af": ("#009E73", "v"),
    "aop_no_af": ("#009E73", "^"),
    "aop": ("#009E73", "o"),
    "aop_gated": ("#009E73", "P"),
    "aop_raw": ("#009E73", "X"),
}
OTHER_STYLE = ("#555555", "o")
INK, MUTED, RULE = "#1b1b1b", "#5f6368", "#d9dce0"
_PROMPT_COLOURS = {"kept": "#FFFFFF", "eliminated": "#E69F00"}


def tradeoff_figure(summary: pd.DataFrame) -> Figure:
    """mIoU (percent, with its 95% interval) against prompts decoded per image (log scale), one mark a method.

    Marks of almost the same number of prompts are drawn 3% apart, so that each interval can be seen.
    """
    figure = Figure(figsize=(7.6, 4.7), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_xscale("log")
    clean(axes)
    x, y = _apart(summary["n_decoded"].clip(lower=0.5).to_numpy()), 100 * summary["miou"].to_numpy()
    low, high = 100 * summary["miou_lo"].to_numpy(), 100 * summary["miou_hi"].to_numpy()
    for i, method in enumerate(summary["method"]):
        colour, marker = STYLES.get(method, OTHER_STYLE)
        if np.isfinite([low[i], high[i]]).all():
            axes.vlines(x[i], low[i], high[i], color=colour, lw=1.3, alpha=0.55, zorder=2)
        filled = method == tables.REFERENCE
        size, face = (95, colour) if filled else (52, "white")
        order = 3 if filled else 3.5  # the large mark must not hide a small one
        axes.scatter(
            x[i],
            y[i],
            s=size,
            marker=marker,
            color=face,
            edgecolors=colour,
            linewidths=1.6,
            zorder=order,
        )
    ends = np.concatenate([low, high, y])
    ends = ends[np.isfinite(ends)]
    if len(ends):
        margin = max(0.12 * np.ptp(ends), 1.0)
        axes.set_ylim(max(ends.min() - margin, 0), ends.max() + margin)
        axes.set_xlim(x.min() / 1.7, x.max() * 2.2)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("prompts decoded per image (log scale)", color=MUTED)
    axes.set_title(
        "mIoU in percent, with 95% intervals over images",
        loc="left",
        fontsize=10.5,
        color=INK,
        fontweight="bold",
        pad=12,
    )
    labels = [
        (tables.title(method), STYLES.get(method, OTHER_STYLE)[0], method == tables.REFERENCE)
        for method in summary["method"]
    ]
    label_marks(figure, axes, labels, np.column_stack([x, y]), np.column_stack([x, low, x, high]))
    return figure


def examples_figure(examples: Sequence[Example], methods: Sequence[str]) -> Figure:
    """A row an image: its truth, then the masks of each method with the prompts that were kept and eliminated."""
    columns = 1 + len(methods)
    heights = [example.image.shape[0] / example.image.shape[1] for example in examples]
    width = 3.5
    figure = Figure(
        figsize=(width * columns, width * sum(heights) + 0.5 * len(examples)),
        dpi=110,
        facecolor="white",
    )
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.05)
    grid = figure.subplots(
        len(examples), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row, example in zip(grid, examples):
        _picture(row[0], example.image, example.truths, f"truth\n{len(example.truths)} masks")
        for axes, method in zip(row[1:], methods):
            found = example.detail.get(method)
            if found is None:
                _picture(axes, example.image, [], f"{tables.title(method)}\nnot run on this image")
                continue
            decoded = sum(
                status not in ("eliminated", "not_reached") for _, _, status in found["prompts"]
            )
            text = f"{tables.title(method)}\n{len(found['masks'])} masks, {decoded} prompts decoded"  # on one line they met the next
            _picture(axes, example.image, found["masks"], text)
            for status, colour in _PROMPT_COLOURS.items():
                points = np.array(
                    [p[:2] for p in found["prompts"] if p[2] == status], dtype=float
                ).reshape(-1, 2)
                marker = (
                    {"marker": "x"}
                    if status == "eliminated"
                    else {"marker": "o", "edgecolors": "black"}
                )
                axes.scatter(
                    *points.T,
                    s=11,
                    c=colour,
                    linewidths=0.8 if status == "eliminated" else 0.6,
                    **marker,
                )
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def place_labels(
    boxes: np.ndarray,
    marks: np.ndarray,
    obstacles: np.ndarray,
    bounds: tuple[float, float, float, float],
) -> np.ndarray:
    """Where to put n labels so that they cover neither each other nor any mark.

    boxes: (n, 2) width and height of each label; marks: (n, 2) centre of each label's mark; obstacles: (m, 4) x0 y0
    x1 y1 of what must stay visible; bounds: x0 y0 x1 y1 to stay in. All in one unit, pixels for instance, y upwards.
    Returns (n, 2), the lower left corner of each. Labels are placed one by one, each at the nearest free of a ring of
    places around its mark; where none is free, at the one that covers least.
    """
    placed: list[tuple[float, float, float, float]] = []
    corners = np.zeros((len(boxes), 2))
    for i in np.argsort(-marks[:, 1], kind="stable"):
        width, height = boxes[i]
        best, best_cost = None, np.inf
        for rank, (x, y) in enumerate(_places(*marks[i], width, height)):
            rectangle = (x, y, x + width, y + height)
            taken = np.array([*obstacles.tolist(), *placed]).reshape(-1, 4)
            outside = max(bounds[0] - x, 0) + max(bounds[1] - y, 0)
            outside += max(x + width - bounds[2], 0) + max(y + height - bounds[3], 0)
            cost = _covered(rectangle, taken) + 1e3 * outside + 1e-3 * rank
            if cost < best_cost:
                best, best_cost = rectangle, cost
        placed.append(best)
        corners[i] = best[:2]
    return corners


def _places(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners to try, best first: right, left, above and below, then the same further off."""
    places = []
    for gap in (1.0, 1.8, 2.8, 4.0):
        side, step = 0.75 * height * gap, 0.9 * height * gap
        places += [(x + side, y - height / 2), (x - side - width, y - height / 2)]
        places += [(x + side, y + dy) for dy in (step - height / 2, -step - height / 2)]
        places += [(x - side - width, y + dy) for dy in (step - height / 2, -step - height / 2)]
        places += [(x - width / 2, y + step), (x - width / 2, y - step - height)]
    return places


def _covered(rectangle: tuple[float, float, float, float], others: np.ndarray) -> float:
    """Area that a rectangle shares with others, (m, 4)."""
    x0, y0, x1, y1 = rectangle
    overlap_x = np.minimum(others[:, 2], x1) - np.maximum(others[:, 0], x0)
    overlap_y = np.minimum(others[:, 3], y1) - np.maximum(others[:, 1], y0)
    return float((overlap_x.clip(min=0) * overlap_y.clip(min=0)).sum())


def label_marks(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, str, bool]],
    marks: np.ndarray,
    lines: np.ndarray,
) -> None:
    """Name marks beside them; a thin line leads to names that had to move away.

    labels: text, colour and whether it is bold, one for each of the first marks. marks: (n, 2) x, y. lines: (m, 4)
    x0 y0 x1 y1 of lines that labels must not cover, those that are not finite left out. All in the axes' data.
    """
    figure.draw_without_rendering()  # the layout has to be known before pixels can be
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = []
    for name, colour, bold in labels:
        weight = "bold" if bold else "normal"
        text = axes.text(
            0, 0, name, fontsize=9, color=colour, fontweight=weight, va="bottom", zorder=4
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        texts.append(text)
    boxes = np.array(
        [[b.width, b.height] for b in (text.get_window_extent(renderer) for text in texts)]
    )
    to_pixels = axes.transData.transform
    marks = to_pixels(marks)
    radius = 6 * figure.dpi / 72
    obstacles = [(mx - radius, my - radius, mx + radius, my + radius) for mx, my in marks]
    for line in lines[np.isfinite(lines).all(1)]:
        (x0, y0), (x1, y1) = to_pixels(line.reshape(2, 2))
        obstacles.append((min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    bounds = axes.get_window_extent(renderer).extents
    corners = place_labels(boxes, marks[: len(boxes)], np.array(obstacles), tuple(bounds))
    to_data = axes.transData.inverted().transform
    for text, corner, box, mark, (_, colour, _) in zip(texts, corners, boxes, marks, labels):
        text.set_position(to_data(corner))
        nearest = np.clip(mark, corner, corner + box)
        if np.hypot(*(nearest - mark)) > 2.2 * radius:
            ends = to_data([nearest, mark])
            axes.plot(*ends.T, color=colour, lw=0.6, alpha=0.7, zorder=1)


def _apart(x: np.ndarray) -> np.ndarray:
    """Positions for a log axis, each at least 3% above the next lower one."""
    positions = x.astype(float).copy()
    order = np.argsort(x, kind="stable")
    for lower, higher in zip(order[:-1], order[1:]):
        positions[higher] = max(positions[higher], 1.03 * positions[lower])
    return positions


def clean(axes: Axes) -> None:
    """The house style: horizontal rules, no box."""
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="both", which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.tick_params(axis="x", which="major", length=4, color=MUTED)


def _picture(axes: Axes, image: np.ndarray, masks: list[dict], text: str) -> None:
    height, width = image.shape[:2]
    axes.imshow(
        drawing.overlay(image, masks), extent=(0, width, height, 0), interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(text, fontsize=9, loc="left", color=INK)
