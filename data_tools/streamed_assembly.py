"""Puts shards together while later tasks are still being encoded, so that little is left to do when the last one ends.

What a shard holds is shard_assembly.py's and shuffle.py's; which processes encode, worker_pool.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Condition

from data_tools.journal import Journal
from data_tools.manifest import ShardRecord
from data_tools.ranges import Task
from data_tools.shard_assembly import SplitAssembly
from data_tools.task_encoding import TaskResult


class EncodingStoppedError(Exception):
    """Nothing more is to be put together: the cause is raised elsewhere."""


class ResultsInOrder:
    """Results that come in any order, read in that of the tasks; a reader waits for what is still missing."""

    def __init__(self, known: Mapping[int, TaskResult]) -> None:
        self._by_task = dict(known)
        self._news = Condition()
        self._has_stopped = False

    def put(self, task: int, result: TaskResult) -> None:
        """Add the result of a task, whose files are there."""
        with self._news:
            self._by_task[task] = result
            self._news.notify_all()

    def stop(self) -> None:
        """Give nobody anything any more."""
        with self._news:
            self._has_stopped = True
            self._news.notify_all()

    def of(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        """Yield the result of each task, as soon as it is there.

        Raises:
            EncodingStoppedError: all is to stop.
        """
        for task in tasks:
            with self._news:
                while task.number not in self._by_task and not self._has_stopped:
                    self._news.wait()
                if self._has_stopped:
                    raise EncodingStoppedError
                result = self._by_task[task.number]
            yield result


def assemble_while_encoding(
    assemblies: Mapping[str, SplitAssembly],
    tasks: Sequence[Task],
    known: Mapping[int, TaskResult],
    encoded: Iterable[tuple[Task, TaskResult]],
    journal: Journal,
    at_once: int,
) -> tuple[list[TaskResult], dict[str, list[ShardRecord]]]:
    """Take what is encoded as it comes, and return the results of all tasks and the shards of every split.

    So many splits are put together at the same time; when one fails the others stop, and so does this.

    Raises:
        OSError: a shard cannot be written.
        Exception: whatever `encoded` raised.
    """
    results = ResultsInOrder(known)
    with ThreadPoolExecutor(at_once, thread_name_prefix="assembly") as threads:
        shards = {}
        for name, assembly in assemblies.items():
            shards[name] = threads.submit(assembly.run, tasks, results.of(tasks), journal)
            # in the thread that failed: it must not begin with another split
            shards[name].add_done_callback(lambda done: results.stop() if done.exception() else None)
        try:
            for task, result in encoded:
                results.put(task.number, result)
                _raise_cause(future for future in shards.values() if future.done())
            wait(shards.values())
            _raise_cause(shards.values())
        except BaseException:
            results.stop()
            raise
    return list(results.of(tasks)), {name: future.result() for name, future in shards.items()}


def _raise_cause(futures: Iterable[Future[list[ShardRecord]]]) -> None:
    """Raise what one of these has failed with, not what others were stopped by."""
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, EncodingStoppedError):
            raise error
