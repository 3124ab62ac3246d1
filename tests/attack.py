"""Attacks the package with mutated files, stores and messages, and with kills: `python attack.py`.

Each input is a number, from which it is made again: `python attack.py pictures 17` tries one. A
worker process takes many; one that dies or hangs names its input. What is found: a signal, a hang,
an error that is no ValueError or OSError of one line, code that ran, and any answer that a
reference (Pillow, NumPy, the unharmed file) does not give.
"""

import asyncio
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from small import RunsCode, corners, rle_text, write_coco, write_weights

import aopsam_lab as aop
from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.data.images import read_image
from aopsam_lab.evaluator import iou_matrix
from aopsam_lab.pipeline.methods import METHODS, Grid
from aopsam_lab.pipeline.run import segment
from aopsam_lab.predictor import load_predictor
from aopsam_lab.sam.zoo import load_sam
from aopsam_lab.study.runner import STORE_NAME, run_study
from aopsam_lab.study.store import Store, make_key

LIMIT = 20.0  # seconds for an input
MEMORY = 12 * 2**30  # of a worker; an input that asks for more fails, not the machine
COUNTS = {
    **{"pictures": 1000, "weights": 400, "annotations": 600},
    **{"kills": 50, "stores": 40, "messages": 200},
}
# what the error of a refused input names
ABOUT = {
    **{"pictures": "picture.", "weights": "weights.", "annotations": "/set", "stores": "s.sqlite"},
    **{"kills": "killed", "messages": "no error gets out of the explorer"},
}
FINE = {"right", "refused"}
JUNK = (
    *(None, True, "", "x", [], {}, [[]], [{}], {"a": 1}, -1, 0, 1, 7, 1.5, -0.0, 1e8, -3e9),
    *(1e308, 2**31, 2**63, -(2**70), math.nan, math.inf, "NaN", "9" * 400, [0] * 9, "\0", "../a"),
    *([1.0, 1.0, math.nan, 5.0, 9.0, 9.0], [[1e9, 1, 2, 2, 3, 1e9]], {"size": [8, 8]}),
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes with flips, other numbers, pieces cut out, doubled or moved, or the end lost."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        # headers are short, and matter most
        end = len(data) if rng.random() < 0.5 else min(len(data), 200)
        at, n = rng.randrange(max(1, end)), rng.choice([1, 2, 4, 8, 64])
        match rng.randrange(7):
            case 0 | 1:
                data[at : at + 1] = bytes([(data[at : at + 1] or b"\0")[0] ^ 1 << rng.randrange(8)])
            case 2:
                big = rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1])
                data[at : at + 4] = big.to_bytes(4, rng.choice(["big", "little"]))
            case 3:
                del data[at : at + n]
            case 4:
                data[at:at] = data[at : at + n]
            case 5:
                data[at : at + n] = rng.randbytes(n)
            case 6 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def spoil(value: object, rng: random.Random) -> object:
    """JSON with junk in a place, or without the place."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.08:
        return rng.choice(JUNK)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, value = rng.choice(list(keys)), value.copy()
    if rng.random() < 0.1:
        del value[key]
    elif isinstance(value, list) and rng.random() < 0.05:
        value *= 3
    else:
        value[key] = spoil(value[key], rng)
    return value


def right(holds: object, what: str) -> None:
    """Stop where an answer is wrong."""
    if not holds:
        raise AssertionError(what)


class Attacks:
    """One method for each kind of COUNTS: it makes input `rng` and judges what becomes of it."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.canary = folder, folder / "code-ran"
        self.weights = write_weights(folder, seed=0)
        self.sam = load_sam("small", self.weights["checkpoint"], "cpu")
        self.predictor = load_predictor("small", self.weights["predictor"], "cpu")
        y, x = np.mgrid[:40, :56]
        self.image = np.stack([x * 4, y * 6, (x + y) % 17 * 15], 2).astype(np.uint8)
        self.explorer = None

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def pictures(self, rng: random.Random) -> None:
        kind = rng.choice("png jpeg webp tiff gif bmp ppm jp2 tga deep palette alpha grey".split())
        picture, options, out = Image.fromarray(self.image), {}, io.BytesIO()
        if kind == "deep":
            picture = Image.fromarray(self.image[..., 0].astype(np.uint16) * 257)
        elif kind in ("palette", "alpha", "grey"):
            picture = picture.convert({"palette": "P", "alpha": "RGBA", "grey": "L"}[kind])
        elif kind == "tiff":
            options["compression"] = rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
        formats = {"jp2": "jpeg2000", "deep": rng.choice(["png", "tiff"]), "palette": "gif"}
        picture.save(out, formats.get(kind, kind if picture.mode == "RGB" else "png"), **options)
        data = damage(out.getvalue(), rng)
        path = self.file(f"picture.{rng.choice(['png', 'jpg', 'tif'])}", data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_image(path)
        right(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, "no image")
        expected = None
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as reference:
            plain = reference.mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr")
            if plain and not reference.has_transparency_data:
                expected = np.array(ImageOps.exif_transpose(reference).convert("RGB"))
        if expected is not None:
            right(np.array_equal(pixels, expected), "other pixels than Pillow's")
        if pixels.size < 200_000 and rng.random() < 0.2:
            found = segment(pixels, "aop", self.sam, self.predictor, params=AsfParams(spacing=60))
            right(np.isfinite(found.scores).all(), "scores that are no numbers")
            right(all(rle["size"] == [*pixels.shape[:2]] for rle in found.masks), "other sizes")

    def weights_(self, rng: random.Random) -> None:
        name, kind = rng.choice(["checkpoint", "predictor"]), rng.randrange(6)
        state = load_file(self.weights[name])
        whole = Path(self.weights[name]).read_bytes()
        if name == "checkpoint" and kind < 3:
            whole = torch_file(state)
            if kind == 2:
                whole = zipped_anew(whole)
        if kind > 3:
            key = rng.choice([key for key, value in state.items() if value.is_floating_point()])
            change = rng.choice([math.nan, math.inf, "half", "int", "shape", "code", "none"])
            if isinstance(change, float):
                state[key].flatten()[0] = change
            elif change == "shape":
                state[key] = state[key].flatten()[:-1].clone()
            elif change in ("half", "int"):
                state[key] = state[key].to(torch.float16 if change == "half" else torch.int8)
            elif change == "none":
                del state[key]
            save_file(state, self.folder / "changed")
            data = (self.folder / "changed").read_bytes()
            if change == "code":
                data = torch_file({**state, key: RunsCode(self.canary)})
        elif rng.random() < 0.3:  # a number of the weights is another, or none
            at = rng.randrange(len(whole) // 2, len(whole))
            data = whole[:at] + rng.randbytes(4) + whole[at + 4 :]
        else:
            data = whole if rng.random() < 0.2 else damage(whole, rng)
        path = self.file(f"weights.{rng.choice(['pt', 'safetensors'])}", data)
        if name == "predictor":
            loaded = load_predictor("small", path, "cpu")
            right(all(p.isfinite().all() for p in loaded.state_dict().values()), "not finite")
            return
        loaded = load_sam("small", path, "cpu")
        safe = data[8:9] == b"{"
        reference = load_file(path) if safe else torch.load(path, weights_only=True)
        if data == whole:
            reference = state
        for key, value in loaded.state_dict().items():
            right(value.isfinite().all() and torch.equal(value, reference[key].float()), key)

    def annotations(self, rng: random.Random) -> None:
        shutil.rmtree(self.folder / "set", ignore_errors=True)
        mask = np.zeros((40, 56), bool)
        mask[5:20, 8:30] = True
        runs = [8 * 40 + 5, *[15, 25] * 21, 15, 20 + 26 * 40]
        own = [{"segmentation": corners(3, 4, 12)}, {"segmentation": rle_text(mask), "clicks": []}]
        own += [{"segmentation": {"size": [40, 56], "counts": runs}, "point_coords": [[9.0, 9.0]]}]
        images = {"a.png": self.image, "b.png": self.image[::-1]}
        folder = write_coco(self.folder / "set", images, dict.fromkeys(images, own))
        file, name = folder / "annotations.json", str(folder)
        if rng.random() < 0.3:  # SA-1B
            content = json.loads(file.read_text())
            file, name = folder / "sa_1.json", f"sa1b:{folder}"
            record = {"image": content["images"][0], "annotations": content["annotations"][:3]}
            file.write_text(json.dumps(record))
            Image.fromarray(self.image).save(folder / "sa_1.jpg")
        if rng.random() < 0.25:
            file.write_bytes(damage(file.read_bytes(), rng))
        else:
            content = json.loads(file.read_text())
            for _ in range(rng.choice([1, 1, 2, 5])):
                content = spoil(content, rng)
            file.write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = open_dataset(name)
        right(found.describe()["masks"] == sum(len(found[i].rles) for i in range(len(found))), "n")
        for i in range(len(found)):
            sample = found[i]
            masks = [coco_mask.decode(rle) for rle in sample.rles]
            right(all(m.shape == sample.image.shape[:2] and m.any() for m in masks), "outside")
            iou = iou_matrix(sample.rles, sample.rles)
            right(np.isfinite(iou).all() and np.allclose(np.diag(iou), 1), "IoU")
            for values in (sample.points, *(sample.clicks or [])):
                right(values is None or np.isfinite(np.array(values, float)).all(), "points")

    def stores(self, rng: random.Random) -> None:
        path, inputs = self.folder / "s.sqlite", [{"n": n, "text": "x" * 300} for n in range(60)]
        path.unlink(missing_ok=True)
        with Store(path) as store:
            store.add((one, f"image {one['n']}", "aop", {"miou": one["n"] / 60}) for one in inputs)
        data = path.read_bytes()
        if rng.random() < 0.4:  # a digit of a value is another
            at = rng.choice([one.end() for one in re.finditer(b'"miou":0.', data)])
            data = data[:at] + bytes([rng.choice(b"0123456789")]) + data[at + 1 :]
        else:
            data = damage(data, rng)
        self.file("s.sqlite", data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Store(path) as store:
                for n, one in enumerate(inputs):
                    right(store.values(make_key(one)) in ({}, {"miou": n / 60}), "another value")

    def messages(self, rng: random.Random) -> None:
        METHODS["amg_s"] = Grid("amg_s", 4)
        if self.explorer is None:
            small = mock.patch("aopsam_lab.widgets.session.loaded_predictor")
            small.start().return_value = self.predictor
            self.explorer = aop.explore(self.image, self.sam, "amg_s")
            self.explorer.set_state({})
        good = {
            "params": {"smoothing": 2.0, "confidence": 0.1, "spacing": 40.0, "elimination": 1.3},
            **{"method": "aop", "compare": "amg_s", "source": 0, "round": 1, "selected": 2},
            **{
                "least_iou": 0.5,
                "layers": {"masks": 0.5},
                "manual": [[[9.0, 9.0, 1], [30.0, 20.0, 0]]],
            },
        }
        asyncio.run(self.message(good, rng))
        asyncio.run(self.message({"method": "amg_s", "manual": [], "source": 0}, None))
        found, expected = self.explorer.segmentation, segment(self.image, "amg_s", self.sam)
        right(found is not None and found.masks == expected.masks, "no valid answer any more")

    async def message(self, state: dict, rng: random.Random | None) -> None:
        explorer = self.explorer
        if rng is None:
            explorer.set_state(state)
        elif rng.random() < 0.6:
            key = rng.choice(list(state))
            explorer.set_state({key: spoil(state[key], rng)})
        else:
            stream = io.BytesIO()
            Image.fromarray(self.image).save(stream, "png")
            content = spoil({"name": "a.png", "what": rng.choice(["coco", "x", "labels"])}, rng)
            data = [damage(stream.getvalue(), rng)] if rng.random() < 0.6 else []
            explorer._handle_custom_msg(content, data)
        if explorer._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await explorer._task
        said = explorer.message
        right("Error" not in said.split(":")[0] and "\n" not in said, f"the message line: {said}")

    def kills(self, rng: random.Random) -> None:
        if not (self.folder / "whole").exists():
            shutil.rmtree(self.folder / "kill-set", ignore_errors=True)
            images = {f"{i}.png": np.roll(self.image, i, 1) for i in range(6)}
            one = dict.fromkeys(images, [{"segmentation": corners(3, 4, 12)}])
            write_coco(self.folder / "kill-set", images, one)
            self.study("whole")
        shutil.rmtree(self.folder / "killed", ignore_errors=True)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                self.study("killed")
            os._exit(0)
        time.sleep(rng.random() * self.seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = self.stored("killed")
        # some images, each with all its rows
        right(len(before) % 2 == 0, "half an image")
        result = self.study("killed")
        right(result.n_reused == len(before), "stored rows were lost")
        after = self.stored("killed")
        right(len(after) == 12 and before.items() <= after.items(), "stored rows were changed")
        right({key: values for key, (values, _) in after.items()} == self.expected, "other scores")

    def study(self, name: str) -> object:
        start = time.perf_counter()
        result = run_study(
            **self.weights, methods=["aop_no_af", "aop"], dataset=self.folder / "kill-set",
            out=self.folder / name, device="cpu", timed_images=0, memory=False, progress=False,
            confidence=0.0, spacing=60.0, thresholds=(),
        )  # fmt: skip
        if name == "whole":
            self.seconds = time.perf_counter() - start
            self.expected = {key: values for key, (values, _) in self.stored(name).items()}
        return result

    def stored(self, name: str) -> dict[str, tuple]:
        path = self.folder / name / STORE_NAME
        if not path.exists():
            return {}
        with Store(path) as store:
            rows = store._connection.execute("SELECT key, vals, scored_at FROM scores").fetchall()
        return {key: tuple(rest) for key, *rest in rows}


def torch_file(content: dict) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zipped_anew(data: bytes) -> bytes:
    """A ZIP file with its members compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), 8)
    return out.getvalue()


def verdict(attacks: Attacks, kind: str, seed: int) -> str:
    """The words "right" or "refused", or what is wrong with the answer to an input."""
    method = getattr(attacks, "weights_" if kind == "weights" else kind)
    try:
        method(random.Random(f"{kind} {seed}"))
        answer = "right"
    except (ValueError, OSError) as error:
        # a person must see what it is about, and no stack trace
        named = ABOUT[kind] in str(error)
        clear = named and "\n" not in str(error) and len(str(error)) < 1000
        answer = "refused" if clear else f"unclear: {error!r}"[:500]
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"[:500]
    return "code ran" if attacks.canary.exists() else answer


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """A worker: answers (kind, seed) with its verdict."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C libraries say of damaged files
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError):
        attacks = Attacks(Path(folder))
        pipe.send("ready")
        while True:
            pipe.send(verdict(attacks, *pipe.recv()))


class Worker:
    """A process that is started anew when an input kills it."""

    def __init__(self) -> None:
        self.process = None

    def ask(self, kind: str, seed: int) -> str:
        if self.process is None:
            self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
            self.process = multiprocessing.get_context("spawn").Process(target=serve, args=[theirs])
            self.process.start()
            theirs.close()
            self.pipe.recv()
        self.pipe.send((kind, seed))
        with contextlib.suppress(EOFError):
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()
            self.close()
            return f"hangs for more than {LIMIT:.0f} s"
        self.process.join()
        code, self.process = self.process.exitcode, None
        return f"the process ended with {code}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def attack(worker: Worker, kind: str, seeds: Iterable[int]) -> dict[str, list[int]]:
    """The verdicts on inputs, and which they are."""
    found: dict[str, list[int]] = {}
    for seed in seeds:
        found.setdefault(worker.ask(kind, seed), []).append(seed)
    return found


def main(kinds: list[str], seeds: list[int]) -> int:
    """Print the verdicts on all inputs of the kinds; 1 where anything was found."""
    worker, bad = Worker(), set()
    for kind in kinds or COUNTS:
        start = time.perf_counter()
        found = attack(worker, kind, seeds or range(COUNTS[kind]))
        bad |= found.keys() - FINE
        for answer, which in found.items():
            print(f"{kind}: {len(which)} {answer}", "" if answer in FINE else which)
        print(f"{kind}: {time.perf_counter() - start:.0f} s", flush=True)
    worker.close()
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:2], [int(seed) for seed in sys.argv[2:]]))
