"""Deadlines: a phase that takes too long ends the process, after every rank has written where it stands.

Two threads a rank: one keeps a heartbeat in the store of the process group, the other watches the clock, needs no
other rank, and shows its launcher that it stands. Costs the training thread nothing. What the sentence says is
who_is_late.py's.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import DeadlineSection
from pretrain.errors import ExitCode
from pretrain.life_signs import SIGN_SECONDS, give_sign
from pretrain.training.phases import Moment, PhaseName, Phases
from pretrain.training.who_is_late import Sign, describe_main_thread, last_collective, name_the_late

logger = logging.getLogger(__name__)

ANNOUNCED = "watchdog/announced"  # key of the store: the rank and phase whose deadline passed first
VERDICT = "watchdog/verdict"
BEATS_OF_A_DEADLINE = 4  # at least so many looks at the clock within the shortest deadline
ANSWER_SECONDS = 15.0  # for ranks to say where they stand, once one deadline has passed


class Store(Protocol):
    """Of a torch process group: some bytes by key, on rank 0 or with the launcher. Calls may hang with their server."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read; waits for the key."""

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""


class Watchdog:
    """Watches one rank. A context manager, for as long as the rank trains.

    Args:
        phases: of this rank.
        deadlines: by phase.
        folder: for the stacks.
        rank: this one.
        life_sign: the file by which this rank's launcher knows that it lives; null: nobody looks.
        leave: ends the process.
    """

    def __init__(
        self,
        phases: Phases,
        deadlines: DeadlineSection,
        folder: Path,
        *,
        rank: int,
        life_sign: Path | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._phases = phases
        self._folder = folder
        self._rank = rank
        self._life_sign = life_sign
        self._host = socket.gethostname()
        self._leave = leave
        self._limits = _limits(deadlines)
        shortest = min((limit for limit in self._limits.values() if limit is not None), default=0.0)
        self._beat_seconds = min(deadlines.heartbeat_seconds, shortest / BEATS_OF_A_DEADLINE or 3600.0)
        self._store: Store | None = None
        self._world_size = 1
        self._announced: str | None = None  # what another rank has announced
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._life_sign is not None:
            self._life_sign.unlink(missing_ok=True)

    def attach(self, store: Store, world_size: int) -> None:
        """Begin to exchange signs of life, once there is a process group; the store must be this rank's own copy."""
        self._world_size = world_size
        self._store = store
        threading.Thread(target=self._beat, args=(store,), name="heartbeat", daemon=True).start()

    def _beat(self, store: Store) -> None:
        try:
            while not self._ended.wait(self._beat_seconds):
                store.set(_key(self._rank), json.dumps(self._sign().to_json()))
                if store.check([ANNOUNCED]):
                    self._announced = store.get(ANNOUNCED).decode()
                    return
        except Exception as error:
            if not self._ended.is_set():
                logger.warning("no more signs of life are exchanged: %s", error)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._beat_seconds, SIGN_SECONDS)):
            if self._life_sign is not None:
                give_sign(self._life_sign)
            now, limit = self._phases.now, self._limits[self._phases.now.phase]
            if limit is not None and self._phases.clock() - now.began > limit:
                self._end(f"{_words(now)} took longer than deadlines.{_key_of(now.phase)}: {limit:g}", is_first=True)
            elif self._announced is not None:
                self._end(self._announced, is_first=False)

    def _end(self, found: str, *, is_first: bool) -> None:
        """Write the stacks, find out who is late, and leave; nothing here may wait for ever."""
        path = self._folder / f"rank-{self._rank}-stacks.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {self._rank} on {self._host}: {found}\n")
                file.write(f"last collective: {last_collective() or 'not recorded'}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.error("%s cannot be written: %s", path, error)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        answer = threading.Thread(target=self._agree, args=(found, is_first), name="verdict", daemon=True)
        answer.start()
        answer.join(2 * ANSWER_SECONDS)
        if answer.is_alive():
            logger.error(
                "%s; no other rank can be asked why: the store of rank 0 or the launcher is silent. Stacks: %s",
                found,
                path,
            )
        for handler in logging.getLogger().handlers:
            handler.flush()
        self._leave(ExitCode.HANG)

    def _agree(self, found: str, is_first: bool) -> None:
        store = self._store
        if store is None:
            logger.error("%s, before this rank met the others", found)
            return
        try:
            if is_first and not store.check([ANNOUNCED]):
                store.set(ANNOUNCED, found)
            store.set(_answer_key(self._rank), json.dumps(self._sign().to_json()))
            if is_first or self._rank == 0:
                self._judge(store, found)
            end = time.monotonic() + ANSWER_SECONDS
            while not store.check([VERDICT]) and time.monotonic() < end:
                time.sleep(0.1)
            logger.error("%s", store.get(VERDICT).decode() if store.check([VERDICT]) else found)
        except Exception as error:
            logger.error("%s; the other ranks cannot be asked: %s", found, error)

    def _judge(self, store: Store, found: str) -> None:
        """Wait a while for the answers of all ranks, then say who is late; the first to say it is right."""
        missing = set(range(self._world_size)) - {self._rank}
        end = time.monotonic() + ANSWER_SECONDS
        while missing and time.monotonic() < end:
            missing -= {rank for rank in missing if store.check([_answer_key(rank)])}
            time.sleep(0.1)
        if store.check([VERDICT]):
            return
        answers, silent = {}, {}
        for rank in range(self._world_size):
            key = _key(rank) if rank in missing else _answer_key(rank)
            known = Sign.from_json(json.loads(store.get(key))) if store.check([key]) else None
            if rank in missing:
                silent[rank] = known
            elif known is not None:
                answers[rank] = known
        verdict = (
            f"{found}. {name_the_late(answers, silent, now=time.time())}. Stacks: {self._folder}/rank-*-stacks.txt"
        )
        store.set(VERDICT, verdict)

    def _sign(self) -> Sign:
        now: Moment = self._phases.now
        where, waits = describe_main_thread()
        return Sign(
            host=self._host,
            at=time.time(),
            phase=now.phase,
            step=now.step,
            activity=now.activity,
            where=where,
            waits_for_others=waits,
            collective=last_collective() or "",
        )


def _limits(deadlines: DeadlineSection) -> dict[PhaseName, float | None]:
    return {
        "start": deadlines.start_seconds,
        "first step": deadlines.first_step_seconds,
        "step": deadlines.step_seconds,
        "save": deadlines.save_seconds,
        "evaluation": deadlines.evaluation_seconds,
        "rollback": deadlines.start_seconds,
        "end": deadlines.save_seconds,
    }


def _key_of(phase: PhaseName) -> str:
    keys: dict[Any, str] = {"first step": "first_step_seconds", "rollback": "start_seconds", "end": "save_seconds"}
    return keys.get(phase, f"{phase}_seconds")


def _words(now: Moment) -> str:
    return (
        f"{now.phase} {now.step}"
        if now.phase == "step"
        else f"the {now.phase}" + f" at step {now.step}" * bool(now.step)
    )


def _key(rank: int) -> str:
    return f"watchdog/heartbeat/{rank}"


def _answer_key(rank: int) -> str:
    return f"watchdog/answer/{rank}"
