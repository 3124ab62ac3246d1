"""The README's results, written from the CSV files so that they cannot drift from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from aopsam_lab.files import write_atomically
from aopsam_lab.study import tables
from aopsam_lab.study.page import what_was_run

START, END = "<!-- results: main_comparison -->", "<!-- end of results -->"
COLUMNS = (
    "Method",
    "mIoU %",
    "Δ to AoP-SAM",
    "Prompts decoded",
    "Masks",
    "Inf_Lat ms",
    "Mask_Lat ms",
    "Peak MiB",
)


def update_readme(
    readme: str | os.PathLike = "README.md", reports: str | os.PathLike = "reports"
) -> Path:
    """Replace what stands between the comment lines START and END in the README by the table of the main comparison.

    Raises FileNotFoundError without the README or the report, ValueError where the two lines are not there once each.
    """
    readme, folder = Path(readme), Path(reports) / "main_comparison"
    if not readme.is_file():
        raise FileNotFoundError(f"There is no {readme}.")
    if not (folder / "main_comparison.csv").is_file():
        raise FileNotFoundError(
            f"{folder} holds no main_comparison.csv yet. Run `make study` first."
        )
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(
            f"{readme} must have the line {START} once and after it the line {END} once."
        )
    before, after = text[: text.index(START)], text[text.index(END) :]
    return write_atomically(readme, f"{before}{START}\n{results_markdown(folder)}\n{after}")


def results_markdown(folder: Path) -> str:
    """The table of a main comparison as Markdown, and a line on how it came about."""
    summary = pd.read_csv(folder / "main_comparison.csv")
    differences = pd.read_csv(folder / "main_comparison_differences.csv")
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    table = tables.results_for_people(summary, differences)[list(COLUMNS)]
    return (
        f"{markdown_table(table)}\n\n{what_was_run(provenance)} Commit {provenance['commit'][:10]}."
    )


def markdown_table(table: pd.DataFrame) -> str:
    """A DataFrame of text as a Markdown table, the first column left-aligned, the row of the reference in bold."""
    own = tables.title(tables.REFERENCE)
    lines = [list(table.columns), [":--", *["--:"] * (table.shape[1] - 1)]]
    for row in table.itertuples(index=False):
        lines.append([f"**{value}**" if row[0] == own else str(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
