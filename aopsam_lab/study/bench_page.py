"""The benchmark's bars, figure and page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from aopsam_lab.study.output import TABLE_STYLE, html_table
from aopsam_lab.study.page import STYLE, provenance_list

PROMPTS = 1024  # what the seconds of a row are for


@dataclass(frozen=True)
class Bar:
    """A ratio of medians that was asked for: of `slow` to `fast` in `part`, at least `least`; `fast` with `prompts`."""

    part: str
    slow: str
    fast: str
    least: float
    prompts: int = PROMPTS


BARS = (
    Bar("decoder, MobileSAM", "stock, batch 64", "IoU before pixels, 35% pass", 4.5),
    Bar("decoder, MobileSAM", "stock, its best batch", "IoU before pixels, 35% pass", 3.0),
    Bar("decoder, MobileSAM", "stock, its best batch", "pixels stay with the image", 1.8),
    Bar("decoder, MobileSAM", "stock, batch 64", "IoU before pixels, 35% pass", 30.0, prompts=100),
    Bar("everything, as they are", "stock generator", "batches side by side", 5.0),
    Bar("everything, 1500 x 2250", "stock generator", "batches side by side", 10.0),
    Bar("everything, as they are", "stock generator", "aop", 30.0),
)


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """How many times sooner than the first row of its part each row is done."""
    first = table.groupby("part", sort=False)["seconds"].transform("first")
    return table.assign(times_stock=first / table["seconds"])


def bars_table(table: pd.DataFrame) -> pd.DataFrame:
    """Each bar whose rows were measured, and what was reached."""
    found = table.set_index(["part", "row"])["seconds"]
    rows = []
    for bar in BARS:
        if (bar.part, bar.slow) in found.index and (bar.part, bar.fast) in found.index:
            reached = found[bar.part, bar.slow] / found[bar.part, bar.fast] * (PROMPTS / bar.prompts)
            to = bar.fast if bar.prompts == PROMPTS else f"{bar.fast}, {bar.prompts} prompts"
            rows.append({"part": bar.part, "of": bar.slow, "to": to, "asked": bar.least, "reached": reached})
    memory_of = table.dropna(subset=["peak_mib"])
    for part, group in memory_of.groupby("part", sort=False):
        peaks = group.set_index("row")["peak_mib"]
        share = peaks.iloc[-1] / peaks.iloc[0]
        what = "peak memory, " + peaks.index[-1]
        rows.append({"part": part, "of": what, "to": "stock's", "asked": 0.4, "reached": share})
    return pd.DataFrame(rows)


def _rounded(value: float) -> str:
    """Three digits, more before the point, never a power of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def figure(table: pd.DataFrame):
    """A bar a row, part by part: how many times sooner than stock."""
    parts = list(dict.fromkeys(table["part"]))
    heights = [int((table["part"] == part).sum()) for part in parts]
    drawn = Figure(figsize=(8.6, 0.36 * sum(heights) + 0.75 * len(parts)), dpi=150, layout="constrained")
    grid = drawn.subplots(len(parts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, part in zip(grid, parts):
        rows = table[table["part"] == part].iloc[::-1]
        colours = ["#9aa0a6" if "stock" in row else "#009E73" if row == "aop" else "#0072B2" for row in rows["row"]]
        axes.barh(rows["row"], rows["times_stock"], color=colours, height=0.62)
        for y, (times, seconds) in enumerate(zip(rows["times_stock"], rows["seconds"])):
            axes.text(times, y, f" {times:.1f} x   ({_rounded(seconds)} s)", va="center", fontsize=8)
        axes.set_title(part, loc="left", fontsize=9.5, fontweight="bold")
        axes.set_xlim(0, 1.28 * rows["times_stock"].max())
        axes.tick_params(labelsize=8, length=0)
        axes.set_xticks([])
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    return drawn


def page(table: pd.DataFrame, bars: pd.DataFrame, steps: pd.DataFrame, about: dict) -> str:
    """The bench as one static page."""
    def words(value) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else _rounded(value)
        return str(value)

    def shown(frame: pd.DataFrame, texts: int) -> str:
        text = frame.map(words)
        return f'<div class="results">{html_table(text, text_columns=texts)}</div>'

    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>aopsam_lab: fast decoding</title><style>{STYLE}{TABLE_STYLE}</style></head><body>
<header><h1>Exact fast decoding</h1><p class="lead">The same masks as segment_anything's, sooner: each technique
switched on after the one before it, all in one run, taking turns.</p></header><main>
<figure><img src="bench.png" alt="How many times sooner than stock each technique is"></figure>
<h2>What was asked and what was reached</h2>{shown(bars, 3)}
<h2>All rows</h2>{shown(table, 2)}
<h2>Where the time goes</h2>{shown(steps, 2)}
<p class="muted">Steps are timed on one thread, as on several those of different prompts run side by side. A large matrix product runs at {about['gemm_gmacs']:.0f} G multiply-adds a second here.</p>
<h3>Files</h3><ul class="files"><li><a href="bench.csv">bench.csv</a></li><li><a href="bars.csv">bars.csv</a></li>
<li><a href="profile.csv">profile.csv</a></li><li><a href="bench.json">bench.json</a></li></ul>
<h3>Provenance</h3>{provenance_list(about)}</main></body></html>
"""
