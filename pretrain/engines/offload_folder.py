"""The folder on a node's fast disk in which one rank's optimizer state lies while a run offloads it to NVMe.

Owns its name, its size, its lock and its end: folders of runs that were killed are removed by the next one. What
DeepSpeed writes into it is zero_state.py's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pretrain.engines.deepspeed_import import import_deepspeed, quiet
from pretrain.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

PREFIX, LOCK = "athanor-offload-", ".lock"
GIB = 2**30


class OffloadFolder:
    """A folder of this process alone below `parallel.offload_folder`, until it is closed or the process ends."""

    def __init__(self, base: str | Path) -> None:
        """Make it, and remove what processes left there that are gone.

        Raises:
            ConfigError: `base` cannot be made or written.
        """
        self._base = Path(base)
        try:
            self._base.mkdir(parents=True, exist_ok=True)
            for name in _left_behind(self._base):
                logger.warning("removing %s, which a run that was killed left", self._base / name)
            _write_past_the_cache(self._base)
            self._lock, self.path = _new_folder(self._base)
        except OSError as error:
            raise ConfigError(
                Problem(
                    f"parallel.offload_folder: {base} cannot be written past the system's cache ({error.strerror})",
                    "a folder on this node's fast disk that the run may write, on a file system with direct I/O",
                    "set parallel.offload_folder to such a folder",
                )
            ) from error

    def require_space(self, needed: int) -> None:
        """Check that `needed` bytes of all ranks of this node fit.

        Raises:
            ConfigError: they do not.
        """
        free = shutil.disk_usage(self.path).free
        if needed > free:
            self.close()
            raise ConfigError(
                Problem(
                    f"parallel.offload_folder: {self._base} has {free / GIB:.2f} GiB free, and the optimizer state of "
                    f"this node's ranks takes {needed / GIB:.2f} GiB",
                    "a folder with that much room",
                    "set parallel.offload_folder to another disk, free some, or start more nodes",
                )
            )

    def close(self) -> None:
        """Remove the folder and what lies in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def _write_past_the_cache(folder: Path) -> None:
    """Try what DeepSpeed's async_io does; some file systems in memory or over a network cannot."""
    descriptor, name = tempfile.mkstemp(prefix="trial-", dir=folder)
    os.close(descriptor)
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_DIRECT))
    finally:
        os.unlink(name)


def require_async_io() -> None:
    """Check that DeepSpeed can write files behind training here.

    Raises:
        ConfigError: its op cannot be built, for want of libaio.
    """
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with quiet():
        is_possible = AsyncIOBuilder().is_compatible()
    if not is_possible:
        raise ConfigError(
            Problem(
                "offload to nvme: DeepSpeed's async_io cannot be built here, libaio or its headers are missing",
                "a node with libaio and a C++ compiler",
                "install libaio-dev (apt) or libaio-devel (dnf), or set parallel.offload_optimizer=cpu",
            )
        )


def _new_folder(base: Path) -> tuple[TextIO, Path]:
    """The lock is held before the folder is there, so that nobody takes a living run's folder for a dead one's."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=LOCK, dir=base)
        lock = open(name, "w", encoding="utf-8", closefd=True)  # noqa: SIM115 - held as long as the folder
        os.close(descriptor)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if Path(name).exists():  # else another rank swept it away between the two lines
            folder = Path(name.removesuffix(LOCK))
            folder.mkdir()
            return lock, folder
        lock.close()


def _left_behind(base: Path) -> Iterator[str]:
    """Remove folders whose lock nobody holds; yields their names."""
    for path in base.glob(f"{PREFIX}*{LOCK}"):
        try:
            with path.open("r+", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = Path(str(path).removesuffix(LOCK))
                had_files = folder.exists()
                shutil.rmtree(folder, ignore_errors=True)
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):  # alive, or just removed by another rank
            continue
        if had_files:
            yield folder.name
