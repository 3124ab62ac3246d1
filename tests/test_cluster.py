"""Workers: the same tables as in one process, whatever is killed; who is refused; what is kept."""

import json
import os
import re
from contextlib import closing

import dask
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import METHODS, QUICK, kill_after, row, stored
from distributed import Client
from small import corners, die_once, double, write_coco, write_weights

from aopsam_lab import __main__ as cli
from aopsam_lab import cluster
from aopsam_lab.pipeline.run import ModelFiles
from aopsam_lab.study import PACKAGE_ROOT, tables
from aopsam_lab.study.report import part
from aopsam_lab.study.runner import STORE_NAME
from aopsam_lab.study.settings import THRESHOLDS

TIMES = ["encode_s", "inf_lat_s", "mask_lat_s", "total_s", "processor"]


@pytest.fixture(scope="module")
def files(weights):
    return ModelFiles(weights["sam"], weights["checkpoint"], device="cpu")


@pytest.fixture(scope="module")
def workers(files):
    """Two worker processes of one thread, which know the small Sam."""
    with dask.config.set({"distributed.worker.preload": ["small"]}):
        with cluster.connected(2, files, files.load()) as two:
            yield two


@pytest.fixture(scope="module")
def client(workers):
    return workers.client


# --- jobs ---


def test_jobs_are_done_once_and_what_they_raise_is_returned(workers):
    found = dict(workers.each(double, [1, 2, "bad", 3]))
    assert {job: found[job] for job in (1, 2, 3)} == {1: (128, 2), 2: (128, 4), 3: (128, 6)}
    assert isinstance(found["bad"], LookupError) and "no such job" in str(found["bad"])
    here = dict(cluster.Here(workers.models).each(double, [1, "bad"]))
    assert here[1] == (128, 2) and isinstance(here["bad"], LookupError)


def test_few_jobs_are_in_hand_and_those_left_are_given_up(workers, client):
    taken = []
    results = workers.each(double, (taken.append(i) or i for i in range(10_000)))
    for done in range(1, 30):
        next(results)
        assert len(taken) <= done + 2 * cluster.AHEAD
    results.close()
    assert not any(future.status == "pending" for future in client.futures.values())


def test_a_killed_workers_job_is_done_by_another(workers, tmp_path):
    jobs = [(i, tmp_path / f"{i}" if i in (2, 5) else None) for i in range(8)]
    found = [result for _, result in workers.each(die_once, jobs)]
    assert sorted(number for number, _ in found) == list(range(8))
    assert len({pid for _, pid in found}) >= 3, "workers were started anew"


# --- who is refused ---


def test_a_worker_that_differs_is_refused_by_name(workers, client, files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Worker tcp://.* is refused: .*absent.png"):
        workers.ask(lambda _, path: path.stat(), tmp_path / "absent.png")
    other = write_weights(tmp_path, seed=1)
    models = ModelFiles(other["sam"], other["checkpoint"], device="cpu").load()
    with pytest.raises(ValueError, match=r"refused: its SAM \(small\) is \w{12}, the client's"):
        cluster.Workers(client, files, models).ask(double, 1)
    for name, change in (
        ("package", lambda: monkeypatch.setattr(cluster, "code_fingerprint", lambda _: "other")),
        ("torch", lambda: monkeypatch.setattr(torch, "__version__", "1.0")),
    ):
        with monkeypatch.context():
            change()
            asked = cluster.Workers(client, files, workers.models)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=f"refused: its {name} is"):
            asked.ask(double, 1)


def test_a_data_set_that_workers_do_not_see_is_refused_before_anything_is_scored(
    study, client, folder, tmp_path, monkeypatch
):
    image = np.zeros((48, 48, 3), np.uint8)
    own = write_coco(
        tmp_path / "own", {"a.png": image}, {"a.png": [{"segmentation": corners(2, 2, 9)}]}
    )
    from aopsam_lab.data.image_set import ImageSet

    kept = ImageSet.alone

    def removed(self, i):
        (own / "images/a.png").unlink(missing_ok=True)
        return kept(self, i)

    monkeypatch.setattr(ImageSet, "alone", removed)
    with pytest.raises(ValueError, match=r"Worker .* is refused: .*a\.png"):
        study(dataset=own, n_images=1, scheduler=client)
    assert stored(tmp_path / "out" / STORE_NAME) == {}


def test_a_scheduler_that_is_not_there_is_named(files, weights):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ConnectionError, match="no dask scheduler at tcp://127.0.0.1:1 "):
            with cluster.connected("tcp://127.0.0.1:1", files, None):
                pass


# --- studies ---


def test_workers_give_the_table_of_one_process(study, client, tmp_path):
    asked = {"n_images": 6, "timed_images": 2, "thresholds": THRESHOLDS}
    serial = study(**asked, out=tmp_path / "serial")
    spread = study(**asked, scheduler=client)
    assert (spread.n_scored, spread.n_reused) == (12, 0) and spread.provenance["workers"] == 2
    for name in ("per_image", "curves"):
        one, two = (
            getattr(result, name).drop(columns=TIMES, errors="ignore")
            for result in (serial, spread)
        )
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    timed = spread.per_image.iloc[:4]
    assert (timed[TIMES[:4]] > 0).all(axis=None) and spread.per_image["processor"][4:].isna().all()
    assert timed["processor"].str.endswith(", threads: 1").all()
    assert spread.provenance["timed_on"] == [spread.provenance["processor"]]
    assert study(**asked, scheduler=client).n_scored == 0
    again = study(**asked, scheduler=1)  # in this process: scores are those of the workers
    assert again.n_scored == (0 if torch.get_num_threads() == 1 else 4)


def test_a_killed_client_loses_the_images_in_hand(study, client, weights, folder, tmp_path):
    out, address = tmp_path / "killed", client.scheduler.address
    arguments = {"methods": METHODS, "dataset": str(folder), "n_images": 14, "out": str(out)}
    arguments |= {**QUICK, **weights, "scheduler": address}
    code = f"from aopsam_lab.study.runner import run_study; run_study(**{arguments!r})"
    before = kill_after(code, out / STORE_NAME, rows=3)
    result = study(n_images=14, out=out, thresholds=THRESHOLDS, scheduler=address)
    assert (result.n_reused, result.n_scored) == (len(before), 28 - len(before))
    after = stored(out / STORE_NAME)
    assert len(after) == 28 and before.items() <= after.items()


def test_a_lost_scheduler_is_one_error_and_what_was_done_is_kept(study, tmp_path):
    config = {"distributed.worker.preload": ["small"], "distributed.comm.timeouts.connect": "1s"}
    with dask.config.set(config), cluster.local_cluster(1) as one, Client(one) as client:
        lose = one.scheduler.close
        real = cluster.Workers.each

        def each(self, work, jobs):
            for n, result in enumerate(real(self, work, jobs)):
                yield result
                if n == 1:
                    one.sync(lose)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster.Workers, "each", each)
            with pytest.raises(ConnectionError, match="is lost. What was done is kept"):
                study(n_images=14, scheduler=client)
    assert len(stored(tmp_path / "out" / STORE_NAME)) == 4


def test_times_of_two_kinds_of_processor_have_no_mean():
    rows = [
        row("a", "aop", 0.5, mask_lat_s=0.2, processor="P, 1 thread"),
        row("a", "amg_s", 0.5, mask_lat_s=0.4, processor="P, 1 thread"),
        row("b", "aop", 0.7, mask_lat_s=0.6, processor="Q, 1 thread"),
        row("b", "amg_s", 0.4, mask_lat_s=0.8, processor="Q, 1 thread"),
    ]
    one, two = (tables.per_image_table(rows[:n]) for n in (2, 4))
    assert tables.summary_table(one, {})["mask_lat_s"].tolist() == [0.2, 0.4]
    assert tables.difference_table(one)["mask_lat_ratio"].tolist() == [2]
    assert two["mask_lat_s"].tolist() == [0.2, 0.4, 0.6, 0.8]
    summary = tables.summary_table(two, {})
    assert summary["mask_lat_s"].isna().all() and summary["miou"].tolist() == pytest.approx(
        [0.6, 0.45]
    )
    ratios = tables.difference_table(two).iloc[0]
    assert np.isnan(ratios["mask_lat_ratio"]) and ratios["n_decoded_ratio"] == 1
    facts = {"parameters": {"sam": "s", "seed": 0}, "dataset": {"images": 2, "name": "d"}}
    facts |= {"processor": "P + Q", "timed_on": ["P", "Q"]}
    assert "2 kinds of processor, so their means are left out: P; Q." in part("what_was_run", facts)


# --- folders ---


@pytest.fixture
def pictures(folder, tmp_path):
    own = tmp_path / "in"
    own.mkdir()
    for path in sorted((folder / "images").iterdir())[:3]:
        (own / path.name).write_bytes(path.read_bytes())
    (own / "03.png").write_text("no picture")
    return own


def test_a_folder_is_segmented_by_workers_and_done_images_are_skipped(
    pictures, client, weights, tmp_path, capsys
):
    asked = ["segment", str(pictures), "--sam", "small", "--checkpoint", weights["checkpoint"]]
    asked += ["--method", "amg_s", "--device", "cpu", "--out"]
    where = ["--scheduler", client.scheduler.address]
    assert cli.main([*asked, str(tmp_path / "here")]) == 1
    assert cli.main([*asked, str(tmp_path / "there"), *where]) == 1
    text = capsys.readouterr()
    assert text.out.count("3 of 4 images segmented, ") == 2 and text.err.count("failed: ") == 2
    for path in sorted((tmp_path / "here").iterdir()):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
    written = tmp_path / "there/01.json"
    assert json.loads(written.read_text())["info"]["method"] == "amg_s"
    before = written.stat().st_mtime_ns
    assert cli.main([*asked, str(tmp_path / "there"), *where]) == 1
    assert "3 of 4 images segmented, 3 of them before" in capsys.readouterr().out
    assert written.stat().st_mtime_ns == before
    os.utime(pictures / "01.png", ns=(before + 10**9, before + 10**9))  # the image is another now
    other = [*asked[:-1], "--predictor", weights["predictor"], "--out"]
    assert cli.main([*other, str(tmp_path / "there")]) == 1
    assert ", 2 of them before" in capsys.readouterr().out
    assert (
        cli.main(
            [
                "segment",
                str(pictures),
                *asked[2:6],
                "--method",
                "amg_d",
                *asked[8:],
                str(tmp_path / "there"),
            ]
        )
        == 1
    )
    assert "before" not in capsys.readouterr().out


def test_masks_are_found_by_workers_as_in_one_process(pictures, client, weights, tmp_path, capsys):
    asked = ["find-masks", str(pictures), "--sam", "small", "--checkpoint", weights["checkpoint"]]
    asked += ["--side", "3", "--device", "cpu"]
    for name, where in (("here", []), ("there", ["--scheduler", client.scheduler.address])):
        kept = ["--out", str(tmp_path / name), "--embeddings", str(tmp_path / f"{name}_npy")]
        assert cli.main([*asked, *kept, *where]) == 1
    assert capsys.readouterr().err.count("03.png: ") == 2
    for name in ("annotations.json", "records/01.json", "../{}_npy/01.npy"):
        one, two = (tmp_path / own / name.format(own) for own in ("here", "there"))
        assert one.read_bytes() == two.read_bytes(), name


# --- clusters ---


def test_the_guides_lines_for_slurm_make_a_job_of_one_worker():
    text = (PACKAGE_ROOT / "reports/official.md").read_text()
    code = re.search(r"```python\n(from dask_jobqueue.*?)```", text, re.S)[1]
    lines = code.splitlines()
    assert len(lines) <= 10
    made = {}
    exec("\n".join(line for line in lines if "scale" not in line and "aop." not in line), made)
    with closing(made["cluster"]) as slurm:
        script = slurm.job_script()
    assert "#SBATCH --gres=gpu:1" in script and "#SBATCH -t 04:00:00" in script
    assert "--nthreads 1" in script and "distributed.cli.dask_worker" in script
