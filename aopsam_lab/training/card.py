"""Model cards of trained weights: what they are, how they came to be, their learning curve."""

from __future__ import annotations

import csv
from pathlib import Path

from aopsam_lab.files import write_atomically

ROWS = 10  # of a curve that a card shows


def write_card(
    weights: Path, summary: str, facts: dict[str, str], curve: Path, about_curve: str
) -> Path:
    """Write ``weights.md`` beside ``weights.safetensors``.

    Args:
        weights: the file of the weights.
        summary: a sentence or two on what they are.
        facts: more of it, by name.
        curve: the learning curve, a CSV.
        about_curve: what its columns are.

    Returns:
        The path of the card.
    """
    size = weights.stat().st_size / 1e6
    lines = [f"# {weights.name}", "", summary, "", f"- **File**: {size:.1f} MB, float16"]
    lines += [f"- **{name}**: {text}" for name, text in facts.items()]
    lines += ["", f"Learning curve ({about_curve}):", "", *_table(curve), ""]
    return write_atomically(weights.with_suffix(".md"), "\n".join(lines))


def _table(path: Path) -> list[str]:
    """A CSV as a Markdown table of at most ROWS lines, the first and the last among them."""
    with path.open(newline="") as file:
        header, *lines = list(csv.reader(file))
    if len(lines) > ROWS:
        lines = [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]
    lines = [[f"{float(cell):.4g}" for cell in cells] for cells in lines]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["--:"] * len(header), *lines)]
