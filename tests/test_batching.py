from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aopsam_lab import batching
from aopsam_lab.batching import fitting_batch, halving
from aopsam_lab.decoding import Stopwatch, decode_and_filter, encode
from aopsam_lab.methods import Prompts
from aopsam_lab.sam.image_decoder import ImageDecoder
from aopsam_lab.sam.tiny import build_tiny_sam
from aopsam_lab.sam.zoo import SamSpec


def device_of(room: int):
    """A stand-in for a device on which `room` items fit, and the sizes of the batches that it was given."""
    sizes = []

    def work(part):
        sizes.append(len(part))
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return part * 2

    return work, sizes


def test_where_memory_runs_out_the_batch_is_halved_and_work_goes_on():
    work, sizes = device_of(room=3)
    found = torch.cat(list(halving(torch.arange(10), 8, work)))
    assert found.tolist() == list(range(0, 20, 2))
    assert sizes == [8, 4, 2, 2, 2, 2, 2], "the smaller size is kept"


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_each_item_is_worked_on_once_and_in_order(count, size, room):
    work, _ = device_of(room)
    found = list(halving(torch.arange(count), size, work))
    assert [x for part in found for x in part.tolist()] == list(range(0, 2 * count, 2))


def test_one_item_that_does_not_fit():
    work, sizes = device_of(room=0)
    with pytest.raises(torch.OutOfMemoryError):
        list(halving(torch.arange(4), 4, work))
    assert sizes == [4, 2, 1]


def test_other_errors_are_not_swallowed():
    def work(part):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(halving(torch.arange(4), 4, work))


def test_the_first_batch_follows_the_free_memory(monkeypatch):
    assert fitting_batch(torch.device("cpu"), 10**9, 64) == 64
    monkeypatch.setattr(batching.torch.cuda, "mem_get_info", lambda _: (8_000, 16_000))
    monkeypatch.setattr(batching.torch.cuda, "memory_reserved", lambda _: 3_000)
    monkeypatch.setattr(batching.torch.cuda, "memory_allocated", lambda _: 1_000)
    cuda = torch.device("cuda")
    assert fitting_batch(cuda, 100, 64) == 50  # half of 8,000 and of the 2,000 that torch keeps unused
    assert fitting_batch(cuda, 10, 64) == 64
    assert fitting_batch(cuda, 10**9, 64) == 1


def test_decoding_goes_on_in_smaller_batches_with_the_same_masks(monkeypatch):
    torch.manual_seed(0)
    sam = build_tiny_sam().eval().requires_grad_(False)
    encoded = encode(sam, np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    prompts, index = Prompts(torch.rand(20, 2) * 60, torch.ones(20)), torch.arange(20)
    everything = SamSpec("custom", -float("inf"), -float("inf"), "")
    expected = decode_and_filter(sam, encoded, prompts, index, everything)
    assert len(decode_and_filter(sam, encoded, prompts, index[:0], everything).iou) == 0
    decode, sizes = ImageDecoder.decode, []

    def short_of_memory(self, sparse, dense=None):
        sizes.append(len(sparse))
        if len(sparse) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, sparse, dense)

    monkeypatch.setattr(ImageDecoder, "decode", short_of_memory)
    found = decode_and_filter(sam, encoded, prompts, index, everything)
    assert max(sizes) > 6 and sum(size for size in sizes if size <= 6) == 20
    assert torch.equal(found.prompt, expected.prompt) and torch.equal(found.boxes, expected.boxes)
    assert torch.allclose(found.low_res, expected.low_res, atol=1e-4)


def test_times_wait_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for kind in ("cuda", "mps", "cpu"):
        with Stopwatch(torch.device(kind))("stage"):
            pass
    assert waited == ["cuda", "cuda", "mps", "mps"]
