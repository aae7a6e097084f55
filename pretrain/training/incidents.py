"""What went wrong in a run, in `incidents.jsonl` of its folder: skipped steps, spikes, rollbacks, with their rows.

Rank 0 appends; `pretrain samples` and the next start read. Decides nothing (guard.py, rollback.py). Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pretrain.data.skipped_windows import Window, merge_windows

FILE_NAME = "incidents.jsonl"
ROLLBACK = "rollback"

Incident = dict[str, Any]  # kind, step, rows: [first, end) of the sample order, and what else is known of it


class IncidentFile:
    """Appends incidents, each on the disk when `append` returns; null writes nothing, as on all ranks but the first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def append(self, incident: Incident) -> None:
        """Add one line; a rollback must be known to the next start even if the machine dies now."""
        if self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), **incident}) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def set_aside(self) -> None:
        """Keep an earlier run's file under another name: a fresh start has no past."""
        if self._path is None or not self._path.exists():
            return
        number = 1
        while (kept := self._path.with_name(f"incidents.before-{number}.jsonl")).exists():
            number += 1
        self._path.rename(kept)


def read_incidents(path: Path) -> Iterator[Incident]:
    """The incidents of a run, oldest first; a half-written line is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def windows_from(incidents: Iterable[Incident], recorded: Iterable[Window], place: int) -> tuple[Window, ...]:
    """The windows to leave out from a checkpoint on.

    Args:
        incidents: of the run folder.
        recorded: the windows that the checkpoint knows of.
        place: in the sample order, of the next row after the checkpoint. Of what lies before it only the checkpoint's
            own windows were left out; what was found bad after it stays out.
    """
    later = [tuple(incident["window"]) for incident in incidents if incident["kind"] == ROLLBACK]
    return merge_windows([*recorded, *((first, end) for first, end in later if first >= place)])
