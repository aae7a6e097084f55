from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.models.batch import IGNORED_LABEL
from pretrain.models.loss import OutputHead, full_logits_loss

TOKENS, HIDDEN, VOCABULARY = 50, 16, 300
Z_WEIGHT = 0.03


def inputs(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    hidden = 3 * torch.randn(TOKENS, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::7] = IGNORED_LABEL
    return linear.to(dtype), hidden.to(dtype).requires_grad_(), labels


def head_of(linear: nn.Linear, *, chunk_tokens: int = 16, z_loss_weight: float = Z_WEIGHT) -> OutputHead:
    return OutputHead.from_linear(linear, chunk_tokens=chunk_tokens, z_loss_weight=z_loss_weight)


def count(labels: torch.Tensor) -> int:
    return int((labels != IGNORED_LABEL).sum())


def reference(
    linear: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, z_weight: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Sums and gradients in double precision, by autograd through the whole logits."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, *linear.parameters())]
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    squared = logits.logsumexp(-1).square()[labels != IGNORED_LABEL].sum()
    return loss, squared, list(torch.autograd.grad((loss + z_weight * squared) * factor, leaves))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 25, 1000])
@pytest.mark.parametrize("z_weight", [0.0, Z_WEIGHT])
def test_sums_and_gradients_equal_double_precision(bias: bool, chunk_tokens: int, z_weight: float) -> None:
    linear, hidden, labels = inputs(bias=bias)
    expected = reference(linear, hidden, labels, z_weight, factor=0.01)
    head = head_of(linear, chunk_tokens=chunk_tokens, z_loss_weight=z_weight)
    loss, squared = head(hidden, labels, count(labels))
    ((loss + z_weight * squared) * 0.01).backward()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(squared.double(), expected[1], rtol=1e-6, atol=0)
    for tensor, gradient in zip((hidden, *linear.parameters()), expected[2], strict=True):
        torch.testing.assert_close(tensor.grad, gradient.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_off_by_roundings_only(dtype: torch.dtype) -> None:
    linear, hidden, labels = inputs(dtype=dtype)
    expected = reference(linear, hidden, labels, Z_WEIGHT, factor=0.01)
    loss, squared = head_of(linear)(hidden, labels, count(labels))
    assert loss.dtype == squared.dtype == torch.float32
    ((loss + Z_WEIGHT * squared) * 0.01).backward()
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-4, atol=0)
    for tensor, gradient in zip((hidden, linear.weight), expected[2], strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert (tensor.grad.double() - gradient).norm() < 0.01 * gradient.norm()


def test_chunks_add_up_in_fp32() -> None:
    """Many bf16 chunks lose nothing that one chunk keeps."""
    linear, hidden, labels = inputs(dtype=torch.bfloat16)
    exact = reference(linear, hidden, labels, 0.0, factor=1.0)[2][1]
    errors = []
    for chunk_tokens in (1, 1000):
        linear.weight.grad = None
        head_of(linear, chunk_tokens=chunk_tokens, z_loss_weight=0.0)(hidden, labels, count(labels))[0].backward()
        assert linear.weight.grad is not None
        errors.append(float((linear.weight.grad.double() - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1]


def test_very_unlikely_targets_have_finite_loss() -> None:
    linear, hidden, labels = inputs()
    hidden.data *= 1e4  # logits thousands apart: the target's probability underflows, its loss must not
    expected = reference(linear, hidden, labels, 0.0, factor=1.0)[0]
    loss, _ = head_of(linear)(hidden, labels, count(labels))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_rows_without_targets_are_never_read() -> None:
    linear, hidden, labels = inputs()
    hidden.data[::7] = torch.nan
    loss, _ = head_of(linear)(hidden, labels, count(labels))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[::7] == 0).all()


def test_no_targets_at_all_give_zero_and_zero_gradients() -> None:
    linear, hidden, labels = inputs(bias=True)
    loss, squared = head_of(linear)(hidden, torch.full_like(labels, IGNORED_LABEL), 0)
    (loss + squared).backward()
    assert loss == squared == 0
    for tensor in (hidden, linear.weight, linear.bias):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had, and the matrix products."""

    elements = 0
    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        self.products += "mm" in function.__name__
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_full_logits_never_exist() -> None:
    linear, hidden, labels = inputs()
    with _LargestTensor() as seen:
        head_of(linear, chunk_tokens=20)(hidden, labels, count(labels))[0].backward()
    assert seen.elements == 20 * VOCABULARY
    with _LargestTensor() as seen:
        full_logits_loss(linear(hidden), labels)[0].backward()
    assert seen.elements == TOKENS * VOCABULARY


def test_evaluation_makes_no_gradients() -> None:
    linear, hidden, labels = inputs()
    trained, _ = head_of(linear, chunk_tokens=1000)(hidden, labels, count(labels))
    with torch.no_grad(), _LargestTensor() as seen:
        evaluated, _ = head_of(linear, chunk_tokens=1000)(hidden, labels, count(labels))
    assert seen.products == 1
    assert not evaluated.requires_grad
    assert evaluated == trained


def test_without_labels_the_head_is_the_linear() -> None:
    linear, hidden, _ = inputs(bias=True)
    head = head_of(linear)
    assert torch.equal(head(hidden), linear(hidden))
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert isinstance(head, nn.Linear)


def test_full_logits_loss_gives_the_same_sums() -> None:
    linear, hidden, labels = inputs()
    expected = reference(linear, hidden, labels, Z_WEIGHT, factor=1.0)
    loss, squared = full_logits_loss(linear(hidden), labels)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(squared.double(), expected[1], rtol=1e-6, atol=0)
