"""Model cards of the bundled SAM and Prompt Predictor: what it is, how it came to be, its learning curve (ours)."""

from __future__ import annotations

import csv
from pathlib import Path

from aopsam_lab.files import write_atomically
from aopsam_lab.training.pool import are_scenes


def licence(pools: list[tuple[float, list[Path]]]) -> str:
    """Terms of weights trained on these pools: what is not a rendered scene is a photograph with terms of its own."""
    photos = [paths[0].parent.name for _, paths in pools if not are_scenes(paths)]
    if not photos:
        return "Apache-2.0; trained on rendered scenes alone"
    return f"for research and education: photographs ({', '.join(photos)}) were among the training data, under their own terms"


def curve_table(path: Path, rows: int = 14) -> list[str]:
    """A CSV learning curve as a Markdown table of at most ``rows`` lines, the first and the last among them."""
    with open(path, newline="") as file:
        header, *lines = list(csv.reader(file))
    if len(lines) > rows:
        lines = [lines[round(i * (len(lines) - 1) / (rows - 1))] for i in range(rows)]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]


def read_curve(card: Path) -> list[dict[str, float]]:
    """The rows of a card's learning curve, by column."""
    lines = [[c.strip() for c in line.strip("|\n ").split("|")] for line in card.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], map(float, cells))) for cells in lines[2:]]


def pool_counts(pools: list[tuple[float, list[Path]]]) -> str:
    """``800 of scenes (40%), ...``: how many pictures each pool has, and its share of the draws."""
    total = sum(share for share, _ in pools)
    return ", ".join(f"{len(paths)} of {paths[0].parent.name} ({share / total:.0%} of the draws)" for share, paths in pools)


def write_card(weights: Path, summary: str, facts: dict[str, str], curve: Path, about_curve: str) -> Path:
    """Write ``weights.md`` beside ``weights.safetensors``."""
    size = weights.stat().st_size / 1e6
    lines = [f"# {weights.name}", "", summary, "", f"- **File**: {size:.1f} MB, float16"]
    lines += [f"- **{name}**: {text}" for name, text in facts.items()]
    lines += ["", f"Learning curve ({about_curve}):", "", *curve_table(curve), ""]
    return write_atomically(weights.with_suffix(".md"), "\n".join(lines))
