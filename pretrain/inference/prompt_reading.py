"""Prompts that are read together, whole or a piece at a time, before their rows join the running batch.

Owns their padding and their forward; which requests are read together is running_batch.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache


class PromptReading:
    """Prompts padded on the left, and the keys and values of what was read of them."""

    def __init__(self, network: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.cache = DynamicCache()
        self._network = network
        self._read = 0  # columns
        longest = max(self.lengths)
        padding = [longest - length for length in self.lengths]
        rows = [[0] * pad + list(ids) for pad, ids in zip(padding, prompts, strict=True)]
        self._ids = torch.tensor(rows, device=network.device)
        self._starts = torch.tensor(padding, device=network.device).unsqueeze(1) if any(padding) else None

    def read(self, most_columns: int | None) -> torch.Tensor | None:
        """Read on, so many columns at most (null: to the end); logits (rows, V) after the last one, else null."""
        whole = self._ids.shape[1]
        stop = whole if most_columns is None else min(self._read + most_columns, whole)
        columns = torch.arange(stop, device=self._ids.device)
        positions = columns.unsqueeze(0) if self._starts is None else (columns - self._starts).clamp(min=0)
        logits: torch.Tensor = self._network(
            input_ids=self._ids[:, self._read : stop],
            attention_mask=None if self._starts is None else columns >= self._starts,
            position_ids=positions[:, self._read :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._read = stop
        return logits[:, -1] if stop == whole else None
