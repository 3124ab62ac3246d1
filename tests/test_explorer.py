"""The explorer without a browser: sources, what the page gets, state, messages, live answers."""

import asyncio
import base64
import io
import json
import re
from dataclasses import replace
from unittest import mock

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from PIL import Image
from pycocotools.coco import COCO
from segment_anything import SamPredictor

import aopsam_lab as aop
from aopsam_lab.asf import AsfParams
from aopsam_lab.masks import drawing
from aopsam_lab.masks.points import deepest_point
from aopsam_lab.masks.rle import decode_rle
from aopsam_lab.pipeline.decode import decode_and_filter
from aopsam_lab.pipeline.methods import METHODS, Grid
from aopsam_lab.pipeline.run import run_method
from aopsam_lab.pipeline.types import STATUSES, Models
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.explorer import NOTHING, PINNED
from aopsam_lab.widgets.session import Session
from aopsam_lab.widgets.sources import prepared, sources_of

EAGER = AsfParams(spacing=16, confidence=0.1, elimination=1.1)  # few prompts, some eliminated
ENCODED = {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """An image is encoded once for all tests, and the coarse grid has 16 points."""

    def encode(sam, image):
        key = image.tobytes()
        ENCODED[key] = ENCODED.get(key) or aop.encode(sam, image)
        return replace(ENCODED[key])

    monkeypatch.setattr("aopsam_lab.widgets.session.encode", encode)
    monkeypatch.setitem(METHODS, "amg_s", Grid("amg_s", 4))


@pytest.fixture
def explorer(sample):
    return aop.explore(sample, params=EAGER)


def send(explorer, *buffers: bytes, **content) -> None:
    """A message as the page sends it."""
    explorer._handle_custom_msg(content, list(buffers))


# --- what can be opened ---


def test_images_come_from_arrays_files_folders_samples_data_sets_and_mixtures(tmp_path, sample):
    for name in ("b.png", "a.jpg"):
        Image.fromarray(sample.image).save(tmp_path / name)
    assert [s.name for s in sources_of(tmp_path)] == ["a.jpg", "b.png"]
    assert np.array_equal(sources_of(tmp_path / "b.png")[0].read().image, sample.image)
    photo = sources_of("photos")[18]
    assert photo[:2] == ("000000423617.jpg", "aop.open_dataset('photos')[18]")
    assert len(photo.read().ground_truth) == 12
    few = aop.open_dataset("photos", 2)
    mixed = sources_of({"mine": sample.image, "set": few, "files": [tmp_path / "b.png", sample]})
    names = ["mine", *(f"set: {name}" for name in few.ids), "files: b.png", f"files: {sample.id}"]
    assert [s.name for s in mixed] == names and mixed[4].read().ground_truth is sample.rles
    same = sources_of([sample.image, sample.image])
    assert [(s.name, s.code) for s in same] == [("image", "image[0]"), ("image 2", "image[1]")]


def test_a_huge_image_is_reduced_with_its_ground_truth_without_a_warning_in_the_cell(
    tmp_path, sample, monkeypatch, recwarn
):
    # beyond it Pillow warns, beyond its double it refuses
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    monkeypatch.setattr("aopsam_lab.widgets.sources.MAX_PIXELS", 150_000)
    masks = decode_rle(prepared(sample).ground_truth, (316, 474))
    assert np.allclose(masks.mean((1, 2)), sample.masks.mean((1, 2)), atol=2e-3)
    Image.fromarray(sample.image).save(tmp_path / "huge.png")
    opened = aop.explore(tmp_path / "huge.png", params=EAGER)
    assert "640 x 427 pixels, explored at 474 x 316" in opened.message
    assert opened.segmentation.image.shape == (316, 474, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert "cannot be read as an image" in aop.explore(tmp_path / "huge.png").message
    assert not [w for w in recwarn if w.category is Image.DecompressionBombWarning]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "no images"),
        (lambda folder: folder / "missing.png", "no image file"),
        (lambda folder: str(folder / "text.png"), "read as an image: its format is none"),
        (lambda folder: np.zeros((1, 1, 3), np.uint8), "too small"),
        (lambda folder: [], "no image in this list"),
        (lambda folder: 7, "Nothing to explore in a int"),
    ],
)
def test_bad_input_is_said_in_the_message_line_and_the_panel_lives(tmp_path, make, words):
    if "read as" in words:
        (tmp_path / "text.png").write_text("no image")
    opened = aop.explore(make(tmp_path))
    assert words in opened.message and words in repr(opened) and opened.segmentation is None
    opened.manual = [[(1, 1, 1)]]  # nothing happens
    with pytest.raises(ValueError, match=words):
        opened.to_figure()


def test_a_bad_image_among_good_ones_and_a_bad_model(sample):
    opened = aop.explore([np.zeros((1, 1, 3), np.uint8), sample], params=EAGER)
    assert "too small" in opened.message
    opened.source = 1
    assert opened.message == "" and len(opened.segmentation.masks)
    opened.source = 0
    assert "too small" in opened.message and opened.segmentation is None and opened.left == {}
    assert "no SAM called 'nosuch'" in aop.explore(sample, sam="nosuch").message
    for argument in ("method", "compare"):
        assert "no method 'nosuch'" in aop.explore(sample, **{argument: "nosuch"}).message


# --- what the page gets ---


def test_packed_maps_have_five_digits_and_images_are_exact_or_bounded(sample):
    values = np.linspace(-0.5, 1.5, 66).reshape(6, 11)
    pack = packing.pack_maps(values)
    got = np.frombuffer(pack["data"], "<u2").reshape(pack["h"], pack["w"]) / 65535
    assert np.allclose(got, np.clip(values, 0, 1), atol=1e-5)
    small = packing.pack_image(sample.image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(small["data"]))), sample.image)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    large = packing.pack_image(noise)["data"]  # the worst there is
    assert len(large) <= 4_000_000 and Image.open(io.BytesIO(large)).size == (2000, 2000)


def test_the_order_of_rounds_is_what_happened(sam, predictor, photo):
    """Before each round of the method itself the same prompts wait as the page will show."""
    seg = run_method(sam, photo, "aop", predictor, params=EAGER)
    pack = packing.pack_result(seg, EAGER.smoothing, "")
    prompts = pd.DataFrame(pack["prompts"])
    with torch.inference_mode():
        proposal = METHODS["aop"].start(photo, Models(predictor), EAGER)
        rounds = 0
        while (index := proposal.next_round()) is not None:
            waiting = proposal.waiting.clone()
            waiting[index] = True  # until they are decoded
            assert np.array_equal(prompts["decided"] >= rounds, waiting.numpy())
            found = decode_and_filter(sam, photo, proposal.prompts, index, sam.spec)
            proposal.observe(found, sam.mask_threshold)
            rounds += 1
    assert pack["rounds"] == rounds > 1
    assert (prompts["status"] == STATUSES.index("eliminated")).any()
    assert pd.DataFrame(pack["references"])["round"].max() < rounds
    assert pack["masks"]["owners"] == seg.mask_prompt.tolist()
    assert pack["masks"]["counts"] == [mask["counts"].decode() for mask in seg.masks]


# --- state ---


def test_settings_give_what_a_fresh_run_gives_and_decode_only_what_is_new(
    explorer, sam, predictor, photo
):
    other = AsfParams(smoothing=1, confidence=0.3, spacing=20)
    for params in (EAGER, replace(EAGER, elimination=1.0), other):
        explorer.params = params
        seg, fresh = explorer.segmentation, run_method(sam, photo, "aop", predictor, params=params)
        assert seg.masks == fresh.masks and seg.prompts.equals(fresh.prompts)
        assert explorer.get_state("params")["params"] == vars(params)
    explorer.params = EAGER
    assert "(0 new)" in explorer.left["badge"] and "mIoU" in explorer.left["badge"]


def test_the_selected_prompt_and_the_round_stay_where_they_are(explorer):
    assert explorer.round == explorer.left["rounds"] > 1
    explorer.round = 1
    table = explorer.segmentation.prompts
    row = int((table["status"] == "kept").to_numpy().nonzero()[0][-1])
    explorer.selected = row
    assert explorer.detail["prompt"] == row
    assert len(explorer.detail["masks"]["counts"]) == len(explorer.detail["lines"]) == 3
    explorer.params = replace(EAGER, confidence=0.05)
    after = explorer.segmentation.prompts.iloc[explorer.selected]
    assert (after["x"], after["y"]) == tuple(table.iloc[row][["x", "y"]]) and explorer.round == 1
    explorer.method = "amg_s"  # no such point there
    assert explorer.selected == -1 and explorer.detail == {} and explorer.left["rounds"] == 1


def test_clicks_by_hand_add_a_mask_are_refined_and_taken_back(explorer, sample, monkeypatch):
    before = explorer.segmentation
    x, y, _ = map(float, deepest_point(max(sample.masks, key=np.sum)))
    explorer.manual = [[[x, y, 1]]]
    one = explorer.segmentation
    assert explorer.message == "" and len(one.masks) == len(before.masks) + 1
    assert one.n_decoded == before.n_decoded + 1 and (np.diff(one.scores) <= 0).all()
    mine = one.masks[int((one.mask_prompt == len(before.prompts)).nonzero()[0][0])]
    assert decode_rle([mine], sample.image.shape[:2])[0, int(y), int(x)]
    assert tuple(one.prompts.iloc[-1][["x", "y", "round", "status"]]) == (x, y, -1, "kept")
    assert packing.STYLES[explorer.left["prompts"][-1]["status"]][2] == "by hand"
    explorer.set_state({"manual": [[[x, y, 1], [5.0, 5.0, 0]]]})  # as the page does
    refined = explorer.segmentation.masks
    assert len(refined) == len(one.masks) and refined != one.masks
    again = eval(explorer.call, {"aop": aop, "image": sample})
    assert again.segmentation.masks == refined, "the call makes the same state"
    monkeypatch.setattr(Session, "ask", lambda *_: None)
    explorer.manual = [[[x, y, 1]], [[1.0, 1.0, 1]]]
    assert explorer.message == "SAM found nothing there." and len(explorer.manual) == 1
    explorer.manual = []
    assert explorer.message == "" and explorer.segmentation.masks == before.masks


def test_masks_of_clicks_are_those_of_sam_predictor(sam, sample, photo):
    session, stock = Session(prepared(sample), sam), SamPredictor(sam)
    stock.features, stock.is_image_set = photo.embedding, True
    stock.original_size, stock.input_size = sample.image.shape[:2], photo.input_size
    points, box = [(200.0, 100.0, 1), (5.0, 5.0, 0)], [(50.0, 50.0, 2), (300.0, 300.0, 3)]
    for multimask, clicks in (
        (None, points[:1]),
        (None, points),
        (None, box),
        (True, points + box),
    ):
        values = np.array([click for click in clicks if click[2] < 2]).reshape(-1, 3)
        masks, scores, _ = stock.predict(
            point_coords=values[:, :2] if len(values) else None,
            point_labels=values[:, 2] if len(values) else None,
            box=np.array([50, 50, 300, 300]) if (300, 300, 3) in clicks else None,
            multimask_output=bool(multimask) or clicks == points[:1],
        )
        found = session.predict(clicks, multimask)
        drawn = decode_rle([mask.rle for mask in found], masks.shape[1:])
        assert (drawn != masks).mean() < 1e-4  # sums in another order move a pixel at most
        assert np.allclose([mask.score for mask in found], scores, atol=1e-4)
        [best] = session.predict(clicks, multimask, best_only=True)
        assert best.rle == max(found, key=lambda mask: mask.score).rle


def test_an_object_has_a_box_three_candidates_and_a_name_that_a_refinement_keeps(explorer, sample):
    n = len(explorer.segmentation.prompts)
    x, y, _ = map(float, deepest_point(max(sample.masks, key=np.sum)))
    corners = [[x - 60, y - 60, 2], [x + 60, y + 60, 3]]
    explorer.manual = [corners]
    row = explorer.segmentation.prompts.iloc[n]
    assert explorer.selected == n, "the object that is made is selected"
    assert row[["x", "y", "x0", "y0"]].tolist() == [x, y, x - 60, y - 60]

    def mine() -> dict:
        seg = explorer.segmentation
        return seg.masks[int((seg.mask_prompt == n).nonzero()[0][0])]

    assert [line.split(":")[0] for line in explorer.detail["lines"]][:3] == [
        "part",
        "whole",
        "group",
    ]
    options = explorer.detail["masks"]["counts"]
    assert mine()["counts"].decode() in options
    for i in range(3):
        explorer.manual = [[*corners, [i, 0, 4]]]
        assert mine()["counts"].decode() == options[i]
    explorer.labels = {mine()["counts"].decode(): "dog"}
    explorer.manual = [[*corners, [x, y, 1]]]
    assert explorer.labels[mine()["counts"].decode()] == "dog" and explorer.selected == n
    assert "dog" in [one["name"] for one in explorer.annotations["categories"]]
    explorer.manual = []
    assert explorer.selected == n - 1 or explorer.selected == -1


def test_the_object_that_the_page_selects_with_its_clicks_stays_selected(explorer):
    n, seen = len(explorer.segmentation.prompts), []
    explorer.observe(lambda change: seen.append(change["new"]), "selected")
    explorer.set_state({"manual": [[[200.0, 100.0, 1]]], "selected": n})
    explorer.set_state({"manual": [[[200.0, 100.0, 1], [5.0, 5.0, 0]]], "selected": n})
    assert seen == [n] and explorer.detail["prompt"] == n


def test_hovering_sends_the_mask_that_a_click_would_give_and_nothing_else(explorer):
    sent, before = [], explorer.get_state()
    explorer.send = lambda content, buffers=None: sent.append(content)
    send(explorer, hover=[[200, 100, 1]])
    [answer] = sent
    assert explorer.get_state() == before and answer["hover"] == [[200, 100, 1]]
    explorer.manual = [[[200, 100, 1]]]
    [counts] = answer["masks"]["counts"]
    assert counts.encode() in [mask["counts"] for mask in explorer.segmentation.masks]


def test_annotations_are_written_where_asked_and_resumed_there(tmp_path, sample):
    images, file = {"a": sample, "b": sample.image[:200]}, tmp_path / "own" / "masks.json"
    assert not aop.explore(images, params=EAGER)._file, "nothing is written unasked"
    first = aop.explore(images, params=EAGER, annotations=file)
    gone, named = (mask["counts"].decode() for mask in first.segmentation.masks[:2])
    first.deleted, first.labels = [gone], {named: "dog"}
    first.source = 1
    first.manual = [[[50.0, 50.0, 1]]]
    coco = COCO(file)
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a", "b"]
    [dog] = coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds("dog")))
    written = [one["segmentation"]["counts"] for one in coco.anns.values()]
    assert dog["segmentation"]["counts"] == named and gone not in written
    assert len(coco.getAnnIds(2)) == len(first.segmentation.masks)
    again = aop.explore(images, params=EAGER, annotations=str(file))
    assert (again.deleted, again.labels, again.manual) == ([gone], {named: "dog"}, [])
    assert gone.encode() not in [mask["counts"] for mask in again.segmentation.masks]
    again.source = 1
    assert again.manual == [[[50.0, 50.0, 1]]] and again.annotations == json.loads(file.read_text())
    (tmp_path / "bad.json").write_text("[]")
    said = aop.explore(images, annotations=tmp_path / "bad.json").message
    assert "holds no COCO annotations" in said and (tmp_path / "bad.json").read_text() == "[]"


def test_another_method_or_this_setting_pinned_is_shown_beside(explorer, sample):
    explorer.compare = "amg_s"
    assert explorer.compared.method == explorer.right["title"] == "amg_s"
    again = eval(explorer.call, {"aop": aop, "image": sample})
    assert again.compared.masks == explorer.compared.masks
    explorer.compare = PINNED
    pinned = explorer.compared
    explorer.params = replace(EAGER, confidence=0.3)
    assert explorer.compared is pinned and pinned is not explorer.segmentation
    explorer.compare = NOTHING
    assert explorer.compared is None and explorer.right == {} and "compare" not in explorer.call
    with pytest.raises(ValueError, match="no method 'nosuch'"):
        explorer.compare = "nosuch"


def test_exports_are_the_segmentations_own(explorer):
    sent = []
    explorer.send = lambda content, buffers=None: sent.append((content, buffers))
    seg = explorer.segmentation
    third = seg.masks[2]["counts"].decode()
    for content in ({"what": "coco"}, {"what": "labels"}, {"what": "coco", "mask": third}):
        send(explorer, **content)
    (coco, [text]), (labels, [png]), (_, [single]) = sent
    [one] = json.loads(single)["annotations"]
    assert one["segmentation"]["counts"] == third
    assert json.loads(text)["annotations"] == seg.to_coco()["annotations"]
    assert coco["name"].endswith(".json") and labels["name"].endswith("_labels.png")
    expected = drawing.label_image(seg.masks, seg.image.shape[:2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)


def test_a_segmentation_is_explored_as_it_is(explorer, monkeypatch):
    seg = explorer.segmentation
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("it decodes"))
    opened = aop.explore(seg)
    assert opened.segmentation.masks == seg.masks
    assert opened.params == EAGER and opened.message == ""


def test_the_figure_and_a_still_image_are_shown_without_pyplot_and_kernel(explorer):
    figure = explorer.to_figure()
    assert [ax.get_title() for ax in figure.axes if ax.get_title()][-2:] == ["PCM", "PEM, maximum"]
    data, _ = DisplayFormatter().format(figure)
    assert Image.open(io.BytesIO(data["image/png"])).width > 500
    bundle, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == data["image/png"]
    output = nbformat.v4.new_output("execute_result", data=bundle, execution_count=1)
    cell = nbformat.v4.new_code_cell(outputs=[output])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert "widget-view+json" in str(bundle) and "widget-view+json" not in page
    assert "data:image/png;base64," in page


# --- live ---


def live(monkeypatch, act) -> None:
    """Run what the page does; `act` gets a function that waits until something is so."""

    async def until(condition):
        while not condition():
            await asyncio.sleep(0.005)

    monkeypatch.setattr("aopsam_lab.widgets.explorer.DEBOUNCE", 0.05)
    asyncio.run(asyncio.wait_for(act(until), 60))


def test_a_moving_slider_previews_at_once_and_decodes_when_it_rests(explorer, monkeypatch):
    start, previews = explorer.segmentation, []
    run = mock.create_autospec(Session.run, side_effect=Session.run)

    async def drag(until):
        for value in (0.12, 0.14, 0.16, 0.18, 0.3):
            explorer.set_state({"params": {**vars(EAGER), "confidence": value}})
            previews.append(len(explorer.preview))
        assert explorer.segmentation is start and explorer.busy
        assert not run.called, "nothing is decoded while it moves"
        await until(lambda: not explorer.busy)

    monkeypatch.setattr(Session, "run", run)
    live(monkeypatch, drag)
    assert run.call_args.args[2] == explorer.params == replace(EAGER, confidence=0.3)
    assert run.call_count == 1 and previews == sorted(previews, reverse=True)
    assert previews[-1] == len(explorer.segmentation.prompts)
    assert explorer.preview == [] and explorer.segmentation is not start


def test_a_newer_setting_stops_the_older_one_between_rounds(explorer, monkeypatch):
    finished = []

    async def change_twice(until):
        explorer.set_state({"method": "amg_d"})  # 1,024 points
        await until(lambda: " of 1024" in explorer.busy)
        explorer.observe(lambda change: finished.append(change["new"].method), "segmentation")
        explorer.set_state({"method": "aop_no_af"})
        await until(lambda: not explorer.busy)
        explorer.set_state({"method": "amg_d"})
        explorer.set_state({"method": "aop_no_af"})  # its answer is there already
        assert explorer.busy == "" and explorer.preview == []

    live(monkeypatch, change_twice)
    assert finished == ["aop_no_af"]


def test_what_fails_in_the_worker_is_said(explorer, monkeypatch):
    async def move(until):
        explorer.set_state({"params": {**vars(EAGER), "elimination": 1.35}})
        await until(lambda: explorer.message)

    monkeypatch.setattr(Session, "run", mock.Mock(side_effect=RuntimeError("out of luck")))
    live(monkeypatch, move)
    assert explorer.message == "RuntimeError: out of luck" and explorer.busy == ""


def test_another_image_is_shown_before_its_masks_which_appear_in_rounds(sample, monkeypatch):
    opened = aop.explore({"a": sample.image[:100], "b": sample}, params=EAGER)
    seen: list[tuple[str, bool, int]] = []

    def look(_: dict) -> None:
        n = len(opened.left["masks"]["counts"]) if opened.left.get("growing") else -1
        seen.append((opened.busy, bool(opened.image), n))

    async def choose(until):
        opened.observe(look, ["busy", "left"])
        opened.set_state({"source": 1})
        assert opened.image == {}, "the page does not wait for the image"
        await until(lambda: opened.segmentation is not None)

    live(monkeypatch, choose)
    words = [busy for busy, is_there, n in seen if is_there and n >= 0]
    assert "loading the model …" in words and "encoding the photograph …" in words
    assert any(re.fullmatch(r"\d+ of \d+ prompts …", busy) for busy in words)
    grown = [n for _, _, n in seen if n >= 0]
    assert grown == sorted(grown) and grown[0] == 0 < grown[-1]
    assert opened.busy == "" and not opened.left.get("growing")
    fresh = aop.explore(sample, params=EAGER).segmentation
    assert opened.segmentation.masks == fresh.masks, "what was shown early changes nothing"


def test_several_files_are_added_and_the_first_is_shown_a_damaged_one_only_said(
    explorer, sample, monkeypatch
):
    png = drawing.png_bytes(sample.image[:100])

    async def drop(until):
        for i, data in enumerate((png, png, b"no image")):
            send(explorer, data, name="mine.png", is_first=i == 0)
        assert explorer.names[1:] == ["mine.png", "mine.png (2)", "mine.png (3)"]
        await until(lambda: explorer.segmentation is not None and not explorer.busy)
        assert explorer.source == 1 and explorer.segmentation.image.shape == (100, 640, 3)
        explorer.set_state({"source": 3})
        await until(lambda: explorer.message)

    live(monkeypatch, drop)
    assert explorer.message.startswith("mine.png cannot be read as an image: its format is none of")
    assert explorer.busy == ""


def test_the_page_hears_that_the_kernel_listens(explorer):
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)
    send(explorer, ping=7)
    assert sent == [{"ping": 7}]
