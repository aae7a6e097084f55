"""Cross-entropy and z-loss computed with the output head, a chunk of tokens at a time.

Full logits never exist: gradients are made in the forward, where the chunk's logits are at hand, and the backward only
scales them. Knows nothing of the network below the head, and divides by nothing: the engine owns the denominator.

Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.batch import IGNORED_LABEL


class OutputHead(nn.Linear):
    """The network's output linear, which can also give the loss of its logits without keeping them.

    It stays a Linear with the same parameter names, so tying, checkpoints, generation and ZeRO-3's hooks (which gather
    the weight around this module's forward) see nothing new.
    """

    chunk_tokens: int
    z_loss_weight: float

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, chunk_tokens: int, z_loss_weight: float) -> OutputHead:
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
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, target_count: int = 0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (..., V), or with labels (N,) for hidden (N, H) the sums (cross-entropy, logsumexp squared), fp32.

        Differentiate `cross_entropy + z_loss_weight * logsumexp_squared`, times any factor, and nothing else: the
        gradient of that objective is already made here.

        Args:
            hidden: what the head reads.
            labels: IGNORED_LABEL where there is no target; those rows cost nothing.
            target_count: labels that are not IGNORED_LABEL; stated, so that the device need not tell the host.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if target_count < labels.numel():
            chosen = torch.nonzero_static(labels != IGNORED_LABEL, size=target_count).squeeze(-1)
            hidden, labels = hidden[chosen], labels[chosen]
        with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        sums: tuple[torch.Tensor, torch.Tensor] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, labels, self.chunk_tokens, self.z_loss_weight, with_gradient
        )
        return sums


def full_logits_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two sums from the whole logits (N, V), through autograd, for families whose head does more."""
    logits = logits.float()
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
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = hidden.new_zeros(2, dtype=torch.float32)
        gradients = _Gradients(hidden, weight, bias) if with_gradient else None
        buffers = _Buffers(min(chunk_tokens, hidden.shape[0]), weight)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits, probabilities, logsumexp = buffers.softmax(hidden[rows], weight, bias)
            targets = labels[rows].unsqueeze(-1)
            target_logits = logits.gather(-1, targets).squeeze(-1).float()
            sums[0] += (logsumexp - target_logits).sum()
            sums[1] += logsumexp.square().sum()
            if gradients is not None:
                if z_loss_weight:
                    probabilities *= (1 + 2 * z_loss_weight * logsumexp).unsqueeze(-1)
                probabilities.scatter_add_(-1, targets, probabilities.new_full((), -1.0).expand_as(targets))
                gradients.add(rows, buffers.rounded(probabilities), hidden[rows], weight)
        ctx.gradients = gradients
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        scaled = ctx.gradients.scaled(output_gradients[0])
        ctx.gradients = None
        return (*scaled, None, None, None, None)


class _Buffers:
    """One chunk's logits and probabilities, in memory that every chunk uses again."""

    def __init__(self, chunk_tokens: int, weight: torch.Tensor) -> None:
        shape = (chunk_tokens, weight.shape[0])
        self._logits = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self._probabilities = torch.empty(shape, dtype=torch.float32, device=weight.device)
        is_fp32 = weight.dtype == torch.float32
        self._logits_fp32 = self._logits if is_fp32 else torch.empty_like(self._probabilities)

    def softmax(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (chunk, V) in the weight's dtype, their softmax and logsumexp (chunk,), both fp32."""
        rows = slice(0, hidden.shape[0])
        logits, logits_fp32, probabilities = self._logits[rows], self._logits_fp32[rows], self._probabilities[rows]
        torch.mm(hidden, weight.t(), out=logits)
        if bias is not None:
            logits += bias
        if logits_fp32.data_ptr() != logits.data_ptr():
            logits_fp32.copy_(logits)
        torch.softmax(logits_fp32, dim=-1, out=probabilities)
        # From the largest entry, whose probability never underflows: no second pass of exponentials.
        logsumexp = logits.amax(-1).float() - probabilities.amax(-1).log()
        return logits, probabilities, logsumexp

    def rounded(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The probabilities in the weight's dtype; the chunk's logits are overwritten."""
        if self._logits.dtype == torch.float32:
            return probabilities
        return self._logits[: probabilities.shape[0]].copy_(probabilities)


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
            weight = torch.mul(self._weight, factor).to(self._rounded_weight.dtype)
        bias = None if self._bias is None else torch.mul(self._bias, factor).to(weight.dtype)
        return self._hidden.mul_(factor), weight, bias
