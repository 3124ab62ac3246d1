import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import EVERYTHING

from aopsam_lab.pipeline.batching import halving, in_batches
from aopsam_lab.pipeline.decode import Stopwatch, decode_and_filter, encode
from aopsam_lab.pipeline.types import Prompts
from aopsam_lab.sam.mask_decoder import ImageDecoder


def device_of(room: int, work):
    """A stand-in for a device with room for some items, and the sizes of the batches it got."""
    sizes = []

    def on_device(*arguments):
        sizes.append(len(arguments[-1]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return work(*arguments)

    return on_device, sizes


def doubled(part: torch.Tensor) -> list[int]:
    return (part * 2).tolist()


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_each_item_is_worked_on_once_and_in_order(count, size, room):
    work, _ = device_of(room, doubled)
    assert sum(halving(torch.arange(count), size, work), []) == list(range(0, 2 * count, 2))


def test_where_memory_runs_out_the_batch_is_halved_and_work_goes_on():
    work, sizes = device_of(3, doubled)
    assert sum(halving(torch.arange(10), 8, work), []) == list(range(0, 20, 2))
    assert sizes == [8, 4, 2, 2, 2, 2, 2], "the smaller size is kept"
    work, sizes = device_of(0, doubled)
    with pytest.raises(torch.OutOfMemoryError):
        list(halving(torch.arange(4), 4, work))
    assert sizes == [4, 2, 1]


@pytest.fixture(scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 6))
def test_batches_side_by_side_come_back_in_order(two_threads, count, size, least):
    found = list(in_batches(torch.arange(count), size, doubled, least))
    assert sum(found, []) == list(range(0, 2 * count, 2))
    assert all(len(part) <= max(size, least) for part in found)


def test_batches_run_side_by_side_with_a_thread_each(two_threads):
    both = threading.Barrier(2)

    def work(part):
        both.wait(timeout=20)  # passes only while the other batch is at work too
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return (torch.get_num_threads(), *modes, len(part))

    with torch.inference_mode():
        assert list(in_batches(torch.arange(8), 100, work)) == [(1, True, False, 4)] * 2
    assert list(in_batches(torch.arange(8), 100, work)) == [(1, False, True, 4)] * 2
    assert torch.get_num_threads() == 2, "the caller keeps its threads"


def test_all_threads_have_as_many_batches_and_a_small_one_stays(two_threads, monkeypatch):
    def work(part):
        return len(part), threading.current_thread() is threading.main_thread()

    assert list(in_batches(torch.arange(48), 16, work)) == [(12, False)] * 4
    assert list(in_batches(torch.arange(10), 16, work, least=4)) == [(5, False)] * 2
    assert list(in_batches(torch.arange(4), 100, work, least=4)) == [(4, True)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(in_batches(torch.arange(8), 2, work)) == [(2, True)] * 4


def test_an_error_in_a_batch_reaches_the_caller(two_threads):
    def work(part):
        raise RuntimeError(f"of {len(part)}")

    with pytest.raises(RuntimeError, match="of 2"):
        list(in_batches(torch.arange(4), 2, work))


def test_a_forked_process_makes_threads_of_its_own():
    program = """
        import os, torch
        from aopsam_lab.pipeline.batching import in_batches
        torch.set_num_threads(2)
        assert list(in_batches(torch.arange(6), 2, len)) == [2] * 3
        child = os.fork()
        if not child:
            os._exit(list(in_batches(torch.arange(6), 2, len)) != [2] * 3)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, timeout=60)


def test_decoding_goes_on_in_smaller_batches_with_the_same_masks(small_sam, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one batch after the other
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    encoded = encode(small_sam, image)
    prompts, index = Prompts(torch.rand(20, 2) * 60, torch.ones(20)), torch.arange(20)
    expected = decode_and_filter(small_sam, encoded, prompts, index, EVERYTHING)
    assert len(decode_and_filter(small_sam, encoded, prompts, index[:0], EVERYTHING).iou) == 0
    decode, sizes = device_of(6, ImageDecoder.decode)
    monkeypatch.setattr(ImageDecoder, "decode", lambda *arguments: decode(*arguments))
    found = decode_and_filter(small_sam, encoded, prompts, index, EVERYTHING)
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
