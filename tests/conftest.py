"""MobileSAM with a photograph, and a small random Sam with a small data set."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from small import build_small_sam, corners, write_coco, write_weights

from aopsam_lab.data import open_dataset
from aopsam_lab.pipeline.decode import encode
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.zoo import SamSpec, load_sam
from aopsam_lab.study import PACKAGE_ROOT, report
from aopsam_lab.study.runner import run_study

SIDE = 48
METHODS = ["aop_no_af", "aop"]
# random weights give a map of about one value everywhere: a wide spacing keeps the prompts few
QUICK = {"confidence": 0.0, "spacing": 60.0, "timed_images": 0, "memory": False, "progress": False}


NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def sam():
    """MobileSAM. An image takes 1.5 s to encode on two idle cores, a prompt 12 ms."""
    return load_sam(device="cpu")


@pytest.fixture(scope="session")
def predictor():
    return load_predictor(device="cpu")


@pytest.fixture(scope="session")
def sample():
    """A photograph of the box: 427 x 640 pixels, eight objects."""
    return open_dataset("photos")[6]


@pytest.fixture(scope="session")
def photo(sam, sample):
    return encode(sam, sample.image)


@pytest.fixture(scope="session")
def small_sam():
    """All its masks pass."""
    torch.manual_seed(0)
    built = build_small_sam()
    built.spec = SamSpec("mobile_sam", -1e9, 0.0, "0" * 64)
    return built.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="session")
def small_predictor(weights):
    return load_predictor("small", weights["predictor"], "cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """14 small images of two squares; the last has no masks."""
    images, annotations = {}, {}
    for i in range(14):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        name = f"{i:02d}.png"
        images[name], annotations[name] = image, []
        for x, y in rng.integers(2, SIDE - 14, (2, 2)) if i < 13 else ():
            image[y : y + 12, x : x + 12] = rng.integers(90, 255, 3)
            annotations[name].append({"segmentation": corners(x, y, 12)})
    return write_coco(tmp_path_factory.mktemp("data") / "squares", images, annotations)


@pytest.fixture
def study(weights, folder, tmp_path):
    """A study of changes: two methods on three small images, few prompts, nothing timed."""

    def run(**changes):
        arguments = {"methods": METHODS, "dataset": folder, "n_images": 3, "out": tmp_path / "out"}
        return run_study(**{**arguments, "thresholds": (), **QUICK, **weights, **changes})

    return run


def row(image: str, method: str, miou: float | None, **values) -> dict:
    """A row of scores as the study makes it; no mIoU is no ground truth."""
    row = {"image": image, "method": method, "miou": miou, "miou_best": miou, "n_masks": 4}
    row |= {"n_truth": 0 if miou is None else 2, "n_sampled": 10, "n_decoded": 10}
    return {**row, "n_eliminated": 0, **values}


def parameters(notebook: str) -> dict:
    """The values in a notebook's one cell tagged parameters."""
    cells = nbformat.read(PACKAGE_ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    values: dict = {}
    exec(cell.source, values)
    return values


def part(*asked) -> str:
    """A part of a report on one line, its style aside."""
    return " ".join(report.part(*asked).split("</style>")[1].split())


def kill_after(code: str, store: Path, rows: int) -> dict[str, tuple]:
    """What a store holds after a process ran code and was killed once there were so many rows."""
    path = os.pathsep.join([str(PACKAGE_ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-c", f"import small; {code}"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while len(stored(store)) < rows:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    return stored(store)


def stored(path: Path) -> dict[str, tuple]:
    """What a store holds, read by another process: values and time of scoring by key."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        try:
            rows = connection.execute("SELECT key, vals, scored_at FROM scores").fetchall()
        except sqlite3.OperationalError:  # the table is not there yet
            rows = []
    return {key: values for key, *values in rows}
