"""Figures of the sweeps: panels of each parameter, and mIoU against time over all settings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from aopsam_lab.study.figures import INK, MUTED, clean, label_marks
from aopsam_lab.study.paper import sweep_curve
from aopsam_lab.study.sweeps import GRIDS, label, pareto_front

OURS = "#009E73"
PAPER_LINE = {"color": INK, "lw": 1.3, "ls": (0, (4, 2.5)), "marker": ".", "ms": 6}
# Colours of Okabe and Ito (2008), with a marker each, so that nothing rests on colour alone.
KNOB_STYLES = dict(
    zip(GRIDS, (("#0072B2", "s"), ("#D55E00", "^"), ("#CC79A7", "D"), ("#009E73", "o")))
)
LETTERS = dict(zip(GRIDS, "abcd"))  # the paper's


def sweep_figure(table: pd.DataFrame) -> Figure:
    """A column of panels a parameter, ours drawn through and the paper's curves dashed.

    The panels are mIoU (percent), #P and prompts decoded, of which the paper has the first two. The
    band around mIoU is the 95% interval of its paired difference to the default setting, whose mark
    is filled. The paper's curves are drawn between our first and last value. They are of other
    pictures, so their course compares and their height does not.
    """
    knobs = list(dict.fromkeys(table["knob"]))
    figure = Figure(figsize=(2.9 * len(knobs) + 0.5, 6.6), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.04, rect=(0, 0.05, 1, 0.95))
    shape = {"sharey": "row", "sharex": "col", "gridspec_kw": {"height_ratios": (3, 3, 2)}}
    grid = figure.subplots(3, len(knobs), squeeze=False, **shape)
    published = False
    for (upper, middle, lower), knob in zip(grid.T, knobs):
        own = table[table["knob"] == knob]
        x, miou = own["value"].to_numpy(), 100 * own["miou"].to_numpy()
        default = miou - 100 * own["miou_diff"].to_numpy()
        low, high = (default + 100 * own[f"miou_diff_{end}"].to_numpy() for end in ("lo", "hi"))
        upper.fill_between(x, low, high, color=OURS, alpha=0.16, lw=0)
        theirs = sweep_curve(knob, x.min(), x.max())
        faces = np.where(own["is_default"], OURS, "white")
        for axes, y, column in (
            (upper, miou, "miou"),
            (middle, own["n_masks"], "n_masks"),
            (lower, own["n_decoded"], None),
        ):
            clean(axes)
            axes.plot(x, y, color=OURS, lw=1.8, zorder=2)
            axes.scatter(x, y, s=42, c=faces, edgecolors=OURS, linewidths=1.6, zorder=3)
            if column and len(theirs):
                published = True
                axes.plot(theirs["value"], theirs[column], zorder=2.5, **PAPER_LINE)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5 if column else 4, steps=[1, 2, 5, 10]))
        lower.set_xticks(x, [f"{value:g}" for value in x])
        lower.set_xlabel(knob, color=MUTED)
        upper.set_title(
            f"({LETTERS[knob]}) {knob}", loc="left", fontsize=10.5, color=INK, fontweight="bold"
        )
    for axes in grid[1:, 0]:
        axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 1))
    for axes, text in zip(grid[:, 0], ("mIoU %", "#P, masks kept", "prompts decoded")):
        axes.set_ylabel(text, color=MUTED)
    lines, names = [Line2D([], [], color=OURS, lw=1.8, marker="o", mfc="white")], ["ours"]
    if published:
        lines.append(Line2D([], [], **PAPER_LINE))
        names.append("the paper's, of other pictures")
    figure.align_ylabels(grid[:, 0])
    style = {"frameon": False, "fontsize": 9, "labelcolor": MUTED, "handlelength": 3}
    figure.legend(lines, names, loc="lower left", ncols=2, **style)
    return figure


def joint_figure(table: pd.DataFrame) -> Figure:
    """mIoU against total time per image, every setting a mark, those that no other beats joined: the Pareto front."""
    table = table[np.isfinite(table["total_s"]) & np.isfinite(table["miou"])].reset_index(drop=True)
    figure = Figure(figsize=(7.6, 4.7), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    clean(axes)
    axes.set_xlabel("total time per image, ms", color=MUTED)
    axes.set_title(
        "mIoU in percent against time",
        loc="left",
        fontsize=10.5,
        color=INK,
        fontweight="bold",
        pad=12,
    )
    if table.empty:
        axes.text(
            0.5, 0.5, "no setting was timed", transform=axes.transAxes, ha="center", color=MUTED
        )
        return figure
    x, y = 1000 * table["total_s"].to_numpy(), 100 * table["miou"].to_numpy()
    default, front = table["is_default"].to_numpy(dtype=bool), pareto_front(x, y)
    for knob, (colour, marker) in KNOB_STYLES.items():
        own = (table["knob"] == knob).to_numpy() & ~default
        for chosen, face in ((own & front, colour), (own & ~front, "white")):
            axes.scatter(
                x[chosen],
                y[chosen],
                s=46,
                marker=marker,
                c=face,
                edgecolors=colour,
                linewidths=1.5,
                zorder=3,
            )
    axes.scatter(x[default], y[default], s=90, marker="*", c=INK, zorder=4)
    order = np.flatnonzero(front)[np.argsort(x[front], kind="stable")]
    axes.step(x[order], y[order], where="post", color=INK, lw=1, alpha=0.6, zorder=1)
    axes.margins(0.12)
    keys = [
        Line2D([], [], ls="", marker=m, mfc="white", mec=c, mew=1.5)
        for c, m in KNOB_STYLES.values()
    ]
    keys += [
        Line2D([], [], ls="", marker="*", ms=10, color=INK),
        Line2D([], [], color=INK, lw=1, alpha=0.6),
    ]
    names = [*KNOB_STYLES, "default", "Pareto front"]
    figure.legend(
        keys,
        names,
        loc="outside lower left",
        ncols=6,
        frameon=False,
        fontsize=8.5,
        labelcolor=MUTED,
    )
    named = {
        (x[i], y[i]): i for i in (*order, *np.flatnonzero(default))
    }  # equal settings lie on one point: one name
    first = list(named.values())
    others = [i for i in range(len(x)) if i not in first]
    labels = [
        ("default", INK, True)
        if default[i]
        else (
            label(table.loc[i, "knob"], table.loc[i, "value"]),
            KNOB_STYLES[table.loc[i, "knob"]][0],
            False,
        )
        for i in first
    ]
    fx, fy = x[order], y[order]
    level = np.column_stack([fx[:-1], fy[:-1], fx[1:], fy[:-1]])
    upright = np.column_stack([fx[1:], fy[:-1], fx[1:], fy[1:]])
    label_marks(
        figure,
        axes,
        labels,
        np.column_stack([x, y])[first + others],
        np.concatenate([level, upright]),
    )
    return figure
