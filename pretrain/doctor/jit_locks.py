"""Locks of torch's compiler cache: one that a killed build left makes every later start wait for ever, without a word.

Finds them; who removes them is the caller's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def stale_locks(cache: Path) -> list[Path]:
    """The lock files below `cache` that no process has open."""
    locks = [path.resolve() for path in cache.glob("**/lock")]
    held = set(_open_files()) if locks else set()
    return [lock for lock in locks if str(lock) not in held]


def _open_files() -> Iterator[str]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(link)
        except OSError:  # the process ended, or is another user's
            continue
