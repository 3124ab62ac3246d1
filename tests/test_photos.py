"""The photographs in the box, their credits, the defaults that name them; found.json."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import parameters
from pycocotools import mask as coco_mask
from small import rle_text, write_coco

from aopsam_lab.data import PHOTOS, open_dataset
from aopsam_lab.data.coco import found_masks
from aopsam_lab.masks.drawing import mask_colours
from aopsam_lab.study import PACKAGE_ROOT
from aopsam_lab.study.runner import MAIN_COMPARISON
from aopsam_lab.study.sweeps import ABLATION, SWEEPS
from aopsam_lab.widgets.explorer import explore

# Recorded when the photographs were added: a change here changes every reported figure on them.
FINGERPRINT = "a5f4caa984c6bc2fee8b358b3b682bec4cf9eb3708a4e1047d6d586f5d427d0f"
HEIGHT, WIDTH = 6, 8


# --- the photographs in the box ---


@pytest.fixture(scope="module")
def photos():
    return open_dataset("photos")


def test_photographs_masks_and_crowds_are_those_recorded(photos):
    about = photos.describe()
    assert (about["name"], about["images"]) == ("photos", 28)
    assert (about["masks"], about["crowd_regions"]) == (290, 4)
    left_out = ("missing_images", "images_without_masks", "annotations_without_mask")
    assert [about[key] for key in left_out] == [0, 0, 0]
    assert sorted(photos.ids) == sorted(path.name for path in (PHOTOS / "images").iterdir())
    assert photos.fingerprint == FINGERPRINT
    assert open_dataset("photos", 3).ids == photos.ids[:3]
    sample = photos[0]
    assert sample.image.shape == (*photos.sizes[0], 3) and sample.masks.shape[1:] == photos.sizes[0]


def test_each_photograph_is_credited_with_its_licence():
    file = json.loads((PHOTOS / "annotations.json").read_text())
    credits = (PHOTOS / "CREDITS.md").read_text()
    licences = {each["id"]: f"[{each['name']}]({each['url']})" for each in file["licenses"]}
    lines = set(credits.splitlines())
    for image in file["images"]:
        photo = re.match(r"\d+", image["flickr_url"].rsplit("/", 1)[1])[0]
        assert f"| {image['file_name']} | {photo} | {licences[image['license']]} |" in lines
    assert len([line for line in lines if ".jpg |" in line]) == len(file["images"])
    assert "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)" in credits
    assert "COCO Consortium" in credits


def test_a_folder_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch, photos):
    write(tmp_path / "photos", {"a.png": []})
    monkeypatch.chdir(tmp_path)
    assert open_dataset("./photos").ids == open_dataset(Path("photos")).ids == ["a.png"]
    assert open_dataset("photos").ids == photos.ids


def test_photos_and_mobile_sam_are_the_defaults():
    for config, n_images in ((MAIN_COMPARISON, 12), (ABLATION, 28), (SWEEPS, 28)):
        assert (config.sam, config.dataset, config.n_images) == ("mobile_sam", "photos", n_images)
    defaults = inspect.signature(explore).parameters
    assert (defaults["sam"].default, defaults["source"].default) == ("mobile_sam", "photos")
    for path in (PACKAGE_ROOT / "notebooks").glob("*.ipynb"):
        values = parameters(path.stem)
        assert (values["sam"], values["dataset"]) == ("mobile_sam", "photos"), path
    assert parameters("benchmark")["n_images"] == 3


# --- masks that a SAM found ---


def write(folder: Path, lefts: dict[str, list[int]], file="annotations.json", first=1, **more):
    """A COCO-style folder, or its found.json: of each image one mask for each left edge."""
    images = {name: np.zeros((HEIGHT, WIDTH, 3), np.uint8) for name in lefts}
    masks = {name: [] for name in lefts}
    for name, own in lefts.items():
        for left in own:
            mask = np.arange(WIDTH) >= np.full((HEIGHT, 1), left)
            masks[name].append({**more, "segmentation": rle_text(mask)})
    return write_coco(folder, images, masks, file, first)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set", {"a.png": [1], "b.png": [], "c.png": [2]})


def test_found_masks_belong_to_images_by_their_file_name(folder):
    about = {"source": "sam", "predicted_iou": 0.9, "point_coords": [[1.0, 1.0]]}
    lefts = {"c.png": [3, 4], "b.png": [], "a.png": [5], "d.png": [1]}
    write(folder, lefts, "found.json", first=7, **about)
    dataset = open_dataset(folder)
    found = found_masks(dataset)
    assert list(found) == dataset.ids
    areas = {name: [coco_mask.area(rle) // HEIGHT for rle in found[name]] for name in found}
    assert areas == {"a.png": [WIDTH - 5], "b.png": [], "c.png": [WIDTH - 3, WIDTH - 4]}
    few = open_dataset(folder, 1)
    assert found_masks(few) == {few.ids[0]: found[few.ids[0]]}
    write(folder, lefts, "found.json", source="people")
    assert not any(found_masks(dataset).values()), "what people outlined is not a SAM's"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("c.png", "d.png"), "not list 'c.png'"),
        (lambda text: text.replace(f"[{HEIGHT}, {WIDTH}]", "[1, 1]"), "a.png in .* size"),
        (lambda text: text.replace("annotations", "?"), "instances format: KeyError 'annotations'"),
        (lambda text: "[]", "instances format: TypeError"),
        (lambda text: "no JSON", "found.json is not in COCO's instances format"),
    ],
)
def test_a_file_of_found_masks_that_does_not_fit_is_refused(folder, change, words):
    assert found_masks(open_dataset(folder)) is None
    write(folder, {"a.png": [1], "b.png": [], "c.png": []}, "found.json")
    file = folder / "found.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=words):
        found_masks(open_dataset(folder))


def test_masks_that_stay_keep_their_colours_on_all_photographs():
    """Masks come and go, as by two clicks and a step of a slider."""
    rng, same, near = np.random.default_rng(0), 0, 0
    for masks in found_masks(open_dataset("photos")).values():
        masks, known = [masks[i] for i in rng.permutation(len(masks))], {}
        n = len(masks)
        first, clicked = masks[: n // 2], masks[: n // 2 + 2]
        after = [*clicked[::2], *masks[n // 2 + 2 :]]
        seen = [mask_colours(part, known) for part in (first, clicked, after)]
        assert np.array_equal(seen[1][: n // 2], seen[0])
        assert np.array_equal(seen[2][: len(clicked[::2])], seen[1][::2])
        boxes = coco_mask.toBbox(after) + np.array([-1, -1, 2, 2])
        meets = np.triu(coco_mask.iou(boxes, boxes, [False] * len(after)) > 0, 1)
        equal = (seen[2][:, None] == seen[2][None]).all(2)
        same, near = same + (meets & equal).sum(), near + meets.sum()
    assert same < 0.02 * near  # a neighbour of an equal colour may have come later
