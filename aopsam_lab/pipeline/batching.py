"""Threads and batches: side by side on a CPU's cores, as large as a GPU's free memory allows (ours)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
SHARE = 0.5  # of the free memory that a batch is planned to take: what it takes is an estimate


def fitting_batch(device: torch.device, bytes_each: int, most: int) -> int:
    """How many items to work on at a time: as many as half the device's free memory holds, from 1 to `most`.

    Only CUDA says how much is free; elsewhere it is `most`.
    """
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # torch's own, free to it
    return max(1, min(most, int((free + unused) * SHARE / bytes_each)))


def in_batches(
    items: Tensor, size: int, work: Callable[[Tensor], Result], least: int = 1
) -> Iterator[Result]:
    """`work(part)` of `items`, at most `size` at a time, results in the items' order.

    On a CPU as many batches run side by side as torch has threads, each with one of them: a batch of small products
    leaves threads that share it waiting for each other. Batches become smaller, down to `least`, so that all threads have
    as many. Elsewhere one follows the other, see :func:`halving`.
    """
    threads = torch.get_num_threads() if items.device.type == "cpu" else 1
    turns = -(-len(items) // (size * threads))
    parts = (
        items.split(min(size, max(least, -(-len(items) // (turns * threads)))))
        if len(items)
        else ()
    )
    if threads == 1 or len(parts) < 2:
        yield from halving(items, size, work)
        return
    inference, grad = (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )  # both belong to the calling thread

    def run(part: Tensor) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(part)

    yield from _workers(threads).map(run, parts)


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch's own work takes one thread each."""
    all_there = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(
            1
        )  # of this thread, and the default of those that torch does not know yet
        torch.get_num_threads()  # now it knows this one
        all_there.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="aopsam_lab", initializer=start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # the default again
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=_workers.cache_clear
    )  # a forked process has no threads but its own


def halving(items: Tensor, size: int, work: Callable[[Tensor], Result]) -> Iterator[Result]:
    """`work(part)` of `items`, `size` at a time; where memory runs out, of half as many from there on.

    Raises torch.OutOfMemoryError where a single item does not fit.
    """
    at = 0
    while at < len(items):
        try:
            result = work(items[at : at + size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-min(size, len(items) - at) // 2)
            retry = True
        else:
            retry = False
        if retry:  # here, where the error and all that it holds on to are gone
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        at += size
        yield result
