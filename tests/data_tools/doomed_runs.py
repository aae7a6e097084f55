"""Preparations in processes of their own into which a kill strikes: from inside, at a counted line of the journal.

Whoever watches from outside may come too late on a crowded machine; here the run waits for the stroke. The processes
are forked from a server that has imported everything, so that twenty kills take seconds. What they leave is not judged.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil

from data_tools.journal import Journal
from data_tools.prepare import PrepareOptions, prepare

Victim = Literal["parent", "worker", "nobody"]
_SLACK_LINES = 4  # that a run may still write before it waits for the stroke
_PATIENCE_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """After so many lines of the journal and so many seconds, the victim is killed, or the run just stands still."""

    line: int
    seconds: float = 0.0
    victim: Victim = "parent"
    kind: Literal["task", "shard"] | None = None  # of the lines that are counted; None: all

    def arm(self) -> None:
        """Have it strike in this process; the run waits for it when it is some lines further."""
        append, seen, struck = Journal.append, 0, threading.Event()

        def strike() -> None:
            workers = psutil.Process().children(recursive=True) if self.victim == "worker" else []
            if not workers:
                os.kill(os.getpid(), signal.SIGKILL)
            with suppress(psutil.NoSuchProcess):  # it has just ended with its work
                workers[self.line % len(workers)].kill()
            struck.set()

        def append_and_count(journal: Journal, entry: Mapping[str, Any]) -> None:
            nonlocal seen
            append(journal, entry)
            seen += "job" not in entry and (self.kind is None or self.kind in entry)
            if self.victim == "nobody":
                if seen == self.line:
                    time.sleep(_PATIENCE_SECONDS)
            elif seen == self.line:
                threading.Timer(self.seconds, strike).start()
            elif seen > self.line + _SLACK_LINES:
                struck.wait(_PATIENCE_SECONDS)

        Journal.append = append_and_count  # type: ignore[method-assign]


def begin_doomed(
    source: Path, tokenizer: Path, output: Path, options: PrepareOptions, stroke: Stroke, **settings: Any
) -> BaseProcess:
    """Start a preparation in which a stroke will fall, unless it is finished before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "data_tools.prepare", "tokenizers"])
    process = context.Process(target=_run, args=(source, tokenizer, output, options, stroke, settings))
    process.start()
    return process


def was_struck(
    source: Path, tokenizer: Path, output: Path, options: PrepareOptions, stroke: Stroke, **settings: Any
) -> bool:
    """Run a preparation to its end, and return whether the stroke was that."""
    process = begin_doomed(source, tokenizer, output, options, stroke, **settings)
    process.join(_PATIENCE_SECONDS)
    assert process.exitcode is not None, "the run hangs"
    assert process.exitcode in (0, 1, -signal.SIGKILL)  # 1: of its worker's death it raised an error
    return process.exitcode != 0


def _run(
    source: Path, tokenizer: Path, output: Path, options: PrepareOptions, stroke: Stroke, settings: dict[str, Any]
) -> None:
    stroke.arm()
    prepare([source], tokenizer, output, options, **settings)
