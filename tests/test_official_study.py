"""A study on data sets as they are published, from the command line's name of one to the tables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from test_published_data import NAMES, TRIANGLE, coco_json, picture, sa1b_files, write_shard

from aopsam_lab.study import page
from aopsam_lab.study.runner import run_study

ROOT = Path(__file__).resolve().parents[1]


def published(kind, folder):
    """A folder of two pictures with masks in the format of `kind`."""
    if kind == "sa1b":
        write_shard(folder / "sa_000000.tar", sa1b_files(NAMES[:2]))
        return
    names = [f"{split}2017/{i:012}.jpg" for i, split in enumerate(("val", "train" if kind == "lvis" else "val"))]
    for i, name in enumerate(names):
        picture(folder / name, i)
    file = folder / ("lvis_v1_val.json" if kind == "lvis" else "annotations/instances_val2017.json")
    images = [{"coco_url": f"http://images.cocodataset.org/{name}"} for name in names]
    if kind == "coco":
        images = [{**image, "file_name": name.split("/")[1]} for image, name in zip(images, names)]
    coco_json(file, images, [{"image_id": i, "segmentation": TRIANGLE} for i in range(2)])


@pytest.mark.parametrize(("kind", "masks"), [("coco", 2), ("lvis", 2), ("sa1b", 4)])
def test_a_study_of_published_data(tmp_path, kind, masks):
    published(kind, tmp_path / kind)
    result = run_study(
        sam="tiny",
        methods=["aop_no_as_af"],
        dataset=f"{kind}:{tmp_path / kind}",
        n_images=2,
        device="cpu",
        out=tmp_path / "out",
        memory=False,
        progress=False,
    )
    assert len(result.per_image) == 2 and result.per_image["n_truth"].sum() == masks
    assert result.provenance["dataset"]["masks"] == masks and result.provenance["dataset"]["missing_images"] == 0


def test_make_hands_the_data_over():
    arguments = ["SAM=vit_h", "DATASET=lvis", "DATA=some/where", "PREDICTOR=p.safetensors", "DETECTOR=yolov8n", "N=7"]
    run = subprocess.run(["make", "-n", "study", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = " ".join(run.stdout.replace("\\\n", " ").split())
    wanted = ("--sam 'vit_h'", "--dataset 'lvis:some/where'", "--predictor 'p.safetensors'", "--detector 'yolov8n'")
    for part in (*wanted, "--n-images '7'", "main_comparison"):
        assert part in printed


def test_the_papers_figures_stand_beside_ours(tmp_path):
    folder = tmp_path / "main_comparison"
    folder.mkdir()
    summary = pd.DataFrame(
        {"method": ["amg_d", "aop"], "miou": [0.725, 0.6], "inf_lat_s": [0.2, 0.1]}
    ).assign(peak_mem_mb=1000, n_masks=50)
    facts = {"parameters": {"sam": "vit_h"}, "dataset": {"name": "lvis-v1-val"}}
    (folder / "provenance.json").write_text(json.dumps(facts))
    text = page._beside_paper(folder, summary)
    assert "+1.5" in text and "OAS Central Point" in text  # 72.5 beside the paper's 71.0
    (folder / "provenance.json").write_text(json.dumps({**facts, "dataset": {"name": "scenes"}}))
    assert "<table" not in page._beside_paper(folder, summary)
