"""Disks that fill up in the middle of a save, on a small tmpfs of the case's own; later there is room again, or not.

What must hold: training goes on, each try is told, the earlier checkpoints stay, a run that ends without room for its
last save says 74, and the end is that of an undisturbed run to the last bit. Mounting needs root.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.case import LOST, OTHER, Case, at_event
from tests.chaos.kills import check_nothing_lost
from tests.chaos.lives import Life
from tests.chaos.results import newest_whole

DISK_BYTES = 12 << 20  # several checkpoints of about 0.65 MB
MOST_LEFT_BYTES = 400_000  # less than a checkpoint
STORAGE_FAILED = 74
ROOM_LATER_SHARE = 0.6


def reason_to_skip() -> str | None:
    """Why this process cannot mount; None where it can."""
    if os.geteuid() != 0:
        return "mounting a small tmpfs needs root"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"no mounts here: {probe.stderr.strip()}" if probe.returncode else None


def run_case(case: Case) -> None:
    """Fill the disk at an event of a save; free it at a later step, or after the run gave up."""
    layout, undisturbed = case.choose_layout()
    on_disk = case.random.choice(("checkpoints", "run folder"))
    events = [event for event in undisturbed.whole_events if event.rank == 0]
    full_at = case.random.choice([place for place, one in enumerate(events) if one.phase in ("save", "publish")])
    event = events[full_at]
    later = [one for one in events[full_at:] if one.name.startswith("train step")]
    has_room_later = bool(later) and case.random.random() < ROOM_LATER_SHARE
    folder = case.run_folder / "checkpoints" if on_disk == "checkpoints" else case.run_folder
    filler = folder / "filler"
    left_bytes = case.random.choice((0, case.random.randrange(MOST_LEFT_BYTES)))
    faults = [at_event(event, "fill", file=str(filler), left_bytes=left_bytes)]
    if has_room_later:
        faults.append(at_event(case.random.choice(later), "free", file=str(filler)))
    case.group = f"{on_disk}, {'room again later' if has_room_later else 'full to the end'}"
    case.what = f"{layout.name}: {on_disk} full at {event.name}"
    with mounted(folder):
        life = case.live(layout, faults=faults)
        case.faults_done += any(entry.startswith("FAULT fill") for entry in life.trace())
        _check_ending(case, life, is_full=filler.exists())
        filler.unlink(missing_ok=True)
        if set(life.exit_codes) == {0}:
            case.judge(undisturbed)
        else:
            case.finish(layout, undisturbed)


def _check_ending(case: Case, life: Life, *, is_full: bool) -> None:
    check_nothing_lost(case, life)
    if "Traceback" in life.log():
        case.wrong(OTHER, "a traceback for the user of a full disk")
    if set(life.exit_codes) == {0}:
        if is_full and newest_whole(case.run_folder) == 0:
            case.wrong(LOST, "the run ended well and has no checkpoint")
        return
    if set(life.exit_codes) != {STORAGE_FAILED}:
        case.wrong(OTHER, f"the run on a full disk ended with {life.exit_codes}")
    if not is_full:
        case.wrong(OTHER, "the run gave up although there was room again")
    if "free space and start again" not in life.log():
        case.wrong(OTHER, "the run on a full disk does not say what to do")


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small file system at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)
