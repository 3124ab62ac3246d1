"""COCO-style folders against pycocotools, and the rules for what a file leaves open."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from small import rle_text, write_coco

from aopsam_lab.data import open_dataset
from aopsam_lab.data.coco import CocoFolder

WIDTH, HEIGHT = 20, 12
TRIANGLE = [[2.0, 2.0, 15.0, 2.0, 8.0, 10.0]]
TWO_PARTS = [
    [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0],
    [10.0, 6.0, 18.0, 6.0, 18.0, 11.0, 10.0, 11.0],
]


def square(y: int, x: int, side: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + side, x : x + side] = True
    return rle_text(mask)


def write(folder: Path, segmentations: list[list], **extra) -> Path:
    """A folder of as many images as there are lists; their annotations, `extra` added to each."""
    images, annotations = {}, {}
    for i, own in enumerate(segmentations):
        name = f"picture{i}.png"
        images[name] = np.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        about = {"category_id": 1 + i % 2, "area": 1.0, "bbox": [0, 0, 1, 1], **extra}
        annotations[name] = [{"segmentation": segmentation, **about} for segmentation in own]
    return write_coco(folder, images, annotations)


def edit(folder: Path, change) -> None:
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_masks_are_those_of_pycocotools(tmp_path):
    # a square of 5 x 5 as lengths of runs, by columns
    runs = [4 * HEIGHT + 3, *[5, HEIGHT - 5] * 4, 5, 4 + 11 * HEIGHT]
    as_list = {"size": [HEIGHT, WIDTH], "counts": runs}
    folder = write(tmp_path / "set", [[TRIANGLE, TWO_PARTS], [square(3, 4, 5), as_list]])
    coco = COCO(str(folder / "annotations.json"))
    dataset = CocoFolder(folder)
    for i, name in enumerate(dataset.ids):
        sample = dataset[i]
        record = next(image for image in coco.dataset["images"] if image["file_name"] == name)
        expected = [coco.annToMask(annotation) for annotation in coco.imgToAnns[record["id"]]]
        assert sample.id == name and sample.masks.dtype == bool
        assert np.array_equal(sample.masks, np.array(expected, dtype=bool))
        assert np.array_equal(sample.image, np.asarray(Image.open(folder / "images" / name)))
        assert sample.points is None


def test_what_is_left_out_is_counted(tmp_path):
    shape = square(0, 0, 3)
    # pycocotools would take the line's four numbers for a box
    line, none, outside = [[1.0, 1.0, 9.0, 9.0]], [], [[-9.0, -9.0, -5.0, -9.0, -5.0, -5.0]]
    folder = write(tmp_path / "set", [[shape, line, none, outside, TRIANGLE + line], [], [shape]])
    edit(folder, lambda c: c["annotations"][-1].update(iscrowd=1))
    counts = CocoFolder(folder).describe()
    assert counts["images"] == 3 and counts["images_without_masks"] == 2
    assert counts["masks"] == 2  # the square and the triangle
    assert (counts["crowd_regions"], counts["annotations_without_mask"]) == (1, 3)


def test_annotations_of_no_image_are_counted_and_said(tmp_path):
    folder = write(tmp_path / "set", [[TRIANGLE, TRIANGLE], [TRIANGLE]])
    edit(folder, lambda c: c["annotations"][1].update(image_id="1"))
    with pytest.warns(UserWarning, match="1 annotations of .*annotations.json belong to no image"):
        counts = CocoFolder(folder).describe()
    assert (counts["masks"], counts["annotations_of_no_image"]) == (2, 1)


def test_a_missing_image_is_left_out_and_counted(tmp_path):
    folder = write(tmp_path / "set", [[TRIANGLE]] * 3)
    (folder / "images" / "picture1.png").unlink()
    dataset = CocoFolder(folder)
    assert sorted(dataset.ids) == ["picture0.png", "picture2.png"]
    assert dataset.describe()["missing_images"] == 1
    for i in (0, 2):
        (folder / "images" / f"picture{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match="None of the 3 images"):
        CocoFolder(folder)


def test_subsets_are_nested_and_do_not_depend_on_the_order_of_the_file(tmp_path):
    folder = write(tmp_path / "set", [[TRIANGLE]] * 9)
    first, more = CocoFolder(folder, 4), CocoFolder(folder, 7)
    assert more.ids[:4] == first.ids and len(set(more.ids)) == 7
    edit(folder, lambda c: c["images"].reverse())
    assert CocoFolder(folder, 4).ids == first.ids
    assert CocoFolder(folder, 4).fingerprint == first.fingerprint
    assert CocoFolder(folder, 4, seed=1).ids != first.ids
    assert len(CocoFolder(folder, 100)) == 9


def test_the_fingerprint_follows_the_content(tmp_path):
    folder = write(tmp_path / "set", [[TRIANGLE], [TWO_PARTS]])
    before = CocoFolder(folder)
    edit(folder, lambda c: c["annotations"][0].update(category_id=7, id=99))  # classes are ignored
    assert CocoFolder(folder).fingerprint == before.fingerprint
    edit(folder, lambda c: c["annotations"][0].update(segmentation=TWO_PARTS))
    changed = CocoFolder(folder)
    i = before.ids.index("picture0.png")
    assert changed.sample_fingerprint(i) != before.sample_fingerprint(i)
    assert changed.sample_fingerprint(1 - i) == before.sample_fingerprint(1 - i)
    assert changed.fingerprint != before.fingerprint
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "picture1.png")
    assert CocoFolder(folder).sample_fingerprint(1 - i) != before.sample_fingerprint(1 - i)


def test_a_photograph_taken_sideways_is_turned_and_points_are_read(tmp_path):
    folder = write(tmp_path / "set", [[TRIANGLE]], point_coords=[[7.5, 3.5]])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (HEIGHT, WIDTH))  # stored sideways
    picture.save(folder / "images" / "picture0.png", exif=exif)
    sample = CocoFolder(folder)[0]
    assert sample.image.shape == (HEIGHT, WIDTH, 3) and sample.masks.shape == (1, HEIGHT, WIDTH)
    assert sample.points.tolist() == [[7.5, 3.5]]


def segmentation(value: dict):
    return lambda content: content["annotations"][0].update(segmentation=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "annotations.json is not in COCO's instances format"),
        (lambda c: c["images"].append(c["images"][0]), "each needs its own"),
        (lambda c: c["images"][0].update(file_name="../annotations.json"), "outside the folder"),
        (lambda c: c["images"][0].pop("width"), "picture0.png of .* instances format: KeyError"),
        (segmentation({"size": [3, 3], "counts": "0"}), "has size"),
        (segmentation({"size": [HEIGHT, WIDTH], "counts": [3]}), "do not add up"),
        (segmentation({"size": [HEIGHT, WIDTH]}), "instances format: KeyError 'counts'"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, change, message):
    folder = write(tmp_path / "set", [[TRIANGLE]])
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        CocoFolder(folder)


def test_bad_images_say_what_is_wrong(tmp_path):
    dataset = CocoFolder(write(tmp_path / "set", [[TRIANGLE]]))
    file = dataset.path / "images" / "picture0.png"
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(file)
    with pytest.raises(ValueError, match="picture0.png .*its annotations say 12 x 20"):
        dataset[0]
    file.write_text("hello")
    with pytest.raises(ValueError, match="picture0.png .*cannot be read as an image"):
        dataset[0]


def test_missing_files_and_arguments_out_of_range_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="'photos' or a COCO-style folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="annotations.json"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="lvis needs the folder it lies in: lvis:PATH"):
        open_dataset("lvis")
    with pytest.raises(ValueError, match="n_images"):
        open_dataset("photos", 0)
    with pytest.raises(ValueError, match="seed"):
        open_dataset("photos", 1, seed=-1)
