"""Builds a run's checkpoints from its configuration: where they lie, what is kept, where copies go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.copies import DurableCopies
from pretrain.checkpoint.copy_targets import open_target
from pretrain.checkpoint.inspection import FOLDER_NAME
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import CheckpointSection
from pretrain.distributed import Place
from pretrain.errors import ConfigError, Problem


def build_store(
    section: CheckpointSection, run_folder: Path, place: Place, *, is_ours: Callable[[], bool]
) -> tuple[CheckpointStore, DurableCopies | None]:
    """The checkpoints of a run and their copies; with a local folder, the run folder is where copies go.

    Raises:
        ConfigError: where a local folder would be another one on each node, or a storage's package is missing.
    """
    folder, durable = run_folder / FOLDER_NAME, section.durable
    if section.local_folder:
        if place.world_size != place.local_world_size:
            # a rank loads all weights of its part, whose fragments every node wrote: no node could resume from its own
            # disk without getting the others' files over the network first
            ranks = f"{place.world_size} ranks, {place.local_world_size} of them on this node"
            raise ConfigError(
                Problem(
                    f"checkpoint.local_folder with {ranks}",
                    "one node, whose ranks all see the folder",
                    "leave it out: saves do not hold up training, and go to the run folder that all nodes share",
                )
            )
        durable = durable or str(folder)
        folder = Path(section.local_folder) / run_folder.name / FOLDER_NAME
    copies = DurableCopies(open_target(durable)) if durable else None
    store = CheckpointStore(
        folder,
        keep_last=section.keep_last,
        keep_best=section.keep_best,
        keep_every_steps=section.keep_every_steps,
        asynchronous=section.asynchronous,
        in_use=lambda: copies.in_use if copies else (),
        is_ours=is_ours,
    )
    return store, copies
