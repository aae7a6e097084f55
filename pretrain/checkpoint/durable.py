"""Writes that survive a crash: a file is there whole or not at all. Owns fsync; knows nothing of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and fsync it; a crash may leave it cut short, so only for files that nobody trusts yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Put a file in place of an older one in a single step, so that a reader sees the old or the new, never half."""
    beside = path.with_name(f".{path.name}.new")
    write_durably(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a file's fsync does not cover the entry that names it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
