"""The paper's figures, and what stands beside ours, by hand."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import part, row

from aopsam_lab.study import paper, sweeps, tables
from aopsam_lab.study.report import write_all

NAN = float("nan")


# --- what the poster prints ---


def test_the_papers_tables_are_whole():
    main, parts, curves = map(paper.published, ("main_comparison", "ablation", "parameter_sweeps"))
    assert (len(main), len(parts), len(curves)) == (45, 9, 16)
    assert set(main["sam"]) == {"mobile_sam", "vit_l", "vit_h"} and set(parts["sam"]) == {"vit_h"}
    assert not main.duplicated(["dataset", "sam", "method"]).any()
    assert (main["inf_lat_s"].isna() == main["method"].isin(["amg_s", "amg_d"])).all()
    assert parts["method"].tolist() == ["aop_no_as_af", "aop_no_af", "aop"] * 3
    values = curves.groupby("parameter", sort=False)["value"].agg(tuple).to_dict()
    assert values == sweeps.SWEPT


def test_cells_of_the_papers_tables_are_as_printed():
    main = paper.published("main_comparison").set_index(["sam", "dataset", "method"])
    for key, cells in {
        ("mobile_sam", "COCO", "aop"): [61.5, 0.096, 2.1, 58.1],
        ("vit_l", "SA-1B", "oas_point"): [67.6, 0.149, 9.7, 199.3],
        ("vit_h", "LVIS", "amg_d"): [71.0, NAN, 5.6, 88.0],
    }.items():
        np.testing.assert_allclose(main.loc[key, list(paper.COMPARED)].astype(float), cells)
    parts = paper.published("ablation").set_index(["dataset", "method"])
    row = parts.loc[("SA-1B", "aop_no_af"), list(paper.COMPARED)]
    assert row.tolist() == [72.8, 0.130, 10.1, 120.1]
    curves = paper.published("parameter_sweeps").set_index(["parameter", "value"])
    assert curves.loc["elimination", "elim_ratio_percent"].tolist() == [51.5, 42.3, 32.7, 24.6]
    assert curves.loc["smoothing", "peak_mem_gb"].isna().all()  # the poster's slip is left out
    assert curves.loc[("confidence", 0.4), ["miou", "peak_mem_gb"]].tolist() == [66.4, 9.6]


# --- beside ours ---


def test_our_figures_stand_beside_those_of_the_same_data_set():
    ours = ("photos", "coco-val2017", "lvis-v1-val", "sa1b", "holiday")
    assert list(map(paper.paper_dataset, ours)) == ["COCO", "COCO", "LVIS", "SA-1B", None]


def summary(**mious: float) -> pd.DataFrame:
    """One row a method; 0.1 s, 1,000 MiB and 50 masks each."""
    base = {"inf_lat_s": 0.1, "peak_mem_mb": 1000.0, "n_masks": 50.0}
    rows = [{"method": method, "miou": miou, **base} for method, miou in mious.items()]
    return pd.DataFrame(rows)


def facts(sam: str, dataset: str) -> dict:
    return {"parameters": {"sam": sam}, "dataset": {"name": dataset}}


def test_our_figures_beside_the_main_table_are_in_its_units():
    theirs = paper.main_table("mobile_sam", "photos")
    table = paper.beside(theirs, summary(amg_d=0.6, aop=0.63), "photos")
    assert table["method"].tolist() == ["amg_s", "amg_d", "oas_box", "oas_point", "aop"]
    own = table.set_index("method").loc["aop"]
    assert own[[f"miou_{part}" for part in paper.PARTS]].tolist() == pytest.approx([61.5, 63, 1.5])
    assert own["inf_lat_s_difference"] == pytest.approx(0.1 - 0.096)
    memory = own[[f"peak_mem_gb_{part}" for part in paper.PARTS]].tolist()
    assert memory == pytest.approx([2.1, 1.048576, -1.051424])  # 1,000 MiB are 1.048576 GB
    assert own["n_masks_difference"] == pytest.approx(50 - 58.1)
    assert table["miou_ours"].isna().tolist() == [True, False, True, True, False]
    assert np.isnan(table["inf_lat_s_difference"].iloc[1])  # the paper times no grid


@pytest.mark.parametrize(("sam", "dataset"), [("vit_b", "sa1b"), ("vit_h", "holiday")])
def test_nothing_stands_beside_what_the_paper_does_not_have(sam, dataset):
    assert paper.main_table(sam, dataset).empty
    text = part("beside_main", summary(aop=0.6), facts(sam, dataset))
    assert "<table" not in text and text.count(".") == 1
    assert (sam if dataset != "holiday" else dataset) in text


def test_the_main_table_is_shown_as_html():
    text = part("beside_main", summary(aop=0.63), facts("vit_h", "lvis-v1-val"))
    assert text.count('colspan="3"') == 4 and "LVIS's with ViT-H" in text
    cells = " ".join(f"<td>{cell}</td>" for cell in ("71.9", "63.0", "-8.9", "0.122"))
    assert f"<tr class=own><td>LVIS</td><td>AoP-SAM</td> {cells}" in text
    assert "images and the machines differ" in text and "10^9 bytes" in text


def three_images() -> pd.DataFrame:
    """Sampling gains 0.1, 0.2 and 0.3 of mIoU; filtering costs 0.05 and two masks on each image."""
    rows = []
    for i, gain in enumerate((0.1, 0.2, 0.3)):
        rows.append(row(f"i{i}", "aop_no_as_af", 0.4, n_masks=20))
        rows.append(row(f"i{i}", "aop_no_af", 0.4 + gain, n_masks=30))
        rows.append(row(f"i{i}", "aop", 0.35 + gain, n_masks=28))
    return tables.per_image_table(rows)


@pytest.mark.parametrize(("dataset", "place"), [("photos", 2), ("lvis-v1-val", 3), ("holiday", 3)])
def test_each_step_of_the_ablation_stands_beside_the_papers(dataset, place):
    per_image = three_images()
    peaks = {"aop_no_as_af": 300.0, "aop_no_af": 1300.0, "aop": 800.0}
    steps = paper.step_table(per_image, tables.summary_table(per_image, peaks), dataset)
    assert len(steps) == 8 and steps["source"].tolist().index("ours") == place
    ours = steps[steps["source"] == "ours"].set_index("step")
    sampling, filtering = ours.loc["adaptive sampling"], ours.loc["adaptive filtering"]
    assert sampling["miou"] == pytest.approx(20)
    assert 9.9 < sampling["miou_lo"] < 20 < sampling["miou_hi"] < 30.1
    assert sampling["peak_mem_gb"] == pytest.approx(1.048576) and sampling["n_images"] == 3
    changes = filtering[["miou", "miou_lo", "miou_hi", "n_masks", "peak_mem_gb"]].tolist()
    assert changes == pytest.approx([-5, -5, -5, -2, -0.524288])
    theirs = steps[steps["source"] == "paper"].set_index(["step", "dataset"])
    assert theirs.loc[("adaptive sampling", "SA-1B"), "miou"] == pytest.approx(72.8 - 57.2)
    assert theirs.loc[("adaptive filtering", "LVIS"), "miou"] == pytest.approx(0.2)
    assert theirs.loc[("adaptive filtering", "SA-1B"), "peak_mem_gb"] == pytest.approx(-3.5)


def test_our_figures_fill_the_rows_of_the_ablation_that_match():
    per_image = three_images()
    whole = tables.summary_table(per_image, {})
    table = paper.beside(paper.published("ablation"), whole, "photos")
    table = table.set_index(["dataset", "method"])
    assert len(table) == 9 and table["miou_paper"].notna().all()
    filled = table["miou_ours"].notna().groupby("dataset").sum().to_dict()
    assert filled == {"COCO": 3, "LVIS": 0, "SA-1B": 0}
    assert table.loc[("COCO", "aop"), "miou_difference"] == pytest.approx(55 - 70.1)
    text = part("beside_ablation", whole, per_image, facts("mobile_sam", "photos"))
    assert text.count("<table") == 2 and "ours, photos" in text and "SAMs differ" in text
    assert "+20.0 [" in text and "-5.0 [-5.0, -5.0]" in text
    text = part("beside_ablation", whole, per_image, facts("vit_b", "holiday"))
    assert "no data set of the paper matches" in text and "difference" not in text
    # a step without one of its methods has no row of ours; peaks were not measured
    per_image = per_image.query("method != 'aop_no_as_af'")
    steps = paper.step_table(per_image, tables.summary_table(per_image, {}), "photos")
    assert steps.query("source == 'ours'")["step"].tolist() == ["adaptive filtering"]
    assert steps["peak_mem_gb"].isna().sum() == 1


# --- the signs of the sweeps ---


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (-9.0, (-3.0, -5.0, -1.0), "agrees"),
        (3.8, (2.0, 0.5, 4.0), "agrees"),
        (-9.0, (3.0, 1.0, 5.0), "disagrees"),
        (3.8, (-2.0, -4.0, -0.5), "disagrees"),
        (3.8, (2.0, -0.5, 4.0), "not clear"),
        (3.8, (2.0, 0.0, 4.0), "not clear"),  # the interval's end belongs to it
        (3.8, (2.0, NAN, NAN), "not clear"),  # one image
        (3.8, (NAN, NAN, NAN), "not measured"),
        (-0.5, (-0.01, -0.01, -0.01), "agrees"),  # measured once, every step in one direction
    ],
)
def test_a_sign_agrees_only_where_the_interval_leaves_out_zero(theirs, ours, said):
    assert paper.verdict(theirs, *ours) == said


def swept(grids=sweeps.SWEPT, sign=1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trends and sweep table of four images, two of them timed; sign 1 moves as the paper does."""
    rows, table = [], []
    for parameter, values in grids.items():
        rising = sign if parameter == "elimination" else -sign
        for step, value in enumerate(values):
            peak = 1000 + 100 * rising * step
            table.append({"parameter": parameter, "value": value, "peak_mem_mb": peak})
            for i in range(4):
                change = rising * step * (i + 1)
                counts = {"n_sampled": 100, "n_eliminated": 50 - change, "n_masks": 50 + change}
                miou, seconds = 0.5 + 0.01 * change, 1 + 0.1 * change if i < 2 else NAN
                of = f"i{i}", sweeps.label(parameter, value), miou
                rows.append(row(*of, mask_lat_s=seconds, **counts))
    return sweeps.trend_table(tables.per_image_table(rows), grids), pd.DataFrame(table)


def test_twelve_signs_that_agree_and_their_changes_in_the_papers_units():
    signs = paper.sign_table(*swept())
    found = signs.groupby("parameter", sort=False)["column"].agg(list).to_dict()
    assert found == {
        "smoothing": ["miou", "n_masks"],
        "confidence": ["miou", "n_masks", "peak_mem_gb"],
        "spacing": ["miou", "n_masks", "peak_mem_gb"],
        "elimination": ["miou", "n_masks", "elim_ratio_percent", "mask_lat_s"],
    }
    assert len(signs) == 12 and set(signs["verdict"]) == {"agrees"}
    table = signs.set_index(["parameter", "column"])
    smoothing = table.loc[("smoothing", "miou")]
    assert smoothing[["first", "last", "n_images"]].tolist() == [1, 4, 4]
    assert smoothing["paper_change"] == pytest.approx(-9.0)
    assert smoothing["change"] == pytest.approx(-7.5)  # the mean of -3, -6, -9 and -12 points
    assert -12.1 < smoothing["change_lo"] < -7.5 < smoothing["change_hi"] < -2.9
    latency = table.loc[("elimination", "mask_lat_s")]
    assert latency[["change", "n_images"]].tolist() == pytest.approx([0.45, 2])
    assert latency["paper_change"] == pytest.approx(0.37)
    ratio = table.loc[("elimination", "elim_ratio_percent")]
    assert ratio[["change", "paper_change"]].tolist() == pytest.approx([-7.5, -26.9])
    memory = table.loc[("spacing", "peak_mem_gb")]
    once = memory[["change", "change_lo", "change_hi"]].tolist()
    assert once == pytest.approx([-0.3 * 1.048576] * 3) and np.isnan(memory["n_images"])


def test_a_peak_that_goes_up_and_down_has_no_clear_sign():
    trends, table = swept()
    own = table["parameter"] == "spacing"
    table.loc[own, "peak_mem_mb"] = [1000.0, 950.0, 990.0, 980.0]
    spacing = paper.sign_table(trends, table).query("column == 'peak_mem_gb'").iloc[1]
    changes = spacing[["change", "change_lo", "change_hi"]].tolist()
    assert changes == pytest.approx([x * 0.001048576 for x in (-20, -60, 20)])
    assert spacing["verdict"] == "not clear"


def test_verdicts_on_other_signs_no_change_no_measure_and_other_values():
    assert set(paper.sign_table(*swept(sign=-1.0))["verdict"]) == {"disagrees"}
    assert set(paper.sign_table(*swept(sign=0.0))["verdict"]) == {"not clear"}
    trends, table = swept()
    unmeasured = paper.sign_table(trends, table.assign(peak_mem_mb=NAN))
    assert unmeasured.query("column == 'peak_mem_gb'")["verdict"].tolist() == ["not measured"] * 2
    other = paper.sign_table(*swept({"smoothing": (1.0, 2.0, 3.0)}))
    assert other["verdict"].tolist() == ["other values"] * 2
    assert paper.sign_table(*swept({})).empty


def test_signs_read_from_a_file_are_told_in_words(tmp_path):
    signs = paper.sign_table(*swept())
    write_all(tmp_path, {"signs.csv": signs})
    text = part("beside_signs", pd.read_csv(tmp_path / "signs.csv"))
    assert "is not clear:" not in text
    unclear = part("beside_signs", paper.sign_table(*swept(sign=0.0)))
    assert "Why mIoU along spacing is not clear: from 4 to 7 the masks of an image" in unclear
    assert "Of 12 signs of the paper's sweeps: 12 agree with ours." in text
    assert (
        "smoothing 1 to 4" in text and "measured once a setting" in text and "timed images" in text
    )
    rows = {
        "spacing 4 to 7": "Peak_Mem agrees -0.180 -0.315 [-0.315, -0.315] GB –",
        "elimination 1.25 to 1.4": "Mask_Lat agrees +0.370",
    }
    for parameter, cells in rows.items():
        assert f"<td>{parameter}</td><td>" + cells.split()[0] in text
        assert cells in " ".join(re.sub("<[^>]*>", " ", text).split())
