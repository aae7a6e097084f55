"""The lock of a run folder: two runs in one folder would overwrite each other's checkpoints.

Works on file systems that machines share: links are made whole or not at all, and a heartbeat tells the living from
the dead. Only rank 0 holds it; telling the other ranks is the caller's.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import psutil

from pretrain.distributed import broadcast_json, rank
from pretrain.errors import LaunchError, Problem

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat: a holder on another machine counts as dead


@contextmanager
def hold_run_folder(folder: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a run folder, on rank 0 for all ranks; gives whether it is still held. Every rank must enter.

    Raises:
        LaunchError: on all ranks, where another run holds it.
    """
    lock = RunLock(folder)
    refusal: list[str] | None = None
    if rank() == 0:
        try:
            lock.acquire()
        except LaunchError as error:
            (problem,) = error.problems
            refusal = [problem.found, problem.allowed, problem.change]
        except OSError as error:
            refusal = [f"{folder}: {error}", "a run folder that can be written", "choose another run_folder"]
    refusal = broadcast_json(refusal)
    if refusal is not None:
        raise LaunchError(Problem(*refusal))
    try:
        yield lock.is_held
    finally:
        lock.release()


class RunLock:
    """Held from `acquire` to `release`, or to the death of the process, which the next run finds out."""

    def __init__(
        self, folder: Path, *, heartbeat_seconds: float = HEARTBEAT_SECONDS, stale_seconds: float = STALE_SECONDS
    ) -> None:
        self._path = folder / LOCK_NAME
        self._heartbeat_seconds = heartbeat_seconds
        self._stale_seconds = stale_seconds
        self._token = uuid.uuid4().hex
        self._descriptor: int | None = None
        self._ended = Event()

    def acquire(self) -> None:
        """Take the lock, from a dead holder as well.

        Raises:
            LaunchError: where another run holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = self._read()
            if holder is None:  # it was released this moment, or died as it was made
                time.sleep(0.01)
            elif self._is_dead(holder):
                logger.warning("%s: the run of %s is dead, and this one takes over", self._path, _describe(holder))
                self._take_away(holder)
            else:
                raise LaunchError(
                    Problem(
                        f"{self._path.parent} is another run's: {_describe(holder)}",
                        "one run in a folder at a time",
                        "wait for it or stop it; or choose another name or run_folder",
                    )
                )
        self._remove_leftovers()
        Thread(target=self._beat, name="run-lock", daemon=True).start()

    def is_held(self) -> bool:
        """Whether the lock is still this run's: another one may have taken this machine for dead."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if self.is_held():
            self._path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Make the lock with all its text in one step; false where there is one."""
        beside = self._path.with_name(f".{LOCK_NAME}.{self._token}")
        beside.write_text(json.dumps({"token": self._token, **_this_process()}), encoding="utf-8")
        try:
            os.link(beside, self._path)
        except FileExistsError:
            return False
        else:
            self._descriptor = os.open(self._path, os.O_RDWR)
            return True
        finally:
            beside.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            holder: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # links are made whole, so this is no lock of ours, or a damaged one
            return {"token": None, "host": "a damaged lock file", "process": None}
        return holder

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == _this_process()["host"]:
            return not _is_alive(holder)
        return not self._beats()

    def _beats(self) -> bool:
        """Watch a lock of another machine for as long as a living holder needs to touch it; no clocks are compared."""
        logger.warning("%s is a run's of another machine: looking for its heartbeat", self._path)
        first, end = self._touched(), time.monotonic() + self._stale_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self._stale_seconds / 10))
            if self._touched() != first:
                return True
        return False

    def _touched(self) -> int | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY)  # opening makes a network file system ask its server
        except FileNotFoundError:
            return None
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _take_away(self, holder: dict[str, Any]) -> None:
        """Remove the dead holder's lock, and no one else's: another run may have been quicker."""
        aside = self._path.with_name(f".{LOCK_NAME}.{self._token}.dead")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        try:
            taken = json.loads(aside.read_text(encoding="utf-8")).get("token")
        except FileNotFoundError:  # tidied away by the run that holds the folder now
            return
        except ValueError:
            taken = None
        if taken != holder["token"]:
            try:
                os.link(aside, self._path)
            except FileExistsError:
                logger.warning("%s: three runs at once; one of them finds that it lost the folder", self._path)
        aside.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """What processes left that died in the instant in which they made or took a lock; a living one's stays."""
        for path in self._path.parent.glob(f".{LOCK_NAME}.*"):
            try:
                age = self._path.stat().st_mtime - path.stat().st_mtime  # both by the file system's clock
                holder = json.loads(path.read_text(encoding="utf-8"))
                is_dead = holder["host"] == _this_process()["host"] and not _is_alive(holder)
            except (ValueError, KeyError, TypeError):
                is_dead = False  # it died before it wrote, or is about to
            except OSError:
                continue  # its owner has removed it by now
            if is_dead or age > self._stale_seconds:
                path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_seconds):
            if not self.is_held():
                logger.error("%s was lost to another run: this one publishes no more checkpoints", self._path)
                return
            assert self._descriptor is not None
            os.utime(self._descriptor)


def _this_process() -> dict[str, Any]:
    """Where this process is: process numbers mean something on one machine, in one container."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    process = psutil.Process()
    return {"host": f"{socket.gethostname()} {container}", "process": process.pid, "started": process.create_time()}


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(holder["process"])
        is_same = abs(process.create_time() - holder["started"]) < 1.0  # numbers are used again
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, TypeError, KeyError):
        return False


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {str(holder.get('host')).partition(' ')[0]}"
