"""The figure of looser thresholds: what each method finds against how many masks it keeps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aopsam_lab.study import tables
from aopsam_lab.study.figures import INK, MUTED, OTHER_STYLE, STYLES, clean

PANELS = {"miou": "mIoU %", "ar_1000": "AR@1000 %", "coverage": "coverage %"}


def threshold_figure(summary: pd.DataFrame) -> Figure:
    """mIoU, AR@1000 and, where at hand, coverage against masks kept an image, one line a method.

    Along a line thresholds grow looser from left to right. SAM's own are the filled mark; there the
    95% interval over images is drawn.

    Args:
        summary: as `thresholds.summary_of_curves` makes it.
    """
    panels = [name for name in PANELS if name in summary]
    figure = Figure(figsize=(1.2 + 3.9 * len(panels), 5.0), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        clean(axes)
        axes.set_xscale("log")
        for method, own in summary.groupby("method", sort=False):  # strictest thresholds first
            _line(axes, method, own, name)
        heading = {"fontsize": 10.5, "color": INK, "fontweight": "bold"}
        axes.set_title(PANELS[name], loc="left", pad=10, **heading)
        axes.set_xlabel("masks kept per image (log scale)", color=MUTED)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, list(dict.fromkeys(summary["method"])))
    return figure


def _line(axes: Axes, method: str, own: pd.DataFrame, name: str) -> None:
    colour, marker = STYLES.get(method, OTHER_STYLE)
    first = method == tables.REFERENCE
    x, y = own["n_masks"].clip(lower=0.5).to_numpy(), 100 * own[name].to_numpy()
    width, opacity, order = (2.4, 1.0, 3) if first else (1.2, 0.75, 2)
    axes.plot(x, y, color=colour, lw=width, alpha=opacity, zorder=order)
    marked = own["own"].to_numpy(dtype=bool)
    low, high = (100 * own[f"{name}_{end}"].to_numpy()[marked] for end in ("lo", "hi"))
    known = np.isfinite(low) & np.isfinite(high)
    axes.vlines(x[marked][known], low[known], high[known], color=colour, lw=1, alpha=0.45, zorder=1)
    for chosen, face in ((~marked, "white"), (marked, colour)):
        style = {"marker": marker, "c": face, "edgecolors": colour, "linewidths": 1.3, "zorder": 4}
        axes.scatter(x[chosen], y[chosen], s=46 if first else 30, **style)


def _legend(figure: Figure, methods: list[str]) -> None:
    keys, names = [], []
    for method in methods:
        colour, marker = STYLES.get(method, OTHER_STYLE)
        width = 2.4 if method == tables.REFERENCE else 1.2
        style = {"marker": marker, "mfc": "white", "mec": colour, "ms": 5.5}
        keys.append(Line2D([], [], color=colour, lw=width, **style))
        names.append(tables.title(method))
    keys.append(Line2D([], [], ls="", marker="o", color=INK, ms=5.5))
    names.append("filled: SAM's own thresholds, with 95% interval")
    figure.legend(
        keys, names, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK
    )
