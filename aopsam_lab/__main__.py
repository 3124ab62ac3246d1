"""The command line: `python -m aopsam_lab segment | download | find-masks | train-predictor`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.data.images import find_images
from aopsam_lab.detector import load_detector
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import segment
from aopsam_lab.pipeline.show import save
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.download import CACHE_VARIABLE, OFFICIAL, download
from aopsam_lab.sam.zoo import MODELS, first_line, load_sam
from aopsam_lab.training import ground_truth
from aopsam_lab.training import predictor as predictor_training

ASF_HELP = {
    "smoothing": "sigma of the Gaussian over the confidence map",
    "confidence": "a prompt's least confidence",
    "spacing": "least distance between prompts",
    "elimination": "a waiting prompt is dropped above this many times a map's mean",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0: done, 1: some images failed, 2: nothing could be done, 130: interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"aopsam_lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aopsam_lab: interrupted; the files written so far are whole.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Automatic prompts for Segment Anything."
    parser = argparse.ArgumentParser(prog="python -m aopsam_lab", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "segment",
        help="find the masks in images",
        description="Writes STEM.json (COCO), STEM_labels.png (16-bit labels) and STEM_overlay.png "
        "for each image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=segment_command)
    add, other = command.add_argument, "weights other than the bundled"
    add("images", nargs="+", metavar="IMAGE", help="image files, folders, or glob patterns")
    add("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--method", default="aop", choices=list(METHODS), help="how prompts are found")
    add("--sam", default="mobile_sam", choices=list(MODELS), help="which SAM")
    add("--checkpoint", metavar="FILE", help=f"SAM {other} or official ones")
    add("--predictor", metavar="FILE", help=f"Prompt Predictor {other} ones")
    add("--detector", metavar="FILE", help=f"YOLOv8 {other} ones: a file, or yolov8n")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--frame", type=int, default=0, metavar="N", help="which image of a stack, from 0")
    for name, default in asdict(AsfParams()).items():
        add(f"--{name}", type=float, default=default, metavar="X", help=ASF_HELP[name])
    about = f"fetch official weights into {CACHE_VARIABLE}, or the system's cache folder"
    command = commands.add_parser("download", help=about, description=about)
    command.set_defaults(run=download_command)
    command.add_argument("names", nargs="+", choices=list(OFFICIAL))
    for name, module in (("find-masks", ground_truth), ("train-predictor", predictor_training)):
        about, raw = module.__doc__ or "", argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=about.partition("\n")[0], formatter_class=raw)
        command.description = about
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


def segment_command(args: argparse.Namespace) -> int:
    """Segment images, write the results, and say which images failed; 1 where some did."""
    params = AsfParams(**{name: getattr(args, name) for name in ASF_HELP})
    args.out.mkdir(parents=True, exist_ok=True)
    sam = load_sam(args.sam, args.checkpoint, args.device)
    needs = METHODS[args.method].needs
    own = args.sam, args.predictor, sam.device
    predictor = load_predictor(*own) if needs == "predictor" else None
    detector = load_detector(args.detector, sam.device) if needs == "detector" else None
    paths, failures = find_images(args.images)
    total = len(paths) + len(failures)
    jobs = list(zip(paths, unique_stems(paths), strict=True))
    for path, stem in tqdm(jobs, desc="segmenting", unit="image", dynamic_ncols=True):
        try:
            found = segment(path, args.method, sam, predictor, detector, params, frame=args.frame)
            save(found, args.out, stem, file_name=path.as_posix())
        except Exception as error:  # whatever one image does, the others are segmented
            known = isinstance(error, (ValueError, OSError))
            reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
            failures.append((str(path), reason))
    print(f"{total - len(failures)} of {total} images segmented, results in {args.out}")
    for name, reason in failures:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def download_command(args: argparse.Namespace) -> int:
    """Fetch official files and print where each lies."""
    for name in dict.fromkeys(args.names):
        print(f"{name}: {download(name)} ({OFFICIAL[name].licence})")
    return 0


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """The stem of each path, with _2, _3, ... where it is taken, whatever its case."""
    stems: dict[str, str] = {}
    for path in paths:
        stem, n = path.stem, 1
        while stem.casefold() in stems:
            n += 1
            stem = f"{path.stem}_{n}"
        stems[stem.casefold()] = stem
    return list(stems.values())


if __name__ == "__main__":
    sys.exit(main())
