"""Cuts a model's matrices over tensor ranks, after the family's own plan: layers, collectives, starting values.

The layers stay the Linear and Embedding that transformers made, with their names, so that recomputation, ZeRO-3 and
checkpoints see smaller tensors and nothing new. DeepSpeed's AutoTP was weighed: every rank builds the whole model
first, all inputs go through pickle at the first forward, and each linear sums its own input gradient where one sum a
block does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.models.batch import TargetScores
from pretrain.models.loss import OutputHead, VocabularyShare
from pretrain.models.sharding import SHARD, Shard, even_share
from pretrain.models.source_losses import TokenSources
from pretrain.models.tensor_plan import Style, TensorPlan
from pretrain.models.training_model import TrainingModel


@dataclass(frozen=True, kw_only=True)
class TensorRanks:
    """The ranks that hold one model's slices."""

    group: dist.ProcessGroup
    place: int
    size: int

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous tensor in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of each element, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' slices of the last dimension, side by side; all of one size."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def own_slice(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the last dimension."""
        return tensor.chunk(self.size, -1)[self.place].contiguous()


class _Copy(torch.autograd.Function):
    """The same on all ranks, which use it for different parts: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:  # noqa: D102 - autograd calls it
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102 - autograd calls it
        # summed in a tensor of its own: another branch may hold the one that autograd gave
        return ctx.ranks.sum(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """Parts of one result: summed, and the same gradient for all."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:  # noqa: D102 - autograd calls it
        ctx.mark_dirty(tensor)
        return ranks.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102 - autograd calls it
        return gradients[0], None


class _Join(torch.autograd.Function):
    """Slices put side by side on every rank, which then all compute the same."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:  # noqa: D102 - autograd calls it
        ctx.ranks = ranks
        return ranks.join(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102 - autograd calls it
        return ctx.ranks.own_slice(gradients[0]), None


class _Cut(torch.autograd.Function):
    """Each rank goes on with its slice of what all have computed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:  # noqa: D102 - autograd calls it
        ctx.ranks = ranks
        return ranks.own_slice(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102 - autograd calls it
        return ctx.ranks.join(gradients[0]), None


def _apply(function: type[torch.autograd.Function], tensor: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    result: torch.Tensor = function.apply(tensor, ranks)  # type: ignore[no-untyped-call]
    return result


class ColumnLinear(nn.Linear):
    """Holds some of a linear's outputs; its input's gradient is summed where its block begins."""

    joined: TensorRanks | None = None  # set: the output is made whole again

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Activations (..., in) to (..., own part of out), or (..., out)."""
        output = F.linear(input, self.weight, self.bias)
        return output if self.joined is None else _apply(_Join, output, self.joined)


class RowLinear(nn.Linear):
    """Holds a linear's weights of some of its inputs, and the whole bias."""

    ranks: TensorRanks
    cuts_input = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Activations (..., own part of in), or (..., in) where it cuts them, to (..., out)."""
        if self.cuts_input:
            input = _apply(_Cut, input, self.ranks)
        output = _apply(_Sum, F.linear(input, self.weight), self.ranks)
        return output if self.bias is None else output + self.bias


class VocabularyEmbedding(nn.Embedding):
    """Holds the vectors of some tokens."""

    ranks: TensorRanks
    first_token: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to vectors (..., hidden)."""
        rows = input - self.first_token
        count = self.weight.shape[0]
        is_elsewhere = (rows < 0) | (rows >= count)
        padding = None if self.padding_idx is None else self.padding_idx - self.first_token
        if padding is not None and not 0 <= padding < count:
            padding = None  # another rank's: there its vector takes no gradient
        vectors = F.embedding(rows.masked_fill(is_elsewhere, 0), self.weight, padding)
        return _apply(_Sum, vectors.masked_fill(is_elsewhere.unsqueeze(-1), 0), self.ranks)


class VocabularyHead(OutputHead):
    """Holds the output rows of some tokens; see VocabularyShare."""

    ranks: TensorRanks

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        target_count: int = 0,
        sources: TokenSources | None = None,
        scores: TargetScores | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See OutputHead.forward; logits are not given."""
        assert labels is not None, "a cut head gives losses only"
        return super().forward(_apply(_Copy, hidden, self.ranks), labels, target_count, sources, scores)


def split_model(model: TrainingModel, ranks: TensorRanks) -> None:
    """Cut a model that is laid out on the meta device; modules replaced by pass-throughs are left alone.

    Afterwards `sharding.materialize` gives it memory, then call `join_gradients`, and fill it through `slicing_gather`.
    """
    network = model.network
    plan, base, cutter = TensorPlan(network.config), network.base_model, _Cutter(ranks)
    entrances: dict[int, nn.Module] = {}
    for name, module in list(base.named_modules()):
        style = plan.style(name)
        if style is None or not isinstance(module, nn.Linear):
            continue
        path, _, own_name = name.rpartition(".")
        parent = base.get_submodule(path)
        setattr(parent, own_name, cutter.linear(module, style))
        if style in ("column", "column gathered"):
            entrances[id(parent)] = parent
    for parent in entrances.values():
        _sum_input_gradient(parent, ranks)
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    if isinstance(table, nn.Embedding):
        network.set_input_embeddings(cutter.embedding(table))
    if isinstance(head, OutputHead):
        network.set_output_embeddings(cutter.head(head))


def join_gradients(model: TrainingModel, ranks: TensorRanks) -> None:
    """Sum the gradients of whole weights that multiply cut activations, such as norms of single heads."""
    plan, base = TensorPlan(model.network.config), model.network.base_model

    def join(gradient: torch.Tensor) -> torch.Tensor:
        return ranks.sum(gradient.clone(memory_format=torch.contiguous_format))

    for name, module in base.named_modules():
        if plan.style(name) == "of cut activations":
            for parameter in module.parameters(recurse=False):
                parameter.register_hook(join)


def _sum_input_gradient(block: nn.Module, ranks: TensorRanks) -> None:
    """Sum the gradient of a block's input once, for all cut linears that read it."""

    def enter(
        _: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if positional:
            return (_apply(_Copy, positional[0], ranks), *positional[1:]), named
        return positional, {**named, "hidden_states": _apply(_Copy, named["hidden_states"], ranks)}

    block.register_forward_pre_hook(enter, with_kwargs=True)


class _Cutter:
    """Makes layers of this rank's slices."""

    def __init__(self, ranks: TensorRanks) -> None:
        self._ranks = ranks
        self._cut: dict[torch.Tensor, nn.Parameter] = {}  # a tied weight is cut once

    def linear(self, linear: nn.Linear, style: Style) -> nn.Linear:
        is_row = style in ("row", "row of split input")
        layer: ColumnLinear | RowLinear = _bare(RowLinear) if is_row else _bare(ColumnLinear)
        layer.weight = self._slice(linear.weight, 1 if is_row else 0)
        layer.bias = linear.bias if linear.bias is None or is_row else self._slice(linear.bias, 0)
        layer.out_features, layer.in_features = layer.weight.shape
        if isinstance(layer, RowLinear):
            layer.ranks, layer.cuts_input = self._ranks, style == "row of split input"
        elif style == "column gathered":
            layer.joined = self._ranks
        return layer

    def embedding(self, table: nn.Embedding) -> VocabularyEmbedding:
        layer = _bare(VocabularyEmbedding)
        vars(layer).update({key: value for key, value in vars(table).items() if not key.startswith("_")})
        layer.ranks = self._ranks
        layer.first_token = even_share(table.weight.shape[0], self._ranks.size, self._ranks.place)[0]
        layer.weight = self._slice(table.weight, 0)
        return layer

    def head(self, head: OutputHead) -> VocabularyHead:
        assert getattr(head, "bias", None) is None, "no family of TENSOR_TYPES has a bias there"
        tokens = head.weight.shape[0]
        layer = VocabularyHead.from_linear(head, chunk_tokens=head.chunk_tokens, z_loss_weight=head.z_loss_weight)
        layer.weight = self._slice(head.weight, 0)
        layer.out_features = layer.weight.shape[0]
        layer.ranks = self._ranks
        layer.share = VocabularyShare(
            start=even_share(tokens, self._ranks.size, self._ranks.place)[0],
            most_rows=-(-tokens // self._ranks.size),
            largest=self._ranks.largest,
            total=self._ranks.sum,
        )
        return layer

    def _slice(self, parameter: torch.Tensor, dimension: int) -> nn.Parameter:
        """A meta parameter of this rank's slice, marked for us and for DeepSpeed's gradient norm."""
        if parameter not in self._cut:
            assert parameter.is_meta
            shape = tuple(parameter.shape)
            own_range = even_share(shape[dimension], self._ranks.size, self._ranks.place)
            box = tuple(own_range if place == dimension else (0, length) for place, length in enumerate(shape))
            sizes = [stop - start for start, stop in box]
            own = nn.Parameter(parameter.data.new_empty(sizes), requires_grad=parameter.requires_grad)
            setattr(own, SHARD, Shard(shape=shape, box=box))
            own.tensor_model_parallel = True  # type: ignore[attr-defined]
            self._cut[parameter] = own
        return self._cut[parameter]


Layer = TypeVar("Layer", bound=nn.Module)


def _bare(layer_type: type[Layer]) -> Layer:
    """A layer without weights: its class' constructor would make some."""
    layer = layer_type.__new__(layer_type)
    nn.Module.__init__(layer)
    return layer
