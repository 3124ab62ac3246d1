"""Training: the Prompt Predictor, the detector, their ground truth, and what both share."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from aopsam_lab.data import Dataset
from aopsam_lab.files import write_atomically


def split(data: Dataset) -> tuple[list[int], list[int]]:
    """The rows of a data set to train on, and an eighth that is held out; neither is empty.

    A hash of the image's name decides, so more photographs change nothing for those before.
    """
    data.require_masks()
    parts: tuple[list[int], list[int]] = [], []
    for i, name in enumerate(data.ids):
        digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        parts[digest % 8 == 0].append(i)
    if not all(parts):
        few = "too few to train on some and hold some out."
        raise ValueError(f"{data.name} has {len(data)} photographs: {few}")
    return parts


def write_card(
    weights: Path, summary: str, facts: dict[str, str], curve: list[dict], about_curve: str
) -> None:
    """Write the model card NAME.md beside NAME.safetensors, with ten rows of the learning curve."""
    size = weights.stat().st_size / 1e6
    lines = [f"# {weights.name}", "", summary, "", f"- **File**: {size:.1f} MB, float16"]
    lines += [f"- **{name}**: {text}" for name, text in facts.items()]
    shown = np.linspace(0, len(curve) - 1, min(10, len(curve))).round().astype(int)
    cells = [[f"{value:.4g}" for value in curve[i].values()] for i in shown]
    table = [f"| {' | '.join(row)} |" for row in (curve[0], ["--:"] * len(curve[0]), *cells)]
    lines += ["", f"Learning curve ({about_curve}):", "", *table, ""]
    write_atomically(weights.with_suffix(".md"), "\n".join(lines))


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows, numbers with four decimals, to a CSV file, old or new, of the same columns."""
    table = pd.DataFrame(rows)
    if path.exists() and list(pd.read_csv(path, nrows=0)) != list(table):
        raise ValueError(f"{path} has other columns than {', '.join(table)}; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(path, mode="a", header=not path.exists(), index=False)
