"""A run in many processes, here or on other machines: the workers of dask.distributed.

A run is `work(models, job)` for each job. A worker loads the models once. Where one is killed, dask
gives its job to another. The files of a run lie under the same paths for all processes.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from aopsam_lab.files import code_fingerprint, modules, write_atomically
from aopsam_lab.pipeline.run import LoadedModels, ModelFiles

AHEAD = 2  # jobs sent to each worker: one is done, one waits. More would fill the client's memory
Work = Callable[[LoadedModels, Any], Any]


class Here:
    """This process alone; it is asked as `Workers` are."""

    def __init__(self, models: LoadedModels) -> None:
        self.models = models

    def ask(self, look: Work, job: Any) -> list[Any]:
        """What `look` returns, as a list."""
        return [look(self.models, job)]

    def each(self, work: Work, jobs: Iterable) -> Iterator[tuple[Any, Any]]:
        """Yield each job, as soon as it is done, and what `work` returned, or its exception."""
        for job in jobs:
            try:
                result = work(self.models, job)
            except Exception as error:
                result = error
            yield job, result


class Workers(Here):
    """The workers of a dask client. Package, torch and weights must be those of the client."""

    def __init__(self, client: Any, files: ModelFiles, models: LoadedModels) -> None:
        super().__init__(models)
        self.client, self._shared = client, (files, _facts(models))

    def ask(self, look: Work, job: Any) -> list[Any]:
        """What `look` returns on each worker; ValueError says which one is refused, and why."""
        self.client.wait_for_workers(1)
        answers = self.client.run(_on_worker, *self._shared, look, job, on_error="return")
        for address, threads in self.client.nthreads().items():
            if threads > 1:
                answers[address] = ValueError("it has several threads: start it with --nthreads 1")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                raise ValueError(f"Worker {address} is refused: {answer}") from answer
        return list(answers.values())

    def each(self, work: Work, jobs: Iterable) -> Iterator[tuple[Any, Any]]:
        """As `Here.each`; ConnectionError where the scheduler is lost."""
        from distributed import as_completed

        jobs, address = iter(jobs), self.client.scheduler.address
        waiting: dict[Any, Any] = {}
        done = as_completed(loop=self.client.loop, with_results=True, raise_errors=False)
        try:
            while True:
                room = AHEAD * max(1, len(self.client.nthreads())) - len(waiting)
                for job in islice(jobs, max(0, room)):
                    future = self.client.submit(_on_worker, *self._shared, work, job, pure=False)
                    waiting[future] = job
                    done.add(future)
                if not waiting:
                    return
                future, result = next(done)
                if future.cancelled():
                    raise OSError(future.status)
                yield waiting.pop(future), result[1] if future.status == "error" else result
        except OSError as error:
            lost = f"The connection to the scheduler at {address} is lost."
            raise ConnectionError(f"{lost} What was done is kept: run it again.") from error
        finally:
            if self.client.status == "running":
                self.client.cancel(list(waiting))


@contextmanager
def connected(scheduler: Any, files: ModelFiles, models: LoadedModels) -> Iterator[Here]:
    """Who works: a scheduler's workers, or so many processes here; None or 1: this process.

    The scheduler is a dask client or an address; `models` are what the client loaded of `files`.
    """
    if scheduler is None or str(scheduler) in ("0", "1"):
        yield Here(models)
        return
    from distributed import Client

    with ExitStack() as stack:
        client = scheduler
        if not isinstance(client, Client):
            if str(scheduler).isdigit():
                client = stack.enter_context(local_cluster(int(scheduler)))
            try:
                client = stack.enter_context(Client(client))
            except (OSError, ValueError) as error:
                advice = "Start one with `dask scheduler`, and workers with `dask worker`."
                problem = f"There is no dask scheduler at {scheduler} ({error})"
                raise ConnectionError(f"{problem}. {advice}") from error
        if "dashboard" in client.scheduler_info(n_workers=0)["services"]:
            print(f"Dashboard: {client.dashboard_link}")
        yield Workers(client, files, models)


def local_cluster(n: int) -> Any:
    """A scheduler and n workers on this machine, which share its cores; with GPUs each has one."""
    from distributed import Nanny, Scheduler, SpecCluster

    threads, count = str(max(1, torch.get_num_threads() // n)), torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    # no limit of memory: what fills it are models, which dask cannot move to the disk
    options = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}
    workers = {}
    for i, gpu in zip(range(n), cycle(gpus.split(",")), strict=False):
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu}
        workers[i] = {"cls": Nanny, "options": {**options, "env": env}}
    own = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:8787"}
    return SpecCluster(workers, {"cls": Scheduler, "options": own}, silence_logs=logging.ERROR)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that many processes can work at."""
    add = parser.add_mutually_exclusive_group().add_argument
    about = "processes on this machine: at most one a core, or one a GPU"
    add("--workers", type=int, dest="scheduler", metavar="N", help=about)
    add("--scheduler", metavar="ADDRESS", help="a dask scheduler, whose workers do the work")


def see(crew: Here, out: Path, paths: Iterable[Path]) -> None:
    """ValueError where a worker does not see the folder `out`, or the first file that is there."""
    token = write_atomically(out / f".{os.getpid()}.run", "")
    files = [token, *islice(filter(Path.is_file, paths), 1)]
    crew.ask(lambda _, files: [file.open("rb").close() for file in files], files)
    token.unlink()


def _facts(models: LoadedModels) -> tuple[tuple[str, str], ...]:
    """What must be the same in all processes of a run."""
    code = code_fingerprint(modules())
    return ("package", code), ("torch", torch.__version__), *models.weights().items()


@lru_cache(maxsize=1)
def _loaded(files: ModelFiles, expected: tuple[tuple[str, str], ...]) -> LoadedModels:
    models = files.load()
    for (name, own), (_, wanted) in zip(_facts(models), expected, strict=True):
        if own != wanted:
            raise ValueError(f"its {name} is {own[:12]}, the client's {wanted[:12]}.")
    return models


def _on_worker(files: ModelFiles, expected: tuple, work: Work, job: Any) -> Any:
    return work(_loaded(files, expected), job)
