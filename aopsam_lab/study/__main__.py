"""`python -m aopsam_lab.study report | index | readme`: reports, their page, the README's table."""

import argparse
from collections.abc import Callable
from typing import Any

from aopsam_lab.command import in_one_line
from aopsam_lab.study import sweeps
from aopsam_lab.study.report import run_report, update_readme, write_index

PARAMETERS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("sam", "checkpoint", "predictor", "detector", "dataset", "device"), str),
    "scheduler": str,
    **dict.fromkeys(("n-images", "timed-images", "seed"), int),
    **dict.fromkeys(sweeps.SWEPT, float),
    "methods": lambda text: text.split(","),
}
ABOUT = """The parameters are those of the notebook; its first cell says what each is, and has the
value of what is not given. --methods: names, separated by commas. --dataset: photos, the path of a
COCO-style folder, or coco:PATH, lvis:PATH, sa1b:PATH."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, 1 where it failed, 130 where it was interrupted."""
    parser = argparse.ArgumentParser("python -m aopsam_lab.study", description="Make the reports.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="run a notebook and publish it", epilog=ABOUT)
    report.add_argument("name", nargs="?", default="main_comparison", help="of notebooks/")
    for name, kind in PARAMETERS.items():
        report.add_argument(f"--{name}", type=kind)
    index = commands.add_parser("index", help="rewrite reports/index.html")
    readme = commands.add_parser("readme", help="write the results into the README")
    readme.add_argument("--readme", default="README.md")
    for each in (report, index, readme):
        each.add_argument("--reports", default="reports", help="the folder of all reports")
    options = vars(parser.parse_args(arguments))
    kept = "the scores so far are kept, the same command goes on from there."
    return in_one_line("error", lambda: _run(**options), kept, failed=1)


def _run(command: str, reports: str, name: str = "", readme: str = "", **options: Any) -> None:
    if command == "index":
        print(f"Reports: {write_index(reports)}")
    elif command == "readme":
        print(f"Updated {update_readme(readme, reports)}")
    else:
        parameters = {key: value for key, value in options.items() if value is not None}
        print(f"Report: {run_report(name, parameters, reports)}")


if __name__ == "__main__":
    raise SystemExit(main())
