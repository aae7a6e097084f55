"""Logging of one process: every rank to its own file, the main process to the terminal as well. Set once, by run.py."""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_logging(folder: Path, rank: int) -> None:
    """Send INFO and above to `logs/rank-<rank>.log`, and to stderr on rank 0; other ranks' stderr gets errors only."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "logs" / f"rank-{rank}.log", encoding="utf-8")
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    for handler in (file, terminal):
        handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # of other libraries
    root.handlers[:] = [file, terminal]
    logging.getLogger("pretrain").setLevel(logging.INFO)
