"""Sequence parallelism (Ulysses): the ranks of one group each compute a part of every row, attention by heads.

Owns the cut of a micro-batch, and an attention that knows the documents of whole rows: DeepSpeed's exchange drops the
mask, so that packed documents would see each other. ZeRO, and the weight of the loss, are zero.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pretrain import distributed
from pretrain.config import RunConfig
from pretrain.engines.rank_groups import own_group
from pretrain.models.attention import EXCHANGED, FLASH, has_packed_rows
from pretrain.models.batch import IGNORED_LABEL, Batch
from pretrain.models.training_model import TrainingModel
from pretrain.models.varlen_attention import BORDERS, VARLEN, Borders
from pretrain.topology import Topology

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class SequenceParallel:
    """One rank's place in its group. Every rank must construct and close."""

    def __init__(self, topology: Topology, *, micro_batch_size: int) -> None:
        self._micro_batch_size = micro_batch_size
        self._documents = WholeRows()
        self.ranks = topology.sequence
        self.groups = SequenceGroups(topology)
        self._place = self.groups.get_sequence_parallel_rank()

    def take_over(self, model: TrainingModel) -> None:
        """Let the model's attention exchange heads for tokens."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        network: PreTrainedModel = model.network
        config = network.config
        kernel = config._attn_implementation
        exchange = UlyssesSPAttentionHF(
            attn=_core_attention(kernel, self._documents),
            batch_size=self._micro_batch_size,
            attn_head_count=config.num_attention_heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self.groups.get_sequence_parallel_group(),
            seq_length_is_variable=True,
        )
        # a name of its own: other models of this process keep theirs, and transformers builds no mask for it
        ALL_ATTENTION_FUNCTIONS[EXCHANGED] = exchange.forward
        model.use_attention(EXCHANGED)

    def take(self, batch: Batch) -> Batch:
        """This rank's part of every row, for the next forward; attention then knows the whole rows."""
        self._documents.begin(batch)
        length = batch.input_ids.shape[1] // self.ranks
        part = slice(self._place * length, (self._place + 1) * length)
        labels = batch.labels[:, part]  # already shifted: the label of a part's last token is in it
        return replace(
            batch,
            input_ids=batch.input_ids[:, part],
            labels=labels,
            position_ids=batch.position_ids[:, part],
            target_count=int((labels != IGNORED_LABEL).sum()),
            scores=batch.scores and replace(batch.scores, owners=batch.scores.owners[:, part]),
        )

    def close(self) -> None:
        """Leave transformers and DeepSpeed as they were."""
        self.groups.close()
        if EXCHANGED in ALL_ATTENTION_FUNCTIONS:
            del ALL_ATTENTION_FUNCTIONS[EXCHANGED]


class SequenceGroups:
    """What `deepspeed.initialize` asks as its mpu: who shares rows, and that nobody shares weights.

    DeepSpeed's own, parallel_state_sp, calls the sequence ranks model-parallel as well; the bf16 optimizer of stage 1
    then counts no gradient on all of them but the first, and fails.
    """

    def __init__(self, topology: Topology) -> None:
        assert topology.tensor == topology.pipeline == 1
        self._size, self._place = topology.sequence, topology.coordinate(distributed.rank()).sequence
        self._group, _ = own_group(topology.groups("sequence"))
        self._alone = dist.new_group([distributed.rank()], use_local_synchronization=True)

    def initialize_sequence_parallel(self) -> None:
        """DeepSpeed looks whether there is such a function, and takes the mpu for one of sequences."""

    def get_sequence_parallel_group(self) -> Any:
        """DeepSpeed's: ranks with parts of the same rows."""
        return self._group

    def get_sequence_parallel_world_size(self) -> int:
        """DeepSpeed's."""
        return self._size

    def get_sequence_parallel_rank(self) -> int:
        """DeepSpeed's."""
        return self._place

    def get_sequence_data_parallel_group(self) -> Any:
        """DeepSpeed's: ranks that ZeRO shares the state by, which are all."""
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        """DeepSpeed's."""
        return distributed.world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        """DeepSpeed's."""
        return distributed.rank()

    def get_model_parallel_group(self) -> Any:
        """DeepSpeed's: this rank alone."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """DeepSpeed's."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """DeepSpeed's."""
        return 0

    def close(self) -> None:
        """Give the groups back, and make DeepSpeed forget them."""
        from deepspeed.utils import groups

        if groups.mpu is self:
            groups.mpu = None
        dist.destroy_process_group(self._group)
        dist.destroy_process_group(self._alone)


class WholeRows:
    """The documents of the micro-batch that is computed now: the same on all ranks of a group."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._masks: dict[int | None, torch.Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Go on to another micro-batch."""
        self._batch, self._masks = batch, {}

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Where attention is allowed, (B, 1, T, T), made once for all layers; None where it is merely causal."""
        assert self._batch is not None
        if not has_packed_rows(self._batch) and (window is None or window >= self._batch.input_ids.shape[1]):
            return None
        if window not in self._masks:
            self._masks[window] = _document_mask(self._batch.position_ids.to(device), window)
        return self._masks[window]

    def borders(self, device: torch.device) -> Borders:
        """See Borders."""
        assert self._batch is not None
        lengths = self._batch.cumulative_lengths.to(device, non_blocking=True)
        return Borders(cumulative_lengths=lengths, longest=self._batch.longest_document)


def _document_mask(position_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    document = (position_ids == 0).cumsum(-1)
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = place[:, None] - place[None, :]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return ((document[:, :, None] == document[:, None, :]) & allowed).unsqueeze(1)


def _core_attention(name: str, rows: WholeRows) -> Attention:
    """What computes a share of the heads over whole rows, after the exchange, by an implementation of that name."""
    kernel: Attention = ALL_ATTENTION_FUNCTIONS[name]

    def masked(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = rows.mask(options.get("sliding_window"), query.device)
        return kernel(module, query, key, value, mask, **options)

    def variable_length(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        borders = rows.borders(query.device)
        options.pop("position_ids")
        if name == VARLEN:
            options[BORDERS] = borders
        else:
            options.update(cu_seq_lens_q=borders.cumulative_lengths, cu_seq_lens_k=borders.cumulative_lengths)
            options.update(max_length_q=borders.longest, max_length_k=borders.longest)
        count, _, length, _ = query.shape
        long = (heads.transpose(0, 1).flatten(1, 2).unsqueeze(0) for heads in (query, key, value))
        result, weights = kernel(module, *long, None, **options)
        return result.view(count, length, *result.shape[2:]), weights

    return variable_length if name in (FLASH, VARLEN) else masked


def share_rows(config: RunConfig, topology: Topology) -> SequenceParallel | None:
    """Sequence parallelism where the run has it. Collective."""
    if topology.sequence == 1:
        return None
    return SequenceParallel(topology, micro_batch_size=config.batch.micro_batch_size)
