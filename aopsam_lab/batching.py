"""Work in batches that fit the device's memory (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, free to it
    return max(1, min(most, int((free + unused) * SHARE / bytes_each)))


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
