"""Runs stages on this machine: datatrove's local executor, on processes whose death is noticed.

Its own pool waits for ever when a process is killed, as by the kernel when memory runs out.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from loguru import logger

from data_tools.curation.accounting import write_whole
from data_tools.curation.stages import Stage
from data_tools.errors import WorkerError

OnProgress = Callable[[str, int, int], None]  # stage, finished tasks, tasks
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def run_stages(stages: Sequence[Stage], logs: Path, workers: int, on_progress: OnProgress) -> None:
    """Run the tasks of every stage that no earlier run has finished.

    Raises:
        WorkerError: a process died.
        Exception: whatever a task raised; the tasks under way then are stopped.
    """
    with _processes(workers) as pool:
        for stage in stages:
            executor = LocalPipelineExecutor(stage.pipeline, tasks=stage.tasks, logging_dir=str(logs / stage.name))
            waiting = executor.get_incomplete_ranks()
            on_progress(stage.name, stage.tasks - len(waiting), stage.tasks)
            saved = logs / stage.name / "executor.pickle"
            if waiting:
                write_whole(saved, pickle.dumps(executor))
            futures = {pool.submit(_run_task, saved, rank): rank for rank in waiting}
            _wait(stage, logs, futures, on_progress)


def _wait(stage: Stage, logs: Path, futures: dict[Future[None], int], on_progress: OnProgress) -> None:
    finished = stage.tasks - len(futures)
    try:
        for future in as_completed(futures):
            future.result()
            finished += 1
            on_progress(stage.name, finished, stage.tasks)
    except BrokenProcessPool as error:
        folder = logs / stage.name
        begun = {int(path.stem.removeprefix("task_")) for path in folder.glob("logs/task_*.log")}
        done = {int(path.name) for path in folder.glob("completions/*")}
        under_way = ", ".join(map(str, sorted(begun - done)))
        raise WorkerError(
            f"a process of stage {stage.name} was ended; under way were the tasks {under_way} of {stage.tasks}",
            "processes that live until the job is done",
            "look whether memory ran out, or who ended it; the same command again goes on with what is not finished",
        ) from error


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool; when the block fails, its processes are killed, so that none writes on."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_prepare_process, initargs=(os.getpid(),)
    )
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _prepare_process(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it was gone before the kernel was asked


def _run_task(saved: Path, rank: int) -> None:
    """Run one task with counters of its own; what datatrove tells goes to the task's log alone."""
    executor = pickle.loads(saved.read_bytes())  # noqa: S301 - written by this run
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        try:
            executor._run_for_rank(rank, local_rank=1)
        finally:
            logger.remove()
