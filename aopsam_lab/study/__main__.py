"""`python -m aopsam_lab.study report | index | readme`: make reports, the page of all of them, the README's table."""

from __future__ import annotations

import argparse
import sys

from aopsam_lab.study.page import write_index
from aopsam_lab.study.readme import update_readme


def main(arguments: list[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    command, reports = options.pop("command"), options.pop("reports")
    try:
        if command == "index":
            print(f"Reports: {write_index(reports)}")
        elif command == "readme":
            print(f"Updated {update_readme(options['readme'], reports)}")
        else:
            from aopsam_lab.study.report import run_report

            name = options.pop("name")
            parameters = {key: value for key, value in options.items() if value is not None}
            print(f"Report: {run_report(name, parameters, reports)}")
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """What is not given on the command line is left as the notebook's own parameters have it."""
    top = argparse.ArgumentParser(
        prog="python -m aopsam_lab.study", description="Make the reports."
    )
    commands = top.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report", help="run a notebook and publish it (the main comparison if not named)"
    )
    report.add_argument(
        "name", nargs="?", default="main_comparison", help="a notebook in notebooks/"
    )
    report.add_argument("--sam", help="mobile_sam, vit_b, vit_l or vit_h")
    report.add_argument("--checkpoint", help="the SAM's weights (default: bundled or official)")
    report.add_argument(
        "--predictor", help="a Prompt Predictor's weights (default: the bundled ones)"
    )
    report.add_argument("--detector", help="a YOLOv8's weights (default: the bundled ones)")
    report.add_argument(
        "--methods", type=lambda text: text.split(","), help="names, separated by commas"
    )
    report.add_argument("--dataset", help="photos or the path of a COCO-style folder")
    report.add_argument("--n-images", type=int)
    report.add_argument(
        "--timed-images", type=int, help="images on which each setting runs alone, to be timed"
    )
    report.add_argument("--seed", type=int)
    report.add_argument("--device", help="auto, cpu or cuda")
    for name in ("smoothing", "confidence", "spacing", "elimination"):
        report.add_argument(f"--{name}", type=float)
    index = commands.add_parser("index", help="rewrite reports/index.html")
    readme = commands.add_parser("readme", help="write the results into the README")
    readme.add_argument("--readme", default="README.md")
    for command in (report, index, readme):
        command.add_argument(
            "--reports", default="reports", help="the folder of all reports (default: reports)"
        )
    return top


if __name__ == "__main__":
    raise SystemExit(main())
