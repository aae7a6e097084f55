"""What a run left behind, and in what it differs from one that was left alone: checkpoints, metrics, weights, folders.

Every function gives sentences of what is wrong; none where all is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.inspection import find_faults
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.reporting.metrics_file import FILE_NAME, read_metrics

EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "validation/main/loss")
TOLD = {"loss", "validation/main/loss"}
TIMELESS_SCALARS = ("step", "samples_consumed", "tokens_seen", "skipped_steps", "best_step")
PUBLISHING = re.compile(r"rename checkpoints/\.staging-step-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Final:
    """How a finished run ended."""

    tensors: dict[tuple[str, str], torch.Tensor]
    progress: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, times left out


def read_final(run_folder: Path) -> Final:
    """Read the newest checkpoint whole, and the metrics."""
    path = list_checkpoints(run_folder / "checkpoints")[-1]
    with Checkpoint(path) as checkpoint:
        tensors = {
            (name, kind): checkpoint.read(name, kind) for name in checkpoint.names() for kind in checkpoint.kinds(name)
        }
        progress = {key: checkpoint.manifest.progress[key] for key in TIMELESS_SCALARS}
    # lines of saves hold times alone, and come when the disk is done
    told = [line for line in read_metrics(run_folder / FILE_NAME) if not TOLD.isdisjoint(line)]
    lines = [{key: line[key] for key in EXACT if key in line} for line in told]
    return Final(tensors=tensors, progress=progress, lines=lines)


def find_differences(final: Final, expected: Final, *, tolerance: float = 0.0) -> Iterator[str]:
    """In what a final state differs.

    A tolerance is relative to each tensor's largest value; numbers of the metrics must be ten times as close.
    """
    for key, value in expected.progress.items():
        if final.progress[key] != value:
            yield f"progress {key} is {final.progress[key]}, undisturbed {value}"
    if final.tensors.keys() != expected.tensors.keys():
        yield "other tensors than undisturbed"
        return
    apart = [
        f"{name} ({kind})"
        for (name, kind), tensor in final.tensors.items()
        if not _are_close(tensor, expected.tensors[name, kind], tolerance)
    ]
    if apart:
        yield f"{len(apart)} of {len(final.tensors)} tensors differ from undisturbed, such as {apart[0]}"
    yield from _find_line_differences(final.lines, expected.lines, tolerance / 10)


def newest_whole(run_folder: Path) -> int:
    """The step of the newest checkpoint that verifies, 0 where there is none."""
    for path in reversed(list_checkpoints(run_folder / "checkpoints")):
        if not find_faults(path):
            return read_manifest(path).step
    return 0


def find_damaged(run_folder: Path) -> list[str]:
    """Published checkpoints that do not verify, with what is wrong."""
    return [
        f"{path.name}: {'; '.join(faults)}"
        for path in list_checkpoints(run_folder / "checkpoints")
        if (faults := find_faults(path))
    ]


def last_published(trace: list[str]) -> int:
    """The step of the last checkpoint that rank 0 surely gave its name: something came after the rename."""
    events = [event for event in trace if not event.startswith("FAULT")][:-1]
    steps = [int(match[1]) for event in events if (match := PUBLISHING.match(event))]
    return steps[-1] if steps else 0


def find_leftovers(run_folder: Path) -> list[str]:
    """What a finished run should have tidied away."""
    return sorted(
        str(path.relative_to(run_folder))
        for path in [*run_folder.iterdir(), *(run_folder / "checkpoints").iterdir()]
        if path.name.startswith(".") or path.suffix == ".cut"
    )


def resumed_from(log: str, *, earlier_starts_resumed: int = 0) -> int:
    """The step that a start said it goes on from, 0 where it began afresh.

    Args:
        log: of one start, or of several under a launcher: then the last one is meant.
        earlier_starts_resumed: how many of the starts before it went on from a checkpoint.
    """
    steps = re.findall(r"going on from \S+: step (\d+)", log)[earlier_starts_resumed:]
    return int(steps[-1]) if steps else 0


def _are_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if tolerance == 0.0:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= tolerance * max(1e-6, float(other.abs().max())))


def _is_close(one: float, other: float, tolerance: float) -> bool:
    """NaN is close to NaN alone."""
    return one == other or (one != one and other != other) or abs(one - other) <= tolerance * max(1.0, abs(other))


def _find_line_differences(
    lines: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float
) -> Iterator[str]:
    steps, wanted = [line["step"] for line in lines], [line["step"] for line in expected]
    if steps != wanted:
        yield f"metrics.jsonl has lines of steps {steps}, undisturbed {wanted}"
        return
    for line, other in zip(lines, expected, strict=True):
        for key, value in other.items():
            if key not in line or not _is_close(line[key], value, tolerance):
                yield f"metrics.jsonl, step {line['step']}: {key} is {line.get(key)}, undisturbed {value}"
                return
