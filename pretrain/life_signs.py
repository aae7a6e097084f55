"""Signs of life of a rank for its launcher: a file that its watchdog writes again and again while it stands.

Owns the variable and the file's name, no clock and no thread; who looks at them is launch/silence.py. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

FOLDER_VARIABLE = "ATHANOR_LIFE_SIGNS"  # a folder of this machine, set by a launcher that looks into it
SIGN_SECONDS = 1.0  # between two signs
STACKS_SIGNAL = signal.SIGUSR2  # makes a rank that gives signs write its Python stacks, whatever it is stuck in


def sign_file(environment: Mapping[str, str], rank: int) -> Path | None:
    """The file of a rank; None where no launcher looks."""
    folder = environment.get(FOLDER_VARIABLE)
    return Path(folder) / f"rank-{rank}" if folder else None


def give_sign(file: Path) -> None:
    """Say that this process lives; where the disk is full or the launcher gone, nobody can be told."""
    with contextlib.suppress(OSError):
        file.write_text(str(os.getpid()), encoding="ascii")
