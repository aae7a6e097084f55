"""A rank's stages as DeepSpeed's PipelineModule: what DeepSpeed runs, and where its layers find their micro-batches.

Owns the modules and the micro-batches of a step. Schedules and messages are DeepSpeed's, the step is pipeline.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.engines.tensor_parallel import TensorRanks, join_gradients, split_model
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.loss import OutputHead
from pretrain.models.pipeline_layers import PassThrough, StageModules, TensorSplit, build_stage
from pretrain.models.pipeline_stages import Stage
from pretrain.models.sharding import slicing_gather
from pretrain.models.source_losses import SourceLosses, TokenSources
from pretrain.random_streams import stream_seed
from pretrain.topology import Topology

TABLE = "table"  # key of the tied token table


class MicroBatchFeed:
    """The micro-batches of one step. Every rank of a pipeline is given the same rows, so only hidden states travel.

    DeepSpeed runs the micro-batches of a stage in their order, so each part of the model counts its own forwards.
    """

    def __init__(self, device: torch.device, *, seed: int, z_loss: float) -> None:
        self._device, self._seed, self._z_loss = device, seed, z_loss
        self._taken: Counter[str] = Counter()
        self._batches: Sequence[Batch] = ()
        self._weight: torch.Tensor | None = None
        self._dropout: Callable[[int], tuple[int, ...]] | None = None
        self.sums = torch.zeros(2, device=device)
        self.source_losses = SourceLosses()

    def begin(
        self,
        batches: Sequence[Batch],
        *,
        weight: torch.Tensor | None = None,
        dropout: Callable[[int], tuple[int, ...]] | None = None,
    ) -> None:
        """Start over with new micro-batches.

        Args:
            batches: of this rank's data coordinate.
            weight: factor of the loss sums that are differentiated; null for an evaluation.
            dropout: from a micro-batch's place to the index of its random stream; null for an evaluation.
        """
        self._batches, self._weight, self._dropout = batches, weight, dropout
        self._taken.clear()
        self.sums = torch.zeros(2, device=self._device)
        if weight is not None:  # in training, on all ranks, though the last stage alone fills them
            self.source_losses.begin(batches, self._device)

    def take(self, part: str) -> tuple[int, Batch]:
        """The place and the content of the next micro-batch of one part of the model."""
        place = self._taken[part]
        self._taken[part] += 1
        return place, self._batches[place].to(self._device)

    def seed_dropout(self, place: int, stage: int) -> None:
        """Start the random stream of a micro-batch: the first stage's is the plain engine's, later ones have their own.

        (In one process a generator goes on from layer to layer; a later stage cannot know how far it came.)
        """
        if self._dropout is not None:
            index = self._dropout(place)
            torch.manual_seed(stream_seed(self._seed, "dropout", *index, *(("stage", stage) if stage else ())))

    def sources(self, batch: Batch) -> TokenSources | None:
        """Of a micro-batch's tokens, in training."""
        return None if self._weight is None else self.source_losses.watch(batch)

    def objective(self, sums: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Note the sums of a micro-batch; what is to be differentiated."""
        loss, z_loss = sums
        self.sums += torch.stack((loss.detach(), z_loss.detach()))
        return loss if self._weight is None else (loss + self._z_loss * z_loss) * self._weight


class TokenTable(nn.Module):
    """The token table; tied models hold it on both ends of the pipeline, at the last with the head that shares it."""

    def __init__(self, table: nn.Embedding, head: OutputHead | None, feed: MicroBatchFeed) -> None:
        super().__init__()
        self.table = table
        self.head = LossHead(head, feed) if head is not None else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, H)."""
        hidden: torch.Tensor = self.table(input_ids)
        return hidden


class LossHead(nn.Module):
    """Hidden states to the objective of their micro-batch."""

    def __init__(self, head: OutputHead, feed: MicroBatchFeed) -> None:
        super().__init__()
        self.head = head
        self._feed = feed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H) to a scalar."""
        _, batch = self._feed.take("head")
        sums: tuple[torch.Tensor, torch.Tensor] = self.head(
            hidden.flatten(0, -2),
            batch.labels.flatten(),
            batch.target_count,
            self._feed.sources(batch),
            scores=batch.scores,
        )
        return self._feed.objective(sums)


class Body(nn.Module):
    """The decoder layers of one stage."""

    def __init__(self, body: nn.Module, stage: int, feed: MicroBatchFeed) -> None:
        super().__init__()
        self.body = body
        self._stage, self._feed = stage, feed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H) in and out."""
        place, batch = self._feed.take(f"stage {self._stage}")
        if self.training:
            self._feed.seed_dropout(place, self._stage)
        out: torch.Tensor = self.body(hidden, batch)
        return out


@dataclass(frozen=True, kw_only=True)
class OwnStages:
    """The stages that this rank builds, by their number."""

    count: int  # of all stages
    modules: dict[int, StageModules]
    is_tied: bool

    @classmethod
    def build(
        cls,
        builder: ModelBuilder,
        stages: Sequence[Stage],
        numbers: Sequence[int],
        device: torch.device,
        ranks: TensorRanks | None,
    ) -> OwnStages:
        """Make the modules of some stages with their starting weights, cut over tensor ranks where there are any."""
        split = None
        if ranks:
            split = TensorSplit(
                cut=partial(split_model, ranks=ranks),
                join_gradients=partial(join_gradients, ranks=ranks),
                gather=slicing_gather(),
            )
        modules = {number: build_stage(builder, stages[number], device, split) for number in numbers}
        own = cls(count=len(stages), modules=modules, is_tied=bool(builder.config.tie_word_embeddings))
        if own.is_tied and own.first and own.last:  # both ends are here: one table
            assert own.first.embedding is not None
            assert own.last.head is not None
            own.last.head.weight = own.first.embedding.weight
        return own

    @property
    def first(self) -> StageModules | None:
        """The stage that begins with the token table, if it is here."""
        return self.modules.get(0)

    @property
    def last(self) -> StageModules | None:
        """The stage that ends in the loss, if it is here."""
        return self.modules.get(self.count - 1)

    def names(self) -> dict[int, str]:
        """Id of a parameter -> its name in the whole model."""
        return {key: name for stage in self.modules.values() for key, name in stage.names.items()}


def build_pipeline_module(
    own: OwnStages, topology: Topology, feed: MicroBatchFeed, *, is_bidirectional: bool
) -> nn.Module:
    """DeepSpeed's module of this rank's stages. Collective: it makes the process groups."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class OwnParts(PipelineModule):  # type: ignore[misc]
        """Cut where pipeline_stages.py says, which DeepSpeed's methods cannot express."""

        def _partition_layers(self, method: str) -> None:
            self.parts = [0, *range(2, own.count + 1), own.count + 2]
            self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    class OwnPartsInV(DualPipeVModule, OwnParts):  # type: ignore[misc]
        """The same, a rank having a stage on the way out and one on the way back."""

    elsewhere = LayerSpec(PassThrough)  # never built here
    first, last = own.first, own.last
    if own.is_tied:
        either = first or last
        table = either.embedding if either else None
        arguments = (TABLE, TokenTable, table, last.head if last else None, feed)
        start = TiedLayerSpec(*arguments, tied_weight_attr="table.weight")
        end = TiedLayerSpec(*arguments, tied_weight_attr="table.weight", forward_fn=_head_of)
    else:
        start = TokenTable(first.embedding, None, feed) if first and first.embedding else elsewhere
        end = LossHead(last.head, feed) if last and last.head else elsewhere
    bodies = [
        Body(own.modules[number].body, number, feed) if number in own.modules else elsewhere
        for number in range(own.count)
    ]
    module: nn.Module = (OwnPartsInV if is_bidirectional else OwnParts)(
        layers=[start, *bodies, end],
        topology=PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data),
    )
    return module


def process_groups(module: nn.Module) -> list[dist.ProcessGroup]:
    """The groups of this rank that DeepSpeed made for the module and never gives back."""
    grid: Any = module._grid
    groups = [
        module.world_group,
        grid.ds_model_proc_group,
        grid.dp_proc_group,
        grid.pp_proc_group,
        grid.slice_proc_group,
    ]
    groups += [tie["group"] for tie in module.tied_comms.values()]  # type: ignore[operator]
    return list(dict.fromkeys(groups))


def _head_of(table: TokenTable, hidden: torch.Tensor) -> torch.Tensor:
    assert table.head is not None, "the last stage has the head"
    objective: torch.Tensor = table.head(hidden)
    return objective
