"""reports/index.html: every report on one static page, without anything from outside."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from aopsam_lab.files import write_atomically
from aopsam_lab.study import beside_paper, tables, thresholds
from aopsam_lab.study.output import TABLE_STYLE, html_table
from aopsam_lab.study.paper import CITATION

TITLES = {
    "main_comparison": "Main comparison",
    "ablation": "Ablation: what each part gives",
    "parameter_sweeps": "Parameter sweeps: what each knob does",
    "benchmark": "Benchmark: the same masks as segment_anything's, in less time",
}
FILE_TITLES = (
    ("{name}.html", "the notebook, executed"),
    ("{name}.ipynb", "as .ipynb"),
    ("{name}.csv", "results (CSV)"),
    ("{name}_differences.csv", "differences to AoP-SAM (CSV)"),
    ("trends.csv", "trends (CSV)"),
    ("paper_signs.csv", "signs beside the paper's (CSV)"),
    ("budgets.csv", "best settings (CSV)"),
    ("per_image.csv", "every image (CSV)"),
    ("thresholds.csv", "looser thresholds (CSV)"),
    ("thresholds_per_image.csv", "looser thresholds, every image (CSV)"),
    ("equal_masks.csv", "at equal masks kept (CSV)"),
    ("provenance.json", "provenance (JSON)"),
)

STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --muted: #5f6368; --rule: #d9dce0; --link: #00588a; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Noto Sans", "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 80rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3.5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.6rem; }
h2 { font-size: 1.45rem; line-height: 1.25; letter-spacing: -0.01em; margin: 3rem 0 0.4rem; padding-top: 1.6rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
p, ul { max-width: 44rem; margin: 0.5rem 0; }
.lead { font-size: 1.1rem; }
.muted, figcaption, footer { color: var(--muted); font-size: 0.875rem; }
ul { padding-left: 1.1rem; }
li { margin: 0.3rem 0; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 0.15em; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
.beside { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 2.5rem; margin-top: 1.5rem; }
.beside h3 { margin-top: 0; }
.beside .results td { white-space: normal; }
.files { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; padding: 0; list-style: none; max-width: none; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.25rem 1.5rem; font-size: 0.875rem;
  margin: 0.5rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
footer { margin-top: 4rem; padding-bottom: 3rem; }
@media (max-width: 52rem) { .beside { grid-template-columns: minmax(0, 1fr); } dl { grid-template-columns: 1fr; }
  dt { margin-top: 0.4rem; } }
"""


def write_index(reports: str | os.PathLike) -> Path:
    """(Re)write `index.html` in the folder `reports` from the reports in it; its path.

    A report is a folder with `provenance.json` in it; its table, figure and other files are named after the folder.
    """
    reports = Path(reports)
    names = sorted(path.parent.name for path in reports.glob("*/provenance.json"))
    names.sort(key=lambda name: name != "main_comparison")  # the others after it, by name
    sections = "\n".join(_section(reports / name) for name in names)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>aopsam_lab: reports</title>
<style>{STYLE}{TABLE_STYLE}</style>
</head>
<body>
<header>
<h1>Automatic prompts for Segment Anything, measured</h1>
<p class="lead">AoP-SAM asks a small network where prompts are worth decoding. These reports measure what that gives
against a grid of points and against a detector, with the same model, pictures and filters for all.</p>
</header>
<main>
{sections or "<p>There are no reports yet. <code>make study</code> writes the first.</p>"}
</main>
<footer><p>The paper: {html.escape(CITATION)}.</p></footer>
</body>
</html>
"""
    return write_atomically(reports / "index.html", page)


def _section(folder: Path) -> str:
    name = folder.name
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    parts = [
        f'<section id="{html.escape(name)}">',
        f"<h2>{html.escape(TITLES.get(name, name.replace('_', ' ').capitalize()))}</h2>",
    ]
    parts.append(f"<p>{html.escape(what_was_run(provenance))}</p>")
    if (folder / f"{name}.csv").exists() and (folder / f"{name}_differences.csv").exists():
        parts.append(_results(folder))
    elif (folder / f"{name}.csv").exists() and (folder / "trends.csv").exists():
        parts.append(_sweeps(folder))
    elif (folder / f"{name}.png").exists():
        title = html.escape(TITLES.get(name, name))
        parts.append(f'<figure><img src="{name}/{name}.png" loading="lazy" alt="{title}"></figure>')
    parts.append(_files(folder))
    parts.append(f"<h3>Provenance</h3>{provenance_list(provenance)}</section>")
    return "\n".join(parts)


def _results(folder: Path) -> str:
    name = folder.name
    summary, differences = (
        pd.read_csv(folder / f"{name}.csv"),
        pd.read_csv(folder / f"{name}_differences.csv"),
    )
    table = html_table(
        tables.results_for_people(summary, differences), highlight=tables.title(tables.REFERENCE)
    )
    sentences = "".join(
        f"<li>{html.escape(text)}</li>" for text in tables.findings(summary, differences)
    )
    examples = ""
    if (folder / "examples.png").exists():
        examples = (
            f'<h3>The first images</h3><figure><img src="{name}/examples.png" loading="lazy" '
            'alt="Example images with the true masks and the masks of two methods"><figcaption>White dots: prompts '
            "that gave a mask that was kept. Orange crosses: prompts eliminated before they were decoded.</figcaption>"
            "</figure>"
        )
    return f"""<div class="results">{table}</div>
<p class="muted">{html.escape(COLUMN_NOTES)}</p>
<div class="beside">
<figure><img src="{name}/{name}.png" alt="mIoU of each method against the prompts it decodes"></figure>
<div><h3>What the numbers say</h3>
<ul>{sentences}</ul></div>
</div>
{_thresholds(folder)}{_beside_paper(folder, summary)}{examples}"""


def _thresholds(folder: Path) -> str:
    """The figure of looser thresholds, and the comparison at equal masks; "" without it."""
    if not (folder / "thresholds.png").exists():
        return ""
    equal = thresholds.equal_sentences(pd.read_csv(folder / "equal_masks.csv"))
    items = "".join(f"<li>{html.escape(text)}</li>" for text in equal)
    return (
        f'<h3>Looser thresholds</h3><figure><img src="{folder.name}/thresholds.png" loading="lazy" '
        'alt="mIoU and recall of each method against masks kept, at five pairs of thresholds">'
        f"<figcaption>{html.escape(THRESHOLD_NOTES)}</figcaption></figure><ul>{items}</ul>\n"
    )


def _beside_paper(folder: Path, summary: pd.DataFrame) -> str:
    """The paper's table of the same report beside ours; "" for other reports."""
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    if folder.name == "main_comparison":
        text = beside_paper.main_comparison(summary, provenance)
    elif folder.name == "ablation":
        text = beside_paper.ablation(summary, pd.read_csv(folder / "per_image.csv"), provenance)
    else:
        return ""
    return f"<h3>Beside the paper</h3>{text}"


def _sweeps(folder: Path) -> str:
    from aopsam_lab.study import sweeps  # it runs studies, and so needs all that they need

    name = folder.name
    table = pd.read_csv(folder / f"{name}.csv")
    trends = pd.read_csv(
        folder / "trends.csv", keep_default_na=False, na_values={"change_lo": "", "change_hi": ""}
    )
    knobs = "\n".join(
        f'<h3>{html.escape(knob.capitalize())}</h3><div class="results">'
        f"{html_table(sweeps.knob_for_people(table, knob), highlight=_default_value(table, knob))}</div>"
        for knob in dict.fromkeys(table["knob"])
    )
    sentences = "".join(f"<li>{html.escape(text)}</li>" for text in sweeps.trend_sentences(trends))
    signs = folder / "paper_signs.csv"
    beside = ""
    if signs.exists():
        beside = f"<h3>Beside the paper</h3>{beside_paper.signs(pd.read_csv(signs))}"
    budgets = sweeps.budgets_for_people(pd.read_csv(folder / "budgets.csv"))
    return f"""<figure><img src="{name}/{name}.png" alt="mIoU and number of masks along each knob"><figcaption>
{html.escape(SWEEP_NOTES)}</figcaption></figure>
<h3>What the numbers say</h3>
<ul>{sentences}</ul>
{beside}{knobs}
<p class="muted">{html.escape(COLUMN_NOTES)}</p>
<h3>All settings at once</h3>
<figure><img src="{name}/joint.png" width="820" alt="mIoU against time, every setting a mark, and the Pareto front"></figure>
<h3>The best setting within a budget</h3>
<div class="results">{html_table(budgets, text_columns=2)}</div>
<p class="muted">{html.escape(BUDGET_NOTES)}</p>"""


def _default_value(table: pd.DataFrame, knob: str) -> str | None:
    values = table.loc[(table["knob"] == knob) & table["is_default"], "value"]
    return None if values.empty else f"{values.iloc[0]:g}"


SWEEP_NOTES = (
    "One knob at a time, the others at their defaults; filled marks are the default. The band around mIoU is the 95% "
    "interval of its paired difference to the default: where it does not hold the default's mIoU, the knob makes a "
    "difference. Dashed: the paper's curves, of other pictures, so compare their course and not "
    "their height."
)
BUDGET_NOTES = (
    "Of all settings tried, each held to so many decoded prompts an image, the one with the highest mIoU. It was "
    "chosen on the pictures it is measured on, so expect a little less on others. max_prompts holds whatever the setting."
)
THRESHOLD_NOTES = (
    "Each method's prompts are decoded once, and their masks filtered at pairs of predicted IoU "
    "and stability: SAM's own (filled), then looser ones. The prompts are the same at all pairs: "
    "adaptive filtering eliminates by the masks that pass SAM's own. At equal masks kept: read "
    "off the mean curve, a straight line between two pairs."
)
COLUMN_NOTES = (
    "mIoU: each true mask with at most one prediction, matched greedily by IoU, unmatched truth counting 0; mean over "
    "an image's truths, then over images. Brackets: 95% bootstrap intervals over images; Δ is paired, image by image, "
    "in points. Best match: truths may share a prediction. "
    "AR@100, AR@1000: COCO's average recall (IoU 0.50 to 0.95) of the best masks, whatever their "
    "class, over all ground-truth masks. Coverage, where shown: the share of the masks that SAM "
    "itself found from a 64 x 64 grid that any mask reaches with an IoU of 0.75; mean over images. "
    "Inf_Lat: embedding and picture in, prompts out. Mask_Lat: "
    "prompts in, filtered masks out. Total: both and the image encoder. Times and counts are means per image. Peak: "
    "memory beyond the loaded models, in a process of its own (on CUDA the whole peak allocation)."
)


def what_was_run(provenance: dict[str, Any]) -> str:
    """One sentence: which model on which pictures, on what machine."""
    parameters, dataset = provenance["parameters"], provenance["dataset"]
    images = f"{dataset['images']} images of {dataset['name']} (seed {parameters['seed']})"
    names = ("smoothing", "confidence", "spacing", "elimination", "grid")
    values = [f"{name} {_short(parameters[name])}" for name in names if name in parameters]
    return (
        f"SAM “{parameters['sam']}” on {images}, {provenance['processor']}; "
        f"{', '.join(values)}.{_timed(parameters)}"
    )


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _timed(parameters: dict[str, Any]) -> str:
    """A sentence where times come from fewer images than scores do."""
    timed = parameters.get("timed_images", parameters.get("n_images"))
    if timed == parameters.get("n_images"):
        return ""
    return (
        " Scores come from runs that share embeddings, confidence maps and decoded prompts; times from separate runs "
        f"of each setting alone, with nothing shared, on the first {timed} of these images."
    )


def provenance_list(provenance: dict[str, Any]) -> str:
    """The provenance as an HTML definition list, nested dictionaries on one line each."""
    lines = []
    for key, value in provenance.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in value.items())
        else:
            text = _plain(value)
        lines.append(f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(text)}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _files(folder: Path) -> str:
    name = folder.name
    links = [
        f'<li><a href="{name}/{file}">{html.escape(text)}</a></li>'
        for pattern, text in FILE_TITLES
        if (folder / (file := pattern.format(name=name))).exists()
    ]
    return f'<h3>Files</h3><ul class="files">{"".join(links)}</ul>'
