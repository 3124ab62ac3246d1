import base64
import io
import json
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.coco import COCO

from aopsam_lab.masks.drawing import GREY, label_image, mask_colours, matched_colours, overlay
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.pipeline.segmentation import Segmentation

matplotlib.use("agg")  # no window opens
HEIGHT, WIDTH = 24, 40
BOX = ["x0", "y0", "x1", "y1"]


def prompt_table(rows: list[tuple]) -> pd.DataFrame:
    columns = ["x", "y", "round", "status", "by", "pem", *BOX]
    return pd.DataFrame(rows, columns=columns).assign(confidence=0.5)


@pytest.fixture
def seg() -> Segmentation:
    """A small rectangle in a large one, and one that meets the large one's corner."""
    masks = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    masks[0, 5:9, 10:15] = True
    masks[1, 2:20, 4:30] = True
    masks[2, 18:24, 28:40] = True
    no_box = (np.nan,) * 4
    prompts = [
        (12.5, 7.5, 0, "kept", -1, np.nan, *no_box),
        (6.5, 4.5, 0, "kept", -1, np.nan, *no_box),
        (7.5, 5.5, -1, "eliminated", 1, 0.8, *no_box),
        (1.5, 1.5, 0, "low_iou", -1, np.nan, *no_box),
        (34.0, 21.0, 1, "kept", -1, np.nan, 28.0, 18.0, 40.0, 24.0),
        (35.0, 21.0, 1, "duplicate", -1, np.nan, *no_box),
        (2.0, 22.0, 1, "unstable", -1, np.nan, *no_box),
    ]
    pems = [np.full((4, 4), 0.25), np.linspace(0, 1, 16).reshape(4, 4)]
    return Segmentation(
        image=np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        masks=encode_rle(masks),
        scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
        stability=np.array([0.99, 0.98, 0.97], dtype=np.float32),
        boxes=np.array([[10, 5, 14, 8], [4, 2, 29, 19], [28, 18, 39, 23]], dtype=np.float32),
        mask_prompt=np.array([0, 1, 4]),
        prompts=prompt_table(prompts),
        pems=np.stack(pems).astype(np.float32),
        method="aop",
        n_decoded=6,
        n_sampled=7,
    )


@pytest.fixture
def nothing() -> Segmentation:
    none = np.zeros(0, np.float32)
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    rest = none, none, none.reshape(0, 4), none.astype(int), prompt_table([])
    return Segmentation(image, [], *rest, method="aop")


def test_records_have_the_generators_keys_and_values(seg):
    record = seg.to_records()[0]
    keys = {"segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score"}
    assert set(record) == keys | {"crop_box"}
    assert record["segmentation"].dtype == bool and record["area"] == 20
    assert record["bbox"] == [10, 5, 4, 3]  # inclusive maxima, as batched_mask_to_box gives them
    assert record["point_coords"] == [[12.5, 7.5]]
    assert record["crop_box"] == [0, 0, WIDTH, HEIGHT]
    assert record["predicted_iou"] == pytest.approx(0.9)
    assert record["stability_score"] == pytest.approx(0.99)


def test_supervision_reads_the_records(seg):
    import supervision

    detections = supervision.Detections.from_sam(seg.to_records())
    by_area = np.argsort([-mask.sum() for mask in seg.to_array()])  # from_sam sorts by area
    assert np.array_equal(np.asarray(detections.mask), seg.to_array()[by_area])
    assert np.array_equal(detections.xyxy, seg.boxes[by_area])


def test_a_coco_file_holds_the_same_masks(seg, tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(seg.to_coco(image_id=7, file_name="photo.jpg")))
    coco = COCO(path)
    assert coco.imgs == {7: {"id": 7, "file_name": "photo.jpg", "width": WIDTH, "height": HEIGHT}}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=7, iscrowd=False))
    masks = seg.to_array()
    assert masks.dtype == bool and masks[0].sum() == 4 * 5
    assert np.array_equal(np.stack([coco.annToMask(a) for a in annotations]).astype(bool), masks)
    assert [a["area"] for a in annotations] == masks.sum((1, 2)).tolist()
    assert annotations[0]["bbox"] == [10, 5, 5, 4]  # as pycocotools counts
    assert annotations[2]["point_coords"] == [[34.0, 21.0]]


def test_label_image_puts_small_masks_on_top(seg):
    labels = label_image(seg.masks, (HEIGHT, WIDTH))
    assert labels.dtype == np.uint16
    assert labels[6, 12] == 1 and labels[3, 5] == 2 and labels[0, 0] == 0
    assert labels[18, 28] == 3  # both rectangles lie here: the smaller one shows
    same = encode_rle(np.ones((2, 3, 3), dtype=bool))
    assert (label_image(same, (3, 3)) == 1).all()
    with pytest.raises(ValueError, match="65535"):
        label_image(same * 40000, (3, 3))


def test_save_writes_three_whole_files(seg, tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = seg.save(folder, "photo", file_name="photo.jpg")
    names = {"photo.json", "photo_labels.png", "photo_overlay.png"}
    assert {path.name for path in folder.iterdir()} == names
    with Image.open(paths["labels"]) as labels:
        assert labels.mode == "I;16"
        assert np.array_equal(np.asarray(labels), label_image(seg.masks, (HEIGHT, WIDTH)))
    with Image.open(paths["overlay"]) as drawn:
        assert np.array_equal(np.asarray(drawn), overlay(seg.image, seg.masks))
    assert json.loads(paths["coco"].read_text())["images"][0]["file_name"] == "photo.jpg"


def test_overlay_changes_masked_pixels_only_and_colours_are_distinct(seg):
    drawn = overlay(seg.image, seg.masks)
    covered = seg.to_array().any(0)
    assert drawn.shape == seg.image.shape and drawn.dtype == np.uint8
    assert np.array_equal(drawn[~covered], seg.image[~covered])
    assert not np.array_equal(drawn[covered], seg.image[covered])


def test_a_colour_stays_neighbours_differ_and_a_match_has_the_same(seg):
    known = {}
    first = mask_colours(seg.masks[1:], known)
    both = mask_colours(seg.masks, known)  # another one comes, before them in the list
    assert np.array_equal(both[1:], first) and len(np.unique(both, axis=0)) == 3
    assert np.array_equal(mask_colours(seg.masks[::-1], known), both[::-1])
    pixels = seg.to_array()
    less = pixels.copy()
    less[1, :, 4:8] = False  # IoU above 0.5
    less[2, :, 31:] = False  # below
    colours = matched_colours(encode_rle(less), seg.masks, both)
    assert np.array_equal(colours[:2], both[:2]) and tuple(colours[2]) == GREY
    # a second copy is no match: one object has one
    twice = matched_colours([seg.masks[0]] * 2, seg.masks, both)
    assert np.array_equal(twice[0], both[0]) and tuple(twice[1]) == GREY
    assert matched_colours([], seg.masks, both).shape == mask_colours([]).shape == (0, 3)


def test_plot_draws_each_status(seg):
    ax = seg.plot()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == seg.prompts["status"].nunique() and "kept (3)" in texts
    assert ax.get_xlim() == (0, WIDTH) and ax.get_ylim() == (HEIGHT, 0)
    assert len(ax.patches) == 1  # the one box prompt
    ax.figure.canvas.draw()
    mine = Figure().subplots()
    assert seg.plot(mine, masks=False, prompts=["eliminated"]) is mine
    assert len(mine.collections) == 1
    assert seg.plot(Figure().subplots(), prompts=False).get_legend() is None
    with pytest.raises(ValueError, match="lost"):
        seg.plot(mine, prompts=["lost"])


def test_a_cell_shows_the_picture_with_its_numbers(seg, nothing):
    seg.seconds = {"total": 1.234}
    seg.method = "<b>"
    text = seg._repr_html_()
    png = base64.b64decode(re.search('src="data:image/png;base64,([^"]+)"', text)[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), overlay(seg.image, seg.masks))
    _, *names, row = re.findall("<th>(.*?)</th>", text)
    numbers = dict(zip(names, re.findall("<td>(.*?)</td>", text), strict=True))
    assert row == "prompts" and numbers["kept"] == "3" and numbers["seconds"] == "1.23"
    assert numbers["low iou"] == "1"
    assert "3 masks, 6 of 7 prompts decoded" in text and "<b>" not in text
    assert "0 masks" in nothing._repr_html_()
    seg.image, seg.masks = np.zeros((30, 2000, 3), np.uint8), []
    png = re.search('base64,([^"]+)', seg._repr_html_())[1]
    assert Image.open(io.BytesIO(base64.b64decode(png))).size == (800, 12)


@pytest.mark.parametrize("shape", [(40, 60), (400, 30), (10, 400)])
def test_a_plot_fills_the_cell(nothing, shape):
    nothing.image = np.zeros((*shape, 3), np.uint8)
    width, height = nothing.plot().figure.get_size_inches()
    assert width > 9 or height > 7
    assert width < 13 and height < 9


def test_importing_forces_no_backend():
    code = "import sys, aopsam_lab.pipeline.show; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pem_is_one_references_or_the_highest_of_all(seg, nothing):
    assert np.array_equal(seg.pem(1), seg.pems[1])
    assert np.array_equal(seg.pem(), seg.pems.max(0))
    with pytest.raises(ValueError, match="no reference 2"):
        seg.pem(2)
    with pytest.raises(ValueError, match="no PEM"):
        nothing.pem()


def test_an_empty_result_works_everywhere(nothing, tmp_path):
    assert nothing.to_array().shape == (0, HEIGHT, WIDTH)
    assert nothing.to_records() == nothing.to_coco()["annotations"] == []
    paths = nothing.save(tmp_path, "empty")
    assert not np.asarray(Image.open(paths["labels"])).any()
    assert np.array_equal(np.asarray(Image.open(paths["overlay"])), nothing.image)
    nothing.plot().figure.canvas.draw()
    assert "0 masks" in repr(nothing)
