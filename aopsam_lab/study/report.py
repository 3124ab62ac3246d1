"""What is written of a study: tables, figures, executed notebooks, their page, README's table."""

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from aopsam_lab.files import write_atomically
from aopsam_lab.study import PACKAGE_ROOT, figures, paper, sweeps, tables
from aopsam_lab.study.runner import StudyResult
from aopsam_lab.study.settings import REFERENCE, package_environment

START, END = "<!-- results: main_comparison -->", "<!-- end of results -->"
README_COLUMNS = (
    "Method", "mIoU %", "Δ to AoP-SAM", "Prompts decoded", "Masks", "Inf_Lat ms", "Mask_Lat ms",
    "Peak MiB",
)  # fmt: skip

# what a notebook's parameter may be, by its annotation
_KINDS: dict[str, Any] = {"str": (str, os.PathLike), "int": int, "float": (int, float)}
_KINDS |= {"bool": bool, "list": (list, tuple)}


def save_study(
    result: StudyResult, name: str = "main_comparison", shown: Sequence[str] = ("aop", "amg_d")
) -> dict[str, Path]:
    """Write a study, a report's `name`, to its folder; of the methods `shown` masks are drawn."""
    methods = result.summary["method"].tolist()
    shown = [method for method in shown if method in methods] or methods[:2]
    contents = {
        f"{name}.csv": result.summary,
        f"{name}_differences.csv": result.differences,
        "per_image.csv": result.per_image,
        f"{name}.png": figures.tradeoff_figure(result.summary),
        "examples.png": figures.examples_figure(result.examples, shown),
        "provenance.json": result.provenance,
    }
    if not result.curves.empty:
        summary = tables.curve_summary(result.curves)
        contents |= {
            "thresholds.csv": summary,
            "thresholds_per_image.csv": result.curves,
            "equal_masks.csv": tables.equal_masks(result.curves),
            "thresholds.png": figures.curve_figure(summary),
        }
    return write_all(result.out, contents)


def save_sweeps(result: sweeps.SweepResult) -> dict[str, Path]:
    """Write what sweeps found to the study's folder."""
    contents = {
        "parameter_sweeps.csv": result.table,
        "trends.csv": result.trends,
        "paper_signs.csv": result.signs,
        "budgets.csv": result.budgets,
        "per_image.csv": result.study.per_image,
        "parameter_sweeps.png": figures.sweep_figure(result.table),
        "joint.png": figures.joint_figure(result.table),
        "provenance.json": result.study.provenance,
    }
    return write_all(result.study.out, contents)


def write_all(
    folder: str | os.PathLike, contents: Mapping[str, pd.DataFrame | Figure | dict[str, Any]]
) -> dict[str, Path]:
    """Write tables, figures and dictionaries to a folder; the paths by the files' names."""
    paths = {}
    for file, content in contents.items():
        if isinstance(content, pd.DataFrame):  # six significant digits, NaN as an empty field
            data = content.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        elif isinstance(content, Figure):
            data = figures.png(content)
        else:
            data = json.dumps(content, indent=2) + "\n"
        paths[file] = write_atomically(Path(folder) / file, data)
    return paths


def run_report(
    name: str, parameters: Mapping[str, Any], reports: str | os.PathLike = "reports"
) -> Path:
    """Execute `notebooks/<name>.ipynb` into `reports/<name>/` and rewrite `reports/index.html`.

    Where a cell fails (RuntimeError), `<name>.failed.ipynb` holds what ran before it.
    """
    import nbformat
    import papermill
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    source = PACKAGE_ROOT / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(f"There is no notebook {source}: reports need a checkout.")
    folder = Path(reports) / name
    folder.mkdir(parents=True, exist_ok=True)
    failed = folder / f"{name}.failed.ipynb"
    failed.unlink(missing_ok=True)
    # its own SIGINT handler would kill the kernel and go on
    events = asyncio.SelectorEventLoop
    own_handler = patch.object(events, "add_signal_handler", side_effect=RuntimeError)
    environment = package_environment() | {"AOPSAM_PROGRESS": "text"}
    # elsewhere, as another run in this folder may be waiting; and papermill fills {} in a path
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, source.name)
        try:
            with patch.dict(os.environ, environment), own_handler:
                papermill.execute_notebook(
                    source,
                    made,
                    {"out": str(folder), **parameters},
                    progress_bar=False,  # the notebook's own bar says more
                    stdout_file=sys.stderr,
                    stderr_file=sys.stderr,
                    extra_arguments=["--log-level=CRITICAL"],  # Ctrl-C is an error there
                )
        except papermill.PapermillExecutionError as error:
            write_atomically(failed, made.read_bytes())
            where = f"Cell {error.exec_count} of {name} failed, see {failed}"
            raise RuntimeError(f"{where}: {error.ename}: {error.evalue}") from error
        notebook = nbformat.read(made, as_version=4)
    # of progress bars the last state, and no path of this machine
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    for key in ("input_path", "output_path"):
        notebook.metadata.papermill.pop(key, None)
    write_atomically(folder / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    exporter = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
    # the template's loader of diagrams names a server
    loader = r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>'
    write_atomically(folder / f"{name}.html", re.sub(loader, "", body, flags=re.S))
    return write_index(reports)


def check_parameters(values: Mapping[str, Any]) -> None:
    """Check a notebook's parameters, and what papermill made of them; ValueError names a wrong one.

    Args:
        values: `globals()` of the notebook. Its cells say which parameters and types there are.
    """
    cells = values["In"]
    known = re.findall(r'^(\w+): (\w+) = (\[\s*")?', "\n".join(cells), re.M)
    names = [name for name, *_ in known]
    by_papermill = "\n".join(cell for cell in cells if cell.startswith("# Parameters\n"))
    for name in re.findall(r"^(\w+) = ", by_papermill, re.M):
        if name not in names:
            raise ValueError(f"There is no parameter {name!r}. Choose from {', '.join(names)}.")
    advice = {"str": "papermill's -r keeps a text", "list": "papermill's -y reads [a, b]"}
    for name, kind, texts in known:
        value, fits = values[name], (_KINDS[kind], str if texts else ())
        truth = isinstance(value, bool) and kind != "bool"
        if value is not None and (truth or not isinstance(value, fits)):
            wrong = f"{name} is {value!r}, but its type is {kind}"
            raise ValueError(f"{wrong} ({advice[kind]})." if kind in advice else f"{wrong}.")


def write_index(reports: str | os.PathLike) -> Path:
    """(Re)write `index.html` from the reports in a folder, which have a provenance.json each."""
    reports = Path(reports)
    names = [path.parent.name for path in reports.glob("*/provenance.json")]
    names.sort(key=lambda name: (name != "main_comparison", name))
    found = []
    for name in names:
        folder = reports / name
        read = {file.stem: pd.read_csv(file) for file in folder.glob("*.csv")}
        files = {file.name for file in folder.iterdir()}
        found.append({"name": name, "files": files, "tables": read, "facts": _facts(folder)})
    page = _PAGES.get_template("index.html").render(reports=found)
    return write_atomically(reports / "index.html", page)


def part(name: str, *arguments: object) -> str:
    """HTML of a macro of `templates/parts.html`, for a notebook's output."""
    return f"{_PARTS['style']()}{_PARTS[name](*arguments)}"


def update_readme(
    readme: str | os.PathLike = "README.md", reports: str | os.PathLike = "reports"
) -> Path:
    """Write the table of the main comparison between the lines START and END of the README."""
    readme, folder = Path(readme), Path(reports) / "main_comparison"
    if not (folder / "main_comparison.csv").is_file():
        raise FileNotFoundError(f"{folder} has no main_comparison.csv. Run `make study` first.")
    text = readme.read_text(encoding="utf-8")
    if re.findall(f"{START}|{END}", text) != [START, END]:
        raise ValueError(f"{readme} must have the line {START}, then the line {END}, once each.")
    names = ("main_comparison.csv", "main_comparison_differences.csv")
    table = tables.results_for_people(*(pd.read_csv(folder / name) for name in names))
    table = table[list(README_COLUMNS)]
    own = table["Method"] == tables.title(REFERENCE)
    table[own] = "**" + table[own] + "**"
    rows = [table.columns, [":--", *["--:"] * (len(README_COLUMNS) - 1)], *table.to_numpy()]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    facts = _facts(folder)
    about = " ".join(_PARTS["what_was_run"](facts).split())  # escaped
    written = f"{lines}\n\n{about} Commit {facts['commit'][:10]}."
    text = re.sub(f"{START}.*{END}", lambda _: f"{START}\n{written}\n{END}", text, flags=re.S)
    return write_atomically(readme, text)


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))


_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("aopsam_lab.study"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_PAGES.globals |= {"paper": paper, "sweeps": sweeps, "tables": tables, "abs": abs}
_PARTS = vars(_PAGES.get_template("parts.html").module)
