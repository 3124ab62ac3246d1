from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from aopsam_lab.masks.drawing import label_image, mask_colours, overlay
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.segmentation import PROMPT_COLUMNS, Segmentation

HEIGHT, WIDTH = 24, 40


def prompt_rows(rows: list[dict]) -> pd.DataFrame:
    default = {
        "confidence": 0.5,
        "round": -1,
        "by": -1,
        "pem": np.nan,
        **dict.fromkeys(PROMPT_COLUMNS[7:], np.nan),
    }
    return pd.DataFrame([{**default, **row} for row in rows], columns=list(PROMPT_COLUMNS))


def example() -> Segmentation:
    """A large rectangle, a small one inside it, and one that meets the large one's corner."""
    masks = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    masks[0, 5:9, 10:15] = True
    masks[1, 2:20, 4:30] = True
    masks[2, 18:24, 28:40] = True
    prompts = prompt_rows(
        [
            {"x": 12.5, "y": 7.5, "round": 0, "status": "kept"},
            {"x": 6.5, "y": 4.5, "round": 0, "status": "kept"},
            {"x": 7.5, "y": 5.5, "status": "eliminated", "by": 1, "pem": 0.8},
            {"x": 1.5, "y": 1.5, "round": 0, "status": "low_iou"},
            {"x": 34.0, "y": 21.0, "round": 1, "status": "kept"}
            | {"x0": 28.0, "y0": 18.0, "x1": 40.0, "y1": 24.0},
            {"x": 35.0, "y": 21.0, "round": 1, "status": "duplicate"},
            {"x": 2.0, "y": 22.0, "round": 1, "status": "unstable"},
        ]
    )
    pems = np.stack([np.full((4, 4), 0.25), np.linspace(0, 1, 16).reshape(4, 4)]).astype(np.float32)
    return Segmentation(
        image=np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        masks=encode_rle(torch.from_numpy(masks)),
        scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
        stability=np.array([0.99, 0.98, 0.97], dtype=np.float32),
        boxes=np.array([[10, 5, 14, 8], [4, 2, 29, 19], [28, 18, 39, 23]], dtype=np.float32),
        mask_prompt=np.array([0, 1, 4]),
        prompts=prompts,
        pcm=np.zeros((16, 16), np.float32),
        pems=pems,
        seconds={"encode": 0.1, "infer": 0.1, "mask": 0.1, "total": 0.3},
        method="aop",
        n_decoded=6,
        n_sampled=7,
        n_eliminated=1,
        input_size=(10, 16),
        model_size=16,
    )


def nothing() -> Segmentation:
    none = np.zeros(0, np.float32)
    return Segmentation(
        image=np.full((HEIGHT, WIDTH, 3), 90, np.uint8),
        masks=[],
        scores=none,
        stability=none,
        boxes=none.reshape(0, 4),
        mask_prompt=np.zeros(0, int),
        prompts=prompt_rows([]),
        method="aop",
    )


def test_to_array_is_the_decoded_rle():
    seg = example()
    masks = seg.to_array()
    assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool
    assert np.array_equal(
        masks, np.stack([coco_mask.decode(rle) for rle in seg.masks]).astype(bool)
    )
    assert masks[0].sum() == 4 * 5


def test_records_have_the_generators_keys_and_values():
    record = example().to_records()[0]
    keys = {"segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score"}
    assert set(record) == keys | {"crop_box"}
    assert record["segmentation"].dtype == bool and record["area"] == 20
    assert record["bbox"] == [10, 5, 4, 3]  # inclusive maxima, as batched_mask_to_box gives them
    assert record["point_coords"] == [[12.5, 7.5]]
    assert record["crop_box"] == [0, 0, WIDTH, HEIGHT]
    assert record["predicted_iou"] == pytest.approx(0.9)
    assert record["stability_score"] == pytest.approx(0.99)


def test_supervision_reads_the_records():
    supervision = pytest.importorskip("supervision")
    seg = example()
    detections = supervision.Detections.from_sam(seg.to_records())
    assert len(detections) == 3
    by_area = np.argsort([-mask.sum() for mask in seg.to_array()])  # from_sam sorts by area
    assert np.array_equal(np.asarray(detections.mask), seg.to_array()[by_area])
    assert np.array_equal(detections.xyxy, seg.boxes[by_area])


def test_coco_round_trip(tmp_path):
    seg = example()
    path = tmp_path / "one.json"
    path.write_text(json.dumps(seg.to_coco(image_id=7, file_name="photo.jpg")))
    coco = COCO(path)
    assert coco.imgs == {7: {"id": 7, "file_name": "photo.jpg", "width": WIDTH, "height": HEIGHT}}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=7, iscrowd=False))
    assert np.array_equal(
        np.stack([coco.annToMask(a) for a in annotations]).astype(bool), seg.to_array()
    )
    assert [a["area"] for a in annotations] == seg.to_array().sum((1, 2)).tolist()
    assert annotations[0]["bbox"] == [10, 5, 4, 3] and annotations[2]["point_coords"] == [
        [34.0, 21.0]
    ]


def test_label_image_puts_small_masks_on_top():
    seg = example()
    labels = label_image(seg.masks, (HEIGHT, WIDTH))
    assert labels.dtype == np.uint16
    assert labels[6, 12] == 1 and labels[3, 5] == 2 and labels[0, 0] == 0
    assert labels[18, 28] == 3  # both rectangles lie here: the smaller one shows
    same = encode_rle(np.ones((2, 3, 3), dtype=bool))
    assert (label_image(same, (3, 3)) == 1).all()
    with pytest.raises(ValueError, match="65535"):
        label_image(same * 40000, (3, 3))


def test_save_writes_three_whole_files(tmp_path):
    seg = example()
    paths = seg.save(tmp_path / "new" / "folder", "photo", file_name="photo.jpg")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "photo.json", "photo_labels.png", "photo_overlay.png",
    ]  # fmt: skip
    with Image.open(paths["labels"]) as labels:
        assert labels.mode == "I;16"
        assert np.array_equal(np.asarray(labels), label_image(seg.masks, (HEIGHT, WIDTH)))
    with Image.open(paths["overlay"]) as drawn:
        assert drawn.size == (WIDTH, HEIGHT) and drawn.mode == "RGB"
    assert json.loads(paths["coco"].read_text())["images"][0]["file_name"] == "photo.jpg"


def test_overlay_changes_masked_pixels_only():
    seg = example()
    drawn = overlay(seg.image, seg.masks)
    covered = seg.to_array().any(0)
    assert drawn.shape == seg.image.shape and drawn.dtype == np.uint8
    assert np.array_equal(drawn[~covered], seg.image[~covered])
    assert not np.array_equal(drawn[covered], seg.image[covered])


def test_colours_are_distinct():
    assert len(np.unique(mask_colours(21), axis=0)) == 21
    assert mask_colours(0).shape == (0, 3)


@pytest.fixture
def headless():
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")
    matplotlib.use(before)


def test_plot_draws_each_status(headless):
    seg = example()
    ax = seg.plot()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == seg.prompts["status"].nunique() and "kept (3)" in texts
    assert ax.get_xlim() == (0, WIDTH) and ax.get_ylim() == (HEIGHT, 0)
    assert len(ax.patches) == 1  # the one box prompt
    ax.figure.canvas.draw()
    _, mine = headless.subplots()
    assert seg.plot(mine, masks=False, prompts=["eliminated"]) is mine
    assert len(mine.collections) == 1
    assert seg.plot(headless.subplots()[1], prompts=False).get_legend() is None
    with pytest.raises(ValueError, match="lost"):
        seg.plot(mine, prompts=["lost"])


def test_importing_forces_no_backend():
    import subprocess
    import sys

    code = "import sys, aopsam_lab.pipeline.show; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pem():
    seg = example()
    assert np.array_equal(seg.pem(1), seg.pems[1])
    assert np.array_equal(seg.pem(), seg.pems.max(0))
    with pytest.raises(ValueError, match="no reference 2"):
        seg.pem(2)
    with pytest.raises(ValueError, match="no PEM"):
        nothing().pem()


def test_an_empty_result_works_everywhere(tmp_path, headless):
    seg = nothing()
    assert seg.to_array().shape == (0, HEIGHT, WIDTH)
    assert seg.to_records() == []
    assert seg.to_coco()["annotations"] == []
    paths = seg.save(tmp_path, "empty")
    assert not np.asarray(Image.open(paths["labels"])).any()
    assert np.array_equal(np.asarray(Image.open(paths["overlay"])), seg.image)
    seg.plot().figure.canvas.draw()
    assert "0 masks" in repr(seg)


def test_parts_that_do_not_fit_are_refused():
    good = nothing()
    parts = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError, match="scores"):
        Segmentation(**{**parts, "scores": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="H x W x 3"):
        Segmentation(**{**parts, "image": good.image[..., 0]})
    with pytest.raises(ValueError, match="lacks the columns pem"):
        Segmentation(**{**parts, "prompts": good.prompts.drop(columns="pem")})
    with pytest.raises(ValueError, match="'lost'"):
        Segmentation(**{**parts, "prompts": prompt_rows([{"x": 1.0, "y": 1.0, "status": "lost"}])})
