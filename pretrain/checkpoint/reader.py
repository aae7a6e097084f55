"""A published checkpoint as a LogicalState: any run of any tensor, read from the files that hold it.

Owns the index of fragments and the byte ranges. Verifying hashes and choosing a checkpoint are store.py's.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.boxes import Box, find_coverage_fault, intersect, lengths, merge_dimensions, rectangles
from pretrain.checkpoint.fragment_file import ITEM_BYTES, StoredFragment, read_fragment_table
from pretrain.checkpoint.fragment_index import Pieces, read_index
from pretrain.checkpoint.fragments import MASTER, element_count, whole_box
from pretrain.checkpoint.manifest import Manifest, read_manifest
from pretrain.errors import CheckpointError, Problem

MOST_OPEN_FILES = 64
READERS, PART_BYTES = 4, 4 << 20
SHOWN_DIFFERENCES = 5


class Checkpoint:
    """One published checkpoint. Opening reads the manifest and the table of fragments; values are read when asked for.

    Raises:
        CheckpointError: where the manifest is broken, or the fragments do not cover every tensor exactly once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._pieces = read_pieces(path, self.manifest)
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._readers: ThreadPoolExecutor | None = None
        self._kept_values = torch.empty(0)

    @property
    def scalars(self) -> dict[str, Any]:
        """What the writing engine's `scalar_state` gave."""
        return self.manifest.scalars

    def names(self) -> list[str]:
        """Parameter names, in the model's order."""
        return list(self.manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the logical tensor."""
        if name not in self.manifest.parameters:
            raise CheckpointError(
                Problem(
                    f"{self.path.name} has no parameter {name}",
                    f"one of its {len(self.manifest.parameters)} parameters",
                    "use a checkpoint of this model",
                )
            )
        return self.manifest.parameters[name]

    def kinds(self, name: str) -> list[str]:
        """Kinds of which the checkpoint holds a parameter."""
        return sorted(kind for held, kind in self._pieces if held == name)

    def element_counts(self) -> Iterable[tuple[str, int]]:
        """Kind and elements of every stored tensor."""
        return [(kind, element_count(self.shape(name))) for name, kind in self._pieces]

    def read(self, name: str, kind: str) -> torch.Tensor:
        """The whole logical tensor, fp32, on the CPU."""
        shape = self.shape(name)
        return self.read_run(name, kind, 0, element_count(shape)).view(shape)

    def read_run(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the flattened whole tensor, (count,) fp32, on the CPU."""
        values = torch.empty(count, dtype=torch.float32)
        self.read_into(values, name, kind, whole_box(self.shape(name)), start)
        return values

    def read_into(self, target: torch.Tensor, name: str, kind: str, box: Box, start: int) -> None:
        """Fill a tensor, of any shape, type and device, with a flattened box's elements from `start` on.

        Fresh memory is slower to fill than a disk is to read: contiguous fp32 tensors of the host are read into, all
        others are copied from memory that is kept until `close`.
        """
        count = target.numel()
        assert 0 <= start <= start + count <= element_count(lengths(box)), f"{name}: run beyond the box"
        assert intersect(box, whole_box(self.shape(name))) in (box, None), f"{name}: box beyond the tensor"
        pieces = self._pieces.get((name, kind))
        if pieces is None and element_count(self.shape(name)):
            raise CheckpointError(
                Problem(
                    f"{self.path.name} holds no {kind} of {name}",
                    f"kinds {', '.join(sorted({kind for _, kind in self._pieces}))}",
                    "use a checkpoint that was written for resuming",
                )
            )
        is_read_into = target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous()
        values = target.detach().view(-1) if is_read_into else self._kept(count)
        for piece in pieces or () if count else ():
            self._copy_common(piece, box, start, values)
        if not is_read_into:
            target.copy_(values.view(target.shape))

    def require_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint whose parameters are not those of the model.

        Raises:
            CheckpointError: naming the first differences.
        """
        own = self.manifest.parameters
        differences = [f"{name}: in the model, not in the checkpoint" for name in shapes if name not in own]
        differences += [f"{name}: in the checkpoint, not in the model" for name in own if name not in shapes]
        differences += [
            f"{name}: {own[name]} in the checkpoint, {tuple(shape)} in the model"
            for name, shape in shapes.items()
            if name in own and own[name] != tuple(shape)
        ]
        if differences:
            more = len(differences) - SHOWN_DIFFERENCES
            shown = differences[:SHOWN_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
            raise CheckpointError(
                Problem(
                    f"{self.path} is a checkpoint of another model: " + "; ".join(shown),
                    "the same parameter names and shapes",
                    "use the run's own model section, or another run folder",
                )
            )

    def close(self) -> None:
        """Close the files that reading opened, and give back the memory."""
        self._kept_values = torch.empty(0)
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kept(self, count: int) -> torch.Tensor:
        if self._kept_values.numel() < count:
            self._kept_values = torch.empty(count, dtype=torch.float32)
        return self._kept_values[:count]

    def _copy_common(self, piece: StoredFragment, box: Box, start: int, values: torch.Tensor) -> None:
        """Copy what a stored fragment and the wanted run of a box share; both are at most a few rectangles."""
        stored = piece.record.run
        _, (stored_box, wanted_box) = merge_dimensions(piece.record.shape, stored.box, box)
        for wanted_offset, wanted in _placed(wanted_box, start, values.numel()):
            for held_offset, held in _placed(stored_box, stored.start, stored.count):
                common = intersect(wanted, held)
                if common is None:
                    continue
                target = _select(values[wanted_offset:], wanted, common)
                self._read_box(piece.path, piece.offset + held_offset * ITEM_BYTES, held, common, target)

    def _read_box(self, path: Path, offset: int, held: Box, common: Box, target: torch.Tensor) -> None:
        """Read the part `common` of a box `held` that lies at a byte offset, into a view of the same shape."""
        row_size = math.prod(lengths(held)[1:])
        first_row, last_row = (common[0][0] - held[0][0], common[0][1] - held[0][0])
        offset += first_row * row_size * ITEM_BYTES
        if common[1:] == held[1:] and target.is_contiguous():
            self._read_bytes(path, offset, target)
            return
        rows = torch.empty((last_row - first_row) * row_size, dtype=torch.float32)
        self._read_bytes(path, offset, rows)
        target.copy_(_select(rows, (common[0], *held[1:]), common))

    def _read_bytes(self, path: Path, offset: int, target: torch.Tensor) -> None:
        """Fill a contiguous tensor from a file; long ones in parts, several at a time, which disks are faster at."""
        buffer = target.view(-1).numpy().data.cast("B")
        descriptor = self._descriptor(path)
        starts = range(0, len(buffer), PART_BYTES)
        parts = [(descriptor, buffer[start : start + PART_BYTES], offset + start) for start in starts]
        try:
            if len(parts) == 1:
                _fill(*parts[0])
            elif parts:
                self._readers = self._readers or ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-reader")
                for _ in self._readers.map(_fill, *zip(*parts, strict=True)):
                    pass
        except OSError as error:
            raise CheckpointError(
                Problem(f"{path}: {error}", "a file that did not change since it was verified", "check the disk")
            ) from error

    def _descriptor(self, path: Path) -> int:
        """An open file; the least recently used one is closed where there are many."""
        if path not in self._files:
            if len(self._files) >= MOST_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(path)
        return self._files[path]


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise OSError("the file ends too early")
        buffer = buffer[count:]
        offset += count


def read_pieces(path: Path, manifest: Manifest) -> Pieces:
    """Where every element of a checkpoint lies: from its table, or from the header of each file where it has none.

    Raises:
        CheckpointError: where they do not hold each tensor exactly once.
    """
    if manifest.index is not None:
        pieces = read_index(path, manifest.index)
    else:
        pieces = {}
        for file in manifest.files:
            for piece in read_fragment_table(path / file.name):
                pieces.setdefault((piece.record.name, piece.record.kind), []).append(piece)
    require_whole(path, manifest, pieces)
    return pieces


def require_whole(path: Path, manifest: Manifest, pieces: Pieces) -> None:
    """Check that fragments hold each tensor exactly once.

    Every parameter must have its master weights; another kind may be absent, but never in part.

    Raises:
        CheckpointError: naming the parameters that are wrong.
    """
    faults = [
        f"{name} ({kind}): {fault}"
        for (name, kind), members in pieces.items()
        if (fault := _find_fault(manifest.parameters.get(name), members))
    ]
    masters = {name for name, kind in pieces if kind == MASTER}
    faults += [
        f"{name} ({MASTER}): no fragment holds it"
        for name, shape in manifest.parameters.items()
        if name not in masters and element_count(shape)
    ]
    if faults:
        raise CheckpointError(
            *(
                Problem(f"{path.name}: {fault}", "every element stored exactly once", "use another checkpoint")
                for fault in faults[:SHOWN_DIFFERENCES]
            )
        )


def _find_fault(shape: tuple[int, ...] | None, pieces: Iterable[StoredFragment]) -> str | None:
    if shape is None:
        return "the manifest knows no such parameter"
    records = [piece.record for piece in pieces]
    for record in records:
        if record.shape != shape:
            return f"a fragment says shape {record.shape}, the manifest {shape}"
    return find_coverage_fault(shape, [record.run for record in records])


def _placed(box: Box, start: int, count: int) -> Iterator[tuple[int, Box]]:
    """A run of a flattened box as (offset within the run, rectangle of the whole tensor)."""
    for offset, inner in rectangles(lengths(box), start, count):
        yield offset, tuple((low + edge, high + edge) for (low, high), (edge, _) in zip(inner, box, strict=True))


def _select(values: torch.Tensor, held: Box, common: Box) -> torch.Tensor:
    """The view of `common` within flat values that begin with the box `held`."""
    whole = values[: math.prod(lengths(held))].view(lengths(held))
    return whole[tuple(slice(low - edge, high - edge) for (low, high), (edge, _) in zip(common, held, strict=True))]
