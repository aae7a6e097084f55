"""Blocks by which datatrove's executors run a preparation on a cluster; its rank is the number of the share.

Encode nothing themselves.
"""

from __future__ import annotations

from typing import Protocol

from datatrove.pipeline.base import PipelineStep

from data_tools.task_shares import Share


class Preparation(Protocol):
    """A dataset to be made by several machines."""

    def encode(self, share: Share) -> int:
        """Encode the tasks of a share."""

    def finish(self) -> object:
        """Put the dataset together."""


class EncodeShare(PipelineStep):
    """Encodes the share of its rank."""

    type = "prepare"
    name = "encode a share"

    def __init__(self, preparation: Preparation) -> None:
        super().__init__()
        self.preparation = preparation

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Encode the tasks of the share."""
        self.preparation.encode(Share(number=rank, count=world_size))


class FinishDataset(PipelineStep):
    """Puts the dataset together."""

    type = "prepare"
    name = "finish"

    def __init__(self, preparation: Preparation) -> None:
        super().__init__()
        self.preparation = preparation

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Publish the dataset."""
        self.preparation.finish()
