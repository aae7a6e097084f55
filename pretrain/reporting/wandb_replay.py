"""Brings a run's offline W&B files to what metrics.jsonl says: where they differ, one whole offline run replaces them.

W&B takes no step below the last one that it holds, so a gap on its server cannot be filled in place: the whole run is
what `wandb sync` sends, under an id of its own where the server has the old one. Not while the run trains.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any

from pretrain.reporting.points import Comparison, HeldPoints, read_records
from pretrain.reporting.wandb_destination import WandbDestination

FOLDER = "wandb"
REPLACED = "wandb-replaced"  # beside it, so that `wandb sync` does not find them
# The file format is LevelDB's log: blocks of 32 KiB, each piece of a record with checksum, length and type before it.
BLOCK_BYTES = 32 * 1024
HEADER = struct.Struct("<IHB")
FILE_HEADER_BYTES = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def compare_wandb(run_folder: Path, run_id: str, metrics_file: Path) -> Comparison:
    """What the offline files of a run hold together."""
    held = HeldPoints(metrics_file, is_equal=lambda line, there: line == there or isnan(line) and isnan(there))
    for folder in _offline_runs(run_folder, run_id):
        for path in folder.glob("*.wandb"):
            for step, name, value in _history(path):
                held.add(name, step, value)
    return held.compare()


def replay_to_wandb(run_folder: Path, metrics_file: Path, *, run_id: str, name: str, settings: Any) -> Comparison:
    """Write a whole offline run where the present ones are not; they are moved to REPLACED.

    Returns:
        What the files held before.
    """
    before = compare_wandb(run_folder, run_id, metrics_file)
    if before.is_whole:
        return before
    present = list(_offline_runs(run_folder, run_id))
    destination = WandbDestination(
        mode="offline", run_folder=run_folder, run_name=name, run_id=run_id, settings=settings
    )
    destination.open()
    for record in read_records(metrics_file):
        destination.write([record])
    destination.close("finished")
    (run_folder / REPLACED).mkdir(exist_ok=True)
    for folder in present:
        shutil.move(folder, run_folder / REPLACED / folder.name)
    return before


def _offline_runs(run_folder: Path, run_id: str) -> list[Path]:
    return sorted((run_folder / FOLDER).glob(f"offline-run-*-{run_id}"))


def _history(path: Path) -> Iterator[tuple[int, str, float]]:
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    for raw in _pieces(path.read_bytes()):
        record = WandbRecord.FromString(raw)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = int(values.get("_step", record.history.step.num))
        for name, value in values.items():
            if not name.startswith("_"):
                yield step, name, float(value)


def _pieces(data: bytes) -> Iterator[bytes]:
    """The records of a log; one that a killed process left half-written ends it."""
    place, parts = FILE_HEADER_BYTES, b""
    while place + HEADER.size <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        parts = data[place : place + length] if kind in (FULL, FIRST) else parts + data[place : place + length]
        if len(data) < place + length:
            return
        place += length
        if kind in (FULL, LAST):
            yield parts
