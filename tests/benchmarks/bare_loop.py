"""The reference of step.py and start_up.py: transformers and fused AdamW in the fewest lines.

A script as anybody would write it; nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# 56 M parameters; a step is 2 micro-batches of 4 rows of 512 tokens
MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
ROWS, ACCUMULATION, LENGTH = 4, 2, 512


def random_rows(step: int) -> torch.Tensor:
    """Tokens of one step: (accumulation, rows, length + 1)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, MODEL["vocab_size"], (ACCUMULATION, ROWS, LENGTH + 1), generator=generator)


def build_bare_step(*, autocasts: bool) -> Callable[[int], float]:
    """A function that takes one optimizer step and returns its loss."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(number: int) -> float:
        total = 0.0
        for rows in random_rows(number):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                loss = model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss / ACCUMULATION
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


if __name__ == "__main__":
    build_bare_step(autocasts=True)(0)
