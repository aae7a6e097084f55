"""Brings a run's TensorBoard files to what metrics.jsonl says: where they differ, one whole file takes their place.

Not while the run trains: its own file would be taken from under it. The caller holds the run folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pretrain.reporting.points import Comparison, HeldPoints, equal_floats, read_records

EVENT_FILES = "events.out.tfevents.*"
STAGING = "replay.tmp"


def compare_tensorboard(folder: Path, metrics_file: Path) -> Comparison:
    """What TensorBoard would show of the files in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.util import tensor_util

    held = HeldPoints(metrics_file, is_equal=equal_floats)
    for path in sorted(folder.glob(EVENT_FILES)):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                held.drop_from(event.step)
            for value in event.summary.value:
                held.add(value.tag, event.step, float(tensor_util.make_ndarray(value.tensor).item()))
    return held.compare()


def replay_to_tensorboard(folder: Path, metrics_file: Path) -> Comparison:
    """Write a whole file where the present ones are not; they go when it is there.

    Returns:
        What the files held before.
    """
    before = compare_tensorboard(folder, metrics_file)
    if before.is_whole:
        return before
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _write(staging, metrics_file)
    (written,) = staging.glob(EVENT_FILES)
    replaced = list(folder.glob(EVENT_FILES))
    # the name begins with the time: of two files, TensorBoard reads the later one last
    written.rename(folder / written.name)
    for path in replaced:
        path.unlink()
    staging.rmdir()
    return before


def _write(folder: Path, metrics_file: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for record in read_records(metrics_file):
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in record.values.items()]
        writer.add_event(Event(step=record.step, wall_time=record.time, summary=Summary(value=values)))
    writer.close()
