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
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (..., V), or with labels (N,) for hidden (N, H) the sums (cross-entropy, logsumexp squared), fp32.

        Differentiate `cross_entropy + z_loss_weight * logsumexp_squared`, times any factor, and nothing else: the
        gradient of that objective is already made here.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
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
        cross_entropy = hidden.new_zeros((), dtype=torch.float32)
        squared = hidden.new_zeros((), dtype=torch.float32)
        gradients = _Gradients(hidden, weight, bias) if with_gradient else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias)
            counted = labels[rows] != IGNORED_LABEL
            targets = labels[rows].clamp_min(0).unsqueeze(-1)
            probabilities = torch.softmax(logits.float(), dim=-1)
            # The logsumexp from the row's largest entry, where the softmax is exact: no second pass of exponentials.
            largest = logits.amax(-1).float()
            logsumexp = largest - probabilities.amax(-1).log()
            target_logits = logits.gather(-1, targets).squeeze(-1).float()
            cross_entropy += ((logsumexp - target_logits) * counted).sum()
            squared += (logsumexp.square() * counted).sum()
            if gradients is not None:
                scale = counted.float()
                if z_loss_weight:
                    probabilities *= (scale * (1 + 2 * z_loss_weight * logsumexp)).unsqueeze(-1)
                else:
                    probabilities *= scale.unsqueeze(-1)
                probabilities.scatter_add_(-1, targets, -scale.unsqueeze(-1))
                gradients.add(rows, probabilities.to(logits.dtype))
        ctx.gradients = gradients
        return cross_entropy, squared

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        scaled = ctx.gradients.scaled(output_gradients[0])
        ctx.gradients = None
        return (*scaled, None, None, None, None)


class _Gradients:
    """Gradients of hidden, weight and bias, summed over chunks in fp32 where more than one chunk adds to them."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._inputs, self._matrix = hidden.detach(), weight.detach()
        self._hidden = torch.empty_like(self._inputs)
        self._weight: torch.Tensor | None = None
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        """Take the gradient of one chunk's logits, (chunk, V)."""
        torch.mm(logits, self._matrix, out=self._hidden[rows])
        part = logits.t() @ self._inputs[rows]
        self._weight = part.float() if self._weight is None else self._weight.add_(part)
        if self._bias is not None:
            self._bias += logits.sum(0, dtype=torch.float32)

    def scaled(self, factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The gradients of hidden, weight and bias times a scalar, each in its tensor's dtype."""
        dtype = self._matrix.dtype
        weight = None if self._weight is None else torch.mul(self._weight, factor).to(dtype)
        bias = None if self._bias is None else torch.mul(self._bias, factor).to(dtype)
        return self._hidden.mul_(factor), weight, bias
