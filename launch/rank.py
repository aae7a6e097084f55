"""The guardian of one rank: starts it, keeps what it writes, ends it with its launcher, and says how it ended.

Launchers start `python -m launch.rank --status FOLDER -- pretrain train ...` in the place of the rank itself. It turns
many signals into one wish to stop, and it is the same below torchrun, deepspeed, accelerate and our own agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch.processes import ancestor_called, die_with_parent, identity
from launch.rank_status import STOP, RankStatus, failure_mark
from launch.silence import SECONDS_FOR_STACKS, Silence
from pretrain.doctor.secrets import secret_values, without_secrets
from pretrain.errors import ExitCode

LAUNCHER = "ATHANOR_LAUNCHER"  # the process whose end ends all ranks of this machine
RESTART = "ATHANOR_RESTART"  # how often the launcher has started the job again
POLL_SECONDS = 1.0  # for the two marks in the status folder; signals and ends are noticed at once
SECONDS_AFTER_A_PEER = 5.0  # in which a rank may notice by itself that another one failed
FAILURE_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL then: nothing can be saved without that peer
LONGEST_LINE = 65536  # bytes
KEPT_BYTES = 20000  # of the log's end, to look for the error in
ORDERED_ENDS = (ExitCode.DONE, ExitCode.PREEMPTED)


def main() -> int:
    """Guard one rank; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.rank", allow_abbrev=False)
    parser.add_argument("--status", type=Path, required=True)
    parser.add_argument("--grace", type=float, default=120.0)
    parser.add_argument("--silence", type=float, help="seconds without a sign of life after which the rank is killed")
    parser.add_argument("--secrets", type=Path)
    parser.add_argument("--ends-with", default="")
    parser.add_argument("words", nargs="+")
    options = parser.parse_args()
    environment = {**os.environ, **_secrets(options.secrets)}
    environment["PYTHONUNBUFFERED"] = "1"
    with Silence(options.silence) as silence:
        guardian = Guardian(options.status, options.grace, environment | silence.variables, silence)
        guardian.watch_process(os.environ.get(LAUNCHER, ""))
        if options.ends_with:
            if (pid := ancestor_called(options.ends_with)) is None:  # it ended first, and nobody would end this rank
                print(f"error: {options.ends_with}, which started this rank, has ended", file=sys.stderr)
                return 128 + signal.SIGHUP
            guardian.watch_process(identity(pid) or "")
        return guardian.run([sys.executable, "-m", *options.words])


class Guardian:
    """One rank and everything that can end it."""

    def __init__(self, folder: Path, grace_seconds: float, environment: dict[str, str], silence: Silence) -> None:
        self._folder = folder
        self._grace_seconds = grace_seconds
        self._environment = environment
        self._silence = silence
        self._is_silent = False
        self._secrets = secret_values(environment)
        self._parent = os.getppid()
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._kill_at: float | None = None
        self._peer_failed_at: float | None = None
        self._pending = b""
        self._kept = b""
        folder.mkdir(parents=True, exist_ok=True)
        self._found_stop = _changed_at(folder / STOP)
        attempt = f"{environment.get(RESTART, '0')}-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        rank = int(environment.get("RANK", "0"))
        self._status = RankStatus(
            rank=rank,
            world_size=int(environment.get("WORLD_SIZE", "1")),
            attempt=attempt,
            host=socket.gethostname(),
            guardian_pid=os.getpid(),
            pid=0,
            log=str(folder / f"rank-{rank}.log"),
            started_at=time.time(),
        )

    def watch_process(self, found: str) -> None:
        """End the rank at once when the process `PID:START` ends."""
        pid, _, _ = found.partition(":")
        if pid.isdigit() and identity(int(pid)) == found:
            with contextlib.suppress(OSError):
                self._selector.register(os.pidfd_open(int(pid)), selectors.EVENT_READ, self._end_now)

    def run(self, command: list[str]) -> int:
        """Start the rank, wait for its end, and return its exit code."""
        self._listen_to_signals()
        reading, writing = os.pipe()
        with open(self._status.log, "ab", buffering=0) as self._log:
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                start_new_session=True,  # a group of its own: what the rank starts ends with it
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one thread
            )
            os.close(writing)
            os.set_blocking(reading, False)
            self._rank = process
            self._status.pid = process.pid
            self._status.write(self._folder)
            self._selector.register(reading, selectors.EVENT_READ, lambda: self._copy(reading))
            self._selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, lambda: None)
            self._wait()
            self._kill_group()
            self._copy(reading)
            self._write(self._pending)
        return self._finish(process.returncode)

    def _listen_to_signals(self) -> None:
        reading, writing = os.pipe()
        for end in (reading, writing):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._selector.register(reading, selectors.EVENT_READ, lambda: os.read(reading, 100))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        die_with_parent(signal.SIGHUP)
        if os.getppid() != self._parent:  # it ended before the kernel was asked
            self._signals.append(signal.SIGHUP)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _wait(self) -> None:
        polled_at = time.monotonic()
        while self._rank.poll() is None:
            for key, _ in self._selector.select(timeout=POLL_SECONDS / 4):
                key.data()
            while self._signals:
                number = self._signals.pop(0)
                is_orphan = number == signal.SIGHUP and os.getppid() != self._parent
                self._end_now() if is_orphan else self._ask(signal.Signals(number).name)
            now = time.monotonic()
            if now - polled_at >= POLL_SECONDS:
                polled_at = now
                self._look_at_marks(now)
                self._look_for_silence(now)
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_group()

    def _look_at_marks(self, now: float) -> None:
        """The wish to stop and a peer's failure, which reach other nodes through the folder alone."""
        found = _changed_at(self._folder / STOP)
        if found is not None and found != self._found_stop:
            self._ask("the launcher's wish")
        if self._peer_failed_at is None and failure_mark(self._folder, self._status.attempt).exists():
            self._peer_failed_at = now
        if self._peer_failed_at is not None and now - self._peer_failed_at >= SECONDS_AFTER_A_PEER:
            self._ask("another rank failed")

    def _look_for_silence(self, now: float) -> None:
        """A rank whose watchdog stands still ends by nothing but a kill."""
        if self._is_silent or not (found := self._silence.look(now)):
            return
        self._is_silent = True
        told = f"error on rank {self._status.rank}: {found[0]} (silence_seconds of the job); it is killed"
        self._write(f"{told}\n".encode())
        found[0].ask_for_stacks()
        self._kill_at = now + SECONDS_FOR_STACKS

    def _ask(self, reason: str) -> None:
        """Pass on one wish; the launcher's own repetitions of it would be taken for impatience."""
        if self._status.asked_to_stop is not None:
            return
        self._status.asked_to_stop = reason
        has_failed_peer = failure_mark(self._folder, self._status.attempt).exists()
        self._kill_at = time.monotonic() + (FAILURE_GRACE_SECONDS if has_failed_peer else self._grace_seconds)
        with contextlib.suppress(ProcessLookupError):
            self._rank.send_signal(signal.SIGTERM)

    def _end_now(self) -> None:
        """Nobody is left who could start the job again without meeting this rank: it ends, at once."""
        self._status.asked_to_stop = self._status.asked_to_stop or "its launcher ended"
        self._kill_group()
        self._rank.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._rank.pid, signal.SIGKILL)

    def _copy(self, reading: int) -> None:
        """Pass on what the rank wrote, whole lines only: a secret must not be cut in two."""
        while True:
            try:
                data = os.read(reading, LONGEST_LINE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(reading)
                return
            self._pending += data
            whole = max(self._pending.rfind(b"\n"), self._pending.rfind(b"\r")) + 1
            if not whole and len(self._pending) > LONGEST_LINE:
                whole = len(self._pending)
            self._write(self._pending[:whole])
            self._pending = self._pending[whole:]

    def _write(self, data: bytes) -> None:
        if not data:
            return
        clean = without_secrets(data.decode("utf-8", "replace"), self._secrets).encode()
        self._kept = (self._kept + clean)[-KEPT_BYTES:]
        for descriptor in (self._log.fileno(), 1):
            with contextlib.suppress(OSError):  # a full disk or a closed terminal does not end a training
                os.write(descriptor, clean)

    def _finish(self, returncode: int) -> int:
        status = self._status
        status.ended_at = time.time()
        if self._is_silent:
            status.code = ExitCode.HANG
        else:
            status.code = returncode if returncode >= 0 else 128 - returncode
            status.signal = signal.Signals(-returncode).name if returncode < 0 else None
        status.error = _last_error(self._kept) if status.code else ""
        with contextlib.suppress(OSError):
            status.write(self._folder)
            if status.code not in ORDERED_ENDS:
                failure_mark(self._folder, status.attempt).touch()
        return status.code


def _secrets(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    from launch.secrets_file import read_secrets  # what is not needed would keep each start waiting

    return read_secrets(file)


def _last_error(written: bytes) -> str:
    from launch.causes import last_error

    return last_error(written.decode("utf-8", "replace"))


def _changed_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
