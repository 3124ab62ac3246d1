"""COCO, LVIS and SA-1B in small files of the formats in which they are published."""

import gzip
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from small import rle_text

from aopsam_lab.data import open_dataset
from aopsam_lab.data.coco import Coco, Lvis
from aopsam_lab.data.sa1b import Sa1b

HEIGHT, WIDTH = 30, 40
TRIANGLE = [[5.0, 5.0, 25.0, 8.0, 12.0, 27.0]]


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (seed, 2 * seed, 99)).save(path)


def blob(row, column, side=6):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[row : row + side, column : column + side] = True
    return mask


def coco_json(path, images, annotations):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": i, **size, **names} for i, names in enumerate(images)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture
def coco(tmp_path):
    """The published layout."""
    for i in range(2):
        picture(tmp_path / "val2017" / f"{i:012}.jpg", i)
    annotations = [
        {"image_id": 0, "segmentation": TRIANGLE, "iscrowd": 0},
        {"image_id": 9, "segmentation": TRIANGLE, "iscrowd": 0},  # of a picture that is not there
    ]
    names = [{"file_name": f"{i:012}.jpg"} for i in (0, 1, 8)]
    coco_json(tmp_path / "annotations" / "instances_val2017.json", names, annotations)
    return tmp_path


def test_coco_is_read_as_it_is_published(coco):
    dataset = open_dataset(f"coco:{coco}")
    assert isinstance(dataset, Coco) and dataset.name == "coco-val2017" and len(dataset) == 2
    counts = dataset.describe()
    assert counts["missing_images"] == counts["images_without_masks"] == counts["masks"] == 1
    samples = {sample.id: sample for sample in map(dataset.__getitem__, range(2))}
    assert samples[f"{0:012}.jpg"].masks.shape == (1, HEIGHT, WIDTH)
    assert samples[f"{1:012}.jpg"].masks.shape == (0, HEIGHT, WIDTH)


def test_another_split_is_opened_by_its_file(coco):
    file = coco / "annotations" / "instances_train2017.json"
    shutil.copy(file.with_name("instances_val2017.json"), file)
    with pytest.raises(FileNotFoundError, match="train2017"):
        Coco(file)
    shutil.copytree(coco / "val2017", coco / "images" / "train2017")
    dataset = Coco(file)
    assert dataset.name == "coco-train2017" and len(dataset) == 2
    with pytest.raises(FileNotFoundError, match="no instances_val2017.json in .* Give coco:"):
        Coco(coco / "val2017")


def test_lvis_takes_its_pictures_from_both_folders_of_coco(tmp_path):
    names = ["train2017/000000000001.jpg", "val2017/000000000001.jpg", "val2017/000000000002.jpg"]
    for i, name in enumerate(names[:2]):
        picture(tmp_path / "coco" / name, i)
    images = [{"coco_url": f"http://images.cocodataset.org/{name}"} for name in names]
    annotations = [{"image_id": i, "segmentation": TRIANGLE} for i in range(3)]
    file = coco_json(tmp_path / "lvis_v1_val.json", images, annotations)
    dataset = open_dataset(f"lvis:{tmp_path}")
    assert isinstance(dataset, Lvis) and dataset.name == "lvis-v1-val"
    assert sorted(dataset.ids) == names[:2] and dataset.describe()["missing_images"] == 1
    assert not np.array_equal(dataset[0].image, dataset[1].image), "two pictures of one name"
    shutil.move(file, tmp_path / "coco" / "annotations.json")
    assert Lvis(tmp_path / "coco" / "annotations.json").ids == dataset.ids
    shutil.rmtree(tmp_path / "coco" / "train2017")
    shutil.rmtree(tmp_path / "coco" / "val2017")
    with pytest.raises(FileNotFoundError, match="images of .* are in none of"):
        Lvis(tmp_path / "coco" / "annotations.json")


def sa1b_json(name, masks, **changes) -> bytes:
    image = {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": f"{name}.jpg"}
    annotations = []
    for mask in masks:
        y, x = (float(places[0]) + 0.5 for places in np.nonzero(mask))
        annotations.append({"segmentation": rle_text(mask), "point_coords": [[x, y]]})
    return json.dumps({"image": {**image, **changes}, "annotations": annotations}).encode()


def sa1b_files(names):
    """Pictures and JSON by file name, as in a shard."""
    files = {}
    for n, name in enumerate(names):
        buffer = io.BytesIO()
        Image.effect_noise((WIDTH, HEIGHT), 99).save(buffer, "jpeg")
        files[f"{name}.jpg"] = buffer.getvalue()
        files[f"{name}.json"] = sa1b_json(name, [blob(n, n), blob(10, 20)])
    return files


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")  # as in the published shards
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


NAMES = [f"sa_{i}" for i in range(1, 8)]


def test_sa1b_is_the_same_packed_and_unpacked(tmp_path):
    files = sa1b_files(NAMES)
    write_folder(tmp_path / "plain" / "deep", files)
    halves = [dict(sorted(files.items(), key=lambda item: item[0][::-1])[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        write_shard(tmp_path / "packed" / f"sa_00000{i}.tar", half)
    plain = open_dataset(f"sa1b:{tmp_path / 'plain'}", 5, seed=3)
    tar = Sa1b(tmp_path / "packed", 5, seed=3)
    assert plain.ids == tar.ids and len(set(plain.ids)) == 5
    assert plain.fingerprint == tar.fingerprint
    assert Sa1b(tmp_path / "plain", 3, seed=3).ids == plain.ids[:3]
    for i in range(5):
        a, b = plain[i], tar[i]
        assert np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)
        n = NAMES.index(a.id)
        assert np.array_equal(a.masks, [blob(n, n), blob(10, 20)])
        assert a.points.tolist() == [[n + 0.5, n + 0.5], [20.5, 10.5]]


def test_what_is_missing_in_sa1b_is_counted(tmp_path):
    files = sa1b_files(NAMES)
    del files["sa_1.json"], files["sa_2.jpg"]
    files["sa_3.json"] = sa1b_json("sa_3", [])
    dataset = Sa1b(write_shard(tmp_path / "sa_000000.tar", files))
    assert sorted(dataset.ids) == NAMES[2:]
    counts = dataset.describe()
    assert (counts["missing_images"], counts["images_without_masks"]) == (2, 1)
    assert (counts["masks"], counts["images_available"]) == (8, 5)
    empty = dataset[dataset.ids.index("sa_3")]
    assert empty.masks.shape == (0, HEIGHT, WIDTH) and empty.points is None


def test_bad_files_of_sa1b_say_what_is_wrong(tmp_path):
    files = sa1b_files(NAMES[:1])
    shard = write_shard(tmp_path / "a" / "sa_000000.tar", files)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "sa_000000.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match="sa_000000.tar.gz is compressed: run gunzip"):
        Sa1b(tmp_path / "gz")
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(ValueError, match="sa_000000.tar is not a whole, uncompressed tar"):
        Sa1b(shard)
    whole = write_shard(tmp_path / "c" / "sa_000000.tar", files)
    whole.write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(ValueError, match="sa_000000.tar is compressed: run gunzip on it first"):
        Sa1b(whole.parent)
    with pytest.raises(FileNotFoundError, match="no sa_.*jpg"):
        Sa1b(tmp_path / "nowhere")
    for name, data, message in [
        ("sa_1.json", b"{}", "sa_1 of .* instances format"),
        ("sa_1.json", sa1b_json("sa_1", [blob(0, 0)], width=WIDTH + 1), "has size"),
        ("sa_1.jpg", files["sa_1.jpg"][:-60], "sa_1 of .* cannot be read as an image"),
    ]:
        write_folder(tmp_path / "b", {**files, name: data})
        with pytest.raises(ValueError, match=message):
            Sa1b(tmp_path / "b")[0]
