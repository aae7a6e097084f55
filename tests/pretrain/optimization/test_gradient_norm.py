"""The norm of a gradient against double precision, on tables as large as real ones."""

from __future__ import annotations

import pytest
import torch

from pretrain.optimization.gradient_norm import global_norm


def test_a_large_table_loses_nothing() -> None:
    table = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    exact = float(table.double().norm())
    assert float(global_norm([table])) == pytest.approx(exact, rel=3e-7)
    assert abs(float(table.norm()) / exact - 1) > 3e-6  # torch's own: once it is exact, this file can go


def test_all_parts_count() -> None:
    parts = [torch.full((2, 2), 3.0), torch.zeros(5), torch.full((4,), 4.0)]
    assert float(global_norm(parts)) == 10.0
    assert float(global_norm([])) == 0.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    assert not global_norm([torch.ones(3), torch.tensor([1.0, value])]).isfinite()
