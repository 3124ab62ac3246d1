"""Run a report's notebook through papermill and publish what comes of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

from aopsam_lab.files import write_atomically
from aopsam_lab.study import PACKAGE_ROOT
from aopsam_lab.study.page import write_index
from aopsam_lab.study.settings import package_environment


def run_report(
    name: str, parameters: Mapping[str, Any], reports: str | os.PathLike = "reports"
) -> Path:
    """Execute `notebooks/<name>.ipynb` into `reports/<name>/` and rewrite `reports/index.html`; the latter's path.

    Written are the executed notebook, the same as HTML, and what the notebook itself writes to its `out`, which is that
    folder unless `parameters` has another. Progress goes to standard error.
    Raises FileNotFoundError where the notebook is not there, RuntimeError where a cell fails; the notebook as far as it
    came is then in `<name>.failed.ipynb`.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source = PACKAGE_ROOT / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        raise FileNotFoundError(
            f"There is no notebook {source}. Reports are made from a checkout of the project."
        )
    folder = Path(reports) / name
    folder.mkdir(parents=True, exist_ok=True)
    target, failed = folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb"
    running = folder / f".{name}.running.ipynb"
    try:
        with _kernel_environment():
            papermill.execute_notebook(
                str(source),
                str(running),
                {"out": str(folder), **parameters},
                progress_bar=False,  # the notebook's own bar says more
                stdout_file=sys.stderr,
                stderr_file=sys.stderr,
                extra_arguments=[
                    "--log-level=ERROR"
                ],  # the kernel would warn that it listens on the local machine
            )
        notebook = nbformat.read(running, as_version=4)
    except PapermillExecutionError as error:
        os.replace(running, failed)
        raise RuntimeError(
            f"Cell {error.exec_count} of {name} failed, see {failed}: {error.ename}: {error.evalue}"
        ) from error
    finally:
        running.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    tidy(notebook)
    write_atomically(target, nbformat.writes(notebook) + "\n")
    write_atomically(folder / f"{name}.html", to_html(notebook, name))
    return write_index(reports)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Take out what is only of the run's moment: progress bars' earlier states, and where files lay on this machine."""
    for key in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(key, None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            before = outputs[-1] if outputs else None
            if output.output_type == "stream" and before and before.get("name") == output.name:
                before.text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output.text = last_states(output.text)
        cell.outputs = [o for o in outputs if o.output_type != "stream" or o.text.strip()]


def last_states(text: str) -> str:
    """Text as a terminal would leave it: of what carriage returns overwrote in a line, only the last."""
    return "\n".join(
        re.split(r"\r(?!$)", line.rstrip("\r"))[-1].rstrip() for line in text.split("\n")
    )


def to_html(notebook: nbformat.NotebookNode, title: str) -> str:
    """The notebook as one HTML file that loads nothing from outside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="lab", mathjax_url="", require_js_url="", mermaid_js_url=""
    )
    exporter.embed_images = True
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    # The template's loader of diagrams names a server, though nothing here has any diagram.
    return re.sub(
        r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', "", body, flags=re.DOTALL
    )


@contextmanager
def _kernel_environment() -> Iterator[None]:
    """For the kernel: the package importable from any folder, progress bars as text."""
    changes = {"PYTHONPATH": package_environment()["PYTHONPATH"], "AOPSAM_PROGRESS": "text"}
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
