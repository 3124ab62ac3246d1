"""The benchmark's rows give the stock masks, and its tables say what was measured."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import build_point_grid

from aopsam_lab.data.scenes import scene
from aopsam_lab.decoding import encode
from aopsam_lab.methods import METHODS, Grid
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.study import bench, bench_page, stock


@pytest.fixture
def small_grid(monkeypatch):
    """A grid of 4 x 4 points in place of 32 x 32 wherever the rows make one."""
    fewer = functools.partial(SamAutomaticMaskGenerator, points_per_side=4)
    monkeypatch.setattr(stock, "SamAutomaticMaskGenerator", fewer)
    monkeypatch.setattr(bench, "build_point_grid", lambda side: build_point_grid(4))
    monkeypatch.setitem(METHODS, "amg_d", Grid("amg_d", 4))


def test_every_row_finds_the_stock_masks(small_grid):
    sam = load_sam("tiny", device="cpu")
    encoded = encode(sam, scene(10_031, 160).image[:120])
    rows = bench.everything_rows(sam, None, encoded)
    expected = rows["stock generator"]()
    assert len(expected) > 3
    for name in list(rows)[1:5]:
        equal, lowest = bench.agreement(rows[name](), expected)
        assert equal and lowest >= 0.99, name
    result = stock.run_stock(sam, encoded)
    assert {mask["counts"] for mask in result.masks} == {mask["counts"].encode() for mask in expected}
    assert (np.diff(result.scores) <= 0).all() and set(result.prompts["status"]) == {"kept"}
    found = np.array([coco_mask.toBbox(mask) for mask in result.masks])
    assert np.allclose(result.boxes[:, 2:], found[:, :2] + found[:, 2:] - 1)


def test_rows_take_turns():
    calls = []
    seconds, results = bench.alternate({name: lambda name=name: calls.append(name) or name for name in "abc"}, 3)
    assert "".join(calls) == "abcbcacab"
    assert results == {"a": "a", "b": "b", "c": "c"} and all(len(times) == 3 for times in seconds.values())


def test_agreement_by_hand():
    def rle(*columns):
        return coco_mask.encode(np.asfortranarray(np.array([columns], np.uint8)))

    a, b, half = rle(1, 1, 0, 0), rle(0, 0, 1, 1), rle(1, 0, 0, 0)
    assert bench.agreement([b, a], [a, b]) == (True, 1.0)
    assert bench.agreement([a], [a, b]) == (False, 0.0)
    assert bench.agreement([half, b], [a, b]) == (True, 0.5)
    assert bench.agreement([], [a]) == (False, 0.0) and bench.agreement([], []) == (True, 1.0)


def test_bars_and_page():
    part = "everything, as they are"
    table = bench_page.with_ratios(
        pd.DataFrame(
            {
                "part": part,
                "row": ["stock generator", "batches side by side", "aop"],
                "seconds": [12.0, 2.0, 0.3],
                "peak_mib": [900.0, 90.0, float("nan")],
            }
        )
    )
    assert table["times_stock"].tolist() == pytest.approx([1, 6, 40])
    bars = bench_page.bars_table(table)
    assert bars["asked"].tolist() == [5.0, 30.0, 0.4]
    assert bars["reached"].tolist() == pytest.approx([6, 40, 0.1])
    assert len(bench_page.figure(table).axes) == 1
    steps = pd.DataFrame([{"run": part, "step": "RLE", "seconds": 0.1, "share": 0.05}])
    text = bench_page.page(table, bars, steps, {"gemm_gmacs": 40.0})
    assert "12" in text and "stock generator" in text and "40 G multiply-adds" in text


def test_a_bar_for_fewer_prompts():
    part = "decoder, MobileSAM"
    rows = ["stock, batch 64", "IoU before pixels, 35% pass"]
    bars = bench_page.bars_table(pd.DataFrame({"part": part, "row": rows, "seconds": [16.0, 4.0], "peak_mib": float("nan")}))
    assert bars["reached"].tolist() == pytest.approx([4, 4 * 10.24]) and bars["asked"].tolist() == [4.5, 30.0]


def test_time_is_summed_by_step_and_functions_are_put_back():
    class Owner:
        def work(self):
            return 3

    before, seconds = Owner.work, {}
    with bench.timed(seconds, {"work": (Owner, "work")}):
        assert Owner().work() + Owner().work() == 6
    assert Owner.work is before and 0 <= seconds["work"] < 1


def test_rows_as_they_are_measured(small_grid):
    """The measuring itself, at a small size: every row once, the decoder's within rounding of stock."""
    prompt_encoder, decoder = bench.random_modules(64, 8, 128)
    embedding = torch.randn(1, 64, 8, 8)
    with torch.inference_mode():
        rows = list(bench.bench_decoder("small", prompt_encoder, decoder, embedding, 8, 2))
    assert [row["rounds"] for row in rows] == [2, 2, 2, 2, 2, 1] and rows[-1]["row"] == bench.BF16
    assert all(row["largest_logit_difference"] <= 1e-4 and row["seconds"] > 0 for row in rows[:-1])
    assert 0 < rows[-1]["largest_logit_difference"] < 0.1
    sam = load_sam("tiny", device="cpu")
    wanted = ["stock generator", "batches side by side"]
    rows = list(bench.bench_everything("small", sam, None, [scene(10_032, 96)], (60, 90), wanted))
    assert [row["row"] for row in rows] == wanted and rows[1]["as_many_masks"] and rows[1]["lowest_match_iou"] >= 0.99
    assert rows[0]["miou"] == pytest.approx(rows[1]["miou"], abs=0.02)
