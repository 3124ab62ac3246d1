"""The command line: `python -m aopsam_lab segment | download | find-masks | train-predictor`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from aopsam_lab.asf import AsfParams
from aopsam_lab.cluster import add_arguments, connected, see
from aopsam_lab.command import in_one_line
from aopsam_lab.data.images import find_images
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles, segment
from aopsam_lab.pipeline.show import save
from aopsam_lab.pipeline.types import MaskParams
from aopsam_lab.sam.download import CACHE_VARIABLE, OFFICIAL, download
from aopsam_lab.sam.zoo import MODELS, first_line
from aopsam_lab.training import ground_truth
from aopsam_lab.training import predictor as predictor_training

HELP = {
    "smoothing": "sigma of the Gaussian over the confidence map",
    "confidence": "a prompt's least confidence",
    "spacing": "least distance between prompts",
    "elimination": "a waiting prompt is dropped above this many times a map's mean",
    "points_per_side": "of a grid; None: the method's own",
    "pred_iou_thresh": "a mask's least predicted IoU; None: the SAM's own",
    "stability_score_thresh": "a mask's least stability score; None: the SAM's own",
    "box_nms_thresh": "of two masks whose boxes have a higher IoU the surer one stays",
    "crop_n_layers": "layers of crops on which a grid is laid as well",
    "min_mask_region_area": "pixels; smaller holes and islands of a mask go",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0: done, 1: some images failed, 2: nothing could be done, 130: interrupted."""
    args = _parser().parse_args(argv)
    kept = "the files written so far are whole."
    return in_one_line("aopsam_lab", lambda: args.run(args), kept)


def _parser() -> argparse.ArgumentParser:
    about = "Automatic prompts for Segment Anything."
    parser = argparse.ArgumentParser(prog="python -m aopsam_lab", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "segment",
        help="find the masks in images",
        description="Writes STEM.json (COCO), STEM_labels.png (16-bit labels) and STEM_overlay.png "
        "for each image, unless STEM.json is there from the same file, parameters and weights.",
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
    add_arguments(command)
    for field in fields(AsfParams) + fields(MaskParams):
        name, kind = field.name.replace("_", "-"), int if "int" in str(field.type) else float
        add(f"--{name}", type=kind, default=field.default, metavar="X", help=HELP[field.name])
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
    params = AsfParams(*(getattr(args, field.name) for field in fields(AsfParams)))
    method = args.method
    quality = {field.name: getattr(args, field.name) for field in fields(MaskParams)}
    args.out.mkdir(parents=True, exist_ok=True)
    own = args.sam, args.checkpoint, args.predictor, args.detector, args.device
    files = ModelFiles(*own, frozenset({METHODS[method].needs}))
    models = files.load()
    more = {**quality, "frame": args.frame}
    used = {name: getattr(params, name) for name in METHODS[method].uses} | more
    info = {"method": method, "parameters": used, "weights": models.weights()}
    paths, failures = find_images(args.images)
    total = len(paths) + len(failures)
    stems = dict(zip(paths, unique_stems(paths), strict=True))
    todo = [path for path in paths if not is_done(path, args.out / f"{stems[path]}.json", info)]
    before, out = len(paths) - len(todo), args.out.absolute()
    bar = tqdm(paths, "segmenting", unit="image", initial=before, dynamic_ncols=True)
    with connected(args.scheduler, files, models) as crew, bar:
        see(crew, out, map(Path.absolute, todo))
        same = out, params, more, info
        jobs = ((path, path.absolute(), stems[path], *same) for path in todo)
        for (path, *_), error in crew.each(segment_one, jobs):
            bar.update()
            if error is not None:  # whatever one image does, the others are segmented
                known = isinstance(error, (ValueError, OSError))
                reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
                failures.append((str(path), reason))
    done = f"{total - len(failures)} of {total} images segmented, {before} of them before"
    print(f"{done if before else done.partition(',')[0]}, results in {args.out}")
    for name, reason in failures:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def segment_one(models: LoadedModels, job: tuple) -> None:
    """Segment an image and write its files, perhaps as a worker."""
    name, path, stem, out, params, more, info = job
    own = models.sam, models.predictor, models.detector
    found = segment(path, info["method"], *own, params, **more)
    save(found, out, stem, name.as_posix(), **info)


def is_done(path: Path, file: Path, info: dict) -> bool:
    """Whether a JSON was written after the image, from it, with this method and these weights."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        same = written["info"] == written["info"] | info
        same &= written["images"][0]["file_name"] == path.as_posix()
        return same and file.stat().st_mtime >= path.stat().st_mtime
    except (OSError, ValueError, LookupError, TypeError):
        return False


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
