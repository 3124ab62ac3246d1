"""The bundled models, and small ones with a small data set, that several tests run on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from aopsam_lab.predictor import PromptPredictor, load_predictor
from aopsam_lab.sam.tiny import build_tiny_sam
from aopsam_lab.sam.zoo import SamSpec, load_sam
from aopsam_lab.study import PACKAGE_ROOT

SIDE = 48


@pytest.fixture(scope="session")
def sam():
    """The bundled tiny SAM."""
    return load_sam("tiny", device="cpu")


@pytest.fixture(scope="session")
def predictor():
    """Its Prompt Predictor."""
    return load_predictor("tiny", device="cpu")


@pytest.fixture(scope="session")
def small_sam():
    """A Sam of the usual parts with random weights: 128 pixels, an embedding of 32 x 8 x 8; all its masks pass."""
    torch.manual_seed(0)
    built = Sam(
        image_encoder=ImageEncoderViT(
            img_size=128, embed_dim=32, depth=2, num_heads=4, out_chans=32, use_rel_pos=True, window_size=4
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=64),
            iou_head_hidden_dim=32,
        ),
    )
    built.spec = SamSpec("mobile_sam", -1e9, 0.0, "0" * 64)
    return built.requires_grad_(False).eval()


def write_weights(folder: Path, seed: int) -> dict[str, str]:
    torch.manual_seed(seed)
    thresholds = {"pred_iou_thresh": "0", "stability_score_thresh": "0"}
    shape = {"embed_dim": "128", "stride": "8", "width": "64"}
    sam = build_tiny_sam()
    torch.nn.init.ones_(sam.mask_decoder.iou_prediction_head.layers[-1].bias)  # so some masks pass, whatever the draw
    for name, model, about in (("sam", sam, thresholds), ("predictor", PromptPredictor(128, 8), shape)):
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors", metadata=about)
    return {
        "sam": "tiny",
        "checkpoint": str(folder / "sam.safetensors"),
        "predictor": str(folder / "predictor.safetensors"),
    }


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Paths of a tiny SAM and a Prompt Predictor with random weights, as run_study takes them."""
    return write_weights(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), seed=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """14 small pictures of two squares; the last has no masks."""
    path = tmp_path_factory.mktemp("data") / "squares"
    (path / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(14):
        rng = np.random.default_rng(i)
        picture = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        images.append({"id": i, "file_name": f"{i:02d}.png", "width": SIDE, "height": SIDE})
        for x, y in rng.integers(2, SIDE - 14, (2, 2)) if i < 13 else ():
            picture[y : y + 12, x : x + 12] = rng.integers(90, 255, 3)
            corners = [float(v) for v in (x, y, x + 12, y, x + 12, y + 12, x, y + 12)]
            annotations.append({"id": len(annotations), "image_id": i, "segmentation": [corners], "iscrowd": 0})
        Image.fromarray(picture).save(path / "images" / f"{i:02d}.png")
    (path / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture(scope="session")
def kill_after():
    """kill_after(code, store, rows): run code in a process, end it with signal 9 once the store has that many rows."""

    def run(code: str, store: Path, rows: int) -> dict[str, tuple]:
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)})
        while len(stored(store)) < rows:
            assert process.poll() is None, "the study ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return stored(store)

    return run


@pytest.fixture(scope="session")
def stored_rows():
    return stored


def stored(path: Path) -> dict[str, tuple]:
    """What a store holds, read by another process: values and time of scoring by key."""
    if not path.exists():
        return {}
    connection = sqlite3.connect(path, timeout=60)
    try:
        rows = connection.execute("SELECT key, vals, scored_at FROM scores").fetchall()
    except sqlite3.OperationalError:  # the table is not there yet
        rows = []
    finally:
        connection.close()
    return {key: values for key, *values in rows}
