"""Cross-entropy and z-loss computed with the output head, a chunk of tokens at a time.

Full logits never exist: gradients are made in the forward, where the chunk's logits are at hand, and the backward only
scales them. Knows nothing of the network below the head, and divides by nothing: the engine owns the denominator.

Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.batch import IGNORED_LABEL, TargetScores
from pretrain.models.source_losses import TokenSources

CPU_BLOCK_ELEMENTS = 1 << 21  # fp32 numbers: measured best of 2^19 to 2^25 on a CPU with 1 MiB of L2 a core


@dataclass(frozen=True, kw_only=True)
class VocabularyShare:
    """That the head's rows are a part of the vocabulary; who holds the rest is known to the reductions."""

    start: int  # token of the first row
    most_rows: int  # of any share: all cut their work into the same blocks
    largest: Callable[[torch.Tensor], torch.Tensor]  # of each element, over all shares
    total: Callable[[torch.Tensor], torch.Tensor]


class OutputHead(nn.Linear):
    """The network's output linear, which can also give the loss of its logits without keeping them.

    It stays a Linear with the same parameter names, so tying, checkpoints, generation and ZeRO-3's hooks (which gather
    the weight around this module's forward) see nothing new.
    """

    chunk_tokens: int
    z_loss_weight: float
    share: VocabularyShare | None = None  # none: all rows are here

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, chunk_tokens: int, z_loss_weight: float) -> Self:
        """Take over a linear's own Parameter objects.

        Args:
            linear: the head that the network was built with; not to be used afterwards.
            chunk_tokens: tokens whose logits exist at one time.
            z_loss_weight: weight of the z-loss within the objective that is differentiated.
        """
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias = linear.weight, linear.bias
        head.chunk_tokens, head.z_loss_weight = chunk_tokens, z_loss_weight
        return head

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        target_count: int = 0,
        sources: TokenSources | None = None,
        scores: TargetScores | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (..., V), or with labels (N,) for hidden (N, H) the sums (cross-entropy, logsumexp squared), fp32.

        Differentiate `cross_entropy + z_loss_weight * logsumexp_squared`, times any factor, and nothing else: the
        gradient of that objective is already made here.

        Args:
            hidden: what the head reads.
            labels: IGNORED_LABEL where there is no target; those rows cost nothing.
            target_count: labels that are not IGNORED_LABEL; stated, so that the device need not tell the host.
            sources: of the N tokens, where their losses are counted by source as well.
            scores: where each target's loss is added as well; there are no gradients then.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if scores is not None:
            return self._score(hidden, labels, scores)
        if target_count < labels.numel():
            chosen = torch.nonzero_static(labels != IGNORED_LABEL, size=target_count).squeeze(-1)
            hidden, labels = hidden[chosen], labels[chosen]
            sources = sources.at(chosen) if sources else None
        with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        sums: tuple[torch.Tensor, torch.Tensor] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            self.weight,
            self.bias,
            labels,
            self.chunk_tokens,
            self.z_loss_weight,
            self.share,
            sources,
            with_gradient,
        )
        return sums

    @torch.no_grad()
    def _score(
        self, hidden: torch.Tensor, labels: torch.Tensor, scores: TargetScores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = hidden.new_zeros(2, dtype=torch.float32)
        chosen = torch.nonzero(labels != IGNORED_LABEL).squeeze(-1)
        for places in torch.split(chosen, self.chunk_tokens):
            logits = F.linear(hidden[places], self.weight, self.bias).float()
            sums += score_targets(logits, labels[places], scores.owners.flatten()[places], scores, self.share)
        return sums[0], sums[1]


def score_targets(
    logits: torch.Tensor,
    targets: torch.Tensor,
    owners: torch.Tensor,
    scores: TargetScores,
    share: VocabularyShare | None = None,
) -> torch.Tensor:
    """Add targets (N,) with fp32 logits (N, V) to the scores of their owners (N,); the two sums (2,) of all of them."""
    largest = logits.amax(-1)
    rows = targets if share is None else targets - share.start
    is_here = (rows >= 0) & (rows < logits.shape[-1])
    of_target = logits.gather(-1, rows.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1) * is_here
    if share is not None:
        largest = share.largest(largest)
    total = (logits - largest.unsqueeze(-1)).exp().sum(-1)
    if share is not None:
        total, of_target = share.total(torch.stack((total, of_target)))
    logsumexp = largest + total.log()
    losses = logsumexp - of_target
    scores.add(owners, losses, of_target >= largest)
    return torch.stack((losses.sum(), logsumexp.square().sum()))


def full_logits_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sources: TokenSources | None = None,
    scores: TargetScores | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two sums from the whole logits (N, V), through autograd, for families whose head does more."""
    logits = logits.float()
    if scores is not None:
        places = torch.nonzero(labels != IGNORED_LABEL).squeeze(-1)
        sums = score_targets(logits[places], labels[places], scores.owners.flatten()[places], scores)
        return sums[0], sums[1]
    if sources:
        with torch.no_grad():
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
            sources.add(losses, weights=(labels != IGNORED_LABEL).float())
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    squared = logits.logsumexp(-1).square()
    return cross_entropy, (squared * (labels != IGNORED_LABEL)).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Sums over tokens of cross-entropy and squared logsumexp, with gradients made in the forward."""

    @staticmethod
    def forward(  # noqa: D102 - autograd's own signature
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
        z_loss_weight: float,
        share: VocabularyShare | None,
        sources: TokenSources | None,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = hidden.new_zeros(2, dtype=torch.float32)
        gradients = _Gradients(hidden, weight, bias) if with_gradient else None
        chunk_type = _Chunk if share is None else _SharedChunk
        chunk = chunk_type(min(chunk_tokens, hidden.shape[0]), weight, z_loss_weight, share)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = chunk.logits(hidden[rows], weight, bias)
            sums += chunk.replace_by_gradient(logits, labels[rows], sources.at(rows) if sources else None)
            if gradients is not None:
                gradients.add(rows, logits, hidden[rows], weight)
        ctx.gradients = gradients
        return sums[0].clone(), sums[
            1
        ].clone()  # no views: FSDP2 cannot hook the backward of one that is changed in place

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        scaled = ctx.gradients.scaled(output_gradients[0])
        ctx.gradients = None
        return (*scaled, None, None, None, None, None, None)


class _Chunk:
    """One chunk's logits, in memory that every chunk uses again.

    The fp32 work goes by blocks of rows that stay in a CPU's cache, which makes it four times as fast as whole chunks;
    on other devices a block is the whole chunk, since there the kernel launches would cost more.
    """

    def __init__(
        self, tokens: int, weight: torch.Tensor, z_loss_weight: float, share: VocabularyShare | None = None
    ) -> None:
        vocabulary, device = weight.shape[0], weight.device
        most = vocabulary if share is None else share.most_rows
        rows = max(1, min(tokens, CPU_BLOCK_ELEMENTS // most)) if device.type == "cpu" else tokens
        self._logits = torch.empty((tokens, vocabulary), dtype=weight.dtype, device=device)
        self._block = torch.empty((rows, vocabulary), dtype=torch.float32, device=device)
        self._probabilities = torch.empty_like(self._block)
        self._z_loss_weight = z_loss_weight
        self._share = share

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits (chunk, V) in the weight's dtype, valid until the next call."""
        logits = torch.mm(hidden, weight.t(), out=self._logits[: hidden.shape[0]])
        return logits if bias is None else logits.add_(bias)

    def replace_by_gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, sources: TokenSources | None = None
    ) -> torch.Tensor:
        """Overwrite logits by the objective's gradient; the two sums (2,) of these tokens."""
        sums = self._block.new_zeros(2)
        for start in range(0, len(logits), len(self._block)):
            block = logits[start : start + len(self._block)]
            targets = labels[start : start + len(self._block)].unsqueeze(-1)
            exact = self._block[: len(block)].copy_(block)
            probabilities, logsumexp, of_target = self._normalize(exact, targets)
            losses = logsumexp - of_target
            sums[0] += losses.sum()
            if sources:
                sources.at(slice(start, start + len(block))).add(losses)
            sums[1] += logsumexp.square().sum()
            if self._z_loss_weight:
                probabilities *= 1 + 2 * self._z_loss_weight * logsumexp
            block.copy_(self._less_one_at(probabilities, targets))
        return sums

    def _normalize(self, exact: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities (rows, V); logsumexp and the target's logit (rows, 1)."""
        probabilities = torch.softmax(exact, dim=-1, out=self._probabilities[: len(exact)])
        # From the largest entry, whose probability never underflows: no second pass of exponentials.
        logsumexp = exact.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
        return probabilities, logsumexp, exact.gather(-1, targets)

    def _less_one_at(self, probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return probabilities.scatter_add_(-1, targets, probabilities.new_full(targets.shape, -1.0))


class _SharedChunk(_Chunk):
    """A chunk of which these are the logits of some tokens of the vocabulary; others have the rest.

    Only three numbers a row are exchanged: the largest logit, the sum of exponentials and the target's logit.
    """

    def _normalize(self, exact: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self._share is not None
        largest = self._share.largest(exact.amax(-1, keepdim=True))
        rows, is_here = self._rows_of(targets, exact.shape[-1])
        of_target = exact.gather(-1, rows) * is_here
        probabilities = torch.exp(exact.sub_(largest), out=self._probabilities[: len(exact)])
        sums = self._share.total(torch.cat([probabilities.sum(-1, keepdim=True), of_target], -1))
        total, of_target = sums[:, :1], sums[:, 1:]
        return probabilities.div_(total), total.log() + largest, of_target

    def _less_one_at(self, probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, is_here = self._rows_of(targets, probabilities.shape[-1])
        return probabilities.scatter_add_(-1, rows, -is_here.to(probabilities.dtype))

    def _rows_of(self, targets: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each target's row of the head, any where it is another's, and whether it is this one's."""
        assert self._share is not None
        rows = targets - self._share.start
        return rows.clamp(0, count - 1), (rows >= 0) & (rows < count)


class _Gradients:
    """Gradients of hidden, weight and bias, summed over chunks in fp32."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._hidden = torch.empty_like(hidden)
        # Its shape and dtype are kept, not the weight itself: ZeRO-3 lets go of the whole weight after the forward.
        self._rounded_weight = torch.empty_like(weight, device="meta")
        self._weight: torch.Tensor | None = None
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(self, rows: slice, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Take the gradient of one chunk's logits, (chunk, V), made from these rows of hidden."""
        torch.mm(logits, weight, out=self._hidden[rows])
        part = logits.t() @ hidden
        self._weight = part.float() if self._weight is None else self._weight.add_(part)
        if self._bias is not None:
            self._bias += logits.sum(0, dtype=torch.float32)

    def scaled(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The gradients of hidden, weight and bias times a scalar, each in its tensor's dtype."""
        if self._weight is None:
            weight = torch.zeros_like(self._rounded_weight, device=factor.device)
        else:
            weight = self._weight.mul_(factor).to(self._rounded_weight.dtype)
        bias = None if self._bias is None else self._bias.mul_(factor).to(weight.dtype)
        return self._hidden.mul_(factor), weight, bias
