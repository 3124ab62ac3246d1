"""Batches: side by side on a CPU's cores, halved where a GPU's memory runs out."""

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


def in_batches(
    items: Tensor, size: int, work: Callable[[Tensor], Result], least: int = 1
) -> Iterator[Result]:
    """Yield `work(part)` of all items, at most `size` at a time, in their order.

    On a CPU as many batches run side by side as torch has threads, each on one: threads that share
    a batch of small products wait for each other. Batches become smaller, down to `least`, so that
    all threads get equally many.
    """
    threads = torch.get_num_threads() if items.device.type == "cpu" else 1
    turns = -(-len(items) // (size * threads))
    each = max(least, -(-len(items) // max(1, turns * threads)))
    parts = items.split(min(size, each))
    if threads == 1 or len(parts) < 2:
        yield from halving(items, size, work)
        return
    # both modes belong to the calling thread
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(part: Tensor) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(part)

    yield from _workers(threads).map(run, parts)


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch's own work takes one thread each."""
    all_there = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of those torch does not know yet
        torch.get_num_threads()  # now torch knows this one
        all_there.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="aopsam_lab", initializer=start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # the default again
    return pool


if hasattr(os, "register_at_fork"):  # a forked process has no threads but its own
    os.register_at_fork(after_in_child=_workers.cache_clear)


def halving(items: Tensor, size: int, work: Callable[[Tensor], Result]) -> Iterator[Result]:
    """Yield `work(part)` of `size` items at a time; of half as many once memory runs out."""
    while len(items):
        try:
            done = [work(items[:size])]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            done = []
        if done:
            yield done.pop()
            items = items[size:]
        else:  # the error is gone, and with it the memory that it held
            size = -(-min(size, len(items)) // 2)
            torch.cuda.empty_cache()  # does nothing where there is no GPU
